//! Who a machine is: its name, its machine-id, its keys.

use super::{Attributes, Kind, Root, exists, put, systemd, text};
use crate::{Error, Result};

/// RFC 1123 names, 64 bytes as Linux has them.
pub(crate) fn check_hostname(name: &str) -> Result<()> {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() <= 64 && name.split('.').all(label) {
        return Ok(());
    }
    Err(Error::tailor("hostname", format!("{name:?} is no host's name: letters, digits and dashes")))
}

pub(super) fn set_hostname(root: &mut dyn Root, name: &str) -> Result<()> {
    put(root, "/etc/hostname", format!("{name}\n").as_bytes(), 0o644)?;
    let old = text(root, "/etc/hosts")?;
    put(root, "/etc/hosts", hosts(old.as_deref(), name).as_bytes(), 0o644)
}

/// The address that Debian gives a machine's own name: 127.0.1.1.
fn hosts(old: Option<&str>, name: &str) -> String {
    let own = match name.split_once('.') {
        Some((short, _)) => format!("127.0.1.1\t{name} {short}"),
        None => format!("127.0.1.1\t{name}"),
    };
    let Some(old) = old else {
        return format!(
            "127.0.0.1\tlocalhost\n{own}\n\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\n\
             ff02::2\tip6-allrouters\n"
        );
    };
    let mut lines: Vec<&str> =
        old.lines().filter(|line| line.split_whitespace().next() != Some("127.0.1.1")).collect();
    let after = lines.iter().position(|line| line.split_whitespace().next() == Some("127.0.0.1"));
    lines.insert(after.map_or(0, |at| at + 1), &own);
    lines.join("\n") + "\n"
}

/// Makes SSH's keys at the first start, for Debian's package makes them when it is installed alone.
const KEYS_UNIT: &str = "\
[Unit]
Description=Make the SSH host keys of this machine
Before=ssh.service sshd.service ssh.socket
ConditionPathExists=|!/etc/ssh/ssh_host_ed25519_key
ConditionPathExists=|!/etc/ssh/ssh_host_rsa_key

[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -A

[Install]
WantedBy=multi-user.target
";

/// Takes away what must not be the same on two machines (machine-id(5): an empty file is filled at the start).
pub(super) fn reset(root: &mut dyn Root) -> Result<()> {
    if exists(root, "/etc/machine-id")? || systemd::present(root)? {
        put(root, "/etc/machine-id", b"", 0o444)?;
    }
    // Often a link to the other one.
    if let Some(Attributes { kind: Kind::File, .. }) = root.look_at_link("/var/lib/dbus/machine-id")? {
        root.remove("/var/lib/dbus/machine-id")?;
    }
    for seed in
        ["/var/lib/systemd/random-seed", "/var/lib/urandom/random-seed", "/var/lib/systemd/credential.secret"]
    {
        if root.look_at_link(seed)?.is_some() {
            root.remove(seed)?;
        }
    }
    if !exists(root, "/etc/ssh")? {
        return Ok(());
    }
    for name in root.list("/etc/ssh")? {
        let name = name.to_string_lossy();
        if name.starts_with("ssh_host_") && (name.ends_with("_key") || name.ends_with("_key.pub")) {
            root.remove(&format!("/etc/ssh/{name}"))?;
        }
    }
    if systemd::present(root)? && exists(root, "/usr/bin/ssh-keygen")? {
        let unit = "ssh-host-keys.service";
        put(root, &format!("/etc/systemd/system/{unit}"), KEYS_UNIT.as_bytes(), 0o644)?;
        systemd::want(root, "multi-user.target", unit, &format!("/etc/systemd/system/{unit}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_rfc_1123() {
        for good in ["vm1", "a.example.org", "A-1"] {
            assert!(check_hostname(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "a b", "a..b", "ä", "a\nb", &"a".repeat(64), &"a.".repeat(33)] {
            assert!(check_hostname(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_own_line_replaces_an_old_one() {
        let old = "127.0.0.1 localhost\n127.0.1.1 old\n10.0.0.1 gw\n";
        assert_eq!(
            hosts(Some(old), "vm1.example.org"),
            "127.0.0.1 localhost\n127.0.1.1\tvm1.example.org vm1\n10.0.0.1 gw\n"
        );
        assert_eq!(hosts(Some(""), "vm1"), "127.0.1.1\tvm1\n");
        assert!(hosts(None, "vm1").starts_with("127.0.0.1\tlocalhost\n127.0.1.1\tvm1\n"));
    }
}
