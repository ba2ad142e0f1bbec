//! What the demo, the tests and the benchmark need of the machine, and getting it.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};
use vbd_tests::Kernel;

use crate::apt;

/// How to see that a package is there.
enum Sign {
    /// A program of this name.
    Program(&'static str),
    /// A program of this name that says it is of this major version or a later one.
    Version(&'static str, u32),
    /// A program that needs no libraries: it is all there is in a guest's first filesystem.
    Static(&'static str),
    /// A file at this path.
    File(&'static str),
    /// A module that Debian's Python finds.
    Python(&'static str),
}

/// One thing needed.
struct Need {
    sign: Sign,
    package: &'static str,
    /// What it is for, for whoever installs it by hand.
    purpose: &'static str,
}

const fn need(sign: Sign, package: &'static str, purpose: &'static str) -> Need {
    Need { sign, package, purpose }
}

/// The first QEMU whose sockets reconnect within milliseconds and whose NBD has extended headers.
const QEMU: u32 = 10;

/// Both packages of QEMU come from one suite, or the second does not install.
const FROM_BACKPORTS: [Need; 2] = [
    need(
        Sign::Version("qemu-system-x86_64", QEMU),
        "qemu-system-x86",
        "the machines that boot from the disks",
    ),
    need(
        Sign::Version("qemu-storage-daemon", QEMU),
        "qemu-utils",
        "qemu-img, qemu-io, qemu-nbd, qemu-storage-daemon",
    ),
];

const NEEDS: [Need; 31] = [
    need(Sign::Static("/bin/busybox"), "busybox-static", "the guests' first filesystem"),
    need(Sign::Program("mke2fs"), "e2fsprogs", "making and checking ext2, ext3, ext4"),
    need(Sign::Program("fakeroot"), "fakeroot", "owners in ext2 and ext3 without being root"),
    need(Sign::Program("mkfs.xfs"), "xfsprogs", "a filesystem that shares blocks"),
    need(Sign::Program("mkfs.btrfs"), "btrfs-progs", "another one"),
    need(Sign::Program("mmdebstrap"), "mmdebstrap", "root trees of Debian"),
    need(Sign::Program("newuidmap"), "uidmap", "mmdebstrap without root"),
    need(Sign::Program("xz"), "xz-utils", "unpacking kernel modules"),
    need(Sign::Program("zstd"), "zstd", "archives to build from"),
    need(Sign::Program("fio"), "fio", "load with verification"),
    need(Sign::Program("nbdinfo"), "libnbd-bin", "nbdinfo and nbdcopy"),
    need(Sign::Python("nbd"), "python3-libnbd", "nbdsh"),
    need(Sign::Program("nbdkit"), "nbdkit", "a peer to compare with"),
    need(Sign::Program("c++"), "g++", "the fuzz targets' runtime"),
    need(Sign::Program("cryptsetup"), "cryptsetup-bin", "encrypted disks, to recognize"),
    need(Sign::Program("setcap"), "libcap2-bin", "files with capabilities, to copy"),
    need(Sign::Program("setfacl"), "acl", "files with access lists, to copy"),
    need(Sign::Program("setfattr"), "attr", "files with extended attributes, to copy"),
    need(Sign::Program("sfdisk"), "fdisk", "partition tables, to compare with"),
    need(Sign::Program("sgdisk"), "gdisk", "partition tables, to compare with"),
    need(Sign::Program("fsck.vfat"), "dosfstools", "checking FAT"),
    need(Sign::Program("mcopy"), "mtools", "reading FAT"),
    need(Sign::File("/usr/share/OVMF/OVMF_CODE_4M.fd"), "ovmf", "machines that boot by UEFI"),
    need(
        Sign::File("/usr/lib/systemd/boot/efi/systemd-bootx64.efi"),
        "systemd-boot-efi",
        "a boot loader for them",
    ),
    need(Sign::Program("debootstrap"), "debootstrap", "the domain 0 of the machine with Xen"),
    need(Sign::Program("cpio"), "cpio", "archives to build from, the first filesystems of domains"),
    need(Sign::Program("bsdtar"), "libarchive-tools", "archives to build from"),
    need(Sign::Program("mksquashfs"), "squashfs-tools", "squashfs to build from"),
    need(Sign::Program("docker-registry"), "docker-registry", "a registry of container images"),
    need(Sign::Program("skopeo"), "skopeo", "filling it"),
    need(Sign::Program("strip"), "binutils", "a command that is quick to load there"),
];

/// Installs what is missing, or, without root, says what to install; then fetches the kernel for guests.
///
/// # Errors
/// When something is missing and cannot be installed.
pub(crate) fn run() -> Result<()> {
    let backports = backports()?;
    let (main, newer) = (missing(&NEEDS), missing(&FROM_BACKPORTS));
    let kernel = Kernel::is_cached()? || has_kernel();
    if main.is_empty() && newer.is_empty() && kernel {
        Kernel::get()?;
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        bail!("{}", by_hand(&main, &newer, kernel, backports.as_deref())?);
    }
    apt::update()?;
    if let Some(suite) = &backports
        && (!newer.is_empty() || !has_kernel())
        && !apt::has_suite(suite)?
    {
        apt::add_suite(suite, &apt::codename()?)?;
        apt::update()?;
    }
    if !main.is_empty() {
        apt::install(&packages(&main), None)?;
    }
    if !newer.is_empty() {
        // Both, so that they stay of one version.
        let both: Vec<&Need> = FROM_BACKPORTS.iter().collect();
        apt::install(&packages(&both), backports.as_deref())?;
    }
    Kernel::get()?;
    let left: Vec<&Need> = missing(&NEEDS).into_iter().chain(missing(&FROM_BACKPORTS)).collect();
    if !left.is_empty() {
        bail!("installed, and still not found:\n{}", table(&left));
    }
    Ok(())
}

/// The suite with the newer versions: Debian 12 has them in its backports, later releases by themselves.
fn backports() -> Result<Option<String>> {
    Ok((apt::codename()? == "bookworm").then(|| "bookworm-backports".to_owned()))
}

/// Whether apt's lists name a kernel for guests.
fn has_kernel() -> bool {
    let names = Command::new("apt-cache").args(["pkgnames", "linux-image-6.12."]).output();
    names.is_ok_and(|names| String::from_utf8_lossy(&names.stdout).contains("-cloud-amd64"))
}

fn missing(needs: &[Need]) -> Vec<&Need> {
    needs.iter().filter(|need| !is_there(&need.sign)).collect()
}

fn is_there(sign: &Sign) -> bool {
    match sign {
        Sign::Program(name) => on_path(name),
        Sign::File(path) => Path::new(path).exists(),
        Sign::Version(name, least) => version(name).is_some_and(|major| major >= *least),
        Sign::Static(path) => Path::new(path).exists() && !has_interpreter(path),
        Sign::Python(module) => succeeds("/usr/bin/python3", &["-c", &format!("import {module}")]),
    }
}

/// Whether a program is in `$PATH` or where root's are, which an ordinary user's `$PATH` leaves out.
fn on_path(name: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let roots = ["/usr/sbin", "/sbin"].map(Into::into);
    env::split_paths(&path).chain(roots).any(|dir| dir.join(name).is_file())
}

/// The major version that a program of QEMU tells of itself: `qemu-img version 10.0.2 (Debian …)`.
fn version(name: &str) -> Option<u32> {
    let output = Command::new(name).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (_, number) = text.split_once("version ")?;
    number.split('.').next()?.parse().ok()
}

/// Whether an ELF program names a loader, which is to say needs libraries.
fn has_interpreter(path: &str) -> bool {
    fs::read(path).is_ok_and(|bytes| {
        let head = &bytes[..bytes.len().min(4096)];
        head.windows(11).any(|window| window == b"/ld-linux-x")
    })
}

fn succeeds(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
}

fn packages<'a>(needs: &[&'a Need]) -> Vec<&'a str> {
    needs.iter().map(|need| need.package).collect()
}

fn table(needs: &[&Need]) -> String {
    needs.iter().map(|need| format!("  {:<16} {}\n", need.package, need.purpose)).collect()
}

/// What root has to do, as lines to paste.
fn by_hand(main: &[&Need], newer: &[&Need], kernel: bool, backports: Option<&str>) -> Result<String> {
    let mut text = String::from("not root, so nothing was installed. Missing:\n");
    text += &table(main);
    text += &table(newer);
    if !kernel {
        text += "  the lists of packages that name Debian's 6.12 cloud kernel, which guests boot\n";
    }
    text += "\nAs root:\n";
    if let Some(suite) = backports
        && !apt::has_suite(suite)?
    {
        let archive = apt::archive(&apt::codename()?)?;
        text += &format!("  echo 'deb {archive} {suite} main' >/etc/apt/sources.list.d/backports.list\n");
    }
    text += "  apt-get update\n";
    if !main.is_empty() {
        text += &format!("  {}\n", apt::install_line(&packages(main), None));
    }
    if !newer.is_empty() {
        let both: Vec<&Need> = FROM_BACKPORTS.iter().collect();
        text += &format!("  {}\n", apt::install_line(&packages(&both), backports));
    }
    Ok(text)
}
