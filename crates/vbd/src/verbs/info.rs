//! `vbd info`.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::Context;
use vbd_image::info::{DirectIo, Info};
use vbd_image::open::Kind;
use vbd_image::probe::{Filesystem, Table, TableKind};
use vbd_image::size::Human;

use crate::output;

/// Say what a disk file is, what is in it and who uses it.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file or block device
    file: PathBuf,
    /// Print JSON, sizes in bytes
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let info = Info::of(&args.file)?;
    if args.json {
        return output::print_json(&info);
    }
    output::print(&text(&info)?).context("standard output")
}

/// The form for people: a fact on each line.
fn text(info: &Info) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        // Names and labels are others' words; what could steer a terminal is shown as a question mark.
        writeln!(out, "{name:<13} {}", value.replace(char::is_control, "?"))
    };
    let kind = match info.kind {
        Kind::File => "file",
        Kind::Block => "block device",
    };
    line(kind, info.path.display().to_string())?;
    line("virtual size", format!("{} ({} bytes)", Human(info.virtual_size), info.virtual_size))?;
    if info.virtual_size == 0 {
        line("", "empty: not a disk yet; `vbd create --force` gives it a size".to_owned())?;
    }
    if info.kind == Kind::File {
        line("allocated", Human(info.allocated).to_string())?;
        let mut parts = format!("{}, holes {}", Human(info.data), Human(info.holes));
        for (name, bytes) in [("preallocated", info.preallocated), ("shared with clones", info.shared)] {
            if bytes > 0 {
                write!(parts, ", {name} {}", Human(bytes))?;
            }
        }
        let extents = if info.extents == 1 { "extent" } else { "extents" };
        line("data", format!("{parts} ({} {extents})", info.extents))?;
    }

    match &info.contents.filesystem {
        Some(filesystem) => line("filesystem", describe(filesystem))?,
        None if info.contents.table.is_none() => line("filesystem", "none found".to_owned())?,
        None => {}
    }
    if let Some(table) = &info.contents.table {
        line("partitions", summary(table))?;
        for problem in &table.problems {
            line("", format!("the table {problem}"))?;
        }
        for partition in &table.partitions {
            let mut text =
                format!("{}: {} at {}, ", partition.number, Human(partition.size), partition.start);
            text += &partition.kind;
            if let Some(name) = &partition.name {
                write!(text, " \"{name}\"")?;
            }
            if !partition.fits {
                text += ", ends beyond the disk";
            }
            if let Some(filesystem) = &partition.filesystem {
                write!(text, ": {}", describe(filesystem))?;
            }
            line("", text)?;
        }
    }

    if let Some(host) = &info.host_filesystem {
        line(
            "stored on",
            format!("{} at {}, {} free", host.kind, host.mounted_on.display(), Human(host.free)),
        )?;
    }
    line("direct I/O", direct(info.direct_io))?;
    let mut users: Vec<_> = info.holders.iter().map(ToString::to_string).collect();
    users.extend(info.host_use.as_ref().map(|host| host.facts()));
    if users.is_empty() {
        users.push("nobody".to_owned());
    }
    for (number, user) in users.into_iter().enumerate() {
        line(if number == 0 { "in use by" } else { "" }, user)?;
    }
    Ok(out)
}

fn describe(filesystem: &Filesystem) -> String {
    let mut text = filesystem.kind.to_owned();
    if let Some(label) = &filesystem.label {
        text += &format!(" \"{label}\"");
    }
    if let Some(uuid) = &filesystem.uuid {
        text += &format!(", UUID {uuid}");
    }
    if let Some(size) = filesystem.size {
        text += &format!(", {}", Human(size));
    }
    if let Some(free) = filesystem.free {
        text += &format!(", {} free", Human(free));
    }
    if let Some(trouble) = filesystem.trouble {
        text += &format!("; {trouble}");
    } else if filesystem.clean == Some(true) {
        text += ", clean";
    }
    text
}

fn summary(table: &Table) -> String {
    let kind = match table.kind {
        TableKind::Mbr => "MBR",
        TableKind::Gpt => "GPT",
    };
    let uuid = table.uuid.as_ref().map_or(String::new(), |uuid| format!(", UUID {uuid}"));
    format!("{kind}{uuid}")
}

fn direct(direct: DirectIo) -> String {
    match direct {
        DirectIo { supported: Some(false), .. } => "not possible here".to_owned(),
        DirectIo { offset: Some(offset), memory: Some(memory), .. } => {
            format!("offsets and lengths multiples of {offset}, memory of {memory}")
        }
        DirectIo { offset: Some(offset), .. } => format!("offsets and lengths multiples of {offset}"),
        DirectIo { .. } => "not known".to_owned(),
    }
}
