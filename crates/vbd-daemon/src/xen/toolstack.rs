//! Asking xl for what is the toolstack's to do: giving a domain a disk and taking it away.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use vbd_xen::DeviceId;

use crate::config::{Access, DiskConfig, Format};
use crate::{Fault, FaultKind};

/// The block script that xl runs for disks of vbd.
pub const SCRIPT: &str = "block-vbd";

/// A disk as xl's configuration says it, so that vbd serves it: `format=raw,vdev=xvda,...`.
pub fn disk_spec(path: &Path, format: Format, vdev: &str, access: Access, discard: bool) -> String {
    let (mode, forced) = match access {
        Access::ReadOnly => ("ro", ""),
        Access::ReadWrite => ("rw", ""),
        // xl knows no `w!`, so the target says it.
        Access::ReadWriteForce => ("rw", "w!:"),
    };
    // To xl it is a device that its script makes, whatever is in the file: it would serve other formats itself.
    let format = if format == Format::Raw { String::new() } else { format!("{format}:") };
    let discard = if discard { "discard" } else { "no-discard" };
    // The target last: it takes the rest, commas and all.
    format!(
        "format=raw,vdev={vdev},access={mode},{discard},script={SCRIPT},target={forced}{format}{}",
        path.display()
    )
}

/// Gives a domain that runs one more disk.
pub(super) fn attach(domain: &str, config: &DiskConfig) -> Result<(), Fault> {
    let vdev = config.vdev.map(|vdev| vdev.to_string()).unwrap_or_default();
    let path = std::path::absolute(&config.path).unwrap_or_else(|_| config.path.clone());
    xl(&["block-attach", domain, &disk_spec(&path, config.format, &vdev, config.access, config.discard)])
}

/// Takes a device from its domain. Forced, even while the domain uses it.
pub(super) fn detach(id: &DeviceId, force: bool) -> Result<(), Fault> {
    let (domid, devid) = (id.domid.to_string(), id.devid.to_string());
    let mut arguments = vec!["block-detach"];
    if force {
        // Options after the domain are not read.
        arguments.push("--force");
    }
    arguments.extend([domid.as_str(), devid.as_str()]);
    xl(&arguments)
}

/// The number of a domain that runs here, by its name or number.
pub(super) fn domid(domain: &str) -> Result<Option<u16>, Fault> {
    if let Ok(number) = domain.parse() {
        return Ok(output(&["domname", domain])?.status.success().then_some(number));
    }
    let output = output(&["domid", domain])?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().parse().ok().filter(|_| output.status.success()))
}

fn xl(arguments: &[&str]) -> Result<(), Fault> {
    let output = output(arguments)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Fault::failed(format_args!("xl {}: {}", arguments.join(" "), output.status), said.trim()))
}

fn output(arguments: &[&str]) -> Result<Output, Fault> {
    Command::new("xl").args(arguments).stdin(Stdio::null()).output().map_err(|error| {
        let message = format!("xl, the toolstack of Xen, cannot be run ({error}): is this domain 0?");
        Fault::new(FaultKind::Failed, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::xl_disk;

    #[test]
    fn xl_reads_back_what_is_meant() {
        let path = Path::new("/srv/a, b=c");
        let spec = xl_disk::parse(&disk_spec(path, Format::Raw, "xvdb", Access::ReadOnly, false)).unwrap();
        assert_eq!((spec.path().as_path(), spec.access()), (path, Access::ReadOnly));
        assert_eq!((spec.script.as_deref(), spec.discard), (Some(SCRIPT), Some(false)));
        assert_eq!(spec.vdev.to_string(), "xvdb");
        let forced = disk_spec(Path::new("/srv/a"), Format::Raw, "xvdb", Access::ReadWriteForce, true);
        assert!(forced.ends_with("access=rw,discard,script=block-vbd,target=w!:/srv/a"), "{forced}");
    }
}
