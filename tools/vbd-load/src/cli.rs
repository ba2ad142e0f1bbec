//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use serde::Serialize;

/// Drive a vhost-user-blk server and report its speed.
#[derive(Parser)]
#[command(name = "vbd-load", version, about)]
pub(crate) struct Args {
    /// Socket of the server (several only with --hold)
    #[arg(required = true)]
    pub(crate) sockets: Vec<PathBuf>,
    /// Access pattern
    #[arg(long, value_enum, default_value_t = Pattern::Randread)]
    pub(crate) rw: Pattern,
    /// Bytes per request: a multiple of 512, with K or M as suffix
    #[arg(long, default_value = "4K", value_parser = parse_size)]
    pub(crate) bs: u64,
    /// Requests in flight per queue
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) depth: u16,
    /// Queues, each driven by a thread in its own part of the disk
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=128))]
    pub(crate) queues: u16,
    /// Use only the first bytes of the disk
    #[arg(long, value_parser = parse_size)]
    pub(crate) size: Option<u64>,
    /// Seconds to measure, after the ramp
    #[arg(long, default_value = "5", value_parser = parse_seconds)]
    pub(crate) runtime: Duration,
    /// Seconds to run before measuring
    #[arg(long, default_value = "0.2", value_parser = parse_seconds)]
    pub(crate) ramp: Duration,
    /// Stop after this many requests per queue instead, all of them measured
    #[arg(long, conflicts_with_all = ["runtime", "ramp"])]
    pub(crate) ops: Option<u64>,
    /// How to learn of completions
    #[arg(long, value_enum, default_value_t = Wait::Block)]
    pub(crate) wait: Wait,
    /// Stamp every write with its offset and a sequence number, check every read of what was written, and read all of
    /// it back at the end
    #[arg(long)]
    pub(crate) verify: bool,
    /// Seed of the random offsets
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Report the CPU time of this process over the run
    #[arg(long)]
    pub(crate) server_pid: Option<u32>,
    /// Pin the queues' threads to these CPUs, in turn
    #[arg(long, value_delimiter = ',')]
    pub(crate) cpus: Vec<u16>,
    /// Give up when a server accepts no connection, or completes nothing, for so many seconds
    #[arg(long, default_value = "10", value_parser = parse_seconds)]
    pub(crate) timeout: Duration,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Connect to all sockets, start their queues, stay idle for so many seconds, and leave
    #[arg(long, value_parser = parse_seconds, conflicts_with_all = ["ops", "verify"])]
    pub(crate) hold: Option<Duration>,
}

/// Which requests are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Pattern {
    /// Reads at random offsets
    Randread,
    /// Writes at random offsets
    Randwrite,
    /// Half reads, half writes at random offsets
    Randrw,
    /// Reads in order
    Read,
    /// Writes in order
    Write,
}

impl Pattern {
    /// Whether any request changes the disk.
    pub(crate) fn writes(self) -> bool {
        matches!(self, Pattern::Randwrite | Pattern::Randrw | Pattern::Write)
    }
}

/// How a queue's thread learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Wait {
    /// Sleep on the call eventfd when nothing is there, as a guest waits for an interrupt
    Block,
    /// Watch the used ring, with notifications off: takes a whole CPU and spares the server its signals
    Poll,
}

/// Reads a size in bytes, with an optional binary suffix K, M, G or T.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.trim_end_matches("iB").to_ascii_uppercase() {
        t if t.ends_with('K') => (t[..t.len() - 1].to_owned(), 10),
        t if t.ends_with('M') => (t[..t.len() - 1].to_owned(), 20),
        t if t.ends_with('G') => (t[..t.len() - 1].to_owned(), 30),
        t if t.ends_with('T') => (t[..t.len() - 1].to_owned(), 40),
        t => (t, 0),
    };
    let number: u64 = digits.parse().map_err(|_| format!("'{text}' is not a size such as 4096, 4K or 2G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is too large"))
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("'{text}' is not a number of seconds"))?;
    Duration::try_from_secs_f64(seconds).map_err(|e| format!("'{text}': {e}"))
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("4k"), Ok(4096));
        assert_eq!(parse_size("4KiB"), Ok(4096));
        assert_eq!(parse_size("1M"), Ok(1 << 20));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        assert!(parse_size("G").is_err());
        assert!(parse_size("-1").is_err());
        assert!(parse_size("99999999T").is_err());
    }
}
