//! What was measured, as it is kept between runs.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::Plan;
use super::build::Works;
use super::idle::Idle;
use super::image::Loads;
use super::loads::Sample;
use super::machine::Machine;
use super::peers::Peer;
use super::ublk::Row;

/// All of it.
#[derive(Serialize, Deserialize)]
pub(crate) struct Results {
    pub(crate) machine: Machine,
    pub(crate) settings: Settings,
    /// By load, `disk/randread-4K-32`, then by peer.
    pub(crate) loads: BTreeMap<String, BTreeMap<String, Cell>>,
    pub(crate) idle: Option<Idle>,
    /// Measured in a guest.
    #[serde(default)]
    pub(crate) ublk: Vec<Row>,
    #[serde(default)]
    pub(crate) build: Works,
    /// Of qcow2 images.
    #[serde(default)]
    pub(crate) image_loads: Loads,
    #[serde(default)]
    pub(crate) image: Works,
}

/// How it was measured.
#[derive(Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) runs: usize,
    pub(crate) seconds: f64,
    pub(crate) wait: String,
}

/// A peer under a load.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Cell {
    pub(crate) samples: Vec<Sample>,
    /// Why there are no more.
    pub(crate) failure: Option<String>,
}

impl Cell {
    /// The median over the rounds of one of a sample's numbers.
    pub(crate) fn median(&self, of: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        median(self.samples.iter().filter_map(of).collect())
    }
}

impl Results {
    pub(crate) fn new(machine: Machine, plan: &Plan) -> Self {
        let settings = Settings { runs: plan.runs, seconds: plan.seconds, wait: plan.wait.clone() };
        Results {
            machine,
            settings,
            loads: BTreeMap::new(),
            idle: None,
            ublk: Vec::new(),
            build: Works::new(),
            image_loads: Loads::new(),
            image: Works::new(),
        }
    }

    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read(path).with_context(|| format!("read {}: nothing to merge with", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        std::fs::write(path, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("write {}", path.display()))
    }

    /// Takes from an earlier run the parts that this one will not have; a load that is measured again starts afresh. When this
    /// run `serves` no disks, how long those were measured stays as it was, too.
    pub(crate) fn merge(&mut self, earlier: Results, serves: bool) {
        if !serves {
            self.settings = earlier.settings;
        }
        self.loads = earlier.loads;
        self.idle = earlier.idle;
        self.ublk = earlier.ublk;
        self.build = earlier.build;
        self.image_loads = earlier.image_loads;
        self.image = earlier.image;
    }

    /// Forgets what is known of a load.
    pub(crate) fn restart(&mut self, load: &str) {
        self.loads.remove(load);
    }

    pub(crate) fn add(&mut self, load: &str, peer: Peer, sample: Sample) {
        self.cell(load, peer).samples.push(sample);
    }

    pub(crate) fn fail(&mut self, load: &str, peer: Peer, why: &str) {
        self.cell(load, peer).failure = Some(why.to_owned());
    }

    fn cell(&mut self, load: &str, peer: Peer) -> &mut Cell {
        self.loads.entry(load.to_owned()).or_default().entry(peer.name().to_owned()).or_default()
    }

    /// The median of one of the numbers that `peer` had under `load`.
    pub(crate) fn get(&self, load: &str, peer: Peer, of: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        self.loads.get(load)?.get(peer.name())?.median(of)
    }
}

/// The middle of the values; of an even number of them, the mean of the two in the middle.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[half]),
        _ => Some((values[half - 1] + values[half]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
