//! Files that the host uses: mounted, on a loop device. They need root and loop devices; elsewhere they say so.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use vbd_image::host;
use vbd_image::lease::{Lease, LeaseError, Mode, Options};
use vbd_image::open::open;

/// Programs of the system's administrator are not on every user's path.
fn path_of_programs() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

fn run(program: &str, arguments: &[&Path]) -> Option<String> {
    let output = Command::new(program).args(arguments).env("PATH", path_of_programs()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A loop device on a file, detached when dropped.
struct Loop(PathBuf);

impl Loop {
    /// `None`, with a word to the reader, where loop devices are not to be had.
    fn attach(path: &Path) -> Option<Self> {
        let device = run("losetup", &["--find".as_ref(), "--show".as_ref(), path]);
        if device.is_none() {
            eprintln!("skipped: no loop device here (it takes root and /dev/loop-control)");
        }
        Some(Loop(device?.into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run("losetup", &["--detach".as_ref(), &self.0]);
    }
}

/// A mount, unmounted when dropped.
struct Mount(PathBuf);

impl Mount {
    fn new(device: &Path, point: &Path) -> Self {
        std::fs::create_dir(point).unwrap();
        run("mount", &[device, point]).expect("mount");
        Mount(point.to_owned())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        run("umount", &[&self.0]);
    }
}

/// A directory with an ext4 of 4 MiB in it.
fn image() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm 1.img");
    File::create(&path).unwrap().set_len(4 << 20).unwrap();
    run("mke2fs", &["-qF".as_ref(), "-text4".as_ref(), &path]).expect("mke2fs of e2fsprogs");
    (directory, path)
}

fn write_lease(path: &Path, override_: bool) -> Result<Lease, LeaseError> {
    let file = File::options().read(true).write(true).open(path).unwrap();
    Lease::acquire(file.as_fd(), path, Mode::Write, Options { override_, ..Options::default() })
}

#[test]
fn a_free_file_is_free() {
    let (_directory, path) = image();
    assert_eq!(host::usage(&File::open(&path).unwrap(), &path).unwrap(), None);
}

#[test]
fn a_file_on_a_loop_device_is_not_written_to() {
    let (_directory, path) = image();
    let Some(device) = Loop::attach(&path) else { return };
    let error = write_lease(&path, false).unwrap_err().to_string();
    let expected = format!("is attached to {}", device.0.display());
    assert!(error.contains(&expected) && error.contains("run `losetup -d /dev/loop"), "{error}");
    drop(write_lease(&path, true).unwrap());

    let file = File::open(&path).unwrap();
    Lease::acquire(file.as_fd(), &path, Mode::Read, Options::default()).expect("readers are only warned");
    drop(device);
    write_lease(&path, false).unwrap();
}

#[test]
fn a_mounted_file_is_not_written_to() {
    let (directory, path) = image();
    let Some(device) = Loop::attach(&path) else { return };
    let mount = Mount::new(&device.0, &directory.path().join("mount point"));
    let link = directory.path().join("link");
    std::fs::hard_link(&path, &link).unwrap();
    for name in [&path, &link] {
        let error = write_lease(name, false).unwrap_err();
        let text = error.to_string();
        let LeaseError::Host(used) = error else { panic!("{text}") };
        assert_eq!((&used.loops, &used.mounts), (&vec![device.0.clone()], &vec![mount.0.clone()]));
        assert!(text.contains("mounted on /") && text.contains("run `umount /"), "{text}");
    }
}

#[test]
fn what_uses_a_block_device_is_named() {
    let (directory, path) = image();
    let Some(device) = Loop::attach(&path) else { return };
    let exclusive =
        || File::options().read(true).write(true).custom_flags(libc::O_EXCL).open(&device.0).map(drop);
    assert_eq!(open(&device.0).unwrap().size, 4 << 20);
    let claimed = File::options().read(true).custom_flags(libc::O_EXCL).open(&device.0).unwrap();
    assert_eq!(exclusive().unwrap_err().raw_os_error(), Some(libc::EBUSY));
    let text = host::busy_device(&device.0).to_string();
    assert!(text.contains("is used by another program"), "{text}");
    drop(claimed);

    let mount = Mount::new(&device.0, &directory.path().join("mount"));
    assert_eq!(exclusive().unwrap_err().raw_os_error(), Some(libc::EBUSY));
    let text = host::busy_device(&device.0).to_string();
    let expected = format!("is mounted on {}", mount.0.display());
    assert!(text.contains(&expected) && text.contains("umount"), "{text}");
    let error = write_lease(&device.0, false).unwrap_err().to_string();
    assert!(error.contains(&expected), "the lease looks for itself: {error}");
    drop(mount);
    exclusive().unwrap();
}
