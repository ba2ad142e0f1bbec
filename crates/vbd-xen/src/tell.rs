//! What this end writes into xenstore: its states, and what it offers (xen/io/blkif.h).
//!
//! Nothing is written into a directory that the toolstack has taken away: that would bring it back.

use std::io;

use vbd_core::SECTOR;

use crate::connect::Connection;
use crate::keys::{Bounds, number};
use crate::options::{BackendKind, DeviceRequest, Mode, Options};
use crate::status::State;
use crate::sys::Store;

/// The key that names the connection, so that a successor finds its record and no other.
pub(crate) const CONNECTION: &str = "vbd-connection";

/// Sectors are of 512 bytes in this protocol; these are bits of `info`.
const CDROM: u32 = 1;
const REMOVABLE: u32 = 2;
const READ_ONLY: u32 = 4;

fn write(store: &mut dyn Store, base: &str, keys: &[(&str, String)]) -> io::Result<bool> {
    let entries: Vec<_> = keys.iter().map(|(key, value)| (format!("{base}/{key}"), value.clone())).collect();
    store.write_if(&format!("{base}/frontend"), &entries)
}

fn says(state: State) -> (&'static str, String) {
    ("state", (state as u8).to_string())
}

/// This end's state.
pub(crate) fn state(store: &mut dyn Store, base: &str, state: State) -> io::Result<()> {
    write(store, base, &[says(state)]).map(|_| ())
}

/// The script of the toolstack may say that the disk is there.
pub(crate) fn ready(store: &mut dyn Store, base: &str, kind: BackendKind) -> io::Result<()> {
    match kind {
        BackendKind::Vbd => write(store, base, &[("hotplug-status", "connected".into())]).map(|_| ()),
        BackendKind::Qdisk => Ok(()),
    }
}

/// There is no disk. The toolstack waits for state 2 before it looks for the reason.
pub(crate) fn refused(store: &mut dyn Store, base: &str, problem: &str) -> io::Result<()> {
    let keys =
        [("hotplug-error", shorten(problem)), ("hotplug-status", "error".into()), says(State::InitWait)];
    write(store, base, &keys).map(|_| ())
}

/// A device that another server had connected cannot be served. Its state stays what it is.
pub(crate) fn stranded(store: &mut dyn Store, base: &str, problem: &str) -> io::Result<()> {
    write(store, base, &[("error", shorten(problem))]).map(|_| ())
}

/// The device has failed; its domain is to close it.
pub(crate) fn failed(store: &mut dyn Store, base: &str, problem: &str) -> io::Result<()> {
    write(store, base, &[("error", shorten(problem)), says(State::Closing)]).map(|_| ())
}

/// A message of xenstore has 4096 bytes at most, path included.
fn shorten(text: &str) -> String {
    text.chars().take(500).collect()
}

/// This end waits for the front-end, which may use what is offered.
pub(crate) fn waiting(store: &mut dyn Store, base: &str, options: &Options, direct: bool) -> io::Result<()> {
    let mut keys = offered(options, direct);
    keys.push(says(State::InitWait));
    write(store, base, &keys).map(|_| ())
}

/// What front-ends may use.
pub(crate) fn offers(store: &mut dyn Store, base: &str, options: &Options, direct: bool) -> io::Result<()> {
    write(store, base, &offered(options, direct)).map(|_| ())
}

fn offered(options: &Options, direct: bool) -> Vec<(&'static str, String)> {
    // Pages that stay mapped are of use where the storage works on them.
    let persistent = direct && options.persistent_grants > 0;
    let mut keys = vec![
        ("multi-queue-max-queues", options.queues.to_string()),
        ("max-ring-page-order", options.ring_page_order.to_string()),
        ("feature-persistent", u8::from(persistent).to_string()),
    ];
    if options.indirect_segments > 0 {
        keys.push(("feature-max-indirect-segments", options.indirect_segments.to_string()));
    }
    keys
}

/// What front-ends were told they may use: perhaps by a server before this one, with other settings.
pub(crate) struct Told {
    pub(crate) bounds: Bounds,
    pub(crate) persistent: bool,
    pub(crate) indirect: u16,
}

/// Reads it back.
pub(crate) fn told(store: &mut dyn Store, base: &str, options: &Options) -> io::Result<Told> {
    let mut key = |name: &str, most: u32, otherwise: u32| -> io::Result<u32> {
        let value = store.read(&format!("{base}/{name}"))?;
        Ok(value.and_then(|value| number(&value, 0, most)).unwrap_or(otherwise))
    };
    // A front-end may have chosen before the offer of the kernel's back-end was replaced: that is one queue a processor.
    let processors =
        std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1));
    let queues = key("multi-queue-max-queues", 1024, 1)?.max(options.queues.into()).max(processors);
    let order = u32::from(crate::control::MOST_ORDER);
    let persistent = key("feature-persistent", 1, 0)? == 1;
    let indirect = key("feature-max-indirect-segments", crate::abi::MOST_INDIRECT.into(), 0)?;
    Ok(Told { bounds: Bounds { queues, order }, persistent, indirect: u16::try_from(indirect).unwrap_or(0) })
}

/// This end is connected: what the disk is, and state 4, at once. False if the device is gone.
pub(crate) fn connected(
    store: &mut dyn Store,
    base: &str,
    request: &DeviceRequest,
    connection: &Connection,
    name: u64,
) -> io::Result<bool> {
    let (geometry, capabilities) = (&connection.geometry, &connection.capabilities);
    let read_only = request.mode == Mode::ReadOnly || capabilities.read_only;
    let bit = |set: bool, bit: u32| if set { bit } else { 0 };
    let info = bit(request.cdrom, CDROM) | bit(request.removable, REMOVABLE) | bit(read_only, READ_ONLY);
    let flush = u8::from(capabilities.write_cache).to_string();
    let discard = !read_only && capabilities.discard && request.discard != Some(false);
    let mut keys = vec![
        ("feature-flush-cache", flush.clone()),
        ("feature-barrier", flush),
        ("feature-discard", u8::from(discard).to_string()),
        ("sectors", (geometry.size / SECTOR).to_string()),
        ("sector-size", geometry.block_size.max(512).to_string()),
        ("physical-sector-size", geometry.physical_block_size.max(geometry.block_size).max(512).to_string()),
        ("info", info.to_string()),
        (CONNECTION, format!("{name:016x}")),
    ];
    if discard {
        let granularity = geometry.discard_granularity.max(geometry.block_size).max(512);
        keys.push(("discard-granularity", granularity.to_string()));
        keys.push(("discard-alignment", "0".into()));
        // Whether old data is gone for good, no file can promise.
        keys.push(("discard-secure", "0".into()));
    }
    keys.push(says(State::Connected));
    write(store, base, &keys)
}

/// The disk has another size (bytes): the state is written once more, to set off the front-end's watch.
pub(crate) fn resized(store: &mut dyn Store, base: &str, size: u64) -> io::Result<()> {
    let state = store.read(&format!("{base}/state"))?;
    let mut keys = vec![("sectors", (size / SECTOR).to_string())];
    if state.is_some_and(|state| State::parse(&state) == State::Connected) {
        keys.push(says(State::Connected));
    }
    write(store, base, &keys).map(|_| ())
}
