//! What can be changed: the `[tailor]` table of a configuration.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// Changes to a tree. Nothing is changed that is not named.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Tailor {
    /// The machine's name, for `/etc/hostname` and `/etc/hosts`; a dot makes it a full one.
    pub hostname: Option<String>,
    /// Directories to make where they are missing, as root's with mode 0755, and those above them.
    pub directories: Vec<String>,
    /// What `/etc/fstab` is to hold; it is left alone where nothing is named.
    pub fstab: Vec<Mount>,
    /// Users to make or to change.
    pub user: Vec<User>,
    /// A serial line that is to have a login, such as `ttyS0` or `hvc0`.
    pub serial_console: Option<String>,
    /// How the network is set up.
    pub network: Option<Network>,
    /// Remove what makes a machine unique: machine-id, SSH host keys, the random seed. They are made anew at its start.
    pub reset_identity: bool,
    /// Write `/boot/grub/grub.cfg` for Xen's pygrub and PV-GRUB, with this command line for each kernel in `/boot`.
    pub xen_boot: Option<String>,
    /// Paths in the image to remove, with all below.
    pub remove: Vec<String>,
    /// Files and directories of the host to put into the image.
    pub copy_in: Vec<CopyIn>,
    /// Files to write.
    pub write: Vec<Text>,
    /// Text to add to the end of files.
    pub append: Vec<Text>,
}

/// A user. One that exists keeps what is not named.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct User {
    /// The login name.
    pub name: String,
    /// Public keys, as lines of `authorized_keys`.
    pub ssh_keys: Vec<String>,
    /// Files on the host with such lines.
    pub ssh_key_files: Vec<PathBuf>,
    /// A password as crypt(5) has it (`openssl passwd -6` makes one). None: no password logs in.
    pub password_hash: Option<String>,
    /// Groups of the tree to be in as well.
    pub groups: Vec<String>,
    /// The shell; `/bin/bash` where there is one.
    pub shell: Option<String>,
    /// The number; the first free one from 1000 where not given.
    pub uid: Option<u32>,
}

/// A text for a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Text {
    /// The file's path in the image.
    pub path: String,
    /// What to write. A newline is added at the end where there is none.
    pub text: String,
    /// Permission bits of a file that is made; 0644 where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
}

impl FromStr for Text {
    type Err = Error;

    /// `PATH=TEXT`.
    fn from_str(argument: &str) -> Result<Text, Error> {
        let (path, text) = argument
            .split_once('=')
            .ok_or_else(|| Error::Invalid(format!("{argument:?}: write it as /PATH=TEXT")))?;
        Ok(Text { path: path.to_owned(), text: text.to_owned(), mode: None })
    }
}

/// Something of the host's for the image. As text: `HOST:IMAGE`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CopyIn {
    /// A file or a directory on the host.
    pub from: PathBuf,
    /// Where it goes in the image.
    pub to: String,
}

impl FromStr for CopyIn {
    type Err = Error;

    fn from_str(argument: &str) -> Result<CopyIn, Error> {
        // The image's path is absolute, so the last ":/" is what separates.
        match argument.rsplit_once(":/") {
            Some((from, to)) if !from.is_empty() => Ok(CopyIn { from: from.into(), to: format!("/{to}") }),
            _ => Err(Error::Invalid(format!("{argument:?}: write it as HOST:/PATH/IN/IMAGE"))),
        }
    }
}

impl fmt::Display for CopyIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.from.display(), self.to)
    }
}

/// A line of fstab(5). As text: `DEVICE:MOUNTPOINT[:TYPE[:OPTIONS]]`, such as `/dev/vda:/` or `/dev/vdb:swap`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mount {
    /// `/dev/vda`, `UUID=...`, `LABEL=...`.
    pub device: String,
    /// Where it is mounted; nothing for swap.
    pub point: Option<String>,
    /// The filesystem's type.
    pub kind: Option<String>,
    /// Mount options.
    pub options: Option<String>,
}

impl FromStr for Mount {
    type Err = Error;

    fn from_str(argument: &str) -> Result<Mount, Error> {
        let bad = |why: &str| {
            Error::Invalid(format!(
                "{argument:?}: {why}; write it as DEVICE:/MOUNTPOINT:TYPE:OPTIONS or DEVICE:swap"
            ))
        };
        if argument.is_empty() || argument.contains(|c: char| c.is_whitespace() || c.is_control() || c == '#')
        {
            return Err(bad("no spaces"));
        }
        if let Some(device) = argument.strip_suffix(":swap").filter(|d| !d.is_empty()) {
            return Ok(Mount {
                device: device.to_owned(),
                point: None,
                kind: Some("swap".to_owned()),
                options: None,
            });
        }
        // A device's name may have colons, a mount point starts with a slash.
        let (device, rest) = argument.split_once(":/").ok_or_else(|| bad("no mount point"))?;
        if device.is_empty() {
            return Err(bad("no device"));
        }
        let mut fields = rest.splitn(3, ':');
        let point = format!("/{}", fields.next().unwrap_or_default().trim_end_matches('/'));
        let mut field = || fields.next().filter(|f| !f.is_empty()).map(str::to_owned);
        Ok(Mount { device: device.to_owned(), point: Some(point), kind: field(), options: field() })
    }
}

impl fmt::Display for Mount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(point) = &self.point else { return write!(f, "{}:swap", self.device) };
        write!(f, "{}:{point}", self.device)?;
        match (&self.kind, &self.options) {
            (None, None) => Ok(()),
            (kind, None) => write!(f, ":{}", kind.as_deref().unwrap_or_default()),
            (kind, Some(options)) => write!(f, ":{}:{options}", kind.as_deref().unwrap_or_default()),
        }
    }
}

/// How the network is set up. As text: `dhcp-networkd`, `dhcp-interfaces` or `dhcp-interfaces:NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Network {
    /// DHCP on every wired interface, by systemd-networkd.
    DhcpNetworkd,
    /// DHCP on one interface, by ifupdown.
    DhcpInterfaces(String),
}

impl FromStr for Network {
    type Err = Error;

    fn from_str(text: &str) -> Result<Network, Error> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        match text.split_once(':') {
            None if text == "dhcp-networkd" => Ok(Network::DhcpNetworkd),
            None if text == "dhcp-interfaces" => Ok(Network::DhcpInterfaces("eth0".to_owned())),
            Some(("dhcp-interfaces", name))
                if !name.is_empty() && name.len() < 16 && name.chars().all(plain) =>
            {
                Ok(Network::DhcpInterfaces(name.to_owned()))
            }
            _ => Err(Error::Invalid(format!(
                "{text:?} is none of dhcp-networkd, dhcp-interfaces, dhcp-interfaces:NAME"
            ))),
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Network::DhcpNetworkd => f.write_str("dhcp-networkd"),
            Network::DhcpInterfaces(name) => write!(f, "dhcp-interfaces:{name}"),
        }
    }
}

/// Makes a type that is read from text and written as text serde's, too.
macro_rules! as_text {
    ($($type:ty),*) => {$(
        impl TryFrom<String> for $type {
            type Error = Error;

            fn try_from(text: String) -> Result<$type, Error> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.to_string()
            }
        }
    )*};
}

as_text!(CopyIn, Mount, Network);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_split_where_the_mount_point_begins() {
        for text in ["/dev/vda:/", "/dev/vda:/:ext4", "UUID=1-2:/var/lib::noatime", "/dev/vdb:swap"] {
            assert_eq!(text.parse::<Mount>().unwrap().to_string(), text);
        }
        let by_path: Mount = "/dev/disk/by-path/pci-0000:00:04.0:/srv:xfs:ro,noatime".parse().unwrap();
        assert_eq!(by_path.device, "/dev/disk/by-path/pci-0000:00:04.0");
        assert_eq!(
            (by_path.point.as_deref(), by_path.options.as_deref()),
            (Some("/srv"), Some("ro,noatime"))
        );
        for bad in ["", "/dev/vda", ":/", ":swap", "/dev/vda:/a b", "/dev/vda:/\n/dev/x:/y", "/dev/vda:#"] {
            assert!(bad.parse::<Mount>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_last_colon_before_a_slash_splits_a_copy() {
        let copy: CopyIn = "./a:b:/etc/x".parse().unwrap();
        assert_eq!((copy.from.to_str(), copy.to.as_str()), (Some("./a:b"), "/etc/x"));
        assert!("a:b".parse::<CopyIn>().is_err());
    }
}
