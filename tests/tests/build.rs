//! Disks that `vbd build` makes, booted.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use vbd_tests::{Attach, Disk, Machine, Scratch, Server, allocated, run_ok};

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

/// Boots the system on `disk`, which `image` holds, and checks what it finds and what it leaves.
fn boots(scratch: &Scratch, server: Server, disk: Disk, image: &Path) -> Result<()> {
    let mut guest = Machine::new([disk]).boot_system(scratch)?;
    let said = guest.stdout.wait_for("done", LIMIT)?.replace('\r', "");
    // What a user owns belongs to root in the image.
    for line in ["name vm1", "hosts 1", "fstab 1", "init 0:0 750", "link target followed"] {
        assert!(said.contains(line), "{line:?} is missing in {said}");
    }
    assert!(guest.wait(LIMIT)?.success());
    assert!(server.stop()?.success());
    run_ok("/sbin/e2fsck", ["-fn".as_ref(), image.as_os_str()], LIMIT)?;
    let written =
        run_ok("/sbin/debugfs", ["-R".as_ref(), "cat /written".as_ref(), image.as_os_str()], LIMIT)?;
    assert_eq!(written, "written by the guest\n");
    Ok(())
}

/// A disk that `vbd build` makes of the system.
fn built(scratch: &Scratch) -> Result<PathBuf> {
    let root = scratch.path("root");
    tree(&root)?;
    let image = scratch.path("vm1disk");
    let (from, file) = (root.to_string_lossy(), image.to_string_lossy());
    let options = ["--hostname", "vm1", "--fstab", "/dev/vda:/", "--label", "vm1root"];
    let built = scratch.vbd(["build", &file, "--size", "2G", "--from", &from].iter().chain(&options))?;
    assert!(built.status.success(), "{}", built.stderr);
    Ok(image)
}

#[test]
fn a_guest_boots_from_a_disk_built_from_a_directory() -> Result<()> {
    let scratch = Scratch::new()?;
    let image = built(&scratch)?;
    assert_eq!(fs::metadata(&image)?.len(), 2 << 30);
    assert!(allocated(&image)? < 100 * MIB, "the file is sparse: {}", allocated(&image)?);
    run_ok("/sbin/e2fsck", ["-fn".as_ref(), image.as_os_str()], LIMIT)?;

    let attach = Attach::new(&scratch, &image).vhost_user(scratch.socket("vm1.sock"));
    boots(&scratch, attach.start()?, attach.disk(), &image)
}

#[test]
fn a_configuration_alone_goes_from_nothing_to_a_guest() -> Result<()> {
    let scratch = Scratch::new()?;
    let root = scratch.path("root");
    tree(&root)?;
    let configuration = format!(
        "[[disk]]\npath = \"vm1disk\"\nsize = \"1G\"\n[disk.build]\nfrom = {root:?}\n\
         [disk.tailor]\nhostname = \"vm1\"\nfstab = [\"/dev/vda:/\"]\n"
    );
    let server = scratch.up("vm1.toml", &configuration)?;
    boots(&scratch, server, scratch.disk("vm1disk", 1), &scratch.path("vm1disk"))
}

#[test]
fn a_guest_boots_as_an_old_xm_file_says() -> Result<()> {
    let scratch = Scratch::new()?;
    let image = built(&scratch)?;
    let configuration = format!(
        "# an old domain\nkernel = '/boot/vmlinuz'\nmemory = 256\nname = 'vm1'\n\
         disk = ['file:{},sda1,w',\n]\nroot = '/dev/sda1 ro'\n",
        image.display()
    );
    let server = scratch.up("vm1.cfg", &configuration)?;
    boots(&scratch, server, scratch.disk("vm1-sda1", 1), &image)
}
