//! Disks that `vbd build` makes, booted.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use vbd_tests::{Attach, Machine, Scratch, allocated, run_ok};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(120);

/// The first program of the system on the disk: says what it finds, writes, and powers off.
const INIT: &str = "#!/bin/busybox sh
export PATH=/bin
mount -t proc proc /proc
echo \"name $(cat /etc/hostname)\"
echo \"hosts $(grep -c vm1 /etc/hosts)\"
echo \"fstab $(grep -c '^/dev/vda' /etc/fstab)\"
echo \"init $(stat -c '%u:%g %a' /sbin/init)\"
echo \"link $(readlink /link) $(cat /link)\"
echo written by the guest >/written
sync
mount -o remount,ro /
echo done
poweroff -f
";

/// A system of one program, in a directory.
fn tree(root: &Path) -> Result<()> {
    for dir in ["bin", "sbin", "etc", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    for applet in ["cat", "grep", "stat", "readlink", "sync", "mount", "poweroff", "echo", "sh"] {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    fs::write(root.join("sbin/init"), INIT)?;
    fs::set_permissions(root.join("sbin/init"), fs::Permissions::from_mode(0o750))?;
    fs::write(root.join("target"), "followed")?;
    symlink("target", root.join("link"))?;
    Ok(())
}

#[test]
fn a_guest_boots_from_a_disk_built_from_a_directory() -> Result<()> {
    let scratch = Scratch::new()?;
    let root = scratch.path("root");
    tree(&root)?;
    let image = scratch.path("vm1disk");
    let (from, file) = (root.to_string_lossy(), image.to_string_lossy());
    let options = ["--hostname", "vm1", "--fstab", "/dev/vda:/", "--label", "vm1root"];
    let built = scratch.vbd(["build", &file, "--size", "2G", "--from", &from].iter().chain(&options))?;
    assert!(built.status.success(), "{}", built.stderr);
    assert_eq!(fs::metadata(&image)?.len(), 2 << 30);
    assert!(allocated(&image)? < 100 * MIB, "the file is sparse: {}", allocated(&image)?);
    run_ok("/sbin/e2fsck", ["-fn", &file], LIMIT)?;

    let attach = Attach::new(&scratch, &image).vhost_user(scratch.socket("vm1.sock"));
    let server = attach.start()?;
    let mut guest = Machine::new([attach.disk()]).boot_system(&scratch)?;
    let said = guest.stdout.wait_for("done", LIMIT)?.replace('\r', "");
    // What a user owns belongs to root in the image.
    for line in ["name vm1", "hosts 1", "fstab 1", "init 0:0 750", "link target followed"] {
        assert!(said.contains(line), "{line:?} is missing in {said}");
    }
    assert!(guest.wait(LIMIT)?.success());
    assert!(server.stop()?.success());
    run_ok("/sbin/e2fsck", ["-fn", &file], LIMIT)?;
    let written = run_ok("/sbin/debugfs", ["-R", "cat /written", &file], LIMIT)?;
    assert_eq!(written, "written by the guest\n");
    Ok(())
}
