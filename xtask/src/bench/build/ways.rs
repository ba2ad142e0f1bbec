//! The ways, as commands.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::BASE;
use super::race::Way;
use crate::bench::{Plan, output};

/// Makes a filesystem, mounts it, copies and unmounts: in a mount namespace of its own, which takes the mount with it
/// wherever this ends. Arguments: tree, image, size, an empty directory.
const MOUNTED: &str = r#"
mkdir -p "$4"
mke2fs -q -F -t ext4 "$2" "$3"
mount -o loop "$2" "$4"
cp -ax "$1/." "$4"
umount "$4"
"#;

/// Writes the bytes of all files of a tree into one. Arguments: tree, file.
const CAT: &str = r#"find "$1" -xdev -type f -print0 | xargs -0 cat >"$2""#;

/// Unpacks layers over each other and makes a filesystem of it. Arguments: image, size, directory, layers. What layers say is
/// gone stays: it is less work.
const UNPACKED: &str = r#"
image=$1 size=$2 root=$3
shift 3
mkdir "$root"
for layer; do tar -xpf "$layer" -C "$root"; done
mke2fs -q -F -t ext4 -d "$root" "$image" "$size"
"#;

/// Makes them.
pub(super) struct Ways<'a> {
    vbd: &'a Path,
    /// Where what they make goes.
    out: &'a Path,
}

impl<'a> Ways<'a> {
    pub(super) fn new(plan: &'a Plan, out: &'a Path) -> Self {
        Ways { vbd: &plan.tools.vbd, out }
    }

    /// `vbd build` from any source.
    pub(super) fn vbd(&self, source: &str, size: u64) -> Way {
        self.vbd_to(self.out, source, size)
    }

    /// `vbd build` into another directory.
    pub(super) fn vbd_to(&self, out: &Path, source: &str, size: u64) -> Way {
        let image = out.join("vbd.img");
        let size = size.to_string();
        let arguments = ["build".as_ref(), image.as_os_str(), "--size".as_ref(), size.as_ref()];
        let arguments = arguments.into_iter().chain(["--from".as_ref(), source.as_ref()]);
        way("vbd", self.vbd, arguments.map(OsString::from).collect(), vec![image.clone()], Some(image))
    }

    /// The filesystem's own tool.
    pub(super) fn mke2fs(&self, tree: &Path, size: u64) -> Way {
        let image = self.out.join("mke2fs.img");
        let size = kib(size);
        let arguments = ["-q", "-F", "-t", "ext4", "-d"].map(OsString::from).into_iter();
        let arguments = arguments.chain([tree.into(), image.clone().into(), size.into()]);
        way("mke2fs", "mke2fs".as_ref(), arguments.collect(), vec![image.clone()], Some(image))
    }

    /// The kernel's filesystem on a loop device: root alone can.
    pub(super) fn mounted(&self, tree: &Path, size: u64) -> Way {
        let (image, at) = (self.out.join("mounted.img"), self.out.join("mounted"));
        let arguments = ["--mount", "sh", "-ec", MOUNTED, "sh"].map(OsString::from).into_iter();
        let arguments =
            arguments.chain([tree.into(), image.clone().into(), kib(size).into(), at.clone().into()]);
        way("loop", "unshare".as_ref(), arguments.collect(), vec![image.clone(), at], Some(image))
    }

    /// The bytes alone.
    pub(super) fn cat(&self, tree: &Path) -> Way {
        let file = self.out.join("cat");
        let arguments = vec!["-ec".into(), CAT.into(), "sh".into(), tree.into(), file.clone().into()];
        way("cat", "sh".as_ref(), arguments, vec![file], None)
    }

    /// What stands in for a container image's tool.
    pub(super) fn unpacked(&self, layers: &[PathBuf], size: u64) -> Way {
        let (image, root) = (self.out.join("tar.img"), self.out.join("root"));
        let arguments = ["-ec", UNPACKED, "sh"].map(OsString::from).into_iter();
        let arguments = arguments.chain([image.clone().into(), kib(size).into(), root.clone().into()]);
        let arguments = arguments.chain(layers.iter().map(OsString::from)).collect();
        way("tar+mke2fs", "sh".as_ref(), arguments, vec![image.clone(), root], Some(image))
    }

    /// An image to list, edit and clone.
    pub(super) fn base(&self, dir: &Path, tree: &Path) -> Result<PathBuf> {
        let image = dir.join("base.img");
        let mut build = Command::new(self.vbd);
        build.arg("build").arg(&image).args(["--size", &BASE.to_string(), "--from"]).arg(tree);
        output(&mut build)?;
        Ok(image)
    }

    pub(super) fn ls(&self, base: &Path) -> Way {
        way("vbd", self.vbd, vec!["ls".into(), within(base, "/")], vec![], None)
    }

    /// Replaces a file; the first round makes it.
    pub(super) fn edit(&self, base: &Path, dir: &Path) -> Result<Way> {
        let file = dir.join("edit");
        std::fs::write(&file, "vm2\n")?;
        let arguments = vec!["cp".into(), file.into(), within(base, "/etc/vbd-bench")];
        Ok(way("vbd", self.vbd, arguments, vec![], Some(base.to_owned())))
    }

    /// A clone that comes from its base in that way.
    pub(super) fn clone(&self, base: &Path, how: &str) -> Way {
        let new = base.with_file_name("clone.img");
        let arguments = ["clone".as_ref(), base.as_os_str(), new.as_os_str()];
        let options = ["--hostname", "vm2", "--how", how].map(OsStr::new);
        let arguments = arguments.into_iter().chain(options);
        let arguments = arguments.map(OsString::from).collect();
        if how != "overlay" {
            return way("vbd", self.vbd, arguments, vec![new.clone()], Some(new));
        }
        // The filesystem is behind a format that e2fsck does not know.
        let (vbd, image) = (self.vbd.to_owned(), new.clone());
        let check = move || {
            let mut command = Command::new(&vbd);
            command.args(["check", "--format", "qcow2"]).arg(&image);
            command
        };
        Way { check: Some(Box::new(check)), ..way("vbd", self.vbd, arguments, vec![new], None) }
    }
}

fn way(
    name: &'static str,
    program: &Path,
    arguments: Vec<OsString>,
    makes: Vec<PathBuf>,
    image: Option<PathBuf>,
) -> Way {
    let program = program.to_owned();
    let command = move || {
        let mut command = Command::new(&program);
        command.args(&arguments);
        command
    };
    let check = image.map(|image| {
        let e2fsck = move || {
            let mut command = Command::new("/sbin/e2fsck");
            command.arg("-fn").arg(&image);
            command
        };
        Box::new(e2fsck) as Box<dyn Fn() -> Command>
    });
    Way { name, command: Box::new(command), makes, check }
}

/// A size as mke2fs takes it.
fn kib(bytes: u64) -> String {
    format!("{}K", bytes / 1024)
}

/// `IMAGE:/PATH`.
fn within(image: &Path, path: &str) -> OsString {
    let mut target = image.as_os_str().to_owned();
    target.push(":");
    target.push(path);
    target
}
