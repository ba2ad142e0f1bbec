//! The options of `vbd build` that are about whole disks.

use std::path::{Path, PathBuf};

use anyhow::Context;
use vbd_fs::{Architecture, Boot, DiskSpec, TableKind, Tailor};
use vbd_image::size::Size;

use crate::UsageError;

/// The root device of a domain whose disk is one filesystem, as Xen's examples call it.
const XEN_ROOT: &str = "/dev/xvda";

#[derive(clap::Args)]
#[command(next_help_heading = "Whole disk")]
pub(crate) struct DiskArgs {
    /// Make a disk with a partition table, gpt or mbr: an EFI system partition, swap if asked for, and the filesystem as
    /// its root
    #[arg(long, value_name = "TABLE")]
    disk: Option<TableKind>,
    /// A TOML file that describes the disk, with the keys of `[disk.build.disk]`; the options add to it
    #[arg(long, value_name = "FILE")]
    disk_layout: Option<PathBuf>,
    /// Who starts the system: uefi (the tree needs a kernel and systemd-boot), xen (writes a grub.cfg) or none
    #[arg(long, value_name = "HOW")]
    boot: Option<Boot>,
    /// The size of the EFI system partition, 256M by default
    #[arg(long, value_name = "SIZE")]
    esp: Option<Size>,
    /// The size of a swap partition
    #[arg(long, value_name = "SIZE")]
    swap: Option<Size>,
    /// A word more for the kernel's command line; may be given again
    #[arg(long = "kernel-option", value_name = "WORD", allow_hyphen_values = true)]
    kernel_options: Vec<String>,
    /// The processor that the system is for, x86-64 or arm64, instead of this machine's
    #[arg(long, value_name = "NAME")]
    architecture: Option<Architecture>,
    /// The disk's UUID (gpt) or number (mbr), instead of one that follows from the request
    #[arg(long, value_name = "UUID")]
    disk_uuid: Option<String>,
}

impl DiskArgs {
    /// The disk that is asked for, if one is. `tailor` gets what Xen's boot loaders need on a disk without partitions.
    pub(crate) fn disk(self, tailor: &mut Tailor) -> anyhow::Result<Option<DiskSpec>> {
        let described = self.disk_layout.as_deref().map(read).transpose()?;
        let disk = match (described, self.disk) {
            (Some(disk), None) => Some(disk),
            (Some(disk), Some(table)) => Some(DiskSpec { table, ..disk }),
            (None, table) => table.map(DiskSpec::new),
        };
        let Some(mut disk) = disk else {
            return self.without(tailor).map(|()| None);
        };
        disk.boot = self.boot.or(disk.boot);
        disk.esp = self.esp.or(disk.esp);
        disk.swap = self.swap.or(disk.swap);
        disk.kernel_options.extend(self.kernel_options);
        disk.architecture = self.architecture.or(disk.architecture);
        disk.uuid = self.disk_uuid.or(disk.uuid);
        Ok(Some(disk))
    }

    fn without(self, tailor: &mut Tailor) -> anyhow::Result<()> {
        let of_disks = self.esp.is_some()
            || self.swap.is_some()
            || self.architecture.is_some()
            || self.disk_uuid.is_some();
        if of_disks || self.boot == Some(Boot::Uefi) {
            let text = "--esp, --swap, --architecture, --disk-uuid and --boot uefi are for a whole disk: add --disk gpt";
            return Err(UsageError(text.to_owned()).into());
        }
        if self.boot == Some(Boot::Xen) {
            let console = tailor.serial_console.as_deref().unwrap_or("hvc0");
            let mut words = vec![format!("root={XEN_ROOT}"), "ro".to_owned(), format!("console={console}")];
            words.extend(self.kernel_options);
            tailor.xen_boot.get_or_insert_with(|| words.join(" "));
        } else if !self.kernel_options.is_empty() {
            return Err(UsageError("--kernel-option is for --disk or --boot xen".to_owned()).into());
        }
        Ok(())
    }
}

/// Reads a description; paths in it begin where it is.
fn read(file: &Path) -> anyhow::Result<DiskSpec> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut disk = DiskSpec::from_toml(&text).with_context(|| file.display().to_string())?;
    disk.begin_paths_at(file.parent().unwrap_or(Path::new("")));
    Ok(disk)
}
