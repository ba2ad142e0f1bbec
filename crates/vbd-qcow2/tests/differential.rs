//! qcow2 images of every shape, changed in turns by vbd and by QEMU's tools: what one writes the other reads, and
//! `qemu-img check` finds neither error nor leak after either.
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::FormatDriverBuilder;
use vbd_core::{Disk, ErrorKind, ExtentKind, Flags, Operation, Session};
use vbd_image::raw::{Raw, RawOptions};
use vbd_qcow2::{Qcow2, Qcow2Options};
use vbd_ring::EngineKind;
use vbd_testing::client::{Ask, Client};
use vbd_testing::qcow2::{Image, Report};
use vbd_testing::qemu::{self, Model, Shape, img, text};
use vbd_testing::{Random, seeds};

/// An image, and what it should hold.
struct Case {
    random: Random,
    shape: Shape,
    path: PathBuf,
    /// What is below the image: the file, its format, its content; shorter or longer than it.
    below: Option<(PathBuf, &'static str, Vec<u8>)>,
    model: Model,
    snapshots: Vec<(String, Vec<u8>)>,
    next: u32,
    dir: tempfile::TempDir,
}

impl Case {
    fn new(seed: u64, shape: impl FnOnce(&mut Random) -> Shape, backed: bool) -> Self {
        let mut random = Random::new(seed);
        let shape = shape(&mut random);
        println!("seed {seed}: {shape:?}, backed: {backed}");
        // Where O_DIRECT works as the machine has it, and where nothing waits.
        let place = if random.once_in(3) { env!("CARGO_TARGET_TMPDIR") } else { "/dev/shm" };
        let dir = tempfile::tempdir_in(place).expect("a directory");
        let path = dir.path().join("disk.qcow2");
        let below = backed.then(|| make_backing(dir.path(), &shape, &mut random));
        let file = below.as_ref().map(|(path, format, _)| (&**path, *format));
        shape.create(&path, file);
        let mut content = vec![0; shape.size as usize];
        read_below(below.as_ref().map(|(.., content)| &content[..]), 0, &mut content);
        let model = Model::new(&shape, content);
        Case { random, shape, path, below, model, snapshots: Vec::new(), next: 0, dir }
    }

    /// What anybody must find in the image now.
    fn verify(&self, who: &str) {
        let theirs = qemu::check(&self.path);
        assert_eq!((theirs.errors, theirs.leaks), (0, 0), "after {who}: {}", theirs.said);
        let bytes = std::fs::read(&self.path).expect("readable");
        let data =
            self.shape.data_file.then(|| std::fs::read(self.path.with_extension("data")).expect("there"));
        let image = Image::new(&bytes).expect("a header");
        assert_eq!(image.check(), Report::default(), "after {who}");
        let below = self.below.as_ref().map(|(.., content)| &content[..]);
        let below = |offset, buffer: &mut [u8]| read_below(below, offset, buffer);
        let content = image.content(&below, data.as_deref()).expect("whole");
        same(&content, &self.model.content, who);
        let (found, _) = image.snapshots().expect("a table");
        let names = |found: &[vbd_testing::qcow2::Snapshot]| -> Vec<String> {
            found.iter().map(|snapshot| snapshot.name.clone()).collect()
        };
        let expected: Vec<String> = self.snapshots.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(names(&found), expected, "after {who}");
        for (snapshot, (name, held)) in found.iter().zip(&self.snapshots) {
            let content = image.content_of(snapshot.l1, snapshot.size, &below, None).expect("whole");
            same(&content, held, &format!("{who}, in snapshot {name}"));
        }
    }

    /// QEMU reads it all too.
    fn verify_by_qemu(&self) {
        let raw = self.dir.path().join("model.raw");
        std::fs::write(&raw, &self.model.content).expect("room");
        img(&["compare", "-f", "qcow2", "-F", "raw", text(&self.path), text(&raw)]);
    }

    /// And imago, where it can open the image: it knows neither subclusters over a backing file nor zstd.
    fn verify_by_imago(&self) -> bool {
        let open = imago::qcow2::Qcow2::<imago::file::File>::builder_path(&self.path)
            .open(imago::PermissiveImplicitOpenGate::default());
        let Ok(image) = open else { return false };
        let image = imago::FormatAccess::new(image);
        assert_eq!(image.size(), self.model.size());
        let mut content = vec![0u8; self.model.content.len()];
        image.read(&mut content[..], 0).expect("imago reads what it has opened");
        same(&content, &self.model.content, "vbd and QEMU, read by imago");
        true
    }

    fn by_qemu(&mut self) {
        self.model.change(&self.path, &self.shape, &mut self.random, 15);
        if self.shape.has_snapshots() && self.random.once_in(2) {
            self.snapshot_by_qemu();
        }
        // It cannot hide what is below what it adds where there is no zero flag.
        let can = self.shape.version >= 3 || self.below.is_none();
        if can && !self.shape.data_file_raw && self.random.once_in(6) && self.snapshots.is_empty() {
            let size = self.grown();
            img(&["resize", "-q", "-f", "qcow2", text(&self.path), &size.to_string()]);
            self.model.resize(size);
        }
    }

    fn snapshot_by_qemu(&mut self) {
        let path = self.path.clone();
        let run = |what: &str, name: &str| img(&["snapshot", what, name, text(&path)]);
        match self.random.below(3) {
            0 if !self.snapshots.is_empty() => {
                let (name, content) = self.random.one_of(&self.snapshots).clone();
                run("-a", &name);
                self.model.write(0, content.len() as u64).copy_from_slice(&content);
            }
            1 if !self.snapshots.is_empty() => {
                let index = self.random.index(self.snapshots.len());
                run("-d", &self.snapshots.remove(index).0);
            }
            _ => {
                let name = self.name();
                run("-c", &name);
                self.snapshots.push((name, self.model.content.clone()));
            }
        }
    }

    fn name(&mut self) -> String {
        self.next += 1;
        format!("snapshot {}", self.next)
    }

    fn grown(&mut self) -> u64 {
        self.model.size() + (1 + self.random.below(600)) * 512
    }

    fn open(&self) -> Arc<dyn Session> {
        let backing = |file: &Path, format: &str| -> Arc<dyn Disk> {
            match format {
                "raw" => Raw::new(RawOptions { read_only: true, ..RawOptions::new(file) }),
                _ => Qcow2::new(Qcow2Options { read_only: true, ..Qcow2Options::new(file) }),
            }
        };
        let mut options = Qcow2Options::new(&self.path);
        options.backing = self.below.as_ref().map(|(file, format, _)| backing(file, format));
        if self.shape.data_file {
            options.data_file = Some(Raw::new(RawOptions::new(self.path.with_extension("data"))));
        }
        Qcow2::new(options).open().unwrap_or_else(|error| panic!("{error}"))
    }

    fn by_vbd(&mut self) {
        let session = self.open();
        assert_eq!(session.geometry().size, self.model.size());
        let clients =
            [Client::on_disk(EngineKind::Auto, &session), Client::on_disk(EngineKind::Auto, &session)];
        for _ in 0..self.random.below(40) {
            let client = &clients[self.random.index(2)];
            match self.random.below(20) {
                0 if self.shape.has_snapshots() => self.snapshot_by_vbd(&session),
                1 if !self.shape.data_file_raw && self.snapshots.is_empty() => {
                    let size = self.grown();
                    session.grow(size).expect("room");
                    self.model.resize(size);
                }
                2..6 => self.read(client),
                _ => self.request(client),
            }
        }
        let whole = clients[0].read(0, self.model.size());
        same(&whole, &self.model.content, "vbd, read by itself");
        drop(clients);
        // The last session closes the image.
        drop(session);
    }

    fn read(&mut self, client: &Client) {
        let (offset, len) = self.model.range(&mut self.random);
        let range = offset as usize..(offset + len) as usize;
        if self.random.once_in(4) {
            return self.extents(client, offset, len);
        }
        let read = client.read(offset, len);
        same(&read, &self.model.content[range], &format!("vbd, read of {len} at {offset}"));
    }

    fn extents(&mut self, client: &Client, offset: u64, len: u64) {
        let answer = client.ask(Ask::new(Operation::Extents, offset, len));
        answer.result.expect("told");
        let mut at = offset;
        for extent in &answer.extents {
            let end = at + extent.len;
            assert!(end <= offset + len, "an extent beyond the range");
            let content = &self.model.content[at as usize..end as usize];
            let is_zero = content.chunks(512).all(|sector| sector == &[0; 512][..sector.len()]);
            assert!(extent.kind == ExtentKind::Data || is_zero, "data at {at} is called {:?}", extent.kind);
            at = end;
        }
        assert!(at > offset, "no extent");
    }

    fn request(&mut self, client: &Client) {
        let (offset, len) = self.model.range(&mut self.random);
        let mut ask = Ask::new(Operation::Write, offset, len);
        ask.flags.fua = self.random.once_in(10);
        (ask.piece, ask.skew) = *self.random.one_of(&[(usize::MAX, 0), (4096, 0), (1536, 512), (512, 3)]);
        match self.random.below(8) {
            0 => ask.operation = Operation::Discard,
            1 | 2 => {
                ask.operation = Operation::WriteZeroes;
                ask.flags = Flags { may_unmap: self.random.once_in(2), ..ask.flags };
            }
            3 => ask = Ask::new(Operation::Flush, 0, 0),
            _ => {
                let seed = self.random.next_u64() as u8;
                ask.data = pattern(offset, len, |sector| seed.wrapping_add(sector));
            }
        }
        let answer = client.ask(ask.clone());
        answer.result.unwrap_or_else(|error| panic!("{error}"));
        match ask.operation {
            Operation::Write => self.model.write(offset, len).copy_from_slice(&ask.data),
            Operation::WriteZeroes => self.model.write(offset, len).fill(0),
            Operation::Discard => {
                let now = client.read(offset, len);
                let model = self.model.write(offset, len);
                for (old, new) in model.chunks_mut(512).zip(now.chunks(512)) {
                    assert!(old == new || new == [0; 512], "a discard has changed data");
                    old.copy_from_slice(new);
                }
            }
            _ => {}
        }
    }

    fn snapshot_by_vbd(&mut self, session: &Arc<dyn Session>) {
        let live = session.live().expect("qcow2 has snapshots");
        let there: Vec<String> =
            live.snapshots().expect("listed").into_iter().map(|snapshot| snapshot.name).collect();
        let expected: Vec<String> = self.snapshots.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(there, expected);
        match self.random.below(3) {
            0 if !self.snapshots.is_empty() => {
                let (name, content) = self.random.one_of(&self.snapshots).clone();
                live.apply_snapshot(&name).expect("applied");
                self.model.write(0, content.len() as u64).copy_from_slice(&content);
            }
            1 if !self.snapshots.is_empty() => {
                let index = self.random.index(self.snapshots.len());
                live.delete_snapshot(&self.snapshots.remove(index).0).expect("deleted");
            }
            _ => {
                let name = self.name();
                live.create_snapshot(&name).expect("created");
                assert!(live.create_snapshot(&name).is_err(), "two of one name");
                self.snapshots.push((name, self.model.content.clone()));
            }
        }
    }

    /// Whether imago has read it too.
    fn turns(&mut self, count: usize) -> bool {
        for turn in 0..count {
            if turn % 2 == 0 {
                self.by_vbd();
                self.verify("vbd");
            } else {
                self.by_qemu();
                self.verify("QEMU");
            }
        }
        self.verify_by_qemu();
        self.verify_by_imago()
    }
}

fn make_backing(dir: &Path, shape: &Shape, random: &mut Random) -> (PathBuf, &'static str, Vec<u8>) {
    let sectors = shape.size / 512;
    // Half to one and a half of the disk above.
    let len = (sectors / 2 + random.below(sectors)) * 512;
    let seed = random.next_u64() as u8;
    let mut content = pattern(0, len, |sector| seed.wrapping_mul(sector | 1));
    let hole = random.below(len) as usize;
    content[hole / 2..hole].fill(0);
    let raw = dir.join("backing.raw");
    std::fs::write(&raw, &content).expect("room");
    if random.once_in(2) {
        return (raw, "raw", content);
    }
    let path = dir.join("backing.qcow2");
    let options = format!("cluster_size={}", 1u64 << *random.one_of(&[12, 16, 18]));
    img(&["convert", "-f", "raw", "-O", "qcow2", "-o", &options, text(&raw), text(&path)]);
    (path, "qcow2", content)
}

fn read_below(below: Option<&[u8]>, offset: u64, buffer: &mut [u8]) {
    let below = below.unwrap_or(&[]);
    let start = (offset as usize).min(below.len());
    let len = buffer.len().min(below.len() - start);
    buffer[..len].copy_from_slice(&below[start..start + len]);
    buffer[len..].fill(0);
}

/// Sectors that each are filled with a byte of their own.
fn pattern(offset: u64, len: u64, of: impl Fn(u8) -> u8) -> Vec<u8> {
    let mut data = vec![0; len as usize];
    (offset / 512..).zip(data.chunks_mut(512)).for_each(|(sector, piece)| piece.fill(of(sector as u8)));
    data
}

fn same(found: &[u8], expected: &[u8], who: &str) {
    assert_eq!(found.len(), expected.len(), "after {who}: the size");
    if found == expected {
        return;
    }
    let differs = (0..found.len()).find(|at| found[*at] != expected[*at]);
    assert_eq!(differs, None, "after {who}: the first byte that differs");
}

#[test]
fn images_of_any_shape_are_changed_in_turns() {
    let mut third = 0;
    let seeds = seeds(16);
    for seed in &seeds {
        let backed = seed % 3 == 0;
        third += usize::from(Case::new(*seed, Shape::random, backed).turns(5));
    }
    println!("imago read {third} of {}", seeds.len());
    assert!(third > 0 || seeds.len() < 4, "imago opens none of them");
}

#[test]
fn overlays_of_small_clusters_are_changed_in_turns() {
    for seed in seeds(6) {
        let shape = |random: &mut Random| Shape {
            cluster_bits: *random.one_of(&[9, 10, 12]),
            ..Shape::plain((256 << 10) + random.below(512) * 512)
        };
        Case::new(seed, shape, true).turns(6);
    }
}

#[test]
fn subclusters_over_a_backing_file_are_changed_in_turns() {
    for seed in seeds(6) {
        let shape = |random: &mut Random| Shape {
            cluster_bits: *random.one_of(&[14, 15, 16, 17]),
            extended_l2: true,
            ..Shape::plain((2 << 20) + random.below(512) * 512)
        };
        Case::new(seed, shape, true).turns(6);
    }
}

#[test]
fn narrow_refcounts_and_many_snapshots_are_changed_in_turns() {
    for seed in seeds(4) {
        let shape = |random: &mut Random| Shape {
            cluster_bits: 9,
            refcount_bits: *random.one_of(&[4, 8, 32, 64]),
            ..Shape::plain(200 << 10)
        };
        Case::new(seed, shape, false).turns(8);
    }
}

/// What cannot be kept in a refcount is refused, and the image stays as it is.
#[test]
fn a_snapshot_too_many_for_the_refcounts_is_refused() {
    let shape = |_: &mut Random| Shape { refcount_bits: 2, cluster_bits: 12, ..Shape::plain(64 << 10) };
    let mut case = Case::new(1, shape, false);
    let session = case.open();
    let client = Client::on_disk(EngineKind::Auto, &session);
    client.write(0, vec![5; 8192]);
    case.model.write(0, 8192).fill(5);
    let live = session.live().expect("qcow2 has snapshots");
    // The largest refcount is 3: the disk and two snapshots.
    for name in ["one", "two"] {
        live.create_snapshot(name).expect("room");
        case.snapshots.push((name.into(), case.model.content.clone()));
    }
    let refused = live.create_snapshot("three").expect_err("no room in the refcounts");
    assert!(matches!(refused.kind(), ErrorKind::Unsupported | ErrorKind::NoSpace), "{refused}");
    client.write(4096, vec![6; 4096]);
    case.model.write(4096, 4096).fill(6);
    drop((client, session));
    case.verify("a refused snapshot");
}
