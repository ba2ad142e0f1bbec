//! Whole disks that start by themselves.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use vbd_tests::{Attach, Initramfs, Kernel, Machine, Scratch, run_ok};

/// Firmware, a boot loader and a kernel under emulation: ten times what they need on a quiet machine.
const LIMIT: Duration = Duration::from_secs(240);
const LOADER: &str = "usr/lib/systemd/boot/efi/systemd-bootx64.efi";

/// The first program of the system: says what it finds, writes, and powers off.
const INIT: &str = "#!/bin/busybox sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
echo \"command $(cat /proc/cmdline)\"
echo \"fstab $(grep -c '^PARTUUID=' /etc/fstab)\"
echo \"partitions $(ls -d /sys/block/vda/vda* | wc -l)\"
echo \"firmware $(ls -d /sys/firmware/efi)\"
swapon /dev/vda2 && echo \"swap $(grep -c '^/dev/vda2' /proc/swaps)\"
swapoff /dev/vda2
echo written by the guest >/written
sync
mount -o remount,ro /
echo done
poweroff -f
";

/// A system of one program, with a kernel and a boot loader.
fn tree(root: &Path) -> Result<()> {
    for directory in ["bin", "sbin", "etc", "proc", "sys", "dev", "tmp", "boot", "usr/lib/systemd/boot/efi"] {
        fs::create_dir_all(root.join(directory))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    for applet in ["cat", "grep", "ls", "wc", "sync", "mount", "poweroff", "echo", "sh", "swapon", "swapoff"]
    {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    fs::write(root.join("sbin/init"), INIT)?;
    fs::set_permissions(root.join("sbin/init"), fs::Permissions::from_mode(0o755))?;
    let kernel = Kernel::get()?;
    fs::copy(kernel.image()?, root.join("boot/vmlinuz-6.12-test"))?;
    fs::write(root.join("boot/initrd.img-6.12-test"), Initramfs::switch_root(&kernel, "/dev/vda3")?)?;
    fs::copy(Path::new("/").join(LOADER), root.join(LOADER))?;
    Ok(())
}

#[test]
fn a_machine_with_firmware_boots_a_disk_that_was_built() -> Result<()> {
    let scratch = Scratch::new()?;
    let (root, image) = (scratch.path("root"), scratch.path("vm1disk"));
    tree(&root)?;
    let (from, file) = (root.to_string_lossy(), image.to_string_lossy());
    let mut call = vec!["build", &file, "--size", "1G", "--from", &from, "--disk", "gpt", "--boot", "uefi"];
    call.extend(["--esp", "64M", "--swap", "16M"]);
    for word in ["console=ttyS0", "panic=-1", "tsc=unstable", "no_timer_check", "quiet"] {
        call.extend(["--kernel-option", word]);
    }
    let built = scratch.vbd(call)?;
    assert!(built.status.success(), "{}", built.stderr);
    assert!(
        built.stdout.contains("partition 3: ") && built.stdout.contains("Linux root"),
        "{}",
        built.stdout
    );
    let verdict = run_ok("/usr/sbin/sgdisk", ["--verify".as_ref(), image.as_os_str()], LIMIT)?;
    assert!(verdict.contains("No problems found"), "{verdict}");

    let attach = Attach::new(&scratch, &image).vhost_user(scratch.socket("vm1.sock"));
    let server = attach.start()?;
    let mut guest = Machine::new([attach.disk()]).boot_firmware(&scratch)?;
    let said = guest.stdout.wait_for("done", LIMIT)?.replace('\r', "");
    for part in ["root=PARTUUID=", "fstab 3", "partitions 3", "firmware /sys/firmware/efi", "swap 1"] {
        assert!(said.contains(part), "{part:?} is missing in {said}");
    }
    assert!(guest.wait(LIMIT)?.success());
    assert!(server.stop()?.success());
    let info = scratch.vbd(["info", &file])?;
    assert!(info.stdout.contains("clean"), "{}", info.stdout);
    Ok(())
}
