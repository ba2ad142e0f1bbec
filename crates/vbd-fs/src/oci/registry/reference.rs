//! References: `docker://[HOST[:PORT]/]NAME[:TAG][@sha256:DIGEST]`.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Docker's own registry, by the name that references have, and by the one that it answers to.
const HUB: &str = "docker.io";
const HUB_HOST: &str = "registry-1.docker.io";

/// An image in a registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RegistryRef(String);

/// What a reference says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Parts {
    /// Host, and port where there is one.
    pub(super) host: String,
    /// The name of the image there.
    pub(super) repository: String,
    /// A tag, or a digest where there is one.
    pub(super) reference: String,
}

impl Parts {
    /// Whether the registry is on this machine, where it is spoken to without TLS.
    pub(super) fn is_local(&self) -> bool {
        let name = match self.host.rsplit_once(':') {
            Some((name, port)) if !port.contains(']') => name,
            _ => &self.host,
        };
        let loopback = name.parse::<std::net::Ipv4Addr>().is_ok_and(|address| address.is_loopback());
        loopback || name == "localhost" || name == "[::1]"
    }

    /// The first part of every URL.
    pub(super) fn base(&self) -> String {
        let scheme = if self.is_local() { "http" } else { "https" };
        format!("{scheme}://{}/v2/{}", self.host, self.repository)
    }
}

impl RegistryRef {
    /// The prefix that its text has.
    pub(crate) const PREFIX: &str = "docker://";

    /// Reads a whole reference.
    ///
    /// # Errors
    ///
    /// What is none, with what it must be.
    pub(crate) fn parse(text: &str) -> Result<RegistryRef> {
        match parts(text) {
            Some(_) => Ok(RegistryRef(text.to_owned())),
            None => Err(Error::Invalid(format!(
                "{text}: write it as docker://NAME:TAG or docker://HOST:PORT/NAME:TAG, and @sha256:DIGEST for a certain one"
            ))),
        }
    }

    pub(super) fn parts(&self) -> Parts {
        // It was read before.
        parts(&self.0).unwrap_or_else(|| Parts {
            host: HUB_HOST.to_owned(),
            repository: String::new(),
            reference: String::new(),
        })
    }
}

impl TryFrom<String> for RegistryRef {
    type Error = Error;

    fn try_from(text: String) -> Result<RegistryRef> {
        RegistryRef::parse(&text)
    }
}

impl From<RegistryRef> for String {
    fn from(reference: RegistryRef) -> String {
        reference.0
    }
}

impl fmt::Display for RegistryRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn parts(text: &str) -> Option<Parts> {
    let rest = text.strip_prefix(RegistryRef::PREFIX)?;
    let (rest, digest) = match rest.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (rest, None),
    };
    let (host, rest) = match rest.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest),
        _ => (HUB, rest),
    };
    // A colon before the last slash would be a port's.
    let (repository, tag) = match rest.rsplit_once(':') {
        Some((repository, tag)) => (repository, Some(tag)),
        None => (rest, None),
    };
    let good = is_host(host)
        && is_repository(repository)
        && tag.is_none_or(is_tag)
        && digest.is_none_or(|digest| digest.parse::<super::super::digest::Digest>().is_ok());
    if !good {
        return None;
    }
    let hub = host == HUB;
    let official = hub && !repository.contains('/');
    Some(Parts {
        host: if hub { HUB_HOST } else { host }.to_owned(),
        repository: if official { format!("library/{repository}") } else { repository.to_owned() },
        reference: digest.or(tag).unwrap_or("latest").to_owned(),
    })
}

fn is_host(host: &str) -> bool {
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, Some(port)),
        _ => (host, None),
    };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
    let address = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let named = !name.is_empty() && name.bytes().all(plain);
    let named = named || address.is_some_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok());
    named && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|number| number.to_string() == port))
}

/// Lower-case letters and digits, with `.`, `_`, `__` or dashes between them, and slashes between such.
fn is_repository(repository: &str) -> bool {
    let end = |byte: Option<u8>| byte.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let plain =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-');
    let part = |part: &str| {
        let (first, last) = (part.bytes().next(), part.bytes().last());
        end(first) && end(last) && part.bytes().all(plain) && !part.contains("..")
    };
    repository.len() <= 255 && repository.split('/').all(part)
}

fn is_tag(tag: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=128).contains(&tag.len()) && tag.bytes().all(plain) && !tag.starts_with(['.', '-'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_read_as_docker_reads_them() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        for (text, host, repository, reference) in [
            ("debian", HUB_HOST, "library/debian", "latest"),
            ("debian:12", HUB_HOST, "library/debian", "12"),
            ("docker.io/a/b:x", HUB_HOST, "a/b", "x"),
            ("quay.io/a/b/c", "quay.io", "a/b/c", "latest"),
            ("localhost/a", "localhost", "a", "latest"),
            ("localhost:5000/a:1", "localhost:5000", "a", "1"),
            ("[::1]:5000/a", "[::1]:5000", "a", "latest"),
            (&format!("r.example/a:1@{digest}"), "r.example", "a", &digest),
        ] {
            let found = RegistryRef::parse(&format!("docker://{text}")).unwrap().parts();
            assert_eq!(
                (&*found.host, &*found.repository, &*found.reference),
                (host, repository, reference),
                "{text}"
            );
        }
        for text in [
            "",
            "Debian",
            "a:",
            "a@sha256:12",
            "a/../b",
            "/a",
            "a//b",
            "x.y:z/a",
            "a b",
            "x.y:99999/a",
            "a:-x",
            "[::1/a",
        ] {
            assert!(RegistryRef::parse(&format!("docker://{text}")).is_err(), "{text}");
        }
    }

    #[test]
    fn only_this_machine_is_spoken_to_without_tls() {
        let base = |text: &str| RegistryRef::parse(text).unwrap().parts().base();
        assert_eq!(base("docker://debian"), "https://registry-1.docker.io/v2/library/debian");
        assert_eq!(base("docker://localhost:5000/a"), "http://localhost:5000/v2/a");
        assert_eq!(base("docker://127.0.0.2/a"), "http://127.0.0.2/v2/a");
        assert_eq!(base("docker://[::1]:80/a"), "http://[::1]:80/v2/a");
        assert_eq!(base("docker://localhost.example/a"), "https://localhost.example/v2/a");
        assert_eq!(base("docker://127.0.0.1.example:1/a"), "https://127.0.0.1.example:1/v2/a");
    }
}
