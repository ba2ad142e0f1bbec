//! A device from its start to its end.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vbd_core::{Disk, Event, SECTOR, Session};
use vbd_ring::Handle;

use crate::abi::{Command, DeviceInfo, MAX_DEPTH, feature};
use crate::bounded;
use crate::control::{Control, Target};
use crate::error::Error;
use crate::find::{Found, LETTING_GO, LOOK_AGAIN, find};
use crate::params::Parameters;
use crate::queue::{Remote, Setup};
use crate::usage;

/// How long a deleted device may take to give its number back.
const NUMBER_FREE: Duration = Duration::from_secs(5);
/// At most one line of a device's troubles in the log in this time.
const LOG_PACE: Duration = Duration::from_secs(1);

/// How a disk becomes a device.
#[derive(Clone, Debug)]
pub struct Options {
    /// The device's number; any without one.
    pub number: Option<u32>,
    /// Queues, 1 to 128; the driver takes no more than there are processors.
    pub queues: u16,
    /// Requests under way in each queue, 1 to 4096.
    pub depth: u16,
    /// The longest read or write, in bytes: 4 KiB to 32 MiB. Each request under way has a buffer of this size.
    pub max_io: u32,
    /// Says which file this is, so that a device which waits for its server is taken up again for no other.
    pub identity: u64,
    /// How long the driver may take for each step of the start.
    pub start_within: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            number: None,
            queues: 4,
            depth: 128,
            max_io: 512 << 10,
            identity: 0,
            start_within: Duration::from_secs(15),
        }
    }
}

impl Options {
    fn check(&self) -> Result<(), Error> {
        if !(1..=128).contains(&self.queues) {
            return Err(Error::Option("queues: 1 to 128 can be had"));
        }
        if self.depth == 0 || usize::from(self.depth) > MAX_DEPTH {
            return Err(Error::Option("depth: 1 to 4096 requests can be under way"));
        }
        if !(4096..=32 << 20).contains(&self.max_io) || !self.max_io.is_multiple_of(4096) {
            return Err(Error::Option("max_io: 4 KiB to 32 MiB, in steps of 4 KiB"));
        }
        Ok(())
    }
}

/// How a device ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It is deleted, whoever uses it.
    Delete,
    /// It is deleted unless somebody has it mounted or the like: then it stays, its I/O waits, and the next server of
    /// the disk takes it up. To be followed by the end of the process: only that tells the driver.
    KeepIfUsed,
}

/// How a device is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The block device.
    pub path: PathBuf,
    /// It is mounted, swap, or part of another device.
    pub used: bool,
    /// What went wrong last.
    pub problem: Option<String>,
}

/// What the queues tell of.
pub(crate) struct Shared {
    name: String,
    /// The driver is to take its commands back.
    ending: AtomicBool,
    troubles: Mutex<Troubles>,
}

#[derive(Default)]
struct Troubles {
    last: Option<String>,
    logged: Option<Instant>,
}

impl Shared {
    /// `disk: ublk3`.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Writes what went wrong to the log, as far as that is not flooded, and keeps it for who asks.
    pub(crate) fn complain(&self, message: &str) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if troubles.logged.is_none_or(|at| now >= at + LOG_PACE) {
            tracing::error!("{}: {message}", self.name);
            troubles.logged = Some(now);
        }
        troubles.last = Some(message.to_owned());
    }

    /// The driver has taken a command back.
    pub(crate) fn aborted(&self) {
        if !self.ending.swap(true, Ordering::Relaxed) {
            self.complain("somebody else has stopped the device: attach the disk anew");
        }
    }
}

/// What there is while the device is served.
struct Running {
    file: Arc<OwnedFd>,
    queues: Vec<Remote>,
    ended: Vec<Receiver<()>>,
    session: Arc<dyn Session>,
    _watch: Arc<dyn Send + Sync>,
}

/// A disk served as a block device. Dropping it stops it, unless somebody uses it.
pub struct Device {
    shared: Arc<Shared>,
    control: Arc<Control>,
    target: Target,
    flags: u64,
    /// Where the last flush is done.
    reactor: Handle,
    running: Mutex<Option<Running>>,
}

/// A device that is not all there yet: what there is of it goes again if it never is.
struct Unfinished<'a> {
    control: &'a Control,
    /// Set where it is a new one: another's stays as it was, waiting.
    target: Option<Target>,
    queues: Vec<Remote>,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        self.queues.iter().for_each(Remote::leave);
        if let Some(target) = self.target.take() {
            // Why it failed is told; what is left of it is not worth more words.
            let _ = self.control.run(Command::Stop, &target, Vec::new(), 0, NUMBER_FREE);
            let _ = self.control.delete(&target, NUMBER_FREE);
        }
    }
}

impl Device {
    /// Makes `disk` a block device, its queues spread over `reactors`: a new one, or the one that a killed server of
    /// this disk has left waiting. May block; not to be called on a reactor.
    ///
    /// # Errors
    /// The driver is missing, refuses, or does not answer; the number is taken; the disk cannot be opened.
    pub fn start(disk: &Arc<dyn Disk>, reactors: &[Handle], options: &Options) -> Result<Self, Error> {
        options.check()?;
        let first = reactors.first().ok_or(Error::Option("ublk: there is no reactor"))?;
        let control = Arc::new(Control::open()?);
        let session = disk.open()?;
        let within = options.start_within;
        let mut unfinished = Unfinished { control: &control, target: None, queues: Vec::new() };
        let (info, file, recovered) = match find(&control, options.number, options.identity)? {
            Found::Add(id) => {
                let info = add(&control, id, options)?;
                unfinished.target = Some(Target::of(&info));
                let parameters = Parameters::new(&session.geometry(), session.capabilities(), info.max_io);
                let target = Target::of(&info);
                // Before the other commands, for which the driver wants to see that the node is this user's.
                let file = open_node(&target.node(), within)?;
                control.run(Command::SetParameters, &target, parameters.bytes(), 0, within)?;
                (info, file, false)
            }
            Found::Recover(info) => {
                fits(&control, &info, session.as_ref())?;
                if !session.keeps_unflushed() {
                    return Err(Error::Lost { id: info.id });
                }
                let target = Target::of(&info);
                start_recovery(&control, &target)?;
                (info, open_node(&target.node(), within)?, true)
            }
        };
        let target = Target::of(&info);
        let shared = Arc::new(Shared {
            name: format!("{}: ublk{}", disk.name(), info.id),
            ending: AtomicBool::new(false),
            troubles: Mutex::default(),
        });
        let file = Arc::new(file);
        let mut ended = Vec::new();
        for number in 0..info.queues {
            let (sender, receiver) = sync_channel(1);
            let setup = Setup {
                shared: shared.clone(),
                number,
                depth: info.depth,
                max_io: info.max_io,
                encoded: control.encoded(),
                file: file.clone(),
                session: session.clone(),
                counters: disk.statistics().queue(&format!("ublk/{number}")),
                ended: sender,
            };
            // Disks begin on different reactors.
            let on = usize::try_from(info.id).unwrap_or(0).wrapping_add(usize::from(number));
            let queue = Remote::start(&reactors[on % reactors.len()], setup);
            unfinished.queues.push(queue.map_err(|why| Error::Queue { id: info.id, queue: number, why })?);
            ended.push(receiver);
        }
        let command = if recovered { Command::EndRecovery } else { Command::Start };
        control.run(command, &target, Vec::new(), u64::from(std::process::id()), within)?;
        unfinished.target = None;
        let queues = std::mem::take(&mut unfinished.queues);
        drop(unfinished);
        if recovered {
            tracing::info!("{}: taken up again", shared.name);
        }
        let (sizes, size_of, told) = (control.clone(), target.clone(), shared.clone());
        let watch = disk.watch(Box::new(move |event| {
            let Event::Resized(size) = event;
            resize(&sizes, &size_of, &told, size);
        }));
        // It may have grown since its device was made.
        if recovered {
            let sectors = parameters(&control, &target)?.map_or(0, |old| old.sectors);
            if sectors < session.geometry().size / SECTOR {
                resize(&control, &target, &shared, session.geometry().size);
            }
        }
        let running = Running { file, queues, ended, session, _watch: watch };
        Ok(Device {
            shared,
            control,
            target,
            flags: info.flags,
            reactor: first.clone(),
            running: Mutex::new(Some(running)),
        })
    }

    /// How it is doing.
    pub fn status(&self) -> Status {
        let path = self.target.block();
        let troubles = self.shared.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        let problem = troubles.last.clone();
        drop(troubles);
        Status { used: usage::is_used(&format!("ublkb{}", self.target.id)), path, problem }
    }

    /// Ends the device: nothing new is taken, what was taken is finished within this time, and flushed.
    ///
    /// # Errors
    /// The storage or the driver has not finished in time. What is left of the device is said.
    pub fn stop(&self, how: Ending, within: Duration) -> Result<(), Error> {
        let Some(running) = self.running().take() else { return Ok(()) };
        let deadline = Instant::now() + within;
        let path = self.target.block();
        // Held until the device is stopped, so that nobody begins to use it now.
        let claim = bounded::within(left(deadline), move || usage::claim(&path));
        let used = matches!(&claim, Some(Err(error)) if error.raw_os_error() == Some(libc::EBUSY));
        if how == Ending::KeepIfUsed && used && self.flags & feature::USER_RECOVERY != 0 {
            tracing::warn!(
                "{}: {} is in use, so it stays and its I/O waits: attach the disk again to take it up",
                self.shared.name,
                self.target.block().display()
            );
            let done = self.leave(&running, deadline);
            return done.and_then(|()| self.flush(running.session, deadline));
        }
        if let Some(Ok(claim)) = claim {
            // Buffered writes of somebody who has it open. With recovery, the driver fails what comes after the stop.
            bounded::within(left(deadline), move || rustix::fs::fsync(&claim).map(|()| claim));
        }
        self.shared.ending.store(true, Ordering::Relaxed);
        let stop = |within| self.control.run(Command::Stop, &self.target, Vec::new(), 0, within);
        let mut stopped = stop(left(deadline));
        if let Err(Error::Late { .. }) = &stopped {
            running.queues.iter().for_each(Remote::cancel_waiting);
            stopped = stop(left(deadline));
        }
        if let Err(Error::Refused { source, .. }) = &stopped
            && source.raw_os_error() == Some(libc::ENODEV)
        {
            // Somebody else has deleted it.
            stopped = Ok(Vec::new());
        }
        let ended = self.wait(&running, deadline);
        let Running { file, queues, session, .. } = running;
        drop((file, queues));
        let flushed = self.flush(session, deadline);
        stopped?;
        ended?;
        let deleted = match self.control.delete(&self.target, left(deadline)) {
            Err(Error::Refused { source, .. }) if source.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            other => other,
        };
        flushed.and(deleted)
    }

    /// Finishes what was taken, and leaves the rest to the next server.
    fn leave(&self, running: &Running, deadline: Instant) -> Result<(), Error> {
        running.queues.iter().for_each(Remote::leave);
        self.wait(running, deadline)
    }

    /// Waits until all queues have ended; what waits for a policy when the time is up is cancelled.
    fn wait(&self, running: &Running, deadline: Instant) -> Result<(), Error> {
        let wait = |deadline: Instant| {
            running.ended.iter().all(|ended| {
                use std::sync::mpsc::RecvTimeoutError::Timeout;
                // A queue whose reactor has ended is no more.
                ended.recv_timeout(left(deadline)) != Err(Timeout)
            })
        };
        if wait(deadline) {
            return Ok(());
        }
        running.queues.iter().for_each(Remote::cancel_waiting);
        if wait(Instant::now() + Duration::from_secs(1)) {
            return Ok(());
        }
        let why =
            "the storage still holds requests; they are repeated when the device is taken up again".into();
        Err(Error::Unfinished { id: self.target.id, why })
    }

    fn flush(&self, session: Arc<dyn Session>, deadline: Instant) -> Result<(), Error> {
        if session.capabilities().read_only {
            return Ok(());
        }
        let flushed = vbd_core::flush(&self.reactor, &session, left(deadline));
        flushed.map_err(|why| Error::Unfinished {
            id: self.target.id,
            why: format!("the last flush has failed: {why}"),
        })
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Err(error) = self.stop(Ending::KeepIfUsed, Duration::from_secs(10)) {
            tracing::error!("{error}");
        }
    }
}

/// What is left until `deadline`; never so little that a driver in good health could not answer.
fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_secs(1))
}

fn add(control: &Control, id: u32, options: &Options) -> Result<DeviceInfo, Error> {
    // What the driver does not know, or does not give to this user, it takes out.
    let flags = feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE | feature::UNPRIVILEGED;
    let wanted = DeviceInfo {
        queues: options.queues,
        depth: options.depth,
        max_io: options.max_io,
        id,
        flags: flags | if control.has(feature::UPDATE_SIZE) { feature::UPDATE_SIZE } else { 0 },
        identity: options.identity,
        ..DeviceInfo::default()
    };
    let deadline = Instant::now() + NUMBER_FREE;
    loop {
        match control.add(&wanted, options.start_within) {
            // The number of a device that was deleted a moment ago.
            Err(Error::Refused { source, .. })
                if source.raw_os_error() == Some(libc::EEXIST) && Instant::now() < deadline =>
            {
                std::thread::sleep(LOOK_AGAIN);
            }
            other => return other,
        }
    }
}

/// The parameters of a device; none where the driver's answer is no such thing.
fn parameters(control: &Control, target: &Target) -> Result<Option<Parameters>, Error> {
    let bytes = control.run(Command::GetParameters, target, Parameters::question(), 0, LETTING_GO)?;
    Ok(Parameters::from_bytes(&bytes))
}

/// Refuses a device that promises what the disk is not.
fn fits(control: &Control, info: &DeviceInfo, session: &dyn Session) -> Result<(), Error> {
    let Some(old) = parameters(control, &Target::of(info))? else { return Ok(()) };
    let changed = |why: String| Err(Error::Changed { id: info.id, why });
    let size = session.geometry().size;
    if old.sectors > size / SECTOR {
        let before = old.sectors.saturating_mul(SECTOR);
        return changed(format!("with {before} bytes, and the file has {size}: make it that long again"));
    }
    if !old.read_only && session.capabilities().read_only {
        return changed("to be written to: serve it so".into());
    }
    Ok(())
}

/// Tells the driver that a new server comes; the old one may still be on its way out.
fn start_recovery(control: &Control, target: &Target) -> Result<(), Error> {
    let deadline = Instant::now() + LETTING_GO;
    loop {
        match control.run(Command::StartRecovery, target, Vec::new(), 0, LETTING_GO) {
            Err(Error::Refused { source, .. })
                if source.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline =>
            {
                std::thread::sleep(LOOK_AGAIN);
            }
            other => return other.map(drop),
        }
    }
}

/// Opens the server's node, which udev may take a moment to make and to give to its user.
fn open_node(path: &Path, within: Duration) -> Result<OwnedFd, Error> {
    let deadline = Instant::now() + within;
    loop {
        match File::options().read(true).write(true).open(path) {
            Ok(file) => return Ok(file.into()),
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EACCES | libc::EBUSY))
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(LOOK_AGAIN);
            }
            Err(source) => return Err(Error::Node { path: path.to_owned(), source }),
        }
    }
}

/// Tells the driver a new size, where it can be told.
fn resize(control: &Control, target: &Target, shared: &Shared, size: u64) {
    if !control.has(feature::UPDATE_SIZE) {
        return shared.complain(&format!(
            "the disk has {size} bytes, and this kernel cannot tell its device (Linux 6.16 can): attach it anew"
        ));
    }
    let told = control.run(Command::UpdateSize, target, Vec::new(), size / SECTOR, LETTING_GO);
    if let Err(error) = told {
        shared.complain(&format!("the device keeps its size: {error}"));
    }
}
