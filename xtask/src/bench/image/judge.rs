//! What images that live have to reach.

use super::jobs::{
    ALONE, BACKUP, BARE, BESIDE, BITMAP, CLONE, COMPARE, FOUR_QUEUES, NO_BITMAP, ONE_BITMAP, ONE_QUEUE, OPEN,
    QEMU_IMG, SCALE, SNAPSHOT, TO_QCOW2, TO_QCOW2_CACHED, TO_RAW, TO_RAW_CACHED, TO_ZSTD, TO_ZSTD_CACHED,
    best,
};
use super::served::{ALLOCATE, ALLOCATE_64K, Loads, OVERLAY, QSD, READ, SUBCLUSTERS, VBD, VBD_RAW, WRITE};
use crate::bench::build::Works;
use crate::bench::targets::{Bound, Verdict, verdict};

/// Judges the targets.
pub(crate) fn judge(loads: &Loads, works: &Works) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    let mut add = |work: &str, what: &str, bound, found, unit| {
        verdicts.push(verdict(format!("{work}: {what}"), bound, found, unit));
    };
    let iops = |load: &str, server: &str| loads.get(load)?.get(server)?.median(|sample| Some(sample.iops));
    let qsd = |load: &str| QSD.iter().filter_map(|server| iops(load, server)).max_by(f64::total_cmp);
    let against = |load: &str, other: Option<f64>| Some(iops(load, VBD)? / other?);

    for load in [READ, WRITE] {
        let found = against(load, iops(load, VBD_RAW));
        add(load, "qcow2 against raw", Bound::AtLeast(0.95), found, "x");
    }
    let found = against(ALLOCATE, qsd(ALLOCATE));
    add(ALLOCATE, "against qemu-storage-daemon's best mode", Bound::AtLeast(3.0), found, "x");
    let found = against(ALLOCATE_64K, iops(ALLOCATE_64K, VBD_RAW));
    add(ALLOCATE_64K, "qcow2 against raw into a hole", Bound::AtLeast(0.8), found, "x");
    let found = against(OVERLAY, qsd(OVERLAY));
    add(OVERLAY, "against qemu-storage-daemon's best mode", Bound::AtLeast(2.0), found, "x");
    let found = against(SUBCLUSTERS, qsd(SUBCLUSTERS));
    add(SUBCLUSTERS, "against qemu-storage-daemon's best mode", Bound::AtLeast(2.0), found, "x");

    let own = |work: &str| best(works, work, &["vbd"]);
    let convert =
        [(TO_QCOW2, TO_QCOW2_CACHED, 1.5), (TO_RAW, TO_RAW_CACHED, 1.5), (TO_ZSTD, TO_ZSTD_CACHED, 2.0)];
    for (durable, cached, bound) in convert {
        for (work, how) in [(durable, "both durable"), (cached, "neither durable")] {
            let found = best(works, work, &QEMU_IMG).zip(own(work)).map(|(qemu, vbd)| qemu / vbd);
            let what = format!("times as fast as qemu-img's best options, {how}");
            add(work, &what, Bound::AtLeast(bound), found, "x");
        }
    }
    let found = best(works, COMPARE, &QEMU_IMG).zip(own(COMPARE)).map(|(qemu, vbd)| qemu / vbd);
    add(COMPARE, "times as fast as qemu-img", Bound::AtLeast(1.0), found, "x");
    let milliseconds = |work: &str| Some(own(work)? * 1e3);
    add(OPEN, "from start to served", Bound::AtMost(20.0), milliseconds(OPEN), "ms");
    add(CLONE, "an overlay, the program's start included", Bound::AtMost(10.0), milliseconds(CLONE), "ms");
    add(SNAPSHOT, "the program's start included", Bound::AtMost(100.0), milliseconds(SNAPSHOT), "ms");
    let found = best(works, SCALE, &[ONE_QUEUE]).zip(best(works, SCALE, &[FOUR_QUEUES]));
    let found = found.map(|(one, four)| one / four);
    add(SCALE, "four queues against one, two cores", Bound::AtLeast(1.5), found, "x");
    let each = |way| works.get(BITMAP)?.get(way)?.instructions;
    for (than, what) in [
        (NO_BITMAP, "of a random write, more with a bitmap than as it is served"),
        (BARE, "of a random write, more with a bitmap than on the bare disk"),
    ] {
        let found =
            each(ONE_BITMAP).zip(each(than)).map(|(one, none): (f64, f64)| (one / none - 1.0) * 100.0);
        add(BITMAP, what, Bound::AtMost(3.0), found, "%");
    }
    let p99 = |way| best(works, BACKUP, &[way]);
    let found = p99(BESIDE).zip(p99(ALONE)).map(|(beside, alone)| beside / alone);
    add(BACKUP, "of a guest's writes, against no backup", Bound::AtMost(2.0), found, "x");
    verdicts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::build::Timing;
    use crate::bench::loads::Sample;
    use crate::bench::results::Cell;

    #[test]
    fn ratios_are_the_right_way_round() {
        let mut loads = Loads::new();
        for (load, server, iops) in [
            (ALLOCATE, "qsd-native", 8.0),
            (ALLOCATE, "qsd-io_uring", 10.0),
            (ALLOCATE, VBD, 40.0),
            (READ, VBD, 9.0),
            (READ, VBD_RAW, 10.0),
        ] {
            let sample = Sample { iops, mb_per_s: 0.0, latency_us: 0.0, iops_per_cpu: None };
            let cell = Cell { samples: vec![sample], failure: None };
            loads.entry(load.to_owned()).or_default().insert(server.to_owned(), cell);
        }
        let mut works = Works::new();
        for (work, way, seconds) in [
            (TO_ZSTD, "qemu-img", 9.0),
            (TO_ZSTD, "qemu-img -W", 6.0),
            (TO_ZSTD, "vbd", 2.0),
            (OPEN, "vbd", 0.03),
            (BACKUP, ALONE, 1.0),
            (BACKUP, BESIDE, 1.5),
        ] {
            let timing = Timing { seconds: vec![seconds], ..Timing::default() };
            works.entry(work.to_owned()).or_default().insert(way.to_owned(), timing);
        }
        let verdicts = judge(&loads, &works);
        let found = |name: &str| {
            let found = verdicts.iter().find(|verdict| verdict.what.starts_with(name)).unwrap();
            (found.found, found.reached)
        };
        assert_eq!(found(ALLOCATE), (Some(4.0), Some(true)));
        assert_eq!(found(READ), (Some(0.9), Some(false)));
        assert_eq!(found(WRITE), (None, None));
        assert_eq!(found(TO_ZSTD), (Some(3.0), Some(true)));
        assert_eq!(found(OPEN), (Some(30.0), Some(false)));
        assert_eq!(found(BACKUP), (Some(1.5), Some(true)));
    }
}
