//! DHCP, by one of two programs.

use super::{Network, Root, exists, make_directories, put, systemd, text};
use crate::{Error, Result};

const NETWORKD: &str = "\
[Match]
Type=ether
Kind=!*

[Network]
DHCP=yes
";

pub(super) fn set(root: &mut dyn Root, network: &Network) -> Result<()> {
    match network {
        Network::DhcpNetworkd => networkd(root),
        Network::DhcpInterfaces(name) => interfaces(root, name),
    }
}

/// systemd.network(5); the links are those of `systemctl enable systemd-networkd`, but for the wait until a network is
/// there, which would hold up a machine that has none.
fn networkd(root: &mut dyn Root) -> Result<()> {
    let Some(unit) = systemd::unit(root, "systemd-networkd.service")? else {
        let reason = "the tree has no systemd-networkd; use dhcp-interfaces, or a tree with systemd";
        return Err(Error::tailor("network dhcp-networkd", reason));
    };
    put(root, "/etc/systemd/network/80-dhcp.network", NETWORKD.as_bytes(), 0o644)?;
    systemd::want(root, "multi-user.target", "systemd-networkd.service", &unit)?;
    root.symlink("/etc/systemd/system/dbus-org.freedesktop.network1.service", &unit)?;
    if let Some(socket) = systemd::unit(root, "systemd-networkd.socket")? {
        systemd::want(root, "sockets.target", "systemd-networkd.socket", &socket)?;
    }
    if let Some(resolved) = systemd::unit(root, "systemd-resolved.service")? {
        systemd::want(root, "multi-user.target", "systemd-resolved.service", &resolved)?;
        root.symlink("/etc/systemd/system/dbus-org.freedesktop.resolve1.service", &resolved)?;
        root.symlink("/etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")?;
    }
    Ok(())
}

/// interfaces(5) of ifupdown.
fn interfaces(root: &mut dyn Root, name: &str) -> Result<()> {
    const MAIN: &str = "/etc/network/interfaces";
    let own = format!("allow-hotplug {name}\niface {name} inet dhcp\n");
    let old = text(root, MAIN)?;
    if old.is_none() && !exists(root, "/sbin/ifup")? {
        let reason = "the tree has no ifupdown; add that package, or use dhcp-networkd";
        return Err(Error::tailor("network dhcp-interfaces", reason));
    }
    let sources = |text: &str| text.lines().any(|l| l.starts_with("source") && l.contains("interfaces.d"));
    match old {
        Some(text) if sources(&text) => {}
        Some(mut text) => {
            systemd::end_line(&mut text);
            text.push_str("source /etc/network/interfaces.d/*\n");
            put(root, MAIN, text.as_bytes(), 0o644)?;
        }
        None => {
            let text = "auto lo\niface lo inet loopback\nsource /etc/network/interfaces.d/*\n";
            put(root, MAIN, text.as_bytes(), 0o644)?;
        }
    }
    make_directories(root, "/etc/network/interfaces.d")?;
    put(root, &format!("/etc/network/interfaces.d/{name}"), own.as_bytes(), 0o644)
}
