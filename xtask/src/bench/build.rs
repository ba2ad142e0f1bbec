//! Images made from trees, and what is quick on them, beside what else does such work.
//!
//! Trees lie on the machine's disk and in its page cache; images come out in `/dev/shm`, so that no disk decides who wins, and
//! that being made durable, which only vbd does by itself, costs nobody anything.

pub(crate) mod judge;
mod race;
mod tables;
mod trees;
mod ways;
mod xfs;

use std::path::Path;

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::Plan;
use super::results::Results;
use ways::Ways;

pub(crate) use race::{Race, Timing, Way, Works};
pub(crate) use tables::tables;

/// A tree of small files.
#[derive(Clone, Copy)]
struct Many {
    files: u64,
    directories: u64,
}

impl Many {
    const fn new(files: u64, directories: u64) -> Self {
        Many { files, directories }
    }

    /// What results call the work with it.
    fn name(self) -> String {
        format!("build/{}-files-in-{}", self.files, self.directories)
    }

    /// A tenth or less of it, for runs that only show that everything works.
    fn scaled(self, quick: bool) -> Self {
        match quick {
            true if self.directories == 1 => Many::new(self.files / 10, 1),
            true => Many::new(self.files / 50, self.directories.div_ceil(50)),
            false => self,
        }
    }

    /// Bytes of a filesystem that holds it with mke2fs's inode for each 16 KiB.
    fn size(self) -> u64 {
        (self.files * 20 * KIB).max(256 * MIB).next_multiple_of(MIB)
    }
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

const DEBIAN: &str = "build/debian";
const LAYERS: &str = "build/three-layers";
const EDIT: &str = "build/edit-one-file";
const CLONE: &str = "build/clone";
const OVERLAY: &str = "build/clone-overlay";
const LS: &str = "build/ls";
/// What says why there is nothing of the works on XFS.
const XFS: &str = "build/on-xfs";
const ONE_DIRECTORY: Many = Many::new(20_000, 1);
const MANY_DIRECTORIES: Many = Many::new(200_000, 2_000);
/// The steps in which time and memory have to grow with the entries.
const SERIES: [Many; 3] = [Many::new(100_000, 100), Many::new(300_000, 300), Many::new(1_000_000, 1_000)];
/// Bytes in the big files of the trees whose blocks are shared.
const SHARED: [u64; 2] = [100 * MIB, 1024 * MIB];
/// Bytes of the image that is listed, edited and cloned.
const BASE: u64 = 10 << 30;
/// Bytes of the filesystem that a Debian comes into.
const SYSTEM: u64 = 1 << 30;

fn shared_name(bytes: u64) -> String {
    format!("build/reflink-{}M", bytes / MIB)
}

/// Does all that is asked for. What cannot be done is in the results, and the rest is done.
pub(crate) fn measure(plan: &Plan, results: &mut Results) -> Result<()> {
    let trees = plan.tools.scratch.join("trees");
    let memory = tempfile::Builder::new().prefix("vbd-bench-").tempdir_in("/dev/shm")?;
    let bench = Bench { plan, trees: &trees, ways: Ways::new(plan, memory.path()), memory: &memory };
    std::fs::create_dir_all(&trees).with_context(|| format!("create {}", trees.display()))?;

    let done = bench.debian(results);
    excuse(DEBIAN, done, results);
    // Minutes for mke2fs with the second: one round has to do.
    for (many, rounds) in [(ONE_DIRECTORY, 3), (MANY_DIRECTORIES, 1)] {
        let done = bench.many(many, true, rounds, results);
        excuse(&many.name(), done, results);
    }
    for many in SERIES {
        let done = bench.many(many, false, 3, results);
        excuse(&many.name(), done, results);
    }
    let done = bench.layers(results);
    excuse(LAYERS, done, results);
    results.build.remove(XFS);
    let done = bench.on_xfs(results);
    excuse(XFS, done, results);
    Ok(())
}

/// Says in the results why a work was not done.
fn excuse(name: &str, done: Result<()>, results: &mut Results) {
    if let Err(error) = done {
        eprintln!("{name}: {error:#}");
        let timing = results.build.entry(name.to_owned()).or_default().entry("vbd".to_owned()).or_default();
        timing.failure = Some(format!("{error:#}"));
    }
}

/// What the works have in common.
struct Bench<'a> {
    plan: &'a Plan,
    trees: &'a Path,
    ways: Ways<'a>,
    memory: &'a TempDir,
}

impl Bench<'_> {
    fn race(&self, name: &str, rounds: usize, ways: Vec<Way>, results: &mut Results) -> Result<()> {
        Race { name, rounds: rounds.min(self.plan.runs), settle: false, ways }
            .run(self.plan, &mut results.build)
    }

    fn debian(&self, results: &mut Results) -> Result<()> {
        if !self.plan.wants(DEBIAN) {
            return Ok(());
        }
        let tree = trees::debian(self.trees)?;
        trees::warm(&tree)?;
        let ways = vec![
            self.ways.cat(&tree),
            self.ways.mke2fs(&tree, SYSTEM),
            self.ways.mounted(&tree, SYSTEM),
            self.ways.vbd(&tree.display().to_string(), SYSTEM),
        ];
        self.race(DEBIAN, usize::MAX, ways, results)
    }

    fn many(&self, many: Many, peers: bool, rounds: usize, results: &mut Results) -> Result<()> {
        let many = many.scaled(self.plan.quick);
        let name = many.name();
        if !self.plan.wants(&name) {
            return Ok(());
        }
        eprintln!("{name}: making the tree");
        let tree = trees::many(self.trees, many)?;
        let mut ways = vec![self.ways.vbd(&tree.display().to_string(), many.size())];
        if peers {
            ways.insert(0, self.ways.mke2fs(&tree, many.size()));
        }
        let done = self.race(&name, rounds, ways, results);
        // A block each, on a disk that has other uses.
        std::fs::remove_dir_all(&tree).with_context(|| format!("remove {}", tree.display()))?;
        done
    }

    fn layers(&self, results: &mut Results) -> Result<()> {
        if !self.plan.wants(LAYERS) {
            return Ok(());
        }
        let image = trees::layers(self.trees)?;
        trees::warm(&image.directory)?;
        let ways = vec![
            self.ways.unpacked(&image.layers, SYSTEM),
            self.ways.vbd(&format!("oci:{}", image.directory.display()), SYSTEM),
        ];
        self.race(LAYERS, 3, ways, results)
    }

    /// Works on a filesystem that shares blocks.
    fn on_xfs(&self, results: &mut Results) -> Result<()> {
        let shared: Vec<u64> =
            SHARED.into_iter().map(|bytes| if self.plan.quick { bytes / 10 } else { bytes }).collect();
        let names = shared.iter().map(|&bytes| shared_name(bytes));
        let names: Vec<String> = names.chain([LS, EDIT, CLONE, OVERLAY].map(str::to_owned)).collect();
        let wanted = |name: &str| self.plan.wants(name);
        if !names.iter().any(|name| wanted(name)) {
            return Ok(());
        }
        let xfs = xfs::Mounted::new(self.memory.path())?;
        for bytes in shared {
            let name = shared_name(bytes);
            if wanted(&name) {
                let tree = trees::big(xfs.path(), bytes)?;
                let way = self.ways.vbd_to(xfs.path(), &tree.display().to_string(), 2 << 30);
                self.race(&name, usize::MAX, vec![way], results)?;
            }
        }
        if [LS, EDIT, CLONE, OVERLAY].into_iter().any(wanted) {
            let base = self.ways.base(xfs.path(), &trees::debian(self.trees)?)?;
            for (name, way) in [
                (LS, self.ways.ls(&base)),
                (EDIT, self.ways.edit(&base, self.memory.path())?),
                (CLONE, self.ways.clone(&base, "reflink")),
                (OVERLAY, self.ways.clone(&base, "overlay")),
            ] {
                if wanted(name) {
                    self.race(name, usize::MAX, vec![way], results)?;
                }
            }
        }
        Ok(())
    }
}
