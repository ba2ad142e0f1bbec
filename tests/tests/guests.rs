//! Guests on served disks: what they write is there, whoever is killed meanwhile.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use vbd_ext4::format::{Attributes, ino};
use vbd_ext4::write::{Directory, Layout, Settings, Writer};
use vbd_tests::{Attach, Guest, Machine, Scratch, Server, allocated, run_ok};

const MIB: u64 = 1 << 20;
/// How long a load may take: many times what it needs on a quiet machine.
const LOAD: Duration = Duration::from_secs(240);

/// Random writes, each checked after all are done; a wrong byte or an I/O error ends it with another status than 0.
fn load(name: &str, target: &str, mebibytes: u32, more: &str) -> String {
    Guest::tool(&format!(
        "fio --name={name} --filename={target} --rw=randwrite --bs=4k-64k --size={mebibytes}M --ioengine=libaio \
         --iodepth=16 --direct=1 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --minimal {more}"
    ))
}

/// Waits until `file` takes at least `bytes` of its disk.
fn wait_for_allocated(file: &Path, bytes: u64) -> Result<()> {
    let end = Instant::now() + LOAD;
    while allocated(file)? < bytes {
        ensure!(Instant::now() < end, "{} stays below {bytes} bytes", file.display());
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Serves `file` to one guest.
fn attach<'a>(scratch: &'a Scratch, file: &Path) -> Attach<'a> {
    Attach::new(scratch, file).vhost_user(scratch.socket("disk.sock"))
}

/// Waits for what the guest was told to [`begin`](Guest::begin), which has to succeed; gives what it said.
fn succeeds(guest: &mut Guest) -> Result<String> {
    let outcome = guest.finish(LOAD)?;
    assert_eq!(outcome.status, 0, "{}", outcome.output);
    Ok(outcome.output)
}

/// The good end of a guest that has met no error, and of its server.
fn end(guest: Guest, server: Server) -> Result<()> {
    assert_eq!(guest.disk_errors(), [""; 0]);
    guest.power_off()?;
    assert!(server.stop()?.success());
    Ok(())
}

/// What `e2fsck` says of a filesystem that it finds clean without mending anything.
fn e2fsck(image: &Path) -> Result<String> {
    run_ok("/sbin/e2fsck", ["-fn".as_ref(), image.as_os_str()], LOAD)
}

#[test]
fn a_filesystem_is_made_filled_verified_trimmed_and_clean() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.sparse("disk", 1024 * MIB)?;
    let attach = attach(&scratch, &file);
    let server = attach.start()?;
    let mut guest = Machine::new([attach.disk()]).with_tools().boot(&scratch)?;

    guest.sh(&Guest::tool("mke2fs -q -t ext4 /dev/vda"))?;
    guest.sh("mount -t ext4 /dev/vda /tools/mnt")?;
    guest.begin(&load("verified", "/mnt/verified", 16, ""))?;
    succeeds(&mut guest)?;
    guest.sh("dd if=/dev/urandom of=/tools/mnt/large bs=1M count=128 conv=fsync")?;
    guest.sh("cp /tools/mnt/large /tools/mnt/kept && md5sum </tools/mnt/large >/tools/mnt/sum && sync")?;
    let full = allocated(&file)?;
    assert!(full >= 256 * MIB, "two files of 128 MiB are on the host: {full}");

    guest.sh("rm /tools/mnt/large && sync && fstrim /tools/mnt")?;
    let trimmed = allocated(&file)?;
    assert!(full - trimmed >= 120 * MIB, "the trim gave the room of one back: {full} to {trimmed}");
    assert_eq!(guest.sh("md5sum </tools/mnt/kept")?, guest.sh("cat /tools/mnt/sum")?);
    guest.sh("umount /tools/mnt")?;
    end(guest, server)?;
    e2fsck(&file)?;
    assert_eq!(fs::metadata(&file)?.len(), 1024 * MIB);
    Ok(())
}

#[test]
fn four_disks_with_four_queues_each() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut configuration = String::new();
    for name in ["a", "b", "c", "d"] {
        let file = scratch.sparse(name, 64 * MIB)?;
        configuration += &format!("[[disk]]\npath = {file:?}\nqueues = 4\n");
    }
    let server = scratch.up("four.toml", &configuration)?;
    let mut machine = Machine::new(["a", "b", "c", "d"].map(|name| scratch.disk(name, 4))).with_tools();
    machine.cpus = 4;
    let mut guest = machine.boot(&scratch)?;

    assert_eq!(
        guest.sh("for disk in vda vdb vdc vdd; do ls /sys/block/$disk/mq | wc -l; done")?,
        "4\n4\n4\n4\n"
    );
    // One job a disk, each on a processor, and so on a queue, of its own.
    let jobs = ["a", "b", "c", "d"].map(|name| format!("--name={name} --filename=/dev/vd{name}"));
    let first = load("all", "/dev/vda", 8, "").replace("--name=all --filename=/dev/vda ", "");
    guest.begin(&format!("{first} --cpus_allowed=0-3 --cpus_allowed_policy=split {}", jobs.join(" ")))?;
    succeeds(&mut guest)?;
    end(guest, server)
}

#[test]
fn a_read_only_disk_refuses_writes_in_the_guest() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.path("disk");
    let content = b"0123456789abcdef".repeat(65536);
    fs::write(&file, &content)?;
    let attach = attach(&scratch, &file).option("--read-only");
    let _server = attach.start()?;
    let mut guest = Machine::new([attach.disk()]).boot(&scratch)?;

    assert_eq!(guest.sh("cat /sys/block/vda/ro")?, "1\n");
    assert_ne!(guest.try_sh("echo changed | dd of=/dev/vda conv=notrunc,fsync")?.status, 0);
    let sum = run_ok("md5sum", [&file], LOAD)?;
    assert_eq!(guest.sh("md5sum /dev/vda")?.split(' ').next(), sum.split(' ').next());
    guest.power_off()?;
    assert_eq!(fs::read(&file)?, content);
    Ok(())
}

#[test]
fn qemu_killed_in_mid_write_leaves_a_disk_that_is_served_again_at_once() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.sparse("disk", 512 * MIB)?;
    let attach = attach(&scratch, &file);
    let server = attach.start()?;
    let mut guest = Machine::new([attach.disk()]).with_tools().boot(&scratch)?;
    guest.sh(&Guest::tool("mke2fs -q -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 /dev/vda"))?;
    guest.sh("mount -t ext4 /dev/vda /mnt && echo durable >/mnt/durable && sync")?;
    let before = allocated(&file)?;
    guest.begin(
        "while dd if=/dev/urandom of=/mnt/file bs=1M count=64 conv=fsync; do mv /mnt/file /mnt/moved; done",
    )?;
    wait_for_allocated(&file, before + 32 * MIB)?;
    assert!(guest.is_busy());
    guest.kill();

    // The same server, which never stopped.
    let mut guest = Machine::new([attach.disk()]).boot(&scratch)?;
    assert_eq!(guest.sh("mount -t ext4 /dev/vda /mnt && cat /mnt/durable")?, "durable\n");
    guest.sh("echo again >/mnt/again && umount /mnt")?;
    end(guest, server)?;
    e2fsck(&file)?;
    Ok(())
}

#[test]
fn vbd_killed_in_mid_write_is_a_pause_for_the_guest_and_no_error() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.sparse("disk", 256 * MIB)?;
    let attach = attach(&scratch, &file).queues(2);
    let mut server = attach.start()?;
    let mut guest = Machine::new([attach.disk()]).with_tools().boot(&scratch)?;
    guest.begin(&load("verified", "/dev/vda", 64, "--numjobs=2 --offset_increment=128M --end_fsync=1"))?;
    for progress in [8, 24, 48] {
        wait_for_allocated(&file, progress * MIB)?;
        assert!(guest.is_busy(), "killed while the guest writes");
        server.kill();
        server = attach.start()?;
    }
    succeeds(&mut guest)?;
    end(guest, server)
}

#[test]
fn a_guest_sees_its_disk_grow() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.sparse("disk", 64 * MIB)?;
    let attach = attach(&scratch, &file);
    let server = attach.start()?;
    let mut guest = Machine::new([attach.disk()]).with_tools().boot(&scratch)?;
    guest.sh(&Guest::tool("mke2fs -q -t ext4 /dev/vda"))?;
    guest.sh("mount -t ext4 /dev/vda /tools/mnt")?;

    let grown = scratch.vbd(["grow", "disk", "128M"])?;
    assert!(grown.status.success(), "{}", grown.stderr);
    let size = 128 * MIB / 512;
    guest.sh(&format!(
        "for i in $(seq 100); do [ $(cat /sys/block/vda/size) = {size} ] && break; sleep 0.1; done"
    ))?;
    assert_eq!(guest.sh("cat /sys/block/vda/size")?, format!("{size}\n"));
    guest.sh(&Guest::tool("resize2fs /dev/vda"))?;
    guest.sh("dd if=/dev/urandom of=/tools/mnt/file bs=1M count=80 conv=fsync && umount /tools/mnt")?;
    end(guest, server)?;
    e2fsck(&file)?;
    Ok(())
}

/// A filesystem that vbd wrote grows under a guest that uses it, past what its first descriptors hold.
#[test]
fn a_filesystem_of_our_own_grows_in_a_guest() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.sparse("disk", 64 * MIB)?;
    let settings = Settings { label: b"grows".to_vec(), ..Settings::new(64 * MIB) };
    let image = fs::File::options().read(true).write(true).open(&file)?;
    let mut writer = Writer::new(Layout::new(&settings)?, image, 0)?;
    let attributes = Attributes { mode: 0o755, ..Attributes::default() };
    let root = Directory { parent: ino::ROOT, attributes, xattrs: &[], entries: &[] };
    writer.put_directory(ino::ROOT, &root)?;
    writer.finish([7; 16])?;

    let attach = attach(&scratch, &file);
    let server = attach.start()?;
    let mut guest = Machine::new([attach.disk()]).with_tools().boot(&scratch)?;
    guest.sh("mount -t ext4 /dev/vda /tools/mnt && dd if=/dev/urandom of=/tools/mnt/first bs=1M count=20")?;
    // One group becomes several, then so many that their descriptors need a second block.
    for mebibytes in [600, 12_000] {
        let grown = scratch.vbd(["grow", "disk", &format!("{mebibytes}M")])?;
        assert!(grown.status.success(), "{}", grown.stderr);
        let size = mebibytes * MIB / 512;
        guest.sh(&format!(
            "for i in $(seq 100); do [ $(cat /sys/block/vda/size) = {size} ] && break; sleep 0.1; done"
        ))?;
        guest.sh(&Guest::tool("resize2fs /dev/vda"))?;
        let blocks = guest.sh("stat -f -c %b /tools/mnt")?.trim().parse::<u64>()?;
        assert!(blocks > mebibytes * 256 * 9 / 10, "{blocks} blocks of {mebibytes} MiB");
    }
    guest.sh("dd if=/dev/urandom of=/tools/mnt/second bs=1M count=100 conv=fsync && umount /tools/mnt")?;
    end(guest, server)?;
    e2fsck(&file)?;
    Ok(())
}

#[test]
fn a_guest_migrates_while_it_writes() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.sparse("disk", 64 * MIB)?;
    let here = Attach::new(&scratch, &file).vhost_user(scratch.socket("here.sock"));
    let there = Attach::new(&scratch, &file).vhost_user(scratch.socket("there.sock")).option("--incoming");
    let (source, destination) = (here.start()?, there.start()?);
    let mut guest = Machine::new([here.disk()]).with_tools().boot(&scratch)?;
    let road = scratch.socket("road.sock");
    let mut arrived = Machine::new([there.disk()]).with_tools().receive(&scratch, &road)?;

    // In the background, so that the guest can say on either side how far it is; so slow that it outlasts the journey.
    let slow = load("verified", "/dev/vda", 48, "--rate=,6m");
    guest.sh(&format!("({slow}; echo ended with $?) >/tmp/load 2>&1 &"))?;
    wait_for_allocated(&file, 2 * MIB)?;
    guest.migrate(&road)?;
    assert_eq!(arrived.sh("cat /tmp/load")?, "", "the load goes on over there");
    arrived.begin("while ! grep ended /tmp/load; do sleep 0.2; done; cat /tmp/load")?;
    let output = succeeds(&mut arrived)?;
    assert!(output.starts_with("ended with 0\n"), "{output}");
    assert!(source.stop()?.success());
    arrived.sh("dd if=/dev/vda of=/dev/null bs=1M")?;
    end(arrived, destination)
}
