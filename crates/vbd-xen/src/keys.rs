//! What xenstore says about a device: read, checked for shape and bounds. The toolstack writes the back-end's directory,
//! the domain its own, and may write anything.

use std::io;

use crate::abi::Abi;
use crate::options::{DeviceId, DeviceRequest, Mode};
use crate::sys::Store;

/// The longest value that is looked at, in bytes.
const LONGEST: usize = 4096;

/// Reads one key as text; none where it is missing. Nonsense has nothing in common with any value that is waited for.
pub(crate) fn text(store: &mut dyn Store, path: &str) -> io::Result<Option<String>> {
    Ok(store.read(path)?.map(|value| clean(&value)))
}

/// A value as text that may be shown and logged.
pub(crate) fn clean(value: &[u8]) -> String {
    let value = &value[..value.len().min(LONGEST)];
    let value = value.strip_suffix(b"\0").unwrap_or(value);
    String::from_utf8_lossy(value).chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// A number in a key, within bounds.
pub(crate) fn number(value: &[u8], least: u32, most: u32) -> Option<u32> {
    let value = value.strip_suffix(b"\0").unwrap_or(value);
    if value.is_empty() || value.len() > 10 || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = std::str::from_utf8(value).ok()?.parse().ok()?;
    (least..=most).contains(&number).then_some(number)
}

/// What the toolstack wrote: where the front-end is, and what it wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    /// The front-end's directory.
    pub(crate) frontend: String,
    pub(crate) request: DeviceRequest,
}

/// Reads a device's back-end directory; none where the toolstack has not finished it, or has taken it away.
///
/// # Errors
/// Xenstore is gone.
pub(crate) fn written(
    store: &mut dyn Store,
    base: &str,
    id: DeviceId,
) -> io::Result<Option<Result<Written, String>>> {
    let Some(frontend) = text(store, &format!("{base}/frontend"))? else { return Ok(None) };
    let Some(owner) = store.read(&format!("{base}/frontend-id"))? else { return Ok(None) };
    let Some(params) = text(store, &format!("{base}/params"))? else { return Ok(None) };
    if number(&owner, 0, u32::from(u16::MAX)) != Some(u32::from(id.domid)) {
        return Ok(Some(Err("its frontend-id is not that of its directory".into())));
    }
    let home = format!("/local/domain/{}/", id.domid);
    if !frontend.starts_with(&home) || frontend.contains("//") || frontend.len() > 1024 {
        return Ok(Some(Err(format!("its frontend is not in {home}"))));
    }
    let mut key = |name: &str| text(store, &format!("{base}/{name}"));
    let mode = match key("mode")?.as_deref() {
        Some("w") => Mode::Write,
        Some("w!" | "!") => Mode::WriteForced,
        Some("r") => Mode::ReadOnly,
        other => {
            let mode = other.unwrap_or("none").to_owned();
            return Ok(Some(Err(format!("its mode is {mode}, and should be r, w or w!"))));
        }
    };
    let (vdev, script) = (key("dev")?.unwrap_or_default(), key("script")?);
    let flag = |value: Option<String>| value.map(|value| value == "1");
    let (removable, discard) = (flag(key("removable")?), flag(key("discard-enable")?));
    let direct_io_safe = flag(key("direct-io-safe")?).unwrap_or(false);
    let domain = text(store, &format!("{home}name"))?;
    let vm = text(store, &format!("{home}vm"))?;
    let device_type = text(store, &format!("{frontend}/device-type"))?;
    let request = DeviceRequest {
        id,
        vdev,
        vm: vm.and_then(|path| path.strip_prefix("/vm/").map(str::to_owned)),
        domain,
        params,
        script: script.filter(|script| !script.is_empty()),
        mode,
        cdrom: device_type.as_deref() == Some("cdrom"),
        removable: removable.unwrap_or(false),
        discard,
        direct_io_safe,
    };
    Ok(Some(Ok(Written { frontend, request })))
}

/// One queue of a front-end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct QueueKeys {
    pub(crate) references: Vec<u32>,
    pub(crate) port: u32,
}

/// What a front-end offers: checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) abi: Abi,
    pub(crate) persistent: bool,
    pub(crate) queues: Vec<QueueKeys>,
}

impl Offer {
    /// Pages of each ring.
    pub(crate) fn pages(&self) -> usize {
        self.queues.first().map_or(0, |queue| queue.references.len())
    }
}

/// Most of what a front-end may offer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) queues: u32,
    pub(crate) order: u32,
}

/// Reads what a front-end has written, by way of `read`, which gives a key of its directory.
///
/// # Errors
/// Inside: what is wrong with it, for people. Outside: xenstore is gone.
pub(crate) fn offer(
    mut read: impl FnMut(&str) -> io::Result<Option<Vec<u8>>>,
    bounds: Bounds,
) -> io::Result<Result<Offer, String>> {
    let wrong = |key: &str, value: &[u8]| Ok(Err(format!("the domain wrote {key} = {:?}", clean(value))));
    let protocol = read("protocol")?;
    let protocol = protocol.as_deref().map(|value| value.strip_suffix(b"\0").unwrap_or(value));
    let Some(abi) = Abi::parse(protocol) else { return wrong("protocol", protocol.unwrap_or_default()) };
    let persistent = read("feature-persistent")?.is_some_and(|value| number(&value, 1, 1).is_some());
    let (mut count, mut order) = (1, 0);
    for (key, least, most, into) in [
        ("multi-queue-num-queues", 1, bounds.queues, &mut count),
        ("ring-page-order", 0, bounds.order, &mut order),
    ] {
        let Some(value) = read(key)? else { continue };
        let Some(number) = number(&value, least, most) else { return wrong(key, &value) };
        *into = number;
    }
    let mut queues = Vec::new();
    for queue in 0..count {
        let prefix = if count > 1 { format!("queue-{queue}/") } else { String::new() };
        let mut references = Vec::new();
        for page in 0..1u32 << order {
            let mut key = format!("{prefix}ring-ref{page}");
            let mut value = None;
            if order == 0 {
                let single = format!("{prefix}ring-ref");
                value = read(&single)?;
                if value.is_some() {
                    key = single;
                }
            }
            let value = match value {
                Some(value) => value,
                None => match read(&key)? {
                    Some(value) => value,
                    None => return Ok(Err(format!("the domain did not write {key}"))),
                },
            };
            let Some(reference) = number(&value, 0, u32::MAX) else { return wrong(&key, &value) };
            references.push(reference);
        }
        let key = format!("{prefix}event-channel");
        let Some(value) = read(&key)? else { return Ok(Err(format!("the domain did not write {key}"))) };
        let Some(port) = number(&value, 0, u32::MAX) else { return wrong(&key, &value) };
        queues.push(QueueKeys { references, port });
    }
    Ok(Ok(Offer { abi, persistent, queues }))
}

/// The device that a path in one of the back-end directories belongs to: its domain and number.
pub(crate) fn device_in(path: &str, root: &str, kind: &str) -> Option<(u16, u32)> {
    let rest = path.strip_prefix(root)?.strip_prefix('/')?.strip_prefix(kind)?.strip_prefix('/')?;
    let mut parts = rest.split('/');
    let domid = number(parts.next()?.as_bytes(), 0, 0x7fef)?;
    let devid = number(parts.next()?.as_bytes(), 0, u32::MAX)?;
    Some((u16::try_from(domid).ok()?, devid))
}
