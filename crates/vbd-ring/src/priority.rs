//! Which threads run first.

use std::io;

/// Has this thread, and those that it starts, run only when nothing else wants the processor (`SCHED_IDLE`); whatever
/// wakes up runs at once. For work beside which guests are served. A thread that holds what guests wait for must not be
/// of this kind. There may be no way back.
///
/// # Errors
/// The kernel's, where it forbids it: then the thread is as it was.
pub fn yield_to_others() -> io::Result<()> {
    // SAFETY: plain numbers, of which 0 is a value for each.
    let parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: 0 is the calling thread; the parameters are read during the call alone.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn threads_that_are_started_later_yield_too() {
        // SAFETY: 0 is the calling thread.
        let policy = || unsafe { libc::sched_getscheduler(0) };
        let outside = policy();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                super::yield_to_others().unwrap();
                std::thread::scope(|scope| {
                    scope.spawn(|| assert_eq!(policy(), libc::SCHED_IDLE));
                });
            });
        });
        assert_eq!(policy(), outside);
    }
}
