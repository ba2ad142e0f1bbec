//! What Xen's pygrub and PV-GRUB (GRUB 2) look for in a tree: `/boot/grub/grub.cfg` with an entry for every kernel.

use super::{Root, exists, put};
use crate::disk::kernels::{self, Kernel};
use crate::{Error, Result};

const CONFIGURATION: &str = "/boot/grub/grub.cfg";

/// A command line that means itself in that file.
pub(super) fn check(command_line: &str) -> Result<()> {
    let odd = |c: char| c.is_control() || matches!(c, '\'' | '"' | '{' | '}' | ';' | '#' | '$' | '\\');
    if command_line.contains(odd) {
        return Err(Error::tailor("xen-boot", format!("{command_line:?}: no quotes, braces, ; # $ or \\")));
    }
    Ok(())
}

/// Writes the file.
pub(super) fn write(root: &mut dyn Root, command_line: &str) -> Result<()> {
    let names = if exists(root, "/boot")? { root.list("/boot")? } else { Vec::new() };
    let kernels = kernels::find(names.iter().filter_map(|name| name.to_str()));
    if kernels.is_empty() {
        let reason = "the tree has no kernel (vmlinuz-VERSION) in /boot: add one, or give the domain a kernel of its own";
        return Err(Error::tailor("xen-boot", reason));
    }
    put(root, CONFIGURATION, text(&kernels, command_line).as_bytes(), 0o644)
}

fn text(kernels: &[Kernel], command_line: &str) -> String {
    let mut text = String::from("set default=0\nset timeout=1\n");
    for Kernel { version, image, initrd } in kernels {
        text += &format!("menuentry 'Linux {version}' {{\n\tlinux {image} {command_line}\n");
        if let Some(initrd) = initrd {
            text += &format!("\tinitrd {initrd}\n");
        }
        text += "}\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_has_an_entry() {
        let kernels = kernels::find(["vmlinuz-6.1", "vmlinuz-6.12", "initrd.img-6.12"].into_iter());
        let command = "root=/dev/xvda ro console=hvc0";
        let new = text(&kernels, command);
        assert!(new.contains("menuentry 'Linux 6.12' {\n\tlinux /boot/vmlinuz-6.12 root=/dev/xvda ro console=hvc0\n\tinitrd /boot/initrd.img-6.12\n}\nmenuentry 'Linux 6.1' {"), "{new}");
        assert!(check(command).is_ok() && check("a\nb").is_err() && check("a {").is_err());
    }
}
