//! One file, one writer, while domains come and go.
//!
//! When a domain migrates to its own host, or is made anew while the old one still goes, both have a device on the same
//! file for a moment. The toolstack's `/vm` UUID tells that they are one machine: the newer device then waits, when it
//! connects, until the older has closed, and the lease goes from one to the other. Two machines on one file are refused.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vbd_core::{Capabilities, Disk, Error, ErrorKind, Event, Geometry, Result, Session, Statistics};
use vbd_xen::DeviceId;

/// How long a device waits for the older one of the same machine. A migration's source goes within seconds; this is how
/// long an operator may leave it suspended.
const PATIENCE: Duration = Duration::from_secs(600);

/// A file, whatever path leads to it: the device and inode it is on, or the block device it is.
pub(super) type FileKey = (Option<u64>, u64);

/// A device's use of a file.
#[derive(Clone, Debug)]
pub(super) struct Use {
    /// The device.
    pub(super) id: DeviceId,
    /// The file.
    pub(super) file: FileKey,
    /// Whether it writes to it, alone.
    pub(super) claims: bool,
    /// The machine: the toolstack's UUID of the domain.
    pub(super) vm: Option<String>,
    /// Domain and device, for people.
    pub(super) who: String,
}

/// The uses there are, oldest first.
#[derive(Default)]
pub(super) struct Uses {
    list: Mutex<Vec<Use>>,
    changed: Condvar,
}

impl Uses {
    /// Notes a use, if it can be beside those there are.
    ///
    /// # Errors
    /// The use that is in the way: another machine's, or the same domain's.
    pub(super) fn enter(&self, new: Use) -> std::result::Result<(), Use> {
        let mut list = self.list();
        list.retain(|old| old.id != new.id);
        let conflict = list.iter().find(|old| {
            let succeeds = old.vm.is_some() && old.vm == new.vm && old.id.domid != new.id.domid;
            in_each_others_way(old, &new) && !succeeds
        });
        if let Some(conflict) = conflict {
            return Err(conflict.clone());
        }
        list.push(new);
        Ok(())
    }

    /// Whether this device waits for an older one.
    pub(super) fn has_older(&self, id: &DeviceId) -> bool {
        let list = self.list();
        let place = list.iter().position(|one| one.id == *id);
        place.is_some_and(|place| list[..place].iter().any(|older| in_each_others_way(older, &list[place])))
    }

    /// A use has ended.
    pub(super) fn leave(&self, id: &DeviceId) {
        self.list().retain(|old| old.id != *id);
        self.changed.notify_all();
    }

    /// Waits until this use is the oldest of those that are in each other's way.
    fn wait_turn(&self, id: &DeviceId, patience: Duration) -> std::result::Result<(), String> {
        let deadline = Instant::now() + patience;
        let mut list = self.list();
        let mut said = false;
        loop {
            let Some(place) = list.iter().position(|one| one.id == *id) else {
                return Err("the device has gone meanwhile".to_owned());
            };
            let Some(older) = list[..place].iter().find(|older| in_each_others_way(older, &list[place]))
            else {
                return Ok(());
            };
            if !said {
                tracing::info!("{}: waits until {} has closed its disk", list[place].who, older.who);
                said = true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!(
                    "{} has still not closed its disk after {} s",
                    older.who,
                    patience.as_secs()
                ));
            }
            list = self.changed.wait_timeout(list, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn list(&self) -> MutexGuard<'_, Vec<Use>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn in_each_others_way(a: &Use, b: &Use) -> bool {
    a.file == b.file && (a.claims || b.claims)
}

/// A disk that is opened when its device's turn has come.
pub(super) struct HandedOver {
    /// The disk.
    pub(super) disk: Arc<dyn Disk>,
    /// The device.
    pub(super) id: DeviceId,
    /// The list that the device is in.
    pub(super) uses: Arc<Uses>,
}

impl Disk for HandedOver {
    fn name(&self) -> &str {
        self.disk.name()
    }

    fn open(&self) -> Result<Arc<dyn Session>> {
        let waited = self.uses.wait_turn(&self.id, PATIENCE);
        waited.map_err(|why| Error::new(ErrorKind::Busy, why).of(self.disk.name()))?;
        self.disk.open()
    }

    fn inspect(&self) -> Result<(Geometry, Capabilities)> {
        self.disk.inspect()
    }

    fn statistics(&self) -> &Statistics {
        self.disk.statistics()
    }

    fn watch(&self, watcher: Box<dyn Fn(Event) + Send + Sync>) -> Arc<dyn Send + Sync> {
        self.disk.watch(watcher)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use vbd_image::raw::{Raw, RawOptions};
    use vbd_xen::BackendKind;

    use super::*;

    fn id(domid: u16) -> DeviceId {
        DeviceId { kind: BackendKind::Vbd, domid, devid: 51712 }
    }

    fn using(domid: u16, vm: &str, claims: bool) -> Use {
        let who = format!("domain {domid}, xvda");
        Use { id: id(domid), file: (Some(1), 2), claims, vm: Some(vm.to_owned()), who }
    }

    #[test]
    fn one_machine_follows_itself_and_no_other() {
        let uses = Uses::default();
        uses.enter(using(1, "a", true)).unwrap();
        assert_eq!(uses.enter(using(2, "b", true)).unwrap_err().id, id(1));
        assert_eq!(uses.enter(using(2, "b", false)).unwrap_err().id, id(1), "a reader beside a writer");
        uses.enter(using(2, "a", true)).unwrap();
        let same_domain = Use { id: DeviceId { devid: 51728, ..id(2) }, ..using(2, "a", true) };
        assert!(uses.enter(same_domain).is_err(), "a file twice in one domain");
        let unknown = Use { vm: None, ..using(4, "", true) };
        assert!(uses.enter(unknown).is_err(), "no UUID is no proof");
        uses.enter(Use { file: (Some(1), 3), ..using(3, "c", true) }).unwrap();
    }

    #[test]
    fn readers_and_those_who_share_are_in_nobodys_way() {
        let uses = Uses::default();
        for (domid, vm) in [(1, "a"), (2, "b"), (3, "c")] {
            uses.enter(using(domid, vm, false)).unwrap();
        }
        uses.wait_turn(&id(3), Duration::ZERO).unwrap();
    }

    #[test]
    fn the_newer_device_opens_when_the_older_has_closed_and_not_before() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let uses = Arc::new(Uses::default());
        let disk = |domid| {
            uses.enter(using(domid, "a", true)).unwrap();
            let options = RawOptions { lease_wait: Duration::ZERO, ..RawOptions::new(file.path()) };
            HandedOver { disk: Raw::new(options), id: id(domid), uses: uses.clone() }
        };
        let (old, new) = (disk(1), disk(2));
        let session = old.open().unwrap();
        let (tell, told) = mpsc::channel();
        let opening = std::thread::spawn(move || tell.send(new.open().map(drop)).unwrap());
        assert!(told.recv_timeout(Duration::from_millis(100)).is_err(), "it waits");
        // What a domain that stays opens again is not in the newer one's queue.
        drop(old.open().unwrap());
        drop(session);
        assert!(told.recv_timeout(Duration::from_millis(100)).is_err(), "the device is still there");
        uses.leave(&id(1));
        told.recv().unwrap().unwrap();
        opening.join().unwrap();
    }

    #[test]
    fn a_device_that_goes_while_it_waits_ends_its_wait() {
        let uses = Arc::new(Uses::default());
        uses.enter(using(1, "a", true)).unwrap();
        uses.enter(using(2, "a", true)).unwrap();
        let waiting = std::thread::spawn({
            let uses = uses.clone();
            move || uses.wait_turn(&id(2), PATIENCE)
        });
        std::thread::sleep(Duration::from_millis(20));
        uses.leave(&id(2));
        assert!(waiting.join().unwrap().unwrap_err().contains("gone"));
        uses.enter(using(2, "a", true)).unwrap();
        let late = uses.wait_turn(&id(2), Duration::from_millis(1)).unwrap_err();
        assert!(late.contains("domain 1, xvda has still not closed"), "{late}");
    }
}
