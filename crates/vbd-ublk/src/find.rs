//! Which device a disk gets: a new one, or the one that a server which was killed has left waiting.

use std::time::{Duration, Instant};

use crate::abi::{ANY, DeviceInfo, state};
use crate::control::{Control, Target};
use crate::error::Error;

/// How long a killed server may take to let go: before Linux 6.7 the driver looks for it every five seconds.
pub(crate) const LETTING_GO: Duration = Duration::from_secs(20);
/// How often it is looked.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What is to be done for a disk.
pub(crate) enum Found {
    /// Add a device of this number, or of any.
    Add(u32),
    /// Take this one up again.
    Recover(DeviceInfo),
}

/// What a device that is there means for a disk that wants its number.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It waits for us.
    Recover,
    /// It is ours and dead: a start or an end that was cut short.
    Replace,
    /// Its server has ended a moment ago.
    Wait,
    /// Somebody serves it.
    InUse,
    /// It is another disk's.
    Foreign,
}

fn judge(info: &DeviceInfo, identity: u64, is_running: bool) -> Verdict {
    match info.state {
        state::LIVE if is_running => Verdict::InUse,
        _ if info.identity != identity => Verdict::Foreign,
        state::LIVE => Verdict::Wait,
        state::DEAD => Verdict::Replace,
        _ => Verdict::Recover,
    }
}

/// Looks for the device of a disk: of the number that is wanted, or any that waits for it.
///
/// # Errors
/// The number is taken, or the driver does not answer.
pub(crate) fn find(control: &Control, wanted: Option<u32>, identity: u64) -> Result<Found, Error> {
    let Some(id) = wanted.or_else(|| left(control, identity)) else { return Ok(Found::Add(ANY)) };
    let deadline = Instant::now() + LETTING_GO;
    loop {
        let Some(info) = control.info(id)? else { return Ok(Found::Add(id)) };
        match judge(&info, identity, is_running(info.pid)) {
            Verdict::Recover => return Ok(Found::Recover(info)),
            Verdict::Replace => {
                control.delete(&Target::of(&info), LETTING_GO)?;
                return Ok(Found::Add(id));
            }
            Verdict::Wait if Instant::now() < deadline => std::thread::sleep(LOOK_AGAIN),
            Verdict::Wait | Verdict::InUse => return Err(Error::InUse { id, pid: info.pid }),
            Verdict::Foreign => return Err(Error::Foreign { id }),
        }
    }
}

/// A device that a server of this disk has left.
fn left(control: &Control, identity: u64) -> Option<u32> {
    let nodes = std::fs::read_dir("/dev").ok()?.flatten();
    let mut ids: Vec<u32> = nodes.filter_map(|node| number(node.file_name().to_str()?)).collect();
    ids.sort_unstable();
    ids.into_iter().find(|id| {
        let info = control.info(*id).ok().flatten();
        info.is_some_and(|info| {
            let verdict = judge(&info, identity, is_running(info.pid));
            matches!(verdict, Verdict::Recover | Verdict::Replace | Verdict::Wait)
        })
    })
}

/// The number of a server's node.
fn number(name: &str) -> Option<u32> {
    name.strip_prefix("ublkc")?.parse().ok()
}

/// Whether a process is there and has not ended (proc_pid_stat(5)).
fn is_running(pid: i32) -> bool {
    if pid <= 0 {
        return false;
    }
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The state stands behind the name, which may have parentheses in it. Z and X have ended.
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_waits_for_this_file_is_taken_up() {
        let of = |state, identity| DeviceInfo { state, identity, ..DeviceInfo::default() };
        let quiesced = 2;
        assert_eq!(judge(&of(quiesced, 7), 7, false), Verdict::Recover);
        // Its server is on its way out.
        assert_eq!(judge(&of(quiesced, 7), 7, true), Verdict::Recover);
        assert_eq!(judge(&of(quiesced, 8), 7, false), Verdict::Foreign);
        assert_eq!(judge(&of(state::LIVE, 7), 7, true), Verdict::InUse);
        assert_eq!(judge(&of(state::LIVE, 7), 7, false), Verdict::Wait);
        assert_eq!(judge(&of(state::LIVE, 8), 7, false), Verdict::Foreign);
        assert_eq!(judge(&of(state::DEAD, 7), 7, false), Verdict::Replace);
        assert_eq!(judge(&of(state::DEAD, 8), 7, false), Verdict::Foreign);
    }

    #[test]
    fn nodes_are_known_by_their_names() {
        assert_eq!(number("ublkc12"), Some(12));
        assert_eq!((number("ublkb12"), number("ublk-control"), number("ublkc")), (None, None, None));
        assert!(is_running(i32::try_from(std::process::id()).expect("a number")));
        assert!(!is_running(0) && !is_running(-1));
    }
}
