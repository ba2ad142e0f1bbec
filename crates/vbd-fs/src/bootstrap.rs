//! A distribution's suite as a source: mmdebstrap, with the host's mirror.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::source::Distribution;
use crate::{BuildSpec, Error, Variant};

/// The program, which writes a tar to its standard output.
pub(crate) fn command(distribution: Distribution, suite: &str, spec: &BuildSpec) -> Command {
    let mut command = Command::new("mmdebstrap");
    command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped());
    command.args(["--format=tar", "--variant", spec.variant.unwrap_or(Variant::Important).name()]);
    let components = if spec.components.is_empty() { "main".to_owned() } else { spec.components.join(",") };
    command.args(["--components", &components]);
    if !spec.packages.is_empty() {
        command.args(["--include", &spec.packages.join(",")]);
    }
    command.args(["--", suite, "-"]);
    match &spec.mirror {
        Some(mirror) => {
            command.arg(mirror);
        }
        None => {
            let archives = host_archives(Path::new("/etc/apt"));
            command.args(lines_for(&archives, distribution, suite, &components));
        }
    }
    command
}

/// Leaves of what mmdebstrap says when it fails what names the cause, and adds what an ordinary user can do about it.
pub(crate) fn explain(error: Error) -> Error {
    let Error::Tool { program, status, stderr } = error else { return error };
    let cause = |line: &&str| {
        let general = ["E: mmdebstrap failed", "E: setup failed", "E: apt-get "];
        line.starts_with("E: ") && !general.iter().any(|start| line.starts_with(start))
    };
    let causes: Vec<&str> = stderr.lines().filter(cause).map(|line| &line[3..]).collect();
    let mut said = if causes.is_empty() { stderr.clone() } else { causes.join("; ") };
    if stderr.contains("unable to pick chroot mode") {
        said.push_str(
            "; as an ordinary user mmdebstrap needs the package uidmap and a range of your own in /etc/subuid and \
             /etc/subgid, or the package fakechroot",
        );
    }
    if stderr.contains("is not signed") {
        said.push_str(
            "; apt has no key for it: install the package ubuntu-keyring or debian-archive-keyring, or the mirror's own key",
        );
    }
    Error::Tool { program, status, stderr: said }
}

/// One archive in apt's sources.
#[derive(Debug, PartialEq, Eq)]
struct Archive {
    uri: String,
    suites: Vec<String>,
}

/// The binary archives that the host installs from.
fn host_archives(etc: &Path) -> Vec<Archive> {
    let mut files = vec![etc.join("sources.list")];
    if let Ok(entries) = std::fs::read_dir(etc.join("sources.list.d")) {
        let mut more: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        more.sort();
        files.extend(more);
    }
    let mut archives = Vec::new();
    for file in files {
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|e| e.to_str()) {
            Some("list") => archives.extend(one_line(&text)),
            Some("sources") => archives.extend(deb822(&text)),
            _ => {}
        }
    }
    archives
}

/// sources.list(5), the one-line style: `deb [options] uri suite components`.
fn one_line(text: &str) -> Vec<Archive> {
    let parse = |line: &str| {
        let rest = line.trim().strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
        let rest = if rest.starts_with('[') { rest.split_once(']')?.1 } else { rest };
        let mut words = rest.split_whitespace();
        Some(Archive { uri: words.next()?.to_owned(), suites: vec![words.next()?.to_owned()] })
    };
    text.lines().filter_map(parse).collect()
}

/// sources.list(5), the deb822 style.
fn deb822(text: &str) -> Vec<Archive> {
    let mut archives = Vec::new();
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    for stanza in lines.split(|line| line.trim().is_empty()) {
        let field = |name: &str| -> Vec<String> {
            let mut words = Vec::new();
            let mut inside = false;
            for line in stanza {
                if !line.starts_with([' ', '\t']) {
                    inside = line.split_once(':').is_some_and(|(key, _)| key.eq_ignore_ascii_case(name));
                }
                if inside {
                    let value = if line.starts_with([' ', '\t']) { line } else { &line[name.len() + 1..] };
                    words.extend(value.split_whitespace().map(str::to_owned));
                }
            }
            words
        };
        let enabled = !field("Enabled").first().is_some_and(|v| v.eq_ignore_ascii_case("no"));
        if enabled && field("Types").iter().any(|t| t == "deb") {
            let suites = field("Suites");
            archives.extend(field("URIs").into_iter().map(|uri| Archive { uri, suites: suites.clone() }));
        }
    }
    archives
}

/// What mmdebstrap is to install from: the host's archives of that suite, its updates and security fixes; where the
/// host has another suite, its archive of that distribution; where it has none, nothing, and mmdebstrap knows one.
fn lines_for(archives: &[Archive], distribution: Distribution, suite: &str, components: &str) -> Vec<String> {
    let usable =
        |uri: &str| ["http://", "https://", "file:/", "copy:/"].iter().any(|scheme| uri.starts_with(scheme));
    let components = components.replace(',', " ");
    let line = |uri: &str, suite: &str| format!("deb {uri} {suite} {components}");
    let of_distribution = |a: &&Archive| {
        usable(&a.uri) && a.uri.trim_end_matches('/').rsplit('/').next() == Some(distribution.name())
    };
    let Some(main) = archives
        .iter()
        .filter(of_distribution)
        .find(|a| a.suites.iter().any(|s| s == suite))
        .or_else(|| archives.iter().find(of_distribution))
    else {
        return Vec::new();
    };
    let mut lines = vec![line(&main.uri, suite)];
    for extra in ["updates", "security"].map(|kind| format!("{suite}-{kind}")) {
        if let Some(archive) = archives.iter().find(|a| usable(&a.uri) && a.suites.contains(&extra)) {
            lines.push(line(&archive.uri, &extra));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_cut_down_to_its_cause() {
        let stderr = "I: installing...\nReading package lists...\nE: Unable to locate package x\nE: setup failed: E: apt-get \
                      failed\nE: mmdebstrap failed to run\n";
        let failed = |stderr: &str| {
            let (program, status) = ("mmdebstrap".to_owned(), "exit status: 25".to_owned());
            explain(Error::Tool { program, status, stderr: stderr.to_owned() }).to_string()
        };
        assert_eq!(failed(stderr), "mmdebstrap failed (exit status: 25): Unable to locate package x");
        assert!(failed("E: unable to pick chroot mode automatically").contains("the package uidmap"));
        let unsigned = failed("E: The repository 'http://m.example noble InRelease' is not signed.\n");
        assert!(
            unsigned.contains("is not signed.; apt has no key for it: install the package ubuntu-keyring")
        );
        assert!(failed("Segmentation fault").ends_with(": Segmentation fault"));
    }

    const DEB822: &str = "\
# a remark
Types: deb deb-src
URIs: http://mirror.example/debian
# another
Suites: stable stable-updates
Components: main

Types: deb
URIs: http://mirror.example/debian-security/
Suites:
 stable-security
Components: main

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: old
";

    #[test]
    fn the_hosts_archives_are_taken_with_updates_and_security() {
        let mut archives = deb822(DEB822);
        archives.extend(one_line("# deb x y z\ndeb [arch=amd64] https://other.example/ubuntu/ noble main\n"));
        let debian = lines_for(&archives, Distribution::Debian, "stable", "main,contrib");
        assert_eq!(
            debian,
            [
                "deb http://mirror.example/debian stable main contrib",
                "deb http://mirror.example/debian stable-updates main contrib",
                "deb http://mirror.example/debian-security/ stable-security main contrib",
            ]
        );
        let other = lines_for(&archives, Distribution::Debian, "old", "main");
        assert_eq!(other, ["deb http://mirror.example/debian old main"]);
        let ubuntu = lines_for(&archives, Distribution::Ubuntu, "jammy", "main");
        assert_eq!(ubuntu, ["deb https://other.example/ubuntu/ jammy main"]);
        assert!(lines_for(&[], Distribution::Debian, "stable", "main").is_empty());
    }
}
