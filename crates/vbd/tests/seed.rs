//! `vbd seed`, read back by other programs.

use std::path::Path;
use std::process::{Command, Output};

fn vbd(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vbd"));
    command.args(arguments).current_dir(directory).env_remove("SOURCE_DATE_EPOCH").output().unwrap()
}

fn program(name: &str, arguments: &[&str], directory: &Path) -> String {
    let mut command = Command::new(name);
    command
        .args(arguments)
        .current_dir(directory)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("TZ", "UTC");
    let output = command.output().unwrap_or_else(|e| panic!("{name}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{name}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn a_seed_that_other_programs_read() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    std::fs::write(directory.join("key"), "# a comment\nssh-ed25519 AAAAC3 ada@example\n\n").unwrap();
    std::fs::write(directory.join("net"), "version: 2\n").unwrap();
    let call =
        ["seed", "a", "--hostname", "vm1", "--user", "ada", "--ssh-key", "key", "--network-config", "net"];
    let output = vbd(directory, &call);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("a: 4 MiB, a seed for cloud-init"));

    program("fsck.vfat", &["-n", "a"], directory);
    assert_eq!(program("blkid", &["-o", "value", "-s", "LABEL", "a"], directory), "CIDATA\n");
    let read = |name: &str| program("mtype", &["-i", "a", &format!("::{name}")], directory);
    assert!(read("meta-data").contains("local-hostname: \"vm1\"\n"));
    let user = read("user-data");
    assert!(
        user.starts_with("#cloud-config\n") && user.contains("\"ssh-ed25519 AAAAC3 ada@example\""),
        "{user}"
    );
    assert_eq!(read("network-config"), "version: 2\n");
    assert!(program("mdir", &["-i", "a", "::"], directory).contains("1980-01-01"));

    // The same again is the same, another name is another instance.
    let again = |name, hostname| {
        let mut call = call;
        (call[1], call[3]) = (name, hostname);
        assert!(vbd(directory, &call).status.success());
        std::fs::read(directory.join(name)).unwrap()
    };
    let first = std::fs::read(directory.join("a")).unwrap();
    assert!(first == again("b", "vm1"));
    assert!(first != again("c", "vm2"));
}

#[test]
fn files_taken_as_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    // Larger than the smallest disk holds.
    let text = "#cloud-config\n".to_owned() + &"# padding\n".repeat(500_000);
    std::fs::write(directory.join("user"), &text).unwrap();
    let output = vbd(directory, &["seed", "a", "--user-data", "user"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    program("fsck.vfat", &["-n", "a"], directory);
    assert!(program("mtype", &["-i", "a", "::user-data"], directory) == text);
}

#[test]
fn wrong_calls() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    std::fs::write(directory.join("there"), "").unwrap();
    let refused = |call: &[&str], code: i32, why: &str| {
        let output = vbd(directory, call);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(code) && said.contains(why), "{call:?}: {said}");
    };
    refused(&["seed", "a", "--hostname", "a b"], 2, "no host's name");
    refused(&["seed", "a", "--user", "A"], 2, "small letters");
    refused(&["seed", "a", "--user-data", "missing"], 1, "missing");
    refused(&["seed", "there"], 1, "exists already");
    assert!(!directory.join("a").exists());
}
