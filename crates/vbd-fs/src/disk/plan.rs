//! What goes where on a disk, and what everything is called: from the request alone, so that the same request gives the
//! same names.

use vbd_image::partition::{
    ALIGNMENT, BOOTABLE, Format, GROW_FILESYSTEM, Guid, Kind, Layout, Misfit, Partition, Table, Wish, kind,
};
use vbd_image::size::Human;

use super::spec::{Boot, DiskSpec, Holds, PartitionSpec, TableKind, mbr_number};
use super::{Architecture, boot};
use crate::digest::Origin;
use crate::tailor::{Mount, Tailor, Text};
use crate::vfat::Name;
use crate::{BuildOptions, BuildSpec, Error, ImageSize, Result, Source};

/// Where the EFI system partition is mounted.
const ESP_MOUNT: &str = "/boot/efi";
/// A size for a root whose own is not known yet, in bytes.
const PROVISIONAL: u64 = 1 << 30;

/// A disk as it is to be.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) table: Table,
    /// What is in the partitions, in their order.
    pub(crate) contents: Vec<Content>,
    pub(crate) architecture: Architecture,
    /// Whether the EFI system partition is filled; where it is not asked for, a tree without a kernel is no error.
    pub(crate) uefi: Uefi,
    /// The kernel's command line.
    pub(crate) command_line: String,
    /// What is changed in the root's tree.
    pub(crate) tailor: Tailor,
    layout: Layout,
    wishes: Vec<Wish>,
}

/// Whether firmware is to start the system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Uefi {
    Not,
    IfThereIsAKernel,
    Asked,
}

/// What is in a partition.
#[derive(Debug)]
pub(crate) enum Content {
    Esp(Name),
    Swap { uuid: Guid, label: Option<String> },
    Filesystem(PartitionSpec),
    Vfat(PartitionSpec, Name),
    Nothing,
    Root,
}

impl Plan {
    pub(crate) fn new(options: &BuildOptions, disk: &DiskSpec) -> Result<Plan> {
        disk.check()?;
        let origin = origin(options);
        let gpt = disk.table == TableKind::Gpt;
        let architecture = disk.architecture.unwrap_or_else(Architecture::of_this_machine);
        let format = match (disk.table, &disk.uuid) {
            (TableKind::Gpt, None) => Format::Gpt(origin.uuid("disk")),
            (TableKind::Gpt, Some(uuid)) => {
                Format::Gpt(uuid.parse().map_err(|e| Error::Invalid(format!("{e}")))?)
            }
            (TableKind::Mbr, None) => Format::Mbr(origin.number("disk")),
            (TableKind::Mbr, Some(number)) => Format::Mbr(mbr_number(number)?),
        };
        let layout = Layout { format, sector: disk.sector_size.unwrap_or(512) };

        let wish = |size: Option<u64>, kind: Guid, old: u8, uuid: Option<Guid>, name: &str| Wish {
            size,
            kind: if gpt { Kind::Gpt(kind) } else { Kind::Mbr(old) },
            uuid: gpt.then(|| uuid.unwrap_or_else(|| origin.uuid(&format!("partition {name}")))),
            name: if gpt { name.chars().take(36).collect() } else { String::new() },
            attributes: 0,
        };
        let mut wishes = Vec::new();
        let mut contents = Vec::new();
        if let Some(size) = disk.esp_size() {
            wishes.push(wish(Some(size), kind::ESP, 0xEF, None, "esp"));
            contents.push(Content::Esp(Name::new("ESP", origin.number("esp")).map_err(Error::Invalid)?));
        }
        if let Some(size) = disk.swap {
            wishes.push(wish(Some(size.bytes()), kind::SWAP, 0x82, None, "swap"));
            contents.push(Content::Swap { uuid: origin.uuid("swap"), label: None });
        }
        for (index, partition) in disk.partition.iter().enumerate() {
            let name = name(partition, index);
            let (usual, old) = types(partition);
            let kind = partition.kind.unwrap_or(usual);
            wishes.push(wish(Some(partition.size.bytes()), kind, old, partition.uuid, &name));
            contents.push(content(partition, &name, origin)?);
        }
        let mut root = wish(None, architecture.root(), 0x83, disk.root_uuid, "root");
        // Old boot loaders look for the active partition of an MBR.
        root.attributes = if gpt { GROW_FILESYSTEM } else { BOOTABLE };
        wishes.push(root);
        contents.push(Content::Root);
        // Where the size is found from the content, all but the root's end is known before.
        let size = match options.size {
            ImageSize::Fixed(size) => size,
            ImageSize::Auto { .. } => fixed(&layout, &wishes).saturating_add(PROVISIONAL),
        };
        let table = place(&layout, size, &wishes)?;

        let mut plan = Plan {
            table,
            contents,
            architecture,
            uefi: match disk.boot {
                _ if disk.esp_size().is_none() => Uefi::Not,
                Some(Boot::Uefi) => Uefi::Asked,
                None => Uefi::IfThereIsAKernel,
                Some(Boot::None | Boot::Xen) => Uefi::Not,
            },
            command_line: String::new(),
            tailor: options.tailor.clone(),
            layout,
            wishes,
        };
        plan.command_line = plan.kernel_command(disk, options)?;
        plan.tell_the_tree(disk)?;
        Ok(plan)
    }

    /// The root's partition, which is the last.
    pub(crate) fn root(&self) -> Result<&Partition> {
        self.table.partitions.last().ok_or_else(|| Error::Invalid("a disk without partitions".to_owned()))
    }

    /// The build of the root's filesystem.
    pub(crate) fn root_options(&self, options: &BuildOptions) -> Result<BuildOptions> {
        let around = fixed(&self.layout, &self.wishes);
        let less = |bytes: u64| bytes.checked_sub(around).filter(|bytes| *bytes > 0);
        let size = match options.size {
            ImageSize::Fixed(_) => ImageSize::Fixed(self.root()?.size),
            ImageSize::Auto { spare, minimum, maximum } => {
                let maximum =
                    maximum.map(|most| less(most).ok_or_else(|| too_small(most, around))).transpose()?;
                ImageSize::Auto { spare, minimum: minimum.and_then(less), maximum }
            }
        };
        let spec = BuildSpec { disk: None, ..options.spec.clone() };
        Ok(BuildOptions { size, spec, tailor: self.tailor.clone(), ..options.clone() })
    }

    /// The disk's size, now that the root's filesystem ends at `end`; the table follows it.
    pub(crate) fn settle(&mut self, options: &BuildOptions, end: u64) -> Result<u64> {
        let size = match options.size {
            ImageSize::Fixed(size) => size,
            ImageSize::Auto { .. } => {
                let root = end.saturating_sub(self.root()?.start).next_multiple_of(ALIGNMENT);
                fixed(&self.layout, &self.wishes).saturating_add(root)
            }
        };
        self.table = place(&self.layout, size, &self.wishes)?;
        Ok(size)
    }

    fn device(&self, partition: &Partition) -> Result<String> {
        let id = self.table.partuuid(partition);
        id.map(|id| format!("PARTUUID={id}"))
            .ok_or_else(|| Error::Invalid("a partition without a name".to_owned()))
    }

    fn kernel_command(&self, disk: &DiskSpec, options: &BuildOptions) -> Result<String> {
        let mut words = vec![format!("root={}", self.device(self.root()?)?), "ro".to_owned()];
        let xen = disk.boot == Some(Boot::Xen);
        match &options.tailor.serial_console {
            // The last one is /dev/console.
            Some(console) if !xen => words.extend(["console=tty0".to_owned(), format!("console={console}")]),
            Some(console) => words.push(format!("console={console}")),
            None if xen => words.push("console=hvc0".to_owned()),
            None => {}
        }
        words.extend(disk.kernel_options.iter().cloned());
        Ok(words.join(" "))
    }

    /// Adds to the tree what it has to know of the disk: fstab, mount points, and for later kernels their command line.
    fn tell_the_tree(&mut self, disk: &DiskSpec) -> Result<()> {
        let mut mounts = Vec::new();
        for (partition, content) in self.table.partitions.iter().zip(&self.contents) {
            let mount = |point: Option<&str>, kind: Option<&str>, options: Option<&str>| -> Result<Mount> {
                let owned = |text: Option<&str>| text.map(str::to_owned);
                let (point, kind, options) = (owned(point), owned(kind), owned(options));
                Ok(Mount { device: self.device(partition)?, point, kind, options })
            };
            match content {
                Content::Root => mounts.insert(0, mount(Some("/"), None, None)?),
                // A kernel of the host's may lack FAT: that must not end in an emergency shell.
                Content::Esp(_) => {
                    mounts.push(mount(Some(ESP_MOUNT), Some("vfat"), Some("umask=0077,nofail"))?)
                }
                Content::Swap { .. } => mounts.push(mount(None, Some("swap"), None)?),
                Content::Filesystem(spec) | Content::Vfat(spec, _) => {
                    if let Some(point) = &spec.mount {
                        mounts.push(mount(
                            Some(point),
                            Some(spec.filesystem.name()),
                            spec.options.as_deref(),
                        )?);
                    }
                }
                Content::Nothing => {}
            }
        }
        let tailor = &mut self.tailor;
        tailor.directories.extend(mounts.iter().filter_map(|m| m.point.clone()).filter(|point| point != "/"));
        // What was asked for by hand stands.
        mounts
            .retain(|mount| mount.point.is_none() || tailor.fstab.iter().all(|own| own.point != mount.point));
        mounts.append(&mut tailor.fstab);
        tailor.fstab = mounts;
        if self.uefi != Uefi::Not {
            for (path, text) in [
                ("/etc/kernel/cmdline", self.command_line.as_str()),
                ("/etc/kernel/entry-token", boot::TOKEN),
            ] {
                if tailor.write.iter().all(|own| own.path != path) {
                    let text = Text { path: path.to_owned(), text: text.to_owned(), mode: None };
                    tailor.write.insert(0, text);
                }
            }
        }
        if disk.boot == Some(Boot::Xen) && tailor.xen_boot.is_none() {
            tailor.xen_boot = Some(self.command_line.clone());
        }
        Ok(())
    }
}

/// What the names are made from: everything that was asked for, but for the paths of what is read and written.
fn origin(options: &BuildOptions) -> Origin {
    let from = match &options.spec.from {
        suite @ Source::Suite { .. } => suite.to_string(),
        _ => String::new(),
    };
    let mut spec = options.spec.clone();
    spec.from = Source::Stdin;
    let disk = spec.disk.take().map(|mut disk| {
        disk.partition.iter_mut().for_each(|partition| partition.from = None);
        disk
    });
    let request = serde_json::json!([from, options.size.to_string(), spec, disk, options.tailor]);
    Origin::new(request.to_string().as_bytes())
}

/// The type of a partition by the discoverable partitions specification, and in an MBR.
fn types(partition: &PartitionSpec) -> (Guid, u8) {
    match (partition.filesystem, partition.mount.as_deref().map(|point| point.trim_end_matches('/'))) {
        (Holds::Swap, _) => (kind::SWAP, 0x82),
        (Holds::Vfat, Some("/boot")) => (kind::XBOOTLDR, 0xEA),
        (Holds::Vfat, _) => (kind::BASIC_DATA, 0x0C),
        (_, Some("/home")) => (kind::HOME, 0x83),
        (_, Some("/srv")) => (kind::SRV, 0x83),
        (_, Some("/var")) => (kind::VAR, 0x83),
        (_, Some("/var/tmp")) => (kind::VAR_TMP, 0x83),
        (_, Some("/boot")) => (kind::XBOOTLDR, 0x83),
        _ => (kind::LINUX, 0x83),
    }
}

fn name(partition: &PartitionSpec, index: usize) -> String {
    let by_point = || partition.mount.as_deref().map(|point| point.trim_matches('/').replace('/', "-"));
    let by_label = || partition.label.clone();
    let usual = || format!("{}-{}", partition.filesystem.name(), index + 1);
    partition.name.clone().or_else(by_point).or_else(by_label).unwrap_or_else(usual)
}

fn content(partition: &PartitionSpec, name: &str, origin: Origin) -> Result<Content> {
    Ok(match partition.filesystem {
        Holds::Swap => {
            Content::Swap { uuid: origin.uuid(&format!("swap {name}")), label: partition.label.clone() }
        }
        Holds::None => Content::Nothing,
        Holds::Vfat => {
            let label = partition.label.as_deref().unwrap_or("DATA");
            let id = origin.number(&format!("vfat {name}"));
            Content::Vfat(partition.clone(), Name::new(label, id).map_err(Error::Invalid)?)
        }
        Holds::Ext2 | Holds::Ext3 | Holds::Ext4 => Content::Filesystem(partition.clone()),
    })
}

/// The bytes of everything but the root.
fn fixed(layout: &Layout, wishes: &[Wish]) -> u64 {
    let sizes = wishes.iter().filter_map(|wish| wish.size);
    let whole = sizes.map(|size| size.checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX));
    whole.fold(layout.overhead(), u64::saturating_add)
}

fn place(layout: &Layout, size: u64, wishes: &[Wish]) -> Result<Table> {
    layout.place(size, wishes).map_err(|misfit| match misfit {
        Misfit::Outside { .. } | Misfit::Small(_) => too_small(size, fixed(layout, wishes)),
        other => Error::Invalid(other.to_string()),
    })
}

/// An error in terms of the request.
fn too_small(size: u64, around: u64) -> Error {
    let (size, around) = (Human(size), Human(around));
    Error::Invalid(format!(
        "a disk of {size} is too small: the table and the other partitions take {around} of it, and the root needs room"
    ))
}
