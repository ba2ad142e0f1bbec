//! `vbd chown`, and owners as numbers or by the disk's own names.

use std::ffi::OsString;
use std::str::FromStr;

use anyhow::{Context, bail};
use vbd_ext4::edit::{Attributes, Editor};
use vbd_ext4::read::{FileType, Links};

use super::change::{self, Changed, Changing};

/// Bytes of the disk's passwd or group at most.
const NAMES: u64 = 16 << 20;

/// Change the owner and group of files in a disk.
///
/// Names are those of the disk's own /etc/passwd and /etc/group. As with chown(2), set-user-id and set-group-id are taken
/// off files.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// As numbers or names: 1000, alice:staff, :33
    #[arg(value_name = "OWNER[:GROUP]")]
    owner: Owner,
    /// What to change, as vm1disk:/srv; links are followed
    #[arg(value_name = "IMAGE:/PATH", required = true)]
    words: Vec<OsString>,
    /// Change what is in directories, too; of links in them the links
    #[arg(long, short = 'R')]
    recursive: bool,
    /// Change links themselves
    #[arg(long)]
    no_dereference: bool,
    #[command(flatten)]
    changing: Changing,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let (image, targets) = change::targets(args.words)?;
    let mut changed = args.changing.open(&image)?;
    let (uid, gid) = args.owner.in_disk(&changed.editor)?;
    let links = if args.no_dereference { Links::Keep } else { Links::Follow };
    for target in &targets {
        let inode = changed.find(target, links)?;
        for ino in changed.below(target, inode, args.recursive)? {
            let inode = changed.editor.filesystem().inode(ino)?;
            let before = inode.attributes();
            let mode =
                if inode.file_type() == FileType::Regular { before.mode & !0o6000 } else { before.mode };
            let (uid, gid) = (uid.unwrap_or(before.uid), gid.unwrap_or(before.gid));
            let attributes = Attributes { mode, uid, gid, ctime: changed.now, ..before };
            changed.editor.set_attributes(ino, &attributes).map_err(Changed::failed(target))?;
        }
    }
    changed.commit()
}

/// An owner, a group, or both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Owner {
    user: Option<String>,
    group: Option<String>,
}

impl FromStr for Owner {
    type Err = String;

    fn from_str(text: &str) -> Result<Owner, String> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let said = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let owner = Owner { user: said(user), group: group.and_then(said) };
        if owner.user.is_none() && owner.group.is_none() {
            return Err("write OWNER, OWNER:GROUP or :GROUP, as numbers or names".to_owned());
        }
        Ok(owner)
    }
}

impl Owner {
    /// The numbers; names are the disk's.
    pub(super) fn in_disk(&self, editor: &Editor) -> anyhow::Result<(Option<u32>, Option<u32>)> {
        let number = |name: &Option<String>, file: &str| {
            name.as_deref().map(|name| number(editor, name, file)).transpose()
        };
        Ok((number(&self.user, "/etc/passwd")?, number(&self.group, "/etc/group")?))
    }
}

/// A number, or that of a name in a file whose third field it is.
fn number(editor: &Editor, name: &str, file: &str) -> anyhow::Result<u32> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let filesystem = editor.filesystem();
    let inode =
        filesystem.lookup(file.as_bytes(), Links::Follow).with_context(|| format!("looking for {name}"))?;
    let text = filesystem.read_all(&inode, NAMES)?;
    for line in String::from_utf8_lossy(&text).lines() {
        let mut fields = line.split(':');
        if fields.next() == Some(name)
            && let Some(number) = fields.nth(1).and_then(|number| number.parse().ok())
        {
            return Ok(number);
        }
    }
    bail!("{name} is not in the disk's {file}; use a number")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners() {
        for (text, user, group) in [
            ("1000", Some("1000"), None),
            ("a:b", Some("a"), Some("b")),
            (":33", None, Some("33")),
            ("a:", Some("a"), None),
        ] {
            let expected = Owner { user: user.map(str::to_owned), group: group.map(str::to_owned) };
            assert_eq!(text.parse::<Owner>().unwrap(), expected, "{text}");
        }
        assert!("".parse::<Owner>().is_err() && ":".parse::<Owner>().is_err());
    }
}
