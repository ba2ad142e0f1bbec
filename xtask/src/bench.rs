//! `cargo xtask bench`: vbd beside its peers, in one run, as ratios.
//!
//! Every load visits all peers in turn, round after round, so that what else the machine does meets all of them; a cell
//! of the tables is the median of its rounds. Absolute numbers are the machine's, the ratios are vbd's.

mod docs;
mod files;
mod idle;
mod loads;
mod machine;
mod peers;
mod results;
mod rounds;
mod targets;
mod ublk;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use loads::Load;
use peers::Peer;
use results::Results;

/// Arguments of `cargo xtask bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Short runs, few of them: to see that everything works
    #[arg(long)]
    quick: bool,
    /// Only the parts whose name contains this: `disk/randread-4K-32`, `memory`, `idle`, `ublk`; several with commas
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// Only the peers whose name contains one of these: `file`, `qsd`, `vbd`
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    peers: Vec<String>,
    /// Rounds; a result is their median
    #[arg(long, value_name = "N")]
    runs: Option<usize>,
    /// Seconds of each run
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// How the vhost-user client waits: `block`, as a guest, or `poll`
    #[arg(long, default_value = "block", value_parser = ["block", "poll"])]
    wait: String,
    /// Where the test file on disk goes (2 GiB); the one in memory goes to /dev/shm (1 GiB)
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Measure this vbd instead of the one built from here
    #[arg(long, value_name = "PATH")]
    vbd: Option<PathBuf>,
    /// Print the results as JSON
    #[arg(long)]
    json: bool,
    /// Keep the results of parts that this run leaves out, as the last run that had them found them
    #[arg(long)]
    merge: bool,
    /// Write the tables into docs/performance.md
    #[arg(long)]
    write_docs: bool,
}

/// The programs under test, and a place for their files.
struct Tools {
    vbd: PathBuf,
    load: PathBuf,
    scratch: PathBuf,
}

/// What the runs have in common.
struct Plan {
    runs: usize,
    seconds: f64,
    wait: String,
    only: Vec<String>,
    peers: Vec<Peer>,
    tools: Tools,
}

impl Plan {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| name.contains(only.as_str()))
    }
}

/// Runs it.
pub(crate) fn run(args: &Args) -> Result<()> {
    crate::setup::run()?;
    let dir = args.dir.clone().unwrap_or_else(|| vbd_tests::target_dir().join("bench"));
    let tools = Tools {
        vbd: args.vbd.clone().map_or_else(|| crate::test::build("vbd", "release"), Ok)?,
        load: crate::test::build("vbd-load", "release")?,
        scratch: dir.clone(),
    };
    let chosen =
        |peer: &Peer| args.peers.is_empty() || args.peers.iter().any(|p| peer.name().contains(p.as_str()));
    let plan = Plan {
        runs: args.runs.unwrap_or(if args.quick { 1 } else { 5 }),
        seconds: args.seconds.unwrap_or(if args.quick { 0.3 } else { 2.0 }),
        wait: args.wait.clone(),
        only: args.only.clone(),
        peers: Peer::ALL.into_iter().filter(chosen).collect(),
        tools,
    };
    ensure!(plan.runs > 0 && plan.seconds > 0.0, "--runs and --seconds have to be more than 0");

    std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let kept = dir.join("results.json");
    let mut results = Results::new(machine::describe(&dir)?, &plan);
    if args.merge {
        results.merge(Results::read(&kept)?);
    }
    for storage in files::Storage::ALL {
        let wanted: Vec<Load> = Load::ALL
            .into_iter()
            .filter(|load| plan.wants(&format!("{}/{}", storage.name(), load.name())))
            .collect();
        if !wanted.is_empty() {
            let file = storage.prepare(&dir)?;
            rounds::measure(&plan, storage, &file, &wanted, &mut results)?;
            // What was measured is kept, whatever comes after it.
            results.write(&kept)?;
        }
    }
    if plan.wants("idle") {
        results.idle = Some(idle::measure(&plan.tools)?);
    }
    if plan.wants("ublk") {
        results.ublk = ublk::measure(&plan)?;
    }
    results.write(&kept)?;

    let judged = targets::judge(&results);
    if args.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&serde_json::json!({ "results": results, "targets": judged }))?
        );
    } else {
        print!("{}", docs::tables(&results, &judged));
    }
    if args.write_docs {
        docs::write(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/performance.md"),
            &results,
            &judged,
        )?;
    }
    Ok(())
}

/// Runs a program to its end and gives what it printed.
fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("start {program}"))?;
    ensure!(
        output.status.success(),
        "{program}: {}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim(),
        String::from_utf8_lossy(&output.stdout).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
