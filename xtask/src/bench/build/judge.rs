//! What `vbd build` and the rest have to reach.

use super::{
    CLONE, DEBIAN, EDIT, LAYERS, LS, MANY_DIRECTORIES, Many, ONE_DIRECTORY, OVERLAY, SERIES, SHARED, Works,
    shared_name,
};
use crate::bench::targets::{Bound, Verdict, verdict};

/// What still counts as the same for each entry, or for any number of bytes: rounds differ by less.
const SAME: f64 = 1.25;
/// What still counts as independent of the bytes, of which there are ten times as many.
const INDEPENDENT: f64 = 1.5;

/// Judges the targets of images.
pub(crate) fn judge(works: &Works) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    let mut add = |work: &str, what: &str, bound, found, unit| {
        verdicts.push(verdict(format!("{work}: {what}"), bound, found, unit));
    };
    let faster = |work: &str, peer: &str| Some(seconds(works, work, peer)? / seconds(works, work, "vbd")?);

    let found = faster(DEBIAN, "mke2fs");
    add(DEBIAN, "times as fast as mke2fs -d", Bound::AtLeast(4.0), found, "x");
    let found = faster(DEBIAN, "loop");
    add(DEBIAN, "times as fast as mke2fs, loop mount, cp -ax", Bound::AtLeast(5.0), found, "x");
    let found = faster(DEBIAN, "cat").map(|faster| 1.0 / faster);
    add(DEBIAN, "time against cat of the same bytes", Bound::AtMost(1.5), found, "x");
    for (many, bound) in [(ONE_DIRECTORY, 20.0), (MANY_DIRECTORIES, 5.0)] {
        let found = faster(&many.name(), "mke2fs");
        add(&many.name(), "times as fast as mke2fs -d", Bound::AtLeast(bound), found, "x");
    }

    let [least, .., most] = SERIES;
    let grown = |each: fn(&Works, Many) -> Option<f64>| Some(each(works, most)? / each(works, least)?);
    let what = format!("time of an entry, against {}", least.name());
    add(&most.name(), &what, Bound::AtMost(SAME), grown(seconds_each), "x");
    let what = format!("memory of an entry, against {}", least.name());
    add(&most.name(), &what, Bound::AtMost(SAME), grown(kib_each), "x");
    let found = kib_each(works, most);
    add(&most.name(), "memory of an entry", Bound::AtMost(1.0), found, "KiB");

    let [little, much] = SHARED.map(shared_name);
    let found = seconds(works, &much, "vbd").zip(seconds(works, &little, "vbd"));
    let what = format!("time against {little}");
    add(&much, &what, Bound::AtMost(INDEPENDENT), found.map(|(much, little)| much / little), "x");
    let found = faster(LAYERS, "tar+mke2fs");
    add(LAYERS, "times as fast as tar and mke2fs -d", Bound::AtLeast(3.0), found, "x");

    let milliseconds = |work| Some(seconds(works, work, "vbd")? * 1e3);
    add(EDIT, "one file of a 10 GiB image", Bound::AtMost(20.0), milliseconds(EDIT), "ms");
    add(CLONE, "a 10 GiB image, with a new identity", Bound::AtMost(20.0), milliseconds(CLONE), "ms");
    let found = milliseconds(OVERLAY);
    add(OVERLAY, "a 10 GiB image, with a new identity", Bound::AtMost(20.0), found, "ms");
    add(LS, "the root of a 10 GiB image", Bound::AtMost(10.0), milliseconds(LS), "ms");
    verdicts
}

fn seconds(works: &Works, work: &str, way: &str) -> Option<f64> {
    works.get(work)?.get(way)?.seconds()
}

/// Seconds of vbd for each file.
pub(super) fn seconds_each(works: &Works, many: Many) -> Option<f64> {
    Some(seconds(works, &many.name(), "vbd")? / many.files as f64)
}

/// KiB of vbd's memory at most, for each file.
pub(super) fn kib_each(works: &Works, many: Many) -> Option<f64> {
    Some(works.get(&many.name())?.get("vbd")?.peak_kib()? / many.files as f64)
}

#[cfg(test)]
mod tests {
    use super::super::Timing;
    use super::*;

    fn works(rows: &[(&str, &str, f64, f64)]) -> Works {
        let mut works = Works::new();
        for &(work, way, seconds, kib) in rows {
            let timing = Timing { seconds: vec![seconds], peak_kib: vec![kib], ..Timing::default() };
            works.entry(work.to_owned()).or_default().insert(way.to_owned(), timing);
        }
        works
    }

    #[test]
    fn ratios_are_the_right_way_round() {
        let [least, .., most] = SERIES.map(Many::name);
        let works = works(&[
            (DEBIAN, "vbd", 2.0, 0.0),
            (DEBIAN, "mke2fs", 8.0, 0.0),
            (DEBIAN, "loop", 9.0, 0.0),
            (DEBIAN, "cat", 1.0, 0.0),
            (&least, "vbd", 1.0, 100_000.0),
            (&most, "vbd", 11.0, 2_000_000.0),
            (LS, "vbd", 0.004, 0.0),
        ]);
        let found = |what: &str| {
            let verdicts = judge(&works);
            let found = verdicts.into_iter().find(|v| v.what.contains(what)).unwrap();
            (found.found.map(|f| (f * 100.0).round() / 100.0), found.reached)
        };
        assert_eq!(found("debian: times as fast as mke2fs -d"), (Some(4.0), Some(true)));
        assert_eq!(found("loop mount"), (Some(4.5), Some(false)));
        assert_eq!(found("cat of the same bytes"), (Some(2.0), Some(false)));
        assert_eq!(found("time of an entry"), (Some(1.1), Some(true)));
        assert_eq!(found("memory of an entry, against"), (Some(2.0), Some(false)));
        assert_eq!(found("1000: memory of an entry"), (Some(2.0), Some(false)));
        assert_eq!(found("ls: the root"), (Some(4.0), Some(true)));
        assert_eq!(found("clone"), (None, None));
    }
}
