//! A filesystem of one file that does what no disk at hand does: the kernel's FUSE protocol (`linux/fuse.h`, 7.31),
//! mounted over a file.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// The file's size in bytes, and what it is full of.
const SIZE: u64 = 1 << 20;
pub(crate) const OLD: u8 = 9;

const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const GETLK: u32 = 31;
const SETLKW: u32 = 33;
const INTERRUPT: u32 = 36;
const FALLOCATE: u32 = 43;
const BATCH_FORGET: u32 = 42;

/// In the answer to INIT: locks are the filesystem's own to give. Without it the kernel keeps them.
const POSIX_LOCKS: u32 = 1 << 1;

/// How the file behaves.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    /// Every question about locks is answered with this errno, as on a network share whose server has none.
    NoLocks(i32),
    /// Writes and holes wait until [`OneFile::let_writes_land`], as on storage that hangs.
    Hangs,
}

/// What the file has in it, and whether more may come.
#[derive(Default)]
struct State {
    contents: Mutex<Contents>,
    changed: Condvar,
}

#[derive(Default)]
struct Contents {
    bytes: Vec<u8>,
    /// Writes and holes that have come so far.
    begun: usize,
    may_land: bool,
}

/// The mount, until dropped. Only the thread that made it, and those it starts, see it.
pub(crate) struct OneFile {
    path: PathBuf,
    state: Arc<State>,
    _directory: tempfile::TempDir,
}

impl OneFile {
    /// None where this machine or user cannot mount.
    pub(crate) fn mount(manner: Manner) -> Option<OneFile> {
        let device = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(device) if rustix::process::geteuid().is_root() => device,
            _ => {
                eprintln!("skipped: mounting wants root and /dev/fuse");
                return None;
            }
        };
        // SAFETY: no memory is involved; the other threads keep their mounts.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0, "{}", std::io::Error::last_os_error());
        mount("none", Path::new("/"), "", libc::MS_REC | libc::MS_PRIVATE, "");
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("vm.img");
        File::create(&path).expect("a file to mount over");
        let options = format!("fd={},rootmode=100644,user_id=0,group_id=0", device.as_raw_fd());
        mount("vbd-test", &path, "fuse", libc::MS_NOSUID | libc::MS_NODEV, &options);
        let state = Arc::new(State::default());
        state.contents.lock().expect("whole").bytes = vec![OLD; usize::try_from(SIZE).expect("small")];
        let inside = state.clone();
        std::thread::spawn(move || serve(&Arc::new(device), manner, &inside));
        Some(OneFile { path, state, _directory: directory })
    }

    /// Waits until a change has come, which then hangs.
    pub(crate) fn wait_for_a_change(&self) {
        let begun = |contents: &mut Contents| contents.begun == 0;
        drop(
            self.state.changed.wait_while(self.state.contents.lock().expect("whole"), begun).expect("whole"),
        );
    }

    /// Lets writes go on.
    pub(crate) fn let_writes_land(&self) {
        self.state.contents.lock().unwrap_or_else(PoisonError::into_inner).may_land = true;
        self.state.changed.notify_all();
    }

    /// The byte that has landed at an offset.
    pub(crate) fn byte_at(&self, offset: usize) -> u8 {
        self.state.contents.lock().expect("whole").bytes[offset]
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for OneFile {
    fn drop(&mut self) {
        // Whatever a failed test has left in the kernel.
        self.let_writes_land();
        let path = CString::new(self.path.as_os_str().as_bytes()).expect("no NUL");
        // SAFETY: the path lives across the call.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    }
}

fn mount(source: &str, target: &Path, kind: &str, flags: libc::c_ulong, options: &str) {
    let [source, kind, options] = [source, kind, options].map(|text| CString::new(text).expect("no NUL"));
    let target = CString::new(target.as_os_str().as_bytes()).expect("no NUL");
    let (source, kind, options) = (source.as_ptr(), kind.as_ptr(), options.as_ptr().cast());
    // SAFETY: the strings live across the call.
    let result = unsafe { libc::mount(source, target.as_ptr(), kind, flags, options) };
    assert_eq!(result, 0, "mount: {}", std::io::Error::last_os_error());
}

/// Answers the kernel until the mount is gone.
fn serve(device: &Arc<File>, manner: Manner, state: &Arc<State>) {
    let mut request = vec![0; 1 << 20];
    while let Ok(len) = (&**device).read(&mut request) {
        assert!(len >= 40, "a request has a header");
        let opcode = u32::from_ne_bytes(request[4..8].try_into().expect("four bytes"));
        let unique = u64::from_ne_bytes(request[8..16].try_into().expect("eight bytes"));
        let body = &request[40..len];
        let answer = match (opcode, manner) {
            (FORGET | BATCH_FORGET | INTERRUPT, _) => continue,
            (WRITE | FALLOCATE, _) => {
                // Others go on meanwhile.
                let (device, state, body) = (device.clone(), state.clone(), body.to_vec());
                std::thread::spawn(move || reply(&device, unique, Ok(state.change(opcode, &body))));
                continue;
            }
            (INIT, _) => Ok(init(manner)),
            (GETATTR, _) => Ok([words(&[1, 0]), attributes()].concat()),
            (OPEN, _) => Ok(vec![0; 16]),
            (READ, _) => Ok(state.read(body)),
            (STATFS, _) => Ok(vec![0; 80]),
            (RELEASE | FLUSH, _) => Ok(Vec::new()),
            (GETLK..=SETLKW, Manner::NoLocks(errno)) => Err(errno),
            _ => Err(libc::ENOSYS),
        };
        reply(device, unique, answer);
    }
}

fn reply(mut device: &File, unique: u64, answer: Result<Vec<u8>, i32>) {
    let (error, body) = answer.map_or_else(|errno| (-errno, Vec::new()), |body| (0, body));
    let len = u32::try_from(16 + body.len()).expect("small");
    let answer = [&len.to_ne_bytes()[..], &error.to_ne_bytes(), &unique.to_ne_bytes(), &body].concat();
    // Whoever asked may have been interrupted, or the mount be gone, as the next read tells.
    let _ = device.write_all(&answer);
}

/// Offset and length of `struct fuse_read_in` and `fuse_write_in`, after the file's handle.
fn range(body: &[u8]) -> std::ops::Range<usize> {
    let offset = u64::from_ne_bytes(body[8..16].try_into().expect("eight bytes"));
    let len = u32::from_ne_bytes(body[16..20].try_into().expect("four bytes"));
    let start = usize::try_from(offset).expect("small");
    start..start + usize::try_from(len).expect("small")
}

impl State {
    fn read(&self, body: &[u8]) -> Vec<u8> {
        let range = range(body);
        let contents = self.contents.lock().expect("whole");
        let end = range.end.min(contents.bytes.len());
        contents.bytes[range.start.min(end)..end].to_vec()
    }

    /// A write, or a hole, when it may land.
    fn change(&self, opcode: u32, body: &[u8]) -> Vec<u8> {
        // The lower half of a hole's length is where a write has its own.
        let range = range(body);
        let mut contents = self.contents.lock().expect("whole");
        contents.begun += 1;
        self.changed.notify_all();
        let mut contents = self.changed.wait_while(contents, |contents| !contents.may_land).expect("whole");
        if opcode == FALLOCATE {
            contents.bytes[range].fill(0);
            return Vec::new();
        }
        let len = u32::try_from(range.len()).expect("small");
        contents.bytes[range].copy_from_slice(&body[40..]);
        [len, 0].into_iter().flat_map(u32::to_ne_bytes).collect()
    }
}

/// Version, read-ahead, flags; then the most requests in the background and in congestion, and of bytes in a write.
fn init(manner: Manner) -> Vec<u8> {
    let flags = if matches!(manner, Manner::NoLocks(_)) { POSIX_LOCKS } else { 0 };
    let mut body: Vec<u8> = [7, 31, 0, flags].into_iter().flat_map(u32::to_ne_bytes).collect();
    body.extend([8u16, 8].into_iter().flat_map(u16::to_ne_bytes));
    body.extend(65536u32.to_ne_bytes());
    body.resize(64, 0);
    body
}

/// `struct fuse_attr`: inode, size, blocks, times; then their nanoseconds, mode, links, owner, device, block size.
fn attributes() -> Vec<u8> {
    let mut body = words(&[1, SIZE, SIZE / 512, 0, 0, 0]);
    body.extend([0, 0, 0, 0o100_644u32, 1, 0, 0, 0, 4096, 0].into_iter().flat_map(u32::to_ne_bytes));
    body
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
