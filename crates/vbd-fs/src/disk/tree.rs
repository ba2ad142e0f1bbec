//! Reading out of a filesystem that was made.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::Context;
use crate::process::{Running, e2fsprogs};
use crate::{Error, Progress, Result};

/// A tree that is in an image, for whoever wants files of it. Paths are absolute; only plain names are asked for.
pub(crate) trait Tree {
    /// The names in a directory; none if there is no such directory.
    fn list(&mut self, directory: &str, progress: &mut dyn Progress) -> Result<Vec<String>>;
    /// A file's content; nothing if there is no such file.
    fn open(&mut self, path: &str, progress: &mut dyn Progress) -> Result<Option<Box<dyn Read>>>;
}

/// A tree in ext2, ext3 or ext4, read by debugfs.
pub(crate) struct Debugfs<'a> {
    image: &'a Path,
    scratch: PathBuf,
}

impl<'a> Debugfs<'a> {
    /// The filesystem that fills `image`; `scratch` is a directory for what is read.
    pub(crate) fn new(image: &'a Path, scratch: &Path) -> Debugfs<'a> {
        Debugfs { image, scratch: scratch.join("read") }
    }

    /// What a request writes to its standard output.
    fn ask(&self, request: &str, progress: &mut dyn Progress) -> Result<File> {
        let output = tempfile::tempfile_in(self.scratch.parent().unwrap_or(Path::new(".")));
        let output = output.at("make a file for", &self.scratch)?;
        let mut command = e2fsprogs("debugfs");
        command.arg("-R").arg(request).arg(self.image);
        command.stdout(output.try_clone().at("make a file for", &self.scratch)?);
        Running::start(&mut command, "e2fsprogs")?.wait(progress, |_| {})?;
        let mut output = output;
        std::io::Seek::rewind(&mut output).at("read", &self.scratch)?;
        Ok(output)
    }
}

impl Tree for Debugfs<'_> {
    fn list(&mut self, directory: &str, progress: &mut dyn Progress) -> Result<Vec<String>> {
        let mut text = Vec::new();
        let read = self.ask(&format!("ls -p {directory}"), progress)?.take(16 << 20).read_to_end(&mut text);
        read.map_err(|e| Error::io("cannot read what debugfs says", e))?;
        // /INODE/MODE/UID/GID/NAME/SIZE/, a line each; a name with a newline has no plain part.
        let text = String::from_utf8_lossy(&text);
        let names = text.lines().filter_map(|line| line.strip_prefix('/')?.split('/').nth(4));
        Ok(names.filter(|name| *name != "." && *name != "..").map(str::to_owned).collect())
    }

    fn open(&mut self, path: &str, progress: &mut dyn Progress) -> Result<Option<Box<dyn Read>>> {
        let mut start = [0; 5];
        let mut what = self.ask(&format!("stat {path}"), progress)?;
        let found = what.read_exact(&mut start).is_ok() && &start == b"Inode";
        if !found {
            return Ok(None);
        }
        Ok(Some(Box::new(self.ask(&format!("cat {path}"), progress)?)))
    }
}
