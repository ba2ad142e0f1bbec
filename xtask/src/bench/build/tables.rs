//! The tables of works on images.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::judge::{kib_each, seconds_each};
use super::{SERIES, Timing, Works};

/// The ways and what the table calls them.
const WAYS: [(&str, &str); 5] = [
    ("cat", "`cat` of the bytes"),
    ("mke2fs", "`mke2fs -d`"),
    ("loop", "mke2fs, loop, `cp -ax`"),
    ("tar+mke2fs", "tar, `mke2fs -d`"),
    ("vbd", "**vbd**"),
];

/// All of them in Markdown; nothing when nothing was measured.
pub(crate) fn tables(works: &Works) -> String {
    let measured = |work: &BTreeMap<String, Timing>| work.values().any(|timing| !timing.seconds.is_empty());
    if !works.values().any(measured) {
        return String::new();
    }
    let mut text = String::from("\n### Images: seconds, and how many times vbd's\n\n| |");
    WAYS.iter().for_each(|(_, title)| text += &format!(" {title} |"));
    text += " vbd's memory, MiB | rounds |\n|---|";
    text += &"---:|".repeat(WAYS.len() + 2);
    text += "\n";
    for (name, work) in works.iter().filter(|(_, work)| measured(work)) {
        row(&mut text, name, work);
    }
    text += &growth(works);
    text
}

fn row(text: &mut String, name: &str, work: &BTreeMap<String, Timing>) {
    let vbd = work.get("vbd");
    let own = vbd.and_then(Timing::seconds);
    let _ = write!(text, "| {} |", name.trim_start_matches("build/"));
    for (way, _) in WAYS {
        let _ = match (work.get(way).and_then(Timing::seconds), own) {
            (Some(seconds), Some(own)) => write!(text, " {seconds:.3} ({:.2}) |", seconds / own),
            (Some(seconds), None) => write!(text, " {seconds:.3} |"),
            (None, _) => write!(text, " - |"),
        };
    }
    let memory = vbd.and_then(Timing::peak_kib).map_or("-".to_owned(), |kib| format!("{:.0}", kib / 1024.0));
    let rounds = work.values().map(|timing| timing.seconds.len()).max().unwrap_or(0);
    let _ = writeln!(text, " {memory} | {rounds} |");
}

fn growth(works: &Works) -> String {
    let rows: Vec<_> = SERIES
        .into_iter()
        .filter_map(|many| Some((many.files, seconds_each(works, many)?, kib_each(works, many)?)))
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    let mut text = "\n### Many small files: what vbd takes for each\n\n\
                    | files | microseconds | bytes of memory |\n|---:|---:|---:|\n"
        .to_owned();
    for (files, seconds, kib) in rows {
        let _ = writeln!(text, "| {files} | {:.1} | {:.0} |", seconds * 1e6, kib * 1024.0);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_a_cell_for_each_way() {
        let timing =
            |seconds: f64| Timing { seconds: vec![seconds], peak_kib: vec![2048.0], ..Timing::default() };
        let work = BTreeMap::from([("vbd".to_owned(), timing(2.0)), ("cat".to_owned(), timing(1.0))]);
        let text = tables(&Works::from([("build/debian".to_owned(), work)]));
        assert!(text.ends_with("| debian | 1.000 (0.50) | - | - | - | 2.000 (1.00) | 2 | 1 |\n"), "{text}");
        assert_eq!(tables(&Works::new()), "");
        let failed = BTreeMap::from([("vbd".to_owned(), Timing::default())]);
        assert_eq!(tables(&Works::from([("build/debian".to_owned(), failed)])), "");
    }
}
