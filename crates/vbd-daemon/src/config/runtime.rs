//! The directory for sockets and records of a running vbd.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Where sockets go unless the configuration says otherwise: `$XDG_RUNTIME_DIR/vbd`; without that variable
/// `/run/vbd` for root and `/tmp/vbd-UID` for everybody else.
pub fn default_runtime_dir() -> PathBuf {
    choose(std::env::var_os("XDG_RUNTIME_DIR").as_deref(), rustix::process::geteuid().as_raw())
}

fn choose(xdg: Option<&OsStr>, uid: u32) -> PathBuf {
    match xdg.map(Path::new).filter(|dir| dir.is_absolute()) {
        Some(dir) => dir.join("vbd"),
        None if uid == 0 => PathBuf::from("/run/vbd"),
        None => PathBuf::from(format!("/tmp/vbd-{uid}")),
    }
}

/// Makes the directory, with those above it, for this user alone (mode 0700), or takes the one that is there.
///
/// # Errors
/// Whatever the system says; `PermissionDenied` when the directory belongs to another user or others may
/// write to it: who can put a socket there could stand in for a disk.
pub fn prepare_runtime_dir(dir: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let about = std::fs::metadata(dir)?;
    let refuse = |why: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    if about.uid() != rustix::process::geteuid().as_raw() {
        return refuse(format!("{} belongs to user {}: name another directory", dir.display(), about.uid()));
    }
    if about.mode() & 0o022 != 0 {
        let mode = about.mode() & 0o7777;
        return refuse(format!("others may write to {} (mode {mode:04o}): chmod go-w it", dir.display()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_default_follows_the_user() {
        let xdg = Some(OsStr::new("/run/user/1000"));
        assert_eq!(choose(xdg, 1000), Path::new("/run/user/1000/vbd"));
        assert_eq!(choose(None, 0), Path::new("/run/vbd"));
        assert_eq!(choose(None, 1000), Path::new("/tmp/vbd-1000"));
        assert_eq!(choose(Some(OsStr::new("relative")), 1000), Path::new("/tmp/vbd-1000"));
    }

    #[test]
    fn a_new_directory_is_for_this_user_alone() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("a/b");
        prepare_runtime_dir(&dir).unwrap();
        assert_eq!(std::fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
        prepare_runtime_dir(&dir).unwrap();
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let base = tempfile::tempdir().unwrap();
        std::fs::set_permissions(base.path(), Permissions::from_mode(0o777)).unwrap();
        let error = prepare_runtime_dir(base.path()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("(mode 0777): chmod go-w"), "{error}");
    }
}
