//! The rounds: every peer once, and again.

use std::path::Path;

use anyhow::Result;

use super::Plan;
use super::files::{self, Storage};
use super::loads::{self, Load, Sample};
use super::peers::Peer;
use super::results::Results;

/// Runs `loads` on `file`. A peer that fails is left out of the load's later rounds, and the results say why.
pub(crate) fn measure(
    plan: &Plan,
    storage: Storage,
    file: &Path,
    loads: &[Load],
    results: &mut Results,
) -> Result<()> {
    for &load in loads {
        let name = storage.key(load);
        eprintln!(
            "{name}: {} rounds of {} s for each of {} peers",
            plan.runs,
            plan.seconds,
            plan.peers.len()
        );
        results.restart(&name);
        let mut peers = plan.peers.clone();
        for _ in 0..plan.runs {
            peers.retain(|&peer| match once(plan, storage, file, load, peer) {
                Ok(sample) => {
                    results.add(&name, peer, sample);
                    true
                }
                Err(error) => {
                    eprintln!("{name}: {}: {error:#}", peer.name());
                    results.fail(&name, peer, &format!("{error:#}"));
                    false
                }
            });
        }
    }
    storage.forget(file);
    Ok(())
}

fn once(plan: &Plan, storage: Storage, file: &Path, load: Load, peer: Peer) -> Result<Sample> {
    files::cool(file)?;
    let serving = peer.start(file, storage, &plan.tools)?;
    loads::measure(plan, load, &serving.target, serving.pid())
}
