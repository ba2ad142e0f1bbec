//! Where things are: the build directory, what is kept between runs, the command under test.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};

/// The root of the workspace.
fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in a workspace")
}

/// Cargo's build directory.
pub fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), |dir| workspace().join(dir))
}

/// The directory of what is downloaded or made once: `target/vm`.
///
/// # Errors
/// When it cannot be made.
pub fn cache_dir() -> Result<PathBuf> {
    let dir = target_dir().join("vm");
    std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    Ok(dir)
}

/// The command under test: `$VBD_BIN`, or `vbd` built as the tests were.
///
/// # Panics
/// When it does not build.
pub fn vbd() -> &'static Path {
    static VBD: OnceLock<PathBuf> = OnceLock::new();
    VBD.get_or_init(|| match env::var_os("VBD_BIN") {
        Some(path) => PathBuf::from(path),
        None => build().expect("building vbd"),
    })
}

fn build() -> Result<PathBuf> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--locked", "--package", "vbd"]).current_dir(workspace());
    let profile = if cfg!(debug_assertions) {
        "debug"
    } else {
        command.arg("--release");
        "release"
    };
    let status = command.status().context("starting cargo")?;
    if !status.success() {
        bail!("cargo build --package vbd: {status}");
    }
    Ok(target_dir().join(profile).join("vbd"))
}
