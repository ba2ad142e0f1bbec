//! Filesystems that the kernel has mounted, images through a loop device. These need root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// A filesystem that is mounted until it is dropped.
pub struct Mounted {
    at: PathBuf,
    /// What is behind its loop device.
    image: Option<PathBuf>,
    // Goes when nothing is mounted there any more.
    _own: Option<TempDir>,
}

impl Mounted {
    /// Mounts an image in a directory of its own, with options such as `ro`.
    ///
    /// # Panics
    /// It cannot be mounted.
    pub fn new(image: &Path, options: &str) -> Mounted {
        let own = tempfile::tempdir().expect("a directory");
        let mut mounted = Mounted::at(image, own.path(), options);
        mounted._own = Some(own);
        mounted
    }

    /// The same; nothing where the kernel refuses.
    ///
    /// # Panics
    /// There is no `mount` to run.
    pub fn attempt(image: &Path, options: &str) -> Option<Mounted> {
        let own = tempfile::tempdir().expect("a directory");
        let mut mount = Command::new("mount");
        let output = mount.args(["-o", &format!("loop,{options}")]).arg(image).arg(own.path()).output();
        output.expect("mount").status.success().then(|| Mounted {
            at: own.path().to_owned(),
            image: Some(image.to_owned()),
            _own: Some(own),
        })
    }

    /// The same as [`Mounted::new`] at a place, which is made where it is missing.
    ///
    /// # Panics
    /// It cannot be mounted.
    pub fn at(image: &Path, at: &Path, options: &str) -> Mounted {
        mount(Command::new("mount").args(["-o", &format!("loop,{options}")]).arg(image), at);
        Mounted { at: at.to_owned(), image: Some(image.to_owned()), _own: None }
    }

    /// Mounts a filesystem in memory.
    ///
    /// # Panics
    /// It cannot be mounted.
    pub fn in_memory(at: &Path, options: &str) -> Mounted {
        mount(Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]), at);
        Mounted { at: at.to_owned(), image: None, _own: None }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.at
    }
}

fn mount(command: &mut Command, at: &Path) {
    fs::create_dir_all(at).expect("a place");
    let output = command.arg(at).output().expect("mount");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "mounting at {}: {said}", at.display());
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.at, self.image.as_deref());
    }
}

/// Unmounts what is mounted at `point`, and waits until the kernel has let go of `image`: whoever made a mount
/// namespace meanwhile (as mmdebstrap does) holds a copy of the mount, and the filesystem stays in use until that ends.
fn unmount(point: &Path, image: Option<&Path>) {
    let unmounted = Command::new("umount").arg(point).status();
    if std::thread::panicking() {
        return;
    }
    assert!(unmounted.is_ok_and(|status| status.success()), "umount {}", point.display());
    if let Some(image) = image {
        let image = fs::canonicalize(image).expect("an image");
        super::eventually("nobody has the image mounted", || !is_behind_a_loop_device(&image));
    }
}

fn is_behind_a_loop_device(image: &Path) -> bool {
    let Ok(devices) = fs::read_dir("/sys/block") else { return false };
    let files = devices
        .flatten()
        .filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
    files.into_iter().any(|file| Path::new(file.trim_end()) == image)
}
