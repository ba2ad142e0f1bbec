//! What images are made of. Trees from an earlier run are taken as they are.

use std::fs::{self, File};
use std::io::{Read, Write, copy};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Many;
use crate::bench::output;

/// Big files, and small files beside them, of a tree whose blocks are shared.
const BIG: u64 = 10;
const SMALL: u64 = 1_000;

/// The Debian that the demo boots, unpacked; devices, which take root, are left out.
pub(super) fn debian(dir: &Path) -> Result<PathBuf> {
    once(dir, "debian", |tree| {
        let archive = crate::demo::root_tree()?;
        let mut tar = Command::new("tar");
        tar.args(["--exclude=./dev/*", "-xpf"]).arg(archive).arg("-C").arg(tree);
        output(&mut tar).map(drop)
    })
}

/// Small files, all different, in directories of equal size.
pub(super) fn many(dir: &Path, many: Many) -> Result<PathBuf> {
    let name = format!("{}-files-in-{}", many.files, many.directories);
    once(dir, &name, |tree| small(tree, many))
}

fn small(tree: &Path, many: Many) -> Result<()> {
    for directory in 0..many.directories {
        let path = tree.join(format!("directory-{directory}"));
        fs::create_dir(&path)?;
        for number in 0..many.files / many.directories {
            let text = format!("file {number} of directory {directory}, and nothing else is in here\n");
            fs::write(path.join(format!("file-{number}")), text)?;
        }
    }
    Ok(())
}

/// `bytes` in a few files that nothing compresses, and small ones.
pub(super) fn big(dir: &Path, bytes: u64) -> Result<PathBuf> {
    once(dir, &format!("big-{bytes}"), |tree| {
        small(tree, Many::new(SMALL, 10))?;
        let random = File::open("/dev/urandom")?;
        for number in 0..BIG {
            let mut file = File::create(tree.join(format!("big-{number}")))?;
            copy(&mut (&random).take(bytes / BIG), &mut file)?;
        }
        Ok(())
    })
}

/// A container image.
pub(super) struct Layers {
    /// Its OCI layout.
    pub(super) directory: PathBuf,
    /// Its layers, the lowest first.
    pub(super) layers: Vec<PathBuf>,
}

/// Debian, a program's files over it, and a layer that changes some of both and takes one away; not compressed, as
/// `docker save` has them.
pub(super) fn layers(dir: &Path) -> Result<Layers> {
    let system = debian(dir)?;
    let directory = once(dir, "three-layers", |tree| {
        fs::create_dir_all(tree.join("blobs/sha256"))?;
        let (program, changes) = (tempfile::tempdir()?, tempfile::tempdir()?);
        fs::create_dir_all(program.path().join("opt/program"))?;
        small(&program.path().join("opt/program"), Many::new(1_000, 10))?;
        let changed = changes.path().join("opt/program/directory-0");
        fs::create_dir_all(&changed)?;
        fs::create_dir(changes.path().join("etc"))?;
        fs::write(changes.path().join("etc/hostname"), "layers\n")?;
        fs::write(changed.join(".wh.file-0"), "")?;
        fs::write(changed.join("file-1"), "changed\n")?;

        let mut descriptors = Vec::new();
        for content in [&system, program.path(), changes.path()] {
            let layer = tree.join("layer.tar");
            output(Command::new("tar").arg("-cf").arg(&layer).arg("-C").arg(content).arg("."))?;
            descriptors.push(blob(tree, "application/vnd.oci.image.layer.v1.tar", &layer)?);
        }
        let ids: Vec<&Value> = descriptors.iter().map(|layer| &layer["digest"]).collect();
        let config =
            json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ids}});
        let config = json_blob(tree, "application/vnd.oci.image.config.v1+json", &config)?;
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest =
            json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": descriptors});
        let index = json!({"schemaVersion": 2, "manifests": [json_blob(tree, kind, &manifest)?]});
        fs::write(tree.join("index.json"), index.to_string())?;
        fs::write(tree.join("oci-layout"), json!({"imageLayoutVersion": "1.0.0"}).to_string())?;
        let order: Vec<&str> = ids.iter().filter_map(|id| id.as_str()).collect();
        fs::write(tree.join("order"), order.join("\n"))?;
        Ok(())
    })?;
    let order = fs::read_to_string(directory.join("order"))?;
    let file = |id: &str| directory.join("blobs").join(id.replace(':', "/"));
    Ok(Layers { layers: order.lines().map(file).collect(), directory })
}

/// Moves a file to where its digest says, and describes it.
fn blob(layout: &Path, kind: &str, file: &Path) -> Result<Value> {
    let sum = output(Command::new("sha256sum").arg(file))?;
    let digest = sum.get(..64).context("sha256sum printed no digest")?;
    let size = fs::metadata(file)?.len();
    fs::rename(file, layout.join("blobs/sha256").join(digest))?;
    Ok(json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": size}))
}

fn json_blob(layout: &Path, kind: &str, value: &Value) -> Result<Value> {
    let file = layout.join("blob.json");
    File::create(&file)?.write_all(value.to_string().as_bytes())?;
    blob(layout, kind, &file)
}

/// Makes `name` in `dir`, unless it is there: under another name until it is whole, and durable, so that nothing of it is
/// still to be written while others are measured.
fn once(dir: &Path, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let (path, unfinished) = (dir.join(name), dir.join(format!("{name}.unfinished")));
    if !path.exists() {
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished)?;
        }
        fs::create_dir_all(&unfinished)?;
        make(&unfinished).with_context(|| format!("make {}", path.display()))?;
        fs::rename(&unfinished, &path)?;
        rustix::fs::syncfs(File::open(dir)?)?;
    }
    Ok(path)
}

/// Reads all of it into the page cache.
pub(super) fn warm(tree: &Path) -> Result<()> {
    let script = r#"find "$1" -xdev -type f -print0 | xargs -0 cat >/dev/null"#;
    output(Command::new("sh").args(["-ec", script, "sh"]).arg(tree)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_has_its_files_in_its_directories_and_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let tree = many(dir.path(), Many::new(12, 3)).unwrap();
        let files = |n: u64| fs::read_dir(tree.join(format!("directory-{n}"))).unwrap().count();
        assert_eq!((files(0), files(1), files(2)), (4, 4, 4));
        fs::remove_dir_all(tree.join("directory-1")).unwrap();
        assert_eq!(many(dir.path(), Many::new(12, 3)).unwrap(), tree);
        assert!(!tree.join("directory-1").exists(), "made again");
    }

    #[test]
    fn what_was_not_finished_is_made_afresh() {
        let dir = tempfile::tempdir().unwrap();
        once(dir.path(), "tree", |tree| {
            fs::write(tree.join("half"), "")?;
            anyhow::bail!("interrupted")
        })
        .unwrap_err();
        let tree = once(dir.path(), "tree", |_| Ok(())).unwrap();
        assert!(!tree.join("half").exists());
    }
}
