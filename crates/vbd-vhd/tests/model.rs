//! Random operations against a vector of bytes, through two queues, on every kind of VHD.
#![allow(clippy::cast_possible_truncation, reason = "disks of tests are small")]

mod support;

use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use support::{Shape, as_qemu_reads, client, image, in_memory, on_disk, problems, read_all};
use vbd_core::{ExtentKind, Flags, Operation};
use vbd_testing::client::Ask;
use vbd_vhd::{Vhd, VhdOptions};

const SIZE: u64 = (1 << 20) + 5 * 512;

fn asks(size: u64) -> impl Strategy<Value = Ask> {
    let operation = prop_oneof![
        4 => Just(Operation::Read),
        5 => Just(Operation::Write),
        1 => Just(Operation::Flush),
        2 => Just(Operation::Discard),
        2 => Just(Operation::WriteZeroes),
        1 => Just(Operation::Extents),
    ];
    let sectors = size / 512;
    let range = (0..sectors).prop_flat_map(move |start| {
        let most = sectors - start;
        (Just(start), prop_oneof![3 => 1..=most.min(16), 1 => 1..=most])
    });
    let piece = prop_oneof![Just(usize::MAX), Just(512), Just(4096), Just(1536)];
    let skew = prop_oneof![6 => Just(0usize), 1 => Just(512), 1 => Just(3)];
    let short = prop_oneof![3 => Just((0, 0)), 1 => (0..256u64, 0..256u64)];
    (operation, range, any::<u8>(), any::<(bool, bool)>(), piece, skew, short).prop_map(
        |(operation, (start, count), seed, (fua, may_unmap), piece, skew, short)| {
            let short = match operation {
                Operation::Discard | Operation::Extents => (0, 0),
                _ => short,
            };
            let (offset, len) = (start * 512 + short.0, count * 512 - short.0 - short.1);
            let fill = |at: u64| seed.wrapping_add((at / 512 % 251) as u8) | 1;
            let data = match operation {
                Operation::Write => (offset..offset + len).map(fill).collect(),
                _ => Vec::new(),
            };
            let flags = Flags { fua, may_unmap, fast_only: false };
            Ask { operation, offset, len, flags, data, piece, skew }
        },
    )
}

/// Runs random operations, and compares every read, and at the end everything: as it is, opened anew, and by QEMU.
fn check(dir: &Path, shape: Shape, cases: u32) {
    let (options, content) = image(dir, shape, SIZE);
    let disk = Vhd::new(options.clone());
    let clients = [client(&disk), client(&disk)];
    let model = std::cell::RefCell::new(content);
    assert!(clients[1].read(0, SIZE) == *model.borrow(), "the start differs");
    let mut runner = TestRunner::new(Config {
        cases,
        max_shrink_iters: 0,
        failure_persistence: None,
        ..Config::default()
    });
    let run = runner.run(&prop::collection::vec(asks(SIZE), 1..12), |asks| {
        let mut model = model.borrow_mut();
        for (index, ask) in asks.into_iter().enumerate() {
            let answer = clients[index % 2].ask(ask.clone());
            answer.result.map_err(|error| TestCaseError::fail(error.to_string()))?;
            let (start, len) = (ask.offset as usize, ask.len as usize);
            let range = &mut model[start..start + len];
            match ask.operation {
                Operation::Read => prop_assert!(answer.data == range, "read of {len} at {start} differs"),
                Operation::Write => range.copy_from_slice(&ask.data),
                Operation::WriteZeroes => range.fill(0),
                Operation::Discard => {
                    // Each sector is as before or zero; what it is from now on is seen by reading.
                    let now = clients[index % 2].read(ask.offset, ask.len);
                    for (old, new) in range.chunks_mut(512).zip(now.chunks(512)) {
                        prop_assert!(old == new || new.iter().all(|byte| *byte == 0), "discard changed data");
                        old.copy_from_slice(new);
                    }
                }
                Operation::Extents => {
                    let mut at = start;
                    for extent in &answer.extents {
                        let end = at + extent.len as usize;
                        prop_assert!(end <= start + len, "an extent beyond the range");
                        if extent.kind != ExtentKind::Data {
                            prop_assert!(model[at..end].iter().all(|byte| *byte == 0), "data called a hole");
                        }
                        at = end;
                    }
                    prop_assert!(at > start, "no extent");
                }
                Operation::Flush => {}
            }
        }
        Ok(())
    });
    run.unwrap_or_else(|error| panic!("{shape:?}: {error}"));
    let model = model.into_inner();
    assert!(clients[1].read(0, SIZE) == model, "{shape:?}: the end differs");
    drop(clients);
    drop(disk);
    assert_eq!(problems(&options.path), [""; 0], "{shape:?}");
    assert!(read_all(&Vhd::new(VhdOptions { read_only: true, ..options.clone() })) == model, "read only");
    assert!(read_all(&Vhd::new(options.clone())) == model, "{shape:?}: opened anew");
    assert_eq!(problems(&options.path), [""; 0], "{shape:?}");
    if options.parent.is_none() {
        assert!(as_qemu_reads(&options.path) == model, "{shape:?}: QEMU reads something else");
    }
}

#[test]
fn fixed() {
    check(on_disk().path(), Shape::Fixed, 30);
    check(in_memory().path(), Shape::Fixed, 30);
}

#[test]
fn dynamic() {
    for block in [4096, 16 << 10, 256 << 10, 2 << 20] {
        check(on_disk().path(), Shape::Dynamic(block), 25);
        check(in_memory().path(), Shape::Dynamic(block), 40);
    }
}

#[test]
fn differencing_over_a_raw_file() {
    for len in [SIZE, SIZE / 2 + 512, SIZE * 2] {
        for block in [4096, 64 << 10, 2 << 20] {
            check(in_memory().path(), Shape::OverRaw(block, len), 30);
        }
    }
    check(on_disk().path(), Shape::OverRaw(64 << 10, SIZE), 25);
}

#[test]
fn differencing_over_a_dynamic_disk() {
    check(in_memory().path(), Shape::OverVhd(32 << 10), 40);
    check(on_disk().path(), Shape::OverVhd(32 << 10), 20);
}
