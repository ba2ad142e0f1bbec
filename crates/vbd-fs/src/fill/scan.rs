//! A directory's entries read by several threads into a plan: everything but the content of files.
//!
//! The order in which entries come depends on the threads. What is made of the plan does not: it goes by the names.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{Access, AtFlags};

use super::base::{Base, is_gone, unreadable};
use crate::entry::{Special, Xattr};
use crate::pattern::Patterns;
use crate::plan::{Body, Data, Directory, NodeId, Origin, Plan};
use crate::sys::{self, Stat, View};
use crate::{Error, Progress, Result};

/// How many entries one thread looks at before others may help.
const CHUNK: usize = 512;
/// How often the wish to stop is looked at.
const TICK: Duration = Duration::from_millis(50);

/// What of a directory is not wanted.
pub(crate) struct Unwanted {
    /// Left out with all below.
    pub(crate) exclude: Patterns,
    /// Files and directories (device, inode) that are left out: the image, for one.
    pub(crate) skip: HashSet<(u64, u64)>,
}

/// Work for a thread.
enum Task {
    /// Read a directory's names.
    List(NodeId, PathBuf),
    /// Look at some of them.
    Look(Arc<Open>, Vec<OsString>),
}

/// A directory that is being read.
struct Open {
    node: NodeId,
    path: PathBuf,
    fd: OwnedFd,
}

/// What came of it.
enum Found {
    Entries(NodeId, Vec<Child>),
    Trouble(PathBuf, io::Error),
    /// Its names changed while they were read.
    Changed(PathBuf),
}

struct Child {
    name: OsString,
    stat: Stat,
    xattrs: Vec<Xattr>,
    /// A link's target.
    target: Option<Vec<u8>>,
}

#[derive(Default)]
struct Tasks {
    todo: Vec<Task>,
    /// Those that are waiting, in work, or whose outcome was not taken yet.
    pending: usize,
    closed: bool,
}

/// Where threads take their work from.
struct Queue {
    tasks: Mutex<Tasks>,
    more: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Tasks> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, task: Task) {
        let mut tasks = self.lock();
        tasks.pending += 1;
        tasks.todo.push(task);
        drop(tasks);
        self.more.notify_one();
    }

    fn next(&self) -> Option<Task> {
        let mut tasks = self.lock();
        loop {
            if tasks.closed {
                return None;
            }
            if let Some(task) = tasks.todo.pop() {
                return Some(task);
            }
            tasks = self.more.wait(tasks).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn close(&self) {
        self.lock().closed = true;
        self.more.notify_all();
    }
}

/// Reads the tree below `base` into `plan`; returns lines for the report.
///
/// # Errors
///
/// The entries that cannot be read, all of them; a directory that changes while it is read, where such are not to be
/// taken as they are found.
pub(crate) fn scan(
    base: &Base,
    unwanted: &Unwanted,
    plan: &mut Plan,
    threads: usize,
    progress: &mut dyn Progress,
) -> Result<Vec<String>> {
    let xattrs = sys::xattrs(
        base.open_directory(Path::new("")).map_err(|e| failed(base, &e))?.as_fd(),
        OsStr::new(""),
        View::Kernel,
    );
    plan.set(plan.root(), base.meta(&base.stat), &xattrs.map_err(|e| failed(base, &e))?);
    let queue = Queue { tasks: Mutex::default(), more: Condvar::new() };
    queue.push(Task::List(plan.root(), PathBuf::new()));
    let (sender, receiver) = sync_channel(4 * threads);
    let mut collect =
        Collect { base, plan, links: HashMap::new(), unreadable: Vec::new(), warnings: Vec::new() };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let sender = sender.clone();
            let queue = &queue;
            scope.spawn(move || {
                let worker = Worker { base, unwanted, queue, ordinary: sys::user() != 0, sender };
                while let Some(task) = queue.next() {
                    if !worker.work(task) {
                        break;
                    }
                }
            });
        }
        drop(sender);
        let result = collect.run(&queue, receiver, progress);
        queue.close();
        result
    })?;
    collect.finish()
}

fn failed(base: &Base, error: &io::Error) -> Error {
    base.error(Path::new(""), unreadable(error))
}

/// One of the threads that read.
struct Worker<'a> {
    base: &'a Base,
    unwanted: &'a Unwanted,
    queue: &'a Queue,
    /// Not root, who may read everything.
    ordinary: bool,
    /// What was found, and whether that ends a task.
    sender: SyncSender<(Found, bool)>,
}

impl Worker<'_> {
    /// Does a task; false when nobody wants more.
    fn work(&self, task: Task) -> bool {
        match task {
            Task::List(node, path) => match self.list(node, &path) {
                Ok(found) => self.sender.send((found, true)).is_ok(),
                Err(error) => self.sender.send((Found::Trouble(path, error), true)).is_ok(),
            },
            Task::Look(open, names) => {
                let children = self.look(&open, names);
                self.sender.send((Found::Entries(open.node, children), true)).is_ok()
            }
        }
    }

    fn list(&self, node: NodeId, path: &Path) -> io::Result<Found> {
        let fd = self.base.open_directory(path)?;
        let before = sys::stat_at(fd.as_fd(), OsStr::new(""), View::Kernel)?;
        let mut names = Vec::new();
        let open = Arc::new(Open { node, path: path.to_owned(), fd });
        for entry in rustix::fs::Dir::read_from(&open.fd)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name == b"." || name == b".." {
                continue;
            }
            names.push(OsString::from_vec(name));
            if names.len() == CHUNK {
                self.queue.push(Task::Look(Arc::clone(&open), std::mem::take(&mut names)));
            }
        }
        let children = self.look(&open, names);
        let after = sys::stat_at(open.fd.as_fd(), OsStr::new(""), View::Kernel)?;
        if after.mtime != before.mtime {
            // Nobody to tell: the other end says so when it ends.
            let _ = self.sender.send((Found::Changed(path.to_owned()), false));
        }
        Ok(Found::Entries(node, children))
    }

    fn look(&self, open: &Open, names: Vec<OsString>) -> Vec<Child> {
        let mut children = Vec::with_capacity(names.len());
        for name in names {
            let path = || open.path.join(&name);
            if self.unwanted.exclude.any() && self.unwanted.exclude.matches(&path()) {
                continue;
            }
            match self.child(open, &name) {
                Ok(Some(child)) => children.push(child),
                Ok(None) => {}
                Err(error) => {
                    let _ = self.sender.send((Found::Trouble(path(), error), false));
                }
            }
        }
        children
    }

    fn child(&self, open: &Open, name: &OsStr) -> io::Result<Option<Child>> {
        let directory = open.fd.as_fd();
        let stat = sys::stat_at(directory, name, View::Kernel)?;
        if self.unwanted.skip.contains(&stat.key()) {
            return Ok(None);
        }
        if stat.is_file() && self.ordinary {
            rustix::fs::accessat(directory, name, Access::READ_OK, AtFlags::EACCESS)?;
        }
        let target = stat
            .is_symlink()
            .then(|| rustix::fs::readlinkat(directory, name, Vec::new()).map(|target| target.into_bytes()))
            .transpose()?;
        let xattrs = sys::xattrs(directory, name, View::Kernel)?;
        Ok(Some(Child { name: name.to_owned(), stat, xattrs, target }))
    }
}

/// The thread that fills the plan.
struct Collect<'a> {
    base: &'a Base,
    plan: &'a mut Plan,
    /// The node of each file with several names (device, inode).
    links: HashMap<(u64, u64), NodeId>,
    unreadable: Vec<(PathBuf, String)>,
    warnings: Vec<String>,
}

impl Collect<'_> {
    fn run(
        &mut self,
        queue: &Queue,
        receiver: Receiver<(Found, bool)>,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        while queue.lock().pending > 0 {
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            let (found, done) = match receiver.recv_timeout(TICK) {
                Ok(received) => received,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Stage("a thread that reads the source ended early".to_owned()));
                }
            };
            match found {
                Found::Entries(directory, children) => {
                    for child in children {
                        self.child(directory, child, queue)?;
                    }
                }
                Found::Trouble(path, error) => self.trouble(&path, &error)?,
                Found::Changed(path) => {
                    let what = "entries were made or removed while it was read";
                    self.warnings.push(self.base.changed(&path, what)?);
                }
            }
            if done {
                queue.lock().pending -= 1;
            }
        }
        Ok(())
    }

    fn trouble(&mut self, path: &Path, error: &io::Error) -> Result<()> {
        if is_gone(error) {
            let warning = self.base.changed(path, "it was removed or replaced while it was read")?;
            self.warnings.push(warning);
        } else if self.base.skip_unreadable {
            self.warnings
                .push(format!("{}: left out: cannot be read: {error}", self.base.shown(path).display()));
        } else {
            self.unreadable.push((path.to_owned(), unreadable(error)));
            return Ok(());
        }
        // A directory that is in the plan by its name, and whose content cannot be had.
        let mut node = self.plan.root();
        let mut name = None;
        for part in path {
            let Some(found) = self.plan.lookup(node, part.as_bytes()) else { return Ok(()) };
            node = self.plan.target(found);
            name = Some(found);
        }
        if let Some(name) = name.filter(|_| self.plan.entries(node) == 0) {
            self.plan.unlink(name);
        }
        Ok(())
    }

    fn child(&mut self, directory: NodeId, child: Child, queue: &Queue) -> Result<()> {
        let Child { name, stat, xattrs, target } = child;
        let plan = &mut *self.plan;
        if stat.links > 1
            && !stat.is_dir()
            && let Some(&node) = self.links.get(&stat.key())
        {
            plan.link(directory, name.as_bytes(), node)?;
            return Ok(());
        }
        let rdev = if matches!(stat.kind(), libc::S_IFCHR | libc::S_IFBLK) { stat.rdev } else { 0 };
        let special = |kind| Body::Device { kind, major: libc::major(rdev), minor: libc::minor(rdev) };
        let body = match stat.kind() {
            libc::S_IFDIR => Body::Directory(Directory::default()),
            libc::S_IFLNK => Body::Symlink(plan.add_text(&target.unwrap_or_default())?),
            libc::S_IFREG => Body::File { size: stat.size, data: Data::Hole },
            libc::S_IFCHR => special(Special::Character),
            libc::S_IFBLK => special(Special::Block),
            libc::S_IFIFO => special(Special::Fifo),
            _ => special(Special::Socket),
        };
        let meta = self.base.meta(&stat);
        let (id, node) = plan.add(directory, name.as_bytes(), meta, &xattrs, body)?;
        if stat.links > 1 && !stat.is_dir() {
            self.links.insert(stat.key(), node);
        }
        if stat.is_file() && stat.size > 0 {
            let origin = Origin { name: id, inode: stat.inode, ctime: stat.ctime, stored: stat.stored };
            let origin = plan.add_origin(origin)?;
            if let Some((_, data)) = plan.file_mut(node) {
                *data = Data::Origin(origin);
            }
        }
        // What is mounted there is another tree.
        if stat.is_dir() && stat.device == self.base.stat.device {
            queue.push(Task::List(node, plan.path(id)));
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<String>> {
        if !self.unreadable.is_empty() {
            self.unreadable.sort();
            let base = self.base;
            let all = self.unreadable.iter().map(|(path, reason)| (base.shown(path), reason.clone()));
            return Err(Error::unreadable(all.collect()));
        }
        self.warnings.sort();
        Ok(self.warnings)
    }
}
