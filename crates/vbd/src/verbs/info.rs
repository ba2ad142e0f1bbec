//! `vbd info`.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::Context;
use serde::Serialize;
use vbd_formats::{Format, Link};
use vbd_image::info::{DirectIo, Info};
use vbd_image::open::Kind;
use vbd_image::probe::{Filesystem, Table, TableKind};
use vbd_image::size::Human;

use super::image::GateArgs;
use crate::output;

/// Say what a disk file is, what is in it and who uses it.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file or block device
    file: PathBuf,
    /// Print JSON, sizes in bytes
    #[arg(long)]
    json: bool,
    /// The format of the file; unless said, what its header looks like, which is good enough to be shown
    #[arg(long)]
    format: Option<Format>,
    #[command(flatten)]
    gate: GateArgs,
}

/// All of it, for programs.
#[derive(Serialize)]
struct Object {
    #[serde(flatten)]
    info: Info,
    format: Format,
    /// The images of the disk, the one that was named first.
    chain: Vec<LinkObject>,
    /// Why the chain is not complete.
    chain_problem: Option<String>,
    /// What a qcow2 image says of itself.
    qcow2: Option<vbd_qcow2::info::Info>,
}

#[derive(Serialize)]
struct LinkObject {
    path: String,
    format: Format,
    size: u64,
    data_file: Option<String>,
    backing: Option<String>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut info = Info::of(&args.file)?;
    let image = vbd_image::open::open(&args.file)?;
    let format = match args.format {
        Some(format) => format,
        None => vbd_formats::identify(&image.file, image.size)?
            .and_then(|name| name.parse().ok())
            .unwrap_or(Format::Raw),
    };
    let (chain, problem) = vbd_formats::broken_chain(&args.file, format, &args.gate.gate());
    let qcow2 = match format {
        Format::Qcow2 => vbd_qcow2::info::read(&image.file).ok(),
        _ => None,
    };
    if let Some(top) = chain.first().filter(|_| format != Format::Raw) {
        info.virtual_size = top.size;
    }
    let object = Object {
        info,
        format,
        chain: chain.iter().map(link).collect(),
        chain_problem: problem.map(|error| error.to_string()),
        qcow2,
    };
    if args.json {
        return output::print_json(&object);
    }
    output::print(&text(&object)?).context("standard output")
}

fn link(link: &Link) -> LinkObject {
    LinkObject {
        path: link.path.display().to_string(),
        format: link.format,
        size: link.size,
        data_file: link.data_file.as_ref().map(|path| path.display().to_string()),
        backing: link.backing.clone(),
    }
}

/// The form for people: a fact on each line.
fn text(object: &Object) -> Result<String, std::fmt::Error> {
    let info = &object.info;
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

    if object.format != Format::Raw {
        for (name, value) in image(object) {
            line(name, value)?;
        }
    }

    match &info.contents.filesystem {
        // What begins there is the format itself.
        _ if object.format != Format::Raw => {}
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

/// What an image of a format with a header of its own says: a fact each.
fn image(object: &Object) -> Vec<(&'static str, String)> {
    let mut facts = Vec::new();
    let mut add = |name, value| facts.push((name, value));
    match &object.qcow2 {
        Some(image) => {
            let mut text = format!(
                "{}, version {}, clusters of {}, refcounts of {} bits, {} for compression",
                object.format,
                image.version,
                Human(image.cluster_size),
                image.refcount_bits,
                image.compression
            );
            let words = [
                (image.lazy_refcounts, "lazy refcounts"),
                (image.extended_l2, "subclusters"),
                (image.encryption.is_some(), "encrypted"),
                (image.dirty, "not closed cleanly"),
                (image.corrupt, "marked as corrupt"),
            ];
            words.iter().filter(|(is, _)| *is).for_each(|(_, word)| {
                text += ", ";
                text += word;
            });
            add("format", text);
            for (number, snapshot) in image.snapshots.iter().enumerate() {
                let name = if number == 0 { "snapshots" } else { "" };
                add(name, format!("{} \"{}\", {}", snapshot.id, snapshot.name, Human(snapshot.disk_size)));
            }
            for (number, bitmap) in image.bitmaps.iter().enumerate() {
                let name = if number == 0 { "bitmaps" } else { "" };
                let state = match (bitmap.in_use, bitmap.enabled) {
                    (true, _) => "not saved, so it says nothing",
                    (_, true) => "enabled",
                    (_, false) => "disabled",
                };
                add(name, format!("\"{}\", {} a bit, {state}", bitmap.name, Human(bitmap.granularity)));
            }
            image.unknown_features.iter().chain(&image.problems).for_each(|problem| add("", problem.clone()));
        }
        None => add("format", object.format.to_string()),
    }
    for (number, link) in object.chain.iter().enumerate() {
        if let Some(data) = &link.data_file {
            add("data file", data.clone());
        }
        if number > 0 {
            add("stands on", format!("{} ({}, {})", link.path, link.format, Human(link.size)));
        }
    }
    object.chain_problem.iter().for_each(|problem| add("", problem.clone()));
    facts
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
