//! The tables, on the terminal and in docs/performance.md.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

use super::files::Storage;
use super::loads::{Load, Sample};
use super::peers::Peer;
use super::results::Results;
use super::targets::Verdict;

const BEGIN: &str = "<!-- cargo xtask bench --write-docs: begin -->\n";
const END: &str = "<!-- cargo xtask bench --write-docs: end -->\n";

/// Replaces what is between the two marks of the file.
pub(crate) fn write(path: &Path, results: &Results, verdicts: &[Verdict]) -> Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let text = replace(&text, &tables(results, verdicts))
        .with_context(|| format!("{}: no place for the tables: it needs\n{BEGIN}{END}", path.display()))?;
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

fn replace(text: &str, tables: &str) -> Option<String> {
    let (head, rest) = text.split_once(BEGIN)?;
    let (_, tail) = rest.split_once(END)?;
    Some(format!("{head}{BEGIN}\n{tables}\n{END}{tail}"))
}

/// Everything, in Markdown.
pub(crate) fn tables(results: &Results, verdicts: &[Verdict]) -> String {
    let mut text = machine(results);
    text += "\n### Targets\n\n";
    text += &targets(verdicts);
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
    text += &failures(results);
    text
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
        let _ = writeln!(text, "| {} | {looped} (1.00) | {ublk} ({:.2}) |", row.load, row.ratio());
    }
    text
}

fn machine(results: &Results) -> String {
    let (m, s) = (&results.machine, &results.settings);
    format!(
        "Machine: {}, {} cores, {} GiB of memory, Linux {}, {}. Programs: {}.\n\
         Each number is the median of {} interleaved runs of {} s; the vhost-user client waited by `{}`.\n",
        m.cpu,
        m.cores,
        m.memory_gib,
        m.kernel,
        m.filesystem,
        m.programs.join("; "),
        s.runs,
        s.seconds,
        s.wait
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

fn failures(results: &Results) -> String {
    let mut text = String::new();
    for (load, cells) in &results.loads {
        for (peer, failure) in cells.iter().filter_map(|(peer, cell)| Some((peer, cell.failure.as_ref()?))) {
            let _ = writeln!(text, "- {load}, {peer}: {}", failure.lines().next().unwrap_or_default());
        }
    }
    if text.is_empty() { text } else { format!("\n### What did not run\n\n{text}") }
}

fn key(storage: Storage, load: Load) -> String {
    format!("{}/{}", storage.name(), load.name())
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
        let text = format!("before\n{BEGIN}old\n{END}after\n");
        let new = replace(&text, "new\n").unwrap();
        assert_eq!(new, format!("before\n{BEGIN}\nnew\n\n{END}after\n"));
        assert_eq!(replace(&new, "new\n"), Some(new));
        assert_eq!(replace("no marks", "new"), None);
    }
}
