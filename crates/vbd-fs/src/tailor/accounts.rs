//! Users, in passwd(5), shadow(5), group(5) and gshadow(5).

use super::systemd::end_line;
use super::{Attributes, Kind, Root, User, exists, make_directories, put, text};
use crate::{Error, Meta, Result};

const PASSWD: &str = "/etc/passwd";
const SHADOW: &str = "/etc/shadow";
const GROUP: &str = "/etc/group";
const GSHADOW: &str = "/etc/gshadow";
/// The numbers that Debian gives to people.
const PEOPLE: std::ops::Range<u32> = 1000..60000;

pub(super) fn check(user: &User) -> Result<()> {
    let bad = |reason: String| Err(Error::tailor(format!("user {}", user.name), reason));
    for name in std::iter::once(&user.name).chain(&user.groups) {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '-' | '.');
        let starts = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
        if !starts || name.len() > 32 || !name.chars().all(plain) {
            return bad(format!("{name:?} is no user's or group's name: small letters, digits, - and _"));
        }
    }
    if let Some(hash) = &user.password_hash {
        let plain = |c: char| c.is_ascii_graphic() && c != ':';
        if !(hash.starts_with('$') || hash == "*" || hash == "!") || !hash.chars().all(plain) {
            return bad(
                "the password is no hash as crypt(5) has it; `openssl passwd -6` makes one".to_owned()
            );
        }
    }
    if let Some(shell) = &user.shell
        && (!shell.starts_with('/') || shell.contains(|c: char| c == ':' || c.is_control()))
    {
        return bad(format!("the shell {shell:?} is no absolute path"));
    }
    user.ssh_keys.iter().try_for_each(|key| check_key(&user.name, key))
}

fn check_key(user: &str, key: &str) -> Result<()> {
    let key = key.trim();
    if key.contains("PRIVATE KEY") {
        return Err(Error::tailor(
            format!("user {user}"),
            "that is a private key: give the public one (.pub)",
        ));
    }
    let kinds = ["ssh-", "ecdsa-", "sk-"];
    let known = key.split_whitespace().any(|word| kinds.iter().any(|kind| word.starts_with(kind)));
    if !known || key.contains(['\n', '\0']) {
        return Err(Error::tailor(format!("user {user}"), "that is no public SSH key"));
    }
    Ok(())
}

/// The keys of a user, those in files included.
fn keys(user: &User) -> Result<Vec<String>> {
    let mut keys = user.ssh_keys.clone();
    for file in &user.ssh_key_files {
        let text = std::fs::read_to_string(file)
            .map_err(|e| Error::io(format!("cannot read the SSH key {}", file.display()), e))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        keys.extend(lines.map(str::to_owned));
    }
    keys.iter().try_for_each(|key| check_key(&user.name, key))?;
    Ok(keys)
}

/// Makes a user, or changes one that exists.
pub(super) fn add(root: &mut dyn Root, user: &User) -> Result<()> {
    let item = || format!("user {}", user.name);
    let passwd = text(root, PASSWD)?.ok_or_else(|| Error::tailor(item(), "the tree has no /etc/passwd"))?;
    let keys = keys(user)?;
    let (uid, gid, home) = match line_of(&passwd, &user.name) {
        Some(line) => {
            let account =
                existing(&line).ok_or_else(|| Error::tailor(item(), format!("{PASSWD} has {line:?}")))?;
            change(root, user, passwd)?;
            account
        }
        None => create(root, user, passwd)?,
    };
    for group in &user.groups {
        join(root, &user.name, group)?;
    }
    if !keys.is_empty() {
        authorize(root, &keys, uid, gid, &home)?;
    }
    Ok(())
}

fn line_of(text: &str, name: &str) -> Option<String> {
    text.lines().find(|line| line.split(':').next() == Some(name)).map(str::to_owned)
}

fn existing(line: &str) -> Option<(u32, u32, String)> {
    let fields: Vec<&str> = line.split(':').collect();
    let [_, _, uid, gid, _, home, ..] = fields[..] else { return None };
    Some((uid.parse().ok()?, gid.parse().ok()?, home.to_owned()))
}

fn change(root: &mut dyn Root, user: &User, passwd: String) -> Result<()> {
    if let Some(uid) = user.uid
        && line_of(&passwd, &user.name).as_deref().and_then(existing).is_some_and(|(old, ..)| old != uid)
    {
        return Err(Error::tailor(format!("user {}", user.name), "exists with another number"));
    }
    if let Some(shell) = &user.shell {
        let text = edit_field(&passwd, &user.name, 6, shell);
        put(root, PASSWD, text.as_bytes(), 0o644)?;
    }
    match &user.password_hash {
        Some(hash) => set_password(root, &user.name, hash),
        None => Ok(()),
    }
}

fn create(root: &mut dyn Root, user: &User, mut passwd: String) -> Result<(u32, u32, String)> {
    let item = || format!("user {}", user.name);
    let mut group = text(root, GROUP)?.unwrap_or_default();
    let number = |line: &str| line.split(':').nth(2).and_then(|n| n.parse::<u32>().ok());
    let used = |n: u32| passwd.lines().chain(group.lines()).any(|line| number(line) == Some(n));
    let uid = match user.uid {
        Some(uid) if passwd.lines().any(|line| number(line) == Some(uid)) => {
            return Err(Error::tailor(item(), format!("the number {uid} is another user's")));
        }
        Some(uid) => uid,
        None => {
            PEOPLE.clone().find(|&n| !used(n)).ok_or_else(|| Error::tailor(item(), "no number is free"))?
        }
    };
    // A group of that name may be there; the user gets it.
    let gid = match line_of(&group, &user.name).as_deref().and_then(number) {
        Some(gid) => gid,
        None => {
            let free = |n: &u32| !group.lines().any(|line| number(line) == Some(*n));
            let gid = std::iter::once(uid).chain(PEOPLE).find(free);
            let gid = gid.ok_or_else(|| Error::tailor(item(), "no group's number is free"))?;
            end_line(&mut group);
            group.push_str(&format!("{}:x:{gid}:\n", user.name));
            put(root, GROUP, group.as_bytes(), 0o644)?;
            if let Some(mut gshadow) = text(root, GSHADOW)? {
                end_line(&mut gshadow);
                gshadow.push_str(&format!("{}:!::\n", user.name));
                put(root, GSHADOW, gshadow.as_bytes(), 0o640)?;
            }
            gid
        }
    };
    let shell = match &user.shell {
        Some(shell) => shell,
        None if exists(root, "/bin/bash")? => "/bin/bash",
        None => "/bin/sh",
    };
    let home = format!("/home/{}", user.name);
    end_line(&mut passwd);
    passwd.push_str(&format!("{}:x:{uid}:{gid}::{home}:{shell}\n", user.name));
    put(root, PASSWD, passwd.as_bytes(), 0o644)?;
    // A star is no password at all; an exclamation mark would have sshd refuse keys as well.
    set_password(root, &user.name, user.password_hash.as_deref().unwrap_or("*"))?;
    make_home(root, &home, uid, gid)?;
    Ok((uid, gid, home))
}

fn set_password(root: &mut dyn Root, name: &str, hash: &str) -> Result<()> {
    let Some(mut shadow) = text(root, SHADOW)? else {
        // Without shadow the hash is in passwd, for all to read, as such a tree has it for everybody.
        let passwd = text(root, PASSWD)?.unwrap_or_default();
        return put(root, PASSWD, edit_field(&passwd, name, 1, hash).as_bytes(), 0o644);
    };
    if line_of(&shadow, name).is_some() {
        shadow = edit_field(&shadow, name, 1, hash);
    } else {
        let days = Meta::root(0).mtime.seconds / 86400;
        end_line(&mut shadow);
        shadow.push_str(&format!("{name}:{hash}:{days}:0:99999:7:::\n"));
    }
    put(root, SHADOW, shadow.as_bytes(), 0o640)
}

/// Replaces one field of the line that starts with `name`.
fn edit_field(text: &str, name: &str, field: usize, value: &str) -> String {
    let edit = |line: &str| {
        let mut fields: Vec<&str> = line.split(':').collect();
        if fields[0] == name
            && let Some(old) = fields.get_mut(field)
        {
            *old = value;
        }
        fields.join(":") + "\n"
    };
    text.lines().map(edit).collect()
}

fn join(root: &mut dyn Root, user: &str, group: &str) -> Result<()> {
    let no_group = || Error::tailor(format!("user {user}"), format!("the tree has no group {group}"));
    let groups = text(root, GROUP)?.ok_or_else(no_group)?;
    let line = line_of(&groups, group).ok_or_else(no_group)?;
    for (path, text, mode) in [(GROUP, Some(groups), 0o644), (GSHADOW, text(root, GSHADOW)?, 0o640)] {
        let Some(text) = text else { continue };
        let Some(line) = line_of(&text, group).or((path == GROUP).then(|| line.clone())) else { continue };
        let members = line.split(':').nth(3).unwrap_or_default();
        if members.split(',').any(|member| member == user) {
            continue;
        }
        let members = if members.is_empty() { user.to_owned() } else { format!("{members},{user}") };
        put(root, path, edit_field(&text, group, 3, &members).as_bytes(), mode)?;
    }
    Ok(())
}

fn owned(mode: u32, uid: u32, gid: u32) -> Meta {
    Meta { uid, gid, ..Meta::root(mode) }
}

/// The home directory with what `/etc/skel` has for it.
fn make_home(root: &mut dyn Root, home: &str, uid: u32, gid: u32) -> Result<()> {
    if exists(root, home)? {
        return Ok(());
    }
    make_directories(root, "/home")?;
    root.make_directory(home, &owned(0o700, uid, gid))?;
    if !matches!(root.look("/etc/skel")?, Some(Attributes { kind: Kind::Directory, .. })) {
        return Ok(());
    }
    for name in root.list("/etc/skel")? {
        let Some(name) = name.to_str() else { continue };
        let from = format!("/etc/skel/{name}");
        let Some(Attributes { kind: Kind::File, meta }) = root.look(&from)? else { continue };
        let data = root.read(&from)?.unwrap_or_default();
        root.write(&format!("{home}/{name}"), &mut &data[..], &owned(meta.mode, uid, gid))?;
    }
    Ok(())
}

/// sshd(8) wants the directory and the file to be the user's alone.
fn authorize(root: &mut dyn Root, keys: &[String], uid: u32, gid: u32, home: &str) -> Result<()> {
    let directory = format!("{}/.ssh", home.trim_end_matches('/'));
    if !exists(root, home)? {
        if let Some((above, _)) = home.rsplit_once('/') {
            make_directories(root, above)?;
        }
        root.make_directory(home, &owned(0o700, uid, gid))?;
    }
    if !exists(root, &directory)? {
        root.make_directory(&directory, &owned(0o700, uid, gid))?;
    }
    let file = format!("{directory}/authorized_keys");
    let mut lines = text(root, &file)?.unwrap_or_default();
    end_line(&mut lines);
    for key in keys.iter().map(|key| key.trim()) {
        if !lines.lines().any(|line| line == key) {
            lines.push_str(key);
            lines.push('\n');
        }
    }
    root.write(&file, &mut lines.as_bytes(), &owned(0o600, uid, gid))
}
