//! The lines as their readers take them: a shell first, then each program by the grammar of its options. What can be run
//! here is run in `tests/serve/paste.rs`.

use std::path::Path;
use std::process::Command;

use vbd_daemon::config::{Access, xl};

use super::*;

/// Names and paths with what shells, URIs and option parsers take for their own.
const HOSTILE: [&str; 12] = [
    "vm1",
    "a b",
    "it's",
    "a,b",
    "a, 'b'",
    "$HOME `id` $(id)",
    "back\\slash",
    "a[0]",
    "q\"uote",
    "a;b&c|d>e",
    "percent%20?x=y#z",
    "größe*",
];

fn disk(name: &str, kind: &str, address: &str, read_only: bool) -> DiskInfo {
    DiskInfo {
        name: name.to_owned(),
        path: "/srv/disk".into(),
        format: "raw".to_owned(),
        size: Some(1 << 20),
        block_size: Some(512),
        read_only,
        cache: "none".to_owned(),
        front_ends: vec![FrontEndInfo {
            kind: kind.to_owned(),
            address: address.to_owned(),
            export: None,
            clients: 0,
            problem: None,
        }],
        problem: None,
    }
}

/// The line for a program.
fn line(disk: &DiskInfo, program: &str) -> String {
    let text = lines(disk);
    let found = text.lines().find_map(|line| line.trim_start().strip_prefix(program));
    found.unwrap_or_else(|| panic!("no {program} in {text}")).trim_start().to_owned()
}

/// The words that a shell makes of a line.
fn words(line: &str) -> Vec<String> {
    let output =
        Command::new("sh").args(["-c", &format!("printf '%s\\0' {line}")]).output().expect("a shell");
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.split_terminator('\0').map(str::to_owned).collect()
}

/// Cloud Hypervisor's options, as its documentation has them: `key=value` between commas that are in neither quotes nor
/// brackets; quotes go, and so do blanks around a value.
fn read_cloud_hypervisor(option: &str) -> Vec<(String, String)> {
    let (mut quoted, mut depth) = (false, 0i32);
    let mut parts = vec![String::new()];
    for c in option.chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted && depth == 0 => parts.push(String::new()),
            c => {
                depth += i32::from(c == '[') - i32::from(c == ']');
                assert!(depth >= 0, "a bracket that nothing opens: {option}");
                parts.last_mut().expect("one at least").push(c);
            }
        }
    }
    assert!(!quoted && depth == 0, "left open: {option}");
    let pair = |part: &String| {
        let (key, value) = part.split_once('=').unwrap_or_else(|| panic!("no value: {option}"));
        (key.to_owned(), value.trim().to_owned())
    };
    parts.iter().map(pair).collect()
}

/// crosvm's options: values between commas, the first without its key. One in double quotes has backslashes before
/// quotes and backslashes; one without quotes has no quote and no bracket in it.
fn read_crosvm(option: &str) -> Vec<(String, String)> {
    let mut rest = option;
    let mut pairs = Vec::new();
    while !rest.is_empty() {
        let key = if pairs.is_empty() {
            "type"
        } else {
            let (key, after) = rest.split_once('=').expect("a key");
            rest = after;
            key
        };
        let mut value = String::new();
        let mut chars = rest.chars();
        if rest.starts_with('"') {
            chars.next();
            loop {
                match chars.next().expect("a quote that closes") {
                    '"' => break,
                    '\\' => {
                        let c = chars.next().expect("something to escape");
                        assert!(matches!(c, '"' | '\\'), "{option}");
                        value.push(c);
                    }
                    c => value.push(c),
                }
            }
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            assert!(!rest[..end].contains(['"', '\'', '[', ']']) && end > 0, "{option}");
            value.push_str(&rest[..end]);
            chars = rest[end..].chars();
        }
        pairs.push((key.to_owned(), value));
        rest = chars.as_str();
        assert!(rest.is_empty() || rest.starts_with(','), "{option}");
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
    pairs
}

fn pairs(of: &[(&str, &str)]) -> Vec<(String, String)> {
    of.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn cloud_hypervisor_finds_the_socket() {
    for name in HOSTILE {
        let socket = format!("/run/{name}.sock");
        let line = line(&disk("vm1", "vhost-user", &socket, false), "Cloud Hypervisor");
        if name.contains('"') {
            assert!(line.starts_with("cannot be told this socket's path"), "{line}");
            continue;
        }
        let words = words(&line);
        let [memory, memory_is, disk, disk_is] = &words[..] else { panic!("{words:?}") };
        assert_eq!((memory.as_str(), disk.as_str()), ("--memory", "--disk"));
        // Memory that the server cannot see is of no use.
        assert_eq!(read_cloud_hypervisor(memory_is), pairs(&[("size", "1G"), ("shared", "on")]));
        assert_eq!(read_cloud_hypervisor(disk_is), pairs(&[("vhost_user", "on"), ("socket", &socket)]));
    }
    for unsayable in ["/run/a]b", "/run/[", "/run/][", "/run/a ", "\"/run/a\""] {
        assert_eq!(cloud_hypervisor_value(unsayable), None, "{unsayable}");
    }
}

#[test]
fn crosvm_finds_the_socket() {
    for name in HOSTILE {
        let socket = format!("/run/{name}.sock");
        let words = words(&line(&disk("vm1", "vhost-user", &socket, false), "crosvm"));
        let [option, value] = &words[..] else { panic!("{words:?}") };
        assert_eq!(option, "--vhost-user");
        assert_eq!(read_crosvm(value), pairs(&[("type", "block"), ("socket", &socket)]), "{value}");
    }
}

#[test]
fn xen_gets_a_device_and_a_disk_that_xl_reads() {
    for (name, read_only, access) in
        [("vm1", false, Access::ReadWrite), ("it's, a disk", true, Access::ReadOnly)]
    {
        for address in ["unix:/run/n, 1.sock", "127.0.0.1:10809", "[::1]:10810"] {
            let line = line(&disk(name, "nbd", address, read_only), "Xen");
            let (client, domain) = line.rsplit_once(", then: ").expect("two parts");
            let words = words(client);
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let server = match address {
                "unix:/run/n, 1.sock" => ["-unix", "/run/n, 1.sock"],
                "127.0.0.1:10809" => ["127.0.0.1", "10809"],
                _ => ["::1", "10810"],
            };
            assert_eq!(words, [&["nbd-client"], &server[..], &["/dev/nbd0", "-name", name]].concat());

            let config = xl::parse(&format!("name = 'vm1'\n{domain}\n"), Path::new("vm1.cfg"));
            let config = config.unwrap_or_else(|e| panic!("{domain}: {e}"));
            let [disk] = &config.disks[..] else { panic!("one disk: {domain}") };
            assert_eq!((disk.path.as_path(), disk.access), (Path::new("/dev/nbd0"), access));
            assert_eq!(disk.vdev.map(|vdev| vdev.to_string()).as_deref(), Some("xvda"));
            assert!(config.warnings.is_empty(), "{:?}", config.warnings);
        }
    }
}

#[test]
fn names_survive_the_shell_and_the_uri() {
    assert_eq!(shell("/run/vm1.sock"), "/run/vm1.sock");
    assert_eq!(shell("it's here"), r"'it'\''s here'");
    assert_eq!(percent("/run/a b?"), "/run/a%20b%3F");
    for name in HOSTILE {
        assert_eq!(words(&shell(name)), [name]);
    }
}
