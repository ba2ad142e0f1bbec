//! Images that stand on others, with qemu-img as the other side.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vbd_core::Live;
use vbd_formats::{Format, Gate, ImageSpec, NewImage};
use vbd_jobs::{ConvertOptions, Image, NewBacking, Silent, commit, compare, convert, rebase, rebase_unsafe};

const SIZE: u64 = 16 << 20;

fn run(program: &str, arguments: &[&OsStr]) -> String {
    let output = Command::new(program).args(arguments).output().expect(program);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

macro_rules! run {
    ($program:expr, $($argument:expr),+ $(,)?) => { run($program, &[$(OsStr::new($argument)),+]) };
}

/// Neither errors nor leaks.
fn clean(path: &Path) {
    run!("qemu-img", "check", "-f", "qcow2", path);
}

/// What guests read from it, as QEMU sees it.
fn content(path: &Path, format: &str) -> Vec<u8> {
    let raw = path.with_extension("content");
    run!("qemu-img", "convert", "-f", format, "-O", "raw", path, &raw);
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(raw).unwrap();
    bytes
}

/// `top` on `mid` on `base`, made by QEMU: data, zeroes over data, and holes in each, `base` shorter and raw.
struct Chain {
    dir: tempfile::TempDir,
    base: PathBuf,
    mid: PathBuf,
    top: PathBuf,
}

impl Chain {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let [base, mid, top] = ["base.img", "mid.qcow2", "top.qcow2"].map(|name| dir.path().join(name));
        run!("qemu-img", "create", "-q", "-f", "raw", &base, "12M");
        run!("qemu-io", "-f", "raw", "-c", "write -P 1 0 3M", "-c", "write -P 2 8M 4M", &base);
        run!("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", &mid, "16M");
        run!(
            "qemu-io",
            "-f",
            "qcow2",
            "-c",
            "write -P 3 1M 70k",
            "-c",
            "write -z 9M 1M",
            "-c",
            "write -P 4 14M 64k",
            &mid
        );
        run!("qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", &top, "16M");
        run!(
            "qemu-io",
            "-f",
            "qcow2",
            "-c",
            "write -P 5 2500k 300k",
            "-c",
            "write -z 1M 64k",
            "-c",
            "write -P 6 15M 512",
            &top
        );
        Chain { dir, base, mid, top }
    }

    fn spec(&self) -> ImageSpec {
        ImageSpec::new(&self.top, Format::Qcow2)
    }
}

#[test]
fn a_chain_reads_as_qemu_reads_it_and_says_what_it_stands_on() {
    let chain = Chain::new();
    let image = Image::open(&chain.spec().read_only()).unwrap();
    let mut bytes = vec![0; 16 << 20];
    image.read_at(0, &mut bytes).unwrap();
    assert!(bytes == content(&chain.top, "qcow2"));
    let links = vbd_formats::chain(&chain.top, Format::Qcow2, &Gate::default()).unwrap();
    let formats: Vec<_> = links.iter().map(|link| (link.format, link.size)).collect();
    assert_eq!(formats, [(Format::Qcow2, SIZE), (Format::Qcow2, SIZE), (Format::Raw, 12 << 20)]);
}

#[test]
fn rebasing_keeps_what_guests_read() {
    let chain = Chain::new();
    let before = content(&chain.top, "qcow2");
    let to_base = NewBacking { name: "base.img".into(), format: Format::Raw };
    let copied = rebase(&chain.spec(), Some(&to_base), 4, &Silent).unwrap();
    assert!(copied > 0);
    fs::remove_file(&chain.mid).unwrap();
    clean(&chain.top);
    assert!(content(&chain.top, "qcow2") == before);
    // The base alone has nothing of what the image holds.
    let nothing = rebase(&chain.spec(), Some(&to_base), 4, &Silent).unwrap();
    assert_eq!(nothing, 0);

    // And then on nothing at all.
    rebase(&chain.spec(), None, 4, &Silent).unwrap();
    fs::remove_file(&chain.base).unwrap();
    clean(&chain.top);
    assert!(content(&chain.top, "qcow2") == before);
    assert!(!run!("qemu-img", "info", &chain.top).contains("backing"));
}

#[test]
fn an_unsafe_rebase_changes_the_name_alone() {
    let chain = Chain::new();
    let moved = chain.dir.path().join("moved.qcow2");
    fs::rename(&chain.mid, &moved).unwrap();
    let missing = Image::open(&chain.spec()).err().unwrap().to_string();
    assert!(missing.contains("mid.qcow2 is missing") && missing.contains("rebase --unsafe"), "{missing}");
    let new = NewBacking { name: "moved.qcow2".into(), format: Format::Qcow2 };
    rebase_unsafe(&chain.spec(), Some(&new)).unwrap();
    clean(&chain.top);
    assert!(run!("qemu-img", "info", &chain.top).contains("backing file: moved.qcow2"));
    Image::open(&chain.spec()).unwrap();
}

#[test]
fn circles_and_strangers_are_refused() {
    let chain = Chain::new();
    let new = NewBacking { name: "top.qcow2".into(), format: Format::Qcow2 };
    let spec = ImageSpec::new(&chain.mid, Format::Qcow2);
    let circle = rebase(&spec, Some(&new), 2, &Silent).unwrap_err().to_string();
    assert!(circle.contains("stands on it"), "{circle}");
    rebase_unsafe(&spec, Some(&new)).unwrap();
    let circle = Image::open(&chain.spec()).err().unwrap().to_string();
    assert!(circle.contains("comes back to"), "{circle}");

    let outside = NewBacking { name: "/etc/hostname".into(), format: Format::Raw };
    rebase_unsafe(&spec, Some(&outside)).unwrap();
    let refused = Image::open(&chain.spec()).err().unwrap().to_string();
    assert!(refused.contains("--allow-dir /etc"), "{refused}");
    let allowed = ImageSpec { gate: Gate::new(["/etc".into()]), ..chain.spec() };
    Image::open(&allowed).unwrap();

    // Never guessed.
    run!("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "base.img", "-F", "raw", &chain.mid, "16M");
    let mut bytes = fs::read(&chain.mid).unwrap();
    let at = bytes.windows(4).position(|four| four == [0xe2, 0x79, 0x2a, 0xca]).expect("a backing format");
    bytes[at] = 0x11;
    fs::write(&chain.mid, bytes).unwrap();
    let untold = Image::open(&chain.spec()).err().unwrap().to_string();
    assert!(untold.contains("which format its backing file has"), "{untold}");
}

#[test]
fn a_commit_goes_into_the_image_below_and_grows_it() {
    let chain = Chain::new();
    let before = content(&chain.top, "qcow2");
    let done = commit(&chain.spec(), 4, &Silent).unwrap();
    assert_eq!(done.into, chain.mid.canonicalize().unwrap());
    clean(&chain.mid);
    clean(&chain.top);
    assert!(content(&chain.mid, "qcow2") == before);
    assert!(content(&chain.top, "qcow2") == before, "the image above stays whole");
    // Into a raw file that is shorter.
    let done = commit(&ImageSpec::new(&chain.mid, Format::Qcow2), 4, &Silent).unwrap();
    assert_eq!(done.into, chain.base.canonicalize().unwrap());
    assert!(fs::read(&chain.base).unwrap() == before);
    let nothing = commit(&ImageSpec::new(&chain.base, Format::Raw), 4, &Silent).unwrap_err().to_string();
    assert!(nothing.contains("no other image"), "{nothing}");
}

#[test]
fn conversions_to_qcow2_and_back_are_equal_for_qemu() {
    let chain = Chain::new();
    let before = content(&chain.top, "qcow2");
    for (number, cluster_size) in [512u64, 4096, 65_536, 2 << 20].into_iter().enumerate() {
        let mut image = NewImage::new(Format::Qcow2, 0).unwrap();
        let vbd_formats::Kind::Qcow2(options) = &mut image.kind else { unreachable!("a qcow2 image") };
        options.cluster_size = cluster_size;
        let target = chain.dir.path().join(format!("new{number}.qcow2"));
        let options = ConvertOptions { verify: true, ordered: number % 2 == 0, ..ConvertOptions::new(image) };
        convert(&chain.spec(), &target, &options, &Silent).unwrap();
        clean(&target);
        assert!(content(&target, "qcow2") == before, "{cluster_size}");
        let back = chain.dir.path().join(format!("back{number}"));
        let raw = ConvertOptions::new(NewImage::new(Format::Raw, 0).unwrap());
        convert(&ImageSpec::new(&target, Format::Qcow2), &back, &raw, &Silent).unwrap();
        assert!(fs::read(&back).unwrap() == before);
    }
}

#[test]
fn a_conversion_onto_a_backing_file_holds_what_differs() {
    let chain = Chain::new();
    let before = content(&chain.top, "qcow2");
    let mut image = NewImage::new(Format::Qcow2, 0).unwrap();
    let vbd_formats::Kind::Qcow2(options) = &mut image.kind else { unreachable!("a qcow2 image") };
    options.backing = Some(vbd_qcow2::Backing { name: b"base.img".to_vec(), format: "raw".into() });
    let target = chain.dir.path().join("new.qcow2");
    let options = ConvertOptions { verify: true, ..ConvertOptions::new(image) };
    let done = convert(&chain.spec(), &target, &options, &Silent).unwrap();
    assert!(done.written < 3 << 20, "{done:?}");
    clean(&target);
    assert!(content(&target, "qcow2") == before);
    let open = |path: &Path| Image::open(&ImageSpec::new(path, Format::Qcow2).read_only()).unwrap();
    assert_eq!(compare(&open(&target), &open(&chain.top), 4, &Silent).unwrap().difference, None);
}

#[test]
fn a_job_without_room_leaves_the_image_as_it_was() {
    let chain = Chain::new();
    let before = content(&chain.top, "qcow2");
    let full = |op: &vbd_ring::Op| {
        let write = matches!(op, vbd_ring::Op::Write { offset, .. } if *offset >= 3 << 19);
        write.then_some(vbd_core::file::Fault::Fail(libc::ENOSPC))
    };
    let spec = ImageSpec { faults: Some(std::sync::Arc::new(full)), ..chain.spec() };
    let error = rebase(&spec, None, 4, &Silent).unwrap_err().to_string();
    assert!(error.contains("No space left"), "{error}");
    assert!(run!("qemu-img", "info", &chain.top).contains("mid.qcow2"));
    assert!(content(&chain.top, "qcow2") == before);
    // Done again with room, it succeeds.
    rebase(&chain.spec(), None, 4, &Silent).unwrap();
    clean(&chain.top);
    assert!(content(&chain.top, "qcow2") == before);
}

#[test]
fn layers_are_told_apart() {
    let chain = Chain::new();
    let image = Image::open(&chain.spec().read_only()).unwrap();
    let live: &dyn Live = image.session().live().unwrap();
    let mut at = 0;
    let mut own = 0;
    while at < SIZE {
        for extent in live.layer(at, SIZE - at).unwrap() {
            at += extent.len;
            own += if extent.layer == vbd_core::Layer::Below { 0 } else { extent.len };
        }
    }
    let map = run!("qemu-img", "map", "--output=json", "-f", "qcow2", &chain.top);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let depth0 = map.as_array().unwrap().iter().filter(|part| part["depth"] == 0);
    // What is in no image of the chain has depth 0 for QEMU, too, unless it says `present`.
    let expected: u64 =
        depth0.filter(|part| part["present"] == true).map(|part| part["length"].as_u64().unwrap()).sum();
    assert_eq!(own, expected);
}
