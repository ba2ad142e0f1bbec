//! QEMU's tools as a second opinion, and images in all shapes that they can make.
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small")]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::Random;

/// Runs one of the tools.
///
/// # Panics
/// It is not installed.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// Runs `qemu-img` and gives what it says.
///
/// # Panics
/// It fails.
pub fn img(arguments: &[&str]) -> String {
    let output = run("qemu-img", arguments);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "qemu-img {arguments:?}: {out}{err}");
    out.into_owned()
}

/// Runs commands of `qemu-io` on an image.
///
/// # Panics
/// One fails, or a pattern that is to be read is not there.
pub fn io(path: &Path, commands: &[String]) {
    let mut child = Command::new("qemu-io")
        .args(["-f", "qcow2", "-d", "unmap"])
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("qemu-io");
    let mut input = child.stdin.take().expect("piped");
    // The answers are short: nobody waits for the other.
    input.write_all(commands.join("\n").as_bytes()).expect("qemu-io reads");
    drop(input);
    let output = child.wait_with_output().expect("qemu-io ends");
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let is_good = output.status.success() && !said.contains("failed") && !said.contains("rror");
    assert!(is_good, "qemu-io {}: {commands:#?}\n{said}", path.display());
}

/// What `qemu-img check` finds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Check {
    /// Corruptions and errors of the check itself.
    pub errors: u64,
    /// Leaked clusters.
    pub leaks: u64,
    /// All that it says.
    pub said: String,
}

/// Has `qemu-img` check a qcow2 image.
///
/// # Panics
/// It ends otherwise than a check does.
pub fn check(path: &Path) -> Check {
    let output = run("qemu-img", &["check", "-f", "qcow2", "--output=json", text(path)]);
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let number = |name: &str| {
        let rest = said.split_once(&format!("\"{name}\": ")).map_or("0", |(_, rest)| rest);
        rest.split(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
    };
    let errors = number("corruptions") + number("check-errors");
    match output.status.code() {
        Some(0) => Check { errors, leaks: number("leaks"), said },
        Some(3) => Check { errors, leaks: number("leaks").max(1), said },
        // It could not even be opened, or found errors.
        Some(1 | 2) => Check { errors: errors.max(1), leaks: number("leaks"), said },
        other => panic!("qemu-img check ended with {other:?}: {said}"),
    }
}

/// A path as text.
///
/// # Panics
/// It is none.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// The options of a qcow2 image.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Bytes of the disk, a multiple of 512.
    pub size: u64,
    /// Bytes of a cluster are two to this.
    pub cluster_bits: u32,
    /// 2 or 3.
    pub version: u32,
    /// Bits of a refcount.
    pub refcount_bits: u32,
    /// With subclusters.
    pub extended_l2: bool,
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
    /// Compressed clusters are zstd instead of zlib.
    pub zstd: bool,
    /// Data lies in a file of its own.
    pub data_file: bool,
    /// Which is a raw image of the disk.
    pub data_file_raw: bool,
    /// `off`, `metadata`, `falloc` or `full`.
    pub preallocation: &'static str,
}

impl Shape {
    /// QEMU's defaults.
    pub fn plain(size: u64) -> Self {
        Shape {
            size,
            cluster_bits: 16,
            version: 3,
            refcount_bits: 16,
            extended_l2: false,
            lazy_refcounts: false,
            zstd: false,
            data_file: false,
            data_file_raw: false,
            preallocation: "off",
        }
    }

    /// Any that QEMU makes, of a disk that fits its clusters: small where they are small.
    pub fn random(random: &mut Random) -> Self {
        let cluster_bits = *random.one_of(&[9, 9, 10, 12, 12, 14, 16, 16, 17, 21]);
        let version = if random.once_in(5) { 2 } else { 3 };
        let new = version == 3;
        let clusters = 24 + random.below(400);
        let most = (clusters << cluster_bits).min(6 << 20);
        let size = most - random.below(most / 512 / 2) * 512;
        let data_file = new && random.once_in(6);
        Shape {
            size,
            cluster_bits,
            version,
            refcount_bits: if new { *random.one_of(&[16, 16, 16, 1, 2, 4, 8, 32, 64]) } else { 16 },
            extended_l2: new && cluster_bits >= 14 && random.once_in(2),
            lazy_refcounts: new && random.once_in(5),
            zstd: new && random.once_in(2),
            data_file,
            data_file_raw: data_file && random.once_in(2),
            preallocation: if random.once_in(6) { "metadata" } else { "off" },
        }
    }

    /// Whether internal snapshots are possible. Refcounts of one bit have no room for them.
    pub fn has_snapshots(&self) -> bool {
        !self.data_file && self.refcount_bits >= 4
    }

    /// Whether compressed clusters are.
    pub fn has_compression(&self) -> bool {
        !self.data_file && self.refcount_bits >= 16
    }

    /// Has `qemu-img` make it at `path`, on top of another image of this format, if there is one.
    ///
    /// # Panics
    /// That fails.
    pub fn create(&self, path: &Path, backing: Option<(&Path, &str)>) {
        let mut options = format!(
            "cluster_size={},compat={},preallocation={}",
            1u64 << self.cluster_bits,
            if self.version == 2 { "0.10" } else { "1.1" },
            if backing.is_some() && !self.extended_l2 { "off" } else { self.preallocation },
        );
        if self.version >= 3 {
            let on = |value| if value { "on" } else { "off" };
            options += &format!(
                ",refcount_bits={},extended_l2={},lazy_refcounts={},compression_type={}",
                self.refcount_bits,
                on(self.extended_l2),
                on(self.lazy_refcounts),
                if self.zstd { "zstd" } else { "zlib" }
            );
        }
        if self.data_file {
            let raw = self.data_file_raw && backing.is_none();
            let file = path.with_extension("data");
            options +=
                &format!(",data_file={},data_file_raw={}", text(&file), if raw { "on" } else { "off" });
        }
        let size = self.size.to_string();
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if let Some((backing, format)) = backing {
            arguments.extend(["-b", text(backing), "-F", format]);
        }
        arguments.extend([text(path), &size]);
        img(&arguments);
    }
}

/// What a disk holds, for those who change it in turns.
#[derive(Clone)]
pub struct Model {
    /// Its bytes.
    pub content: Vec<u8>,
    /// Clusters that were written since the image was made. QEMU compresses no others.
    written: Vec<bool>,
    cluster: u64,
}

impl Model {
    /// A new image of this shape, through which this is seen.
    pub fn new(shape: &Shape, content: Vec<u8>) -> Self {
        let cluster = 1u64 << shape.cluster_bits;
        let written = vec![shape.preallocation != "off"; (content.len() as u64).div_ceil(cluster) as usize];
        Model { content, written, cluster }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.content.len() as u64
    }

    /// Something is to be written here.
    pub fn write(&mut self, offset: u64, len: u64) -> &mut [u8] {
        let end = offset + len;
        self.written[(offset / self.cluster) as usize..end.div_ceil(self.cluster) as usize].fill(true);
        &mut self.content[offset as usize..end as usize]
    }

    /// The disk gets another size.
    pub fn resize(&mut self, size: u64) {
        // Its last cluster was in part beyond the end, and may have to hide what is below.
        if let Some(last) = self.written.last_mut() {
            *last = true;
        }
        self.content.resize(size as usize, 0);
        self.written.resize(size.div_ceil(self.cluster) as usize, true);
    }

    /// A range of whole sectors.
    pub fn range(&self, random: &mut Random) -> (u64, u64) {
        let sectors = self.size() / 512;
        let longest = if random.once_in(3) { sectors } else { 32 };
        let len = (1 + random.below(longest)).min(sectors);
        (random.below(sectors - len + 1) * 512, len * 512)
    }

    /// Random changes by `qemu-io` in one go.
    ///
    /// # Panics
    /// One fails, or something read is not as it should be.
    pub fn change(&mut self, path: &Path, shape: &Shape, random: &mut Random, count: usize) {
        if shape.has_compression() && random.once_in(2) {
            self.compress(path, random);
        }
        let mut commands = Vec::new();
        for _ in 0..count {
            let (offset, len) = self.range(random);
            let pattern = 1 + random.below(255) as u8;
            let command = match random.below(11) {
                0 => {
                    self.write(offset, len).fill(0);
                    format!("write -z {offset} {len}")
                }
                1 => {
                    self.write(offset, len).fill(0);
                    format!("write -z -u {offset} {len}")
                }
                2 => "flush".into(),
                3 => {
                    let here = &self.content[offset as usize..(offset + len) as usize];
                    let same = here.iter().take_while(|byte| **byte == here[0]).count() as u64;
                    match same / 512 * 512 {
                        0 => continue,
                        len => format!("read -P {} {offset} {len}", here[0]),
                    }
                }
                _ => {
                    self.write(offset, len).fill(pattern);
                    format!("write -P {pattern} {offset} {len}")
                }
            };
            commands.push(command);
        }
        io(path, &commands);
    }
    /// Compressed writes, in a process of their own: after others, QEMU 10.0 puts some of them where data or tables lie.
    fn compress(&mut self, path: &Path, random: &mut Random) {
        let mut commands = Vec::new();
        for _ in 0..1 + random.below(4) {
            let cluster = random.index(self.written.len());
            if self.written[cluster] {
                continue;
            }
            let offset = cluster as u64 * self.cluster;
            let len = self.cluster.min(self.size() - offset);
            let pattern = 1 + random.below(255) as u8;
            self.write(offset, len).fill(pattern);
            commands.push(format!("write -c -P {pattern} {offset} {len}"));
        }
        io(path, &commands);
    }
}
