//! vbd in a guest, its disks block devices of that guest's kernel.

use std::time::Duration;

use anyhow::{Result, ensure};
use vbd_tests::{Guest, Machine, Scratch};

const MIB: u64 = 1 << 20;
/// How long a load may take: many times what it needs on a quiet machine.
const LOAD: Duration = Duration::from_secs(240);

/// A guest with vbd, ublk's driver not loaded yet.
fn guest(scratch: &Scratch) -> Result<Guest> {
    let machine = Machine::new([]).with_tools().with_vbd(scratch, 2048 * MIB)?.with_modules(&["ublk_drv"]);
    machine.boot(scratch)
}

/// The same with the driver.
fn guest_with_driver(scratch: &Scratch) -> Result<Guest> {
    let mut guest = guest(scratch)?;
    guest.sh("insmod /more/ublk_drv.ko")?;
    Ok(guest)
}

/// Room that a file in the guest takes, in bytes.
fn allocated(guest: &mut Guest, file: &str) -> Result<u64> {
    guest.sh("sync")?;
    let kibibytes: u64 = guest.sh(&format!("du -k {file} | cut -f1"))?.trim().parse()?;
    Ok(kibibytes << 10)
}

#[test]
fn without_the_driver_the_error_says_what_is_missing() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut guest = guest(&scratch)?;
    guest.sh(&Guest::vbd("create /host/disk --size 64M"))?;
    let outcome = guest.try_sh(&Guest::vbd("attach /host/disk --ublk"))?;
    assert_eq!(outcome.status, 1, "{}", outcome.output);
    for word in ["disk", "modprobe ublk_drv", "CONFIG_BLK_DEV_UBLK"] {
        assert!(outcome.output.contains(word), "{word}: {}", outcome.output);
    }
    guest.power_off()?;
    Ok(())
}

#[test]
fn a_filesystem_is_made_filled_verified_trimmed_and_clean() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut guest = guest_with_driver(&scratch)?;
    guest.sh(&Guest::vbd("create /host/disk --size 512M"))?;
    let pid = guest.attach("/host/disk --ublk")?;
    assert_eq!(guest.sh("cat /tmp/out")?, "disk: ublk /dev/ublkb0\n");
    assert_eq!(guest.sh("cat /sys/block/ublkb0/size /sys/block/ublkb0/ro")?, "1048576\n0\n");
    // A queue for each processor, the write cache told, FUA and discards taken.
    assert_eq!(guest.sh("ls /sys/block/ublkb0/mq | wc -l")?, "2\n");
    assert_eq!(guest.sh("cat /sys/block/ublkb0/queue/write_cache")?, "write back\n");
    assert_eq!(guest.sh("cat /sys/block/ublkb0/queue/fua")?, "1\n");

    guest.sh(&Guest::tool("mke2fs -q -t ext4 /dev/ublkb0"))?;
    guest.sh("mount -t ext4 /dev/ublkb0 /tools/mnt")?;
    guest.begin(&Guest::tool(
        "fio --name=v --filename=/mnt/v --rw=randwrite --bs=4k-64k --size=16M --ioengine=libaio --iodepth=16 \
         --direct=1 --fsync=64 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --minimal",
    ))?;
    let outcome = guest.finish(LOAD)?;
    assert_eq!(outcome.status, 0, "{}", outcome.output);
    guest.sh("dd if=/dev/urandom of=/tools/mnt/large bs=1M count=64 conv=fsync")?;
    guest.sh("cp /tools/mnt/large /tools/mnt/kept && md5sum </tools/mnt/large >/tools/mnt/sum && sync")?;
    let full = allocated(&mut guest, "/host/disk")?;
    ensure!(full >= 128 * MIB, "two files of 64 MiB are in the file: {full}");
    guest.sh("rm /tools/mnt/large && sync && fstrim /tools/mnt")?;
    let trimmed = allocated(&mut guest, "/host/disk")?;
    ensure!(full - trimmed >= 60 * MIB, "the trim gave the room of one back: {full} to {trimmed}");
    assert_eq!(guest.sh("md5sum </tools/mnt/kept")?, guest.sh("cat /tools/mnt/sum")?);

    // What vbd tells of it.
    let list = guest.sh(&Guest::vbd("list --control /run/vbd.sock"))?;
    assert!(list.contains("ublk /dev/ublkb0"), "{list}");
    let busy = guest.try_sh(&Guest::vbd("detach disk --control /run/vbd.sock"))?;
    assert!(busy.status == 1 && busy.output.contains("in use"), "{}", busy.output);
    let second = guest.try_sh(&Guest::vbd("attach /host/disk --ublk 7"))?;
    assert!(second.status == 1 && second.output.contains(&pid.to_string()), "{}", second.output);

    guest.sh("umount /tools/mnt")?;
    assert_eq!(
        guest.sh("dd if=/dev/zero of=/dev/ublkb0 bs=1M seek=500 count=8 conv=fsync 2>&1 | head -c0")?,
        ""
    );
    assert_eq!(guest.stop(pid)?, 0);
    assert_eq!(guest.try_sh("ls /dev/ublkb0 /dev/ublkc0 2>/dev/null | wc -l")?.output, "0\n");
    // Busybox makes the file a loop device: its own loop module is not loaded, so the check reads the file.
    guest.sh("mount --bind /host /tools/mnt")?;
    guest.sh(&Guest::tool("e2fsck -fn /mnt/disk"))?;
    assert_eq!(guest.disk_errors(), [""; 0]);
    guest.power_off()?;
    Ok(())
}

/// Begins a load with verification on a mounted filesystem, in the background: some ten seconds of it.
fn begin_load(guest: &mut Guest) -> Result<()> {
    let fio = Guest::tool(
        "fio --name=v --filename=/mnt/v --rw=randwrite --bs=4k-64k --size=32M --rate=3m --ioengine=libaio \
         --iodepth=16 --direct=1 --fsync=32 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --minimal",
    );
    guest.sh(&format!("rm -f /tmp/status; ( {fio} >/tmp/fio 2>&1; echo $? >/tmp/status ) &"))?;
    Ok(())
}

/// Waits for the end of the load and gives its exit status.
fn end_load(guest: &mut Guest) -> Result<String> {
    guest.begin("while ! [ -s /tmp/status ]; do sleep 0.2; done; cat /tmp/status; tail -c 600 /tmp/fio")?;
    Ok(guest.finish(LOAD)?.output)
}

#[test]
fn vbd_is_killed_and_restarted_under_load() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut guest = guest_with_driver(&scratch)?;
    guest.sh(&Guest::vbd("create /host/disk --size 256M"))?;
    guest.sh(&Guest::vbd("create /host/other --size 256M"))?;
    let mut pid = guest.attach("/host/disk --ublk 3")?;
    guest.sh(&Guest::tool("mke2fs -q -t ext4 /dev/ublkb3"))?;
    guest.sh("mount -t ext4 /dev/ublkb3 /tools/mnt")?;
    begin_load(&mut guest)?;
    // By number and by file.
    for again in ["/host/disk --ublk 3", "/host/disk --ublk"] {
        guest.sh(&format!("sleep 2; kill -9 {pid}; ! wait {pid}"))?;
        assert_eq!(guest.sh("cat /sys/block/ublkb3/size")?, "524288\n", "the device stays");
        let foreign = guest.try_sh(&Guest::vbd("attach /host/other --ublk 3"))?;
        assert!(foreign.status == 1 && foreign.output.contains("another file"), "{}", foreign.output);
        assert_eq!(guest.sh("cat /tmp/status 2>/dev/null | wc -l")?, "0\n", "the load waits");
        pid = guest.attach(again)?;
        assert_eq!(guest.sh("cat /tmp/out")?, "disk: ublk /dev/ublkb3\n");
    }
    let ended = end_load(&mut guest)?;
    assert!(ended.starts_with("0\n"), "{ended}");

    // A restart as a service has it: the mounted device is not taken away.
    guest.sh("dd if=/dev/urandom of=/tools/mnt/kept bs=1M count=16 && md5sum </tools/mnt/kept >/tmp/sum")?;
    assert_eq!(guest.stop(pid)?, 0);
    assert!(guest.sh("cat /tmp/err")?.contains("stays"));
    pid = guest.attach("/host/disk --ublk")?;
    guest.sh("sync && echo 3 >/proc/sys/vm/drop_caches")?;
    assert_eq!(guest.sh("md5sum </tools/mnt/kept")?, guest.sh("cat /tmp/sum")?);
    guest.sh("umount /tools/mnt")?;
    guest.sh(&Guest::tool("e2fsck -fn /dev/ublkb3"))?;
    assert_eq!(guest.stop(pid)?, 0);
    assert_eq!(guest.sh("ls /dev | grep -c ublk[bc] || true")?, "0\n");
    assert_eq!(guest.disk_errors(), [""; 0]);
    guest.power_off()?;
    Ok(())
}

#[test]
fn a_device_grows_when_it_is_attached_anew_and_can_be_read_only() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut guest = guest_with_driver(&scratch)?;
    guest.sh(&Guest::vbd("create /host/disk --size 64M"))?;
    let pid = guest.attach("/host/disk --ublk --queues 1")?;
    assert_eq!(guest.sh("ls /sys/block/ublkb0/mq | wc -l")?, "1\n");
    guest.sh("echo begin | dd of=/dev/ublkb0 conv=notrunc,fsync")?;
    guest.sh(&Guest::vbd("grow disk --size 96M --control /run/vbd.sock"))?;
    // Linux 6.12 cannot be told; it is said.
    assert_eq!(guest.sh("cat /sys/block/ublkb0/size")?, "131072\n");
    let list = guest.sh(&Guest::vbd("list --control /run/vbd.sock"))?;
    assert!(list.contains("attach it anew"), "{list}");
    assert_eq!(guest.stop(pid)?, 0);
    let pid = guest.attach("/host/disk --ublk")?;
    assert_eq!(guest.sh("cat /sys/block/ublkb0/size")?, "196608\n");
    guest.sh("echo end | dd of=/dev/ublkb0 bs=512 seek=196607 conv=notrunc,fsync")?;
    assert_eq!(guest.stop(pid)?, 0);

    let pid = guest.attach("/host/disk --ublk 5 --read-only")?;
    assert_eq!(
        guest.sh("cat /sys/block/ublkb5/ro; dd if=/dev/ublkb5 bs=5 count=1")?.lines().next(),
        Some("1")
    );
    assert!(guest.sh("dd if=/dev/ublkb5 bs=512 count=1 2>/dev/null | head -n1")?.starts_with("begin"));
    assert!(guest.sh("dd if=/dev/ublkb5 bs=512 skip=196607 2>/dev/null | head -n1")?.starts_with("end"));
    assert_ne!(guest.try_sh("echo no | dd of=/dev/ublkb5 conv=notrunc,fsync")?.status, 0);
    guest.sh(&Guest::vbd("detach disk --control /run/vbd.sock"))?;
    // The last disk of the process.
    guest.sh(&format!("wait {pid}"))?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn a_user_who_is_not_root_has_a_device() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut guest = guest_with_driver(&scratch)?;
    guest.sh(&Guest::vbd("create /host/disk --size 64M"))?;
    guest.sh("chown 1000:1000 /host/disk /host && chmod 666 /dev/ublk-control")?;
    // In udev's place.
    guest.sh("( while sleep 0.1; do chown 1000:1000 /dev/ublkc0 /dev/ublkb0; done >/dev/null 2>&1 & )")?;
    guest.sh("echo root::0:0::/:/bin/sh >/etc/passwd; echo user::1000:1000::/:/bin/sh >>/etc/passwd")?;
    let user = |line: &str| format!("su user -c '{line}'");
    let vbd = Guest::vbd("attach /host/disk --ublk --control /tmp/user.sock");
    let pid = guest.background(&user(&format!("exec {vbd}")))?;
    guest.sh("sleep 0.5")?;
    guest.sh(&user("dd if=/dev/urandom of=/dev/ublkb0 bs=1M count=8 conv=notrunc,fsync"))?;
    let device = guest.sh(&user("dd if=/dev/ublkb0 bs=1M count=8 2>/dev/null | md5sum"))?;
    assert_eq!(guest.sh("dd if=/host/disk bs=1M count=8 2>/dev/null | md5sum")?, device);
    assert_eq!(guest.stop(pid)?, 0);
    assert_eq!(guest.sh("ls /dev | grep -c ublk[bc] || true")?, "0\n");
    guest.power_off()?;
    Ok(())
}

#[test]
fn zeroes_discards_and_statistics_and_an_end_under_a_user_who_only_has_it_open() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut guest = guest_with_driver(&scratch)?;
    guest.sh(&Guest::vbd("create /host/disk --size 64M"))?;
    let pid = guest.attach("/host/disk --ublk")?;
    guest.sh("dd if=/dev/urandom of=/dev/ublkb0 bs=1M count=16 conv=notrunc,fsync")?;
    let sum = |guest: &mut Guest, skip: u32| {
        guest.sh(&format!("dd if=/dev/ublkb0 bs=1M skip={skip} count=4 2>/dev/null | md5sum"))
    };
    let (first, last) = (sum(&mut guest, 0)?, sum(&mut guest, 12)?);
    guest.sh(&Guest::tool("blkdiscard --zeroout --offset 4M --length 4M /dev/ublkb0"))?;
    guest.sh(&Guest::tool("blkdiscard --offset 8M --length 4M /dev/ublkb0"))?;
    let zeroes = guest.sh("dd if=/dev/zero bs=1M count=4 2>/dev/null | md5sum")?;
    assert_eq!((sum(&mut guest, 4)?, sum(&mut guest, 8)?), (zeroes.clone(), zeroes));
    assert_eq!((sum(&mut guest, 0)?, sum(&mut guest, 12)?), (first, last));
    let room = allocated(&mut guest, "/host/disk")?;
    // What was discarded is given back. The zeroes were asked for with room to keep (BLKZEROOUT with no unmapping).
    ensure!((12 * MIB..=13 * MIB).contains(&room), "4 of 16 MiB were given back: {room}");

    let stat = guest.sh(&Guest::vbd("stat disk --json --control /run/vbd.sock"))?;
    let stat: serde_json::Value = serde_json::from_str(&stat)?;
    let queues = stat[0]["queues"].as_array().expect("queues");
    for operation in ["read", "write", "flush", "discard", "zeroes"] {
        let counts = queues.iter().flat_map(|queue| queue["operations"].as_array().expect("operations"));
        let counts = counts.filter(|counts| counts["operation"] == operation);
        let (count, errors) = counts.fold((0, 0), |(count, errors), counts| {
            (count + counts["count"].as_u64().unwrap_or(0), errors + counts["errors"].as_u64().unwrap_or(0))
        });
        assert!(count > 0 && errors == 0, "{operation}: {count} and {errors} errors");
    }

    // Reads without an end, by somebody who has the device open and no more.
    guest.sh("( while dd if=/dev/ublkb0 of=/dev/null bs=4k iflag=direct; do :; done >/dev/null 2>&1 & )")?;
    guest.sh("sleep 1")?;
    assert_eq!(guest.stop(pid)?, 0);
    guest.sh("for i in $(seq 100); do ls /dev | grep -q ublk[bc] || break; sleep 0.1; done; ! ls /dev | grep ublk[bc]")?;
    guest.power_off()?;
    Ok(())
}

#[test]
fn a_configuration_names_devices() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut guest = guest_with_driver(&scratch)?;
    let disk = |name: &str, ublk: &str| {
        format!("[[disk]]\\npath = \"{name}\"\\nsize = \"16M\"\\nublk = {ublk}\\nvhost-user = false\\n")
    };
    guest.sh(&format!("printf '{}{}' >/host/two.toml", disk("a", "9"), disk("b", "true")))?;
    let pid = guest.background(&Guest::vbd("up /host/two.toml --control /run/vbd.sock"))?;
    assert_eq!(guest.sh("cat /tmp/out")?, "a: ublk /dev/ublkb9\nb: ublk /dev/ublkb0\n");
    guest.sh("echo there | dd of=/dev/ublkb9 conv=notrunc,fsync")?;
    assert!(guest.sh("dd if=/host/a bs=512 count=1 2>/dev/null | head -n1")?.starts_with("there"));
    assert_eq!(guest.stop(pid)?, 0);
    guest.power_off()?;
    Ok(())
}
