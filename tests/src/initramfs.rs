//! Small first filesystems for guests: a shell, the modules a disk needs, and a script.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::Kernel;

/// Where Debian's busybox-static has it.
const BUSYBOX: &str = "/bin/busybox";

/// Directory and file types and modes, as `stat(2)` has them.
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;

/// What every guest does first.
const PREPARE: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module; done
";

/// Takes commands, one a line, on the second serial port, and says how each ended.
const AGENT: &str = "exec </dev/ttyS1 >/dev/ttyS1 2>&1
stty -echo -onlcr
mount -t tmpfs tmp /tmp
echo '@@ready'
while read -r line; do
    eval \"$line\" </dev/null
    echo \"@@end $?\"
done
";

/// Goes on to the system on a disk, as Debian's own initramfs would.
const SWITCH: &str = "mount DEVICE /root || exec sh </dev/console >/dev/console 2>&1
mount --move /dev /root/dev
umount /sys
umount /proc
exec switch_root /root /sbin/init </root/dev/console >/root/dev/console 2>&1
";

/// An archive in cpio's `newc` form that the kernel unpacks into memory and starts `/init` from.
pub struct Initramfs {
    archive: Vec<u8>,
    inode: u32,
}

impl Initramfs {
    /// A guest that takes commands on its second serial port (see [`crate::Guest::sh`]), with these modules in `/more`.
    ///
    /// # Errors
    /// When busybox or a module cannot be read.
    pub fn agent(kernel: &Kernel, modules: &[&str]) -> Result<Vec<u8>> {
        Self::with_script(kernel, modules, AGENT)
    }

    /// A guest that boots the system on `device`, as it calls it.
    ///
    /// # Errors
    /// When busybox or a module cannot be read.
    pub fn switch_root(kernel: &Kernel, device: &str) -> Result<Vec<u8>> {
        Self::with_script(kernel, &[], &SWITCH.replace("DEVICE", device))
    }

    fn with_script(kernel: &Kernel, modules: &[&str], script: &str) -> Result<Vec<u8>> {
        let mut archive = Self { archive: Vec::new(), inode: 0 };
        for name in [
            "bin", "dev", "proc", "sys", "root", "tmp", "tools", "mnt", "modules", "more", "vbd", "host",
            "etc",
        ] {
            archive.entry(name, DIRECTORY, &[]);
        }
        let busybox =
            fs::read(Path::new(BUSYBOX)).with_context(|| format!("{BUSYBOX} (package busybox-static)"))?;
        archive.entry("bin/busybox", PROGRAM, &busybox);
        archive.entry("modules/virtio_blk.ko", FILE, &kernel.module("virtio_blk")?);
        for module in modules {
            archive.entry(&format!("more/{module}.ko"), FILE, &kernel.module(module)?);
        }
        archive.entry("init", PROGRAM, format!("{PREPARE}{script}").as_bytes());
        Ok(archive.finish())
    }

    /// One entry: a header of hexadecimal fields, the name, the content, each filled up to four bytes.
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        let links = 1;
        let fields = [
            self.inode,
            mode,
            0, // owner
            0, // group
            links,
            0, // time
            u32::try_from(content.len()).expect("a small file"),
            0, // device
            0,
            0, // device of a special file
            0,
            u32::try_from(name.len() + 1).expect("a short name"),
            0, // checksum, of another form
        ];
        self.archive.extend_from_slice(b"070701");
        for field in fields {
            self.archive.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.archive.extend_from_slice(name.as_bytes());
        self.archive.push(0);
        self.fill();
        self.archive.extend_from_slice(content);
        self.fill();
    }

    fn fill(&mut self) {
        self.archive.resize(self.archive.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.archive
    }
}
