//! `cargo xtask bench --only xen`: vbd beside blkback over a loop device and QEMU's qdisk, in one guest of one boot of an
//! emulated machine with Xen. What counts is the ratios: the times are the emulator's.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use vbd_tests::XenLab;

use super::Args;
use crate::test::{build, build_static};

/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(3600);
/// Load, block size and requests in flight.
const LOADS: [&str; 4] = ["randread-4096-32", "randwrite-4096-32", "read-1048576-4", "write-1048576-4"];
const PEERS: [&str; 3] = ["vbd", "blkback", "qdisk"];

/// Operations in a second: by storage and load, then by peer, a number a round.
type Rounds = BTreeMap<(String, String), BTreeMap<String, Vec<f64>>>;

/// Runs it and prints the table.
///
/// # Errors
/// When something does not build, or the guests do not end as they should.
pub(super) fn run(args: &Args) -> Result<()> {
    let vbd = args.vbd.clone().map_or_else(|| build("vbd", "release"), Ok)?;
    let load = build_static("blk-load")?;
    let scratch = vbd_tests::Scratch::new()?;
    let plan = scratch.path("plan");
    let runs = args.runs.unwrap_or(if args.quick { 1 } else { 5 });
    let seconds = args.seconds.unwrap_or(if args.quick { 1.0 } else { 3.0 });
    fs::write(
        &plan,
        format!("RUNS={runs}\nSECONDS_EACH={seconds}\nSTORAGES='memory disk'\nLOADS='{}'\n", LOADS.join(" ")),
    )?;
    let log = XenLab::get()?.bench(&vbd, &[&load, &plan], LIMIT)?;
    let rounds = read(&log);
    anyhow::ensure!(!rounds.is_empty(), "no results in the log:\n{log}");
    if args.json {
        let flat: Vec<_> = rounds.iter().map(|((storage, load), peers)| (storage, load, peers)).collect();
        println!("{}", serde_json::to_string_pretty(&flat)?);
    } else {
        print!("{}", table(&rounds)?);
    }
    Ok(())
}

/// `12.34 BENCH memory randread-4096-32 vbd 1234 3.001` lines of the serial log, which begins lines with seconds.
fn read(log: &str) -> Rounds {
    let mut rounds = Rounds::new();
    for line in log.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        let [_, "BENCH", storage, load, peer, operations, seconds] = words[..] else { continue };
        let (Ok(operations), Ok(seconds)) = (operations.parse::<f64>(), seconds.parse::<f64>()) else {
            continue;
        };
        let peers = rounds.entry((storage.to_owned(), load.to_owned())).or_default();
        peers.entry(peer.to_owned()).or_default().push(operations / seconds);
    }
    rounds
}

fn table(rounds: &Rounds) -> Result<String> {
    let mut text = String::from(
        "| storage | load | vbd, 1/s | blkback + loop, 1/s | qdisk, 1/s | vbd : blkback | vbd : qdisk |\n|---|---|---|---|---|---|---|\n",
    );
    for ((storage, load), peers) in rounds {
        let of = |peer: &str| median(peers.get(peer).cloned().unwrap_or_default());
        let [vbd, blkback, qdisk] = PEERS.map(of);
        let missing = || format!("{storage} {load}: a peer is missing");
        let (vbd, blkback, qdisk) =
            (vbd.with_context(missing)?, blkback.with_context(missing)?, qdisk.with_context(missing)?);
        text += &format!(
            "| {storage} | {load} | {vbd:.0} | {blkback:.0} | {qdisk:.0} | {:.2} | {:.2} |\n",
            vbd / blkback,
            vbd / qdisk
        );
    }
    Ok(text)
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_read_from_the_serial_log() {
        let log = "  70.01 BENCH memory randread-4096-32 vbd 3000 3.000\n  70.01 BENCH memory randread-4096-32 vbd 1000 2.000\n\
                   70.02 BENCH memory randread-4096-32 blkback 500 1.000\nBENCH\n  1.00 BENCH memory x vbd none 1\n\
                   70.03 BENCH memory randread-4096-32 qdisk 250 1.000\n  70.01 BENCH memory randread-4096-32 vbd 1 0.000001\n";
        let table = table(&read(log)).unwrap();
        assert!(
            table.ends_with("| memory | randread-4096-32 | 1000 | 500 | 250 | 2.00 | 4.00 |\n"),
            "{table}"
        );
    }
}
