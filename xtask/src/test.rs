//! `cargo xtask test`: the whole workspace's tests, after setup.

use std::env;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Which tests to run.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only tests whose name contains this; `guests` means the end-to-end tests alone, `xen` those of them that
    /// boot Xen, `orders` those that run threads in turns
    filter: Option<String>,
    /// Only those of `guests` or `xen` whose name contains this
    #[arg(requires = "filter")]
    name: Option<String>,
}

/// Builds everything, then runs the tests: examples in the documentation first, the rest with nextest
/// where that is installed.
///
/// # Errors
/// When a build or a test fails.
pub(crate) fn run(args: &Args) -> Result<()> {
    crate::setup::run()?;
    let vbd = build("vbd", "dev")?;
    let mut filter = match args.filter.as_deref() {
        None => vec!["--workspace"],
        Some("guests") => vec!["--package", "vbd-tests"],
        Some("xen") => vec!["--package", "vbd-tests", "--test", "xen"],
        Some("orders") => return orders(),
        Some(filter) => vec!["--workspace", filter],
    };
    filter.extend(args.name.as_deref());
    if matches!(args.filter.as_deref(), None | Some("guests" | "xen")) {
        println!("test: the machine with Xen (about a minute the first time)");
        vbd_tests::XenLab::get()?;
    }
    // The examples in the documentation are the libraries': one kind of test has none.
    let whole = args.filter.as_deref() != Some("xen");
    let has_nextest = cargo(&["nextest", "--version"]).output().is_ok_and(|output| output.status.success());
    if has_nextest && whole {
        run_to_end(cargo(&["test", "--locked", "--quiet", "--doc"]).args(&filter))?;
    }
    if args.filter.is_none() {
        orders()?;
    }
    let runner: &[&str] = if has_nextest { &["nextest", "run"] } else { &["test"] };
    run_to_end(cargo(runner).arg("--locked").args(&filter).env("VBD_BIN", vbd))
}

/// The tests that run all threads in turns, in many orders: a build of their own, as all locks and atomics are others.
fn orders() -> Result<()> {
    println!("test: images in many orders of events");
    let test = |package: &str, tests: &[&str]| {
        let mut test = cargo(&["test", "--locked", "--quiet", "--package", package]);
        test.args(tests).env("CARGO_TARGET_DIR", vbd_tests::target_dir().join("shuttle"));
        run_to_end(test.env("CARGO_PROFILE_DEV_DEBUG", "0").env("RUSTFLAGS", "--cfg shuttle"))
    };
    test("vbd-core", &["--test", "orders"])?;
    test("vbd-qcow2", &["--test", "orders"])?;
    test("vbd-qcow2", &["--lib", "grace"])
}

/// Builds the command `package` under `profile`, and gives its path.
///
/// # Errors
/// When it does not build.
pub(crate) fn build(package: &str, profile: &str) -> Result<std::path::PathBuf> {
    run_to_end(&mut cargo(&["build", "--locked", "--package", package, "--profile", profile]))?;
    let dir = if profile == "dev" { "debug" } else { profile };
    Ok(vbd_tests::target_dir().join(dir).join(package))
}

/// Builds the command `package` as [`build`] does, for release and linked statically, for guests without libraries.
///
/// # Errors
/// When it does not build.
pub(crate) fn build_static(package: &str) -> Result<std::path::PathBuf> {
    let arguments = ["rustc", "--locked", "--package", package, "--release", "--bin", package, "--"];
    run_to_end(cargo(&arguments).args(["-C", "target-feature=+crt-static"]))?;
    Ok(vbd_tests::target_dir().join("release").join(package))
}

/// The cargo that runs this, with `arguments`.
fn cargo(arguments: &[&str]) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(arguments);
    cargo
}

fn run_to_end(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {command:?}"))?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}
