//! A limit on lines in the log: a guest must not be able to fill it.

use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(10);
const MOST: u32 = 10;

/// Allows a few lines in a window of time.
#[derive(Default)]
pub(crate) struct Limiter {
    since: Option<Instant>,
    lines: u32,
}

impl Limiter {
    /// Whether a line may be written now.
    pub(crate) fn allows(&mut self, now: Instant) -> bool {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) > WINDOW) {
            (self.since, self.lines) = (Some(now), 0);
        }
        self.lines = self.lines.saturating_add(1);
        self.lines <= MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_lines_a_window() {
        let (mut limiter, start) = (Limiter::default(), Instant::now());
        assert_eq!((0..1000).filter(|_| limiter.allows(start)).count(), 10);
        assert!(limiter.allows(start + WINDOW * 2));
    }
}
