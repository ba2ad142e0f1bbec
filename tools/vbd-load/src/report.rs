//! What a run found.

use std::path::PathBuf;

use serde::Serialize;

use crate::cli::{Pattern, Wait};
use crate::histogram::Histogram;

/// Latencies in microseconds.
#[derive(Serialize)]
pub(crate) struct Latency {
    mean: f64,
    p50: f64,
    p99: f64,
    max: f64,
}

impl From<&Histogram> for Latency {
    fn from(histogram: &Histogram) -> Self {
        Latency {
            mean: histogram.mean_us(),
            p50: histogram.percentile_us(0.5),
            p99: histogram.percentile_us(0.99),
            max: histogram.max_us(),
        }
    }
}

/// The result, as `--json` prints it. Rates and CPU seconds are those of the measured window; kicks and sleeps those of
/// the whole run.
#[derive(Serialize)]
pub(crate) struct Report {
    pub(crate) socket: PathBuf,
    pub(crate) rw: Pattern,
    pub(crate) bs: u64,
    pub(crate) depth: u16,
    pub(crate) queues: u16,
    pub(crate) wait: Wait,
    pub(crate) seconds: f64,
    pub(crate) ops: u64,
    pub(crate) iops: f64,
    /// Megabytes (10^6).
    pub(crate) mb_per_s: f64,
    pub(crate) latency_us: Latency,
    pub(crate) client_cpu_s: f64,
    pub(crate) server_cpu_s: Option<f64>,
    pub(crate) iops_per_server_cpu: Option<f64>,
    pub(crate) kicks: u64,
    pub(crate) sleeps: u64,
    pub(crate) verified: Option<u64>,
}

impl Report {
    /// Prints it to standard output.
    pub(crate) fn print(&self, json: bool) {
        if json {
            println!("{}", serde_json::to_string(self).expect("plain data"));
            return;
        }
        let Latency { mean, p50, p99, max } = self.latency_us;
        println!(
            "{:.0} IOPS, {:.1} MB/s, {} requests in {:.2} s",
            self.iops, self.mb_per_s, self.ops, self.seconds
        );
        println!("latency: mean {mean:.1} us, p50 {p50:.1}, p99 {p99:.1}, max {max:.1}");
        print!("CPU: client {:.2} s", self.client_cpu_s);
        if let (Some(seconds), Some(rate)) = (self.server_cpu_s, self.iops_per_server_cpu) {
            print!(", server {seconds:.2} s ({rate:.0} requests per CPU second)");
        }
        println!("; {} kicks, {} sleeps", self.kicks, self.sleeps);
        if let Some(blocks) = self.verified {
            println!("verified {blocks} reads");
        }
    }
}
