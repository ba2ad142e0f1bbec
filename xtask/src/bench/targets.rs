//! What vbd has to reach, and whether it does.

use serde::Serialize;

use super::files::Storage;
use super::loads::{Load, Sample};
use super::peers::Peer;
use super::results::Results;

/// One target, judged.
#[derive(Serialize)]
pub(crate) struct Verdict {
    pub(crate) what: String,
    /// What it has to be: `>= 0.95`.
    pub(crate) target: String,
    /// None when a side was not measured.
    pub(crate) found: Option<f64>,
    pub(crate) unit: &'static str,
    pub(crate) reached: Option<bool>,
}

#[derive(Clone, Copy)]
pub(super) enum Bound {
    AtLeast(f64),
    Above(f64),
    AtMost(f64),
    Below(f64),
}

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            Bound::AtLeast(bound) => value >= bound,
            Bound::Above(bound) => value > bound,
            Bound::AtMost(bound) => value <= bound,
            Bound::Below(bound) => value < bound,
        }
    }

    fn text(self) -> String {
        match self {
            Bound::AtLeast(bound) => format!("at least {bound}"),
            Bound::Above(bound) => format!("above {bound}"),
            Bound::AtMost(bound) => format!("at most {bound}"),
            Bound::Below(bound) => format!("below {bound}"),
        }
    }
}

pub(super) fn verdict(what: String, bound: Bound, found: Option<f64>, unit: &'static str) -> Verdict {
    Verdict { what, target: bound.text(), found, unit, reached: found.map(|value| bound.holds(value)) }
}

fn iops(sample: &Sample) -> Option<f64> {
    Some(sample.iops)
}

fn bytes(sample: &Sample) -> Option<f64> {
    Some(sample.mb_per_s)
}

fn per_cpu(sample: &Sample) -> Option<f64> {
    sample.iops_per_cpu
}

fn latency(sample: &Sample) -> Option<f64> {
    Some(sample.latency_us)
}

/// The results of one load on one storage.
struct Row<'a> {
    results: &'a Results,
    name: String,
}

impl<'a> Row<'a> {
    fn new(results: &'a Results, storage: Storage, load: Load) -> Self {
        Row { results, name: storage.key(load) }
    }

    fn get(&self, peer: Peer, of: fn(&Sample) -> Option<f64>) -> Option<f64> {
        self.results.get(&self.name, peer, of)
    }

    /// The most that one of `peers` reached.
    fn best(&self, peers: &[Peer], of: fn(&Sample) -> Option<f64>) -> Option<f64> {
        peers.iter().filter_map(|&peer| self.get(peer, of)).max_by(f64::total_cmp)
    }

    /// `peer` against the best of `peers`.
    fn ratio(&self, peer: Peer, peers: &[Peer], of: fn(&Sample) -> Option<f64>) -> Option<f64> {
        Some(self.get(peer, of)? / self.best(peers, of)?)
    }

    /// What vbd adds to the file's latency, as a share of what qemu-storage-daemon's quickest mode adds.
    fn added_latency(&self) -> Option<f64> {
        let file = self.get(Peer::File, latency)?;
        let others = Peer::QSD_VHOST.iter().filter_map(|&peer| self.get(peer, latency));
        Some((self.get(Peer::VbdVhost, latency)? - file) / (others.min_by(f64::total_cmp)? - file))
    }
}

/// Judges the targets of disks that are served.
pub(crate) fn judge(results: &Results) -> Vec<Verdict> {
    let row = |storage, load| Row::new(results, storage, load);
    let random = [Load::RANDOM_READ, Load::RANDOM_WRITE];
    let mut verdicts = Vec::new();
    let mut add = |row: &Row<'_>, what: &str, bound, found| {
        verdicts.push(verdict(format!("{}: {what}", row.name), bound, found, "x"));
    };

    for [_, deep, _] in random {
        let row = row(Storage::Disk, deep);
        let found = row.ratio(Peer::VbdVhost, &[Peer::File], iops);
        add(&row, "vhost-user against the file", Bound::AtLeast(0.95), found);
    }
    for load in random.into_iter().flatten() {
        let row = row(Storage::Disk, load);
        let found = row.ratio(Peer::VbdVhost, &Peer::QSD_VHOST, iops);
        add(&row, "vhost-user against qemu-storage-daemon's best mode", Bound::Above(1.0), found);
    }
    for [_, deep, _] in random {
        let row = row(Storage::Memory, deep);
        let found = row.ratio(Peer::VbdVhost, &Peer::QSD_VHOST, iops);
        add(&row, "vhost-user against qemu-storage-daemon's best mode", Bound::AtLeast(1.3), found);
        let found = row.ratio(Peer::VbdVhost, &Peer::QSD_VHOST, per_cpu);
        add(&row, "the same, per CPU second of the server", Bound::AtLeast(3.0), found);
    }
    for [_, deep, _] in random {
        let row = row(Storage::Disk, deep);
        let against = |peers| row.ratio(Peer::VbdNbd, peers, iops);
        add(&row, "NBD against the file", Bound::AtLeast(0.8), against(&[Peer::File]));
        add(&row, "NBD against qemu-nbd's best mode", Bound::AtLeast(1.5), against(&Peer::QEMU_NBD));
        add(&row, "NBD against nbdkit", Bound::AtLeast(2.3), against(&[Peer::Nbdkit]));
    }
    for [_, deep, _] in random {
        let row = row(Storage::Memory, deep);
        let found = row.ratio(Peer::VbdNbd, &Peer::QEMU_NBD, iops);
        add(&row, "NBD against qemu-nbd's best mode", Bound::AtLeast(2.0), found);
    }
    for load in [Load::READ, Load::WRITE] {
        let row = row(Storage::Memory, load);
        let found = row.ratio(Peer::VbdNbd, &Peer::QEMU_NBD, bytes);
        add(&row, "NBD against qemu-nbd's best mode", Bound::AtLeast(1.5), found);
    }
    for storage in Storage::ALL {
        for [single, ..] in random {
            let row = row(storage, single);
            let what = "latency added over vhost-user, against qemu-storage-daemon's quickest mode";
            add(&row, what, Bound::AtMost(0.7), row.added_latency());
        }
    }

    let [_, deep, _] = Load::RANDOM_READ;
    let row = results.ublk.iter().find(|row| row.load == deep.name());
    let what = format!("ublk, in a guest: {} against loop with direct I/O", deep.name());
    verdicts.push(verdict(what, Bound::AtLeast(1.2), row.map(|row| row.ratio), "x"));

    let idle = results.idle.as_ref();
    let mut add =
        |what: &str, bound, found, unit| verdicts.push(verdict(what.to_owned(), bound, found, unit));
    add("idle: 1,000 disks attached", Bound::Below(5.0), idle.map(|i| i.attach_s), "s");
    add(
        "idle: memory of each, clients connected",
        Bound::AtMost(128.0),
        idle.map(|i| i.kib_connected),
        "KiB",
    );
    add("idle: CPU over 5 s, clients connected", Bound::Below(0.005), idle.map(|i| i.cpu_connected_s), "s");
    verdicts
}
