//! Images for tests, and QEMU's tools.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use vbd_core::{Disk, Session};
use vbd_image::raw::{Raw, RawOptions};
use vbd_ring::EngineKind;
use vbd_testing::client::Client;
use vbd_vhd::create::{CreateOptions, ParentLink};
use vbd_vhd::{Parent, Vhd, VhdOptions, create};

/// A directory on a real disk, next to the build.
pub(crate) fn on_disk() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

/// A directory in memory.
pub(crate) fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a directory")
}

/// What an image is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Fixed,
    Dynamic(u32),
    /// Over a raw file with so many bytes.
    OverRaw(u32, u64),
    /// Over a dynamic VHD of the same size.
    OverVhd(u32),
}

/// An image of `size` bytes in `dir`, and what it holds. A parent's bytes are never 0.
pub(crate) fn image(dir: &Path, shape: Shape, size: u64) -> (VhdOptions, Vec<u8>) {
    let path = dir.join("image.vhd");
    let mut content = vec![0; size as usize];
    let base = |content: &mut Vec<u8>, len: u64| {
        for (at, byte) in content.iter_mut().take(len as usize).enumerate() {
            *byte = (at / 512 % 250) as u8 + 1;
        }
    };
    let mut options = CreateOptions::new(size);
    let mut parent = None;
    match shape {
        Shape::Fixed => options.fixed = true,
        Shape::Dynamic(block) => options.block_size = block,
        Shape::OverRaw(block, len) => {
            base(&mut content, len);
            let mut bytes = vec![1; len as usize];
            let shared = bytes.len().min(content.len());
            bytes[..shared].copy_from_slice(&content[..shared]);
            std::fs::write(dir.join("base"), bytes).expect("a base");
            options.block_size = block;
            options.parent = Some(link("base", None));
            parent = Some(raw_parent(&dir.join("base")));
        }
        Shape::OverVhd(block) => {
            base(&mut content, size);
            let path = dir.join("base.vhd");
            create(&path, &CreateOptions::new(size)).expect("a base");
            let disk = Vhd::new(VhdOptions::new(&path));
            client(&disk).write(0, content.clone());
            drop(disk);
            let id = vbd_vhd::format::Head::read(
                &std::fs::File::open(&path).expect("there"),
                path.metadata().expect("there").len(),
            );
            let id = id.expect("a VHD").footer.unique_id;
            options.block_size = block;
            options.parent = Some(link("base.vhd", Some(id)));
            let disk = Vhd::new(VhdOptions { read_only: true, ..VhdOptions::new(&path) });
            parent = Some(Parent { disk, unique_id: Some(id) });
        }
    }
    create(&path, &options).expect("an image");
    (VhdOptions { parent, ..VhdOptions::new(path) }, content)
}

fn link(name: &str, unique_id: Option<[u8; 16]>) -> ParentLink {
    ParentLink { path: PathBuf::from(name), unique_id, changed: std::time::SystemTime::now() }
}

pub(crate) fn raw_parent(path: &Path) -> Parent {
    let disk = Raw::new(RawOptions { read_only: true, ..RawOptions::new(path) });
    Parent { disk, unique_id: None }
}

/// A queue of a disk, on a reactor of its own, which keeps the disk open.
pub(crate) fn client(disk: &Arc<Vhd>) -> Client {
    Client::on_disk(EngineKind::Auto, &disk.open().expect("openable"))
}

pub(crate) fn read_all(disk: &Arc<Vhd>) -> Vec<u8> {
    let session: Arc<dyn Session> = disk.open().expect("openable");
    let size = session.geometry().size;
    Client::on_disk(EngineKind::Auto, &session).read(0, size)
}

/// Runs one of QEMU's tools; what it said.
pub(crate) fn qemu(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("QEMU's tools are installed");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// What QEMU reads in an image.
pub(crate) fn as_qemu_reads(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("as-qemu-reads");
    let (from, to) = (image.to_str().expect("text"), raw.to_str().expect("text"));
    qemu("qemu-img", &["convert", "-f", "vpc", "-O", "raw", from, to]);
    let bytes = std::fs::read(&raw).expect("converted");
    std::fs::remove_file(raw).expect("there");
    bytes
}

/// The problems that a check finds.
pub(crate) fn problems(path: &Path) -> Vec<String> {
    let report = vbd_vhd::check(&std::fs::File::open(path).expect("there")).expect("a VHD");
    report.problems.iter().map(ToString::to_string).collect()
}
