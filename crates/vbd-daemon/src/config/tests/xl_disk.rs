use proptest::prelude::*;

use crate::config::xl_disk::{BackendType, DiskFormat, DiskSpec, Places, parse};
use crate::config::{Access, Vdev};

/// A disk of nothing but a target and a device.
fn plain(target: &str, vdev: &str) -> DiskSpec {
    DiskSpec {
        target: target.to_owned(),
        format: None,
        vdev: vdev.parse().unwrap(),
        access: None,
        cdrom: false,
        discard: None,
        direct_io_safe: false,
        backend: None,
        backend_type: None,
        script: None,
        other: Vec::new(),
        places: Places::default(),
    }
}

fn read(spec: &str) -> DiskSpec {
    let disk = parse(spec).unwrap_or_else(|e| panic!("{spec}: {e} at {}", e.offset));
    DiskSpec { places: Places::default(), ..disk }
}

/// What a disk comes to once the defaults are filled in.
fn meaning(spec: &str) -> (String, DiskFormat, String, Access, bool) {
    let disk = read(spec);
    (disk.path().display().to_string(), disk.format(), disk.vdev.to_string(), disk.access(), disk.cdrom)
}

#[test]
fn forms_of_one_writable_disk() {
    let volume = ("/dev/vg/guest".to_owned(), DiskFormat::Raw, "hda".to_owned(), Access::ReadWrite, false);
    for spec in [
        "/dev/vg/guest,,hda",
        "/dev/vg/guest,raw,hda,rw",
        "/dev/vg/guest,raw,hda,w",
        "/dev/vg/guest,raw,hda,",
        "/dev/vg/guest,raw,hda",
        "/dev/vg/guest, raw, hda, w",
        " /dev/vg/guest,\traw ,hda ,w ",
        "/dev/vg/guest,raw,vdev=hda,access=rw",
        "vdev=hda,/dev/vg/guest",
        "vdev=hda,/dev/vg/guest,raw,w",
        "format=raw, vdev=hda, access=rw, target=/dev/vg/guest",
        "format=,access=,vdev=hda,target=/dev/vg/guest",
        "vdev=hda,devtype=disk,target=/dev/vg/guest,",
        ",,hda,target=/dev/vg/guest",
        "raw:/dev/vg/guest,hda,w",
        "phy:/dev/vg/guest,hda,w",
        "phy:vg/guest,hda,w",
        "vg/guest,,hda",
        "file:/dev/vg/guest,hda,w",
        "tap:/dev/vg/guest,hda,w",
        "tap:aio:/dev/vg/guest,hda,w",
        "tap2:aio:/dev/vg/guest,hda,w",
        "tap2:tapdisk:aio:/dev/vg/guest,hda,w",
        "tap:raw:/dev/vg/guest,hda,w",
        "file:/dev/vg/guest,ioemu:hda,w",
        "file:/dev/vg/guest,/dev/hda,w",
        "file:/dev/vg/guest,hda:disk,w",
    ] {
        assert_eq!(meaning(spec), volume, "{spec}");
    }
}

#[test]
fn forms_of_one_cd_drive() {
    let image = ("/root/image.iso".to_owned(), DiskFormat::Raw, "hdc".to_owned(), Access::ReadOnly, true);
    for spec in [
        "/root/image.iso,,hdc,cdrom",
        "/root/image.iso,,hdc,,cdrom",
        "/root/image.iso,raw,hdc,devtype=cdrom",
        "cdrom,/root/image.iso,raw,hdc,w",
        "/root/image.iso,raw,hdc:cdrom,r",
        "format=raw, vdev=hdc, access=ro, devtype=cdrom, target=/root/image.iso",
        "raw:/root/image.iso,hdc:cdrom,ro",
        "file:/root/image.iso,hdc:cdrom,r",
        "file: /root/image.iso,ioemu:hdc:cdrom,r",
    ] {
        assert_eq!(meaning(spec), image, "{spec}");
        assert!(!read(spec).is_empty(), "{spec}");
    }
}

#[test]
fn forms_of_an_empty_drive() {
    for spec in [
        ",hdc:cdrom,r",
        ",,hdc,cdrom",
        ",raw,hdc,ro,cdrom",
        ",empty,hdc,r,cdrom",
        "none,raw,hdc,ro,cdrom",
        "vdev=hdc,cdrom",
        "vdev=hdc,access=r,devtype=cdrom,target=",
    ] {
        let disk = read(spec);
        assert!(disk.is_empty(), "{spec}");
        assert_eq!(
            (disk.vdev.to_string().as_str(), disk.access(), disk.cdrom),
            ("hdc", Access::ReadOnly, true)
        );
    }
}

#[test]
fn access() {
    for (word, access) in [
        ("r", Access::ReadOnly),
        ("ro", Access::ReadOnly),
        ("w", Access::ReadWrite),
        ("rw", Access::ReadWrite),
        ("", Access::ReadWrite),
        ("w!", Access::ReadWriteForce),
    ] {
        assert_eq!(read(&format!("/a,raw,xvda,{word}")).access(), access, "{word}");
        assert_eq!(read(&format!("file:/a,xvda,{word}")).access(), access, "{word}");
        assert_eq!(read(&format!("access={word},/a,raw,xvda")).access(), access, "{word}");
    }
}

#[test]
fn formats_are_told_by_name_or_prefix() {
    for (format, name) in [(DiskFormat::Qcow, "qcow"), (DiskFormat::Qcow2, "qcow2"), (DiskFormat::Vhd, "vhd")]
    {
        for spec in [
            format!("/a,{name},xvda,w"),
            format!("{name}:/a,xvda,w"),
            format!("tap:{name}:/a,xvda,w"),
            format!("vdev=xvda,format={name},target=/a"),
        ] {
            assert_eq!(read(&spec).format(), format, "{spec}");
        }
    }
    assert_eq!(read("/a,qed,xvda").format(), DiskFormat::Qed);
}

#[test]
fn target_takes_the_rest() {
    assert_eq!(read("vdev=xvda,target=/a,b=c,cdrom ,x").target, "/a,b=c,cdrom ,x");
    assert_eq!(read("vdev=xvda,target=/a ").target, "/a ");
    assert_eq!(
        read("vdev=xvda,target=file:/a").path().to_str(),
        Some("/dev/file:/a"),
        "prefixes are for positions"
    );
    assert_eq!(read("vdev=xvda,target=/a,").target, "/a", "one comma at the end is none of it");
}

#[test]
fn flags_and_keys() {
    let disk = read("/a,raw,xvda,w,no-discard,direct-io-safe,backend=stor,backendtype=qdisk");
    let expected = DiskSpec {
        format: Some(DiskFormat::Raw),
        access: Some(Access::ReadWrite),
        discard: Some(false),
        direct_io_safe: true,
        backend: Some("stor".into()),
        backend_type: Some(BackendType::Qdisk),
        ..plain("/a", "xvda")
    };
    assert_eq!(disk, expected);
    assert_eq!(read("discard,/a,,xvda").discard, Some(true));
    let colo = "/a,raw,xvda,w,colo,colo-host=h,colo-port=9,colo-export=x,active-disk=/b,hidden-disk=/c";
    assert_eq!(read(colo).other.join(","), &colo["/a,raw,xvda,w,".len()..]);
    assert_eq!(read("/a,,xvda,untrusted,specification=virtio").other, ["untrusted", "specification=virtio"]);
}

#[test]
fn scripts() {
    assert_eq!(read("iscsi:iqn.2001-04.x:y,xvda,w").script.as_deref(), Some("block-iscsi"));
    for prefix in ["nbd", "enbd", "drbd"] {
        assert_eq!(read(&format!("{prefix}:host,xvda,w")).script, Some(format!("block-{prefix}")));
    }
    assert_eq!(read("vdev=xvda,script=block-rbd,target=pool/image").script.as_deref(), Some("block-rbd"));
}

#[test]
fn mistakes_have_a_place_and_a_remedy() {
    for (spec, offset, message) in [
        ("", 0, "no virtual device: say what the guest sees, for example `vdev=xvda`"),
        ("/a", 2, "no virtual device: say what the guest sees, for example `vdev=xvda`"),
        ("/a,raw,,w", 9, "no virtual device: say what the guest sees, for example `vdev=xvda`"),
        (
            "/a,xvda,w",
            3,
            "`xvda` stands where the format belongs: write `TARGET,raw,xvda,...` or leave the format empty, `TARGET,,xvda,...`",
        ),
        ("/a,vmdk,xvda", 3, "unknown format `vmdk`: it is `raw`, `qcow`, `qcow2`, `vhd` or `qed`"),
        ("format=vmdk,/a,xvda", 7, "unknown format `vmdk`: it is `raw`, `qcow`, `qcow2`, `vhd` or `qed`"),
        ("file:/a,floppy,w", 8, "`floppy` names no virtual device: write `xvda`, `sda1`, `hdc` or the like"),
        ("file:/a,xvda,x", 13, "unknown access `x`: it is `r`, `w`, or `w!` for a disk with several writers"),
        (
            "/a,raw,xvda,w,x",
            14,
            "`x` is one value too many: a disk is `TARGET,FORMAT,VDEV,ACCESS`, then flags and `key=value`",
        ),
        ("/a,raw,hdc:floppy", 11, "unknown device type `floppy`: it is `cdrom` or `disk`"),
        ("/a,raw,vdev=hdc:cdrom", 12, "write `vdev=hdc,devtype=cdrom` for `vdev=hdc:cdrom`"),
        ("vdev=xvda,vdev=xvdb,target=/a", 15, "`vdev` is given twice: keep one of the two"),
        ("/a,raw,xvda,target=/b", 19, "`target` is given twice: keep one of the two"),
        ("qcow2:/a,xvda,format=raw", 21, "`format` is given twice: keep one of the two"),
        (
            "/a,raw,xvda,bogus=1",
            12,
            "unknown key `bogus`: known are target, format, vdev, access, devtype, backend, backendtype and script",
        ),
        (
            "/a=b,raw,xvda",
            0,
            "a target with `=` in it is written last and by name: `vdev=xvda,target=/the/path`",
        ),
        ("/a,raw,xvda,devtype=tape", 20, "unknown devtype `tape`: it is `cdrom` or `disk`"),
        (
            "/a,raw,xvda,backendtype=x",
            24,
            "unknown backendtype `x`: it is `phy`, `tap`, `qdisk` or `standalone`",
        ),
        (
            "vmdk:/a,xvda,w",
            0,
            "unknown prefix `vmdk:`: leave it out, or write the path as the last thing, `target=vmdk:/a,xvda,w`",
        ),
        (
            "vdev=xvda,target=",
            17,
            "no target: name an image or a device, or make it an empty drive with `cdrom`",
        ),
        (",raw,xvda,w", 0, "no target: name an image or a device, or make it an empty drive with `cdrom`"),
        ("vdev=xvda,target=a\0b", 17, "the target has a NUL character in it, which no path can have"),
    ] {
        let error = parse(spec).expect_err(spec);
        assert_eq!((error.offset, error.message.as_str()), (offset, message), "{spec:?}");
    }
}

fn any_disk() -> impl Strategy<Value = DiskSpec> {
    let format = proptest::option::of(prop_oneof![
        Just(DiskFormat::Raw),
        Just(DiskFormat::Qcow),
        Just(DiskFormat::Qcow2),
        Just(DiskFormat::Vhd),
        Just(DiskFormat::Qed),
    ]);
    let access = proptest::option::of(prop_oneof![
        Just(Access::ReadOnly),
        Just(Access::ReadWrite),
        Just(Access::ReadWriteForce),
    ]);
    let word = || proptest::option::of("[a-zA-Z0-9/_-]{1,9}");
    let backend_type = proptest::option::of(prop_oneof![
        Just(BackendType::Phy),
        Just(BackendType::Tap),
        Just(BackendType::Qdisk),
        Just(BackendType::Standalone),
    ]);
    let told = (proptest::option::of(any::<bool>()), any::<bool>(), word(), backend_type, word());
    (".{1,20}", 0u32..1 << 20, 0u32..256, format, access, any::<bool>(), told)
        .prop_filter("no path has a NUL", |(target, ..)| !target.contains('\0'))
        .prop_map(|(target, disk, partition, format, access, cdrom, told)| {
            let vdev: Vdev = format!("d{disk}p{partition}").parse().unwrap();
            let (discard, direct_io_safe, backend, backend_type, script) = told;
            let other = vec!["colo".to_owned(), "colo-port=9".to_owned()];
            DiskSpec {
                format,
                access,
                cdrom,
                discard,
                direct_io_safe,
                backend,
                backend_type,
                script,
                other,
                ..plain(&target, &vdev.to_string())
            }
        })
}

proptest! {
    #[test]
    fn any_text_is_answered(spec in ".{0,60}") {
        let _ = parse(&spec);
    }

    #[test]
    fn texts_made_of_its_words_are_answered(
        words in proptest::collection::vec(prop_oneof![
            Just("file:"), Just("tap:"), Just("raw:"), Just("nbd:"), Just("/a"), Just(","), Just("raw"), Just("xvda"),
            Just("hdc:cdrom"), Just("w!"), Just("="), Just("target="), Just("format="), Just("vdev="), Just("access="),
            Just("cdrom"), Just(" "), Just(":"), Just("script="), Just("ä"),
        ], 0..12),
    ) {
        let spec = words.concat();
        match parse(&spec) {
            // An error points into the text, at the start of a character.
            Err(error) => prop_assert!(spec.is_char_boundary(error.offset), "{} in {spec:?}", error.offset),
            Ok(disk) => {
                let again = DiskSpec { places: disk.places, ..parse(&disk.to_string()).unwrap() };
                prop_assert_eq!(again, disk);
            }
        }
    }

    #[test]
    fn a_printed_disk_reads_back(disk in any_disk()) {
        prop_assert_eq!(read(&disk.to_string()), disk);
    }
}
