//! Units switched on without systemd: the links that `systemctl enable` would make. And consoles, with or without it.

use super::{Root, exists, make_directories, put, text};
use crate::{Error, Result};

/// Where a distribution keeps its units.
const UNITS: [&str; 2] = ["/usr/lib/systemd/system", "/lib/systemd/system"];

/// Whether the tree's init is systemd.
pub(super) fn present(root: &dyn Root) -> Result<bool> {
    for units in UNITS {
        if exists(root, &format!("{units}/multi-user.target"))? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The path of a unit of the distribution's.
pub(super) fn unit(root: &dyn Root, name: &str) -> Result<Option<String>> {
    for units in UNITS {
        let path = format!("{units}/{name}");
        if exists(root, &path)? {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Has `target` start a unit.
pub(super) fn want(root: &mut dyn Root, target: &str, name: &str, path: &str) -> Result<()> {
    let directory = format!("/etc/systemd/system/{target}.wants");
    make_directories(root, &directory)?;
    root.symlink(&format!("{directory}/{name}"), path)
}

pub(super) fn check_console(console: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if !console.is_empty() && console.len() <= 32 && console.chars().all(plain) {
        return Ok(());
    }
    Err(Error::tailor("serial-console", format!("{console:?} is no console's name, such as ttyS0 or hvc0")))
}

/// Gives a serial line a login: by systemd, by sysvinit's inittab or by busybox's.
pub(super) fn serial_console(root: &mut dyn Root, console: &str) -> Result<()> {
    let getty = unit(root, "serial-getty@.service")?;
    let inittab = text(root, "/etc/inittab")?;
    if getty.is_none() && inittab.is_none() {
        return Err(Error::tailor("serial-console", "the tree has neither systemd nor /etc/inittab"));
    }
    if let Some(path) = getty {
        want(root, "getty.target", &format!("serial-getty@{console}.service"), &path)?;
    }
    if let Some(inittab) = inittab {
        put(root, "/etc/inittab", with_getty(inittab, console).as_bytes(), 0o644)?;
    }
    // Without this file root may log in anywhere; with it, where it says so.
    if let Some(mut lines) = text(root, "/etc/securetty")?
        && !lines.lines().any(|line| line.trim() == console)
    {
        end_line(&mut lines);
        lines.push_str(&format!("{console}\n"));
        put(root, "/etc/securetty", lines.as_bytes(), 0o644)?;
    }
    Ok(())
}

fn with_getty(mut inittab: String, console: &str) -> String {
    let active =
        |line: &str| !line.trim_start().starts_with('#') && line.split([' ', ':', '/']).any(|w| w == console);
    if inittab.lines().any(active) {
        return inittab;
    }
    end_line(&mut inittab);
    // busybox has the line's device, or nothing, in the first field, sysvinit an id.
    let busybox = inittab.lines().any(|line| line.starts_with("::"));
    if busybox {
        inittab.push_str(&format!("{console}::respawn:/sbin/getty -L {console} 115200 vt100\n"));
    } else {
        let id: String = console.chars().skip(console.chars().count().saturating_sub(4)).collect();
        inittab.push_str(&format!("{id}:2345:respawn:/sbin/getty -L {console} 115200 vt100\n"));
    }
    inittab
}

pub(super) fn end_line(text: &mut String) {
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inittabs_of_both_kinds_get_one_line() {
        let sysv = with_getty("id:2:initdefault:".to_owned(), "ttyS0");
        assert_eq!(sysv, "id:2:initdefault:\ntyS0:2345:respawn:/sbin/getty -L ttyS0 115200 vt100\n");
        assert_eq!(with_getty(sysv.clone(), "ttyS0"), sysv);
        let busybox = with_getty("::sysinit:/etc/rc\n#ttyS0::x:y\n".to_owned(), "ttyS0");
        assert!(busybox.ends_with("\nttyS0::respawn:/sbin/getty -L ttyS0 115200 vt100\n"), "{busybox}");
    }
}
