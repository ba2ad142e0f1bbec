//! `vbd stat`.

use std::fmt::Write;

use vbd_daemon::control::{DiskStat, OperationStat};
use vbd_image::size::Human;

use super::control::{self, unknown};
use crate::output::{Table, print, print_json};

/// Show what disks have done: operations, bytes, errors and times, for each disk and queue.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The disk (default: all of them)
    name: Option<String>,
    #[command(flatten)]
    control: control::Args,
    /// Print JSON, with times in nanoseconds
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let disks = match &args.name {
        Some(name) => vec![args.control.find(name)?.ok_or_else(|| unknown(name))?],
        None => args.control.disks()?,
    };
    let stats = disks.iter().map(|found| found.client.stat(&found.disk.name));
    let stats = stats.collect::<Result<Vec<_>, _>>()?;
    if args.json {
        return print_json(&stats);
    }
    if stats.is_empty() {
        eprintln!("vbd: no disk is served");
    }
    let text: Vec<String> = stats.iter().map(render).collect();
    Ok(print(&text.join("\n"))?)
}

fn render(stat: &DiskStat) -> String {
    let disk = &stat.disk;
    let size = disk.size.map(|size| format!(", {}", Human(size))).unwrap_or_default();
    let mut text = format!("{} ({}{size})\n", disk.name, disk.path.display());
    let used: Vec<_> =
        stat.queues.iter().filter(|queue| queue.operations.iter().any(|o| o.count > 0)).collect();
    if used.is_empty() {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  no requests yet");
        return text;
    }
    let headings =
        ["QUEUE", "OPERATION", ">COUNT", ">BYTES", ">ERRORS", ">MEAN", ">QUEUED", ">SERVED", ">LONGEST"];
    let mut table = Table::new(&headings);
    rows(&mut table, "all", &stat.total());
    if used.len() > 1 {
        used.iter().for_each(|queue| rows(&mut table, &queue.queue, &queue.operations));
    }
    text.push_str(&table.render(2));
    text
}

fn rows(table: &mut Table, queue: &str, operations: &[OperationStat]) {
    for operation in operations.iter().filter(|operation| operation.count > 0) {
        let mean = |sum: u64| time(sum / operation.count);
        table.row([
            queue.to_owned(),
            operation.operation.clone(),
            operation.count.to_string(),
            Human(operation.bytes).to_string(),
            operation.errors.to_string(),
            time(operation.mean_ns()),
            mean(operation.queue_ns),
            mean(operation.service_ns),
            time(operation.longest_ns),
        ]);
    }
}

/// Nanoseconds for people, to three figures.
fn time(ns: u64) -> String {
    // The loss of precision is below what is shown.
    let ns = ns as f64;
    let (value, unit) = match ns {
        _ if ns < 1e3 => return format!("{ns} ns"),
        _ if ns < 1e6 => (ns / 1e3, "µs"),
        _ if ns < 1e9 => (ns / 1e6, "ms"),
        _ => (ns / 1e9, "s"),
    };
    let decimals = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.decimals$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::time;

    #[test]
    fn times_have_three_figures() {
        let shown = [0, 999, 1_500, 25_340, 999_000, 1_000_000, 12_345_678_901].map(time);
        assert_eq!(shown, ["0 ns", "999 ns", "1.50 µs", "25.3 µs", "999 µs", "1.00 ms", "12.3 s"]);
    }
}
