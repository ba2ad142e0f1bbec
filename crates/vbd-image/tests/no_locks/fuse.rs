//! A filesystem of one file whose locks fail, as of a network share whose server has none: the kernel's FUSE protocol
//! (`linux/fuse.h`, 7.31), mounted over a file.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The file's size in bytes.
const SIZE: u64 = 1 << 20;

const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const GETLK: u32 = 31;
const SETLKW: u32 = 33;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// In the answer to INIT: locks are the filesystem's own to give.
const POSIX_LOCKS: u32 = 1 << 1;

/// The mount, until dropped. Only the thread that made it, and those it starts, see it.
pub(crate) struct NoLocks {
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl NoLocks {
    /// A file on a filesystem that answers every question about locks with `errno`; none where this machine or user
    /// cannot mount.
    pub(crate) fn mount(errno: i32) -> Option<NoLocks> {
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
        std::thread::spawn(move || serve(device, errno));
        Some(NoLocks { path, _directory: directory })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for NoLocks {
    fn drop(&mut self) {
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
fn serve(mut device: File, errno: i32) {
    let mut request = vec![0; 1 << 20];
    while let Ok(len) = device.read(&mut request) {
        assert!(len >= 40, "a request has a header");
        let opcode = u32::from_ne_bytes(request[4..8].try_into().expect("four bytes"));
        let unique = &request[8..16];
        let answer = match opcode {
            FORGET | BATCH_FORGET | INTERRUPT => continue,
            INIT => Ok(init()),
            GETATTR => Ok([words(&[1, 0]), attributes()].concat()),
            OPEN => Ok(vec![0; 16]),
            STATFS => Ok(vec![0; 80]),
            RELEASE | FLUSH => Ok(Vec::new()),
            GETLK..=SETLKW => Err(errno),
            _ => Err(libc::ENOSYS),
        };
        let (error, body) = answer.map_or_else(|errno| (-errno, Vec::new()), |body| (0, body));
        let len = u32::try_from(16 + body.len()).expect("small");
        let answer = [&len.to_ne_bytes()[..], &error.to_ne_bytes(), unique, &body].concat();
        if device.write_all(&answer).is_err() {
            // Whoever asked has been interrupted, or the mount is gone, as the next read tells.
            continue;
        }
    }
}

/// Version, read-ahead, flags; then the most requests in the background and in congestion, and of bytes in a write.
fn init() -> Vec<u8> {
    let mut body: Vec<u8> = [7, 31, 0, POSIX_LOCKS].into_iter().flat_map(u32::to_ne_bytes).collect();
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
