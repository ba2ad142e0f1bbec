//! `vbd amend`.

use std::path::PathBuf;

use vbd_formats::{Format, KeyChange};
use vbd_luks::Secret;
use vbd_qcow2::{Amend, Version};

use super::image::ImageArgs;
use crate::UsageError;
use crate::output::print;

/// Change options of an image that is there, or the keys of an encrypted one. What guests read from it stays as it is.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The image; nobody may be using it
    file: PathBuf,
    /// The version of the format: 2 (0.10), for programs before 2013, or 3 (1.1)
    #[arg(long, value_name = "VERSION", value_parser = version)]
    compat: Option<Version>,
    /// Whether reference counts may be written late
    #[arg(long, value_name = "on|off", value_parser = on_or_off)]
    lazy_refcounts: Option<bool>,
    /// The format of the backing file, as it is written into the image; nothing is read from there
    #[arg(long, value_name = "FORMAT")]
    backing_format: Option<Format>,
    /// Whether the data file always reads as a raw image; that can be given up, and not be had later
    #[arg(long, value_name = "on|off", value_parser = on_or_off)]
    data_file_raw: Option<bool>,
    /// Bits of a reference count: 1, 2, 4, 8, 16, 32 or 64
    #[arg(long, value_name = "BITS")]
    refcount_bits: Option<u32>,
    /// Have the key in this file open the image, too; --key-file or --key-fd is one that does already
    #[arg(long, value_name = "FILE", conflicts_with = "add_key_fd")]
    add_key_file: Option<PathBuf>,
    /// Have the key of this descriptor open it, too
    #[arg(long, value_name = "N")]
    add_key_fd: Option<i32>,
    /// Have the key in this file open it no more. The last one stays
    #[arg(long, value_name = "FILE", conflicts_with_all = ["remove_key_fd", "remove_key_slot"])]
    remove_key_file: Option<PathBuf>,
    /// Have the key of this descriptor open it no more
    #[arg(long, value_name = "N", conflicts_with = "remove_key_slot")]
    remove_key_fd: Option<i32>,
    /// Give up the key slot of this number, 0 to 7, whose key is lost; --key-file or --key-fd is one that stays
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(..8))]
    remove_key_slot: Option<u8>,
    #[command(flatten)]
    image: ImageArgs,
}

fn on_or_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("it is on or off".to_owned()),
    }
}

fn version(text: &str) -> Result<Version, String> {
    match text {
        "2" | "0.10" => Ok(Version::V2),
        "3" | "1.1" => Ok(Version::V3),
        _ => Err("it is 2 (0.10) or 3 (1.1)".to_owned()),
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let options = Amend {
        version: args.compat,
        lazy_refcounts: args.lazy_refcounts,
        backing_format: args.backing_format.map(|format| format.to_string()),
        data_file_raw: args.data_file_raw,
        refcount_bits: args.refcount_bits,
    };
    let add = Secret::from_either(args.add_key_file.as_deref(), args.add_key_fd)?;
    let remove = Secret::from_either(args.remove_key_file.as_deref(), args.remove_key_fd)?;
    let remove = match args.remove_key_slot {
        Some(slot) => Some(KeyChange::RemoveSlot(slot.into())),
        None => remove.map(KeyChange::Remove),
    };
    let changes_options = options != Amend::default();
    if !changes_options && add.is_none() && remove.is_none() {
        return Err(UsageError("nothing is to be changed: say what, as --compat 3".to_owned()).into());
    }
    let spec = args.image.spec(&args.file)?;
    let mut done = if changes_options { vbd_formats::amend(&spec, &options)? } else { Vec::new() };
    // A new key first: the one that goes may be the only one before.
    for change in add.map(KeyChange::Add).into_iter().chain(remove) {
        let slots = vbd_formats::change_key(&spec, &change)?;
        done.extend(slots.iter().map(|slot| match change {
            KeyChange::Add(_) => format!("key slot {slot} takes the new key"),
            _ => format!("key slot {slot} is free"),
        }));
    }
    if done.is_empty() {
        done.push("is so already".to_owned());
    }
    done.iter().try_for_each(|line| print(&format!("{}: {line}\n", args.file.display())))?;
    Ok(())
}
