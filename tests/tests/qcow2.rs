//! qcow2 images end to end: guests over an overlay, and QEMU's tools beside a disk that is served.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use vbd_tests::{Attach, Finished, Guest, Machine, Scratch, Server, allocated, command, run, run_ok};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(240);

/// Serves a qcow2 image to one guest.
fn attach<'a>(scratch: &'a Scratch, image: &Path) -> Attach<'a> {
    Attach::new(scratch, image).option("--format").option("qcow2")
}

fn qemu_img<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Result<String> {
    run_ok("qemu-img", arguments, LIMIT)
}

/// An overlay over a raw file that has a filesystem with some files in it: both, and the sum of the latter.
fn overlay(scratch: &Scratch, size: u64) -> Result<(PathBuf, PathBuf, String)> {
    let tree = scratch.path("tree");
    fs::create_dir(&tree)?;
    for file in 0..40u32 {
        let content: Vec<u8> =
            (0..20_000 + file * 977).flat_map(|word| (word * (file + 3)).to_le_bytes()).collect();
        fs::write(tree.join(format!("file{file}")), content)?;
    }
    let below = scratch.sparse("below.raw", size)?;
    run_ok("/sbin/mke2fs", ["-q", "-t", "ext4", "-d", text(&tree), text(&below)], LIMIT)?;
    let image = scratch.path("overlay.qcow2");
    qemu_img(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "below.raw", text(&image)])?;
    let sum = sum(&below)?;
    Ok((image, below, sum))
}

fn sum(file: &Path) -> Result<String> {
    let said = run_ok("sha256sum", [text(file)], LIMIT)?;
    Ok(said.split(' ').next().unwrap_or_default().to_owned())
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// Makes, renames, overwrites and removes files and directories, in four processes at once, in a mounted filesystem.
const STRESS: &str = "worker() { i=0; while [ $i -lt 50 ]; do d=/tools/mnt/w$1/$((i % 7)); mkdir -p $d; \
    dd if=/dev/urandom of=$d/f$i bs=$((512 + i * 37)) count=$((i % 40 + 1)) 2>/dev/null; \
    [ $((i % 3)) = 0 ] && mv $d/f$i $d/m$i; \
    [ $((i % 4)) = 1 ] && dd if=/dev/zero of=$d/f$i bs=1000 seek=$i count=3 conv=notrunc 2>/dev/null; \
    [ $((i % 5)) = 4 ] && rm -rf /tools/mnt/w$1/$(((i + 3) % 7)); \
    [ $((i % 20)) = 19 ] && sync; i=$((i + 1)); done; }; \
    for w in 1 2 3 4; do worker $w & done; wait; true";

/// What the filesystem holds has to be there when it is read from the disk again.
fn remounted(guest: &mut Guest) -> Result<()> {
    guest.sh("cd /tools/mnt && find . -type f ! -path './lost*' -print0 | sort -z | xargs -0 md5sum >/tmp/sums; cd /")?;
    guest.sh("umount /tools/mnt && echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 /dev/vda /tools/mnt")?;
    guest.sh("cd /tools/mnt && md5sum -c /tmp/sums >/tmp/said || { cat /tmp/said; false; }; cd /")?;
    Ok(())
}

/// What is to be so with an image that a guest has left: no error and, where nothing was killed, no leak; a clean filesystem.
fn is_whole(scratch: &Scratch, image: &Path, may_leak: bool) -> Result<()> {
    let check = run("qemu-img", ["check", "-f", "qcow2", text(image)], LIMIT)?;
    let good = check.status.success() || may_leak && check.status.code() == Some(3);
    assert!(good, "{check:?}");
    let raw = scratch.path("flat.raw");
    qemu_img(["convert", "-f", "qcow2", "-O", "raw", text(image), text(&raw)])?;
    run_ok("/sbin/e2fsck", ["-fn", text(&raw)], LIMIT)?;
    Ok(())
}

/// cloud-hypervisor #8621: ext4 over a backing file, several queues.
#[test]
fn four_queues_over_a_backing_file_keep_a_filesystem_whole() -> Result<()> {
    let scratch = Scratch::new()?;
    let (image, below, before) = overlay(&scratch, 256 * MIB)?;
    let attach = attach(&scratch, &image).vhost_user(scratch.socket("disk.sock")).queues(4);
    let server = attach.start()?;
    let mut machine = Machine::new([attach.disk()]).with_tools();
    machine.cpus = 4;
    let mut guest = machine.boot(&scratch)?;
    guest.sh("mount -t ext4 -o discard /dev/vda /tools/mnt")?;
    guest.begin(STRESS)?;
    let outcome = guest.finish(LIMIT)?;
    assert_eq!(outcome.status, 0, "{}", outcome.output);
    guest.begin(&Guest::tool(
        "fio --name=verified --directory=/mnt --rw=randwrite --bs=512-64k --bs_unaligned=0 --size=2M --numjobs=4 \
         --ioengine=libaio --iodepth=8 --direct=1 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --minimal",
    ))?;
    let outcome = guest.finish(LIMIT)?;
    assert_eq!(outcome.status, 0, "{}", outcome.output);
    remounted(&mut guest)?;
    guest.sh("rm -rf /tools/mnt/w1 /tools/mnt/verified* && sync && fstrim /tools/mnt")?;
    remounted(&mut guest)?;
    guest.sh("umount /tools/mnt")?;
    assert_eq!(guest.disk_errors(), [""; 0]);
    guest.power_off()?;
    assert!(server.stop()?.success());
    is_whole(&scratch, &image, false)?;
    assert_eq!(sum(&below)?, before, "what is below has changed");
    Ok(())
}

/// What the guest had flushed is there when both are killed, and the image has no error.
#[test]
fn vbd_and_its_guest_killed_in_mid_write_leave_an_image_without_errors() -> Result<()> {
    let scratch = Scratch::new()?;
    let (image, below, before) = overlay(&scratch, 256 * MIB)?;
    let attach = attach(&scratch, &image).vhost_user(scratch.socket("disk.sock")).queues(2);
    let server = attach.start()?;
    let mut guest = Machine::new([attach.disk()]).with_tools().boot(&scratch)?;
    guest.sh("mount -t ext4 /dev/vda /tools/mnt && mkdir /tools/mnt/kept")?;
    guest.sh(
        "for i in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=/tools/mnt/kept/$i bs=300k count=$i; done; sync",
    )?;
    let sums = guest.sh("cd /tools/mnt/kept && md5sum *; cd /")?;
    let written = allocated(&image)?;
    guest.begin(&Guest::tool(
        "fio --name=load --directory=/mnt --rw=randwrite --bs=4k-64k --size=48M --fsync=64 --ioengine=libaio \
         --iodepth=16 --direct=1 --time_based --runtime=100 --minimal",
    ))?;
    let end = Instant::now() + LIMIT;
    while allocated(&image)? < written + 12 * MIB {
        ensure!(Instant::now() < end, "{} stays small", image.display());
        thread::sleep(Duration::from_millis(20));
    }
    assert!(guest.is_busy(), "killed while the guest writes");
    server.kill();
    guest.kill();
    // The lock stays until the last write in flight has landed.
    let check = loop {
        let check = run("qemu-img", ["check", "-f", "qcow2", text(&image)], LIMIT)?;
        if !check.stderr.contains("lock") || Instant::now() > end {
            break check;
        }
    };
    assert!(matches!(check.status.code(), Some(0 | 3)), "{check:?}");

    let server = attach.start()?;
    let mut guest = Machine::new([attach.disk()]).with_tools().boot(&scratch)?;
    guest.sh("mount -t ext4 /dev/vda /tools/mnt")?;
    assert_eq!(guest.sh("cd /tools/mnt/kept && md5sum *; cd /")?, sums);
    guest.sh("rm -r /tools/mnt/load* && umount /tools/mnt")?;
    guest.power_off()?;
    assert!(server.stop()?.success());
    is_whole(&scratch, &image, true)?;
    assert_eq!(sum(&below)?, before, "what is below has changed");
    Ok(())
}

/// A load in the guest, checked at its end, under which the server is to go away.
fn begin_verified(guest: &mut Guest) -> Result<()> {
    guest.begin(&Guest::tool(
        "fio --name=verified --filename=/dev/vda --offset=128M --rw=randwrite --bs=4k-64k --size=48M --ioengine=libaio \
         --iodepth=16 --direct=1 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --minimal",
    ))
}

fn wait_for_growth(image: &Path, bytes: u64) -> Result<()> {
    let end = Instant::now() + LIMIT;
    while allocated(image)? < bytes {
        ensure!(Instant::now() < end, "{} stays small", image.display());
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// What was written is brought to the image when vbd is asked to end, and the guest sees a pause.
#[test]
fn vbd_restarted_in_mid_write_is_a_pause_for_the_guest() -> Result<()> {
    let scratch = Scratch::new()?;
    let (image, ..) = overlay(&scratch, 256 * MIB)?;
    let attach = attach(&scratch, &image).vhost_user(scratch.socket("disk.sock")).queues(2);
    let mut server = attach.start()?;
    let mut guest = Machine::new([attach.disk()]).with_tools().boot(&scratch)?;
    begin_verified(&mut guest)?;
    for progress in [4, 16] {
        wait_for_growth(&image, progress * MIB)?;
        assert!(guest.is_busy(), "restarted while the guest writes");
        assert!(server.stop()?.success());
        server = attach.start()?;
    }
    let outcome = guest.finish(LIMIT)?;
    assert_eq!(outcome.status, 0, "{}", outcome.output);
    assert_eq!(guest.disk_errors(), [""; 0]);
    guest.power_off()?;
    assert!(server.stop()?.success());
    Ok(())
}

/// Where new clusters are is noted beside the image, so nothing that the guest has written is lost with the process.
#[test]
fn vbd_killed_in_mid_write_is_a_pause_for_the_guest() -> Result<()> {
    let scratch = Scratch::new()?;
    let (image, ..) = overlay(&scratch, 256 * MIB)?;
    let attach = attach(&scratch, &image).vhost_user(scratch.socket("disk.sock")).queues(2);
    let mut server = attach.start()?;
    let mut guest = Machine::new([attach.disk()]).with_tools().boot(&scratch)?;
    begin_verified(&mut guest)?;
    for progress in [4, 16] {
        wait_for_growth(&image, progress * MIB)?;
        assert!(guest.is_busy(), "killed while the guest writes");
        server.kill();
        server = attach.start()?;
    }
    let outcome = guest.finish(LIMIT)?;
    assert_eq!(outcome.status, 0, "{}", outcome.output);
    assert_eq!(guest.disk_errors(), [""; 0]);
    guest.power_off()?;
    assert!(server.stop()?.success());
    let check = run("qemu-img", ["check", "-f", "qcow2", text(&image)], LIMIT)?;
    assert!(matches!(check.status.code(), Some(0 | 3)), "{check:?}");
    Ok(())
}

/// Version 2 has no place to say that there are notes: writes that were done and not flushed are lost with the process, as
/// their places in the image are; the guest must not go on as if they were there.
#[test]
fn a_guest_that_runs_on_when_vbd_was_killed_gets_errors_until_it_is_reset() -> Result<()> {
    let scratch = Scratch::new()?;
    let (image, ..) = overlay(&scratch, 256 * MIB)?;
    let amended = run("qemu-img", ["amend", "-f", "qcow2", "-o", "compat=0.10", text(&image)], LIMIT)?;
    assert!(amended.status.success(), "{amended:?}");
    let attach = attach(&scratch, &image).vhost_user(scratch.socket("disk.sock")).queues(2);
    let server = attach.start()?;
    let mut guest = Machine::new([attach.disk()]).with_tools().boot(&scratch)?;
    begin_verified(&mut guest)?;
    wait_for_growth(&image, 8 * MIB)?;
    assert!(guest.is_busy(), "killed while the guest writes");
    server.kill();
    let server = attach.start()?;
    let outcome = guest.finish(LIMIT)?;
    assert_ne!(outcome.status, 0, "{}", outcome.output);
    assert!(!outcome.output.contains("bad magic"), "old data was read: {}", outcome.output);
    assert!(outcome.output.contains("Input/output error"), "{}", outcome.output);
    assert!(server.stderr().contains("killed"), "{}", server.stderr());
    // The same server, and a guest that begins anew.
    guest.kill();
    let mut guest = Machine::new([attach.disk()]).boot(&scratch)?;
    guest.sh(
        "dd if=/dev/vda of=/dev/null bs=1M count=8 && echo new | dd of=/dev/vda bs=4k seek=40000 conv=fsync",
    )?;
    assert_eq!(guest.disk_errors(), [""; 0]);
    guest.power_off()?;
    assert!(server.stop()?.success());
    let check = run("qemu-img", ["check", "-f", "qcow2", text(&image)], LIMIT)?;
    assert!(matches!(check.status.code(), Some(0 | 3)), "{check:?}");
    Ok(())
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Write,
    Read,
}

const MODES: [Mode; 2] = [Mode::Write, Mode::Read];

/// Opens a file as QEMU does, and closes it.
fn by_qemu(file: &Path, format: &str, mode: Mode) -> Result<Finished> {
    let words: &[&str] = match mode {
        Mode::Write => &["-c", "write -P 7 0 4k"],
        Mode::Read => &["-r", "-c", "read 0 4k"],
    };
    run("qemu-io", ["-f", format].iter().chain(words).copied().chain([text(file)]), LIMIT)
}

/// Has vbd serve a file, or refuse to because it is in use, as it should.
#[track_caller]
fn by_vbd(scratch: &Scratch, file: &Path, format: &str, mode: Mode, should: bool) -> Result<()> {
    let socket = scratch.socket("second.sock");
    let mut attach = Attach::new(scratch, file).option("--format").option(format).nbd(&socket);
    if mode == Mode::Read {
        attach = attach.option("--read-only");
    }
    if should {
        assert!(attach.start()?.stop()?.success());
        return Ok(());
    }
    let nbd = format!("unix:{}", socket.display());
    let words = ["attach", text(file), "--format", format, "--nbd", &nbd];
    let read_only = (mode == Mode::Read).then_some("--read-only");
    let refused = scratch.vbd(words.into_iter().chain(read_only))?;
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(refused.stderr.contains("in use"), "{refused:?}");
    Ok(())
}

fn held_by_vbd(scratch: &Scratch, image: &Path, mode: Mode) -> Result<Server> {
    let attach = attach(scratch, image).nbd(&scratch.socket("first.sock"));
    if mode == Mode::Read { attach.option("--read-only").start() } else { attach.start() }
}

/// qemu-nbd that serves an image; it ends when dropped.
struct HeldByQemu(std::process::Child);

impl HeldByQemu {
    fn new(scratch: &Scratch, image: &Path, mode: Mode) -> Result<Self> {
        let socket = scratch.socket("qemu.sock");
        let _ = fs::remove_file(&socket);
        let mut command = command("qemu-nbd");
        command.args(["-f", "qcow2", "--persistent", "--socket"]).arg(&socket);
        if mode == Mode::Read {
            command.arg("--read-only");
        }
        let held = HeldByQemu(command.arg(image).stdin(Stdio::null()).spawn()?);
        let end = Instant::now() + LIMIT;
        while !socket.exists() {
            ensure!(Instant::now() < end, "qemu-nbd does not serve");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(held)
    }
}

impl Drop for HeldByQemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn qemu_keeps_off_what_vbd_serves() -> Result<()> {
    let scratch = Scratch::new()?;
    let (image, below, _) = overlay(&scratch, 64 * MIB)?;
    for mode in MODES {
        let server = held_by_vbd(&scratch, &image, mode)?;
        for other in MODES {
            let tried = by_qemu(&image, "qcow2", other)?;
            let shared = mode == Mode::Read && other == Mode::Read;
            assert_eq!(tried.status.success(), shared, "vbd to {mode:?}, QEMU to {other:?}: {tried:?}");
            assert!(shared || tried.stderr.contains("lock"), "{tried:?}");
        }
        let checked = run("qemu-img", ["check", "-f", "qcow2", text(&image)], LIMIT)?;
        assert_eq!(checked.status.success(), mode == Mode::Read, "{checked:?}");
        // Told to go on whatever others do, it reads.
        qemu_img(["info", "-U", text(&image)])?;
        // What is below is only read, by any number.
        assert!(by_qemu(&below, "raw", Mode::Read)?.status.success());
        assert!(!by_qemu(&below, "raw", Mode::Write)?.status.success(), "vbd reads what is below");
        // Two images over one file.
        let other = scratch.path("other.qcow2");
        qemu_img(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "below.raw", text(&other)])?;
        assert!(by_qemu(&other, "qcow2", Mode::Write)?.status.success());
        assert!(server.stop()?.success());
        // Nothing of it stays.
        assert!(by_qemu(&image, "qcow2", Mode::Write)?.status.success());
        assert!(by_qemu(&below, "raw", Mode::Read)?.status.success());
    }
    Ok(())
}

#[test]
fn vbd_keeps_off_what_qemu_serves() -> Result<()> {
    let scratch = Scratch::new()?;
    let (image, below, _) = overlay(&scratch, 64 * MIB)?;
    for mode in MODES {
        let held = HeldByQemu::new(&scratch, &image, mode)?;
        for other in MODES {
            let shared = mode == Mode::Read && other == Mode::Read;
            by_vbd(&scratch, &image, "qcow2", other, shared)?;
        }
        // Both read what is below.
        by_vbd(&scratch, &below, "raw", Mode::Read, true)?;
        by_vbd(&scratch, &below, "raw", Mode::Write, false)?;
        drop(held);
        by_vbd(&scratch, &image, "qcow2", Mode::Write, true)?;
    }
    Ok(())
}

#[test]
fn two_of_vbd_keep_off_each_other() -> Result<()> {
    let scratch = Scratch::new()?;
    let (image, below, _) = overlay(&scratch, 64 * MIB)?;
    for mode in MODES {
        let server = held_by_vbd(&scratch, &image, mode)?;
        for other in MODES {
            let shared = mode == Mode::Read && other == Mode::Read;
            by_vbd(&scratch, &image, "qcow2", other, shared)?;
        }
        // It is below an image that is served.
        by_vbd(&scratch, &below, "raw", Mode::Write, false)?;
        assert!(server.stop()?.success());
    }
    Ok(())
}
