//! The structures of images: those that QEMU makes, and those that nobody should have made.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;

use common::{Scratch, qemu_img, qemu_io};
use proptest::prelude::*;
use vbd_qcow2::format::{
    BitmapsExtension, Cluster, Compression, Encryption, Error, Extension, FeatureKind, FeatureName, Header,
    L1Entry, L2Entry, RefcountTableEntry, RefcountWidth, Subclusters, at, encode_bitmaps, encode_snapshots,
    incompatible, read_bitmap_table, read_bitmaps, read_snapshots,
};
use vbd_qcow2::storage::read_exact_at;

fn read(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    read_exact_at(file, offset, &mut bytes).unwrap();
    bytes
}

/// What QEMU writes is what we write for the same header, byte for byte.
#[test]
fn headers_of_qemu_are_written_as_they_were() {
    let scratch = Scratch::new();
    let base = scratch.path("base");
    qemu_img(&["create", "-q", "-f", "raw", &base, "3M"]);
    let backing = ["-b", base.as_str(), "-F", "raw"];
    let data = format!("data_file={},data_file_raw=on", scratch.path("data"));
    let cases: [(&str, &[&str]); 12] = [
        ("compat=0.10", &[]),
        ("compat=0.10,cluster_size=512", &[]),
        ("compat=0.10", &backing),
        ("", &[]),
        ("", &backing),
        ("lazy_refcounts=on,refcount_bits=1,cluster_size=2M", &[]),
        ("refcount_bits=64,cluster_size=1k", &[]),
        ("compression_type=zstd", &[]),
        ("extended_l2=on,cluster_size=16k", &backing),
        (&data, &[]),
        ("cluster_size=512", &[]),
        ("cluster_size=4k,refcount_bits=8", &backing),
    ];
    for (options, more) in cases {
        let image = scratch.path("image");
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.extend(more);
        arguments.extend([&image, "3M"]);
        qemu_img(&arguments);
        let file = File::open(&image).unwrap();
        let header = Header::read(&file).unwrap_or_else(|error| panic!("{options}: {error}"));
        header.refuse_unknown().unwrap();
        let cluster = header.layout().cluster_len();
        assert_eq!(header.encode_cluster().unwrap(), read(&file, 0, cluster), "{options}");
        assert_eq!(header.size, 3 << 20);
        assert_eq!(header.version, if options.contains("0.10") { 2 } else { 3 });
        assert_eq!(header.lazy_refcounts(), options.contains("lazy"));
        assert_eq!(header.raw_data(), options.contains("raw=on"));
        assert_eq!(header.data_file().is_some(), options.contains("data_file"));
        assert_eq!(header.layout().extended_l2, options.contains("extended"));
        assert_eq!(header.compression == Compression::Zstd, options.contains("zstd"));
        assert_eq!(header.encryption, Encryption::None);
        let name = (!more.is_empty()).then_some(base.as_bytes());
        assert_eq!(header.backing.as_deref(), name);
        assert_eq!(header.backing_format(), (!more.is_empty()).then_some(&b"raw"[..]));
        std::fs::remove_file(image).unwrap();
    }
}

#[test]
fn the_pointer_to_a_luks_header_is_read() {
    let scratch = Scratch::new();
    let image = scratch.path("image");
    let secret = "secret,id=s,data=secret";
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    qemu_img(&["create", "-q", "--object", secret, "-f", "qcow2", "-o", options, &image, "1M"]);
    let file = File::open(&image).unwrap();
    let header = Header::read(&file).unwrap();
    assert_eq!(header.encryption, Encryption::Luks);
    let crypto = header.crypto().unwrap();
    assert_eq!(read(&file, crypto.offset, 6), b"LUKS\xba\xbe");
    assert_eq!(header.encode_cluster().unwrap(), read(&file, 0, 1 << 16));
}

/// Snapshots and bitmaps, tables and counts, of images that QEMU wrote to.
#[test]
fn the_tables_of_qemu_say_what_was_written() {
    for options in ["", "extended_l2=on", "refcount_bits=2", "refcount_bits=64"] {
        let scratch = Scratch::new();
        let image = scratch.path("image");
        let all = format!("cluster_size=64k,{options}");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", all.trim_end_matches(','), &image, "8M"]);
        qemu_io(&image, &["write -P 1 0 128k", "write -z 1M 64k"]);
        qemu_img(&["snapshot", "-c", "first", &image]);
        qemu_img(&["bitmap", "--add", "-g", "4096", &image, "a"]);
        qemu_img(&["bitmap", "--add", "--disable", &image, "bitmap b"]);
        qemu_io(&image, &["write -P 2 64k 4k", "write -c -P 3 2M 64k"]);
        qemu_img(&["snapshot", "-c", "the second", &image]);

        let file = File::open(&image).unwrap();
        let header = Header::read(&file).unwrap();
        let layout = header.layout();
        let (snapshots, length) = read_snapshots(&header, &file).unwrap();
        let names: Vec<_> = snapshots.iter().map(|s| (&s.id[..], &s.name[..], s.disk_size)).collect();
        let size = Some(8 << 20);
        assert_eq!(names, [(&b"1"[..], &b"first"[..], size), (&b"2"[..], &b"the second"[..], size)]);
        let written = encode_snapshots(&header, &snapshots);
        assert_eq!(written.len(), length);
        assert_eq!(written, read(&file, header.snapshots_offset, length));

        let bitmaps = read_bitmaps(&header, &file).unwrap();
        let extension = header.bitmaps().unwrap();
        let directory = read(&file, extension.directory_offset, extension.directory_size.try_into().unwrap());
        assert_eq!(encode_bitmaps(&bitmaps), directory);
        let told: Vec<_> = bitmaps.iter().map(|b| (b.text(), b.granularity_bits, b.flags.auto)).collect();
        assert_eq!(told, [("a".to_owned(), 12, true), ("bitmap b".to_owned(), 16, false)]);
        for bitmap in &bitmaps {
            assert_eq!(u64::from(bitmap.table_entries), bitmap.clusters(&layout, header.size));
            let table = read_bitmap_table(&layout, bitmap, &file).unwrap();
            // Only the enabled one saw writes: 4 KiB at 64 KiB and 64 KiB at 2 MiB.
            let offset = table[0].decode(&layout).unwrap();
            assert_eq!(offset.is_some(), bitmap.flags.auto);
            if let Some(offset) = offset {
                let bits = read(&file, offset, 256);
                assert_eq!((bits[2], bits[64], bits[65]), (1, 0xff, 0xff));
                assert_eq!(bits.iter().map(|byte| byte.count_ones()).sum::<u32>(), 17);
            }
        }

        let first = read(&file, header.l1_offset, 8);
        let l1 = L1Entry(u64::from_be_bytes(first.try_into().unwrap()));
        let l2 = read(&file, l1.decode(&layout).unwrap().unwrap(), 1 << 16);
        let entry = |index: usize| {
            let at = |offset: usize| u64::from_be_bytes(l2[offset..offset + 8].try_into().unwrap());
            let offset = index * layout.l2_entry_size();
            let subclusters = Subclusters(if layout.extended_l2 { at(offset + 8) } else { 0 });
            let cluster = L2Entry(at(offset)).decode(&layout).unwrap();
            subclusters.validate(cluster).unwrap();
            (cluster, subclusters)
        };
        let count = |offset: u64| {
            let table = read(&file, header.refcount_table_offset, 8);
            let block = RefcountTableEntry(u64::from_be_bytes(table.try_into().unwrap()));
            let block = read(&file, block.decode(&layout).unwrap().unwrap(), layout.cluster_len());
            layout.refcount_width.get(&block, usize::try_from(offset / layout.cluster_size()).unwrap())
        };
        let Cluster::Data { host: first } = entry(0).0 else { panic!("{options}: {:?}", entry(0)) };
        let Cluster::Data { host: second } = entry(1).0 else { panic!("{options}: {:?}", entry(1)) };
        assert_eq!((count(first), count(second)), (3, 2), "{options}");
        assert_eq!(read(&file, second, 4097), [&[2; 4096][..], &[1]].concat());
        let zero = if layout.extended_l2 {
            (Cluster::Unallocated, Subclusters::ZERO)
        } else {
            (Cluster::Zero { host: None }, Subclusters::NONE)
        };
        assert_eq!(entry(16), zero);
        assert_eq!(entry(17), (Cluster::Unallocated, Subclusters::NONE));
        assert!(matches!(entry(32).0, Cluster::Compressed(compressed) if compressed.length <= 1024));
    }
}

#[test]
fn what_is_no_qcow2_image_is_told_by_what_it_is() {
    let cases: [(&[u8], &str); 6] = [
        (b"", "nothing, for it is empty"),
        (&[0; 512], "zeros"),
        (b"KDMV1234", "the magic of VMDK"),
        (b"conectix", "the magic of VHD"),
        (b"vhdxfile", "the magic of VHDX"),
        (b"\x12\x34\x56\x78\x9a", "the bytes 12 34 56 78"),
    ];
    for (bytes, found) in cases {
        let error = Header::read(bytes).unwrap_err();
        assert!(matches!(&error, Error::Foreign { found: told } if told == found), "{error}");
    }
    let truncated = Header::read(&b"QFI\xfb\0\0\0\x03"[..]).unwrap_err();
    assert!(matches!(truncated, Error::Truncated { .. }), "{truncated}");
}

/// A header as small as it can be.
fn small() -> Header {
    Header {
        version: 3,
        cluster_bits: 16,
        size: 1 << 30,
        encryption: Encryption::None,
        l1_entries: 2,
        l1_offset: 3 << 16,
        refcount_table_offset: 1 << 16,
        refcount_table_clusters: 1,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        refcount_width: RefcountWidth::V2,
        compression: Compression::Zlib,
        unknown: vec![0; 7],
        length: 112,
        extensions: Vec::new(),
        backing: None,
    }
}

/// A change to a header's bytes, and what the error has to say of it.
type Change<'a> = (u64, &'a [u8], &'a [&'a str]);

#[test]
fn fields_out_of_bounds_are_named_with_what_they_may_be() {
    let cases: &[Change<'_>] = &[
        (4, &4u32.to_be_bytes(), &["version is 4", "2 and 3"]),
        (8, &(1u64 << 17).to_be_bytes(), &["backing_file_offset is 131072", "65536"]),
        (20, &8u32.to_be_bytes(), &["cluster_bits is 8", "9 to 21"]),
        (20, &22u32.to_be_bytes(), &["cluster_bits is 22", "9 to 21"]),
        (20, &u32::MAX.to_be_bytes(), &["cluster_bits is 4294967295"]),
        (at::SIZE, &u64::MAX.to_be_bytes(), &["size is 18446744073709551615", "at most"]),
        (at::SIZE, &(1u64 << 40).to_be_bytes(), &["l1_size is 2", "needs 2048"]),
        (32, &3u32.to_be_bytes(), &["crypt_method is 3", "LUKS"]),
        (32, &2u32.to_be_bytes(), &["crypt_method is 2", "no header extension"]),
        (at::L1, &(4u32 << 20 | 1).to_be_bytes(), &["l1_size is 4194305", "at most 4194304"]),
        (at::L1 + 4, &512u64.to_be_bytes(), &["l1_table_offset is 0x200", "65536"]),
        (at::REFCOUNT_TABLE, &1u64.to_be_bytes(), &["refcount_table_offset is 0x1"]),
        (at::REFCOUNT_TABLE + 8, &129u32.to_be_bytes(), &["refcount_table_clusters is 129", "at most 128"]),
        (at::SNAPSHOTS, &65_537u32.to_be_bytes(), &["nb_snapshots is 65537", "at most 65536"]),
        (at::SNAPSHOTS + 4, &2u64.to_be_bytes(), &["snapshots_offset is 0x2"]),
        (at::FEATURES, &incompatible::COMPRESSION.to_be_bytes(), &["compression_type is 0"]),
        (104, &[1], &["compression_type is 1", "0 where its feature bit is clear"]),
        (96, &7u32.to_be_bytes(), &["refcount_order is 7", "0 to 6"]),
        (100, &100u32.to_be_bytes(), &["header_length is 100", "104 to 65536"]),
        (100, &108u32.to_be_bytes(), &["header_length is 108", "multiple of 8"]),
        (100, &u32::MAX.to_be_bytes(), &["header_length is 4294967295"]),
        (112, &[0, 0, 0, 9, 0xff, 0, 0, 0], &["extension 0x00000009 is 4278190080", "are left"]),
        (112, &[0x23, 0x85, 0x28, 0x75, 0, 0, 0, 8], &["bitmaps extension is 8", "24"]),
        (112, &[0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 8], &["encryption header pointer is 8", "16"]),
        (112, &[0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 8], &["feature name table is 8", "48"]),
    ];
    let good = small().encode_cluster().unwrap();
    assert_eq!(Header::parse(&good).unwrap(), small());
    for (offset, bytes, wanted) in cases {
        let mut bad = good.clone();
        let offset = usize::try_from(*offset).unwrap();
        bad[offset..offset + bytes.len()].copy_from_slice(bytes);
        let error = Header::parse(&bad).expect_err(wanted[0]).to_string();
        assert!(wanted.iter().all(|wanted| error.contains(wanted)), "{error}: {wanted:?}");
    }
    let extended = Header { cluster_bits: 13, incompatible: incompatible::EXTENDED_L2, ..small() };
    let error = Header::parse(&extended.encode().unwrap()).unwrap_err().to_string();
    assert!(error.contains("16 KiB"), "{error}");
}

#[test]
fn unknown_features_have_the_names_that_the_image_gives_them() {
    let mut header = small();
    header.incompatible |= 1 << 17 | 1 << 63;
    let names = vec![FeatureName::new(FeatureKind::Incompatible, 17, "time\x1b[2Jtravel")];
    header.extensions.push(Extension::FeatureNames(names));
    let header = Header::parse(&header.encode().unwrap()).unwrap();
    let error = header.refuse_unknown().unwrap_err().to_string();
    assert!(error.contains("\"time\u{fffd}[2Jtravel\" (incompatible feature 17)"), "{error}");
    assert!(error.contains("incompatible feature 63"), "{error}");
}

#[test]
fn a_header_that_outgrows_its_cluster_is_refused() {
    let mut header = Header { cluster_bits: 9, size: 1 << 16, ..small() };
    header.backing = Some(vec![b'a'; 400]);
    let error = header.encode().unwrap_err().to_string();
    assert!(error.contains("takes 520 bytes, and there is room for 512"), "{error}");
    header.cluster_bits = 16;
    header.backing = Some(vec![b'a'; 1024]);
    assert!(header.encode().unwrap_err().to_string().contains("name of the backing file takes 1024"));
}

/// An image cut off anywhere in its tables is an error that says so, never a panic.
#[test]
fn a_snapshot_table_that_is_cut_off_is_told() {
    let scratch = Scratch::new();
    let image = scratch.path("image");
    qemu_img(&["create", "-q", "-f", "qcow2", &image, "1M"]);
    for name in ["one", "two", "three"] {
        qemu_img(&["snapshot", "-c", name, &image]);
    }
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let header = Header::read(&file).unwrap();
    let (_, length) = read_snapshots(&header, &file).unwrap();
    file.set_len(header.snapshots_offset + length as u64 - 9).unwrap();
    let error = read_snapshots(&header, &file).unwrap_err().to_string();
    assert!(error.contains("truncated: the snapshot table"), "{error}");
    // An entry that says that its L1 table is smaller than its disk.
    file.set_len(header.snapshots_offset + length as u64).unwrap();
    file.write_all_at(&0u32.to_be_bytes(), header.snapshots_offset + 8).unwrap();
    let snapshots = read_snapshots(&header, &file).unwrap().0;
    let error = snapshots[0].validate(&header).unwrap_err().to_string();
    assert!(error.contains("l1_size of snapshot \"1\" is 0"), "{error}");
    assert!(snapshots[1].validate(&header).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// What is written is what is read.
    #[test]
    fn headers_read_as_they_were_written(
        v3: bool, bits in 9u32..=16, size in 0u64..1 << 24, lazy: bool, order in 0u32..=6,
        l1 in 0u64..1 << 20, data in prop::collection::vec(any::<u8>(), 0..60), kind in 1u32..1000,
        backing in prop::option::of(prop::collection::vec(1u8.., 1..100)), bitmaps: bool, extra in 0usize..4,
    ) {
        let bitmaps_extension = BitmapsExtension { count: 1, directory_size: 64, directory_offset: 5 << bits };
        let header = Header {
            version: if v3 { 3 } else { 2 },
            cluster_bits: bits,
            size,
            l1_entries: 1 << 14,
            l1_offset: l1 << bits,
            compatible: u64::from(v3 && lazy),
            refcount_width: if v3 { RefcountWidth::from_order(order).unwrap() } else { RefcountWidth::V2 },
            unknown: if v3 && extra > 0 { vec![0; extra * 8 - 1] } else { Vec::new() },
            length: if v3 { 104 + 8 * u32::try_from(extra).unwrap() } else { 72 },
            extensions: [Extension::Unknown { kind, data }]
                .into_iter()
                .chain(bitmaps.then_some(Extension::Bitmaps(bitmaps_extension)))
                .collect(),
            backing,
            ..small()
        };
        let bytes = header.encode().unwrap();
        prop_assert_eq!(Header::parse(&bytes).unwrap(), header);
    }

    /// Bytes of a good header changed at random are read or refused.
    #[test]
    fn no_header_panics(changes in prop::collection::vec((0usize..400, any::<u8>()), 1..12)) {
        let mut header = small();
        header.snapshots = 3;
        header.extensions.push(vbd_qcow2::format::feature_table());
        let mut bytes = header.encode().unwrap();
        bytes.resize(4096, 0);
        for (at, value) in changes {
            bytes[at] = value;
        }
        vbd_qcow2::format::fuzz::structures(&bytes);
    }
}

#[test]
fn what_the_fuzzer_keeps_is_answered() {
    vbd_testing::corpus::replay("qcow2_structures", vbd_qcow2::format::fuzz::structures);
}
