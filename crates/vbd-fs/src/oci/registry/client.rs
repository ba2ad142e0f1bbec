//! A registry's answers.

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ureq::http::{HeaderMap, Response, StatusCode, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::challenge::{Challenge, TokenServer, encoded};
use super::credentials::{Credentials, find, packed};
use super::reference::{Parts, RegistryRef};

/// The longest that an answer, or the next byte of one, may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long to wait before each try after the first.
const PAUSES: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];
/// The most bytes of a token's answer, of a file of credentials, and of an error that is shown.
const TOKEN: u64 = 1 << 20;
const CREDENTIALS: u64 = 1 << 20;
const SAID: u64 = 300;
/// The most bytes of a file of certificates.
const CERTIFICATES: u64 = 16 << 20;

/// What manifests may be.
pub(crate) const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// One repository of a registry.
pub(crate) struct Client {
    agent: Agent,
    parts: Parts,
    credentials: Option<Credentials>,
    /// The header that the registry wants, once it said so.
    authorization: Mutex<Option<String>>,
}

/// A manifest as it came.
pub(crate) struct Fetched {
    pub(crate) bytes: Vec<u8>,
    /// Its media type, as the registry names it.
    pub(crate) kind: String,
}

impl Client {
    /// Gets ready to ask; nothing is sent yet.
    ///
    /// # Errors
    ///
    /// Certificates or credentials that cannot be read.
    pub(crate) fn new(reference: &RegistryRef) -> Result<Client, String> {
        let parts = reference.parts();
        let credentials = credentials(&parts.host)?;
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .https_only(!parts.is_local())
            .user_agent(concat!("vbd/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(PATIENCE))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_per_read(Some(PATIENCE))
            .timeout_per_write(Some(PATIENCE));
        if parts.is_local() {
            config = config.proxy(None);
        } else {
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let tls = TlsConfig::builder().root_certs(certificates()?);
            config = config.tls_config(tls.unversioned_rustls_crypto_provider(provider).build());
        }
        Ok(Client { agent: config.build().into(), parts, credentials, authorization: Mutex::default() })
    }

    /// The manifest that the reference names, at most `limit` bytes of it.
    ///
    /// # Errors
    ///
    /// A registry that cannot be reached or refuses; an answer that is too large.
    pub(crate) fn manifest(&self, limit: u64) -> Result<Fetched, String> {
        let response = self.get(&format!("manifests/{}", self.parts.reference), MANIFESTS, 0)?;
        let kind = response.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let kind = kind.unwrap_or_default().split(';').next().unwrap_or_default().trim().to_owned();
        let mut bytes = Vec::new();
        let read = response.into_body().into_reader().take(limit + 1).read_to_end(&mut bytes);
        read.map_err(|e| format!("cannot be read: {e}"))?;
        if bytes.len() as u64 > limit {
            return Err(format!("has a manifest of more than {limit} bytes"));
        }
        Ok(Fetched { bytes, kind })
    }

    /// The digest in the reference, where it has one.
    pub(crate) fn digest(&self) -> Option<&str> {
        Some(self.parts.reference.as_str()).filter(|reference| reference.contains(':'))
    }

    /// Asks for what is at `path`, from byte `start` on: the answer may begin at 0 all the same.
    ///
    /// # Errors
    ///
    /// See [`Client::manifest`].
    pub(crate) fn get(&self, path: &str, accept: &str, start: u64) -> Result<Response<Body>, String> {
        let url = format!("{}/{path}", self.parts.base());
        let (mut signed_in, mut pauses) = (false, PAUSES.iter());
        loop {
            let mut request = self.agent.get(&url).header(header::ACCEPT, accept);
            let authorization = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(authorization) = &authorization {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            if start > 0 {
                request = request.header(header::RANGE, format!("bytes={start}-"));
            }
            let failed = match request.call() {
                Ok(response) if response.status().is_success() => return Ok(response),
                // A token may have run out.
                Ok(response) if response.status() == StatusCode::UNAUTHORIZED && !signed_in => {
                    signed_in = true;
                    let authorization = self.sign_in(response.headers())?;
                    *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(authorization);
                    continue;
                }
                Ok(response) => {
                    let again = response.status() == StatusCode::TOO_MANY_REQUESTS
                        || response.status().is_server_error();
                    let refused = self.refused(path, response);
                    if !again {
                        return Err(refused);
                    }
                    refused
                }
                Err(error) => format!("{} cannot be reached: {error}", self.parts.host),
            };
            match pauses.next() {
                Some(pause) => std::thread::sleep(*pause),
                None => return Err(failed),
            }
        }
    }

    fn refused(&self, path: &str, response: Response<Body>) -> String {
        let (host, status) = (&self.parts.host, response.status());
        let mut said = Vec::new();
        // An error's text is worth no error of its own.
        let _ = response.into_body().into_reader().take(SAID).read_to_end(&mut said);
        let said: String =
            String::from_utf8_lossy(&said).chars().filter(|letter| !letter.is_control()).collect();
        let remedy = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                "; sign in with docker login or podman login, if there is such an image"
            }
            StatusCode::NOT_FOUND => "; look at its name and tag",
            _ => "",
        };
        format!("{host} does not give out {path} of {} ({status}){remedy}: {said}", self.parts.repository)
    }

    /// The header to send from now on.
    fn sign_in(&self, headers: &HeaderMap) -> Result<String, String> {
        let asked = headers.get_all(header::WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let mut challenges: Vec<Challenge> = asked.filter_map(Challenge::parse).collect();
        // A token first, which is worth less to whoever sees it.
        challenges.sort_by_key(|challenge| *challenge == Challenge::Basic);
        let host = &self.parts.host;
        match (challenges.first(), &self.credentials) {
            (None, _) => Err(format!("{host} wants to know who asks, in a way that is not supported")),
            (Some(Challenge::Bearer(server)), _) => self.token(server),
            (Some(Challenge::Basic), Some(Credentials::Password { user, password })) => {
                Ok(basic(user, password))
            }
            (Some(Challenge::Basic), _) => {
                Err(format!("{host} wants a name and a password: sign in with docker login or podman login"))
            }
        }
    }

    fn token(&self, server: &TokenServer) -> Result<String, String> {
        let realm = &server.realm;
        // What is sent there may be a password.
        let safe = realm.starts_with("https://") || (self.parts.is_local() && realm.starts_with("http://"));
        if !safe {
            return Err(format!(
                "{} sends us to {realm} for a token, which is no https address",
                self.parts.host
            ));
        }
        let failed = |e: ureq::Error| format!("{realm} gives no token: {e}");
        let repository = &self.parts.repository;
        let response = match &self.credentials {
            Some(Credentials::Identity(token)) => {
                let service = server.service.as_deref().unwrap_or_default();
                let form = [
                    ("grant_type", "refresh_token"),
                    ("client_id", "vbd"),
                    ("service", service),
                    ("scope", &server.scope(repository)),
                    ("refresh_token", token),
                ];
                let form: Vec<String> =
                    form.iter().map(|(name, value)| format!("{name}={}", encoded(value))).collect();
                let request =
                    self.agent.post(realm).header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
                request.send(form.join("&")).map_err(failed)?
            }
            known => {
                let mut request = self.agent.get(server.url(repository));
                if let Some(Credentials::Password { user, password }) = known {
                    request = request.header(header::AUTHORIZATION, basic(user, password));
                }
                request.call().map_err(failed)?
            }
        };
        let status = response.status();
        if !status.is_success() {
            return Err(format!(
                "{realm} gives no token ({status}): sign in with docker login or podman login"
            ));
        }
        let mut bytes = Vec::new();
        let read = response.into_body().into_reader().take(TOKEN).read_to_end(&mut bytes);
        read.map_err(|e| format!("{realm} gives no token: {e}"))?;
        let token = token_in(&bytes).filter(|token| token.bytes().all(|byte| byte.is_ascii_graphic()));
        token
            .map(|token| format!("Bearer {token}"))
            .ok_or_else(|| format!("{realm} gives no token that can be read"))
    }
}

/// The token in an answer, by either of its names.
fn token_in(bytes: &[u8]) -> Option<String> {
    let answer: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    let token = answer.get("token").or_else(|| answer.get("access_token"))?;
    token.as_str().filter(|token| !token.is_empty()).map(str::to_owned)
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", packed(format!("{user}:{password}").as_bytes()))
}

/// Whom the host's administrator trusts.
fn certificates() -> Result<RootCerts, String> {
    let usual = [
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
        "/etc/ssl/ca-bundle.pem",
        "/etc/ssl/cert.pem",
    ];
    let chosen = std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty()).map(PathBuf::from);
    let paths = chosen.map_or_else(|| usual.map(PathBuf::from).to_vec(), |path| vec![path]);
    for path in &paths {
        let Ok(file) = File::open(path) else { continue };
        let mut text = Vec::new();
        let read = file.take(CERTIFICATES).read_to_end(&mut text);
        read.map_err(|e| format!("{} cannot be read: {e}", path.display()))?;
        let all = parse_pem(&text).filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        });
        return Ok(RootCerts::Specific(Arc::new(all.collect())));
    }
    Err("no certificates of authorities are installed: install the package ca-certificates, or set SSL_CERT_FILE".to_owned())
}

/// What this user has for a registry, in the first file that knows it.
fn credentials(host: &str) -> Result<Option<Credentials>, String> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let docker = variable("DOCKER_CONFIG").or_else(|| variable("HOME").map(|home| home.join(".docker")));
    let files = [
        variable("REGISTRY_AUTH_FILE"),
        variable("XDG_RUNTIME_DIR").map(|directory| directory.join("containers/auth.json")),
        docker.map(|directory| directory.join("config.json")),
    ];
    for path in files.into_iter().flatten() {
        let Ok(file) = File::open(&path) else { continue };
        let wrong = |reason: String| format!("{} {reason}", path.display());
        let mut content = Vec::new();
        file.take(CREDENTIALS)
            .read_to_end(&mut content)
            .map_err(|e| wrong(format!("cannot be read: {e}")))?;
        match find(&content, host).map_err(wrong)? {
            None => {}
            Some(Credentials::Helper(name)) => return ask(&name, host),
            found => return Ok(found),
        }
    }
    Ok(None)
}

/// Asks a program that keeps credentials (docker-credential-helpers' protocol); it may have none.
fn ask(name: &str, host: &str) -> Result<Option<Credentials>, String> {
    let program = format!("docker-credential-{name}");
    let failed =
        |e: std::io::Error| format!("{program}, which knows the password for {host}, cannot be run: {e}");
    let mut command = Command::new(&program);
    let mut child =
        command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
    let server = if host == "registry-1.docker.io" { "https://index.docker.io/v1/" } else { host };
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(server.as_bytes()).map_err(failed)?;
    }
    let output = child.wait_with_output().map_err(failed)?;
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Known {
        username: String,
        secret: String,
    }
    if !output.status.success() {
        return Ok(None);
    }
    let known: Known = serde_json::from_slice(&output.stdout)
        .map_err(|e| format!("{program} does not answer as it must: {e}"))?;
    Ok(Some(match known.username.as_str() {
        "<token>" => Credentials::Identity(known.secret),
        _ => Credentials::Password { user: known.username, password: known.secret },
    }))
}
