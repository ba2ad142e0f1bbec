//! The EFI system partition: systemd-boot with an entry for each kernel (the boot loader specification's type 1), or
//! unified kernel images (its type 2), as the tree has them.

use std::io::Read;

use super::Architecture;
use super::kernels::{self, Kernel, is_plain};
use super::tree::Tree;
use crate::vfat::Volume;
use crate::{Error, Progress, Result};

/// The directory of kernels in the partition, and the start of their entries' names: what kernel-install(8) calls the
/// entry token, which the tree is told in `/etc/kernel/entry-token`.
pub(crate) const TOKEN: &str = "vbd";
/// Where a tree may have unified kernel images.
const UNIFIED: [&str; 3] = ["/efi/EFI/Linux", "/boot/efi/EFI/Linux", "/boot/EFI/Linux"];
/// Where systemd-boot is, as systemd installs it.
const LOADERS: &str = "/usr/lib/systemd/boot/efi";
/// How much of an os-release(5) is looked at, in bytes.
const OS_RELEASE: u64 = 64 << 10;

/// What an EFI system partition was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Booted {
    /// Nothing: there is no kernel in the tree.
    Nothing,
    /// systemd-boot, with these kernels' versions, the newest first.
    Loader(Vec<String>),
    /// Unified kernel images alone, of these names.
    Unified(Vec<String>),
}

/// Fills the EFI system partition of a system whose root is `tree`.
///
/// # Errors
///
/// A kernel without anything to start it; no room; those of reading and writing.
pub(crate) fn fill(
    esp: &mut Volume<'_>,
    tree: &Tree,
    architecture: Architecture,
    command_line: &str,
    progress: &mut dyn Progress,
) -> Result<Booted> {
    let names = tree.list("/boot")?;
    let kernels = kernels::find(names.iter().map(String::as_str));
    let unified = unified(tree)?;
    let loader = loader(tree, architecture)?;
    let fallback = format!("EFI/BOOT/BOOT{}.EFI", architecture.efi().to_ascii_uppercase());

    for path in &unified {
        let name = path.rsplit('/').next().unwrap_or_default();
        copy(esp, tree, path, &format!("EFI/Linux/{name}"), progress)?;
    }
    let unified_names =
        || unified.iter().filter_map(|path| path.rsplit('/').next()).map(str::to_owned).collect();
    let Some(loader) = loader else {
        let Some(newest) = unified.first() else {
            let Some(kernel) = kernels.first() else { return Ok(Booted::Nothing) };
            return Err(no_loader(kernel, architecture));
        };
        copy(esp, tree, newest, &fallback, progress)?;
        return Ok(Booted::Unified(unified_names()));
    };
    if kernels.is_empty() && unified.is_empty() {
        return Ok(Booted::Nothing);
    }
    copy(esp, tree, &loader, &fallback, progress)?;
    copy(esp, tree, &loader, &format!("EFI/systemd/systemd-boot{}.efi", architecture.efi()), progress)?;
    add(esp, "loader/loader.conf", b"timeout 1\nconsole-mode keep\n")?;
    add(esp, "loader/entries.srel", b"type1\n")?;
    let title = title(tree)?;
    for kernel in &kernels {
        entry(esp, tree, kernel, &title, command_line, progress)?;
    }
    if kernels.is_empty() {
        return Ok(Booted::Unified(unified_names()));
    }
    Ok(Booted::Loader(kernels.into_iter().map(|kernel| kernel.version).collect()))
}

fn no_loader(kernel: &Kernel, architecture: Architecture) -> Error {
    let reason = format!(
        "the tree has the kernel {} and no {LOADERS}/systemd-boot{}.efi to start it: add the package systemd-boot-efi \
         (Debian, Ubuntu; systemd-boot or systemd-boot-unsigned elsewhere), or do without with --boot none",
        kernel.version,
        architecture.efi()
    );
    Error::tailor("boot", reason)
}

/// The path of systemd-boot in the tree; a signed one is preferred.
fn loader(tree: &Tree, architecture: Architecture) -> Result<Option<String>> {
    let names = tree.list(LOADERS)?;
    let name = format!("systemd-boot{}.efi", architecture.efi());
    let found = [format!("{name}.signed"), name].into_iter().find(|wanted| names.contains(wanted));
    Ok(found.map(|name| format!("{LOADERS}/{name}")))
}

/// The paths of unified kernel images in the tree, the newest by name first, each name once.
fn unified(tree: &Tree) -> Result<Vec<String>> {
    let mut found: Vec<(String, String)> = Vec::new();
    for directory in UNIFIED {
        for name in tree.list(directory)? {
            let new = !found.iter().any(|(known, _)| known.eq_ignore_ascii_case(&name));
            if is_plain(&name) && name.to_ascii_lowercase().ends_with(".efi") && new {
                let path = format!("{directory}/{name}");
                found.push((name, path));
            }
        }
    }
    found.sort_by(|(a, _), (b, _)| kernels::compare(b, a));
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// One kernel and its entry.
fn entry(
    esp: &mut Volume<'_>,
    tree: &Tree,
    kernel: &Kernel,
    title: &str,
    command_line: &str,
    progress: &mut dyn Progress,
) -> Result<()> {
    let version = &kernel.version;
    let directory = format!("{TOKEN}/{version}");
    copy(esp, tree, &kernel.image, &format!("{directory}/linux"), progress)?;
    let mut text = format!("title {title}\nversion {version}\nsort-key {TOKEN}\nlinux /{directory}/linux\n");
    if let Some(initrd) = &kernel.initrd {
        copy(esp, tree, initrd, &format!("{directory}/initrd.img-{version}"), progress)?;
        text += &format!("initrd /{directory}/initrd.img-{version}\n");
    }
    text += &format!("options {command_line}\n");
    add(esp, &format!("loader/entries/{TOKEN}-{version}.conf"), text.as_bytes())
}

/// What the system calls itself, by os-release(5).
fn title(tree: &Tree) -> Result<String> {
    for path in ["/usr/lib/os-release", "/etc/os-release"] {
        let Some(file) = tree.open_file(path)? else { continue };
        let mut text = Vec::new();
        file.take(OS_RELEASE)
            .read_to_end(&mut text)
            .map_err(|e| Error::io(format!("cannot read {path}"), e))?;
        let text = String::from_utf8_lossy(&text);
        let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
        let name = name.map(|name| name.trim_matches(['"', '\'']).replace(char::is_control, ""));
        if let Some(name) = name.filter(|name| !name.is_empty() && name.len() <= 100) {
            return Ok(name);
        }
    }
    Ok("Linux".to_owned())
}

fn copy(esp: &mut Volume<'_>, tree: &Tree, from: &str, to: &str, progress: &mut dyn Progress) -> Result<()> {
    let Some(mut file) = tree.open_file(from)? else {
        return Err(Error::tailor("boot", format!("{from} is no file in the tree")));
    };
    if progress.cancelled() {
        return Err(Error::Interrupted);
    }
    let size = esp.add(to, &mut file).map_err(|e| full(to, e))?;
    progress.advance(size);
    Ok(())
}

fn add(esp: &mut Volume<'_>, path: &str, text: &[u8]) -> Result<()> {
    esp.add(path, &mut &text[..]).map(|_| ()).map_err(|e| full(path, e))
}

fn full(path: &str, error: std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::StorageFull {
        let reason = format!("the EFI system partition has no room for {path}: make it larger (--esp)");
        return Error::tailor("boot", reason);
    }
    Error::io(format!("cannot write {path} to the EFI system partition"), error)
}
