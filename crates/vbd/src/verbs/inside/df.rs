//! `vbd df`.

use std::path::PathBuf;

use serde::Serialize;
use vbd_image::size::Human;

use super::Access;
use super::shown;
use crate::output::{self, Table};

/// Show how full the filesystems of a disk are.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file or block device
    file: PathBuf,
    /// Print JSON, sizes in bytes
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    access: Access,
}

/// A filesystem for programs.
#[derive(Serialize)]
struct Object {
    partition: Option<u32>,
    label: String,
    uuid: String,
    block_size: u32,
    size: u64,
    used: u64,
    free: u64,
    available: u64,
    inodes: u64,
    inodes_used: u64,
    inodes_free: u64,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut objects = Vec::new();
    for opened in args.access.all(&args.file)? {
        let usage = opened.filesystem.usage()?;
        let superblock = opened.filesystem.superblock();
        let label = superblock.label.split(|&byte| byte == 0).next().unwrap_or_default();
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let uuid = &superblock.uuid;
        let parts = [&uuid[..4], &uuid[4..6], &uuid[6..8], &uuid[8..10], &uuid[10..]];
        objects.push(Object {
            partition: opened.partition,
            label: shown::text(label),
            uuid: parts.map(hex).join("-"),
            block_size: opened.filesystem.block_size(),
            size: usage.size,
            used: usage.size - usage.free,
            free: usage.free,
            available: usage.free - usage.reserved,
            inodes: usage.inodes,
            inodes_used: usage.inodes - usage.free_inodes,
            inodes_free: usage.free_inodes,
        });
    }
    if args.json {
        return output::print_json(&objects);
    }
    let mut table = Table::new(&[
        "PARTITION",
        "LABEL",
        ">SIZE",
        ">USED",
        ">AVAILABLE",
        ">USE",
        ">INODES",
        ">USED",
        ">USE",
    ]);
    let percent = |part: u64, whole: u64| {
        let whole = u128::from(whole).max(1);
        format!("{}%", (u128::from(part) * 100).div_ceil(whole))
    };
    for object in &objects {
        table.row([
            object.partition.map_or_else(|| "-".to_owned(), |number| number.to_string()),
            object.label.clone(),
            Human(object.size).to_string(),
            Human(object.used).to_string(),
            Human(object.available).to_string(),
            percent(object.used, object.used + object.available),
            object.inodes.to_string(),
            object.inodes_used.to_string(),
            percent(object.inodes_used, object.inodes),
        ]);
    }
    Ok(output::print(&table.render(0))?)
}
