//! Verbs on images of formats, with qemu-img as the other side.

mod common;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::refused;
use serde_json::Value;

struct Here(tempfile::TempDir);

impl Here {
    fn new() -> Self {
        Here(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(program);
        command.args(arguments.iter().map(OsStr::new)).current_dir(self.0.path()).output().expect(program)
    }

    fn vbd(&self, arguments: &[&str]) -> Output {
        self.run(env!("CARGO_BIN_EXE_vbd"), arguments)
    }

    #[track_caller]
    fn ok(&self, arguments: &[&str]) -> String {
        succeeded(arguments, &self.vbd(arguments))
    }

    #[track_caller]
    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(arguments)).unwrap()
    }

    #[track_caller]
    fn qemu(&self, program: &str, arguments: &[&str]) -> String {
        succeeded(arguments, &self.run(program, arguments))
    }

    /// Equal for QEMU, and neither errors nor leaks.
    #[track_caller]
    fn equal(&self, raw: &str, qcow2: &str) {
        self.qemu("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", raw, qcow2]);
        self.qemu("qemu-img", &["check", "-q", "-f", "qcow2", qcow2]);
    }

    /// A raw disk of 8 MiB with something in it.
    fn disk(&self, name: &str) {
        self.qemu("qemu-img", &["create", "-q", "-f", "raw", name, "8M"]);
        self.qemu("qemu-io", &["-f", "raw", "-c", "write -P 7 1M 300k", "-c", "write -P 9 7M 1M", name]);
    }
}

#[track_caller]
fn succeeded(arguments: &[&str], output: &Output) -> String {
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {out}{error}");
    out.into_owned()
}

#[test]
fn every_option_of_a_new_image_is_qemus() {
    let here = Here::new();
    let options: [&[&str]; 7] = [
        &[],
        &["--cluster-size", "512", "--refcount-bits", "1"],
        &["--compat", "2", "--cluster-size", "2M"],
        &["--lazy-refcounts", "--compression", "zstd"],
        &["--extended-l2", "--preallocate=metadata"],
        &["--preallocate"],
        &["--data-file", "data.raw", "--data-file-raw"],
    ];
    for options in options {
        here.ok(&[&["create", "new.qcow2", "--format", "qcow2", "--size", "5M", "--force"], options].concat());
        here.qemu("qemu-img", &["check", "-q", "-f", "qcow2", "new.qcow2"]);
        let seen = here.qemu("qemu-img", &["info", "--output=json", "-f", "qcow2", "new.qcow2"]);
        let seen: Value = serde_json::from_str(&seen).unwrap();
        assert_eq!(seen["virtual-size"], 5 << 20, "{options:?}");
        let info = here.json(&["info", "--json", "new.qcow2"]);
        assert_eq!(info["virtual_size"], 5 << 20);
        let data = &seen["format-specific"]["data"];
        assert_eq!(info["qcow2"]["extended_l2"], *data.get("extended-l2").unwrap_or(&Value::Bool(false)));
        assert_eq!(info["qcow2"]["cluster_size"], seen["cluster-size"]);
    }
    refused(&here.vbd(&["create", "x", "--format", "qcow2", "--backing", "y"]), 1, &["y", "no such file"]);
    here.disk("y");
    refused(&here.vbd(&["create", "x", "--size", "1M", "--backing", "y"]), 2, &["--backing is for"]);
    let both = ["create", "x", "--format", "qcow2", "--size", "1M", "--compat", "2", "--extended-l2"];
    refused(&here.vbd(&both), 2, &["version 2"]);
    refused(&here.vbd(&["create", "x", "--format", "vmdk", "--size", "1M"]), 1, &["read, not made"]);
    assert!(!here.path("x").exists());
}

#[test]
fn a_clone_that_stands_on_its_base_has_its_size_and_says_so() {
    let here = Here::new();
    here.disk("base");
    here.ok(&["create", "top", "--format", "qcow2", "--backing", "base"]);
    here.equal("base", "top");
    let info = here.json(&["info", "--json", "top"]);
    assert_eq!(info["virtual_size"], 8 << 20);
    assert_eq!(info["chain"][1]["format"], "raw");
    assert!(here.ok(&["info", "top"]).contains("stands on"));
    fs::rename(here.path("base"), here.path("away")).unwrap();
    let text = here.ok(&["info", "top"]);
    assert!(text.contains("base is missing"), "{text}");
    let of = ["--from", "qcow2"];
    refused(&here.vbd(&[&["convert", "top", "new"], &of[..]].concat()), 1, &["base is missing", "rebase"]);
    assert!(!here.path("new").exists());
}

#[test]
fn an_image_of_another_format_is_not_taken_for_raw() {
    let here = Here::new();
    here.disk("disk");
    for (qemu, name, format) in [
        ("qcow2", "a.qcow2", "qcow2"),
        ("vpc", "a.vhd", "vhd"),
        ("vmdk", "a.vmdk", "vmdk"),
        ("vdi", "a.vdi", "vdi"),
    ] {
        here.qemu("qemu-img", &["convert", "-f", "raw", "-O", qemu, "disk", name]);
        let hint = format!("say --from {format}");
        refused(&here.vbd(&["convert", name, "new"]), 1, &[&hint, "--from raw"]);
        refused(&here.vbd(&["attach", name, "--nbd", "unix:n"]), 1, &[&format!("say --format {format}")]);
        refused(&here.vbd(&["resize", name, "+1M"]), 1, &["say --format"]);
        // As another one, it is named by what it is.
        let wrong = if format == "qcow2" { "vhd" } else { "qcow2" };
        refused(&here.vbd(&["convert", name, "new", "--from", wrong]), 1, &[format]);
        here.ok(&["convert", name, "new", "--from", format, "--verify", "--force"]);
        here.qemu("qemu-img", &["compare", "-f", "raw", "-F", "raw", "disk", "new"]);
    }
    let written = here.vbd(&["convert", "disk", "b.vmdk", "--to", "vmdk"]);
    refused(&written, 1, &["read, not made"]);
    refused(&here.vbd(&["attach", "a.vdi", "--format", "vdi", "--nbd", "unix:n"]), 1, &["--read-only"]);
}

#[test]
fn images_are_converted_there_and_back() {
    let here = Here::new();
    here.disk("disk");
    here.ok(&["convert", "disk", "one", "--to", "qcow2"]);
    here.equal("disk", "one");
    // In the disk's order: with each run of data in one run of the file.
    let map: Value =
        serde_json::from_str(&here.qemu("qemu-img", &["map", "--output=json", "-f", "qcow2", "one"]))
            .unwrap();
    let offsets: Vec<_> = map.as_array().unwrap().iter().filter_map(|part| part["offset"].as_u64()).collect();
    assert!(offsets.len() == 2 && offsets.is_sorted(), "{map}");
    here.ok(&["convert", "one", "two", "--from", "qcow2", "--to", "vhd"]);
    let seen = here.qemu("qemu-img", &["compare", "-f", "raw", "-F", "vpc", "disk", "two"]);
    assert!(seen.contains("identical"), "{seen}");
    here.ok(&["convert", "two", "three", "--from", "vhd", "--unordered"]);
    assert_eq!(fs::read(here.path("three")).unwrap(), fs::read(here.path("disk")).unwrap());
    refused(&here.vbd(&["convert", "disk", "one", "--to", "qcow2"]), 1, &["exists already", "--force"]);
    let done = here.json(&["convert", "disk", "one", "--to", "qcow2", "--force", "--json"]);
    assert_eq!(done["resumed_at"], 0);
    assert!(done["written"].as_u64().unwrap() >= 1_300 << 10);
}

#[test]
fn what_becomes_shorter_is_written_compressed() {
    let here = Here::new();
    here.disk("disk");
    // And what does not.
    let mut state = 1u64;
    let noise: Vec<u8> = (0..1 << 20)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()[0]
        })
        .collect();
    let disk = fs::File::options().write(true).open(here.path("disk")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&disk, &noise, 4 << 20).unwrap();
    for (how, cluster) in [("zlib", "64K"), ("zstd", "64K"), ("zstd", "4K"), ("zlib", "2M")] {
        let options = ["--compress", how, "--cluster-size", cluster, "--verify", "--force"];
        here.ok(&[&["convert", "disk", "one", "--to", "qcow2"], &options[..]].concat());
        here.equal("disk", "one");
        let length = fs::metadata(here.path("one")).unwrap().len();
        assert!(cluster == "2M" || length < 1_700_000, "{how}, {cluster}: {length}");
        let seen = here.qemu("qemu-img", &["check", "-f", "qcow2", "one"]);
        assert!(!seen.contains(" 0.00% compressed"), "{seen}");
    }
    refused(&here.vbd(&["convert", "disk", "two", "--compress", "zstd"]), 2, &["--to qcow2"]);
}

#[test]
fn a_map_shows_the_disk_in_an_image() {
    let here = Here::new();
    here.disk("disk");
    here.ok(&["convert", "disk", "one", "--to", "qcow2"]);
    here.ok(&["create", "top", "--format", "qcow2", "--backing", "one", "--backing-format", "qcow2"]);
    for name in ["one", "top"] {
        let map = here.json(&["map", name, "--format", "qcow2", "--json"]);
        assert_eq!(map["size"], 8 << 20);
        let data: Vec<_> =
            map["extents"].as_array().unwrap().iter().filter(|part| part["state"] == "data").collect();
        assert_eq!(
            (&data[0]["start"], &data[0]["length"]),
            (&(1 << 20).into(), &(5 << 16).into()),
            "{name}: {map}"
        );
        assert_eq!((&data[1]["start"], &data[1]["length"]), (&(7 << 20).into(), &(1 << 20).into()));
    }
}

#[test]
fn comparing_tells_by_its_exit_code() {
    let here = Here::new();
    here.disk("disk");
    here.ok(&["convert", "disk", "one", "--to", "qcow2"]);
    assert_eq!(here.ok(&["compare", "disk", "one", "--second-format", "qcow2"]), "equal\n");
    here.qemu("qemu-io", &["-f", "qcow2", "-c", "write -P 1 3000k 1k", "one"]);
    let differ = here.vbd(&["compare", "disk", "one", "--second-format", "qcow2"]);
    assert_eq!(differ.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&differ.stdout), "differ, first at byte 3072000\n");
    refused(&here.vbd(&["compare", "disk", "one"]), 2, &["--second-format qcow2"]);
    refused(&here.vbd(&["compare", "disk", "none"]), 2, &["none"]);
    here.ok(&["resize", "disk", "9M"]);
    here.ok(&["convert", "disk", "longer"]);
    here.ok(&["resize", "longer", "+1M"]);
    assert!(here.ok(&["compare", "disk", "longer"]).contains("but for zeroes"));
    assert_eq!(here.vbd(&["compare", "--strict", "disk", "longer"]).status.code(), Some(1));
}

#[test]
fn sizes_are_measured_and_changed() {
    let here = Here::new();
    here.disk("disk");
    for (to, qemu, more) in [("qcow2", "qcow2", &[][..]), ("qcow2", "qcow2", &["--cluster-size", "4K"])] {
        let measured = here.json(&[&["measure", "disk", "--to", to, "--json"], more].concat());
        let mut ask = vec!["measure", "--output=json", "-f", "raw", "-O", qemu];
        if !more.is_empty() {
            ask.extend(["-o", "cluster_size=4k"]);
        }
        ask.push("disk");
        let expected: Value = serde_json::from_str(&here.qemu("qemu-img", &ask)).unwrap();
        assert_eq!(measured["full"], expected["fully-allocated"], "{more:?}");
        // QEMU counts tables that lead to nothing, too.
        let number = |value: &Value| value.as_u64().unwrap();
        let (required, qemus) = (number(&measured["required"]), number(&expected["required"]));
        assert!(required <= qemus, "{more:?}: {required} {qemus}");
        here.ok(&[&["convert", "disk", "sized", "--to", "qcow2", "--force"], more].concat());
        let length = fs::metadata(here.path("sized")).unwrap().len();
        assert!(length <= qemus && length + 65_536 >= required, "{more:?}: {length} {required}");
    }
    here.ok(&["convert", "disk", "one", "--to", "qcow2"]);
    here.ok(&["resize", "one", "+8M", "--format", "qcow2"]);
    here.ok(&["resize", "disk", "16M"]);
    here.equal("disk", "one");
    refused(&here.vbd(&["resize", "disk", "8M"]), 1, &["--shrink"]);
    refused(&here.vbd(&["resize", "one", "8M", "--format", "qcow2"]), 1, &["--shrink"]);
    here.ok(&["resize", "one", "8M", "--format", "qcow2", "--shrink"]);
    here.ok(&["check", "one", "--format", "qcow2"]);
    here.ok(&["create", "two", "--format", "vhd", "--size", "8M"]);
    here.ok(&["resize", "two", "+8M", "--format", "vhd"]);
    assert_eq!(here.json(&["info", "--json", "two"])["virtual_size"], 16 << 20);
    here.ok(&["resize", "two", "4M", "--format", "vhd", "--shrink"]);
    assert_eq!(here.json(&["info", "--json", "two"])["virtual_size"], 4 << 20);
    here.ok(&["resize", "disk", "8M", "--shrink"]);
    assert_eq!(fs::metadata(here.path("disk")).unwrap().len(), 8 << 20);
    here.equal("disk", "one");
}

#[test]
fn what_an_image_stands_on_is_changed() {
    let here = Here::new();
    here.disk("base");
    here.ok(&["convert", "base", "model"]);
    here.ok(&["create", "mid", "--format", "qcow2", "--backing", "base"]);
    here.ok(&["create", "top", "--format", "qcow2", "--backing", "mid", "--backing-format", "qcow2"]);
    for (format, name) in [("qcow2", "mid"), ("raw", "model")] {
        here.qemu("qemu-io", &["-f", format, "-c", "write -P 3 2M 64k", "-c", "write -z 7M 128k", name]);
    }
    for (format, name) in [("qcow2", "top"), ("raw", "model")] {
        here.qemu("qemu-io", &["-f", format, "-c", "write -P 4 1M 1k", name]);
    }
    here.equal("model", "top");
    let text = here.ok(&["rebase", "top", "--format", "qcow2", "--backing", "base"]);
    assert!(text.contains("stands on base now"), "{text}");
    here.equal("model", "top");
    fs::remove_file(here.path("mid")).unwrap();
    here.equal("model", "top");
    here.ok(&["flatten", "top", "--format", "qcow2"]);
    fs::rename(here.path("base"), here.path("moved")).unwrap();
    here.equal("model", "top");

    here.ok(&["create", "over", "--format", "qcow2", "--backing", "top", "--backing-format", "qcow2"]);
    for (format, name) in [("qcow2", "over"), ("raw", "model")] {
        here.qemu("qemu-io", &["-f", format, "-c", "write -P 6 5M 70k", name]);
    }
    let text = here.ok(&["commit", "over", "--format", "qcow2"]);
    assert!(text.contains("written to"), "{text}");
    here.equal("model", "top");
    here.equal("model", "over");
    refused(&here.vbd(&["commit", "model"]), 1, &["no other image"]);
}

#[test]
fn damage_is_found_and_mended() {
    let here = Here::new();
    here.disk("disk");
    here.ok(&["convert", "disk", "one", "--to", "qcow2"]);
    assert!(here.ok(&["check", "one", "--format", "qcow2"]).starts_with("one: clean\n"));
    // A cluster that nothing refers to: a count in the refcount block, which the header and its table lead to.
    let mut bytes = fs::read(here.path("one")).unwrap();
    let end = bytes.len();
    bytes.resize(end + 65_536, 1);
    let number =
        |at: usize| usize::try_from(u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap();
    let count = number(number(48)) + end / 65_536 * 2;
    bytes[count + 1] = 1;
    fs::write(here.path("one"), bytes).unwrap();
    let found = here.vbd(&["check", "one", "--format", "qcow2"]);
    assert_eq!(found.status.code(), Some(3), "{}", String::from_utf8_lossy(&found.stdout));
    here.ok(&["check", "one", "--format", "qcow2", "--repair=leaks"]);
    here.equal("disk", "one");
    refused(&here.vbd(&["check", "one"]), 2, &["say --format qcow2"]);
    here.ok(&["convert", "disk", "two", "--to", "vhd"]);
    here.ok(&["check", "two", "--format", "vhd"]);
    let truncated = fs::File::options().write(true).open(here.path("one")).unwrap();
    truncated.set_len(100_000).unwrap();
    let damaged = here.vbd(&["check", "one", "--format", "qcow2"]);
    assert_eq!(damaged.status.code(), Some(1));
}

#[test]
fn what_is_in_use_is_left_alone() {
    let here = Here::new();
    here.disk("disk");
    here.ok(&["convert", "disk", "one", "--to", "qcow2"]);
    let path = here.path("one");
    let file = fs::File::open(&path).unwrap();
    let lease = vbd_image::lease::Lease::acquire(
        std::os::fd::AsFd::as_fd(&file),
        Path::new(&path),
        vbd_image::lease::Mode::Write,
        vbd_image::lease::Options::default(),
    )
    .unwrap();
    for verb in [
        &["convert", "one", "new", "--from", "qcow2"][..],
        &["resize", "one", "+1M", "--format", "qcow2"],
        &["flatten", "one", "--format", "qcow2"],
        &["convert", "disk", "one", "--to", "qcow2", "--force"],
    ] {
        refused(&here.vbd(verb), 1, &["in use by"]);
    }
    drop(lease);
    here.equal("disk", "one");
}
