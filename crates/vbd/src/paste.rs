//! Lines to paste, that connect a guest to a disk.

use std::fmt::Write;

use vbd_daemon::control::{DiskInfo, FrontEndInfo};

/// For every way to the disk, how QEMU and others take it.
pub(crate) fn lines(disk: &DiskInfo) -> String {
    let mut text = String::new();
    for front_end in &disk.front_ends {
        let lines = match front_end.kind.as_str() {
            "vhost-user" => vhost_user(disk, front_end),
            "ublk" => ublk(disk, front_end),
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
    let id: String = disk.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let socket = shell(&front_end.address.replace(',', ",,"));
    let hypervisor = match cloud_hypervisor_value(&front_end.address) {
        Some(socket) => {
            format!("--memory size=1G,shared=on --disk {}", shell(&format!("vhost_user=on,socket={socket}")))
        }
        None => "cannot be told this socket's path: give it one without quotes and brackets".to_owned(),
    };
    vec![
        (
            "QEMU",
            format!(
                "-object memory-backend-memfd,id=mem,size=1G,share=on -machine q35,memory-backend=mem \
                 -chardev socket,id=vbd-{id},path={socket} -device vhost-user-blk-pci,chardev=vbd-{id}"
            ),
        ),
        ("Cloud Hypervisor", hypervisor),
        (
            "crosvm",
            format!("--vhost-user {}", shell(&format!("block,socket={}", crosvm_value(&front_end.address)))),
        ),
    ]
}

/// A value as Cloud Hypervisor's options take it: what has a comma stands in quotes, and there is no way to say a quote,
/// a bracket without its partner, or blanks around it.
fn cloud_hypervisor_value(value: &str) -> Option<String> {
    let mut open = 0usize;
    for c in value.chars() {
        match c {
            '"' => return None,
            '[' => open += 1,
            ']' => open = open.checked_sub(1)?,
            _ => {}
        }
    }
    let sayable = open == 0 && value.trim() == value;
    sayable.then(|| if value.contains(',') { format!("\"{value}\"") } else { value.to_owned() })
}

/// A value as crosvm's options take it: in quotes, with backslashes, where it has characters with a meaning.
fn crosvm_value(value: &str) -> String {
    if value.contains([',', '"', '\'', '[', ']']) {
        format!("\"{}\"", value.replace('\\', r"\\").replace('"', r#"\""#))
    } else {
        value.to_owned()
    }
}

fn ublk(disk: &DiskInfo, front_end: &FrontEndInfo) -> Vec<(&'static str, String)> {
    let device = &front_end.address;
    let (options, access) = if disk.read_only { (" -o ro", "r") } else { ("", "w") };
    vec![
        ("Linux", format!("mount{options} {device} /mnt")),
        ("Xen", format!("disk = [ 'phy:{device},xvda,{access}' ]")),
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
    let (access, drive) = if disk.read_only { ("r", ",readonly=on") } else { ("w", "") };
    let file = uri.replace(',', ",,");
    vec![
        ("QEMU", format!("-drive {}", shell(&format!("file={file},format=raw,if=virtio{drive}")))),
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
mod tests;
