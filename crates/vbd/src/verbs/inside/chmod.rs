//! `vbd chmod`, and modes as chmod(1) writes them.

use std::ffi::OsString;
use std::str::FromStr;

use vbd_ext4::edit::Attributes;
use vbd_ext4::read::{FileType, Links};

use super::change::{self, Changed, Changing};

/// Change the permissions of files in a disk.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// In octal, as 640, or in letters, as u+x,go-w
    #[arg(value_name = "MODE", allow_hyphen_values = true)]
    mode: Mode,
    /// What to change, as vm1disk:/etc/shadow; links are followed
    #[arg(value_name = "IMAGE:/PATH", required = true)]
    words: Vec<OsString>,
    /// Change what is in directories, too; links in them are left alone
    #[arg(long, short = 'R')]
    recursive: bool,
    #[command(flatten)]
    changing: Changing,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let (image, targets) = change::targets(args.words)?;
    let mut changed = args.changing.open(&image)?;
    for target in &targets {
        let inode = changed.find(target, Links::Follow)?;
        for ino in changed.below(target, inode, args.recursive)? {
            let inode = changed.editor.filesystem().inode(ino)?;
            if inode.file_type() == FileType::Symlink {
                continue;
            }
            let before = inode.attributes();
            let mode = args.mode.apply(before.mode, inode.file_type() == FileType::Directory);
            let attributes = Attributes { mode, ctime: changed.now, ..before };
            changed.editor.set_attributes(ino, &attributes).map_err(Changed::failed(target))?;
        }
    }
    changed.commit()
}

/// What a mode becomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Mode {
    Octal(u16),
    Letters(Vec<Clause>),
}

/// One of `u+x,go-w`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Clause {
    /// The permission bits of those that are meant.
    who: u16,
    operation: u8,
    /// Read, write and execute as 0 to 7.
    bits: u16,
    /// `X`: execute for directories and for what somebody may execute.
    some: bool,
    /// Set-uid or set-gid, for those that are meant.
    set: bool,
    sticky: bool,
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Mode, String> {
        if text.bytes().all(|byte| byte.is_ascii_digit()) && !text.is_empty() {
            let mode = u16::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777);
            return mode.map(Mode::Octal).ok_or_else(|| "in octal, a mode goes from 0 to 7777".to_owned());
        }
        text.split(',').map(clause).collect::<Option<_>>().map(Mode::Letters).ok_or_else(|| {
            "write it in octal, as 640, or in letters: [ugoa][+-=][rwxXst], several with commas".to_owned()
        })
    }
}

fn clause(text: &str) -> Option<Clause> {
    let at = text.bytes().position(|byte| b"+-=".contains(&byte))?;
    let (who, rest) = text.split_at(at);
    let mut clause =
        Clause { who: 0, operation: rest.as_bytes()[0], bits: 0, some: false, set: false, sticky: false };
    for letter in who.bytes() {
        clause.who |= match letter {
            b'u' => 0o700,
            b'g' => 0o070,
            b'o' => 0o007,
            b'a' => 0o777,
            _ => return None,
        };
    }
    if who.is_empty() {
        clause.who = 0o777;
    }
    for letter in rest.bytes().skip(1) {
        match letter {
            b'r' => clause.bits |= 4,
            b'w' => clause.bits |= 2,
            b'x' => clause.bits |= 1,
            b'X' => clause.some = true,
            b's' => clause.set = true,
            b't' => clause.sticky = true,
            _ => return None,
        }
    }
    Some(clause)
}

impl Mode {
    /// The mode that one becomes.
    pub(super) fn apply(&self, before: u16, directory: bool) -> u16 {
        let clauses = match self {
            Mode::Octal(mode) => return *mode,
            Mode::Letters(clauses) => clauses,
        };
        let mut mode = before;
        for clause in clauses {
            let execute = clause.some && (directory || mode & 0o111 != 0);
            let bits = clause.bits | u16::from(execute);
            let mut mask = (bits << 6 | bits << 3 | bits) & clause.who;
            let mut all = clause.who;
            for (who, bit) in [(0o700, 0o4000), (0o070, 0o2000)] {
                if clause.who & who != 0 {
                    all |= bit;
                    mask |= if clause.set { bit } else { 0 };
                }
            }
            mask |= if clause.sticky { 0o1000 } else { 0 };
            mode = match clause.operation {
                b'+' => mode | mask,
                b'-' => mode & !mask,
                _ => mode & !all | mask,
            };
        }
        mode
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes() {
        for (text, before, directory, after) in [
            ("640", 0o777, false, 0o640),
            ("4755", 0, false, 0o4755),
            ("u+x", 0o644, false, 0o744),
            ("+x", 0o644, false, 0o755),
            ("go-rwx", 0o4755, false, 0o4700),
            ("a=r,u+w", 0o777, false, 0o644),
            ("u=rwX,go=rX", 0o600, true, 0o755),
            ("u=rwX,go=rX", 0o600, false, 0o644),
            ("ug+s,+t", 0o755, true, 0o7755),
            ("u-s", 0o4755, false, 0o755),
        ] {
            assert_eq!(text.parse::<Mode>().unwrap().apply(before, directory), after, "{text}");
        }
        for text in ["", "8", "10000", "u", "u+q", "z+x", "u+x,"] {
            assert!(text.parse::<Mode>().is_err(), "{text}");
        }
    }
}
