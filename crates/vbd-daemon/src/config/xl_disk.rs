//! One disk of a Xen domain, as xl-disk-configuration(5) writes it.
//!
//! A specification is a list of parameters between commas. A parameter is a flag (`cdrom`), a key with its
//! value (`access=ro`), or the next of the four positions that has none yet: target, format, vdev, access.
//! `target=` takes the rest of the text, commas and all. In front of the target, xend's prefixes (`file:`,
//! `tap:aio:`) are still read; after one of them there is no position for the format.

use std::fmt;
use std::ops::ControlFlow;
use std::path::PathBuf;

use super::model::Access;
use super::vdev::Vdev;

/// The format that a specification names. Those that are not served are known to name them in errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    /// The bytes of the disk, one to one.
    Raw,
    /// QEMU's first format.
    Qcow,
    /// QEMU's own.
    Qcow2,
    /// Virtual PC's.
    Vhd,
    /// QEMU's short-lived third.
    Qed,
    /// An empty drive.
    Empty,
}

/// The program that Xen would serve the disk with: of no meaning to vbd, which serves it itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendType {
    /// The kernel.
    Phy,
    /// blktap.
    Tap,
    /// QEMU.
    Qdisk,
    /// A program of its own.
    Standalone,
}

const FORMATS: [(&str, DiskFormat); 6] = [
    ("raw", DiskFormat::Raw),
    ("qcow", DiskFormat::Qcow),
    ("qcow2", DiskFormat::Qcow2),
    ("vhd", DiskFormat::Vhd),
    ("qed", DiskFormat::Qed),
    ("empty", DiskFormat::Empty),
];

const BACKEND_TYPES: [(&str, BackendType); 4] = [
    ("phy", BackendType::Phy),
    ("tap", BackendType::Tap),
    ("qdisk", BackendType::Qdisk),
    ("standalone", BackendType::Standalone),
];

/// Prefixes of xend that say nothing any more.
const IGNORED_PREFIXES: [&str; 7] = ["file", "phy", "tap", "tap2", "tapdisk", "aio", "ioemu"];
const FORMAT_PREFIXES: [&str; 4] = ["raw", "qcow", "qcow2", "vhd"];
const SCRIPT_PREFIXES: [&str; 4] = ["iscsi", "nbd", "enbd", "drbd"];

/// Flags and keys that are read and have no effect here.
const OTHER_FLAGS: [&str; 4] = ["colo", "no-colo", "trusted", "untrusted"];
const OTHER_KEYS: [&str; 8] = [
    "specification",
    "transport",
    "grant_usage",
    "colo-host",
    "colo-port",
    "colo-export",
    "active-disk",
    "hidden-disk",
];
const KEYS: &str = "target, format, vdev, access, devtype, backend, backendtype and script";

/// Why a specification cannot be read, and where in it (a byte offset).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct DiskError {
    /// The byte of the specification at which the mistake begins.
    pub offset: usize,
    /// What is wrong and what to do.
    pub message: String,
}

/// Where in the specification something was said, as byte offsets; 0 for what was not said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// Of the target, behind its prefixes.
    pub target: usize,
    /// Of the format, or of the prefix that says it.
    pub format: usize,
    /// Of the device.
    pub vdev: usize,
    /// Of the access.
    pub access: usize,
    /// Of the script, or of the prefix that says it.
    pub script: usize,
    /// Of the backend domain.
    pub backend: usize,
}

/// A disk specification, read. What was not said is `None`, empty or false; the methods have the defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// The image or device, exactly as written; empty for an empty drive.
    pub target: String,
    /// The format, told by name or by prefix.
    pub format: Option<DiskFormat>,
    /// What the guest sees.
    pub vdev: Vdev,
    /// Who may write.
    pub access: Option<Access>,
    /// A CD drive, which is always read-only.
    pub cdrom: bool,
    /// Whether the guest is offered discard.
    pub discard: Option<bool>,
    /// `direct-io-safe`: the operator vouches for direct I/O.
    pub direct_io_safe: bool,
    /// The domain that would serve the disk, when it is not domain 0.
    pub backend: Option<String>,
    /// The program that would serve the disk.
    pub backend_type: Option<BackendType>,
    /// The hotplug script that would make sense of the target.
    pub script: Option<String>,
    /// Parameters that are known and have no effect here, as written.
    pub other: Vec<String>,
    /// Where the above was said.
    pub places: Places,
}

impl DiskSpec {
    /// Who may write: a CD drive is read-only whatever was said, everything else is read and written.
    pub fn access(&self) -> Access {
        if self.cdrom { Access::ReadOnly } else { self.access.unwrap_or(Access::ReadWrite) }
    }

    /// The format; raw unless told.
    pub fn format(&self) -> DiskFormat {
        self.format.unwrap_or(DiskFormat::Raw)
    }

    /// Whether this is a CD drive with nothing in it.
    pub fn is_empty(&self) -> bool {
        self.format == Some(DiskFormat::Empty)
            || self.cdrom && (self.target.is_empty() || self.target == "none")
    }

    /// The file or device: a relative target is below `/dev`, as in `phy:vg/root`.
    pub fn path(&self) -> PathBuf {
        // Not `join`, which would make `/dev` of nothing at all.
        if self.target.starts_with('/') {
            self.target.clone().into()
        } else {
            format!("/dev/{}", self.target).into()
        }
    }
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name_of(&FORMATS, *self))
    }
}

impl fmt::Display for BackendType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name_of(&BACKEND_TYPES, *self))
    }
}

/// Prints the form with keys, which reads back as the same disk.
impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vdev={}", self.vdev)?;
        if let Some(format) = self.format {
            write!(f, ",format={format}")?;
        }
        if let Some(access) = self.access {
            write!(f, ",access={access}")?;
        }
        if self.cdrom {
            f.write_str(",cdrom")?;
        }
        match self.discard {
            Some(true) => f.write_str(",discard")?,
            Some(false) => f.write_str(",no-discard")?,
            None => {}
        }
        if self.direct_io_safe {
            f.write_str(",direct-io-safe")?;
        }
        if let Some(backend) = &self.backend {
            write!(f, ",backend={backend}")?;
        }
        if let Some(backend_type) = self.backend_type {
            write!(f, ",backendtype={backend_type}")?;
        }
        if let Some(script) = &self.script {
            write!(f, ",script={script}")?;
        }
        for other in &self.other {
            write!(f, ",{other}")?;
        }
        write!(f, ",target={}", self.target)?;
        // A reader takes one comma off the end.
        if self.target.ends_with(',') { f.write_str(",") } else { Ok(()) }
    }
}

/// Reads one specification, for example `file:/srv/vm1disk,sda1,w` or `format=raw,vdev=xvda,target=/srv/a`.
///
/// # Errors
/// What is wrong, at which byte, and what to write instead.
pub fn parse(spec: &str) -> Result<DiskSpec, DiskError> {
    let mut reader = Reader { spec, at: 0, seen: Seen::default() };
    while reader.parameter()?.is_continue() {}
    reader.finish()
}

/// A value and the offset at which it was said.
type Told<T> = Option<(T, usize)>;

#[derive(Default)]
struct Seen {
    target: Told<String>,
    format: Told<DiskFormat>,
    vdev: Told<String>,
    access: Told<Access>,
    /// An empty access is said too: the position is taken.
    access_taken: bool,
    prefixed: bool,
    devtype_cdrom: bool,
    discard: Option<bool>,
    direct_io_safe: bool,
    backend: Told<String>,
    backend_type: Told<BackendType>,
    script: Told<String>,
    other: Vec<String>,
}

struct Reader<'a> {
    spec: &'a str,
    at: usize,
    seen: Seen,
}

impl Reader<'_> {
    /// Reads what stands at `at` and moves past it; breaks at the end of the text.
    fn parameter(&mut self) -> Result<ControlFlow<()>, DiskError> {
        let rest = &self.spec[self.at..];
        let rest = rest.trim_start_matches([' ', '\t', '\n', '\r']);
        self.at = self.spec.len() - rest.len();
        if rest.is_empty() {
            return Ok(ControlFlow::Break(()));
        }
        if let Some(target) = rest.strip_prefix("target=") {
            let target = target.strip_suffix(',').unwrap_or(target);
            once("target", &mut self.seen.target, target.to_owned(), self.at + "target=".len())?;
            return Ok(ControlFlow::Break(()));
        }
        if let Some(length) = self.prefix(rest)? {
            self.at += length;
            return Ok(ControlFlow::Continue(()));
        }
        let (parameter, length) = match rest.split_once(',') {
            Some((parameter, _)) => (parameter, parameter.len() + 1),
            None => (rest, rest.len()),
        };
        if !self.flag(parameter.trim_end()) {
            match parameter.split_once('=') {
                Some((key, value)) => self.key(key, value.trim_end(), self.at + key.len() + 1)?,
                None => self.position(parameter)?,
            }
        }
        self.at += length;
        Ok(ControlFlow::Continue(()))
    }

    /// The length of a prefix of the target, or of `ioemu:` before the vdev, taken note of.
    fn prefix(&mut self, rest: &str) -> Result<Option<usize>, DiskError> {
        // Not a search for the colon: that would read on to the end for each of many parameters without one.
        let word = rest.bytes().take_while(|b| b.is_ascii_lowercase() || b.is_ascii_digit()).count();
        let (prefix, after) = rest.split_at(word);
        let Some(after) =
            after.strip_prefix(':').filter(|_| prefix.starts_with(|c: char| c.is_ascii_lowercase()))
        else {
            return Ok(None);
        };
        if self.seen.target.is_some() {
            let before_vdev = prefix == "ioemu" && self.seen.vdev.is_none();
            return Ok(before_vdev.then_some(prefix.len() + 1));
        }
        if FORMAT_PREFIXES.contains(&prefix) {
            let format = format_named(prefix).map_err(|message| self.error(message))?;
            once("format", &mut self.seen.format, format, self.at)?;
        } else if SCRIPT_PREFIXES.contains(&prefix) {
            once("script", &mut self.seen.script, format!("block-{prefix}"), self.at)?;
        } else if !IGNORED_PREFIXES.contains(&prefix) {
            if after.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()) {
                return Ok(None);
            }
            return Err(self.error(format!(
                "unknown prefix `{prefix}:`: leave it out, or write the path as the last thing, `target={rest}`"
            )));
        }
        self.seen.prefixed = true;
        Ok(Some(prefix.len() + 1))
    }

    fn flag(&mut self, parameter: &str) -> bool {
        match parameter {
            "cdrom" => self.seen.devtype_cdrom = true,
            "discard" => self.seen.discard = Some(true),
            "no-discard" => self.seen.discard = Some(false),
            "direct-io-safe" => self.seen.direct_io_safe = true,
            other if OTHER_FLAGS.contains(&other) => self.seen.other.push(other.to_owned()),
            _ => return false,
        }
        true
    }

    fn key(&mut self, key: &str, value: &str, at: usize) -> Result<(), DiskError> {
        let wrong = |message| DiskError { offset: at, message };
        let seen = &mut self.seen;
        match key {
            "format" => once(key, &mut seen.format, format_named(value).map_err(wrong)?, at),
            "vdev" => once(key, &mut seen.vdev, value.to_owned(), at),
            "access" => {
                seen.access_taken = true;
                match access_named(value).map_err(wrong)? {
                    Some(access) => once(key, &mut seen.access, access, at),
                    None => Ok(()),
                }
            }
            "devtype" => match value {
                "cdrom" | "disk" => {
                    seen.devtype_cdrom = value == "cdrom";
                    Ok(())
                }
                _ => Err(wrong(format!("unknown devtype `{value}`: it is `cdrom` or `disk`"))),
            },
            "backend" => once(key, &mut seen.backend, value.to_owned(), at),
            "backendtype" => {
                let named = BACKEND_TYPES.iter().find(|(name, _)| *name == value);
                let &(_, backend_type) = named.ok_or_else(|| {
                    wrong(format!(
                        "unknown backendtype `{value}`: it is `phy`, `tap`, `qdisk` or `standalone`"
                    ))
                })?;
                once(key, &mut seen.backend_type, backend_type, at)
            }
            "script" => once(key, &mut seen.script, value.to_owned(), at),
            other if OTHER_KEYS.contains(&other) => {
                seen.other.push(format!("{other}={value}"));
                Ok(())
            }
            other if other.contains(['/', '.']) => Err(self.error(
                "a target with `=` in it is written last and by name: `vdev=xvda,target=/the/path`"
                    .to_owned(),
            )),
            other => Err(self.error(format!("unknown key `{other}`: known are {KEYS}"))),
        }
    }

    /// A parameter that is neither a key nor a flag: it goes to the first position without a value.
    fn position(&mut self, parameter: &str) -> Result<(), DiskError> {
        let at = self.at;
        let value = parameter.trim_end();
        let Some((target, _)) = &self.seen.target else {
            self.seen.target = Some((parameter.to_owned(), at));
            return Ok(());
        };
        if !self.seen.prefixed && self.seen.format.is_none() {
            // xend's empty drive, `,hdc:cdrom,r`, has no format where others have theirs.
            if target.is_empty() && self.vdev_and_devtype(value)? {
                self.seen.format = Some((DiskFormat::Empty, at));
                return Ok(());
            }
            let format = format_named(value).map_err(|message| match value.parse::<Vdev>() {
                Ok(_) => self.error(format!(
                    "`{value}` stands where the format belongs: write `TARGET,raw,{value},...` \
                     or leave the format empty, `TARGET,,{value},...`"
                )),
                Err(_) => self.error(message),
            })?;
            self.seen.format = Some((format, at));
            Ok(())
        } else if self.seen.vdev.is_none() {
            if !self.vdev_and_devtype(value)? {
                self.seen.vdev = Some((value.to_owned(), at));
            }
            Ok(())
        } else if !self.seen.access_taken {
            self.seen.access_taken = true;
            self.seen.access =
                access_named(value).map_err(|message| self.error(message))?.map(|access| (access, at));
            Ok(())
        } else {
            Err(self.error(format!(
                "`{value}` is one value too many: a disk is `TARGET,FORMAT,VDEV,ACCESS`, then flags and `key=value`"
            )))
        }
    }

    /// Reads `hdc:cdrom` and `sda:disk`; false when there is no colon.
    fn vdev_and_devtype(&mut self, value: &str) -> Result<bool, DiskError> {
        let Some((vdev, devtype)) = value.rsplit_once(':') else { return Ok(false) };
        self.seen.devtype_cdrom = match devtype {
            "cdrom" => true,
            "disk" => false,
            _ => {
                let offset = self.at + vdev.len() + 1;
                let message = format!("unknown device type `{devtype}`: it is `cdrom` or `disk`");
                return Err(DiskError { offset, message });
            }
        };
        once("vdev", &mut self.seen.vdev, vdev.to_owned(), self.at)?;
        Ok(true)
    }

    fn error(&self, message: String) -> DiskError {
        DiskError { offset: self.at, message }
    }

    fn finish(self) -> Result<DiskSpec, DiskError> {
        let Self { spec, seen, .. } = self;
        let place = |offset: Option<usize>| offset.unwrap_or(0);
        let Some((vdev, vdev_at)) = seen.vdev.filter(|(vdev, _)| !vdev.is_empty()) else {
            let message = "no virtual device: say what the guest sees, for example `vdev=xvda`".to_owned();
            return Err(DiskError { offset: spec.len(), message });
        };
        let vdev: Vdev = vdev.parse().map_err(|e: super::vdev::VdevError| DiskError {
            offset: vdev_at,
            message: match vdev.rsplit_once(':') {
                Some((name, "cdrom")) => format!("write `vdev={name},devtype=cdrom` for `vdev={vdev}`"),
                _ => e.to_string(),
            },
        })?;
        let disk = DiskSpec {
            places: Places {
                target: place(seen.target.as_ref().map(|t| t.1)),
                format: place(seen.format.map(|f| f.1)),
                vdev: vdev_at,
                access: place(seen.access.map(|a| a.1)),
                script: place(seen.script.as_ref().map(|s| s.1)),
                backend: place(seen.backend.as_ref().map(|b| b.1)),
            },
            target: seen.target.map(|t| t.0).unwrap_or_default(),
            format: seen.format.map(|f| f.0),
            vdev,
            access: seen.access.map(|a| a.0),
            cdrom: seen.devtype_cdrom,
            discard: seen.discard,
            direct_io_safe: seen.direct_io_safe,
            backend: seen.backend.map(|b| b.0).filter(|b| !b.is_empty()),
            backend_type: seen.backend_type.map(|b| b.0),
            script: seen.script.map(|s| s.0).filter(|s| !s.is_empty()),
            other: seen.other,
        };
        if disk.target.contains('\0') {
            let message = "the target has a NUL character in it, which no path can have".to_owned();
            return Err(DiskError { offset: disk.places.target, message });
        }
        if disk.target.is_empty() && !disk.cdrom {
            let message =
                "no target: name an image or a device, or make it an empty drive with `cdrom`".to_owned();
            return Err(DiskError { offset: disk.places.target, message });
        }
        Ok(disk)
    }
}

/// Something said in `from_str` of a position or key may be said again only if it was empty, or is the same.
fn once<T: PartialEq + IsUnsaid>(
    what: &str,
    slot: &mut Told<T>,
    value: T,
    offset: usize,
) -> Result<(), DiskError> {
    match slot {
        Some((old, _)) if !old.is_unsaid() && *old != value => {
            Err(DiskError { offset, message: format!("`{what}` is given twice: keep one of the two") })
        }
        _ => {
            *slot = Some((value, offset));
            Ok(())
        }
    }
}

/// Whether a value is as good as none: an empty string is.
trait IsUnsaid {
    fn is_unsaid(&self) -> bool {
        false
    }
}

impl IsUnsaid for String {
    fn is_unsaid(&self) -> bool {
        self.is_empty()
    }
}
impl IsUnsaid for DiskFormat {}
impl IsUnsaid for BackendType {}
impl IsUnsaid for Access {}

fn name_of<T: PartialEq>(names: &[(&'static str, T)], value: T) -> &'static str {
    names.iter().find(|(_, named)| *named == value).map_or("", |(name, _)| name)
}

fn format_named(name: &str) -> Result<DiskFormat, String> {
    if name.is_empty() {
        return Ok(DiskFormat::Raw);
    }
    FORMATS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|&(_, format)| format)
        .ok_or_else(|| format!("unknown format `{name}`: it is `raw`, `qcow`, `qcow2`, `vhd` or `qed`"))
}

fn access_named(name: &str) -> Result<Option<Access>, String> {
    if name.is_empty() { Ok(None) } else { name.parse().map(Some) }
}
