//! A xenstore in memory.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use crate::sys::{Store, Stores, WatchEvent};

use super::{eventfd, lock};

/// What happens in the midst of a request.
type Hook = Box<dyn FnOnce(&Tree) + Send>;

/// The keys, and who watches them.
#[derive(Default)]
pub struct Tree {
    hook: Mutex<Option<(String, Hook)>>,
    inside: Mutex<Inside>,
}

#[derive(Default)]
struct Inside {
    keys: BTreeMap<String, Vec<u8>>,
    connections: Vec<Weak<Shared>>,
    down: bool,
}

struct Shared {
    wake: OwnedFd,
    state: Mutex<Watching>,
}

#[derive(Default)]
struct Watching {
    watches: Vec<(String, String)>,
    events: VecDeque<WatchEvent>,
}

impl Inside {
    fn fire(&mut self, path: &str, removed: bool) {
        self.connections.retain(|connection| connection.strong_count() > 0);
        for connection in self.connections.iter().filter_map(Weak::upgrade) {
            let mut state = lock(&connection.state);
            let events: Vec<_> = state
                .watches
                .iter()
                .filter(|(watched, _)| is_below(path, watched) || removed && is_below(watched, path))
                .map(|(watched, token)| {
                    let path = if is_below(path, watched) { path } else { watched };
                    WatchEvent { path: path.to_owned(), token: token.clone() }
                })
                .collect();
            if !events.is_empty() {
                state.events.extend(events);
                let _ = rustix::io::write(&connection.wake, &1u64.to_ne_bytes());
            }
        }
    }
}

fn is_below(path: &str, top: &str) -> bool {
    path.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl Tree {
    /// Sets a key.
    pub fn set(&self, path: &str, value: impl AsRef<[u8]>) {
        let mut inside = lock(&self.inside);
        inside.keys.insert(path.to_owned(), value.as_ref().to_vec());
        inside.fire(path, false);
    }

    /// A key's value as text.
    pub fn get(&self, path: &str) -> Option<String> {
        let inside = lock(&self.inside);
        inside.keys.get(path).map(|value| String::from_utf8_lossy(value).into_owned())
    }

    /// Removes a key with all below it.
    pub fn remove(&self, path: &str) {
        let mut inside = lock(&self.inside);
        inside.keys.retain(|key, _| !is_below(key, path));
        inside.fire(path, true);
    }

    /// Waits until a key has a value, ten seconds at most; the value it has then.
    pub fn wait_for(&self, path: &str, value: &str) -> Option<String> {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let now = self.get(path);
            if now.as_deref() == Some(value) || Instant::now() > until {
                return now;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// xenstored ends, or comes back.
    pub fn set_down(&self, down: bool) {
        let mut inside = lock(&self.inside);
        inside.down = down;
        if down {
            for connection in inside.connections.iter().filter_map(Weak::upgrade) {
                let _ = rustix::io::write(&connection.wake, &1u64.to_ne_bytes());
            }
            inside.connections.clear();
        }
    }

    /// Runs `hook` when this key is read next, before the answer.
    pub fn when_read(&self, path: &str, hook: impl FnOnce(&Tree) + Send + 'static) {
        *lock(&self.hook) = Some((path.to_owned(), Box::new(hook)));
    }

    fn do_with<T>(&self, work: impl FnOnce(&mut Inside) -> T) -> io::Result<T> {
        let mut inside = lock(&self.inside);
        if inside.down { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(work(&mut inside)) }
    }
}

/// The way to a tree.
pub(super) struct Way(pub(super) Arc<Tree>);

impl Stores for Way {
    fn connect(&self) -> io::Result<Box<dyn Store>> {
        let shared = Arc::new(Shared { wake: eventfd()?, state: Mutex::default() });
        self.0.do_with(|inside| inside.connections.push(Arc::downgrade(&shared)))?;
        Ok(Box::new(Connection { tree: self.0.clone(), shared }))
    }
}

struct Connection {
    tree: Arc<Tree>,
    shared: Arc<Shared>,
}

impl Connection {
    /// A request. Its answer brings the events with it that have come by then, as a real connection's does: the
    /// descriptor tells of them no more.
    fn ask<T>(&self, work: impl FnOnce(&mut Inside) -> T) -> io::Result<T> {
        let result = self.tree.do_with(work);
        let _ = rustix::io::read(&self.shared.wake, &mut [0u8; 8]);
        result
    }

    fn put(inside: &mut Inside, entries: &[(String, String)]) {
        for (path, value) in entries {
            inside.keys.insert(path.clone(), value.as_bytes().to_vec());
        }
        entries.iter().for_each(|(path, _)| inside.fire(path, false));
    }
}

impl Store for Connection {
    fn read(&mut self, path: &str) -> io::Result<Option<Vec<u8>>> {
        let hook = lock(&self.tree.hook).take_if(|(wanted, _)| wanted == path);
        if let Some((_, hook)) = hook {
            hook(&self.tree);
        }
        self.ask(|inside| inside.keys.get(path).cloned())
    }

    fn list(&mut self, path: &str) -> io::Result<Option<Vec<String>>> {
        let names = self.ask(|inside| {
            let below = inside.keys.keys().filter_map(|key| key.strip_prefix(path)?.strip_prefix('/'));
            let mut names: Vec<_> =
                below.filter_map(|rest| rest.split('/').next()).map(str::to_owned).collect();
            names.dedup();
            names
        })?;
        Ok(Some(names).filter(|names| !names.is_empty()))
    }

    fn write(&mut self, entries: &[(String, String)]) -> io::Result<()> {
        self.ask(|inside| Self::put(inside, entries))
    }

    fn write_if(&mut self, guard: &str, entries: &[(String, String)]) -> io::Result<bool> {
        self.ask(|inside| {
            let there = inside.keys.contains_key(guard);
            if there {
                Self::put(inside, entries);
            }
            there
        })
    }

    fn remove(&mut self, path: &str) -> io::Result<()> {
        self.ask(|_| ())?;
        self.tree.remove(path);
        Ok(())
    }

    fn watch(&mut self, path: &str, token: &str) -> io::Result<()> {
        self.tree.do_with(|_| ())?;
        let mut state = lock(&self.shared.state);
        state.watches.push((path.to_owned(), token.to_owned()));
        state.events.push_back(WatchEvent { path: path.to_owned(), token: token.to_owned() });
        let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
        Ok(())
    }

    fn unwatch(&mut self, path: &str, token: &str) -> io::Result<()> {
        self.tree.do_with(|_| ())?;
        let mut state = lock(&self.shared.state);
        state.watches.retain(|(watched, name)| watched != path || name != token);
        Ok(())
    }

    fn event(&mut self) -> io::Result<Option<WatchEvent>> {
        self.tree.do_with(|_| ())?;
        let event = lock(&self.shared.state).events.pop_front();
        if event.is_none() {
            let _ = rustix::io::read(&self.shared.wake, &mut [0u8; 8]);
            return Ok(lock(&self.shared.state).events.pop_front());
        }
        Ok(event)
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
    }
}
