//! What a registry asks for before it answers: the `WWW-Authenticate` header (RFC 9110, section 11.6.1), and for tokens
//! "Token Authentication Specification" in the documents of Docker's registry.

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// A name and a password.
    Basic,
    /// A token, which another server gives out.
    Bearer(TokenServer),
}

/// Who gives out a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TokenServer {
    /// Its address.
    pub(super) realm: String,
    pub(super) service: Option<String>,
    scope: Option<String>,
}

impl Challenge {
    /// Reads a header's value; nothing where it asks for something else.
    pub(super) fn parse(text: &str) -> Option<Challenge> {
        let (scheme, mut rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Challenge::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (mut realm, mut service, mut scope) = (None, None, None);
        while let Some((name, value, after)) = pair(rest) {
            match name.to_ascii_lowercase().as_str() {
                "realm" => realm = Some(value),
                "service" => service = Some(value),
                "scope" => scope = Some(value),
                _ => {}
            }
            rest = after;
        }
        let realm =
            realm.filter(|realm| realm.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"'))?;
        Some(Challenge::Bearer(TokenServer { realm, service, scope }))
    }
}

/// The first `name=value` or `name="value"`, and what comes after it.
fn pair(text: &str) -> Option<(&str, String, &str)> {
    let text = text.trim_start_matches([' ', ',', '\t']);
    let (name, rest) = text.split_once('=')?;
    let Some(quoted) = rest.strip_prefix('"') else {
        let end = rest.find(',').unwrap_or(rest.len());
        return Some((name.trim(), rest[..end].trim().to_owned(), &rest[end..]));
    };
    let mut value = String::new();
    let mut letters = quoted.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return Some((name.trim(), value, &quoted[at + 1..])),
            '\\' => value.push(letters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

impl TokenServer {
    /// What a token is to be good for: what was asked for, or to read a repository.
    pub(super) fn scope(&self, repository: &str) -> String {
        self.scope.clone().unwrap_or_else(|| format!("repository:{repository}:pull"))
    }

    /// Where a token is fetched.
    pub(super) fn url(&self, repository: &str) -> String {
        let joint = if self.realm.contains('?') { '&' } else { '?' };
        let mut url = format!("{}{joint}scope={}", self.realm, encoded(&self.scope(repository)));
        if let Some(service) = &self.service {
            url.push_str(&format!("&service={}", encoded(service)));
        }
        url
    }
}

/// Percent-encodes a part of a query (RFC 3986).
pub(super) fn encoded(text: &str) -> String {
    let one = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b':' | b'/' => {
            char::from(byte).to_string()
        }
        other => format!("%{other:02X}"),
    };
    text.bytes().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let text = "Bearer realm=\"https://auth.docker.io/token\",service=\"registry.docker.io\",scope=\"repository:a/b:pull,push\"";
        let Some(Challenge::Bearer(server)) = Challenge::parse(text) else { panic!("{text}") };
        let url = "https://auth.docker.io/token?scope=repository:a/b:pull%2Cpush&service=registry.docker.io";
        assert_eq!(server.url("x"), url);
        let Some(Challenge::Bearer(server)) =
            Challenge::parse("bearer error=x , realm=\"http://h/t?a=\\\"b\"")
        else {
            return;
        };
        panic!("a realm with a quotation mark: {server:?}");
    }

    #[test]
    fn what_is_missing_is_filled_in() {
        let Some(Challenge::Bearer(server)) = Challenge::parse("Bearer realm=http://h/t?a=b") else {
            panic!()
        };
        assert_eq!(server.url("lib/x"), "http://h/t?a=b&scope=repository:lib/x:pull");
        assert_eq!(Challenge::parse("Basic realm=\"x\""), Some(Challenge::Basic));
        assert_eq!(Challenge::parse("Bearer service=\"x\""), None);
        assert_eq!(Challenge::parse("Negotiate"), None);
    }
}
