//! A virtual machine under QEMU's emulation, and talking to it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::control::Control;
use crate::tools::{tool_path, tools_disk, vbd_disk};
use crate::{Initramfs, Kernel, Process, Scratch, command, run_ok, vbd};

/// How long a guest may take to boot: ten times what it needs when the machine is quiet.
const BOOT: Duration = Duration::from_secs(120);
/// How long a command in a guest may take unless told otherwise.
const COMMAND: Duration = Duration::from_secs(120);

/// An emulated clock stands still whenever the host is busy: the kernel is not to draw conclusions from that.
const CLOCKS: &str = "tsc=unstable no_timer_check";
/// How often QEMU is asked how far it is.
const PACE: Duration = Duration::from_millis(50);

/// A disk that a guest gets over vhost-user-blk.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The server's socket.
    pub socket: PathBuf,
    /// How many queues the guest uses.
    pub queues: u16,
}

/// A file that QEMU itself gives to a guest as a disk.
#[derive(Clone, Debug)]
pub struct Drive {
    /// The file.
    pub file: PathBuf,
    /// By which the guest knows it.
    pub serial: &'static str,
    /// The guest only reads it.
    pub read_only: bool,
}

/// What a guest is made of.
pub struct Machine {
    /// The disks, `/dev/vda` first.
    pub disks: Vec<Disk>,
    /// Processors.
    pub cpus: u16,
    /// Memory in MiB.
    pub memory: u32,
    /// Whether fio and e2fsprogs are at `/tools` (see [`Guest::tool`]).
    pub tools: bool,
    /// Whether vbd is in the guest, too (see [`Guest::vbd`]), with a filesystem on this drive at `/host` to have its
    /// files on.
    pub host: Option<Drive>,
    /// The vbd in the guest, where it is not the one under test.
    pub program: Option<PathBuf>,
    /// What the guest's kernel is told of its clocks.
    pub clocks: &'static str,
    /// Modules that are in the guest's `/more`, and not loaded.
    pub modules: Vec<&'static str>,
}

/// How a command in a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its exit status.
    pub status: i32,
    /// All it said.
    pub output: String,
}

impl Machine {
    /// Two processors, 256 MiB, these disks.
    pub fn new(disks: impl IntoIterator<Item = Disk>) -> Self {
        Self {
            disks: disks.into_iter().collect(),
            cpus: 2,
            memory: 256,
            tools: false,
            host: None,
            program: None,
            clocks: CLOCKS,
            modules: Vec::new(),
        }
    }

    /// Adds fio and e2fsprogs.
    pub fn with_tools(mut self) -> Self {
        self.tools = true;
        self
    }

    /// Puts vbd into the guest, as the program that it is here, and a filesystem of `size` bytes at `/host`.
    ///
    /// # Errors
    /// When the filesystem cannot be made.
    pub fn with_vbd(mut self, scratch: &Scratch, size: u64) -> Result<Self> {
        let file = scratch.sparse("host", size)?;
        run_ok("/sbin/mke2fs", ["-q", "-t", "ext4", &file.to_string_lossy()], COMMAND)?;
        self.host = Some(Drive { file, serial: "host", read_only: false });
        self.memory = self.memory.max(512);
        Ok(self)
    }

    /// Adds modules, not loaded.
    pub fn with_modules(mut self, modules: &[&'static str]) -> Self {
        self.modules.extend(modules);
        self
    }

    /// Starts a machine like this one that waits for a guest to come to it, over the socket `from`.
    ///
    /// # Errors
    /// When QEMU cannot be started.
    pub fn receive(&self, scratch: &Scratch, from: &Path) -> Result<Guest> {
        let guest =
            self.with_agent(scratch, &["-incoming".to_owned(), format!("unix:{}", from.display())])?;
        let end = Instant::now() + BOOT;
        while !from.exists() {
            ensure!(Instant::now() < end, "QEMU does not listen: {}", guest.last_words());
            thread::sleep(PACE);
        }
        Ok(guest)
    }

    /// Boots a guest that takes commands; comes back when it does.
    ///
    /// # Errors
    /// When QEMU cannot be started, or the guest does not come up in time.
    pub fn boot(&self, scratch: &Scratch) -> Result<Guest> {
        let mut guest = self.with_agent(scratch, &[])?;
        let ready = guest.process.stdout.wait_for("@@ready\n", BOOT);
        ready.with_context(|| format!("guest did not boot: {}", guest.last_words()))?;
        if self.tools {
            guest.mount_tools()?;
        }
        if self.host.is_some() {
            guest.mount("vbd", "ro", "/vbd")?;
            guest.mount("host", "rw", "/host")?;
            guest.sh("mkdir -p /run")?;
        }
        Ok(guest)
    }

    fn with_agent(&self, scratch: &Scratch, more: &[String]) -> Result<Guest> {
        let kernel = Kernel::get()?;
        let log = unused(scratch, "console")?;
        let control = scratch.socket(log.file_name().context("a log has a name")?);
        let mut options =
            vec!["-serial".to_owned(), format!("file:{}", log.display()), "-serial".into(), "stdio".into()];
        options.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", control.display())]);
        options.extend_from_slice(more);
        let process =
            self.start(scratch, &kernel, &Initramfs::agent(&kernel, &self.modules)?, &options, "loglevel=4")?;
        Ok(Guest { process, log, control })
    }

    /// Boots the system on the first disk; the guest's console is the process's standard input and output.
    ///
    /// # Errors
    /// When QEMU cannot be started.
    pub fn boot_system(&self, scratch: &Scratch) -> Result<Process> {
        let kernel = Kernel::get()?;
        let initramfs = Initramfs::switch_root(&kernel, "/dev/vda")?;
        let serial = ["-serial".into(), "stdio".into()];
        self.start(scratch, &kernel, &initramfs, &serial, "root=/dev/vda rw quiet")
    }

    /// Boots what is on the first disk by UEFI firmware, as a machine of its own would; its console is the process's
    /// standard input and output.
    ///
    /// # Errors
    /// When QEMU cannot be started.
    pub fn boot_firmware(&self, scratch: &Scratch) -> Result<Process> {
        const FIRMWARE: &str = "/usr/share/OVMF";
        let variables = unused(scratch, "variables")?;
        fs::copy(format!("{FIRMWARE}/OVMF_VARS_4M.fd"), &variables).context("the firmware (package ovmf)")?;
        let flash = |unit: u32, access: &str, file: &str| {
            format!("if=pflash,format=raw,unit={unit},readonly={access},file={file}")
        };
        let boot = [
            "-drive".to_owned(),
            flash(0, "on", &format!("{FIRMWARE}/OVMF_CODE_4M.fd")),
            "-drive".to_owned(),
            flash(1, "off", &variables.to_string_lossy()),
        ];
        self.run(scratch, &boot, &["-serial".to_owned(), "stdio".to_owned()])
    }

    fn start(
        &self,
        scratch: &Scratch,
        kernel: &Kernel,
        initramfs: &[u8],
        options: &[String],
        arguments: &str,
    ) -> Result<Process> {
        let initrd = unused(scratch, "initrd")?;
        fs::write(&initrd, initramfs)?;
        let boot = [
            "-kernel".to_owned(),
            kernel.image()?.to_string_lossy().into_owned(),
            "-initrd".to_owned(),
            initrd.to_string_lossy().into_owned(),
            "-append".to_owned(),
            format!("{} console=ttyS0 panic=-1 {arguments}", self.clocks),
        ];
        self.run(scratch, &boot, options)
    }

    fn run(&self, scratch: &Scratch, boot: &[String], options: &[String]) -> Result<Process> {
        let mut qemu = command("qemu-system-x86_64");
        // Several emulating threads trip over an assertion in QEMU 10 (`iotlb_to_section`) now and then.
        qemu.args(["-accel", "tcg,thread=single", "-machine", "q35,memory-backend=memory,hpet=off"])
            .args(["-cpu", "max", "-smp", &self.cpus.to_string(), "-m", &format!("{}M", self.memory)])
            .args(["-object", &format!("memory-backend-memfd,id=memory,size={}M,share=on", self.memory)])
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none"])
            .args(options)
            .args(boot);
        for (number, Disk { socket, queues }) in self.disks.iter().enumerate() {
            let chardev = format!("socket,id=disk{number},path={},reconnect-ms=100", socket.display());
            qemu.args(["-chardev", &chardev]);
            qemu.args(["-device", &format!("vhost-user-blk-pci,chardev=disk{number},num-queues={queues}")]);
        }
        let mut drives: Vec<Drive> = self.host.iter().cloned().collect();
        if self.host.is_some() {
            drives.push(Drive {
                file: vbd_disk(scratch, self.program.as_deref().unwrap_or_else(|| vbd()))?,
                serial: "vbd",
                read_only: true,
            });
        }
        if self.tools {
            drives.push(Drive { file: tools_disk()?, serial: "tools", read_only: true });
        }
        for Drive { file, serial, read_only } in drives {
            let access = if read_only { "on" } else { "off" };
            let drive = format!(
                "driver=raw,node-name={serial},read-only={access},discard=unmap,file.driver=file,file.filename={}",
                file.display()
            );
            qemu.args(["-blockdev", &drive]);
            qemu.args(["-device", &format!("virtio-blk-pci,drive={serial},serial={serial}")]);
        }
        Process::spawn(qemu)
    }
}

/// A running guest that takes commands; killed when dropped.
pub struct Guest {
    process: Process,
    log: PathBuf,
    control: PathBuf,
}

impl Guest {
    /// Runs a line of shell in the guest, to its end.
    ///
    /// # Errors
    /// When it fails in the guest (the error carries what it said), or takes too long.
    pub fn sh(&mut self, line: &str) -> Result<String> {
        let Outcome { status, output } = self.try_sh(line)?;
        if status != 0 {
            bail!("in the guest, {line:?} ended with {status}: {output}\n{}", self.kernel_log());
        }
        Ok(output)
    }

    /// Runs a line of shell in the guest, to its end, whatever it is.
    ///
    /// # Errors
    /// When the guest takes too long, or has gone.
    pub fn try_sh(&mut self, line: &str) -> Result<Outcome> {
        self.begin(line)?;
        self.finish(COMMAND)
    }

    /// Begins a line of shell in the guest; [`Guest::finish`] waits for its end.
    ///
    /// # Errors
    /// When the guest has gone.
    pub fn begin(&mut self, line: &str) -> Result<()> {
        assert!(!line.contains('\n') && line.len() < 4000, "one line that fits the terminal: {line:?}");
        self.process.send(&format!("{line}\n"))
    }

    /// Waits for the end of what was begun.
    ///
    /// # Errors
    /// When `limit` passes first, or the guest has gone.
    pub fn finish(&mut self, limit: Duration) -> Result<Outcome> {
        let said = self.said(limit)?;
        let (output, status) = said.split_once("@@end ").context("an end without its mark")?;
        Ok(Outcome { status: status.trim().parse()?, output: output.to_owned() })
    }

    fn said(&self, limit: Duration) -> Result<String> {
        let stdout = &self.process.stdout;
        let waited =
            stdout.wait_for("@@end ", limit).and_then(|text| Ok(text + &stdout.wait_for("\n", limit)?));
        waited.with_context(|| self.last_words())
    }

    /// Whether what was begun has not ended yet.
    pub fn is_busy(&self) -> bool {
        !self.process.stdout.unread().contains("@@end ")
    }

    /// A program of the tools disk with its arguments, as a line for [`Guest::sh`].
    ///
    /// # Panics
    /// When the tools disk has no such program.
    pub fn tool(line: &str) -> String {
        let (name, arguments) = line.split_once(' ').unwrap_or((line, ""));
        let path = tool_path(name).expect("a program of the tools disk");
        format!("chroot /tools {path} {arguments}")
    }

    fn mount(&mut self, serial: &str, access: &str, to: &str) -> Result<()> {
        self.sh(&format!(
            "disk=$(grep -l '^{serial}$' /sys/block/vd*/serial) && mount -t ext4 -o {access} /dev/$(echo $disk | cut -d/ -f4) {to}"
        ))?;
        Ok(())
    }

    fn mount_tools(&mut self) -> Result<()> {
        self.mount("tools", "ro", "/tools")?;
        self.sh(
            "mount --bind /dev /tools/dev && mount -t proc proc /tools/proc && mount -t sysfs sys /tools/sys",
        )?;
        self.sh("mount -t tmpfs tmp /tools/tmp")?;
        Ok(())
    }

    /// What the guest's kernel has complained of that has to do with disks.
    pub fn disk_errors(&self) -> Vec<String> {
        let signs = ["I/O error", "EXT4-fs", "virtio", "vda", "JBD2", "blocked for more"];
        let log = self.kernel_log();
        let lines = log.lines().filter(|line| signs.iter().any(|sign| line.contains(sign)));
        lines.map(str::to_owned).collect()
    }

    /// What the guest's kernel has said on its console: errors and worse.
    pub fn kernel_log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn last_words(&self) -> String {
        format!("kernel: {}\nQEMU: {}", self.kernel_log(), self.process.stderr.text())
    }

    /// Powers the guest off, its filesystems synced, and waits for QEMU's end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn power_off(mut self) -> Result<ExitStatus> {
        self.begin("sync; poweroff -f")?;
        self.process.wait(COMMAND)
    }

    /// Moves the guest, while it runs, to the machine that waits for it on the socket `to`; from then on that one
    /// is the guest, and what it was doing ends there.
    ///
    /// # Errors
    /// When the migration fails, or takes too long.
    pub fn migrate(self, to: &Path) -> Result<()> {
        let mut control = Control::connect(&self.control)?;
        control.run("migrate", &json!({"uri": format!("unix:{}", to.display())}))?;
        let end = Instant::now() + COMMAND;
        loop {
            let state = control.run("query-migrate", &json!({}))?;
            match state["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("the migration failed: {state}\n{}", self.last_words()),
                _ if Instant::now() > end => bail!("the migration does not end: {state}"),
                _ => thread::sleep(PACE),
            }
        }
    }

    /// Kills QEMU at once, as `kill -9` does.
    pub fn kill(mut self) {
        self.process.kill();
    }
}

/// A path in `scratch` that is not taken.
fn unused(scratch: &Scratch, name: &str) -> Result<PathBuf> {
    let dir = scratch.path("");
    let (_, path) = tempfile::Builder::new().prefix(name).tempfile_in(Path::new(&dir))?.keep()?;
    Ok(path)
}
