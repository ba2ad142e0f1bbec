//! Images that are made here, as QEMU sees them.

mod common;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use common::{Scratch, qemu_img, qemu_img_status, qemu_io};
use proptest::prelude::*;
use vbd_qcow2::format::{Compression, Extension, Header};
use vbd_qcow2::{
    Backing, CreateError, CreateOptions, DataFile, Measure, Preallocation, Version, create, info,
};

fn raw_backing(name: &str) -> Option<Backing> {
    Some(Backing { name: name.as_bytes().to_vec(), format: "raw".to_owned() })
}

/// The options that make QEMU's image like ours.
fn qemu_options(options: &CreateOptions) -> String {
    let on = |set: bool| if set { "on" } else { "off" };
    let mut text = format!(
        "compat={},cluster_size={},refcount_bits={},lazy_refcounts={},extended_l2={},compression_type={}",
        if options.version == Version::V2 { "0.10" } else { "1.1" },
        options.cluster_size,
        options.refcount_bits,
        on(options.lazy_refcounts),
        on(options.extended_l2),
        if options.compression == Compression::Zstd { "zstd" } else { "zlib" },
    );
    let mode = match options.preallocation {
        Preallocation::Off => "off",
        Preallocation::Metadata => "metadata",
        Preallocation::Falloc => "falloc",
        Preallocation::Full => "full",
    };
    text.push_str(&format!(",preallocation={mode}"));
    if let Some(backing) = &options.backing {
        let name = String::from_utf8_lossy(&backing.name);
        text.push_str(&format!(",backing_file={name},backing_fmt={}", backing.format));
    }
    if let Some(data) = &options.data_file {
        text.push_str(&format!(",data_file={},data_file_raw={}", data.path.display(), on(data.raw)));
    }
    text
}

/// Any options; the names of files are put in later.
fn any_options() -> impl Strategy<Value = CreateOptions> {
    let shape = (0u64..9 << 20, any::<bool>(), 9u32..=21, 0u32..=6, any::<bool>(), any::<bool>());
    let more = (any::<bool>(), any::<bool>(), 0u8..4, prop::option::of(any::<bool>()));
    (shape, more).prop_map(move |(shape, (zstd, backing, room, data_file))| {
        let (size, v2, cluster_bits, refcount_order, lazy_refcounts, extended_l2) = shape;
        let preallocation =
            [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full]
                [usize::from(room)];
        CreateOptions {
            size,
            version: if v2 { Version::V2 } else { Version::V3 },
            cluster_size: 1 << cluster_bits,
            // Half of the images have what version 2 can have, or most of them would be refused.
            refcount_bits: if v2 { 16 } else { 1 << refcount_order },
            lazy_refcounts: lazy_refcounts && !v2,
            extended_l2: extended_l2 && cluster_bits >= 13,
            compression: if zstd && !v2 { Compression::Zstd } else { Compression::Zlib },
            backing: if backing && size % 3 == 0 { raw_backing("base") } else { None },
            data_file: data_file.filter(|_| !v2).map(|raw| DataFile {
                path: "data".into(),
                raw,
                keep: false,
            }),
            luks_header: None,
            preallocation,
            replace: true,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(rounds(60)))]

    /// For any options, QEMU and we refuse the same, and what we make is sound, has those options, reads as nothing
    /// and can be written.
    #[test]
    fn images_of_all_options_are_sound_and_refused_alike(
        mut options in any_options()
    ) {
        let scratch = Scratch::new();
        std::fs::write(scratch.path("base"), vec![7; 1 << 20]).unwrap();
        let (ours, theirs) = (scratch.path("ours"), scratch.path("theirs"));
        let size = options.size.to_string();
        let data = |name: &str, options: &mut CreateOptions| {
            // QEMU takes a relative name from where it runs.
            options.data_file.iter_mut().for_each(|data| data.path = scratch.path(name).into());
        };
        data("their data", &mut options);
        let their_options = qemu_options(&options);
        data("data", &mut options);
        let (status, said) = qemu_img_status(&["create", "-q", "-f", "qcow2", "-o", &their_options, &theirs, &size]);
        match create(Path::new(&ours), &options) {
            Ok(()) => prop_assert_eq!(status, 0, "only QEMU refuses: {}", said),
            Err(CreateError::Refused(reason)) => {
                prop_assert_ne!(status, 0, "only we refuse: {}", reason);
                prop_assert!(!Path::new(&ours).exists());
                return Ok(());
            }
            // Names and features that the smallest header has no room for; QEMU says it in its own way.
            Err(CreateError::Format(error)) if options.cluster_size == 512 => {
                prop_assert_ne!(status, 0, "only we refuse: {}", error);
                return Ok(());
            }
            Err(error) => panic!("{error}"),
        }
        prop_assert_eq!(qemu_img_status(&["check", "-q", "-f", "qcow2", &ours]), (0, String::new()));
        let (mine, qemus) = (File::open(&ours).unwrap(), File::open(&theirs).unwrap());
        let (mine, qemus) = (Header::read(&mine).unwrap(), Header::read(&qemus).unwrap());
        // QEMU leaves out the names of features more often than it has to, and the data files are two.
        let told = |header: &Header| Header {
            l1_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            l1_entries: 0,
            extensions: header
                .extensions
                .iter()
                .filter(|extension| !matches!(extension, Extension::FeatureNames(_) | Extension::DataFile(_)))
                .cloned()
                .collect(),
            ..header.clone()
        };
        prop_assert_eq!(told(&mine), told(&qemus));
        if options.preallocation == Preallocation::Full {
            let length = if options.data_file.is_some() { scratch.path("data") } else { ours.clone() };
            let taken = std::fs::metadata(length).unwrap().blocks() * 512;
            prop_assert!(taken >= options.size, "{taken} of {}", options.size);
        }
        qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "qcow2", &ours, &theirs]);
        if options.size >= 1 << 16 {
            qemu_io(&ours, &["write -P 1 1000 10000", "read -P 1 1000 10000", "write -P 2 50k 12k", "flush"]);
            prop_assert_eq!(qemu_img_status(&["check", "-q", "-f", "qcow2", &ours]), (0, String::new()));
        }
    }

    /// What a measurement says is what QEMU's conversion makes of the same data, or up to an L2 table and a block more.
    #[test]
    fn measured_sizes_are_those_that_images_have(
        cluster_bits in 9u32..=16, extended: bool, writes in prop::collection::vec((0u64..6 << 20, 1u64..100_000), 0..6)
    ) {
        let scratch = Scratch::new();
        let (raw, image) = (scratch.path("raw"), scratch.path("image"));
        let file = File::create(&raw).unwrap();
        let size = 6 << 20;
        file.set_len(size).unwrap();
        let options = CreateOptions {
            size, cluster_size: 1 << cluster_bits, extended_l2: extended && cluster_bits >= 14, ..Default::default()
        };
        let mut measure = Measure::new(&options).unwrap();
        let mut writes = writes;
        writes.sort_unstable();
        for (offset, length) in writes {
            // Whole blocks, which is what a conversion sees as data.
            let (start, end) = (offset & !0xfff, ((offset + length).next_multiple_of(4096)).min(size));
            file.write_all_at(&vec![1; usize::try_from(end - start).unwrap()], start).unwrap();
            measure.add(start, end - start);
        }
        let measured = measure.finish();
        let more = format!("{},preallocation=off", qemu_options(&options));
        qemu_img(&["convert", "-q", "-f", "raw", "-O", "qcow2", "-S", "4k", "-o", &more, &raw, &image]);
        let cluster = 1 << cluster_bits;
        let made = std::fs::metadata(&image).unwrap().len().next_multiple_of(cluster);
        prop_assert!(measured.required.abs_diff(made) <= 4 * cluster, "{measured:?}, made {made}");
        prop_assert!(measured.full >= measured.required);
    }
}

fn rounds(usual: u32) -> u32 {
    usual * std::env::var("VBD_ROUNDS").ok().and_then(|times| times.parse().ok()).unwrap_or(1)
}

#[test]
fn what_qemu_refuses_is_refused_with_the_reason() {
    let base = CreateOptions { size: 1 << 20, ..Default::default() };
    let v2 = CreateOptions { version: Version::V2, ..base.clone() };
    let data = |raw| Some(DataFile { path: "data".into(), raw, keep: false });
    let cases = [
        (CreateOptions { lazy_refcounts: true, ..v2.clone() }, "lazy refcounts"),
        (CreateOptions { refcount_bits: 8, ..v2.clone() }, "refcounts of other than 16 bits"),
        (CreateOptions { extended_l2: true, ..v2.clone() }, "subclusters"),
        (CreateOptions { compression: Compression::Zstd, ..v2.clone() }, "compression other than zlib"),
        (CreateOptions { data_file: data(false), ..v2.clone() }, "external data file"),
        (CreateOptions { luks_header: Some(vec![0; 4096]), ..v2 }, "LUKS"),
        (CreateOptions { extended_l2: true, cluster_size: 8192, ..base.clone() }, "at least 16 KiB"),
        (CreateOptions { cluster_size: 256, ..base.clone() }, "cluster size of 256"),
        (CreateOptions { cluster_size: 3 << 10, ..base.clone() }, "cluster size of 3072"),
        (CreateOptions { cluster_size: 4 << 20, ..base.clone() }, "cluster size of 4194304"),
        (CreateOptions { cluster_size: 0, ..base.clone() }, "cluster size of 0"),
        (CreateOptions { refcount_bits: 3, ..base.clone() }, "refcounts of 3 bits"),
        (CreateOptions { refcount_bits: 128, ..base.clone() }, "refcounts of 128 bits"),
        (
            CreateOptions {
                backing: raw_backing("b"),
                preallocation: Preallocation::Metadata,
                ..base.clone()
            },
            "hides what the backing file has",
        ),
        (
            CreateOptions { backing: raw_backing("b"), data_file: data(true), ..base.clone() },
            "no backing file",
        ),
        (CreateOptions { backing: raw_backing(&"b".repeat(1024)), ..base.clone() }, "1 to 1023 bytes"),
        (CreateOptions { backing: raw_backing(""), ..base.clone() }, "1 to 1023 bytes"),
        (
            CreateOptions {
                backing: Some(Backing { name: b"b".to_vec(), format: String::new() }),
                ..base.clone()
            },
            "format of the backing file",
        ),
        (
            CreateOptions { size: 129 << 30, cluster_size: 512, ..base.clone() },
            "they reach 137438953472 bytes",
        ),
        (CreateOptions { size: u64::MAX, ..base.clone() }, "at most"),
        (
            CreateOptions {
                size: 100 << 30,
                cluster_size: 512,
                refcount_bits: 64,
                preallocation: Preallocation::Metadata,
                ..base
            },
            "more clusters than can be counted",
        ),
    ];
    let scratch = Scratch::new();
    for (options, wanted) in cases {
        let path = scratch.path("image");
        let error = create(Path::new(&path), &options).expect_err(wanted).to_string();
        assert!(error.contains(wanted), "{error}: {wanted}");
        assert!(!Path::new(&path).exists());
    }
}

#[test]
fn an_existing_file_is_replaced_only_when_asked() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    std::fs::write(&path, "precious").unwrap();
    let options = CreateOptions { size: 1 << 20, ..Default::default() };
    let error = create(Path::new(&path), &options).unwrap_err().to_string();
    assert!(error.contains("exists already"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    create(Path::new(&path), &CreateOptions { replace: true, ..options.clone() }).unwrap();
    assert_eq!(info::read(&File::open(&path).unwrap()).unwrap().virtual_size, 1 << 20);
    // A data file is no less precious; and where it is refused there is no image.
    let other = scratch.path("other");
    std::fs::write(scratch.path("data"), "precious").unwrap();
    let data = DataFile { path: "data".into(), raw: true, keep: false };
    let relative = CreateOptions { data_file: Some(data.clone()), ..options.clone() };
    assert!(create(Path::new(&other), &relative).unwrap_err().to_string().contains("exists already"));
    let data = DataFile { path: scratch.path("data").into(), ..data };
    let options = CreateOptions { data_file: Some(data.clone()), ..options };
    assert!(create(Path::new(&other), &options).unwrap_err().to_string().contains("exists already"));
    assert!(!Path::new(&other).exists());
    // Used as it is, it has to hold the disk.
    let keep = CreateOptions { data_file: Some(DataFile { keep: true, ..data }), ..options };
    let error = create(Path::new(&other), &keep).unwrap_err().to_string();
    assert!(error.contains("shorter than the disk"), "{error}");
    assert_eq!(std::fs::read(scratch.path("data")).unwrap(), b"precious");
    std::fs::write(scratch.path("data"), vec![9; 1 << 20]).unwrap();
    create(Path::new(&other), &keep).unwrap();
    qemu_io(&other, &["read -P 9 0 1M"]);
    assert_eq!(qemu_img_status(&["check", "-q", "-f", "qcow2", &other]), (0, String::new()));
}

/// A header that a key was made for elsewhere takes the place that the format has for it.
#[test]
fn a_luks_header_is_taken_in() {
    let scratch = Scratch::new();
    let (theirs, ours) = (scratch.path("theirs"), scratch.path("ours"));
    let secret = ["--object", "secret,id=s,data=secret"];
    let made = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    qemu_img(&["create", "-q", secret[0], secret[1], "-f", "qcow2", "-o", made, &theirs, "1M"]);
    let file = File::open(&theirs).unwrap();
    let crypto = Header::read(&file).unwrap().crypto().unwrap();
    let mut luks = vec![0; usize::try_from(crypto.length).unwrap()];
    file.read_exact_at(&mut luks, crypto.offset).unwrap();
    let options = CreateOptions { size: 1 << 20, luks_header: Some(luks), ..Default::default() };
    create(Path::new(&ours), &options).unwrap();
    let opened = format!("driver=qcow2,file.filename={ours},encrypt.key-secret=s");
    qemu_img(&["check", "-q", secret[0], secret[1], "--image-opts", &opened]);
    assert_eq!(info::read(&File::open(&ours).unwrap()).unwrap().encryption, Some("luks"));
}

#[test]
fn an_image_tells_what_it_is() {
    let scratch = Scratch::new();
    let (base, image) = (scratch.path("base"), scratch.path("image"));
    File::create(&base).unwrap().set_len(1 << 20).unwrap();
    let options = "lazy_refcounts=on,refcount_bits=32,cluster_size=4k,compression_type=zstd";
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", "-o", options, &image, "3M"]);
    qemu_img(&["snapshot", "-c", "before", &image]);
    qemu_img(&["bitmap", "--add", "-g", "8192", &image, "since"]);
    let info = info::read(&File::open(&image).unwrap()).unwrap();
    assert_eq!(
        (info.version, info.virtual_size, info.cluster_size, info.refcount_bits),
        (3, 3 << 20, 4096, 32)
    );
    assert_eq!((info.lazy_refcounts, info.extended_l2, info.compression), (true, false, "zstd"));
    let backing = info.backing.unwrap();
    assert_eq!((backing.name, backing.format.as_deref()), (base, Some("raw")));
    assert_eq!((&info.snapshots[0].id[..], &info.snapshots[0].name[..]), ("1", "before"));
    let bitmap = &info.bitmaps[0];
    assert_eq!(
        (&bitmap.name[..], bitmap.granularity, bitmap.enabled, bitmap.in_use),
        ("since", 8192, true, false)
    );
    assert!(info.bitmaps_consistent && info.problems.is_empty() && info.unknown_features.is_none());
}
