//! Progress on a terminal; silence in a pipe. And a wish to stop, from the keyboard or a signal.

use std::io::{self, IsTerminal};
use std::sync::OnceLock;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use vbd_fs::{Cancel, Progress, Step};

/// A line on standard error that shows what is being done and how far it is; nothing where that is no terminal.
pub(crate) struct Bar {
    bar: ProgressBar,
    cancel: Cancel,
}

impl Bar {
    /// A line that stops its work when `cancel` asks for that.
    pub(crate) fn new(cancel: Cancel) -> Bar {
        let bar = if io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        bar.enable_steady_tick(Duration::from_millis(100));
        Bar { bar, cancel }
    }

    /// Takes the line away.
    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

impl Bar {
    fn show(&self, step: &str, total: Option<u64>) {
        let template = match total.filter(|&total| total > 0) {
            Some(total) => {
                self.bar.set_length(total);
                "{spinner} {msg:22} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}"
            }
            None => {
                self.bar.unset_length();
                "{spinner} {msg:22} {bytes} {elapsed}"
            }
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
        self.bar.set_position(0);
        self.bar.reset_elapsed();
        self.bar.set_message(step.to_owned());
    }
}

impl Progress for Bar {
    fn step(&mut self, step: Step, total: Option<u64>) {
        self.show(&step.to_string(), total);
    }

    fn advance(&mut self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn message(&mut self, text: &str) {
        self.bar.println(text);
    }

    fn cancel(&self) -> Cancel {
        self.cancel.clone()
    }
}

impl vbd_jobs::Progress for Bar {
    fn step(&self, step: &str, total: u64) {
        self.show(step, Some(total));
    }

    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.requested()
    }
}

static INTERRUPTED: OnceLock<Cancel> = OnceLock::new();

extern "C" fn interrupted(_signal: libc::c_int) {
    if let Some(cancel) = INTERRUPTED.get() {
        cancel.request();
    }
}

/// From now on SIGINT, SIGTERM and SIGHUP ask to stop; a second one of a kind ends the process at once.
pub(crate) fn stop_on_signals() -> Cancel {
    let cancel = INTERRUPTED.get_or_init(Cancel::new).clone();
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: a structure of plain numbers and an empty set of signals, for which zeros are a value.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        let handler: extern "C" fn(libc::c_int) = interrupted;
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_RESETHAND;
        // SAFETY: the handler stores into an atomic that exists, which a handler may do.
        unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
    }
    cancel
}
