//! Calls into the kernel that may never come back.

use std::sync::mpsc::sync_channel;
use std::time::Duration;

/// Runs `work` on a thread of its own and waits for it, so long at most. What takes longer goes on, unheard.
pub(crate) fn within<T: Send + 'static>(
    time: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (sender, receiver) = sync_channel(1);
    let run = move || {
        // Nobody may be waiting any more.
        let _ = sender.try_send(work());
    };
    std::thread::Builder::new().name("vbd-ublk".into()).stack_size(256 << 10).spawn(run).ok()?;
    receiver.recv_timeout(time).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_too_long_is_not_waited_for() {
        assert_eq!(within(Duration::from_secs(60), || 7), Some(7));
        let (release, held) = sync_channel::<()>(0);
        assert_eq!(within(Duration::from_millis(10), move || held.recv()), None);
        drop(release);
    }
}
