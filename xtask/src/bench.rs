//! `cargo xtask bench`: vbd beside its peers, in one run, as ratios.
//!
//! Every load visits all peers in turn, round after round, so that what else the machine does meets all of them; a cell
//! of the tables is the median of its rounds. Absolute numbers are the machine's, the ratios are vbd's.

mod build;
mod docs;
mod files;
mod idle;
mod image;
mod loads;
mod machine;
mod peers;
mod results;
mod rounds;
mod targets;
mod ublk;
mod xen;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use files::Storage;
use loads::Load;
use peers::Peer;
use results::Results;

/// Arguments of `cargo xtask bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Short runs, few of them: to see that everything works
    #[arg(long)]
    quick: bool,
    /// Only the parts whose name contains this: `disk/randread-4K-32`, `memory`, `idle`, `ublk`, `build`, `build/debian`,
    /// `image`, `image/convert`; several with commas. `xen` alone compares with Xen's own back-ends on an emulated machine, which nothing else does
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// Only the peers whose name contains one of these: `file`, `qsd`, `vbd`; for `build`: `cat`, `loop`, `mke2fs`, `vbd`
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
    /// Write the tables into docs/performance.md: those of disks, of images, or both, as there are results
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
    quick: bool,
    wait: String,
    only: Vec<String>,
    peers: Vec<Peer>,
    /// Parts of names of peers; all are wanted when it is empty.
    named: Vec<String>,
    tools: Tools,
}

impl Plan {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| name.contains(only.as_str()))
    }

    /// Whether disks are served, to a client that has to be built.
    fn serves(&self) -> bool {
        let loads = |storage: Storage| Load::ALL.into_iter().map(move |load| storage.key(load));
        self.wants("idle")
            || image::serves(self)
            || Storage::ALL.into_iter().flat_map(loads).any(|name| self.wants(&name))
    }

    /// Whether a peer of this name takes part.
    fn takes(&self, peer: &str) -> bool {
        self.named.is_empty() || self.named.iter().any(|named| peer.contains(named.as_str()))
    }
}

/// Runs it.
pub(crate) fn run(args: &Args) -> Result<()> {
    crate::setup::run()?;
    if args.only == ["xen"] {
        return xen::run(args);
    }
    let dir = args.dir.clone().unwrap_or_else(|| vbd_tests::target_dir().join("bench"));
    let tools = Tools {
        vbd: args.vbd.clone().map_or_else(|| crate::test::build("vbd", "release"), Ok)?,
        load: PathBuf::new(),
        scratch: dir.clone(),
    };
    let mut plan = Plan {
        runs: args.runs.unwrap_or(if args.quick { 1 } else { 5 }),
        seconds: args.seconds.unwrap_or(if args.quick { 0.3 } else { 2.0 }),
        quick: args.quick,
        wait: args.wait.clone(),
        only: args.only.clone(),
        peers: Vec::new(),
        named: args.peers.clone(),
        tools,
    };
    plan.peers = Peer::ALL.into_iter().filter(|peer| plan.takes(peer.name())).collect();
    if plan.serves() {
        plan.tools.load = crate::test::build("vbd-load", "release")?;
    }
    ensure!(plan.runs > 0 && plan.seconds > 0.0, "--runs and --seconds have to be more than 0");

    std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let kept = dir.join("results.json");
    let mut results = Results::new(machine::describe(&dir)?, &plan);
    if args.merge {
        results.merge(Results::read(&kept)?, plan.serves());
    }
    for storage in Storage::ALL {
        let wanted: Vec<Load> =
            Load::ALL.into_iter().filter(|&load| plan.wants(&storage.key(load))).collect();
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
    build::measure(&plan, &mut results)?;
    image::measure(&plan, &mut results)?;
    results.write(&kept)?;

    if args.json {
        let mut judged = targets::judge(&results);
        judged.extend(build::judge::judge(&results.build));
        judged.extend(image::judge::judge(&results.image_loads, &results.image));
        println!(
            "{}",
            serde_json::to_string_pretty(&serde_json::json!({ "results": results, "targets": judged }))?
        );
    } else {
        print!("{}", docs::tables(&results));
    }
    if args.write_docs {
        docs::write(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/performance.md"), &results)?;
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
