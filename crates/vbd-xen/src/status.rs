//! What devices are doing, for people.

use std::fmt;

use crate::options::DeviceId;

/// A state of xenbus, of either end (xen/io/xenbus.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// None was written, or nonsense.
    Unknown = 0,
    /// Made by the toolstack.
    Initialising = 1,
    /// The back-end waits for the front-end.
    InitWait = 2,
    /// The front-end has written its ring's place.
    Initialised = 3,
    /// In use.
    Connected = 4,
    /// About to close.
    Closing = 5,
    /// Closed.
    Closed = 6,
    /// Being changed.
    Reconfiguring = 7,
    /// Changed.
    Reconfigured = 8,
}

impl State {
    /// The state that this value of a `state` key says.
    pub fn parse(value: &[u8]) -> State {
        match value {
            b"1" => State::Initialising,
            b"2" => State::InitWait,
            b"3" => State::Initialised,
            b"4" => State::Connected,
            b"5" => State::Closing,
            b"6" => State::Closed,
            b"7" => State::Reconfiguring,
            b"8" => State::Reconfigured,
            _ => State::Unknown,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Unknown => "unknown",
            State::Initialising => "initialising",
            State::InitWait => "waiting",
            State::Initialised => "initialised",
            State::Connected => "connected",
            State::Closing => "closing",
            State::Closed => "closed",
            State::Reconfiguring => "reconfiguring",
            State::Reconfigured => "reconfigured",
        })
    }
}

/// One device, as it is now.
#[derive(Clone, Debug)]
pub struct DeviceStatus {
    /// Its name.
    pub id: DeviceId,
    /// The name in the domain (`xvda`).
    pub vdev: String,
    /// UUID of the domain, where known.
    pub vm: Option<String>,
    /// The domain's name, where known.
    pub domain: Option<String>,
    /// What is served, as the toolstack wrote it.
    pub params: String,
    /// The disk's name.
    pub disk: String,
    /// The serial number that the provider gave.
    pub serial: Option<String>,
    /// Writes are refused.
    pub read_only: bool,
    /// State of this end.
    pub state: State,
    /// State of the domain's end.
    pub frontend: State,
    /// Both ends are connected: requests are served.
    pub connected: bool,
    /// Why it is not, where it should be.
    pub problem: Option<String>,
    /// Features in use: names as in xenstore.
    pub features: Vec<&'static str>,
    /// Layout of the ring: `x86_64-abi`, `x86_32-abi`; empty while not connected.
    pub abi: &'static str,
    /// Queues in use.
    pub queues: u16,
    /// Pages of each queue's ring.
    pub ring_pages: u32,
    /// Pages of the domain that are mapped now, rings included.
    pub grants_mapped: u64,
    /// Those of them that stay mapped between requests.
    pub grants_persistent: u64,
    /// Requests answered since the device connected.
    pub requests: u64,
    /// Those of them answered with an error.
    pub errors: u64,
    /// Requests taken and not yet answered.
    pub in_flight: u64,
}
