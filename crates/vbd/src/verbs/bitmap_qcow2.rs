//! `vbd bitmap` on a qcow2 image that nobody serves: its bitmaps are in it.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::Context;
use serde::Serialize;
use vbd_daemon::control::BitmapChange;
use vbd_formats::ImageSpec;
use vbd_image::lease::{self, Lease, Mode};
use vbd_image::size::Human;
use vbd_qcow2::bitmaps;

use crate::output::{Table, print, print_json};

/// A bitmap, for programs.
#[derive(Serialize)]
struct Object {
    name: String,
    granularity: u64,
    enabled: bool,
    /// Bytes in blocks that are marked, if the bitmap was saved.
    marked: Option<u64>,
}

/// The image's file with its lease.
fn open(spec: &ImageSpec, mode: Mode) -> anyhow::Result<(File, Lease)> {
    let file = File::options().read(true).write(mode == Mode::Write).open(&spec.path);
    let file = file.with_context(|| format!("{}: cannot open it", spec.path.display()))?;
    let options = lease::Options { wait: spec.lease_wait, ..lease::Options::default() };
    let lease = Lease::acquire(file.as_fd(), &spec.path, mode, options)?;
    Ok((file, lease))
}

pub(super) fn change(spec: &ImageSpec, change: &BitmapChange) -> anyhow::Result<()> {
    let (file, _lease) = open(spec, Mode::Write)?;
    let done = match change {
        BitmapChange::Add { name, granularity, .. } => {
            bitmaps::add(&file, name, granularity.unwrap_or(vbd_core::bitmap::DEFAULT_GRANULARITY), true)
        }
        BitmapChange::Remove { name } => bitmaps::remove(&file, name),
        BitmapChange::Enable { name } => bitmaps::enable(&file, name, true),
        BitmapChange::Disable { name } => bitmaps::enable(&file, name, false),
        BitmapChange::Clear { name } => bitmaps::clear(&file, name),
        BitmapChange::Merge { name, from } => {
            bitmaps::merge(&file, name, &from.iter().map(String::as_str).collect::<Vec<_>>())
        }
    };
    done.with_context(|| spec.path.display().to_string())
}

pub(super) fn list(spec: &ImageSpec, json: bool) -> anyhow::Result<()> {
    let (file, _lease) = open(spec, Mode::Read)?;
    let held = bitmaps::list(&file).with_context(|| spec.path.display().to_string())?;
    let object = |held: &bitmaps::Held| Object {
        name: held.name.clone(),
        granularity: held.granularity,
        enabled: held.enabled,
        marked: held.bits.as_ref().map(vbd_core::bitmap::Bitmap::marked_bytes),
    };
    let objects: Vec<_> = held.iter().map(object).collect();
    if json {
        return print_json(&objects);
    }
    let mut table = Table::new(&["BITMAP", ">BLOCK", ">MARKED", "STATE"]);
    for bitmap in objects {
        let state = match (bitmap.marked, bitmap.enabled) {
            (None, _) => "not saved: remove it",
            (_, true) => "enabled",
            (_, false) => "disabled",
        };
        let marked = bitmap.marked.map_or("-".to_owned(), |marked| Human(marked).to_string());
        table.row([bitmap.name, Human(bitmap.granularity).to_string(), marked, state.to_owned()]);
    }
    Ok(print(&table.render(0))?)
}
