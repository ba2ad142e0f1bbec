//! Images that are written in one go, of every kind that can be, and gone on with after an interruption: read by another
//! reader, and checked by three.
//!
//! `VBD_SEED=N` repeats one seed, `VBD_ROUNDS=N` runs N times as many.

use std::ops::Range;

use vbd_qcow2::check::{Options, check};
use vbd_qcow2::format::Compression;
use vbd_qcow2::storage::{Memory, Storage};
use vbd_qcow2::{Backing, BuildError, Builder, CreateOptions, DataFile, Packer, Preallocation, Version};
use vbd_testing::{Random, qcow2, qemu, seeds};

/// Room for the largest image.
const ROOM: usize = 64 << 20;
/// What the backing file has everywhere.
const BELOW: u8 = 0xbe;

/// A disk and how an image of it is made.
struct Case {
    options: CreateOptions,
    disk: Vec<u8>,
    /// What each cluster is.
    kinds: Vec<Kind>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// As the backing file has it, or nothing.
    Below,
    Zero,
    Plain,
    Packed,
}

impl Case {
    fn new(random: &mut Random) -> Case {
        let old = random.once_in(5);
        let cluster_size = *random.one_of(&[512u64, 512, 1024, 4096, 65_536, 2 << 20]);
        let options = CreateOptions {
            version: if old { Version::V2 } else { Version::V3 },
            cluster_size,
            refcount_bits: if old { 16 } else { *random.one_of(&[1, 2, 4, 8, 16, 16, 32, 64]) },
            compression: if old || random.once_in(2) { Compression::Zlib } else { Compression::Zstd },
            backing: (!old && random.once_in(3))
                .then(|| Backing { name: b"base".to_vec(), format: "raw".to_owned() }),
            ..CreateOptions::default()
        };
        let most = ((1 << 20) / cluster_size).max(3);
        let clusters = 1 + random.below(most.min(1200));
        let size = clusters * cluster_size - 512 * random.below(cluster_size / 512);
        let mut disk = vec![0; usize::try_from(size).unwrap()];
        let packs = random.once_in(2);
        let mut kinds = Vec::new();
        let mut kind = Kind::Below;
        for part in disk.chunks_mut(usize::try_from(cluster_size).unwrap()) {
            if random.once_in(4) {
                kind = *random.one_of(&[Kind::Below, Kind::Zero, Kind::Plain, Kind::Packed, Kind::Packed]);
            }
            let is = match kind {
                Kind::Packed if !packs => Kind::Plain,
                Kind::Zero if options.backing.is_none() => Kind::Below,
                other => other,
            };
            match is {
                Kind::Below if options.backing.is_some() => part.fill(BELOW),
                Kind::Below | Kind::Zero => {}
                // From hardly anything to nearly all of it.
                _ => {
                    let noisy = random.index(part.len() + 1);
                    part[..noisy].chunks_mut(8).for_each(|piece| {
                        piece.copy_from_slice(&random.next_u64().to_le_bytes()[..piece.len()]);
                    });
                    part[noisy..].fill(3);
                }
            }
            kinds.push(is);
        }
        Case { options: CreateOptions { size, ..options }, disk, kinds }
    }

    fn cluster(&self) -> usize {
        usize::try_from(self.options.cluster_size).unwrap()
    }

    fn clusters(&self) -> u64 {
        self.kinds.len() as u64
    }

    fn bytes(&self, clusters: Range<u64>) -> Range<usize> {
        let at =
            |cluster: u64| usize::try_from(cluster * self.options.cluster_size).unwrap().min(self.disk.len());
        at(clusters.start)..at(clusters.end)
    }

    /// Writes a range of the disk.
    fn write(&self, builder: &Builder<&Memory>, packer: &mut Packer, range: Range<u64>) {
        let (mut packed, mut plain): (Vec<(u64, u64)>, Vec<Range<u64>>) = (Vec::new(), Vec::new());
        let (mut bytes, mut zeroes) = (Vec::new(), Vec::new());
        for cluster in range {
            match self.kinds[usize::try_from(cluster).unwrap()] {
                Kind::Below => {}
                Kind::Zero => zeroes.push(cluster),
                kind => {
                    let mut whole = self.disk[self.bytes(cluster..cluster + 1)].to_vec();
                    whole.resize(self.cluster(), 0);
                    match packer.pack(&whole, &mut bytes).unwrap().filter(|_| kind == Kind::Packed) {
                        Some(len) => packed.push((cluster, len as u64)),
                        None => match plain.last_mut() {
                            Some(last) if last.end == cluster => last.end += 1,
                            _ => plain.push(cluster..cluster + 1),
                        },
                    }
                    if kind != Kind::Packed {
                        bytes.truncate(
                            usize::try_from(packed.iter().map(|(_, len)| len).sum::<u64>()).unwrap(),
                        );
                    }
                }
            }
        }
        zeroes.into_iter().for_each(|cluster| builder.zero(cluster..cluster + 1).unwrap());
        let (hosts, placed) = builder.place(&packed, &plain).unwrap();
        let mut at = 0;
        for ((_, len), host) in packed.iter().zip(hosts) {
            let len = usize::try_from(*len).unwrap();
            builder.storage().write_all_at(host, &bytes[at..at + len]).unwrap();
            at += len;
        }
        for piece in placed {
            builder.storage().write_all_at(piece.host, &self.disk[self.bytes(piece.clusters)]).unwrap();
        }
    }

    /// Writes all from `start` on, a few pieces out of order, and stops after `stop` pieces. Gives the last checkpoint.
    fn fill(&self, builder: &Builder<&Memory>, start: u64, stop: usize, random: &mut Random) -> Option<u64> {
        let mut packer = Packer::new(self.options.compression).unwrap();
        let mut pieces = Vec::new();
        let mut at = start;
        while at < self.clusters() {
            let end = (at + 1 + random.below(40)).min(self.clusters());
            pieces.push(at..end);
            at = end;
        }
        let ordered = random.once_in(2);
        let (mut waiting, mut noted): (Vec<Range<u64>>, _) = (Vec::new(), None);
        let mut pieces = pieces.into_iter();
        for _ in 0..stop {
            waiting.extend(pieces.by_ref().take(if ordered { 1 } else { 4 - waiting.len() }));
            if waiting.is_empty() {
                break;
            }
            let piece = waiting.remove(random.index(waiting.len()));
            let end = piece.end;
            self.write(builder, &mut packer, piece);
            let low = waiting.iter().map(|piece| piece.start).min();
            // Where others wait, what was begun last is the lowest that is missing, or what comes next.
            let low = low.unwrap_or(if ordered { end } else { 0 }) * self.options.cluster_size;
            builder.settled(low).unwrap();
            if random.once_in(5) && low > noted.unwrap_or(0) {
                builder.checkpoint().unwrap();
                noted = Some(low);
            }
        }
        noted
    }

    fn check(&self, seed: u64, image: &[u8]) {
        let told = || format!("seed {seed}: {:?}", self.options);
        let report = check(image, &Options::default()).unwrap_or_else(|error| panic!("{}: {error}", told()));
        assert!(report.errors == 0 && report.leaks == 0, "{}: {report:#?}", told());
        let other = qcow2::Image::new(image).unwrap_or_else(|error| panic!("{}: {error}", told()));
        let counted = other.check();
        assert!(counted.errors.is_empty() && counted.leaks == 0, "{}: {counted:#?}", told());
        let below = if self.options.backing.is_some() { BELOW } else { 0 };
        let content = other.content(&|_, buffer| buffer.fill(below), None).unwrap();
        let differ = content.iter().zip(&self.disk).position(|(one, other)| one != other);
        assert_eq!((content.len(), differ), (self.disk.len(), None), "{}", told());
    }
}

#[test]
fn images_of_every_kind_are_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(dir.path().join("base"), vec![BELOW; 512]).unwrap();
    for seed in seeds(24) {
        let random = &mut Random::new(seed);
        let case = Case::new(random);
        let memory = Memory::new(Vec::new(), ROOM);
        let builder = Builder::new(&memory, &case.options).unwrap();
        case.fill(&builder, 0, usize::MAX, random);
        // Until the end it is no image.
        assert!(!memory.to_bytes().starts_with(b"QFI"), "seed {seed}");
        builder.finish().unwrap();
        drop(builder);
        let image = memory.into_bytes();
        case.check(seed, &image);
        if seed % 8 == 0 {
            std::fs::write(&path, &image).unwrap();
            let seen = qemu::check(&path);
            assert_eq!((seen.errors, seen.leaks), (0, 0), "seed {seed}: {}", seen.said);
        }
    }
}

#[test]
fn what_was_interrupted_goes_on_from_a_checkpoint() {
    let mut resumed = 0;
    for seed in seeds(24) {
        let random = &mut Random::new(seed);
        let case = Case::new(random);
        let memory = Memory::new(Vec::new(), ROOM);
        let builder = Builder::new(&memory, &case.options).unwrap();
        let stop = 1 + random.index(60);
        let mut noted = case.fill(&builder, 0, stop, random);
        drop(builder);
        // What was written after it stays, and means nothing; twice.
        for last in [false, true] {
            let Some(done) = noted else { break };
            resumed += 1;
            let builder = Builder::resume(&memory, &case.options, done).unwrap();
            let start = done / case.options.cluster_size;
            let stop = if last { usize::MAX } else { random.index(30) };
            noted = case.fill(&builder, start, stop, random).or(Some(done));
            if last {
                builder.finish().unwrap();
                case.check(seed, &memory.to_bytes());
            }
        }
    }
    assert!(resumed > 8, "{resumed}");
}

#[test]
fn what_cannot_be_written_so_is_refused() {
    let base = CreateOptions { size: 1 << 20, ..CreateOptions::default() };
    let backing = Some(Backing { name: b"base".to_vec(), format: "raw".to_owned() });
    let data = DataFile { path: "data".into(), raw: false, keep: false };
    for options in [
        CreateOptions { extended_l2: true, ..base.clone() },
        CreateOptions { preallocation: Preallocation::Metadata, ..base.clone() },
        CreateOptions { luks_header: Some(vec![0; 512]), ..base.clone() },
        CreateOptions { data_file: Some(data), ..base.clone() },
        CreateOptions { version: Version::V2, backing, ..base.clone() },
    ] {
        assert!(!Builder::<&Memory>::fits(&options));
        let memory = Memory::new(Vec::new(), ROOM);
        assert!(matches!(Builder::new(&memory, &options), Err(BuildError::Refused(_))), "{options:?}");
    }
    let memory = Memory::new(Vec::new(), ROOM);
    let builder = Builder::new(&memory, &base).unwrap();
    let [last, beyond] = [15..16, 1 << 40..(1 << 40) + 1];
    builder.place(&[], &[last, beyond]).map(|_| ()).unwrap_err();
    assert!(matches!(
        Builder::new(&memory, &CreateOptions { cluster_size: 777, ..base }),
        Err(BuildError::Create(_))
    ));
}

/// Whatever a draft holds, going on with it is an error or gives an image, and no more memory than it is long.
#[test]
fn a_draft_that_is_damaged_is_refused_or_passed_over() {
    let mut refused = 0;
    for seed in seeds(24) {
        let random = &mut Random::new(seed);
        let case = Case::new(random);
        let memory = Memory::new(Vec::new(), ROOM);
        let builder = Builder::new(&memory, &case.options).unwrap();
        let noted = case.fill(&builder, 0, 40, random);
        drop(builder);
        let Some(done) = noted else { continue };
        let mut bytes = memory.into_bytes();
        for _ in 0..1 + random.index(20) {
            let at = random.index(bytes.len());
            bytes[at] = random.next_u64().to_le_bytes()[0];
        }
        bytes.truncate(bytes.len() - if random.once_in(4) { random.index(bytes.len()) } else { 0 });
        let memory = Memory::new(bytes, ROOM);
        match Builder::resume(&memory, &case.options, done) {
            Ok(builder) => builder.finish().unwrap(),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 0, "{refused}");
}

/// Every write fails in its turn, and nothing passes for an image then.
#[test]
fn no_room_is_an_error_and_no_image() {
    let random = &mut Random::new(3);
    let mut case = Case::new(random);
    while case.clusters() < 20 {
        case = Case::new(random);
    }
    let whole = {
        let memory = Memory::new(Vec::new(), ROOM);
        let builder = Builder::new(&memory, &case.options).unwrap();
        case.fill(&builder, 0, usize::MAX, &mut Random::new(1));
        builder.finish().unwrap();
        drop(builder);
        memory.into_bytes().len()
    };
    for limit in [whole / 2, whole - 1, whole - case.cluster()] {
        let memory = Memory::new(Vec::new(), limit);
        let builder = Builder::new(&memory, &case.options).unwrap();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            case.fill(&builder, 0, usize::MAX, &mut Random::new(1));
            builder.finish()
        }));
        assert!(!matches!(result, Ok(Ok(()))), "{limit}");
        assert!(!memory.to_bytes().starts_with(b"QFI"));
    }
}
