//! The NBD server against the clients that people have: libnbd's, QEMU's and fio's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::Result;
use vbd_tests::{Attach, Scratch, Server, allocated, run, run_ok};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(120);

/// A file served over NBD, on a unix socket.
struct Export {
    scratch: Scratch,
    file: PathBuf,
    socket: PathBuf,
    server: Server,
}

impl Export {
    /// A sparse file of 64 MiB, with `data` at 1 MiB.
    fn new(data: &[u8], options: &[&str]) -> Result<Self> {
        let scratch = Scratch::new()?;
        let file = scratch.sparse("disk", 64 * MIB)?;
        write_at(&file, MIB, data)?;
        let socket = scratch.socket("nbd.sock");
        let attach = Attach::new(&scratch, &file).nbd(&socket);
        let server = options.iter().fold(attach, |attach, option| attach.option(option)).start()?;
        Ok(Self { scratch, file, socket, server })
    }

    /// Its address, with the export's name or an empty one.
    fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket.display())
    }

    /// Runs Python with `h`, libnbd's handle, connected; `assert` fails the test.
    fn python(&self, code: &str) -> Result<()> {
        let before =
            format!("h.add_meta_context('base:allocation')\nh.connect_uri('{}')\n", self.uri("disk"));
        let (before, code) = (format!("import nbd\n{before}"), unindented(code));
        // nbdsh is this module run by the first Python in `$PATH`, which may not be Debian's.
        run_ok("/usr/bin/python3", ["-m", "nbd", "-c", &before, "-c", &code], LIMIT).map(drop)
    }

    fn stop(self) -> Result<(Scratch, PathBuf, ExitStatus)> {
        let status = self.server.stop()?;
        Ok((self.scratch, self.file, status))
    }
}

fn write_at(file: &Path, offset: u64, data: &[u8]) -> Result<()> {
    use std::os::unix::fs::FileExt;
    fs::File::options().write(true).open(file)?.write_all_at(data, offset)?;
    Ok(())
}

/// Python cares for the indentation that Rust gives it.
fn unindented(code: &str) -> String {
    let lines = code.lines().filter(|line| !line.trim().is_empty());
    let least = lines.clone().map(|line| line.len() - line.trim_start().len()).min().unwrap_or(0);
    lines.map(|line| format!("{}\n", &line[least..])).collect()
}

/// Bytes that repeat nowhere near.
fn pattern(length: u64) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let words = (0..length / 8).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().collect()
}

#[test]
fn nbdinfo_lists_the_export_by_name_and_the_empty_name_means_it() -> Result<()> {
    let export = Export::new(&[], &[])?;
    let list = run_ok("nbdinfo", ["--list", "--json", &export.uri("")], LIMIT)?;
    let list: serde_json::Value = serde_json::from_str(&list)?;
    assert_eq!(list["protocol"], "newstyle-fixed");
    assert_eq!(list["structured"], true);
    assert_eq!(list["exports"].as_array().map(Vec::len), Some(1));
    let disk = &list["exports"][0];
    assert_eq!(disk["export-name"], "disk");
    assert_eq!(disk["export-size"], 64 * MIB);
    assert_eq!(disk["is_read_only"], false);
    for ability in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df", "can_cache"] {
        assert_eq!(disk[ability], true, "{ability} in {disk}");
    }
    assert_eq!(disk["contexts"], serde_json::json!(["base:allocation"]));
    for name in ["", "disk"] {
        let size = run_ok("nbdinfo", ["--size", &export.uri(name)], LIMIT)?;
        assert_eq!(size.trim(), (64 * MIB).to_string());
    }
    let unknown = run("nbdinfo", ["--size", &export.uri("other")], LIMIT)?;
    assert!(!unknown.status.success());
    Ok(())
}

#[test]
fn nbdinfo_maps_data_and_holes() -> Result<()> {
    let export = Export::new(&pattern(2 * MIB), &[])?;
    let map = run_ok("nbdinfo", ["--map", "--json", &export.uri("disk")], LIMIT)?;
    let map: serde_json::Value = serde_json::from_str(&map)?;
    let extents: Vec<_> =
        map.as_array().into_iter().flatten().map(|e| (&e["offset"], &e["length"], &e["type"])).collect();
    let expected = serde_json::json!([[0, MIB, 3], [MIB, 2 * MIB, 0], [3 * MIB, 61 * MIB, 3]]);
    assert_eq!(serde_json::json!(extents), expected);
    Ok(())
}

#[test]
fn nbdcopy_takes_a_disk_out_and_puts_another_in() -> Result<()> {
    let export = Export::new(&pattern(8 * MIB), &[])?;
    let out = export.scratch.path("out");
    run_ok("nbdcopy", [&export.uri("disk"), &out.to_string_lossy().into_owned()], LIMIT)?;
    assert!(fs::read(&out)? == fs::read(&export.file)?, "what came out is what is there");
    assert!(allocated(&out)? <= 9 * MIB, "holes stayed holes");

    let input = export.scratch.sparse("in", 64 * MIB)?;
    write_at(&input, 20 * MIB + 512, &pattern(4 * MIB))?;
    let arguments = ["--flush", "--connections=4", "--destination-is-zero", &input.to_string_lossy()];
    let to_zero = run("nbdcopy", arguments.iter().copied().chain([export.uri("disk").as_str()]), LIMIT)?;
    assert!(to_zero.status.success(), "{}", to_zero.stderr);
    run_ok("nbdcopy", ["--flush", &input.to_string_lossy(), &export.uri("disk")], LIMIT)?;
    let (_scratch, file, status) = export.stop()?;
    assert!(status.success());
    assert!(fs::read(&file)? == fs::read(&input)?, "what went in is there, the old content is not");
    assert!(allocated(&file)? <= 6 * MIB, "zeroes became holes");
    Ok(())
}

#[test]
fn nbdsh_writes_zeroes_trims_and_asks() -> Result<()> {
    let export = Export::new(&pattern(4 * MIB), &[])?;
    export.python(
        "
        data = bytes(range(256)) * 16
        h.pwrite(data, 8 << 20, nbd.CMD_FLAG_FUA)
        assert h.pread(4096, 8 << 20) == data
        # Neither offset nor length needs to be aligned.
        h.pwrite(b'odd', (8 << 20) + 4095)
        assert h.pread(5, (8 << 20) + 4094) == data[4094:4095] + b'odd' + b'\\0'
        h.zero(1 << 20, 1 << 20, nbd.CMD_FLAG_NO_HOLE)
        h.zero(1 << 20, 2 << 20)
        h.trim(1 << 20, 3 << 20)
        h.flush()
        assert h.pread(3 << 20, 1 << 20) == bytes(3 << 20)
        assert h.pread(1 << 20, 4 << 20) != bytes(1 << 20)
        h.cache(1 << 20, 0)
        ",
    )?;
    export.python(
        "
        extents = []
        def note(context, offset, entries, error):
            assert context == 'base:allocation'
            extents.extend(entries)
        h.block_status(64 << 20, 0, note)
        kinds = dict()
        at = 0
        for length, kind in zip(extents[::2], extents[1::2]):
            for mib in range(at >> 20, (at + length) >> 20):
                kinds[mib] = kind
            at += length
        hole, zero = nbd.STATE_HOLE, nbd.STATE_ZERO
        assert kinds[0] == hole | zero, kinds
        # Whether room kept for zeroes reads as a hole is up to the filesystem below.
        assert kinds[1] in (0, zero, hole | zero), kinds
        assert kinds[2] == hole | zero and kinds[3] == hole | zero, kinds
        assert kinds[4] == 0, kinds
        ",
    )?;
    let (_scratch, file, status) = export.stop()?;
    assert!(status.success());
    let left = allocated(&file)?;
    assert!(
        (2 * MIB..3 * MIB).contains(&left),
        "two MiB of four were given back, one is kept for zeroes: {left}"
    );
    Ok(())
}

#[test]
fn what_is_out_of_range_fails_by_itself_and_the_connection_goes_on() -> Result<()> {
    let export = Export::new(&[], &[])?;
    export.python(
        "
        import errno
        h.set_strict_mode(0)
        def fails(action, *numbers):
            try:
                action()
            except nbd.Error as error:
                assert error.errnum in numbers, error
            else:
                assert False, 'no error'
        end = 64 << 20
        fails(lambda: h.pread(512, end), errno.EINVAL)
        fails(lambda: h.pread(1024, end - 512), errno.EINVAL)
        fails(lambda: h.pwrite(bytes(512), end), errno.ENOSPC, errno.EINVAL)
        fails(lambda: h.pwrite(bytes(512), 1 << 62), errno.ENOSPC, errno.EINVAL)
        fails(lambda: h.trim(4096, end), errno.ENOSPC, errno.EINVAL)
        fails(lambda: h.zero(4096, end), errno.ENOSPC, errno.EINVAL)
        fails(lambda: h.pread(512, 0, 1 << 9), errno.EINVAL)
        assert h.pread(512, end - 512) == bytes(512)
        ",
    )
}

#[test]
fn a_write_that_was_flushed_on_one_connection_is_seen_on_another() -> Result<()> {
    let export = Export::new(&[], &[])?;
    export.python(&format!(
        "
        other = nbd.NBD()
        other.connect_uri('{}')
        assert h.can_multi_conn() and other.can_multi_conn()
        for turn in range(64):
            data = bytes([turn]) * 65536
            h.pwrite(data, turn << 16)
            other.flush()
            assert other.pread(65536, turn << 16) == data
        ",
        export.uri("disk")
    ))
}

#[test]
fn a_read_only_export_refuses_every_change() -> Result<()> {
    let export = Export::new(&pattern(MIB), &["--read-only"])?;
    let before = fs::read(&export.file)?;
    export.python(
        "
        import errno
        assert h.is_read_only()
        h.set_strict_mode(0)
        for action in (lambda: h.pwrite(bytes(512), 0), lambda: h.trim(4096, 1 << 20), lambda: h.zero(4096, 1 << 20)):
            try:
                action()
            except nbd.Error as error:
                assert error.errnum == errno.EPERM, error
            else:
                assert False, 'no error'
        assert h.pread(1 << 20, 1 << 20) != bytes(1 << 20)
        ",
    )?;
    assert!(fs::read(&export.file)? == before, "nothing changed");
    Ok(())
}

#[test]
fn qemu_img_sees_compares_and_converts_it() -> Result<()> {
    let export = Export::new(&pattern(8 * MIB), &[])?;
    let (uri, copy) = (export.uri("disk"), export.scratch.path("copy.qcow2"));
    let copy = copy.to_string_lossy();
    let info = run_ok("qemu-img", ["info", "--output=json", "-f", "raw", &uri], LIMIT)?;
    assert_eq!(serde_json::from_str::<serde_json::Value>(&info)?["virtual-size"], 64 * MIB);
    run_ok("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", &uri, &copy], LIMIT)?;
    run_ok("qemu-img", ["compare", "-f", "raw", "-F", "qcow2", &uri, &copy], LIMIT)?;
    let map = run_ok("qemu-img", ["map", "--output=json", "-f", "raw", &uri], LIMIT)?;
    let map: serde_json::Value = serde_json::from_str(&map)?;
    let data: Vec<_> = map.as_array().into_iter().flatten().filter(|extent| extent["data"] == true).collect();
    assert_eq!(data.len(), 1, "{map}");
    assert_eq!((&data[0]["start"], &data[0]["length"]), (&MIB.into(), &(8 * MIB).into()));
    // And back: the copy, changed, into the export.
    run_ok("qemu-io", ["-f", "qcow2", "-c", "write -P 0x5a 30M 1M", "-c", "discard 2M 2M", &copy], LIMIT)?;
    run_ok("qemu-img", ["convert", "-n", "-f", "qcow2", "-O", "raw", &copy, &uri], LIMIT)?;
    run_ok("qemu-img", ["compare", "-f", "raw", "-F", "qcow2", &uri, &copy], LIMIT)?;
    let (_scratch, file, status) = export.stop()?;
    assert!(status.success());
    run_ok("qemu-img", ["compare", "-f", "raw", "-F", "qcow2", &file.to_string_lossy(), &copy], LIMIT)?;
    Ok(())
}

#[test]
fn qemu_io_verifies_patterns_through_extended_headers() -> Result<()> {
    let export = Export::new(&[], &[])?;
    // QEMU 10 asks for extended headers first; the list shows what it got.
    let list = run_ok("qemu-nbd", ["--list", "--socket", &export.socket.to_string_lossy()], LIMIT)?;
    assert!(list.contains("transaction size: 64-bit"), "{list}");
    let commands = [
        "write -P 0xa5 0 1M",
        "write -P 0x3c 1048064 64k",
        "write -f -P 0x77 4097k 3k",
        "read -P 0xa5 0 1048064",
        "read -P 0x3c 1048064 64k",
        "read -P 0x77 4097k 3k",
        "write -z -u 0 512k",
        "read -P 0 0 512k",
        "read -P 0xa5 512k 500k",
        "discard 512k 256k",
        "aio_write -P 0x11 8M 2M",
        "aio_write -P 0x22 10M 2M",
        "aio_flush",
        "read -P 0x11 8M 2M",
        "read -P 0x22 10M 2M",
        "flush",
    ];
    let arguments = ["--format=raw".to_owned(), "--cache=none".to_owned(), "--discard=unmap".to_owned()];
    let commands = commands.iter().flat_map(|command| ["-c".to_owned(), (*command).to_owned()]);
    let said = run_ok("qemu-io", arguments.into_iter().chain(commands).chain([export.uri("disk")]), LIMIT)?;
    assert!(!said.contains("failed") && !said.contains("error"), "{said}");
    Ok(())
}

#[test]
fn fio_writes_at_random_and_finds_what_it_wrote() -> Result<()> {
    let export = Export::new(&[], &[])?;
    let uri = format!("--uri={}", export.uri("disk"));
    let load =
        ["--ioengine=nbd", "--name=verified", "--rw=randwrite", "--bsrange=512-128k", "--bs_unaligned"];
    let verify =
        ["--iodepth=32", "--size=32M", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"];
    run_ok("fio", load.into_iter().chain(verify).chain([uri.as_str(), "--fsync=64"]), LIMIT)?;
    let (_scratch, file, status) = export.stop()?;
    assert!(status.success());
    assert!(allocated(&file)? >= 31 * MIB, "what was written is on the host");
    assert_eq!(fs::metadata(&file)?.len() % KIB, 0);
    Ok(())
}
