//! Debian's packages: what is missing, where it comes from, installing it.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Where the key of Debian's archive is, as debian-archive-keyring installs it.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The file that names the backports, when setup adds them.
const BACKPORTS: &str = "/etc/apt/sources.list.d/vbd-backports.sources";

/// The machine's Debian release, `bookworm` for Debian 12.
pub(crate) fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("/etc/os-release: not a Debian machine?")?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    name.map(|name| name.trim_matches('"').to_owned()).context("/etc/os-release: no VERSION_CODENAME")
}

/// The archive this machine takes the packages of `suite` from, as its own sources say.
pub(crate) fn archive(suite: &str) -> Result<String> {
    let targets = output("apt-get", &["indextargets", "--format", "$(RELEASE) $(CODENAME) $(REPO_URI)"])?;
    let words = targets.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let found = words.into_iter().find(|words| words[..words.len() - 1].contains(&suite));
    found
        .map(|words| words[words.len() - 1].to_owned())
        .with_context(|| format!("apt has no source for {suite}"))
}

/// Whether apt's sources have `suite`.
pub(crate) fn has_suite(suite: &str) -> Result<bool> {
    let policy = output("apt-cache", &["policy"])?;
    let (exact, first) = (format!("n={suite}"), format!("n={suite},"));
    Ok(policy.split([' ', '\n']).any(|word| word == exact) || policy.contains(&first))
}

/// Adds `suite`, a sister of `of`, from the archive that `of` comes from.
pub(crate) fn add_suite(suite: &str, of: &str) -> Result<()> {
    let archive = archive(of)?;
    println!("setup: adding {suite} to apt's sources, as {BACKPORTS}");
    let text =
        format!("Types: deb\nURIs: {archive}\nSuites: {suite}\nComponents: main\nSigned-By: {KEYRING}\n");
    fs::write(Path::new(BACKPORTS), text).with_context(|| format!("writing {BACKPORTS}"))
}

/// Brings the lists of packages up to date.
pub(crate) fn update() -> Result<()> {
    println!("setup: apt-get update");
    apt_get(&["-qq", "update"])
}

/// Installs `packages`, from `suite` where one is named.
pub(crate) fn install(packages: &[&str], suite: Option<&str>) -> Result<()> {
    println!("setup: {}", install_line(packages, suite));
    let mut arguments = vec!["-qq", "-y", "--no-install-recommends"];
    if let Some(suite) = suite {
        arguments.extend(["-t", suite]);
    }
    arguments.push("install");
    arguments.extend(packages);
    apt_get(&arguments)
}

/// The line that installs `packages` by hand.
pub(crate) fn install_line(packages: &[&str], suite: Option<&str>) -> String {
    let from = suite.map(|suite| format!("-t {suite} ")).unwrap_or_default();
    format!("apt-get install {from}{}", packages.join(" "))
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let mut apt = Command::new("apt-get");
    apt.args(["-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0"]).args(arguments);
    let status = apt.env("DEBIAN_FRONTEND", "noninteractive").status().context("starting apt-get")?;
    if !status.success() {
        bail!("apt-get {}: {status}", arguments.join(" "));
    }
    Ok(())
}

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| {
        format!(
            "starting {program}: is this Debian? On another system, install what docs and errors name by hand"
        )
    })?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
