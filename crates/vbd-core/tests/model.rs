//! Random operations against a vector of bytes, on every kind of storage and engine.

mod support;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use support::{Ask, Client, file, in_memory, on_disk};
use vbd_core::file::{Backend, Cache, Fault, Options};
use vbd_core::{ErrorKind, ExtentKind, Flags, Operation};
use vbd_ring::{EngineKind, Op};

const SIZE: u64 = 2 << 20;

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
        (Just(start), prop_oneof![1..=most.min(16), 1..=most])
    });
    let piece = prop_oneof![Just(usize::MAX), Just(512), Just(4096), Just(1536)];
    let skew = prop_oneof![6 => Just(0usize), 1 => Just(512), 1 => Just(3)];
    // Bytes that a range is short of whole sectors, at both ends.
    let short = prop_oneof![3 => Just((0, 0)), 1 => (0..256u64, 0..256u64)];
    (operation, range, any::<u8>(), any::<(bool, bool)>(), piece, skew, short).prop_map(
        |(operation, (start, count), seed, (fua, may_unmap), piece, skew, short)| {
            let short = match operation {
                Operation::Discard | Operation::Extents => (0, 0),
                _ => short,
            };
            let (offset, len) = (start * 512 + short.0, count * 512 - short.0 - short.1);
            let fill = |at: u64| seed.wrapping_add(u8::try_from(at / 512 % 251).expect("small")) | 1;
            let data = match operation {
                Operation::Write => (offset..offset + len).map(fill).collect(),
                _ => Vec::new(),
            };
            let flags = Flags { fua, may_unmap, fast_only: false };
            Ask { operation, offset, len, flags, data, piece, skew }
        },
    )
}

/// Runs random operations through two queues and compares every read, and at the end everything.
fn check(backend: &Arc<Backend>, engine: EngineKind, cases: u32) {
    let size = backend.size();
    let clients = [Client::on_file(engine, backend), Client::on_file(engine, backend)];
    let model = std::cell::RefCell::new(clients[0].read(0, size));
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let run = runner.run(&prop::collection::vec(asks(size), 1..12), |asks| {
        let mut model = model.borrow_mut();
        for (index, ask) in asks.into_iter().enumerate() {
            let answer = clients[index % 2].ask(ask.clone());
            answer.result.map_err(|error| TestCaseError::fail(error.to_string()))?;
            let (start, len) =
                (usize::try_from(ask.offset).expect("fits"), usize::try_from(ask.len).expect("fits"));
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
                        let end = at + usize::try_from(extent.len).expect("fits");
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
    run.unwrap_or_else(|error| panic!("{error}"));
    assert!(clients[1].read(0, size) == *model.borrow(), "the end differs");
}

#[test]
fn a_file_on_disk_with_o_direct() {
    let dir = on_disk();
    check(&file(dir.path(), SIZE, Options::default()), EngineKind::Auto, 40);
}

#[test]
fn a_file_on_disk_by_the_thread_pool() {
    let dir = on_disk();
    check(&file(dir.path(), SIZE, Options::default()), EngineKind::Threads, 30);
}

#[test]
fn a_file_through_the_page_cache() {
    let dir = on_disk();
    for cache in [Cache::Writeback, Cache::Writethrough] {
        check(&file(dir.path(), SIZE, Options { cache, ..Options::default() }), EngineKind::Auto, 20);
    }
}

#[test]
fn a_file_in_memory() {
    let dir = in_memory();
    let backend = file(dir.path(), SIZE, Options::default());
    assert!(backend.is_in_memory());
    check(&backend, EngineKind::Auto, 40);
}

#[test]
fn a_file_of_2_gib_and_1_kib_serves_its_tail() {
    let dir = on_disk();
    let backend = file(dir.path(), 2_147_484_672, Options::default());
    let client = Client::on_file(EngineKind::Auto, &backend);
    assert_eq!(backend.size(), 2_147_484_672);
    client.write(2_147_484_672 - 1024, vec![7; 1024]);
    assert_eq!(client.read(2_147_484_672 - 1536, 1536), [vec![0; 512], vec![7; 1024]].concat());
    let beyond = Ask::new(Operation::Read, 2_147_484_672 - 512, 1024);
    assert_eq!(client.kind(beyond), Some(ErrorKind::OutOfRange));
}

#[test]
fn a_partial_last_sector_is_served_whole() {
    for dir in [on_disk(), in_memory()] {
        let backend = file(dir.path(), 8192 + 100, Options::default());
        assert_eq!(backend.size(), 8192 + 512);
        check(&backend, EngineKind::Auto, 30);
    }
}

/// A loop device with blocks of 4 KiB, and a filesystem on it: storage that wants more than a sector.
struct LoopOf4K {
    device: String,
    mounted: Option<std::path::PathBuf>,
    dir: tempfile::TempDir,
}

impl LoopOf4K {
    fn new(mount: bool) -> Self {
        let dir = on_disk();
        let image = dir.path().join("image");
        std::fs::File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("an image");
        let device = run("losetup", &["-b", "4096", "--show", "-f", text(&image)]);
        let mut this = LoopOf4K { device: device.trim().to_owned(), mounted: None, dir };
        if mount {
            run("mke2fs", &["-q", "-F", "-t", "ext4", &this.device]);
            let point = this.dir.path().join("mnt");
            std::fs::create_dir(&point).expect("a mount point");
            run("mount", &[&this.device, text(&point)]);
            this.mounted = Some(point);
        }
        this
    }
}

impl Drop for LoopOf4K {
    fn drop(&mut self) {
        if let Some(point) = &self.mounted {
            run("umount", &[text(point)]);
        }
        run("losetup", &["-d", &self.device]);
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("plain")
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("installed");
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Loop devices need root and are missing in some containers; nothing else is skipped there.
fn has_loop_devices() -> bool {
    let has = rustix::process::geteuid().is_root()
        && Command::new("losetup").arg("-f").output().is_ok_and(|output| output.status.success());
    if !has {
        eprintln!("skipped: no loop devices here");
    }
    has
}

#[test]
fn sectors_on_storage_that_wants_4_kib() {
    if !has_loop_devices() {
        return;
    }
    let storage = LoopOf4K::new(true);
    for len in [SIZE, SIZE + 512, SIZE + 1024 + 100] {
        let dir = storage.mounted.as_deref().expect("mounted");
        let backend = file(dir, len, Options::default());
        assert_eq!(backend.alignment().offset, 4096);
        check(&backend, EngineKind::Auto, 20);
    }
    check(
        &file(storage.mounted.as_deref().expect("mounted"), SIZE, Options::default()),
        EngineKind::Threads,
        10,
    );
}

#[test]
fn a_block_device_that_wants_4_kib() {
    if !has_loop_devices() {
        return;
    }
    let storage = LoopOf4K::new(false);
    let device = Path::new(&storage.device);
    let backend = Backend::open(device, Options::default()).expect("openable");
    assert!(backend.is_block_device());
    let refused = Backend::open(device, Options::default()).err().map(|error| error.kind());
    assert_eq!(refused, Some(ErrorKind::Busy), "a second writer gets in");
    let client = Client::on_file(EngineKind::Auto, &backend);
    client.write(512, vec![1; 512]);
    client.write(8192, vec![2; 8192]);
    assert_eq!(client.read(0, 1536), [vec![0; 512], vec![1; 512], vec![0; 512]].concat());
    let zeroes = Ask::new(Operation::WriteZeroes, 8704, 4096);
    client.ask(zeroes).result.expect("zeroed");
    assert_eq!(client.read(8192, 8192), [vec![2; 512], vec![0; 4096], vec![2; 3584]].concat());
    check_small(&backend);
}

fn check_small(backend: &Arc<Backend>) {
    let client = Client::on_file(EngineKind::Auto, backend);
    client.ask(Ask::new(Operation::Discard, 0, 1 << 20)).result.expect("discarded");
    client.ask(Ask::new(Operation::Flush, 0, 0)).result.expect("flushed");
}

/// Neighbouring sectors of one block are written at once by several queues: none may take another's bytes back.
#[test]
fn read_modify_write_excludes_overlapping_writes_of_other_queues() {
    if !has_loop_devices() {
        return;
    }
    let storage = LoopOf4K::new(true);
    let backend = file(storage.mounted.as_deref().expect("mounted"), SIZE, Options::default());
    std::thread::scope(|scope| {
        for queue in 0..4u64 {
            let backend = &backend;
            scope.spawn(move || {
                let client = Client::on_file(EngineKind::Auto, backend);
                for round in 1..60u8 {
                    // Two sectors of each of two blocks, in flight together with everybody else's.
                    let at = [queue * 1024, 4096 + queue * 1024];
                    let waits: Vec<_> =
                        at.iter().map(|at| client.submit(Ask::write(*at, vec![round; 1024]))).collect();
                    waits
                        .into_iter()
                        .for_each(|wait| wait.recv().expect("an answer").result.expect("written"));
                    assert_eq!(client.read(at[0], 1024), vec![round; 1024]);
                    assert_eq!(client.read(at[1], 1024), vec![round; 1024]);
                }
            });
        }
    });
    let client = Client::on_file(EngineKind::Auto, &backend);
    assert_eq!(client.read(0, 8192), vec![59; 8192]);
}

/// One queue writes whole sectors, and another parts of the same ones: where locks are only taken once there is a part,
/// those that were under way without must be waited for.
#[test]
fn parts_of_sectors_do_not_undo_whole_ones_of_other_queues() {
    for round in 0..30u8 {
        // A new disk every time, on which no write takes a lock yet.
        let dir = on_disk();
        let backend = file(dir.path(), SIZE, Options::default());
        std::thread::scope(|scope| {
            let whole = scope.spawn(|| {
                let client = Client::on_file(EngineKind::Auto, &backend);
                for count in 1..40u8 {
                    let writes = [512, 1024].map(|at| client.submit(Ask::write(at, vec![count; 512])));
                    for wait in writes {
                        wait.recv().expect("an answer").result.expect("written");
                    }
                    // Nobody else writes these bytes.
                    assert_eq!(client.read(600, 824), vec![count; 824], "round {round}");
                }
            });
            let part = scope.spawn(|| {
                let client = Client::on_file(EngineKind::Auto, &backend);
                for count in 100..140u8 {
                    let writes = [(505, 40), (1510, 40)]
                        .map(|(at, len)| client.submit(Ask::write(at, vec![count; len])));
                    for wait in writes {
                        wait.recv().expect("an answer").result.expect("written");
                    }
                    // Beyond what the other writes.
                    assert_eq!(client.read(505, 7), vec![count; 7]);
                    assert_eq!(client.read(1536, 14), vec![count; 14]);
                }
            });
            whole.join().expect("no assertion failed");
            part.join().expect("no assertion failed");
        });
    }
}

/// The first write of a part waits for whole ones that are under way without a lock.
#[test]
fn the_first_part_waits_for_whole_writes_without_a_lock() {
    let (entered, inside) = std::sync::mpsc::channel();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (entered, wait) = (std::sync::Mutex::new(entered), std::sync::Mutex::new(wait));
    let held = std::sync::Mutex::new(false);
    let faults = move |op: &Op| {
        // The first, whole write, on its way to the kernel, is held up there.
        if matches!(op, Op::Write { .. }) && !std::mem::replace(&mut *held.lock().expect("whole"), true) {
            entered.lock().expect("whole").send(()).expect("awaited");
            wait.lock().expect("whole").recv().expect("told");
        }
        None
    };
    let dir = on_disk();
    let options = Options { faults: Some(Arc::new(faults)), ..Options::default() };
    let backend = file(dir.path(), SIZE, options);
    if !backend.is_direct() {
        return;
    }
    let [one, two] = [0, 1].map(|_| Client::on_file(EngineKind::Auto, &backend));
    let whole = one.submit(Ask::write(4096, vec![1; 4096]));
    inside.recv().expect("under way");
    let part = two.submit(Ask::write(4100, vec![2; 10]));
    let early = part.recv_timeout(std::time::Duration::from_millis(50));
    go.send(()).expect("waited for");
    assert!(early.is_err(), "the part did not wait");
    whole.recv().expect("an answer").result.expect("written");
    part.recv().expect("an answer").result.expect("written");
    assert_eq!(one.read(4096, 16), [vec![1; 4], vec![2; 10], vec![1; 2]].concat());
}

#[test]
fn a_discard_gives_space_back_and_zeroes_keep_or_give_it() {
    let dir = on_disk();
    let backend = file(dir.path(), SIZE, Options::default());
    let client = Client::on_file(EngineKind::Auto, &backend);
    let allocated = || std::fs::metadata(dir.path().join("disk")).expect("there").blocks() * 512;
    client.write(0, vec![1; 1 << 20]);
    client.ask(Ask::new(Operation::Flush, 0, 0)).result.expect("flushed");
    assert!(allocated() >= 1 << 20);
    let mut zeroes = Ask::new(Operation::WriteZeroes, 0, 512 << 10);
    client.ask(zeroes.clone()).result.expect("zeroed");
    assert!(allocated() >= 1 << 20, "zeroes that may not unmap keep their space");
    zeroes.flags.may_unmap = true;
    client.ask(zeroes).result.expect("zeroed");
    assert!(allocated() <= 600 << 10);
    client.ask(Ask::new(Operation::Discard, 0, SIZE)).result.expect("discarded");
    assert!(allocated() <= 64 << 10);
}

#[test]
fn growing_reaches_channels_that_are_open() {
    for dir in [on_disk(), in_memory()] {
        let backend = file(dir.path(), 4096 + 512, Options::default());
        let client = Client::on_file(EngineKind::Auto, &backend);
        client.write(4096, vec![9; 512]);
        assert_eq!(client.kind(Ask::new(Operation::Read, 8192, 512)), Some(ErrorKind::OutOfRange));
        backend.grow(16384).expect("grown");
        client.write(8192, vec![8; 8192]);
        assert_eq!(client.read(4096, 1024), [vec![9; 512], vec![0; 512]].concat());
        for bad in [8192, 16384 + 100] {
            assert_eq!(backend.grow(bad).expect_err("refused").kind(), ErrorKind::Unsupported);
        }
    }
}

#[test]
fn requests_beyond_the_limits_of_one_call_are_split() {
    let dir = in_memory();
    let backend = file(dir.path(), 4 << 20, Options::default());
    // As the slow path sees it: more pieces than one call takes.
    let client = Client::on_file(EngineKind::Auto, &backend);
    let data: Vec<u8> = (0..2u32 << 20).map(|at| u8::try_from(at / 512 % 255).expect("small")).collect();
    let write = Ask { piece: 512, ..Ask::write(512, data.clone()) };
    client.ask(write).result.expect("written");
    let read = client.ask(Ask { piece: 512, ..Ask::new(Operation::Read, 512, 2 << 20) });
    read.result.expect("read");
    assert!(read.data == data);
}

#[test]
fn a_long_request_in_memory_is_cut_so_that_others_have_their_turn() {
    let dir = in_memory();
    let backend = file(dir.path(), 16 << 20, Options::default());
    let client = Client::on_file(EngineKind::Auto, &backend);
    let data: Vec<u8> = (0..11u32 << 20).map(|at| u8::try_from(at / 512 % 253).expect("small")).collect();
    client.write(1 << 20, data.clone());
    assert!(client.read(1 << 20, 11 << 20) == data);
}

#[test]
fn a_request_beyond_2_gib_is_split() {
    struct Done(std::sync::mpsc::Sender<(Option<String>, Vec<u8>)>);
    impl vbd_core::Sink for Done {
        fn complete(self: std::rc::Rc<Self>, request: vbd_core::Request, result: vbd_core::Result<()>) {
            let last = request.memory.last().expect("a piece");
            let end = last.iov_base.cast::<u8>().wrapping_add(last.iov_len - 512);
            // SAFETY: in the buffer that the request's guard keeps.
            let sector = unsafe { std::slice::from_raw_parts(end, 512) }.to_vec();
            let _ = self.0.send((result.err().map(|error| error.to_string()), sector));
        }
    }
    let dir = on_disk();
    let size = 5 << 29;
    let backend = file(dir.path(), size, Options::default());
    let client = Client::on_file(EngineKind::Auto, &backend);
    client.write(size - 512, vec![4; 512]);
    let (done, answer) = std::sync::mpsc::channel();
    client.handle().post(move |local| {
        // One buffer for all pieces: what counts is where the last bytes come from.
        let mut memory = vec![0u8; (32 << 20) + 4096];
        let base = memory.as_mut_ptr().wrapping_add(memory.as_ptr().align_offset(4096));
        let mut request =
            vbd_core::Request::new(Operation::Read, 0, size, local.now(), std::rc::Rc::new(Done(done)));
        request.memory = vec![vbd_core::IoVec { iov_base: base.cast(), iov_len: 32 << 20 }; 80];
        request.guard = Some(Arc::new(memory));
        support::channel_of_this_thread().submit(request);
    });
    assert_eq!(answer.recv().expect("an answer"), (None, vec![4; 512]));
}

#[test]
fn what_the_guest_gets_wrong_is_refused() {
    let dir = in_memory();
    let backend = file(dir.path(), SIZE, Options::default());
    let client = Client::on_file(EngineKind::Auto, &backend);
    for (offset, len) in [(SIZE, 512), (SIZE - 512, 1024), (u64::MAX - 511, 512), (SIZE - 100, 200)] {
        for operation in [Operation::Read, Operation::Discard, Operation::WriteZeroes, Operation::Extents] {
            let len = if operation == Operation::Read { len.min(4096) } else { len };
            let kind = client.kind(Ask::new(operation, offset, len));
            assert_eq!(kind, Some(ErrorKind::OutOfRange), "{operation} of {len} at {offset}");
        }
    }
    let read_only = Options { read_only: true, ..Options::default() };
    let backend = Backend::open(&dir.path().join("disk"), read_only).expect("openable");
    let client = Client::on_file(EngineKind::Auto, &backend);
    assert_eq!(client.kind(Ask::write(0, vec![0; 512])), Some(ErrorKind::ReadOnly));
    assert_eq!(client.kind(Ask::new(Operation::Discard, 0, 512)), Some(ErrorKind::ReadOnly));
}

/// Faults of every sort, seldom enough that retries get through: contents stay right all the same.
#[test]
fn interruptions_and_short_transfers_are_continued() {
    // O_DIRECT moves whole sectors; memory any number of bytes.
    for (dir, shortest) in [(on_disk(), 512), (in_memory(), 1)] {
        let count = std::sync::atomic::AtomicU64::new(0);
        let faults = move |op: &Op| {
            let count = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            match count % 7 {
                1 => Some(Fault::Fail(libc::EINTR)),
                3 => Some(Fault::Fail(libc::EAGAIN)),
                5 if matches!(op, Op::Read { .. } | Op::Write { .. }) => Some(Fault::Short(1024)),
                6 if matches!(op, Op::Read { .. } | Op::Write { .. }) => Some(Fault::Short(shortest)),
                _ => None,
            }
        };
        let faults = move |op: &Op| if matches!(op, Op::Sync) { None } else { faults(op) };
        let backend =
            file(dir.path(), SIZE, Options { faults: Some(Arc::new(faults)), ..Options::default() });
        check(&backend, EngineKind::Auto, 20);
    }
}

#[test]
fn errors_of_the_storage_reach_the_guest_with_their_kind() {
    let cases = [
        (libc::EIO, ErrorKind::Io),
        (libc::ENOSPC, ErrorKind::NoSpace),
        (libc::EDQUOT, ErrorKind::NoSpace),
        (libc::ECANCELED, ErrorKind::Cancelled),
        (libc::EINVAL, ErrorKind::Io),
    ];
    for (errno, kind) in cases {
        for dir in [on_disk(), in_memory()] {
            let faults = move |_: &Op| Some(Fault::Fail(errno));
            let options = Options { faults: Some(Arc::new(faults)), ..Options::default() };
            let client = Client::on_file(EngineKind::Auto, &file(dir.path(), SIZE, options));
            let slow_read = Ask { skew: 3, ..Ask::new(Operation::Read, 512, 4096) };
            let slow_write = Ask { skew: 3, ..Ask::write(512, vec![1; 4096]) };
            let zeroes = Ask::new(Operation::WriteZeroes, 512, 8192);
            let read = Ask::new(Operation::Read, 0, 4096);
            let part = Ask::write(100, vec![1; 5]);
            for ask in [read, slow_read, Ask::write(0, vec![1; 4096]), slow_write, zeroes, part] {
                let what = format!("{} with errno {errno}", ask.operation);
                assert_eq!(client.kind(ask), Some(kind), "{what}");
            }
            assert_eq!(client.kind(Ask::new(Operation::Discard, 0, 8192)), Some(kind));
        }
    }
}

/// A part of a sector is read, changed and written: where the read fails, nothing is written.
#[test]
fn a_part_whose_sector_cannot_be_read_is_not_written() {
    let dir = on_disk();
    let faults = |op: &Op| matches!(op, Op::Read { .. }).then_some(Fault::Fail(libc::EIO));
    let options = Options { faults: Some(Arc::new(faults)), ..Options::default() };
    let backend = file(dir.path(), SIZE, options);
    let client = Client::on_file(EngineKind::Auto, &backend);
    let fails = client.kind(Ask::write(100, vec![1; 5]));
    assert_eq!(fails, backend.is_direct().then_some(ErrorKind::Io));
    let file = std::fs::read(dir.path().join("disk")).expect("readable");
    assert!(!backend.is_direct() || file.iter().all(|byte| *byte == 0));
}

/// Zeroes that fail while they have their blocks locked let those in who wait for them, on every queue.
#[test]
fn zeroes_that_fail_give_their_blocks_back() {
    let (entered, inside) = std::sync::mpsc::channel();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (entered, wait) = (std::sync::Mutex::new(entered), std::sync::Mutex::new(wait));
    let faults = move |op: &Op| {
        matches!(op, Op::Fallocate { .. }).then(|| {
            entered.lock().expect("whole").send(()).expect("awaited");
            wait.lock().expect("whole").recv().expect("told");
            Fault::Fail(libc::EIO)
        })
    };
    let dir = on_disk();
    let options = Options { faults: Some(Arc::new(faults)), ..Options::default() };
    let backend = file(dir.path(), SIZE, options);
    if !backend.is_direct() {
        return;
    }
    let [one, two] = [0, 1].map(|_| Client::on_file(EngineKind::Auto, &backend));
    // Since then every write takes a lock.
    one.write(100, vec![1; 5]);
    let may_unmap = Flags { may_unmap: true, ..Flags::default() };
    // By whole blocks and by parts, which take their locks in other ways.
    for (flags, offset) in [(Flags::default(), 0), (may_unmap, 0), (Flags::default(), 100)] {
        let zeroes = one.submit(Ask { flags, ..Ask::new(Operation::WriteZeroes, offset, 65536) });
        inside.recv_timeout(std::time::Duration::from_secs(60)).expect("under way");
        let (whole, part) =
            (two.submit(Ask::write(8192, vec![3; 4096])), two.submit(Ask::write(8200, vec![4; 10])));
        let early = whole.recv_timeout(std::time::Duration::from_millis(50));
        go.send(()).expect("waited for");
        assert!(early.is_err(), "the zeroes at {offset} have no lock");
        let zeroes = zeroes.recv_timeout(std::time::Duration::from_secs(60)).expect("an answer");
        assert_eq!(zeroes.result.expect_err("failed").kind(), ErrorKind::Io);
        for (waited, what) in [(whole, "whole blocks"), (part, "a part")] {
            let answer = waited.recv_timeout(std::time::Duration::from_secs(60));
            answer
                .unwrap_or_else(|_| panic!("{what} after zeroes at {offset}: no answer"))
                .result
                .expect("written");
        }
        one.write(8192, vec![5; 4096]);
        assert_eq!(two.read(8192, 32), vec![5; 32]);
    }
}

#[test]
fn zeroes_are_written_where_the_filesystem_cannot_make_them() {
    let dir = on_disk();
    let faults = |op: &Op| matches!(op, Op::Fallocate { .. }).then_some(Fault::Fail(libc::EOPNOTSUPP));
    let options = Options { faults: Some(Arc::new(faults)), ..Options::default() };
    let client = Client::on_file(EngineKind::Auto, &file(dir.path(), SIZE, options));
    client.write(0, vec![1; 1 << 20]);
    let fast = Ask {
        flags: Flags { fast_only: true, may_unmap: true, fua: false },
        ..Ask::new(Operation::WriteZeroes, 0, 1 << 20)
    };
    assert_eq!(client.kind(fast.clone()), Some(ErrorKind::Unsupported));
    assert_eq!(client.read(0, 4096), vec![1; 4096], "a refused request does nothing");
    let slow = Ask { flags: Flags { fast_only: false, ..fast.flags }, ..fast };
    client.ask(slow).result.expect("written");
    assert!(client.read(0, 1 << 20).iter().all(|byte| *byte == 0));
    client.ask(Ask::new(Operation::Discard, 0, 1 << 20)).result.expect("advice is not an error");
}

#[test]
fn a_failed_flush_is_never_retried_into_success() {
    let dir = on_disk();
    let once = std::sync::atomic::AtomicBool::new(true);
    let faults = move |op: &Op| {
        let fail = matches!(op, Op::Sync) && once.swap(false, std::sync::atomic::Ordering::SeqCst);
        fail.then_some(Fault::Fail(libc::EIO))
    };
    let backend = file(dir.path(), SIZE, Options { faults: Some(Arc::new(faults)), ..Options::default() });
    let (one, two) =
        (Client::on_file(EngineKind::Auto, &backend), Client::on_file(EngineKind::Auto, &backend));
    one.write(0, vec![1; 512]);
    assert_eq!(one.kind(Ask::new(Operation::Flush, 0, 0)), Some(ErrorKind::Io));
    for client in [&one, &two] {
        assert_eq!(client.kind(Ask::new(Operation::Flush, 0, 0)), Some(ErrorKind::FlushLost));
        let durable =
            Ask { flags: Flags { fua: true, ..Flags::default() }, ..Ask::new(Operation::Discard, 0, 4096) };
        assert_eq!(client.kind(durable), Some(ErrorKind::FlushLost));
    }
    let anew = Backend::open(&dir.path().join("disk"), Options::default()).expect("openable");
    let client = Client::on_file(EngineKind::Auto, &anew);
    client.ask(Ask::new(Operation::Flush, 0, 0)).result.expect("a disk opened anew flushes");
}

#[test]
fn a_file_truncated_under_us_is_an_error_and_not_zeroes() {
    for dir in [on_disk(), in_memory()] {
        let backend = file(dir.path(), SIZE, Options::default());
        let client = Client::on_file(EngineKind::Auto, &backend);
        let outside = std::fs::File::options().write(true).open(dir.path().join("disk")).expect("open");
        outside.set_len(4096).expect("cut");
        assert_eq!(client.kind(Ask::new(Operation::Read, 0, 8192)), Some(ErrorKind::Corrupt));
    }
}

#[test]
fn what_is_no_disk_is_refused() {
    let dir = on_disk();
    let refused =
        |name: &str| Backend::open(&dir.path().join(name), Options::default()).err().expect("refused");
    std::fs::write(dir.path().join("empty"), "").expect("a file");
    std::fs::create_dir(dir.path().join("directory")).expect("a directory");
    for (name, words) in [("missing", "No such file"), ("empty", "is empty"), ("directory", "is a directory")]
    {
        let message = refused(name).to_string();
        assert!(message.contains(words) && message.contains(name), "{message}");
    }
}
