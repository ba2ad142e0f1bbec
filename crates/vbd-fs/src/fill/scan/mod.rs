//! A directory's entries read by several threads into a plan: everything but the content of files.
//!
//! The order in which entries come depends on the threads. What is made of the plan does not: it goes by the names.

mod look;
mod queue;

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use super::base::{Base, is_gone, unreadable};
use crate::entry::Special;
use crate::pattern::Patterns;
use crate::plan::{Body, Data, Directory, NodeId, Origin, Plan};
use crate::sys::{self, View};
use crate::{Error, Progress, Result};

use look::{Child, Found, Worker};
use queue::{Queue, ROOT, Task};

/// How often the wish to stop is looked at.
const TICK: Duration = Duration::from_millis(50);
/// Bytes of files read early that are kept, so that memory has a limit whatever the tree.
const KEPT: usize = 1 << 30;

/// What of a directory is not wanted.
pub(crate) struct Unwanted {
    /// Left out with all below.
    pub(crate) exclude: Patterns,
    /// Files and directories (device, inode) that are left out: the image, for one.
    pub(crate) skip: HashSet<(u64, u64)>,
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
    let queue = Queue::new(threads, Task::List { number: ROOT, path: PathBuf::new() });
    let (sender, receiver) = sync_channel(4 * threads);
    let nodes = vec![plan.root()];
    let mut collect = Collect {
        base,
        plan,
        nodes,
        links: HashMap::new(),
        kept: 0,
        unreadable: Vec::new(),
        warnings: Vec::new(),
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (sender, queue) = (sender.clone(), &queue);
            scope.spawn(move || Worker::new(base, unwanted, queue, sender).work());
        }
        drop(sender);
        let result = collect.run(receiver, progress);
        queue.close();
        result
    })?;
    if queue.has_failed() {
        return Err(Error::Stage("a thread that reads the source ended early".to_owned()));
    }
    collect.finish()
}

fn failed(base: &Base, error: &io::Error) -> Error {
    base.error(Path::new(""), unreadable(error))
}

/// The thread that fills the plan.
struct Collect<'a> {
    base: &'a Base,
    plan: &'a mut Plan,
    /// By the numbers of directories; the root's for one that did not come yet.
    nodes: Vec<NodeId>,
    /// The node of each file with several names (device, inode).
    links: HashMap<(u64, u64), NodeId>,
    /// Bytes of content that are in the plan.
    kept: usize,
    unreadable: Vec<(PathBuf, String)>,
    warnings: Vec<String>,
}

impl Collect<'_> {
    fn run(&mut self, receiver: Receiver<Found>, progress: &mut dyn Progress) -> Result<()> {
        loop {
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            let mut found = match receiver.recv_timeout(TICK) {
                Ok(found) => found,
                Err(RecvTimeoutError::Timeout) => continue,
                // All threads have ended.
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            for (number, children) in std::mem::take(&mut found.entries) {
                let directory = self.nodes[number as usize];
                for child in children {
                    self.child(directory, child, &found)?;
                }
            }
            for (path, error) in found.trouble {
                self.trouble(&path, &error)?;
            }
            for path in found.changed {
                let what = "entries were made or removed while it was read";
                self.warnings.push(self.base.changed(&path, what)?);
            }
        }
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

    fn child(&mut self, directory: NodeId, child: Child, found: &Found) -> Result<()> {
        let Child { name, stat, xattrs, target, content, number } = child;
        let name = found.text(&name);
        let plan = &mut *self.plan;
        if stat.links > 1
            && !stat.is_dir()
            && let Some(&node) = self.links.get(&stat.key())
        {
            plan.link(directory, name, node)?;
            return Ok(());
        }
        let rdev = if matches!(stat.kind(), libc::S_IFCHR | libc::S_IFBLK) { stat.rdev } else { 0 };
        let special = |kind| Body::Device { kind, major: libc::major(rdev), minor: libc::minor(rdev) };
        let content = content.filter(|content| self.kept + content.len() <= KEPT);
        let held = content.is_some();
        let body = match stat.kind() {
            libc::S_IFDIR => Body::Directory(Directory::default()),
            libc::S_IFLNK => Body::Symlink(plan.add_text(found.text(&target))?),
            libc::S_IFREG => Body::File { size: stat.size, data: content.map_or(Data::Hole, Data::Bytes) },
            libc::S_IFCHR => special(Special::Character),
            libc::S_IFBLK => special(Special::Block),
            libc::S_IFIFO => special(Special::Fifo),
            _ => special(Special::Socket),
        };
        let meta = self.base.meta(&stat);
        let (id, node) = plan.add(directory, name, meta, &xattrs, body)?;
        if stat.links > 1 && !stat.is_dir() {
            self.links.insert(stat.key(), node);
        }
        if held {
            self.kept += usize::try_from(stat.size).unwrap_or(0);
        } else if stat.is_file() && stat.size > 0 {
            let origin = Origin { name: id, inode: stat.inode, ctime: stat.ctime, stored: stat.stored };
            let origin = plan.add_origin(origin)?;
            if let Some((_, data)) = plan.file_mut(node) {
                *data = Data::Origin(origin);
            }
        }
        if let Some(number) = number {
            let number = number as usize;
            if self.nodes.len() <= number {
                self.nodes.resize(number + 1, plan.root());
            }
            self.nodes[number] = node;
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
