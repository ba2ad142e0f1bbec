//! Who we are to a registry: the files that `docker login` and `podman login` write (containers-auth.json(5)).

use std::collections::HashMap;

use serde::Deserialize;

/// A name and a password, or a token that stands for them.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    Password {
        user: String,
        password: String,
    },
    /// A token with which others are asked for.
    Identity(String),
    /// A program knows them: `docker-credential-` and this.
    Helper(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    #[serde(default)]
    auths: HashMap<String, Auth>,
    #[serde(default)]
    creds_store: Option<String>,
    #[serde(default)]
    cred_helpers: HashMap<String, String>,
}

#[derive(Deserialize)]
struct Auth {
    #[serde(default)]
    auth: Option<String>,
    #[serde(default)]
    identitytoken: Option<String>,
}

/// The names that a registry has in such files.
fn is_called(name: &str, host: &str) -> bool {
    let name = name.strip_prefix("https://").or(name.strip_prefix("http://")).unwrap_or(name);
    let name = name.split('/').next().unwrap_or(name);
    let hub = |name: &str| matches!(name, "index.docker.io" | "docker.io" | "registry-1.docker.io");
    name == host || (hub(name) && hub(host))
}

/// What a file of that content has for a registry.
///
/// # Errors
///
/// Content that is not as it must be.
pub(super) fn find(content: &[u8], host: &str) -> Result<Option<Credentials>, String> {
    let config: Config = serde_json::from_slice(content).map_err(|e| format!("is not as it must be: {e}"))?;
    let helper = config.cred_helpers.iter().find(|(name, _)| is_called(name, host)).map(|(_, helper)| helper);
    let auth = config.auths.iter().find(|(name, _)| is_called(name, host)).map(|(_, auth)| auth);
    if let Some(auth) = auth.filter(|_| helper.is_none()) {
        if let Some(token) = auth.identitytoken.as_ref().filter(|token| !token.is_empty()) {
            return Ok(Some(Credentials::Identity(token.clone())));
        }
        if let Some(auth) = auth.auth.as_ref().filter(|auth| !auth.is_empty()) {
            let wrong = || format!("has no name and password for {host} where they must be");
            let text = unpacked(auth).and_then(|bytes| String::from_utf8(bytes).ok()).ok_or_else(wrong)?;
            let (user, password) = text.split_once(':').ok_or_else(wrong)?;
            let password = password.trim_end_matches('\0').to_owned();
            return Ok(Some(Credentials::Password { user: user.to_owned(), password }));
        }
    }
    // A store that is the default is asked for what is in the list alone: others need no program.
    let store = config.creds_store.as_ref().filter(|_| auth.is_some());
    let Some(helper) = helper.or(store) else { return Ok(None) };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if helper.is_empty() || !helper.bytes().all(plain) {
        return Err(format!("names {helper:?} as the store of credentials, which is no name of a program"));
    }
    Ok(Some(Credentials::Helper(helper.clone())))
}

const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Base64 (RFC 4648) of bytes.
pub(super) fn packed(bytes: &[u8]) -> String {
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let number =
            three.iter().fold(0, |number, &byte| number << 8 | usize::from(byte)) << (8 * (3 - three.len()));
        for digit in 0..4 {
            let used = digit <= three.len();
            text.push(if used { char::from(DIGITS[number >> (18 - 6 * digit) & 63]) } else { '=' });
        }
    }
    text
}

/// The bytes of base64.
pub(super) fn unpacked(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let (mut number, mut bits) = (0u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        let digit = DIGITS.iter().position(|&digit| digit == byte)?;
        number = (number << 6 | u32::try_from(digit).ok()?) & 0xffff;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push(u8::try_from(number >> bits & 0xff).ok()?);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(content: &str, host: &str) -> Option<(String, String)> {
        match find(content.as_bytes(), host).unwrap()? {
            Credentials::Password { user, password } => Some((user, password)),
            _ => panic!("not a password"),
        }
    }

    #[test]
    fn names_and_passwords_are_found() {
        let me = packed(b"me:a:b");
        let content = format!(
            "{{\"auths\": {{\"https://index.docker.io/v1/\": {{\"auth\": \"{me}\"}}, \"h:5\": {{}}}}}}"
        );
        let expected = Some(("me".to_owned(), "a:b".to_owned()));
        assert_eq!(password(&content, "registry-1.docker.io"), expected);
        assert_eq!(password(&content, "h:5"), None);
        assert_eq!(password(&content, "docker.io.example"), None);
        assert!(find(b"{\"auths\": {\"h\": {\"auth\": \"!\"}}}", "h").is_err());
    }

    #[test]
    fn tokens_and_programs_are_found() {
        let content = b"{\"auths\": {\"h\": {\"identitytoken\": \"t\"}, \"i\": {}}, \"credsStore\": \"pass\", \"credHelpers\": {\"j\": \"../x\"}}";
        assert!(find(content, "h").unwrap() == Some(Credentials::Identity("t".to_owned())));
        assert!(find(content, "i").unwrap() == Some(Credentials::Helper("pass".to_owned())));
        assert!(find(content, "k").unwrap().is_none());
        assert!(find(content, "j").is_err());
    }

    #[test]
    fn base64_goes_both_ways() {
        for text in ["", "f", "fo", "foo", "foob", "fooba", "foobar", "\u{ff}\u{0}"] {
            assert_eq!(unpacked(&packed(text.as_bytes())).unwrap(), text.as_bytes());
        }
        assert_eq!(packed(b"fooba"), "Zm9vYmE=");
        assert_eq!(unpacked("Zm9v*"), None);
    }
}
