//! The raw disk: its session, its lease, its size.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use vbd_core::file::Cache;
use vbd_core::{Disk, ErrorKind, Event};
use vbd_image::raw::{Raw, RawOptions};
use vbd_ring::{Reactor, Settings};

fn disk(size: u64) -> (tempfile::TempDir, RawOptions) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("vm1disk");
    std::fs::File::create(&path).and_then(|file| file.set_len(size)).expect("a file");
    let options = RawOptions { lease_wait: Duration::ZERO, ..RawOptions::new(path) };
    (dir, options)
}

#[test]
fn a_disk_is_named_as_its_file_and_inspected_without_the_lease() {
    let (_dir, options) = disk(1 << 20);
    let one = Raw::new(options.clone());
    let _session = one.open().expect("opened");
    let two = Raw::new(options);
    assert_eq!(two.name(), "vm1disk");
    let (geometry, capabilities) = two.inspect().expect("a look");
    assert_eq!((geometry.size, geometry.block_size), (1 << 20, 512));
    assert!(!capabilities.read_only && capabilities.write_cache && capabilities.grow);
}

#[test]
fn front_ends_share_one_session_and_strangers_get_none() {
    let (_dir, options) = disk(1 << 20);
    let ours = Raw::new(options.clone());
    let first = ours.open().expect("opened");
    let second = ours.open().expect("shared");
    let stranger = Raw::new(options.clone());
    let error = stranger.open().err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains(&format!("{}", std::process::id())), "names the holder: {error}");
    drop(first);
    assert!(stranger.open().is_err());
    drop(second);
    stranger.open().expect("free again");
}

#[test]
fn a_channel_keeps_the_lease_until_it_is_gone() {
    let (_dir, options) = disk(1 << 20);
    let ours = Raw::new(options.clone());
    let reactor = Reactor::spawn("test", Settings::default()).expect("a reactor");
    let (release, wait) = std::sync::mpsc::channel::<()>();
    let (opened, is_open) = std::sync::mpsc::channel();
    let session = ours.open().expect("opened");
    reactor.handle().post(move |local| {
        let channel = session.channel(local).expect("a channel");
        opened.send(()).expect("heard");
        let _ = wait.recv();
        drop(channel);
    });
    is_open.recv().expect("opened");
    let stranger = Raw::new(options);
    assert!(stranger.open().is_err());
    release.send(()).expect("waiting");
    reactor.handle().call(|_| ());
    stranger.open().expect("free again");
}

#[test]
fn readers_share_and_exclude_a_writer() {
    let (_dir, options) = disk(1 << 20);
    let reader = RawOptions { read_only: true, ..options.clone() };
    let (one, two) = (Raw::new(reader.clone()), Raw::new(reader));
    let _sessions = (one.open().expect("first"), two.open().expect("second"));
    assert_eq!(Raw::new(options).open().err().map(|error| error.kind()), Some(ErrorKind::Busy));
    assert!(one.inspect().expect("open").1.read_only);
}

#[test]
fn growing_tells_who_watches_until_they_stop() {
    let (dir, options) = disk(1 << 20);
    let raw = Raw::new(options);
    let session = raw.open().expect("opened");
    let seen: Arc<Mutex<Vec<Event>>> = Arc::default();
    let inside = seen.clone();
    let watch = raw.watch(Box::new(move |event| inside.lock().expect("whole").push(event)));
    session.grow(2 << 20).expect("grown");
    assert_eq!(*seen.lock().expect("whole"), [Event::Resized(2 << 20)]);
    assert_eq!(std::fs::metadata(dir.path().join("vm1disk")).expect("there").len(), 2 << 20);
    drop(watch);
    session.grow(3 << 20).expect("grown");
    assert_eq!(seen.lock().expect("whole").len(), 1);
}

#[test]
fn cache_modes_say_what_they_promise() {
    let (_dir, options) = disk(1 << 20);
    for (cache, write_cache) in [(Cache::None, true), (Cache::Writeback, true), (Cache::Writethrough, false)]
    {
        let raw = Raw::new(RawOptions { cache, ..options.clone() });
        let session = raw.open().expect("opened");
        assert_eq!(session.capabilities().write_cache, write_cache);
        assert_eq!(raw.is_direct() == Some(true), cache == Cache::None || in_memory(&options));
    }
}

fn in_memory(options: &RawOptions) -> bool {
    rustix::fs::statfs(&options.path).is_ok_and(|stat| stat.f_type == 0x0102_1994)
}

/// Whether a buffered read of the file's first page need not wait: the page cache has it.
fn is_cached(file: &std::fs::File) -> bool {
    let mut page = [0u8; 4096];
    let slices = &mut [std::io::IoSliceMut::new(&mut page)];
    rustix::io::preadv2(file, slices, 0, rustix::io::ReadWriteFlags::NOWAIT).is_ok()
}

#[test]
fn the_page_cache_holds_nothing_of_a_disk_that_is_served_past_it() {
    let (_dir, options) = disk(1 << 20);
    let file = std::fs::File::options().read(true).write(true).open(&options.path).expect("open");
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 1 << 20], 0).expect("written");
    file.sync_all().expect("durable");
    assert!(is_cached(&file), "what was just written is cached");
    let raw = Raw::new(RawOptions { cache: Cache::Writeback, ..options.clone() });
    let session = raw.open().expect("opened");
    assert!(is_cached(&file), "where data goes through the page cache it is kept");
    drop(session);
    let raw = Raw::new(options.clone());
    let _session = raw.open().expect("opened");
    let passed_by = raw.is_direct() == Some(true) && !in_memory(&options);
    assert_eq!(is_cached(&file), !passed_by);
}
