//! Whole disks: what is in their partitions, and what no disk can be.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use vbd_fs::{Boot, BuildOptions, DiskSpec, Error, Filesystem, ImageSize, Spare, TableKind};
use vbd_image::partition::{self, Format, Kind, Partition, Table, kind};

use super::image;
use super::setting::{MIB, Scratch, as_ordinary_user, build, options};

/// A system as far as a disk is concerned: kernels, a loader, a name.
fn tree(scratch: &Scratch) -> PathBuf {
    let root = scratch.path("tree");
    for directory in ["boot", "usr/lib/systemd/boot/efi", "etc", "home"] {
        std::fs::create_dir_all(root.join(directory)).unwrap();
    }
    let write = |path: &str, text: &str| std::fs::write(root.join(path), text).unwrap();
    write("boot/vmlinuz-6.1.0-9-amd64", "old kernel");
    write("boot/vmlinuz-6.1.0-32-amd64", &"new kernel ".repeat(500_000));
    write("boot/initrd.img-6.1.0-32-amd64", "new initrd");
    write("usr/lib/systemd/boot/efi/systemd-bootx64.efi", "loader");
    write("usr/lib/os-release", "ID=test\nPRETTY_NAME=\"Test System 1\"\n");
    root
}

fn disk(from: &Path, spec: DiskSpec) -> BuildOptions {
    let mut options = options(128 * MIB, from);
    options.spec.disk = Some(DiskSpec { architecture: Some(vbd_fs::Architecture::X86_64), ..spec });
    options
}

fn gpt() -> DiskSpec {
    DiskSpec { esp: Some("40M".parse().unwrap()), ..DiskSpec::new(TableKind::Gpt) }
}

fn table(path: &Path) -> Table {
    let file = File::open(path).unwrap();
    let size = file.metadata().unwrap().len();
    partition::read(&file, size).unwrap().unwrap()
}

/// A partition's bytes in a file of their own.
fn cut(scratch: &Scratch, image: &Path, partition: &Partition, name: &str) -> PathBuf {
    let mut bytes = vec![0; usize::try_from(partition.size).unwrap()];
    File::open(image).unwrap().read_exact_at(&mut bytes, partition.start).unwrap();
    let path = scratch.path(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn program(name: &str, arguments: &[&str], path: &Path) -> Vec<u8> {
    let mut command = Command::new(name);
    command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").env("LC_ALL", "C").args(&arguments[..1]).arg(path);
    let output = command.args(&arguments[1..]).output().unwrap_or_else(|e| panic!("{name}: {e}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {}{said}", String::from_utf8_lossy(&output.stdout));
    output.stdout
}

/// A file of a FAT.
fn fat_file(fat: &Path, path: &str) -> String {
    String::from_utf8(program("mtype", &["-i", &format!("::{path}")], fat)).unwrap()
}

#[test]
fn a_disk_that_starts_by_itself() {
    let scratch = Scratch::new();
    let image = scratch.path("image");
    let mut options = disk(&tree(&scratch), DiskSpec { swap: Some("1M".parse().unwrap()), ..gpt() });
    options.spec.disk.as_mut().unwrap().kernel_options = vec!["quiet".to_owned()];
    let report = build(&image, &options).unwrap();
    assert_eq!(report.warnings, [""; 0]);
    program("sfdisk", &["--verify"], &image);

    let table = table(&image);
    assert_eq!(table.problems, [""; 0]);
    let [esp, swap, root] = table.partitions.as_slice() else { panic!("{table:?}") };
    assert_eq!([esp.kind, swap.kind, root.kind], [kind::ESP, kind::SWAP, kind::ROOT_X86_64].map(Kind::Gpt));
    assert_eq!([esp.start, esp.size, swap.size], [MIB, 40 * MIB, MIB]);
    assert_eq!(root.end(), 127 * MIB);
    let id = |partition: &Partition| partition.uuid.unwrap().to_string();
    assert_eq!(report.partitions[2].partuuid.as_deref(), Some(id(root).as_str()));

    let fat = cut(&scratch, &image, esp, "esp");
    program("fsck.vfat", &["-n"], &fat);
    assert_eq!(fat_file(&fat, "EFI/BOOT/BOOTX64.EFI"), "loader");
    let entry = fat_file(&fat, "loader/entries/vbd-6.1.0-32-amd64.conf");
    assert_eq!(
        entry,
        format!(
            "title Test System 1\nversion 6.1.0-32-amd64\nsort-key vbd\nlinux /vbd/6.1.0-32-amd64/linux\n\
             initrd /vbd/6.1.0-32-amd64/initrd.img-6.1.0-32-amd64\noptions root=PARTUUID={} ro quiet\n",
            id(root)
        )
    );
    assert_eq!(fat_file(&fat, "vbd/6.1.0-32-amd64/linux"), "new kernel ".repeat(500_000));
    assert!(!fat_file(&fat, "loader/entries/vbd-6.1.0-9-amd64.conf").contains("initrd"));

    let filesystem = cut(&scratch, &image, root, "root");
    image::check(&filesystem);
    let fstab = image::cat(&filesystem, "/etc/fstab");
    for line in [
        format!("PARTUUID={}\t/\text4\terrors=remount-ro\t0\t1", id(root)),
        format!("PARTUUID={}\t/boot/efi\tvfat\tumask=0077,nofail\t0\t0", id(esp)),
        format!("PARTUUID={}\tnone\tswap\tsw\t0\t0", id(swap)),
    ] {
        assert!(fstab.lines().any(|found| found == line), "{line}: {fstab}");
    }
    assert!(image::has(&filesystem, "/boot/efi"));
    assert_eq!(image::cat(&filesystem, "/etc/kernel/entry-token"), "vbd\n");
    assert_eq!(
        image::cat(&filesystem, "/etc/kernel/cmdline"),
        format!("root=PARTUUID={} ro quiet\n", id(root))
    );

    let space = cut(&scratch, &image, swap, "swap");
    let told = String::from_utf8(program("blkid", &["-p", "-o", "export"], &space)).unwrap_or_default();
    assert!(
        told.contains("TYPE=swap\n") && told.contains(report.partitions[1].uuid.as_deref().unwrap()),
        "{told}"
    );
    assert_eq!(
        scratch.names().iter().filter(|name| name.starts_with('.')).count(),
        0,
        "nothing is left behind"
    );
}

#[test]
fn an_ordinary_user_makes_one() {
    as_ordinary_user("disk::an_ordinary_user_makes_one", || {
        let scratch = Scratch::new();
        let image = scratch.path("image");
        build(&image, &disk(&tree(&scratch), gpt())).unwrap();
        let table = table(&image);
        image::check(&cut(&scratch, &image, &table.partitions[1], "root"));
    });
}

#[test]
fn more_filesystems_and_the_old_table() {
    let scratch = Scratch::new();
    let (image, from) = (scratch.path("image"), tree(&scratch));
    let (home, shared) = (scratch.path("home"), scratch.path("shared"));
    std::fs::create_dir_all(home.join("ada")).unwrap();
    std::fs::create_dir_all(shared.join("a directory")).unwrap();
    std::fs::write(home.join("ada/file"), "of ada").unwrap();
    std::fs::write(shared.join("a directory/Ein langer Name.txt"), "on a FAT").unwrap();
    let mut spec = DiskSpec::from_toml(
        "table = \"mbr\"\nboot = \"none\"\nuuid = \"DEADBEEF\"\n\
         [[partition]]\nsize = \"16M\"\nfrom = \"home\"\nmount = \"/home\"\noptions = \"noatime\"\nlabel = \"home\"\n\
         [[partition]]\nsize = \"8M\"\nfilesystem = \"vfat\"\nfrom = \"shared\"\nmount = \"/mnt/shared\"\nlabel = \"shared\"\n",
    )
    .unwrap();
    spec.begin_paths_at(home.parent().unwrap());
    let mut options = disk(&from, spec);
    options.tailor.fstab = vec!["/dev/xvda9:/:ext4:discard".parse().unwrap()];
    let report = build(&image, &options).unwrap();

    let table = table(&image);
    assert_eq!(table.format, Format::Mbr(0xDEAD_BEEF));
    let kinds: Vec<_> = table.partitions.iter().map(|p| (p.kind, p.attributes)).collect();
    let boot = partition::BOOTABLE;
    assert_eq!(kinds, [(Kind::Mbr(0x83), 0), (Kind::Mbr(0x0C), 0), (Kind::Mbr(0x83), boot)]);
    let first = cut(&scratch, &image, &table.partitions[0], "first");
    image::check(&first);
    assert_eq!(image::cat(&first, "/ada/file"), "of ada");
    let fat = cut(&scratch, &image, &table.partitions[1], "fat");
    program("fsck.vfat", &["-n"], &fat);
    assert_eq!(fat_file(&fat, "a directory/Ein langer Name.txt"), "on a FAT");
    let root = cut(&scratch, &image, &table.partitions[2], "root");
    image::check(&root);
    let fstab = image::cat(&root, "/etc/fstab");
    // What was asked for by hand is the only line for its mount point.
    let lines: Vec<_> = fstab.lines().skip(1).collect();
    assert_eq!(
        lines,
        [
            "PARTUUID=deadbeef-01\t/home\text4\tnoatime\t0\t2",
            "PARTUUID=deadbeef-02\t/mnt/shared\tvfat\tdefaults\t0\t0",
            "/dev/xvda9\t/\text4\tdiscard\t0\t1",
        ]
    );
    assert!(image::has(&root, "/mnt/shared") && !image::has(&root, "/boot/efi"));
    assert_eq!(report.partitions[2].partuuid.as_deref(), Some("deadbeef-03"));
}

#[test]
fn a_fat_is_filled_from_an_archive() {
    let scratch = Scratch::new();
    let (image, from, tree_of) = (scratch.path("image"), tree(&scratch), scratch.path("shared"));
    std::fs::create_dir_all(tree_of.join("a directory/empty")).unwrap();
    std::fs::write(tree_of.join("a directory/Ein langer Name.txt"), "on a FAT").unwrap();
    let sparse = std::fs::File::create(tree_of.join("sparse")).unwrap();
    sparse.set_len(2 * MIB).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"in the middle", MIB).unwrap();
    let pack = |name: &str| {
        let arguments = ["--sparse", "--format=pax", "-cf"];
        let mut tar = std::process::Command::new("tar");
        tar.args(arguments).arg(scratch.path(name)).arg("-C").arg(&tree_of).arg(".");
        assert!(tar.status().unwrap().success());
    };
    let built = |archive: &str| {
        let mut spec = DiskSpec::from_toml(&format!(
            "table = \"gpt\"\nboot = \"none\"\n\
             [[partition]]\nsize = \"8M\"\nfilesystem = \"vfat\"\nfrom = \"{archive}\"\nmount = \"/mnt/shared\"\n"
        ))
        .unwrap();
        spec.begin_paths_at(tree_of.parent().unwrap());
        build(&image, &disk(&from, spec))
    };
    pack("shared.tar");
    built("shared.tar").unwrap();
    let fat = cut(&scratch, &image, &table(&image).partitions[0], "fat");
    program("fsck.vfat", &["-n"], &fat);
    assert_eq!(fat_file(&fat, "a directory/Ein langer Name.txt"), "on a FAT");
    let mut wanted = vec![0; 2 << 20];
    wanted[1 << 20..][..13].copy_from_slice(b"in the middle");
    assert!(fat_file(&fat, "sparse").into_bytes() == wanted);
    std::fs::remove_file(&image).unwrap();

    // What a FAT cannot hold is told by its name, and nothing is left.
    std::fs::hard_link(tree_of.join("sparse"), tree_of.join("same")).unwrap();
    pack("links.tar");
    let error = built("links.tar").unwrap_err().to_string();
    assert!(error.contains("links.tar") && error.contains("--hard-dereference"), "{error}");
    std::fs::remove_file(tree_of.join("same")).unwrap();
    std::os::unix::fs::symlink("sparse", tree_of.join("link")).unwrap();
    pack("links.tar");
    let error = built("links.tar").unwrap_err().to_string();
    assert!(error.contains("entry \"link\"") && error.contains("neither a file"), "{error}");
    assert!(!image.exists());
}

#[test]
fn names_follow_from_the_request() {
    let scratch = Scratch::new();
    let from = tree(&scratch);
    let made = |name: &str, change: fn(&mut BuildOptions)| {
        let mut options = disk(&from, gpt());
        change(&mut options);
        let image = scratch.path(name);
        build(&image, &options).unwrap();
        table(&image)
    };
    let first = made("a", |_| {});
    assert_eq!(first, made("b", |_| {}));
    let other = made("c", |options| options.tailor.hostname = Some("other".to_owned()));
    assert_ne!(first.format, other.format);
    assert_ne!(first.partitions[1].uuid, other.partitions[1].uuid);
    let given = "01234567-89ab-4def-8123-456789abcdef";
    let mut options =
        disk(&from, DiskSpec { uuid: Some(given.to_owned()), root_uuid: given.parse().ok(), ..gpt() });
    options.spec.uuid = Some(given.to_owned());
    let report = build(&scratch.path("d"), &options).unwrap();
    assert_eq!(table(&scratch.path("d")).format, Format::Gpt(given.parse().unwrap()));
    assert_eq!((report.uuid.as_str(), report.partitions[1].partuuid.as_deref()), (given, Some(given)));
}

#[test]
fn a_size_that_follows_from_the_content() {
    let scratch = Scratch::new();
    let (image, from) = (scratch.path("image"), tree(&scratch));
    let mut options = disk(&from, gpt());
    options.size = ImageSize::Auto { spare: Spare::Bytes(8 * MIB), minimum: None, maximum: None };
    let report = build(&image, &options).unwrap();
    let table = table(&image);
    assert_eq!(table.problems, [""; 0]);
    let root = &table.partitions[1];
    assert_eq!((report.size, root.start, root.end()), (root.end() + MIB, 41 * MIB, report.size - MIB));
    assert!(report.size < 100 * MIB && report.free_bytes >= 8 * MIB, "{report:?}");
    image::check(&cut(&scratch, &image, root, "root"));

    options.size = ImageSize::Auto { spare: Spare::Bytes(0), minimum: Some(200 * MIB), maximum: None };
    options.force = true;
    assert_eq!(build(&image, &options).unwrap().size, 200 * MIB);
    options.size = ImageSize::Auto { spare: Spare::Bytes(0), minimum: None, maximum: Some(41 * MIB) };
    assert!(matches!(build(&image, &options), Err(Error::Invalid(_))));
}

#[test]
fn a_root_of_another_kind() {
    let scratch = Scratch::new();
    let (image, from) = (scratch.path("image"), tree(&scratch));
    let mut options = disk(&from, gpt());
    options.spec.filesystem = Filesystem::Ext3;
    build(&image, &options).unwrap();
    let table = table(&image);
    let fat = cut(&scratch, &image, &table.partitions[0], "esp");
    assert_eq!(fat_file(&fat, "EFI/BOOT/BOOTX64.EFI"), "loader");
    let root = cut(&scratch, &image, &table.partitions[1], "root");
    image::check(&root);
    assert!(image::cat(&root, "/etc/fstab").contains("\t/\text3\t"));
}

#[test]
fn the_same_request_gives_the_same_bytes() {
    let scratch = Scratch::new();
    let from = tree(&scratch);
    let made = |name: &str| {
        let mut options = disk(&from, DiskSpec { swap: Some("1M".parse().unwrap()), ..gpt() });
        options.time = Some(vbd_fs::Time { seconds: 1_700_000_000, nanoseconds: 0 });
        let image = scratch.path(name);
        build(&image, &options).unwrap();
        std::fs::read(image).unwrap()
    };
    assert!(made("a") == made("b"));
}

#[test]
fn a_unified_kernel_image_needs_no_loader() {
    let scratch = Scratch::new();
    let (image, from) = (scratch.path("image"), tree(&scratch));
    std::fs::remove_dir_all(from.join("usr/lib/systemd")).unwrap();
    std::fs::create_dir_all(from.join("efi/EFI/Linux")).unwrap();
    std::fs::write(from.join("efi/EFI/Linux/system-2.efi"), "unified 2").unwrap();
    std::fs::write(from.join("efi/EFI/Linux/system-10.efi"), "unified 10").unwrap();
    build(&image, &disk(&from, DiskSpec { boot: Some(Boot::Uefi), ..gpt() })).unwrap();
    let fat = cut(&scratch, &image, &table(&image).partitions[0], "esp");
    assert_eq!(fat_file(&fat, "EFI/BOOT/BOOTX64.EFI"), "unified 10");
    assert_eq!(fat_file(&fat, "EFI/Linux/system-2.efi"), "unified 2");
}

#[test]
fn xen_gets_a_grub_cfg() {
    let scratch = Scratch::new();
    let (image, from) = (scratch.path("image"), tree(&scratch));
    build(&image, &disk(&from, DiskSpec { boot: Some(Boot::Xen), esp: None, ..gpt() })).unwrap();
    let table = table(&image);
    let [root] = table.partitions.as_slice() else { panic!("no EFI system partition: {table:?}") };
    let text = image::cat(&cut(&scratch, &image, root, "root"), "/boot/grub/grub.cfg");
    let wanted = format!(
        "menuentry 'Linux 6.1.0-32-amd64' {{\n\tlinux /boot/vmlinuz-6.1.0-32-amd64 root=PARTUUID={} ro console=hvc0\n\
         \tinitrd /boot/initrd.img-6.1.0-32-amd64\n}}\n",
        root.uuid.unwrap()
    );
    assert!(text.contains(&wanted), "{text}");
}

#[test]
fn what_no_disk_can_be() {
    let scratch = Scratch::new();
    let (image, from) = (scratch.path("image"), tree(&scratch));
    let refused = |spec: DiskSpec, why: &str| {
        let error = build(&image, &disk(&from, spec)).unwrap_err();
        assert!(error.to_string().contains(why), "{why}: {error}");
        error
    };
    let invalid = |spec: DiskSpec, why: &str| assert!(matches!(refused(spec, why), Error::Invalid(_)));
    invalid(
        DiskSpec { esp: Some("1G".parse().unwrap()), ..gpt() },
        "is too small: the table and the other partitions take 1 GiB",
    );
    invalid(DiskSpec { esp: Some("1M".parse().unwrap()), ..gpt() }, "too few for the EFI system partition");
    invalid(DiskSpec { sector_size: Some(1024), ..gpt() }, "sectors of 1024");
    invalid(DiskSpec { uuid: Some("x".to_owned()), ..gpt() }, "is no UUID");
    invalid(DiskSpec { kernel_options: vec!["a b".to_owned()], ..gpt() }, "words one by one");
    invalid(DiskSpec { root_uuid: Some(kind::ESP), ..DiskSpec::new(TableKind::Mbr) }, "no UUID of their own");
    // The kernels take more than is there.
    refused(DiskSpec { esp: Some("4M".parse().unwrap()), ..gpt() }, "has no room for");

    std::fs::remove_dir_all(from.join("usr/lib/systemd")).unwrap();
    refused(gpt(), "add the package systemd-boot-efi");
    build(&image, &disk(&from, DiskSpec { boot: Some(Boot::None), ..gpt() })).unwrap();
    std::fs::remove_file(&image).unwrap();

    std::fs::remove_dir_all(from.join("boot")).unwrap();
    refused(DiskSpec { boot: Some(Boot::Uefi), ..gpt() }, "no kernel in /boot");
    refused(DiskSpec { boot: Some(Boot::Xen), ..gpt() }, "no kernel (vmlinuz-VERSION) in /boot");
    let report = build(&image, &disk(&from, gpt())).unwrap();
    assert_eq!(report.warnings, ["the tree has no kernel in /boot: the disk does not start by itself"]);
    assert_eq!(scratch.names(), ["image", "tree"], "nothing is left behind");
}
