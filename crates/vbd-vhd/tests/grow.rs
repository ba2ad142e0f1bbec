//! Disks made larger and smaller in place, and the power going meanwhile; and so for repair.
#![allow(clippy::cast_possible_truncation, reason = "disks of tests are small")]

mod support;

use std::io;
use std::path::Path;

use support::{Shape, as_qemu_reads, client, image, in_memory, problems, read_all};
use vbd_image::ReadAt;
use vbd_testing::Random;
use vbd_testing::power::{Cut, MemFile, Recording};
use vbd_vhd::format::{Head, SizeRule};
use vbd_vhd::{GrowError, Storage, Vhd, VhdOptions, grow, repair, shrink};

/// A file in memory whose changes are recorded.
struct Recorded(MemFile);

impl ReadAt for Recorded {
    fn fill_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(self.0.read_at(offset, buffer))
    }
}

impl Storage for Recorded {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.len())
    }

    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, bytes)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

const SIZE: u64 = 256 << 10;
const SHAPES: [Shape; 3] = [Shape::Fixed, Shape::Dynamic(4096), Shape::OverRaw(4096, SIZE / 2)];

/// An image with content everywhere but in the middle.
fn filled(dir: &Path, shape: Shape) -> (VhdOptions, Vec<u8>) {
    let (options, mut content) = image(dir, shape, SIZE);
    let disk = Vhd::new(options.clone());
    let queue = client(&disk);
    for (at, len) in [(0, 9000), (SIZE - 700, 700)] {
        queue.write(at, vec![0xa5; len]);
        content[at as usize..][..len].fill(0xa5);
    }
    (options, content)
}

fn grow_file(path: &Path, size: u64) -> Result<(), GrowError> {
    grow(&std::fs::File::options().read(true).write(true).open(path).unwrap(), size)
}

#[test]
fn disks_grow_and_go_on() {
    for shape in SHAPES {
        let dir = in_memory();
        let (options, mut wanted) = filled(dir.path(), shape);
        for size in [SIZE + 512, SIZE + 4096, SIZE * 9, 40 << 20] {
            grow_file(&options.path, size).unwrap_or_else(|error| panic!("{shape:?} to {size}: {error}"));
            assert_eq!(problems(&options.path), [""; 0], "{shape:?} to {size}");
            wanted.resize(size as usize, 0);
            let disk = Vhd::new(options.clone());
            assert!(read_all(&disk) == wanted, "{shape:?} to {size}");
            client(&disk).write(size - 5000, vec![0x5a; 5000]);
            wanted[size as usize - 5000..].fill(0x5a);
            drop(disk);
            assert!(read_all(&Vhd::new(options.clone())) == wanted, "{shape:?} at {size}");
            assert_eq!(problems(&options.path), [""; 0], "{shape:?} at {size}");
            if options.parent.is_none() {
                assert!(as_qemu_reads(&options.path) == wanted, "{shape:?} at {size}, as QEMU reads it");
            }
        }
        assert!(matches!(grow_file(&options.path, SIZE), Err(GrowError::Size { .. })));
        assert!(matches!(grow_file(&options.path, (40 << 20) + 1), Err(GrowError::Size { .. })));
        assert!(matches!(grow_file(&options.path, 4 << 40), Err(GrowError::Size { .. })));
    }
}

/// QEMU reads a table that has moved, and goes on in such an image.
#[test]
fn qemu_writes_to_a_disk_that_has_grown() {
    let dir = in_memory();
    let (options, mut wanted) = filled(dir.path(), Shape::Dynamic(4096));
    grow_file(&options.path, 4 << 20).unwrap();
    wanted.resize(4 << 20, 0);
    support::qemu("qemu-io", &["-f", "vpc", "-c", "write -P 9 3M 100k", options.path.to_str().unwrap()]);
    wanted[3 << 20..][..100 << 10].fill(9);
    assert!(read_all(&Vhd::new(options)) == wanted);
}

/// What an image may look like where the power goes: it opens, has one of the sizes, and its content.
fn every_state(
    dir: &Path,
    options: &VhdOptions,
    content: &[u8],
    sizes: [u64; 2],
    change: &dyn Fn(&Recorded) -> Result<(), String>,
) {
    let before = std::fs::read(&options.path).unwrap();
    let recording = Recording::new();
    let file = Recorded(MemFile::new(&recording, before.clone()));
    change(&file).unwrap();
    let lost = dir.join("lost.vhd");
    let mut random = Random::new(1);
    for at in 0..=recording.now() {
        for cut in Cut::ALL {
            // A sector is old or new; what is larger may be torn.
            let bytes = recording.crash(at, cut, &mut random).remove(0);
            check_state(&lost, &bytes, options, content, sizes, &format!("{cut:?} at {at}"));
        }
    }
    // And where the storage fails in mid-way.
    for changes in 0.. {
        let recording = Recording::new();
        let file = Recorded(MemFile::new(&recording, before.clone()));
        file.0.fail_after(changes, libc::ENOSPC);
        let result = change(&file);
        check_state(&lost, &file.0.content(), options, content, sizes, &format!("failed after {changes}"));
        if result.is_ok() {
            assert!(changes > 1);
            break;
        }
    }
}

fn check_state(
    path: &Path,
    bytes: &[u8],
    options: &VhdOptions,
    content: &[u8],
    sizes: [u64; 2],
    state: &str,
) {
    std::fs::write(path, bytes).unwrap();
    let head = Head::read(bytes, bytes.len() as u64).unwrap_or_else(|error| panic!("{state}: {error}"));
    let size = head.size(SizeRule::Maker).unwrap_or_else(|error| panic!("{state}: {error}"));
    assert!(sizes.contains(&size), "{state}: {size} bytes");
    for read_only in [true, false] {
        let disk = Vhd::new(VhdOptions { path: path.to_owned(), read_only, ..options.clone() });
        let read = read_all(&disk);
        let kept = content.len().min(*sizes.iter().min().unwrap() as usize);
        assert!(read[..kept] == content[..kept], "{state}, read only {read_only}: content is lost");
    }
    assert_eq!(problems(path), [""; 0], "{state}: after it was opened for writing");
}

#[test]
fn the_power_goes_while_a_disk_grows() {
    for shape in SHAPES {
        for size in [SIZE + 1024, SIZE * 5] {
            let dir = in_memory();
            let (options, content) = filled(dir.path(), shape);
            every_state(dir.path(), &options, &content, [SIZE, size], &|file| {
                grow(file, size).map_err(|error| error.to_string())
            });
        }
    }
}

#[test]
fn the_power_goes_while_a_footer_is_repaired() {
    let dir = in_memory();
    let (options, content) = filled(dir.path(), Shape::Dynamic(4096));
    let good = std::fs::read(&options.path).unwrap();
    for (at, more) in [(100, 0), (good.len() - 100, 0), (good.len() - 100, 9000)] {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes.resize(bytes.len() + more, 0x77);
        std::fs::write(&options.path, bytes).unwrap();
        every_state(dir.path(), &options, &content, [SIZE, SIZE], &|file| {
            let report = repair(file).map_err(|error| error.to_string())?;
            if report.is_clean() { Ok(()) } else { Err(format!("{report:?}")) }
        });
    }
}

fn shrink_file(path: &Path, size: u64) -> Result<(), GrowError> {
    shrink(&std::fs::File::options().read(true).write(true).open(path).unwrap(), size)
}

/// What is left is what was there, its room is given back, and nothing of the rest comes back with a larger size.
#[test]
fn disks_become_smaller_and_go_on() {
    for shape in SHAPES {
        for size in [SIZE - 512, SIZE / 2, SIZE / 2 + 1536, 4096 * 3, 512] {
            let dir = in_memory();
            let (options, mut wanted) = filled(dir.path(), shape);
            let disk = Vhd::new(options.clone());
            // So that blocks lie in the file in no order.
            client(&disk).write(SIZE / 3, vec![0x11; 40_000]);
            wanted[(SIZE / 3) as usize..][..40_000].fill(0x11);
            drop(disk);
            let before = std::fs::metadata(&options.path).unwrap().len();
            shrink_file(&options.path, size).unwrap_or_else(|error| panic!("{shape:?} to {size}: {error}"));
            wanted.truncate(size as usize);
            assert_eq!(problems(&options.path), [""; 0], "{shape:?} to {size}");
            assert!(read_all(&Vhd::new(options.clone())) == wanted, "{shape:?} to {size}");
            let after = std::fs::metadata(&options.path).unwrap().len();
            assert!(after < before || size == SIZE - 512, "{shape:?} to {size}: {before} and {after}");
            if options.parent.is_none() {
                assert!(as_qemu_reads(&options.path) == wanted, "{shape:?} at {size}, as QEMU reads it");
            }
            grow_file(&options.path, SIZE).unwrap_or_else(|error| panic!("{shape:?} from {size}: {error}"));
            let now = read_all(&Vhd::new(options.clone()));
            assert!(now[..size as usize] == wanted, "{shape:?} from {size}");
            if options.parent.is_none() {
                assert!(now[size as usize..].iter().all(|byte| *byte == 0), "{shape:?} from {size}");
            } else {
                let mut below = std::fs::read(dir.path().join("base")).unwrap();
                below.resize(SIZE as usize, 0);
                assert!(now[size as usize..] == below[size as usize..], "{shape:?} from {size}");
            }
            assert_eq!(problems(&options.path), [""; 0], "{shape:?} from {size}");
            client(&Vhd::new(options.clone())).write(SIZE - 5000, vec![0x5a; 5000]);
            assert!(
                read_all(&Vhd::new(options.clone()))[..size.min(SIZE - 5000) as usize]
                    == wanted[..size.min(SIZE - 5000) as usize]
            );
        }
    }
    let dir = in_memory();
    let (options, _) = filled(dir.path(), Shape::Dynamic(4096));
    for size in [SIZE + 512, 1000, 0] {
        assert!(matches!(shrink_file(&options.path, size), Err(GrowError::Size { .. })), "{size}");
    }
}

#[test]
fn the_power_goes_while_a_disk_becomes_smaller() {
    for shape in SHAPES {
        for size in [SIZE - 1024, SIZE / 4, SIZE / 3 / 512 * 512] {
            let dir = in_memory();
            let (options, mut content) = filled(dir.path(), shape);
            let disk = Vhd::new(options.clone());
            client(&disk).write(SIZE / 5, vec![0x11; 40_000]);
            content[(SIZE / 5) as usize..][..40_000].fill(0x11);
            drop(disk);
            every_state(dir.path(), &options, &content, [SIZE, size], &|file| {
                shrink(file, size).map_err(|error| error.to_string())
            });
        }
    }
}
