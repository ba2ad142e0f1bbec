//! Lines to paste, that connect a guest to a disk.

use std::fmt::Write;

use vbd_daemon::control::{DiskInfo, FrontEndInfo};

/// For every way to the disk, how QEMU and others take it.
pub(crate) fn lines(disk: &DiskInfo) -> String {
    let mut text = String::new();
    for front_end in &disk.front_ends {
        let lines = match front_end.kind.as_str() {
            "vhost-user" => vhost_user(disk, front_end),
            _ => nbd(disk, front_end),
        };
        for (program, line) in lines {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "  {program:<17}{line}");
        }
    }
    text
}

fn vhost_user(disk: &DiskInfo, front_end: &FrontEndInfo) -> Vec<(&'static str, String)> {
    let socket = shell(&front_end.address);
    let id: String = disk.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let qemu_socket = shell(&front_end.address.replace(',', ",,"));
    vec![
        (
            "QEMU",
            format!(
                "-object memory-backend-memfd,id=mem,size=1G,share=on -machine q35,memory-backend=mem \
                 -chardev socket,id=vbd-{id},path={qemu_socket} -device vhost-user-blk-pci,chardev=vbd-{id}"
            ),
        ),
        ("Cloud Hypervisor", format!("--memory size=1G,shared=on --disk vhost_user=on,socket={socket}")),
        ("crosvm", format!("--vhost-user block,socket={socket}")),
    ]
}

fn nbd(disk: &DiskInfo, front_end: &FrontEndInfo) -> Vec<(&'static str, String)> {
    let export = front_end.export.as_deref().unwrap_or(&disk.name);
    let name = percent(export);
    let (uri, client) = match front_end.address.strip_prefix("unix:") {
        Some(path) => (
            format!("nbd+unix:///{name}?socket={}", percent(path)),
            format!("nbd-client -unix {} /dev/nbd0 -name {}", shell(path), shell(export)),
        ),
        None => {
            let address = &front_end.address;
            let (host, port) = address.rsplit_once(':').unwrap_or((address, "10809"));
            let host = host.trim_start_matches('[').trim_end_matches(']');
            (
                format!("nbd://{address}/{name}"),
                format!("nbd-client {host} {port} /dev/nbd0 -name {}", shell(export)),
            )
        }
    };
    let access = if disk.read_only { "r" } else { "w" };
    vec![
        (
            "QEMU",
            format!("-drive {}", shell(&format!("file={},format=raw,if=virtio", uri.replace(',', ",,")))),
        ),
        ("libnbd", format!("nbdinfo {}", shell(&uri))),
        ("Linux", client.clone()),
        ("Xen", format!("{client}, then: disk = [ 'phy:/dev/nbd0,xvda,{access}' ]")),
    ]
}

/// A word as a shell takes it.
fn shell(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@%,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// A part of a URI (RFC 3986, 2.1), in which slashes stay.
fn percent(part: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~/".contains(&b);
    part.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_the_shell_and_the_uri() {
        assert_eq!(shell("/run/vm1.sock"), "/run/vm1.sock");
        assert_eq!(shell("it's here"), r"'it'\''s here'");
        assert_eq!(percent("/run/a b?"), "/run/a%20b%3F");
    }
}
