//! Images that the kernel has mounted through a loop device.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Unmounts what is mounted at `point`, and waits until the kernel has let go of `image`: whoever made a mount
/// namespace meanwhile (as mmdebstrap does) holds a copy of the mount, and the filesystem stays in use until that ends.
///
/// # Panics
/// It cannot be unmounted, or somebody keeps it.
pub fn unmount(point: &Path, image: &Path) {
    let unmounted = Command::new("umount").arg(point).status();
    if std::thread::panicking() {
        return;
    }
    assert!(unmounted.is_ok_and(|status| status.success()), "umount {}", point.display());
    let image = fs::canonicalize(image).expect("an image");
    super::eventually("nobody has the image mounted", || !is_behind_a_loop_device(&image));
}

fn is_behind_a_loop_device(image: &Path) -> bool {
    let Ok(devices) = fs::read_dir("/sys/block") else { return false };
    let files = devices
        .flatten()
        .filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
    files.into_iter().any(|file| Path::new(file.trim_end()) == image)
}
