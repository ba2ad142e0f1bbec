//! Places to work in, and other users to work as.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vbd_fs::{BuildOptions, BuildSpec, Error, ImageSize, Progress, Report, Silent, Source, Tailor};

pub(crate) const MIB: u64 = 1 << 20;

/// A directory that everybody may use, removed when dropped.
pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn new() -> Scratch {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o777)).unwrap();
        Scratch(directory)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Its names, in order.
    pub(crate) fn names(&self) -> Vec<String> {
        names(self.0.path())
    }
}

pub(crate) fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Does `work`, the body of the test `name`, as an ordinary user: as this one, or as nobody in a process of its own.
pub(crate) fn as_ordinary_user(name: &str, work: impl FnOnce()) {
    if is_root() { as_nobody(name, &[]) } else { work() }
}

/// Runs the test `name` as nobody, with variables of its own. This is root.
pub(crate) fn as_nobody(name: &str, variables: &[(&str, &Path)]) {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).envs(variables.iter().copied());
    again(&mut command, name, &Scratch::new());
}

/// Does `work`, the body of the test `name`, with mounts of its own, as root or as the root of a user namespace.
pub(crate) fn with_own_mounts(name: &str, work: impl FnOnce()) {
    const INSIDE: &str = "VBD_TEST_OWN_MOUNTS";
    if std::env::var_os(INSIDE).is_some() {
        return work();
    }
    let mut command = Command::new("unshare");
    command.env(INSIDE, "1").arg(if is_root() { "--mount" } else { "--map-root-user" }).arg("--mount");
    again(&mut command, name, &Scratch::new());
}

/// Runs one test of this program again, by another program. It may be where others cannot read: a copy is run.
fn again(command: &mut Command, name: &str, scratch: &Scratch) {
    let copy = scratch.path("test");
    // By another program: one that was open for writing here could not be run while a thread forks.
    let copied =
        Command::new("install").arg("-m755").arg(std::env::current_exe().unwrap()).arg(&copy).status();
    assert!(copied.unwrap().success());
    let ran =
        command.arg(&copy).args(["--exact", name, "--nocapture"]).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{said}{}", String::from_utf8_lossy(&ran.stderr));
    assert!(said.contains("1 passed"), "{name} is the name of no test: {said}");
}

/// A build of `size` bytes from a path, with nothing else asked for.
pub(crate) fn options(size: u64, from: &Path) -> BuildOptions {
    let this = std::env::current_exe().unwrap();
    BuildOptions {
        size: ImageSize::Fixed(size),
        spec: BuildSpec::new(Source::Path(from.to_owned())),
        tailor: Tailor::default(),
        force: false,
        time: None,
        verify: false,
        threads: None,
        helper: vec![this, "--exact".into(), "stage_helper".into(), "--nocapture".into()],
    }
}

pub(crate) fn build(path: &Path, options: &BuildOptions) -> Result<Report, Error> {
    build_with(path, options, &mut Silent)
}

pub(crate) fn build_with(
    path: &Path,
    options: &BuildOptions,
    progress: &mut dyn Progress,
) -> Result<Report, Error> {
    vbd_fs::build(path, options, progress)
}
