//! Bitmaps from one session to the next, and when there is none.

use std::cell::RefCell;
use std::fs::{self, File, FileTimes};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use vbd_core::bitmap::Bitmap;
use vbd_core::track::Tracked;
use vbd_core::{Client, Disk};
use vbd_ring::{Reactor, Settings};

use super::{ATTRIBUTE, Sidecar, list, path_of, reset};
use crate::raw::{Raw, RawOptions};

const SIZE: u64 = 1 << 20;
const BLOCK: u64 = 16 << 10;

/// What is done between two steps.
type Look = Arc<Mutex<dyn FnMut() + Send>>;

static LOOK: Mutex<Option<Look>> = Mutex::new(None);

thread_local! {
    /// Only the test that looks is looked at; its disks are closed on threads of their own, which have that name.
    static LOOKING: RefCell<bool> = const { RefCell::new(false) };
}

pub(super) fn step() {
    let closing = std::thread::current().name() == Some("vbd-close");
    if !closing && !LOOKING.with_borrow(|looking| *looking) {
        return;
    }
    let look = LOOK.lock().unwrap().clone();
    if let Some(look) = look {
        look.lock().unwrap()();
    }
}

fn image(dir: &Path) -> PathBuf {
    let path = dir.join("disk");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    path
}

fn disk(path: &Path) -> Arc<Tracked> {
    Tracked::new(Raw::new(RawOptions::new(path)), Some(Sidecar::new(path)))
}

/// Opens the disk, does this with it, and closes it.
fn with<T>(path: &Path, reactor: &Reactor, work: impl FnOnce(&Client) -> T) -> T {
    let disk = disk(path);
    let client = Client::new(&reactor.handle(), disk.open().unwrap()).unwrap();
    work(&client)
}

fn track(client: &Client) -> &Arc<vbd_core::track::Track> {
    client.session().track().unwrap()
}

fn marked(bitmap: &Bitmap) -> Vec<u64> {
    (0..bitmap.bits()).filter(|block| bitmap.is_marked(block * BLOCK)).collect()
}

fn add(client: &Client, name: &str) {
    track(client).add(name, BLOCK, true).unwrap();
    client.session().keep_bitmaps().unwrap();
}

fn on_disk() -> tempfile::TempDir {
    // Where there are extended attributes, as a rule.
    tempfile::tempdir_in(std::env::current_dir().unwrap()).unwrap()
}

#[test]
fn bitmaps_are_there_in_the_next_session_and_go_with_the_last() {
    let reactor = Reactor::spawn("test", Settings::default()).unwrap();
    for dir in [tempfile::tempdir_in("/dev/shm").unwrap(), on_disk()] {
        let path = image(dir.path());
        with(&path, &reactor, |client| {
            client.write_at(0, &[1; 512]).unwrap();
            add(client, "a");
            track(client).add("fleeting", BLOCK, false).unwrap();
            client.write_at(BLOCK, &[1; 512]).unwrap();
            assert!(list(&path, SIZE).unwrap().in_use);
        });
        let kept = list(&path, SIZE).unwrap();
        assert!(!kept.in_use);
        assert_eq!(kept.bitmaps.len(), 1);
        assert_eq!(marked(&kept.bitmaps[0].bitmap), [1]);
        with(&path, &reactor, |client| {
            client.write_at(3 * BLOCK, &[1; 512]).unwrap();
            add(client, "b");
            track(client).enable("a", false).unwrap();
            client.write_at(5 * BLOCK, &[1; 512]).unwrap();
            client.session().grow(2 * SIZE).unwrap();
            client.write_at(SIZE, &[1; 512]).unwrap();
        });
        with(&path, &reactor, |client| {
            let of = |name: &str| marked(&track(client).bitmap(name).unwrap());
            assert_eq!((of("a"), of("b")), (vec![1, 3], vec![5, 64]));
            assert!(!track(client).list()[0].enabled);
            ["a", "b"].iter().for_each(|name| track(client).remove(name).unwrap());
            client.session().keep_bitmaps().unwrap();
            assert!(!path_of(&path).exists());
        });
        assert!(!path_of(&path).exists());
    }
}

#[test]
fn bitmaps_of_another_image_or_of_before_are_refused_until_reset() {
    let reactor = Reactor::spawn("test", Settings::default()).unwrap();
    let dir = on_disk();
    let path = image(dir.path());
    with(&path, &reactor, |client| add(client, "a"));
    let refused = |why: &str, size: u64| {
        let error = list(&path, size).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains("vbd bitmap reset"), "{error}");
        // Served all the same, without them; and nobody writes over them unasked.
        with(&path, &reactor, |client| {
            assert!(track(client).list().is_empty());
            track(client).add("b", BLOCK, true).unwrap();
            let error = client.session().keep_bitmaps().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        });
        reset(&path, size).unwrap();
        with(&path, &reactor, |client| {
            let all = track(client).bitmap("a").unwrap();
            assert_eq!(all.count(), all.bits());
            track(client).clear("a").unwrap();
        });
        assert!(marked(&list(&path, size).unwrap().bitmaps[0].bitmap).is_empty());
    };
    // Written to by something else.
    File::options().write(true).open(&path).unwrap().write_all_at(&[1], 0).unwrap();
    refused("was changed by something else", SIZE);
    // Larger.
    File::options().write(true).open(&path).unwrap().set_len(2 * SIZE).unwrap();
    refused("had 1048576 bytes", 2 * SIZE);
    // Another file, and where there are attributes one that has bitmaps of its own.
    let other = dir.path().join("other");
    fs::copy(&path, &other).unwrap();
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    File::open(&other).unwrap().set_times(FileTimes::new().set_modified(modified)).unwrap();
    let _ = rustix::fs::setxattr(&other, ATTRIBUTE, &[1; 24], rustix::fs::XattrFlags::empty());
    fs::rename(&other, &path).unwrap();
    refused("belongs to another", 2 * SIZE);
    // The bitmaps of an earlier generation come back.
    let early = fs::read(path_of(&path)).unwrap();
    with(&path, &reactor, |client| client.write_at(0, &[1; 512]).unwrap());
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(path_of(&path), &early).unwrap();
    assert!(list(&path, 2 * SIZE).is_err(), "{modified:?}");
    // No file of bitmaps at all.
    fs::write(path_of(&path), "something").unwrap();
    let error = list(&path, 2 * SIZE).unwrap_err().to_string();
    assert!(error.contains("is no file of bitmaps"), "{error}");
    fs::remove_file(path_of(&path)).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", path_of(&path)).unwrap();
    assert!(list(&path, 2 * SIZE).is_err(), "a link leads nowhere");
}

/// A state that the power may leave the files in.
struct Crash {
    image: Vec<u8>,
    modified: SystemTime,
    attribute: Option<Vec<u8>>,
    sidecar: Option<Vec<u8>>,
    draft: Option<Vec<u8>>,
}

fn now(path: &Path) -> Crash {
    let mut bytes = [0; 64];
    let len = rustix::fs::getxattr(path, ATTRIBUTE, &mut bytes).ok();
    Crash {
        image: fs::read(path).unwrap(),
        modified: fs::metadata(path).unwrap().modified().unwrap(),
        attribute: len.map(|len| bytes[..len].to_vec()),
        sidecar: fs::read(path_of(path)).ok(),
        draft: fs::read(path.with_file_name("disk.vbd-bitmaps.new")).ok(),
    }
}

fn put(crash: &Crash, image: &[u8], modified: SystemTime, path: &Path) {
    let _ = fs::remove_file(path_of(path));
    fs::write(path, image).unwrap();
    if let Some(attribute) = &crash.attribute {
        rustix::fs::setxattr(path, ATTRIBUTE, attribute, rustix::fs::XattrFlags::empty()).unwrap();
    }
    if let Some(sidecar) = &crash.sidecar {
        fs::write(path_of(path), sidecar).unwrap();
    }
    if let Some(draft) = &crash.draft {
        fs::write(path.with_file_name("disk.vbd-bitmaps.new"), draft).unwrap();
    }
    File::open(path).unwrap().set_times(FileTimes::new().set_modified(modified)).unwrap();
}

/// The power fails between any two steps, with the guest's last writes there or not, and the time of the last change of
/// now or of the last close. What the bitmap then calls clean is what it was when it began.
#[test]
fn a_power_cut_never_makes_a_changed_block_clean() {
    let reactor = Reactor::spawn("test", Settings::default()).unwrap();
    for dir in [tempfile::tempdir_in("/dev/shm").unwrap(), on_disk()] {
        let path = image(dir.path());
        let crashes = Arc::new(Mutex::new(Vec::new()));
        let look: Look = {
            let (crashes, path) = (crashes.clone(), path.clone());
            Arc::new(Mutex::new(move || crashes.lock().unwrap().push(now(&path))))
        };
        *LOOK.lock().unwrap() = Some(look);
        LOOKING.set(true);
        // What the image was when the bitmap began.
        let base = vec![0; usize::try_from(SIZE).unwrap()];
        with(&path, &reactor, |client| add(client, "a"));
        let closed = fs::metadata(&path).unwrap().modified().unwrap();
        for round in 0..3u64 {
            with(&path, &reactor, |client| {
                step();
                for block in [round, round + 7] {
                    client.write_at(block * BLOCK + 512, &[1; 512]).unwrap();
                    step();
                }
                if round == 1 {
                    add(client, "b");
                    client.write_at(30 * BLOCK, &[1; 512]).unwrap();
                }
                step();
            });
            step();
        }
        LOOKING.set(false);
        *LOOK.lock().unwrap() = None;
        let crashes = std::mem::take(&mut *crashes.lock().unwrap());
        assert!(crashes.len() > 40, "{}", crashes.len());
        let (mut exact, mut refused) = (0, 0);
        let other = tempfile::tempdir_in(dir.path()).unwrap();
        let path = image(other.path());
        for (number, crash) in crashes.iter().enumerate() {
            // Data that was not flushed is there in part: the next states' writes are those that may be.
            let later = &crashes[(number + 1).min(crashes.len() - 1)];
            for content in [&crash.image, &later.image] {
                // Files were flushed before bitmaps said that they fit; times of change in between may be lost.
                for modified in [crash.modified, closed] {
                    put(crash, content, modified, &path);
                    let disk = disk(&path);
                    let session = disk.open().unwrap();
                    let Ok(bitmap) = session.track().unwrap().bitmap("a") else {
                        refused += 1;
                        continue;
                    };
                    for block in 0..SIZE / BLOCK {
                        let at = usize::try_from(block * BLOCK).unwrap()
                            ..usize::try_from((block + 1) * BLOCK).unwrap();
                        let same = content[at.clone()] == base[at];
                        assert!(same || bitmap.is_marked(block * BLOCK), "state {number}, block {block}");
                    }
                    exact += u64::from(bitmap.count() < bitmap.bits());
                }
            }
        }
        assert!(exact > 0 && refused < crashes.len(), "{exact} exact, {refused} refused");
    }
}
