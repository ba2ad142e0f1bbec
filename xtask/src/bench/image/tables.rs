//! The tables of images that live.

use std::fmt::Write as _;

use super::jobs::seconds;
use super::served::{Loads, QSD, VBD, VBD_RAW};
use crate::bench::build::Works;

/// All of them in Markdown.
pub(crate) fn tables(loads: &Loads, works: &Works) -> String {
    let mut text = String::new();
    if !loads.is_empty() {
        let servers = [QSD[0], QSD[1], VBD_RAW, VBD];
        text += "\n### qcow2 over vhost-user: IOPS, and how many times vbd's\n\n| |";
        servers.iter().for_each(|server| text += &format!(" {server} |"));
        text += "\n|---|";
        text += &"---:|".repeat(servers.len());
        text += "\n";
        for (load, cells) in loads {
            let iops = |server: &str| cells.get(server)?.median(|sample| Some(sample.iops));
            let _ = write!(text, "| {} |", load.trim_start_matches("image/"));
            for server in servers {
                let _ = match (iops(server), iops(VBD)) {
                    (Some(iops), Some(own)) => write!(text, " {iops:.0} ({:.2}) |", iops / own),
                    (Some(iops), None) => write!(text, " {iops:.0} |"),
                    (None, _) => write!(text, " - |"),
                };
            }
            text += "\n";
        }
    }
    if !works.is_empty() {
        text += "\n### Work on images: seconds (of a backup: the 99th percentile of a guest's writes)\n\n";
        text += "| | way | seconds | rounds |\n|---|---|---:|---:|\n";
        for (work, ways) in works {
            for (way, timing) in ways {
                if let Some(count) = timing.instructions {
                    let _ = writeln!(
                        text,
                        "| {} | {way} | {count:.0} instructions | 1 |",
                        work.trim_start_matches("image/")
                    );
                }
                let Some(median) = seconds(timing) else { continue };
                let rounds = timing.seconds.len();
                let _ = writeln!(
                    text,
                    "| {} | {way} | {median:.4} | {rounds} |",
                    work.trim_start_matches("image/")
                );
            }
        }
    }
    text
}
