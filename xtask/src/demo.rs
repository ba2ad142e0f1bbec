//! `cargo xtask demo`: from nothing to a Debian machine that runs from a plain file, and what is left of it.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use vbd_tests::{Disk, Machine, Process, Scratch, allocated, cache_dir, command, run_ok, target_dir};

use crate::{apt, setup, test};

/// What the demo's machine is made of.
const SUITE: &str = "bookworm";
const PACKAGES: &str = "systemd-sysv,udev,passwd,login,dbus";
const SIZE: &str = "2G";
const PASSWORD: &str = "vbd";
/// `PASSWORD` as crypt(5) stores it (`openssl passwd -6`).
const HASH: &str =
    "$6$vbd.demo$Mc180nUCZ.NqqRdyR2L507m2hf5NyK9XMMeB4lEcwsoaXqkNEwil./F7WAQU44T.KH85qoggwyw6k8jJXA1/e/";
/// The user and group that root becomes to run vbd: Debian's `nobody`.
const NOBODY: u32 = 65534;

/// What begins the guest's prompt, and marks a failure; no output contains it.
const MARK: &str = "@@";
/// The guest's prompt.
const PROMPT: &str = "@@>";

/// A guest boots in 12 s on a quiet machine; every wait for it ends within this.
const PATIENCE: Duration = Duration::from_secs(180);

/// Make a Debian disk, serve it, boot it, trim it, check it.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Show all that the guest says
    #[arg(long)]
    verbose: bool,
}

/// Numbered steps, with what each took.
struct Steps {
    number: u32,
    began: Instant,
}

impl Steps {
    fn next(&mut self, text: &str) {
        self.number += 1;
        println!("\n[{:3} s] {}. {text}", self.began.elapsed().as_secs(), self.number);
    }
}

/// Runs the demo.
///
/// # Errors
/// When a step fails; each says what.
pub(crate) fn run(args: &Args) -> Result<()> {
    let mut steps = Steps { number: 0, began: Instant::now() };
    steps.next("What the demo needs of this machine");
    setup::run()?;
    println!("all there");

    steps.next("vbd, built from this tree");
    let built = test::build("vbd", "dev")?;

    steps.next(&format!("A root tree of Debian {SUITE} (kept in target/vm for the next time)"));
    let tree = root_tree()?;
    println!("{}: {}", tree.display(), mebibytes(fs::metadata(&tree)?.len()));

    let place = Place::new(&built)?;
    let who =
        if place.drops { "as nobody, who may do nothing on this machine" } else { "as you, without root" };
    steps.next(&format!("A disk built from it, {who}"));
    let image = place.dir.join("vm1disk");
    place.build(&tree, &image)?;
    sizes("built", &image)?;

    steps.next("The disk served over vhost-user-blk, by the same user");
    let socket = place.dir.join("vm1.sock");
    let server = place.attach(&image, &socket)?;

    steps.next("A machine that boots from it: QEMU's emulation, Debian's 6.12 cloud kernel, systemd");
    let scratch = Scratch::new()?;
    let mut machine = Machine::new([Disk { socket: socket.clone(), queues: 2 }]);
    machine.memory = 512;
    let guest = machine.boot_system(&scratch)?;
    let mut session = Session { guest, verbose: args.verbose };
    session.log_in()?;

    steps.next("The guest writes a file of 256 MiB, deletes it, and trims");
    session.does(
        "dd if=/dev/urandom of=file bs=1M count=256 conv=fsync status=none; df -h --output=size,used /",
    )?;
    sizes("with the file", &image)?;
    session.does("rm file; sync")?;
    sizes("deleted", &image)?;
    session.as_root("fstrim -v /")?;
    sizes("trimmed", &image)?;

    steps.next("Power off, and the filesystem as the guest left it");
    session.power_off()?;
    server.stop()?;
    println!("{}", run_ok("/sbin/e2fsck", ["-fn".as_ref(), image.as_os_str()], PATIENCE)?.trim_end());
    sizes("at the end", &image)?;

    steps.next("The same disk for a machine of yours");
    paste(&place, &image, &socket)?;
    println!("\nDone in {} s.", steps.began.elapsed().as_secs());
    Ok(())
}

/// A plain tar of a minimal Debian, from the archive this machine uses.
pub(crate) fn root_tree() -> Result<PathBuf> {
    let tree = cache_dir()?.join(format!("{SUITE}.tar"));
    if !tree.exists() {
        let unfinished = cache_dir()?.join(format!("{SUITE}.tar.unfinished"));
        let mirror = apt::archive(SUITE).or_else(|_| apt::archive(&apt::codename()?))?;
        let status = Command::new("mmdebstrap")
            .args(["--variant=minbase", "--format=tar", "--include", PACKAGES, SUITE])
            .arg(&unfinished)
            .arg(mirror)
            .status()
            .context("starting mmdebstrap")?;
        if !status.success() {
            bail!("mmdebstrap: {status}");
        }
        fs::rename(&unfinished, &tree)?;
    }
    Ok(tree)
}

/// Where the demo's disk is made, and who makes it.
struct Place {
    dir: PathBuf,
    vbd: PathBuf,
    /// Whether this is root, who becomes nobody for vbd.
    drops: bool,
}

impl Place {
    fn new(built: &Path) -> Result<Self> {
        let drops = rustix::process::geteuid().is_root();
        let mut dir = target_dir().join("demo");
        fs::create_dir_all(&dir)?;
        if drops {
            if !reachable(&dir) {
                // A checkout in /root: nobody cannot come here.
                dir = tempfile::Builder::new().prefix("vbd-demo-").tempdir_in("/var/tmp")?.keep();
                fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
            }
            chown(&dir, Some(NOBODY), Some(NOBODY))?;
        }
        let vbd = dir.join("vbd");
        fs::copy(built, &vbd).with_context(|| format!("copying vbd to {}", dir.display()))?;
        Ok(Self { dir, vbd, drops })
    }

    /// vbd, run by an unprivileged user in the demo's directory.
    fn vbd(&self) -> Command {
        let mut vbd = if self.drops {
            let mut drop = command("setpriv");
            drop.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs"]);
            // A directory for sockets and temporary files that this user owns.
            drop.args(["env", "-i", "PATH=/usr/bin:/bin:/usr/sbin:/sbin"]);
            drop.arg(format!("XDG_RUNTIME_DIR={0}/run", self.dir.display()));
            drop.arg(format!("TMPDIR={0}", self.dir.display())).arg(&self.vbd);
            drop
        } else {
            command(&self.vbd)
        };
        vbd.current_dir(&self.dir);
        vbd
    }

    fn build(&self, tree: &Path, image: &Path) -> Result<()> {
        let mut build = self.vbd();
        build.args(["build", "vm1disk", "--force", "--size", SIZE, "--from", "-"]);
        build.args([
            "--hostname",
            "vm1",
            "--fstab",
            "/dev/vda:/",
            "--serial-console",
            "ttyS0",
            "--reset-identity",
        ]);
        build.args(["--user", "ada", "--password-hash", HASH, "--root-password-hash", HASH]);
        println!("$ {}", shown(&build));
        // Opened here: the directory of the tree may be closed to the other user.
        let status = build.stdin(Stdio::from(File::open(tree)?)).status().context("starting vbd build")?;
        if !status.success() {
            bail!("vbd build {}: {status}", image.display());
        }
        let owner = fs::metadata(image)?.uid();
        println!("{} belongs to user {owner}", image.display());
        Ok(())
    }

    fn attach(&self, image: &Path, socket: &Path) -> Result<Server> {
        let mut attach = self.vbd();
        attach.arg("attach").arg(image).arg("--vhost-user").arg(socket).args(["--queues", "2"]);
        println!("$ {}", shown(&attach));
        let process = Process::spawn(attach)?;
        let ready = process.stdout.wait_for("\n", PATIENCE).with_context(|| process.stderr.text())?;
        println!("{}", ready.trim_end());
        Ok(Server { process })
    }
}

/// Whether nobody can come to `dir`.
fn reachable(dir: &Path) -> bool {
    let other = 0o001;
    dir.ancestors().all(|dir| fs::metadata(dir).is_ok_and(|found| found.permissions().mode() & other != 0))
}

/// `vbd attach`, until it is stopped.
struct Server {
    process: Process,
}

impl Server {
    fn stop(mut self) -> Result<()> {
        self.process.signal(rustix::process::Signal::TERM)?;
        let status = self.process.wait(PATIENCE)?;
        if !status.success() {
            bail!("vbd attach: {status}: {}", self.process.stderr.text());
        }
        Ok(())
    }
}

/// A login on the guest's serial console.
struct Session {
    guest: Process,
    verbose: bool,
}

impl Session {
    fn log_in(&mut self) -> Result<()> {
        let booted = Instant::now();
        self.until("vm1 login: ")?;
        println!("login prompt after {:.0} s", booted.elapsed().as_secs_f32());
        self.guest.send("ada\n")?;
        self.until("Password: ")?;
        self.guest.send(&format!("{PASSWORD}\n"))?;
        self.until("ada@vm1:")?;
        // Quotes keep the echo of a typed line from looking like the prompt or a failure.
        self.guest.send(&format!("PS1='{MARK}''>'; TERM=dumb\n"))?;
        self.until(PROMPT)?;
        self.does("uname -sr; systemctl is-system-running --wait; findmnt -no SOURCE,FSTYPE,SIZE /")
    }

    /// Types a line and shows what comes of it.
    fn does(&mut self, line: &str) -> Result<()> {
        self.guest.send(&format!("{line} || echo '{MARK}'failed\n"))?;
        self.answer(line)
    }

    /// The same, as root.
    fn as_root(&mut self, line: &str) -> Result<()> {
        self.guest.send(&format!("su - -c '{line}' || echo '{MARK}'failed\n"))?;
        self.until("Password: ")?;
        self.guest.send(&format!("{PASSWORD}\n"))?;
        self.answer(line)
    }

    /// Shows a line typed in the guest, and what it said after the echo of that line.
    fn answer(&mut self, line: &str) -> Result<()> {
        let said = self.until(PROMPT)?;
        println!("  vm1$ {line}");
        let answer = said.split_once('\n').map_or("", |(_, answer)| answer).trim_end_matches(PROMPT);
        for line in answer.lines().map(str::trim_end).filter(|line| !line.is_empty()) {
            println!("  {line}");
        }
        if answer.contains(&format!("{MARK}failed")) {
            bail!("{line:?} failed in the guest");
        }
        Ok(())
    }

    fn power_off(&mut self) -> Result<()> {
        self.guest.send("su - -c 'systemctl poweroff'\n")?;
        self.until("Password: ")?;
        self.guest.send(&format!("{PASSWORD}\n"))?;
        self.guest.wait(PATIENCE)?;
        Ok(())
    }

    fn until(&mut self, text: &str) -> Result<String> {
        let said = self.guest.stdout.wait_for(text, PATIENCE).with_context(|| self.guest.stderr.text())?;
        if self.verbose {
            print!("{said}");
        }
        Ok(said)
    }
}

/// A command as a person would type it, without what bounds it.
fn shown(command: &Command) -> String {
    let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
    let from = words.iter().rposition(|word| word.ends_with("/vbd")).map_or(0, |at| at + 1);
    let words = words[from..]
        .iter()
        .map(|word| if word.contains([' ', '$']) { format!("'{word}'") } else { word.to_string() });
    format!("vbd {}", words.collect::<Vec<_>>().join(" "))
}

fn sizes(when: &str, image: &Path) -> Result<()> {
    let size = fs::metadata(image)?.len();
    println!("{when:>14}: virtual {}, allocated {}", mebibytes(size), mebibytes(allocated(image)?));
    Ok(())
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", f64::from(u32::try_from(bytes >> 10).unwrap_or(u32::MAX)) / 1024.0)
}

/// The lines that take the disk to a machine of the reader's own.
fn paste(place: &Place, image: &Path, socket: &Path) -> Result<()> {
    let (vbd, image, socket) = (place.vbd.display(), image.display(), socket.display());
    let kernel = vbd_tests::Kernel::get()?.image()?;
    let kernel = kernel.display();
    let initrd = cache_dir()?.join("demo-initrd");
    fs::write(&initrd, vbd_tests::Initramfs::switch_root(&vbd_tests::Kernel::get()?, "/dev/vda")?)?;
    let initrd = initrd.display();
    println!(
        "Serve it, boot it, and log in as ada or root with the password {PASSWORD}:
  {vbd} attach {image} --vhost-user {socket}
QEMU:
  qemu-system-x86_64 -machine q35,memory-backend=mem -object memory-backend-memfd,id=mem,size=512M,share=on -m 512M \\
    -chardev socket,id=vm1,path={socket},reconnect-ms=1000 -device vhost-user-blk-pci,chardev=vm1 \\
    -kernel {kernel} -initrd {initrd} -append 'console=ttyS0 root=/dev/vda rw' -nographic
Cloud Hypervisor:
  cloud-hypervisor --memory size=512M,shared=on --disk vhost_user=on,socket={socket} \\
    --kernel {kernel} --initramfs {initrd} --cmdline 'console=ttyS0 root=/dev/vda rw' --serial tty --console off
crosvm:
  crosvm run --mem 512 --vhost-user block,socket={socket} --initrd {initrd} -p 'console=ttyS0 root=/dev/vda rw' {kernel}
Xen, in the domain's configuration (the file itself, over Xen's own backend):
  disk = ['format=raw,vdev=xvda,access=rw,target={image}']"
    );
    Ok(())
}
