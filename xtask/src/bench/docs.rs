//! The tables, on the terminal and in docs/performance.md.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

use super::build;
use super::files::Storage;
use super::image;
use super::loads::{Load, Sample};
use super::peers::Peer;
use super::results::Results;
use super::targets::{Verdict, judge};

/// Where a section of the page begins and ends.
struct Marks {
    begin: &'static str,
    end: &'static str,
}

const DISKS: Marks = Marks {
    begin: "<!-- cargo xtask bench --write-docs: begin -->\n",
    end: "<!-- cargo xtask bench --write-docs: end -->\n",
};
const IMAGES: Marks = Marks {
    begin: "<!-- cargo xtask bench --only build --write-docs: begin -->\n",
    end: "<!-- cargo xtask bench --only build --write-docs: end -->\n",
};
const LIVE: Marks = Marks {
    begin: "<!-- cargo xtask bench --only image --write-docs: begin -->\n",
    end: "<!-- cargo xtask bench --only image --write-docs: end -->\n",
};

/// Replaces what is between the marks of the sections for which there are results.
pub(crate) fn write(path: &Path, results: &Results) -> Result<()> {
    let mut text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    for (marks, tables) in [(DISKS, disks(results)), (IMAGES, images(results)), (LIVE, live(results))] {
        if let Some(tables) = tables {
            let Marks { begin, end } = marks;
            text = replace(&text, &marks, &tables).with_context(|| {
                format!("{}: no place for the tables: it needs\n{begin}{end}", path.display())
            })?;
        }
    }
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

fn replace(text: &str, marks: &Marks, tables: &str) -> Option<String> {
    let Marks { begin, end } = marks;
    let (head, rest) = text.split_once(begin)?;
    let (_, tail) = rest.split_once(end)?;
    Some(format!("{head}{begin}\n{tables}\n{end}{tail}"))
}

/// Everything, in Markdown.
pub(crate) fn tables(results: &Results) -> String {
    let sections = [disks(results), images(results), live(results)];
    sections.into_iter().flatten().collect::<Vec<_>>().join("\n")
}

/// What is said of images.
fn images(results: &Results) -> Option<String> {
    if results.build.is_empty() {
        return None;
    }
    let mut text = machine(results);
    text += "\n### Targets of images\n\n";
    text += &targets(&build::judge::judge(&results.build));
    text += &build::tables(&results.build);
    let ways = results.build.iter().flat_map(|(work, ways)| {
        ways.iter().filter_map(move |(way, timing)| Some((work, way, timing.failure.as_ref()?)))
    });
    text += &failures(ways);
    Some(text)
}

/// What is said of images that live.
fn live(results: &Results) -> Option<String> {
    let (loads, works) = (&results.image_loads, &results.image);
    if loads.is_empty() && works.is_empty() {
        return None;
    }
    let mut text = machine(results);
    text += "\n### Targets of images that live\n\n";
    text += &targets(&image::judge::judge(loads, works));
    text += &image::tables(loads, works);
    let servers = loads.iter().flat_map(|(load, cells)| {
        cells.iter().filter_map(move |(server, cell)| Some((load, server, cell.failure.as_ref()?)))
    });
    let ways = works.iter().flat_map(|(work, ways)| {
        ways.iter().filter_map(move |(way, timing)| Some((work, way, timing.failure.as_ref()?)))
    });
    text += &failures(servers.chain(ways));
    Some(text)
}

/// What is said of disks that are served.
fn disks(results: &Results) -> Option<String> {
    if results.loads.is_empty() && results.idle.is_none() && results.ublk.is_empty() {
        return None;
    }
    let mut text = machine(results) + &settings(results);
    text += "\n### Targets\n\n";
    text += &targets(&judge(results));
    for storage in Storage::ALL {
        let columns: Vec<Load> =
            Load::ALL.into_iter().filter(|&l| results.loads.contains_key(&key(storage, l))).collect();
        if columns.is_empty() {
            continue;
        }
        let where_ = match storage {
            Storage::Disk => "On the disk",
            Storage::Memory => "File in memory",
        };
        let rate = |load: Load, s: &Sample| Some(if load.block < 1 << 20 { s.iops } else { s.mb_per_s });
        let _ = write!(text, "\n### {where_}: IOPS (1M: MB/s), and the ratio to fio on the file\n\n");
        text += &table(results, storage, &columns, |load, peer, cell| {
            let value = cell(peer, &|s| rate(load, s))?;
            let file = cell(Peer::File, &|s| rate(load, s));
            Some(format!(
                "{}{}",
                thousands(value),
                file.map_or(String::new(), |file| format!(" ({:.2})", value / file))
            ))
        });
        let _ = write!(text, "\n### {where_}: mean latency in microseconds\n\n");
        text += &table(results, storage, &columns, |_, peer, cell| {
            Some(format!("{:.1}", cell(peer, &|s| Some(s.latency_us))?))
        });
        let _ = write!(text, "\n### {where_}: requests per CPU second of the server\n\n");
        text += &table(results, storage, &columns, |_, peer, cell| {
            Some(thousands(cell(peer, &|s| s.iops_per_cpu)?))
        });
    }
    text += &idle(results);
    text += &ublk(results);
    let peers = results.loads.iter().flat_map(|(load, cells)| {
        cells.iter().filter_map(move |(peer, cell)| Some((load, peer, cell.failure.as_ref()?)))
    });
    text += &failures(peers);
    Some(text)
}

fn idle(results: &Results) -> String {
    let Some(idle) = &results.idle else {
        return String::new();
    };
    format!(
        "\n### 1,000 idle disks in one process\n\n\
         | | no clients | a client on each, one queue |\n|---|---:|---:|\n\
         | seconds until all are there | {:.2} | {:.2} more |\n\
         | memory of each (PSS), KiB | {:.1} | {:.1} |\n\
         | CPU seconds over 5 s | {:.4} | {:.4} |\n",
        idle.attach_s,
        idle.connect_s,
        idle.kib_unconnected,
        idle.kib_connected,
        idle.cpu_unconnected_s,
        idle.cpu_connected_s
    )
}

fn ublk(results: &Results) -> String {
    if results.ublk.is_empty() {
        return String::new();
    }
    let mut text =
        "\n### ublk, in an emulated guest: IOPS, and the ratio to a loop device with direct I/O\n\n\
                    | | loop, direct I/O | **vbd, ublk** |\n|---|---:|---:|\n"
            .to_owned();
    for row in &results.ublk {
        let (looped, ublk) = (thousands(row.looped), thousands(row.ublk));
        let _ = writeln!(text, "| {} | {looped} (1.00) | {ublk} ({:.2}) |", row.load, row.ratio);
    }
    text
}

fn machine(results: &Results) -> String {
    let m = &results.machine;
    format!(
        "Machine: {}, {} cores, {} GiB of memory, Linux {}, {}. Programs: {}.\n",
        m.cpu,
        m.cores,
        m.memory_gib,
        m.kernel,
        m.filesystem,
        m.programs.join("; ")
    )
}

fn settings(results: &Results) -> String {
    let s = &results.settings;
    format!(
        "Each number is the median of {} interleaved runs of {} s; the vhost-user client waited by `{}`.\n",
        s.runs, s.seconds, s.wait
    )
}

fn targets(verdicts: &[Verdict]) -> String {
    let mut text = String::from("| what | target | found | |\n|---|---|---|---|\n");
    for v in verdicts {
        let found = v.found.map_or_else(|| "not measured".into(), |f| format!("{f:.2} {}", v.unit));
        let mark = match v.reached {
            Some(true) => "pass",
            Some(false) => "**miss**",
            None => "",
        };
        let _ = writeln!(text, "| {} | {} {} | {found} | {mark} |", v.what, v.target, v.unit);
    }
    let (reached, judged) =
        verdicts.iter().filter_map(|v| v.reached).fold((0, 0), |(r, j), ok| (r + u32::from(ok), j + 1));
    let _ = write!(text, "\n{reached} of {judged} reached.\n");
    text
}

type Median<'a> = &'a dyn Fn(Peer, &dyn Fn(&Sample) -> Option<f64>) -> Option<f64>;

/// A table of peers by loads; a peer with nothing to say is left out.
fn table(
    results: &Results,
    storage: Storage,
    columns: &[Load],
    cell: impl Fn(Load, Peer, Median<'_>) -> Option<String>,
) -> String {
    let mut text = String::from("| |");
    columns.iter().for_each(|load| text += &format!(" {} |", load.name()));
    text += "\n|---|";
    text += &"---:|".repeat(columns.len());
    text += "\n";
    for peer in Peer::ALL {
        let value = |&load: &Load| cell(load, peer, &|peer, of| results.get(&key(storage, load), peer, of));
        let values: Vec<Option<String>> = columns.iter().map(value).collect();
        if values.iter().any(Option::is_some) {
            let _ = write!(text, "| {} |", peer.title());
            values.iter().for_each(|value| text += &format!(" {} |", value.as_deref().unwrap_or("-")));
            text += "\n";
        }
    }
    text
}

/// What there is nothing of: work, peer and reason.
fn failures<'a>(of: impl Iterator<Item = (&'a String, &'a String, &'a String)>) -> String {
    let mut text = String::new();
    for (work, peer, failure) in of {
        let _ = writeln!(text, "- {work}, {peer}: {}", failure.lines().next().unwrap_or_default());
    }
    if text.is_empty() { text } else { format!("\n### What did not run\n\n{text}") }
}

fn key(storage: Storage, load: Load) -> String {
    storage.key(load)
}

/// A whole number with its thousands set apart.
fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_set_apart() {
        assert_eq!(thousands(7.4), "7");
        assert_eq!(thousands(999.6), "1,000");
        assert_eq!(thousands(1_234_567.0), "1,234,567");
    }

    #[test]
    fn tables_go_between_the_marks_and_nowhere_else() {
        let Marks { begin, end } = IMAGES;
        let other = format!("{}kept\n{}", DISKS.begin, DISKS.end);
        let text = format!("before\n{other}{begin}old\n{end}after\n");
        let new = replace(&text, &IMAGES, "new\n").unwrap();
        assert_eq!(new, format!("before\n{other}{begin}\nnew\n\n{end}after\n"));
        assert_eq!(replace(&new, &IMAGES, "new\n"), Some(new));
        assert_eq!(replace("no marks", &IMAGES, "new"), None);
    }
}
