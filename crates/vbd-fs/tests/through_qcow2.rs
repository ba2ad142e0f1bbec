//! The power goes while a filesystem in a qcow2 image is changed: the image has no error, and in it is the old filesystem
//! or the new one.
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small")]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use vbd_core::{Client, Disk as _};
use vbd_ext4::edit::{Attributes, Editor, New, Timestamp};
use vbd_ext4::format::ino::ROOT;
use vbd_ext4::read::{Filesystem, Links, Options, Padded};
use vbd_fs::Cancel;
use vbd_fs::inside::archive::archive;
use vbd_fs::upkeep::{Disk, Opened};
use vbd_image::raw::{Raw, RawOptions};
use vbd_qcow2::{Qcow2, Qcow2Options};
use vbd_ring::{Reactor, Settings};
use vbd_testing::power::{Cut, FileRecorder, Recording};
use vbd_testing::qcow2::Image;
use vbd_testing::qemu::{img, text};
use vbd_testing::{Random, seeds};

const SIZE: usize = 8 << 20;
const NOW: Timestamp = Timestamp { seconds: 1_700_000_000, nanoseconds: 5 };

/// What the reactor of a client is kept by.
struct Held {
    client: Client,
    _reactor: Reactor,
}

impl std::ops::Deref for Held {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

fn opened(image: &Path, below: Option<&Path>, faults: Arc<FileRecorder>) -> Disk {
    let mut options = Qcow2Options::new(image);
    options.faults = Some(faults);
    options.backing = below.map(|below| {
        let disk: Arc<dyn vbd_core::Disk> =
            Raw::new(RawOptions { read_only: true, ..RawOptions::new(below) });
        disk
    });
    let reactor = Reactor::spawn("test", Settings::default()).unwrap();
    let client = Client::new(&reactor.handle(), Qcow2::new(options).open().unwrap()).unwrap();
    Disk::of(Arc::new(Opened::new(Held { client, _reactor: reactor }, image)), image).unwrap()
}

/// Everything in a filesystem.
fn content(bytes: Vec<u8>) -> Result<Vec<u8>, String> {
    let failed = |error: vbd_ext4::read::Error| error.to_string();
    let filesystem = Filesystem::open(Padded::new(bytes, 0), Options::default()).map_err(failed)?;
    let root = filesystem.lookup(b"/", Links::Follow).map_err(failed)?;
    let mut out = Vec::new();
    archive(&filesystem, root, b"root", &mut out, &Cancel::never(), &mut |_| {})
        .map_err(|error| error.to_string())?;
    Ok(out)
}

fn attributes(mode: u16) -> Attributes {
    Attributes { mode, uid: 0, gid: 0, atime: NOW, ctime: NOW, mtime: NOW, crtime: NOW }
}

/// A change of every kind: content replaced, files that come and go.
fn change(editor: &mut Editor) {
    let old = editor.locate(b"/old").unwrap().found.unwrap();
    editor.set_content(old, &mut &[b'n'; 150_000][..]).unwrap();
    editor.remove(ROOT, b"gone").unwrap();
    let directory = editor.create(ROOT, b"new", New::Directory, &attributes(0o755), &[]).unwrap();
    for number in 0..30u8 {
        let name = format!("file {number}").into_bytes();
        let file = editor.create(directory, &name, New::File, &attributes(0o644), &[]).unwrap();
        editor.set_content(file, &mut &[number; 3000][..]).unwrap();
    }
}

#[test]
fn at_every_write_of_an_edit() {
    for (number, seed) in seeds(4).into_iter().enumerate() {
        let backed = number % 2 == 0;
        let mut random = Random::new(seed);
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let (raw, image) = (directory.path().join("raw"), directory.path().join("image"));
        let tree = directory.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("old"), vec![b'o'; 200_000]).unwrap();
        std::fs::write(tree.join("gone"), vec![b'g'; 50_000]).unwrap();
        let made = Command::new("mke2fs")
            .args(["-qF", "-t", "ext4", "-d", text(&tree), text(&raw), &format!("{}k", SIZE >> 10)])
            .status()
            .unwrap();
        assert!(made.success());
        let below = std::fs::read(&raw).unwrap();
        let cluster = format!("cluster_size={}", if random.once_in(2) { 4096 } else { 65_536 });
        let from = ["-o", &cluster, "-f", "qcow2"];
        if backed {
            let arguments =
                [&["create", "-q"], &from[..], &["-b", text(&raw), "-F", "raw", text(&image)]].concat();
            img(&arguments);
        } else {
            img(&["convert", "-f", "raw", "-O", "qcow2", "-o", &cluster, text(&raw), text(&image)]);
        }
        println!("seed {seed}: {cluster}, backed: {backed}");

        let recording = Recording::new();
        let recorder = recording.file(std::fs::read(&image).unwrap());
        let disk = opened(&image, backed.then_some(&raw), recorder);
        let volume = disk.volumes[0];
        let mut editor = Editor::open(disk.part(&volume), NOW).unwrap();
        change(&mut editor);
        editor.commit().unwrap();
        let done = recording.tick();
        drop((editor, disk));

        let read_below = |offset: u64, buffer: &mut [u8]| {
            let below: &[u8] = if backed { &below } else { &[] };
            let start = (offset as usize).min(below.len());
            let length = buffer.len().min(below.len() - start);
            buffer[..length].copy_from_slice(&below[start..start + length]);
            buffer[length..].fill(0);
        };
        let state = |bytes: &[u8]| -> Result<Vec<u8>, String> {
            let image = Image::new(bytes)?;
            let errors = image.check().errors;
            if !errors.is_empty() {
                return Err(format!("{errors:?}"));
            }
            image.content(&read_below, None)
        };
        let old = content(below.clone()).unwrap();
        let last = recording.crash(recording.now(), Cut::Everything, &mut random);
        let new = content(state(&last[0]).unwrap()).unwrap();
        assert!(old != new);

        let (mut olds, mut news) = (0, 0);
        for point in 0..100 {
            let at = random.index(recording.now() + 1);
            // Sectors of 4 KiB are written whole, as ext4 has it.
            let cuts: Vec<Cut> = Cut::ALL.into_iter().filter(|cut| *cut != Cut::Torn(512)).collect();
            let cut = *random.one_of(&cuts);
            let bytes = recording.crash(at, cut, &mut random);
            let found = state(&bytes[0]).and_then(|disk| Ok((content(disk.clone())?, disk)));
            let (found, disk) = found.unwrap_or_else(|wrong| {
                panic!("seed {seed}, {cut:?} at {at}: {wrong}\n{}", recording.story(at, 60))
            });
            assert!(found == old || found == new, "seed {seed}, {cut:?} at {at}: neither old nor new");
            assert!(at < done || found == new, "seed {seed}, {cut:?} at {at}: what was committed is lost");
            if found == new {
                news += 1
            } else {
                olds += 1
            }
            if point % 10 == 0 {
                let copy = directory.path().join("copy");
                std::fs::write(&copy, disk).unwrap();
                let output = Command::new("e2fsck").args(["-fy", text(&copy)]).output().unwrap();
                assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
                assert!(content(std::fs::read(&copy).unwrap()).unwrap() == found);
            }
        }
        assert!(olds > 5 && news > 5, "{olds} times the old one, {news} times the new one");
    }
}
