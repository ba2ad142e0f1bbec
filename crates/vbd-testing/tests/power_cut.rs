//! The harness for power cuts, proved on plain files: it calls right what is right, and finds what is wrong.
#![allow(clippy::cast_possible_truncation, reason = "files of tests are small")]

use std::rc::Rc;
use std::sync::Arc;

use vbd_core::file::{Backend, Fault, Options};
use vbd_core::{Channel, Operation, Request};
use vbd_ring::{EngineKind, Op};
use vbd_testing::client::{Ask, Client};
use vbd_testing::power::{Cut, Expected, Load, MemFile, Recording, drive, fill};
use vbd_testing::{Random, seeds};

const SECTORS: u64 = 512;

/// Disks that answer too early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    None,
    /// A flush that does nothing.
    Flush,
    /// A write whose FUA is forgotten.
    Fua,
}

/// A channel with a bug in front of a file.
struct Hasty {
    inner: Rc<dyn Channel>,
    bug: Bug,
}

impl Channel for Hasty {
    fn submit(self: Rc<Self>, mut request: Request) {
        match (self.bug, request.operation) {
            (Bug::Flush, Operation::Flush) => return request.complete(Ok(())),
            (Bug::Fua, _) => request.flags.fua = false,
            _ => {}
        }
        self.inner.clone().submit(request);
    }
}

/// Random requests on a file, and every way and many times of losing the power: the first state that is wrong.
fn first_wrong(seed: u64, bug: Bug, in_memory: bool, depth: usize) -> Option<String> {
    let place = if in_memory { "/dev/shm" } else { env!("CARGO_TARGET_TMPDIR") };
    let dir = tempfile::tempdir_in(place).expect("a directory");
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0; 512 * SECTORS as usize]).expect("a file");
    let recording = Recording::new();
    let recorder = recording.file(std::fs::read(&path).expect("readable"));
    let options = Options { faults: Some(recorder), ..Options::default() };
    let backend = Backend::open(&path, options).expect("openable");
    let client = || {
        let backend = backend.clone();
        Client::new(EngineKind::Auto, move |local| {
            Rc::new(Hasty { inner: backend.channel(local, Arc::new(())), bug })
        })
    };
    let clients = [client(), client()];
    let mut random = Random::new(seed);
    let mut expected = Expected::new(vec![0; SECTORS as usize]);
    drive(&clients, &recording, &mut expected, &mut random, &Load { depth, ..Load::on(0..SECTORS) });
    expected.check_now(&clients[0].read(0, 512 * SECTORS), recording.now()).expect("what was written");
    drop(clients);
    assert!(recording.is_quiet());
    if depth == 1 {
        let everything = recording.crash(recording.now(), Cut::Everything, &mut random).remove(0);
        assert!(everything == std::fs::read(&path).expect("readable"), "the record is the file");
    }
    for _ in 0..150 {
        let at = random.index(recording.now() + 1);
        let cut = *random.one_of(&Cut::ALL);
        let state = recording.crash(at, cut, &mut random).remove(0);
        if let Err(wrong) = expected.check_cut(&state, at) {
            return Some(format!("seed {seed}, {cut:?} at {at}: {wrong}"));
        }
    }
    None
}

#[test]
fn what_was_flushed_is_in_every_state() {
    for seed in seeds(6) {
        assert_eq!(first_wrong(seed, Bug::None, seed % 2 == 0, if seed % 3 == 0 { 1 } else { 8 }), None);
    }
}

#[test]
fn a_flush_that_does_nothing_is_found() {
    for seed in seeds(4) {
        assert!(first_wrong(seed, Bug::Flush, true, 8).is_some(), "seed {seed}");
    }
}

#[test]
fn fua_that_is_forgotten_is_found() {
    let found = seeds(8).into_iter().filter(|seed| first_wrong(*seed, Bug::Fua, true, 8).is_some()).count();
    // The next flush hides it; there are not so many.
    assert!(found > 0);
}

/// A recording of a file of zeroes, and a client of it.
fn recorded(sectors: usize) -> (tempfile::TempDir, Arc<Recording>, Client) {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0; 512 * sectors]).expect("a file");
    let recording = Recording::new();
    let options = Options { faults: Some(recording.file(vec![0; 512 * sectors])), ..Options::default() };
    let client = Client::on_file(EngineKind::Auto, &Backend::open(&path, options).expect("openable"));
    (dir, recording, client)
}

#[test]
fn two_writes_without_a_flush_leave_either_both_or_none() {
    let (_dir, recording, client) = recorded(2);
    client.write(0, vec![1; 512]);
    client.write(512, vec![2; 512]);
    let mut seen = std::collections::BTreeSet::new();
    let mut random = Random::new(1);
    for _ in 0..200 {
        let state = recording.crash(recording.now(), Cut::Some, &mut random).remove(0);
        seen.insert((state[0], state[512]));
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [(0, 0), (0, 2), (1, 0), (1, 2)]);
}

#[test]
fn a_torn_write_changes_whole_sectors() {
    let (_dir, recording, client) = recorded(4);
    client.write(0, vec![9; 2048]);
    let mut seen = std::collections::BTreeSet::new();
    let mut random = Random::new(1);
    for _ in 0..500 {
        let state = recording.crash(recording.now(), Cut::Torn(512), &mut random).remove(0);
        let sectors: Vec<u8> = state.chunks(512).map(|sector| sector[0]).collect();
        assert!(state.chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0])));
        seen.insert(sectors);
    }
    assert_eq!(seen.len(), 16, "any of four sectors");
}

#[test]
fn the_later_of_two_writes_to_one_place_wins_where_both_are_there() {
    let (_dir, recording, client) = recorded(1);
    client.write(0, vec![1; 512]);
    client.write(0, vec![2; 512]);
    let state = |cut| recording.crash(recording.now(), cut, &mut Random::new(1)).remove(0)[0];
    assert_eq!(state(Cut::Everything), 2);
    assert_eq!(state(Cut::Nothing), 0);
}

#[test]
fn what_failed_has_not_happened_and_a_failed_flush_covers_nothing() {
    let (dir, _, _) = recorded(1);
    let path = dir.path().join("disk");
    let recording = Recording::new();
    let recorder = recording.file(vec![0; 512]);
    recorder.set_faults(Some(Arc::new(|op: &Op| matches!(op, Op::Sync).then_some(Fault::Fail(libc::EIO)))));
    let options = Options { faults: Some(recorder.clone()), ..Options::default() };
    let client = Client::on_file(EngineKind::Auto, &Backend::open(&path, options).expect("openable"));
    client.write(0, vec![1; 512]);
    assert!(client.kind(Ask::new(Operation::Flush, 0, 0)).is_some());
    let all_writes = |op: &Op| matches!(op, Op::Write { .. }).then_some(Fault::Fail(libc::ENOSPC));
    recorder.set_faults(Some(Arc::new(all_writes)));
    assert!(client.kind(Ask::write(0, vec![2; 512])).is_some());
    let state = |cut| recording.crash(recording.now(), cut, &mut Random::new(1)).remove(0)[0];
    assert_eq!((state(Cut::Everything), state(Cut::Nothing)), (1, 0));
}

#[test]
fn a_file_in_memory_is_recorded_too_and_fails_when_told() {
    let recording = Recording::new();
    let file = MemFile::new(&recording, vec![0; 512]);
    let mut sector = [0; 512];
    fill(7, 0, &mut sector);
    file.write_at(0, &sector).expect("room");
    file.sync().expect("no fault");
    file.set_len(2048).expect("room");
    file.write_at(1024, &sector).expect("room");
    file.punch(0, 512).expect("room");
    file.fail_after(0, libc::ENOSPC);
    assert_eq!(file.write_at(0, &sector).map_err(|error| error.raw_os_error()), Err(Some(libc::ENOSPC)));
    let mut random = Random::new(3);
    assert_eq!(recording.crash(recording.now(), Cut::Everything, &mut random)[0], file.content());
    assert_eq!(recording.crash(recording.now(), Cut::Nothing, &mut random)[0], sector);
    let mut read = [0; 1024];
    assert_eq!(file.read_at(1536, &mut read), 512, "as many bytes as there are");
}
