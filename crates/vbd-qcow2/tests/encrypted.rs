//! Encrypted images, changed in turns by vbd, by several queues at once, and by QEMU's tools: each reads what the other
//! wrote, nothing of it stands in the file as it is, and checks find neither error nor leak.
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vbd_core::{Disk, ErrorKind, Flags, Operation, Session, Watch};
use vbd_image::raw::{Raw, RawOptions};
use vbd_luks::{FormatOptions, Hash, KeyBits, Secret};
use vbd_qcow2::check::{self, check};
use vbd_qcow2::{
    Backing, CreateError, CreateOptions, DataFile, Preallocation, Qcow2, Qcow2Options, Version, create,
};
use vbd_ring::EngineKind;
use vbd_testing::client::{Ask, Client};
use vbd_testing::power::{Cut, Expected, Load, Recording, drive};
use vbd_testing::{Random, qemu, seeds};

const KEY: &str = "a passphrase";

/// What an image is like.
#[derive(Clone, Debug)]
struct Shape {
    size: u64,
    cluster_bits: u32,
    refcount_bits: u32,
    extended_l2: bool,
    version: u32,
    data_file: bool,
    by_qemu: bool,
    backed: bool,
}

impl Shape {
    fn random(random: &mut Random) -> Self {
        let extended_l2 = random.once_in(4);
        let version = if !extended_l2 && random.once_in(5) { 2 } else { 3 };
        let data_file = version == 3 && random.once_in(6);
        Shape {
            size: (64 + random.below(6000)) * 512,
            cluster_bits: if extended_l2 { 14 + random.below(3) as u32 } else { 9 + random.below(9) as u32 },
            refcount_bits: if version == 3 { *random.one_of(&[16, 32, 64]) } else { 16 },
            extended_l2,
            version,
            data_file,
            // QEMU alone makes such a one.
            by_qemu: version == 2 || random.once_in(2),
            backed: !data_file && random.once_in(3),
        }
    }
}

struct Case {
    shape: Shape,
    path: PathBuf,
    model: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    next: u32,
    dir: tempfile::TempDir,
}

struct Unwatched;

impl Watch for Unwatched {
    fn step(&self, _step: &str, _total: u64) {}

    fn advance(&self, _bytes: u64, _moved: u64) -> vbd_core::Result<()> {
        Ok(())
    }
}

fn secret(text: &str) -> Secret {
    Secret::new(text.into())
}

fn luks_header() -> Vec<u8> {
    let options = FormatOptions { iterations: Some(1000), key_bits: KeyBits::Bits256, hash: Hash::Sha256 };
    vbd_luks::format(&secret(KEY), &options).expect("a header")
}

/// Sectors that each are filled with a byte of their own, none of which is 0.
fn pattern(offset: u64, len: u64, seed: u8) -> Vec<u8> {
    (offset..offset + len).map(|at| seed.wrapping_add((at / 512) as u8) | 1).collect()
}

impl Case {
    fn new(shape: Shape, random: &mut Random) -> Self {
        let place = if random.once_in(3) { env!("CARGO_TARGET_TMPDIR") } else { "/dev/shm" };
        let dir = tempfile::tempdir_in(place).expect("a directory");
        let path = dir.path().join("disk.qcow2");
        std::fs::write(dir.path().join("key"), KEY).expect("room");
        let mut model = vec![0; shape.size as usize];
        if shape.backed {
            let below = pattern(0, shape.size / 1024 * 512 + random.below(40) * 512, 77);
            std::fs::write(dir.path().join("below"), &below).expect("room");
            let len = below.len().min(model.len());
            model[..len].copy_from_slice(&below[..len]);
        }
        let case = Case { shape, path, model, snapshots: Vec::new(), next: 0, dir };
        if case.shape.by_qemu {
            case.create_by_qemu()
        } else {
            case.create_by_vbd()
        }
        case
    }

    fn create_by_qemu(&self) {
        let shape = &self.shape;
        let options = format!(
            "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,cluster_size={},refcount_bits={},compat={},extended_l2={}{}",
            1u64 << shape.cluster_bits,
            shape.refcount_bits,
            if shape.version == 2 { "0.10" } else { "1.1" },
            if shape.extended_l2 { "on" } else { "off" },
            if shape.data_file {
                format!(",data_file={}", self.path.with_extension("data").display())
            } else {
                String::new()
            },
        );
        let size = shape.size.to_string();
        let mut arguments = vec!["create", "-q", "--object", &self.object(), "-f", "qcow2", "-o", &options]
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>();
        if shape.backed {
            arguments.extend(["-b", "below", "-F", "raw"].map(str::to_owned));
        }
        arguments.extend([qemu::text(&self.path).to_owned(), size]);
        qemu::img(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    }

    fn create_by_vbd(&self) {
        let shape = &self.shape;
        let options = CreateOptions {
            size: shape.size,
            cluster_size: 1 << shape.cluster_bits,
            refcount_bits: shape.refcount_bits,
            extended_l2: shape.extended_l2,
            luks_header: Some(luks_header()),
            backing: shape.backed.then(|| Backing { name: b"below".to_vec(), format: "raw".into() }),
            data_file: shape.data_file.then(|| DataFile {
                path: self.path.with_extension("data"),
                raw: false,
                keep: false,
            }),
            ..CreateOptions::default()
        };
        create(&self.path, &options).expect("room");
    }

    fn object(&self) -> String {
        format!("secret,id=key,file={}", self.dir.path().join("key").display())
    }

    fn as_qemu(&self) -> [String; 4] {
        let image = format!(
            "driver=qcow2,discard=unmap,encrypt.format=luks,encrypt.key-secret=key,file.filename={}",
            self.path.display()
        );
        ["--object".into(), self.object(), "--image-opts".into(), image]
    }

    fn qemu_img(&self, verb: &str, more: &[&str], last: &[&str]) {
        let [object, secret, opts, image] = self.as_qemu();
        let arguments = [&[verb, &object, &secret, &opts][..], more, &[&image], last].concat();
        qemu::img(&arguments);
    }

    fn qemu_io(&self, commands: &[String]) {
        let [object, secret, opts, image] = self.as_qemu();
        let mut arguments = vec![object, secret, opts, image];
        commands.iter().for_each(|command| arguments.extend(["-c".into(), command.clone()]));
        let output = qemu::run("qemu-io", &arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success() && !said.contains("ailed") && !said.contains("rror"), "{said}");
    }

    fn by_qemu(&mut self, random: &mut Random) {
        let mut commands = Vec::new();
        for _ in 0..12 {
            let (offset, len) = self.range(random);
            let range = offset as usize..(offset + len) as usize;
            match random.below(8) {
                0 => {
                    commands.push(format!("write -z {offset} {len}"));
                    self.model[range].fill(0);
                }
                1 => {
                    commands.push(format!("write -z -u {offset} {len}"));
                    self.model[range].fill(0);
                }
                2 if self.model[range.clone()].iter().all(|byte| *byte == self.model[range.start]) => {
                    commands.push(format!("read -P {} {offset} {len}", self.model[range.start]));
                }
                _ => {
                    let byte = 1 + random.below(255) as u8;
                    commands.push(format!("write -P {byte} {offset} {len}"));
                    self.model[range].fill(byte);
                }
            }
        }
        self.qemu_io(&commands);
        if !self.shape.data_file && random.once_in(2) {
            let name = self.name();
            self.qemu_img("snapshot", &["-c", &name], &[]);
            self.snapshots.push((name, self.model.clone()));
        }
    }

    fn range(&self, random: &mut Random) -> (u64, u64) {
        let sectors = self.model.len() as u64 / 512;
        let longest = if random.once_in(3) { sectors } else { 40 };
        let len = (1 + random.below(longest)).min(sectors);
        (random.below(sectors - len + 1) * 512, len * 512)
    }

    fn name(&mut self) -> String {
        self.next += 1;
        format!("snapshot-{}", self.next)
    }

    fn options(&self) -> Qcow2Options {
        let mut options = Qcow2Options::new(&self.path);
        if self.shape.backed {
            let below = RawOptions::new(self.dir.path().join("below"));
            options.backing = Some(Raw::new(RawOptions { read_only: true, ..below }));
        }
        if self.shape.data_file {
            options.data_file = Some(Raw::new(RawOptions::new(self.path.with_extension("data"))));
        }
        options
    }

    fn open(&self) -> Arc<dyn Session> {
        let options = Qcow2Options { secret: Some(secret(KEY)), ..self.options() };
        Qcow2::new(options).open().unwrap_or_else(|error| panic!("{error}"))
    }

    fn by_vbd(&mut self, random: &mut Random) {
        let session = self.open();
        let engine = |index| if index % 3 == 2 { EngineKind::Threads } else { EngineKind::Auto };
        let clients: Vec<Client> = (0..3).map(|index| Client::on_disk(engine(index), &session)).collect();
        for _ in 0..12 {
            self.at_once(random, &clients);
            if !self.shape.data_file && random.once_in(5) {
                self.snapshot_by_vbd(&session, random);
            }
        }
        if random.once_in(2) {
            // What is moved is encrypted anew for its place.
            match session.live().expect("qcow2 has it").compact(&Unwatched) {
                Err(error) => assert!(self.shape.data_file, "{error}"),
                Ok((before, after)) => assert!(after <= before + (1 << 20)),
            }
            assert!(clients[1].read(0, self.model.len() as u64) == self.model, "compacted");
        }
        if self.snapshots.is_empty() && (self.shape.version >= 3 || !self.shape.backed) && random.once_in(3) {
            let size = self.model.len() as u64 + (1 + random.below(300)) * 512;
            session.grow(size).expect("room");
            self.model.resize(size as usize, 0);
            self.at_once(random, &clients);
        }
        assert!(clients[0].read(0, self.model.len() as u64) == self.model, "vbd, read by itself");
    }

    /// Requests of several queues that are under way at the same time, in ranges that are apart but for sectors that two
    /// of them share: each changes its own bytes of it.
    fn at_once(&mut self, random: &mut Random, clients: &[Client]) {
        let size = self.model.len() as u64;
        let mut asked = Vec::new();
        for part in 0..6 {
            let (from, to) = (size * part / 6, size * (part + 1) / 6);
            let sectors = random.once_in(2);
            let align = |at: u64| if sectors { at.next_multiple_of(512) } else { at };
            let start = align(from + random.below(to - from)).min(to);
            let most = if random.once_in(3) { to - start } else { (to - start).min(9000) };
            let stop = if sectors { (start + most) / 512 * 512 } else { start + most };
            if stop <= start {
                continue;
            }
            let (offset, len) = (start, stop - start);
            let ask = match random.below(8) {
                0 if sectors => Ask::new(Operation::Discard, offset, len),
                1 | 2 if sectors => Ask {
                    flags: Flags { may_unmap: random.once_in(2), ..Flags::default() },
                    ..Ask::new(Operation::WriteZeroes, offset, len)
                },
                3 => Ask::new(Operation::Read, offset, len),
                4 => Ask::new(Operation::Flush, 0, 0),
                _ => {
                    let mut ask = Ask::write(offset, pattern(offset, len, random.next_u64() as u8));
                    ask.flags.fua = random.once_in(8);
                    (ask.piece, ask.skew) =
                        *random.one_of(&[(usize::MAX, 0), (4096, 0), (1536, 512), (512, 3)]);
                    ask
                }
            };
            let client = &clients[random.index(clients.len())];
            asked.push((ask.clone(), client.submit(ask)));
        }
        for (ask, answer) in asked {
            let answer = answer.recv_timeout(std::time::Duration::from_secs(60)).expect("an answer");
            answer.result.unwrap_or_else(|error| panic!("{ask:?}: {error}"));
            let range = ask.offset as usize..(ask.offset + ask.len) as usize;
            match ask.operation {
                Operation::Read => assert!(answer.data == self.model[range], "{ask:?} differs"),
                Operation::Write => self.model[range].copy_from_slice(&ask.data),
                Operation::WriteZeroes => self.model[range].fill(0),
                Operation::Discard => {
                    let now = clients[0].read(ask.offset, ask.len);
                    for (old, new) in self.model[range].chunks_mut(512).zip(now.chunks(512)) {
                        assert!(old == new || new.iter().all(|byte| *byte == 0), "{ask:?} has changed data");
                        old.copy_from_slice(new);
                    }
                }
                _ => {}
            }
        }
    }

    fn snapshot_by_vbd(&mut self, session: &Arc<dyn Session>, random: &mut Random) {
        let live = session.live().expect("qcow2 has snapshots");
        match random.below(3) {
            0 if !self.snapshots.is_empty() => {
                let (name, content) = random.one_of(&self.snapshots).clone();
                live.apply_snapshot(&name).expect("applied");
                self.model.copy_from_slice(&content);
            }
            1 if !self.snapshots.is_empty() => {
                let index = random.index(self.snapshots.len());
                live.delete_snapshot(&self.snapshots.remove(index).0).expect("deleted");
            }
            _ => {
                let name = self.name();
                live.create_snapshot(&name).expect("created");
                self.snapshots.push((name, self.model.clone()));
            }
        }
    }

    fn verify(&self, who: &str) {
        self.qemu_img("check", &[], &[]);
        let file = std::fs::File::open(&self.path).expect("there");
        let report = check(&file, &check::Options::default()).expect("an image");
        assert!(report.is_clean(), "after {who}: {:?}", report.findings);
        let out = self.dir.path().join("out");
        self.qemu_img("convert", &["-O", "raw"], &[qemu::text(&out)]);
        assert!(std::fs::read(&out).expect("made") == self.model, "after {who}: QEMU reads something else");
        for (name, content) in &self.snapshots {
            self.qemu_img("convert", &["-O", "raw", "-l", name], &[qemu::text(&out)]);
            assert!(
                std::fs::read(&out).expect("made") == *content,
                "after {who}: snapshot {name} has changed"
            );
        }
        let mut files = vec![self.path.clone()];
        files.extend(self.shape.data_file.then(|| self.path.with_extension("data")));
        for file in files {
            let bytes = std::fs::read(&file).expect("there");
            // Each sector that was written holds one byte over and over; the tables of the smallest clusters may do so.
            let told = bytes.chunks_exact(512).any(|sector| {
                sector[0] != 0 && sector[0] != 0xff && sector.iter().all(|byte| *byte == sector[0])
            });
            assert!(!told, "after {who}: {} shows what a guest wrote", file.display());
        }
    }
}

#[test]
fn images_are_changed_in_turns() {
    for seed in seeds(8) {
        let mut random = Random::new(seed);
        let shape = Shape::random(&mut random);
        println!("seed {seed}: {shape:?}");
        let mut case = Case::new(shape, &mut random);
        for _ in 0..2 {
            case.by_vbd(&mut random);
            case.verify("vbd");
            case.by_qemu(&mut random);
            case.verify("QEMU");
        }
        case.by_vbd(&mut random);
        case.verify("vbd");
    }
}

fn plain(by_qemu: bool) -> Shape {
    Shape {
        size: 4 << 20,
        cluster_bits: 16,
        refcount_bits: 16,
        extended_l2: false,
        version: 3,
        data_file: false,
        by_qemu,
        backed: false,
    }
}

/// Whatever the storage kept of what was not flushed: nothing is wrong with the image, and what was flushed is there.
#[test]
fn the_power_goes_while_an_encrypted_image_is_written_to() {
    for seed in seeds(4) {
        let mut random = Random::new(seed);
        let extended_l2 = seed % 4 == 3;
        let cluster_bits = if extended_l2 { 16 } else { *random.one_of(&[9, 12, 16]) };
        let case = Case::new(Shape { size: 1 << 20, cluster_bits, extended_l2, ..plain(false) }, &mut random);
        let sectors = case.shape.size / 512;
        let recording = Recording::new();
        let recorder = recording.file(std::fs::read(&case.path).expect("there"));
        let mut expected = Expected::new(vec![0; sectors as usize]);
        let options = Qcow2Options { secret: Some(secret(KEY)), ..case.options() };
        let session = Qcow2::new(Qcow2Options { faults: Some(recorder), ..options.clone() }).open();
        let session = session.expect("it opens");
        let clients =
            [Client::on_disk(EngineKind::Auto, &session), Client::on_disk(EngineKind::Auto, &session)];
        let load = Load { requests: 80, ..Load::on(0..sectors) };
        drive(&clients, &recording, &mut expected, &mut random, &load);
        drop((clients, session));
        let lost = case.dir.path().join("lost.qcow2");
        for point in 0..50 {
            let at = if point == 0 { recording.now() } else { random.index(recording.now() + 1) };
            let cut = *random.one_of(&Cut::ALL);
            let state = format!("seed {seed}, {cut:?} at {at}");
            std::fs::write(&lost, recording.crash(at, cut, &mut random).remove(0)).expect("room");
            let report = check(&std::fs::File::open(&lost).unwrap(), &check::Options::default());
            let report = report.unwrap_or_else(|error| panic!("{state}: {error}"));
            assert_eq!(report.errors, 0, "{state}: {:?}", report.findings);
            let disk = Qcow2::new(Qcow2Options { path: lost.clone(), ..options.clone() });
            let session = disk.open().unwrap_or_else(|error| panic!("{state}: {error}"));
            let client = Client::on_disk(EngineKind::Auto, &session);
            let content = client.read(0, case.shape.size);
            expected.check_cut(&content, at).unwrap_or_else(|wrong| panic!("{state}: {wrong}"));
        }
    }
}

#[test]
fn a_key_that_is_missing_or_wrong_changes_nothing() {
    let mut random = Random::new(1);
    let case = Case::new(plain(true), &mut random);
    let before = std::fs::read(&case.path).unwrap();
    let open = |key: Option<&str>| {
        let disk = Qcow2::new(Qcow2Options { secret: key.map(secret), ..case.options() });
        disk.inspect().expect("its size is no secret");
        disk.open().err().expect("refused")
    };
    for (key, said) in [(None, "say --key-file FILE or --key-fd N"), (Some("another"), "the key is wrong")] {
        let error = open(key);
        assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains(said), "{error}");
        assert!(error.to_string().contains("disk.qcow2"), "{error}");
        assert!(std::fs::read(&case.path).unwrap() == before);
    }
    // Key slots that lead beyond the file, and a header that is none.
    let header = vbd_qcow2::format::Header::read(&before[..]).unwrap();
    let at = header.crypto().unwrap().offset as usize;
    for (field, value, said) in
        [(at, &b"XUKS"[..], "mark is missing"), (at + 208 + 40, &[0xff; 4], "cut off")]
    {
        let mut bytes = before.clone();
        bytes[field..field + value.len()].copy_from_slice(value);
        std::fs::write(&case.path, bytes).unwrap();
        let error = open(Some(KEY));
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains(said), "{error}");
    }
}

#[test]
fn the_old_encryption_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (path, key) = (dir.path().join("old"), dir.path().join("key"));
    std::fs::write(&key, KEY).unwrap();
    let object = format!("secret,id=s,file={}", key.display());
    let options = "encrypt.format=aes,encrypt.key-secret=s";
    qemu::img(&["create", "-q", "--object", &object, "-f", "qcow2", "-o", options, qemu::text(&path), "1M"]);
    let disk = Qcow2::new(Qcow2Options { secret: Some(secret(KEY)), ..Qcow2Options::new(&path) });
    let error = disk.open().err().expect("refused");
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("AES-CBC"), "{error}");
}

#[test]
fn nothing_is_compressed_in_an_encrypted_image() {
    let mut random = Random::new(1);
    let case = Case::new(plain(false), &mut random);
    let session = case.open();
    let live = session.live().expect("qcow2 has it");
    assert_eq!(live.compressed_unit(), None);
    let error = live.write_compressed(0, &[7; 65536]).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[test]
fn room_that_is_set_aside_reads_as_zeroes() {
    for (preallocation, extended_l2) in
        [(Preallocation::Metadata, false), (Preallocation::Falloc, false), (Preallocation::Metadata, true)]
    {
        let mut random = Random::new(1);
        let mut case = Case::new(plain(false), &mut random);
        let options = CreateOptions {
            size: case.shape.size,
            luks_header: Some(luks_header()),
            preallocation,
            extended_l2,
            replace: true,
            ..CreateOptions::default()
        };
        create(&case.path, &options).unwrap();
        let before = std::fs::metadata(&case.path).unwrap().len();
        case.verify("create");
        case.by_vbd(&mut random);
        case.snapshots.clear();
        let client = Client::on_disk(EngineKind::Auto, &case.open());
        client.write(100_000, vec![3; 5000]);
        drop(client);
        case.model[100_000..105_000].fill(3);
        assert!(before >= case.shape.size);
        let out = case.dir.path().join("out");
        case.qemu_img("convert", &["-O", "raw"], &[qemu::text(&out)]);
        assert!(std::fs::read(&out).unwrap() == case.model, "{preallocation:?}");
    }
}

/// Zeroes that keep their space are a flag, not writes of encrypted zeroes.
#[test]
fn zeroes_are_quick() {
    let mut random = Random::new(1);
    let case = Case::new(plain(false), &mut random);
    let session = case.open();
    let client = Client::on_disk(EngineKind::Auto, &session);
    client.write(0, vec![9; 1 << 20]);
    let flags = Flags { fast_only: true, ..Flags::default() };
    let ask = Ask { flags, ..Ask::new(Operation::WriteZeroes, 64 << 10, 512 << 10) };
    client.ask(ask).result.expect("without writing them");
    let mut wanted = vec![9; 1 << 20];
    wanted[64 << 10..576 << 10].fill(0);
    assert!(client.read(0, 1 << 20) == wanted);
    client.write(100 << 10, vec![4; 100]);
    wanted[100 << 10..][..100].fill(4);
    assert!(client.read(0, 1 << 20) == wanted);
    drop(client);
    drop(session);
    let mut case = case;
    case.model[..1 << 20].copy_from_slice(&wanted);
    case.verify("vbd");
}

#[test]
fn what_does_not_go_together_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let luks = || Some(luks_header());
    let data_file = Some(DataFile { path: "data".into(), raw: true, keep: false });
    for (options, said) in [
        (CreateOptions { luks_header: luks(), version: Version::V2, ..Default::default() }, "LUKS"),
        (
            CreateOptions { luks_header: luks(), data_file, ..Default::default() },
            "does not read as a raw image",
        ),
    ] {
        let options = CreateOptions { size: 1 << 20, ..options };
        match create(Path::new(&dir.path().join("new")), &options) {
            Err(CreateError::Refused(reason)) => assert!(reason.contains(said), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
}
