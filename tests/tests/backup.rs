//! Backups of a disk that is served, from the command line, while a client writes to it.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use vbd_tests::{Attach, Process, Scratch, command, run, run_ok};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;
/// The size of a write, and what the writer's program says of it.
const UNIT: usize = 4096;
const LIMIT: Duration = Duration::from_secs(120);

/// Runs a verb that has to succeed; gives what it prints.
fn vbd(scratch: &Scratch, arguments: &[&str]) -> Result<String> {
    let finished = scratch.vbd(arguments)?;
    ensure!(finished.status.success(), "{arguments:?}: {}{}", finished.stdout, finished.stderr);
    Ok(finished.stdout)
}

/// A writer that makes one write after the other, numbered from 1, of units by chance, on two connections in turn; it logs
/// each before it begins. It ends when the file `stop` is there.
fn writer(scratch: &Scratch, uri: &str) -> Result<Process> {
    let (log, stop) = (scratch.path("log"), scratch.path("stop"));
    let code = format!(
        "import nbd, os, random, struct\n\
         a, b = nbd.NBD(), nbd.NBD()\n\
         a.connect_uri('{uri}'); b.connect_uri('{uri}')\n\
         random.seed(7)\n\
         with open('{}', 'w', 1) as log:\n\
         \x20   number = 0\n\
         \x20   while not os.path.exists('{}'):\n\
         \x20       number += 1\n\
         \x20       unit = random.randrange({})\n\
         \x20       log.write('%d\\n' % unit)\n\
         \x20       (a, b)[number % 2].pwrite(struct.pack('<Q', number) * {}, unit * {UNIT})\n",
        log.display(),
        stop.display(),
        SIZE / UNIT as u64,
        UNIT / 8,
    );
    let mut python = command("/usr/bin/python3");
    python.args(["-c", &code]);
    Process::spawn(python)
}

/// Each backup, full or incremental, is the disk as it was after one of the writes, with all before and none after it.
#[test]
fn backups_of_a_disk_that_is_written_to_are_each_of_one_instant() -> Result<()> {
    let scratch = Scratch::new()?;
    let disk = scratch.sparse("disk", SIZE)?;
    let socket = scratch.socket("nbd.sock");
    let server = Attach::new(&scratch, &disk).nbd(&socket).start()?;
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    let mut writer = writer(&scratch, &uri)?;
    let store = scratch.path("store").display().to_string();
    let written = || fs::read_to_string(scratch.path("log")).map_or(0, |log| log.lines().count());
    let mut least = Vec::new();
    for number in 0..3 {
        let until = Instant::now() + Duration::from_secs(30);
        while written() < 200 * (number + 1) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        // The last may not have ended yet.
        least.push(written().saturating_sub(1));
        let how = if number == 0 { "--checkpoint" } else { "--incremental" };
        let said = vbd(&scratch, &["backup", "disk", &store, how, "--name", &number.to_string()])?;
        ensure!(said.contains("16 MiB"), "{said}");
    }
    fs::write(scratch.path("stop"), "")?;
    ensure!(writer.wait(LIMIT)?.success(), "the writer failed");
    let log = fs::read_to_string(scratch.path("log"))?;
    let log: Vec<usize> = log.lines().map(|line| line.parse()).collect::<Result<_, _>>()?;
    vbd(&scratch, &["backups", "verify", &store])?;
    for (number, least) in least.iter().enumerate() {
        let file = scratch.path(format!("restored-{number}"));
        vbd(&scratch, &["restore", &store, &file.display().to_string(), "--backup", &number.to_string()])?;
        let image = fs::read(&file)?;
        let number_of =
            |unit: &[u8]| usize::try_from(u64::from_le_bytes(unit[..8].try_into().unwrap_or_default()));
        let numbers: Vec<usize> = image.chunks(UNIT).map(number_of).collect::<Result<_, _>>()?;
        for (unit, number) in image.chunks(UNIT).zip(&numbers) {
            ensure!(unit.chunks(8).all(|word| word == (*number as u64).to_le_bytes()), "a torn write");
        }
        let last = numbers.iter().copied().max().unwrap_or(0);
        ensure!(last >= *least, "backup {number} ends with write {last} of at least {least}");
        let mut model = vec![0; numbers.len()];
        for (write, unit) in log.iter().enumerate().take(last) {
            model[*unit] = write + 1;
        }
        ensure!(model == numbers, "backup {number} is not the disk after write {last}");
    }
    // What is there at the end, as QEMU sees it.
    vbd(&scratch, &["backup", "disk", &store, "--incremental", "--name", "end"])?;
    let file = scratch.path("end").display().to_string();
    vbd(&scratch, &["restore", &store, &file])?;
    run_ok("qemu-img", ["compare", "-f", "raw", "-F", "raw", &file, &uri], LIMIT)?;
    ensure!(server.stop()?.success());
    Ok(())
}

/// Bitmaps live and in the file; what is stale is refused by name.
#[test]
fn bitmaps_are_kept_while_served_and_beside_the_file() -> Result<()> {
    let scratch = Scratch::new()?;
    let disk = scratch.sparse("disk", SIZE)?;
    let file = disk.display().to_string();
    let socket = scratch.socket("nbd.sock");
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    let write = |at: &str| {
        let write = format!("write -P 7 {at} 4k");
        run_ok("qemu-io", ["-f", "raw", &uri, "-c", &write], LIMIT)
    };
    let marked = |what: &str| -> Result<Vec<(String, u64, bool)>> {
        let list: serde_json::Value =
            serde_json::from_str(&vbd(&scratch, &["bitmap", "list", what, "--json"])?)?;
        let one = |bitmap: &serde_json::Value| {
            let name = bitmap["name"].as_str().unwrap_or_default().to_owned();
            (name, bitmap["marked"].as_u64().unwrap_or_default(), bitmap["enabled"] == true)
        };
        Ok(list.as_array().into_iter().flatten().map(one).collect())
    };
    vbd(&scratch, &["bitmap", "add", &file, "first"])?;
    let server = Attach::new(&scratch, &disk).nbd(&socket).start()?;
    write("0")?;
    vbd(&scratch, &["bitmap", "add", "disk", "second", "--granularity", "4K"])?;
    vbd(&scratch, &["bitmap", "add", "disk", "fleeting", "--temporary"])?;
    write("1M")?;
    vbd(&scratch, &["bitmap", "disable", "disk", "first"])?;
    write("2M")?;
    let expected = |name: &str, marked: u64, enabled| (name.to_owned(), marked, enabled);
    let live = [
        expected("first", 128 << 10, false),
        expected("second", 8 << 10, true),
        expected("fleeting", 128 << 10, true),
    ];
    ensure!(marked("disk")? == live, "{:?}", marked("disk")?);
    let refused = scratch.vbd(["bitmap", "add", "disk", "first"])?;
    ensure!(refused.status.code() == Some(1) && refused.stderr.contains("already"), "{}", refused.stderr);
    // As clients of NBD see them.
    let listed = run_ok("nbdinfo", ["--list", &uri], LIMIT)?;
    ensure!(listed.contains("qemu:dirty-bitmap:second") && listed.contains("base:allocation"), "{listed}");
    let map = run_ok("nbdinfo", ["--map=qemu:dirty-bitmap:second", &uri], LIMIT)?;
    let map: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().take(3).collect()).collect();
    let runs = [
        ["0", "1048576", "0"],
        ["1048576", "4096", "1"],
        ["1052672", "1044480", "0"],
        ["2097152", "4096", "1"],
        ["2101248", "14675968", "0"],
    ];
    ensure!(map == runs, "{map:?}");
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},export=disk,x-dirty-bitmap=qemu:dirty-bitmap:second",
        socket.display()
    );
    let map = run_ok("qemu-img", ["map", "--output=json", "--image-opts", &image], LIMIT)?;
    let map: Vec<serde_json::Value> = serde_json::from_str(&map)?;
    // QEMU calls dirty what has no data, with this option.
    let dirty: Vec<_> =
        map.iter().filter(|run| run["data"] == false).map(|run| (&run["start"], &run["length"])).collect();
    ensure!(dirty.len() == 2 && dirty[0] == (&1_048_576.into(), &4096.into()), "{map:?}");
    let both = "import nbd\nh = nbd.NBD()\nh.add_meta_context('base:allocation')\n\
                h.add_meta_context('qemu:dirty-bitmap:first')\nh.add_meta_context('qemu:dirty-bitmap:second')\n\
                h.add_meta_context('qemu:dirty-bitmap:none')\nh.connect_uri(URI)\n\
                assert not h.can_meta_context('qemu:dirty-bitmap:none')\nseen = {}\n\
                h.block_status(16 << 20, 0, lambda name, at, runs, error: seen.update({name: runs}))\n\
                assert seen['qemu:dirty-bitmap:first'][:4] == [65536, 1, 983040, 0], seen\n\
                assert seen['qemu:dirty-bitmap:second'][:4] == [1048576, 0, 4096, 1], seen\n\
                assert sum(seen['base:allocation'][::2]) == 16 << 20, seen\n\
                seen.clear()\n\
                h.block_status(8192, 65536 - 4096, lambda name, at, runs, error: seen.update({name: runs}), nbd.CMD_FLAG_REQ_ONE)\n\
                assert seen['qemu:dirty-bitmap:first'] == [4096, 1] and len(seen) == 3, seen\n";
    run_ok("/usr/bin/python3", ["-c", &both.replace("URI", &format!("'{uri}'"))], LIMIT)?;
    // Found by its file too, while it is served.
    vbd(&scratch, &["bitmap", "merge", &file, "first", "second"])?;
    ensure!(server.stop()?.success());
    ensure!(marked(&file)? == [expected("first", 192 << 10, false), expected("second", 8 << 10, true)]);
    // A change that nobody has noted.
    run("qemu-io", ["-f", "raw", &file, "-c", "write 3M 4k"], LIMIT)?;
    let stale = scratch.vbd(["bitmap", "list", &file])?;
    ensure!(stale.stderr.contains("changed by something else"), "{}", stale.stderr);
    let store = scratch.path("store");
    let refused =
        scratch.vbd(["backup".as_ref(), disk.as_os_str(), store.as_os_str(), "--checkpoint".as_ref()])?;
    ensure!(refused.status.code() == Some(1), "a checkpoint that would not be kept");
    ensure!(refused.stderr.contains("vbd bitmap reset"), "{}", refused.stderr);
    vbd(&scratch, &["bitmap", "reset", &file])?;
    ensure!(marked(&file)? == [expected("first", SIZE, false), expected("second", SIZE, true)]);
    for name in ["first", "second"] {
        vbd(&scratch, &["bitmap", "remove", &file, name])?;
    }
    ensure!(marked(&file)?.is_empty() && !scratch.path("disk.vbd-bitmaps").exists());
    Ok(())
}

/// The checkpoint of a qcow2 image lies in it: what QEMU writes between two backups is in the second.
#[test]
fn an_incremental_backup_of_a_qcow2_image_has_what_qemu_wrote() -> Result<()> {
    let scratch = Scratch::new()?;
    let image = scratch.path("disk.qcow2").display().to_string();
    let store = scratch.path("store").display().to_string();
    run_ok("qemu-img", ["create", "-q", "-f", "qcow2", &image, "16M"], LIMIT)?;
    let write = |command: &str| run_ok("qemu-io", ["-f", "qcow2", &image, "-c", command], LIMIT);
    write("write -P 1 1M 2M")?;
    vbd(&scratch, &["backup", &image, &store, "--format", "qcow2", "--checkpoint", "--name", "one"])?;
    write("write -P 2 5M 64k")?;
    write("discard 1M 1M")?;
    let said =
        vbd(&scratch, &["backup", &image, &store, "--format", "qcow2", "--incremental", "--name", "two"])?;
    ensure!(said.contains("since one"), "{said}");
    for format in ["raw", "qcow2"] {
        let new = scratch.path(format!("new.{format}")).display().to_string();
        vbd(&scratch, &["restore", &store, &new, "--format", format])?;
        run_ok("qemu-img", ["compare", "-f", format, "-F", "qcow2", &new, &image], LIMIT)?;
    }
    run_ok("qemu-img", ["check", "-f", "qcow2", &image], LIMIT)?;
    let list = vbd(&scratch, &["bitmap", "list", &image, "--format", "qcow2", "--json"])?;
    let list: serde_json::Value = serde_json::from_str(&list)?;
    ensure!(list.as_array().is_some_and(|list| list.len() == 1) && list[0]["marked"] == 0, "{list}");
    Ok(())
}
