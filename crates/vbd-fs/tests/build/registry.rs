//! Container images out of registries: Debian's own, and one that behaves as it is told.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vbd_fs::{BuildOptions, Source};

use super::image;
use super::oci::{Layout, check, layer, layers, named, sha256, through};
use super::setting::{MIB, Scratch, build, options};

/// Runs the test `name` again with a home of its own, in which docker's file has this content.
fn with_credentials(name: &str, content: &Value, work: impl FnOnce()) {
    const INSIDE: &str = "VBD_TEST_CREDENTIALS";
    if std::env::var_os(INSIDE).is_some() {
        return work();
    }
    let scratch = Scratch::new();
    std::fs::write(scratch.path("config.json"), content.to_string()).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture"]).env(INSIDE, "1").env("DOCKER_CONFIG", scratch.path(""));
    let ran = command.env_remove("REGISTRY_AUTH_FILE").env_remove("XDG_RUNTIME_DIR").output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{said}{}", String::from_utf8_lossy(&ran.stderr));
    assert!(said.contains("1 passed"), "{name} is the name of no test: {said}");
}

fn from(reference: &str) -> BuildOptions {
    let mut options = options(32 * MIB, Path::new(""));
    options.spec.from = reference.parse::<Source>().unwrap();
    options.force = true;
    options
}

fn built(scratch: &Scratch, options: &BuildOptions) -> PathBuf {
    let path = scratch.path("image");
    build(&path, options).unwrap_or_else(|e| panic!("{}: {e}", options.spec.from));
    image::check(&path);
    path
}

fn refused(reference: &str) -> String {
    let scratch = Scratch::new();
    let error = build(&scratch.path("image"), &from(reference)).unwrap_err().to_string();
    assert_eq!(scratch.names(), Vec::<String>::new());
    error
}

/// Debian's registry on a port of this machine, stopped when dropped.
struct Registry {
    process: Child,
    port: u16,
    _scratch: Scratch,
}

impl Registry {
    fn start(users: Option<&str>) -> Registry {
        let scratch = Scratch::new();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut config = json!({
            "version": 0.1,
            "storage": {"filesystem": {"rootdirectory": scratch.path("data")}},
            "http": {"addr": format!("127.0.0.1:{port}")},
        });
        if let Some(users) = users {
            std::fs::write(scratch.path("users"), users).unwrap();
            config["auth"] = json!({"htpasswd": {"realm": "test", "path": scratch.path("users")}});
        }
        // JSON is YAML.
        std::fs::write(scratch.path("config"), config.to_string()).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(scratch.path("config")).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().unwrap();
        let registry = Registry { process, port, _scratch: scratch };
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(60), "the registry does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
        registry
    }

    /// Puts what is in a layout into it.
    fn push(&self, layout: &Path, name: &str, arguments: &[&str]) {
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]).args(arguments);
        skopeo
            .arg(format!("oci:{}", layout.display()))
            .arg(format!("docker://127.0.0.1:{}/{name}", self.port));
        let output = skopeo.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn reference(&self, name: &str) -> String {
        format!("docker://127.0.0.1:{}/{name}", self.port)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An index of two images in a layout: this machine's with the usual layers, and one for another.
fn two(layout: &Layout) -> Value {
    let this = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let mut here = layout.image(&layers());
    here["platform"] = json!({"os": "linux", "architecture": this});
    let mut there = layout.image(&[layer(&["f there of another machine"])]);
    there["platform"] = json!({"os": "linux", "architecture": "arm", "variant": "v7"});
    let kind = "application/vnd.oci.image.index.v1+json";
    layout.json(kind, &json!({"schemaVersion": 2, "mediaType": kind, "manifests": [here, there]}))
}

#[test]
fn images_come_out_of_a_registry() {
    let scratch = Scratch::new();
    let registry = Registry::start(None);
    let one = Layout::new(scratch.path("one"));
    one.index(&[named(one.image(&layers()), "v1")]);
    registry.push(&scratch.path("one"), "some/image:1.0", &[]);
    check(&built(&scratch, &from(&registry.reference("some/image:1.0"))));

    let several = Layout::new(scratch.path("several"));
    let index = named(two(&several), "v2");
    several.index(&[index]);
    registry.push(&scratch.path("several"), "several", &["--all"]);
    check(&built(&scratch, &from(&registry.reference("several"))));
    // Layers were compressed on the way, so that its digest is another.
    let several = registry.reference("several:latest");
    let raw = through("skopeo", &["inspect", "--raw", "--tls-verify=false", &several], b"");
    let digest = sha256(&raw);
    check(&built(&scratch, &from(&registry.reference(&format!("several@sha256:{digest}")))));
    let mut other = from(&registry.reference("several:latest"));
    other.spec.platform = Some("linux/arm/v7".parse().unwrap());
    assert_eq!(image::cat(&built(&scratch, &other), "/there"), "of another machine");
    other.spec.platform = Some("linux/arm/v6".parse().unwrap());
    let error = build(&scratch.path("image"), &other).unwrap_err().to_string();
    assert!(error.contains("has no image for linux/arm/v6"), "{error}");

    let error = refused(&registry.reference("some/image:2.0"));
    assert!(error.contains("404") && error.contains("look at its name and tag"), "{error}");
    let port = registry.port;
    drop(registry);
    let error = refused(&format!("docker://127.0.0.1:{port}/gone"));
    assert!(error.contains("cannot be reached"), "{error}");
}

#[test]
fn a_password_of_docker_login_is_used() {
    let me = String::from_utf8(through("base64", &["-w0"], b"me:secret")).unwrap();
    let config = json!({"auths": {"127.0.0.1": {}}});
    with_credentials("registry::a_password_of_docker_login_is_used", &config, || {
        let scratch = Scratch::new();
        // As htpasswd(1) has it with bcrypt.
        let program = "import crypt; print(crypt.crypt('secret', '$2b$05$abcdefghijklmnopqrstuu'), end='')";
        let hash = through("python3", &["-Wignore", "-c", program], b"");
        let users = format!("me:{}\n", String::from_utf8(hash).unwrap());
        let registry = Registry::start(Some(&users));
        let one = Layout::new(scratch.path("one"));
        one.index(&[named(one.image(&layers()), "v1")]);
        registry.push(&scratch.path("one"), "image", &["--dest-creds=me:secret"]);
        let error = refused(&registry.reference("image"));
        assert!(error.contains("wants a name and a password: sign in with docker login"), "{error}");
        let own = Path::new(&std::env::var_os("DOCKER_CONFIG").unwrap()).join("config.json");
        let known = json!({"auths": {format!("127.0.0.1:{}", registry.port): {"auth": me}}});
        std::fs::write(own, known.to_string()).unwrap();
        check(&built(&scratch, &from(&registry.reference("image"))));
    });
}

/// A request, without what nobody looks at.
#[derive(Debug, Clone)]
struct Request {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
    body: String,
}

/// An answer; `cut` is how much of its body is sent.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    cut: Option<usize>,
}

fn answer(status: u16, body: impl Into<Vec<u8>>) -> Answer {
    Answer { status, headers: Vec::new(), body: body.into(), cut: None }
}

/// A server that answers as it is told, and keeps what it was asked.
struct Fake {
    port: u16,
    asked: Arc<Mutex<Vec<Request>>>,
}

impl Fake {
    fn start(mut answer: impl FnMut(u16, &Request) -> Answer + Send + 'static) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&asked);
        // It ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let Some(request) = read_request(&stream) else { continue };
                kept.lock().unwrap().push(request.clone());
                let Answer { status, headers, body, cut } = answer(port, &request);
                let mut head =
                    format!("HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
                for (name, value) in headers {
                    head.push_str(&format!("{name}: {value}\r\n"));
                }
                head.push_str("\r\n");
                let sent = &body[..cut.unwrap_or(body.len())];
                // Who asked may have heard enough.
                let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(sent));
            }
        });
        Fake { port, asked }
    }

    fn reference(&self, name: &str) -> String {
        format!("docker://127.0.0.1:{}/{name}", self.port)
    }

    fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap().clone()
    }
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let length: usize = headers.get("content-length").map_or(Some(0), |length| length.parse().ok())?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Request { method, path, headers, body: String::from_utf8(body).ok()? })
}

/// An image of one layer as a registry gives it out: what is at each path below `/v2/`.
fn one_layer(name: &str, files: &[&str]) -> BTreeMap<String, Vec<u8>> {
    let tar = layer(files);
    let config =
        json!({"os": "linux", "rootfs": {"diff_ids": [format!("sha256:{}", sha256(&tar))]}}).to_string();
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(&tar).unwrap();
    let packed = packed.finish().unwrap();
    let blob = |kind: &str, bytes: &[u8]| json!({"mediaType": kind, "digest": format!("sha256:{}", sha256(bytes)), "size": bytes.len()});
    let manifest = json!({
        "schemaVersion": 2,
        "config": blob("application/vnd.oci.image.config.v1+json", config.as_bytes()),
        "layers": [blob("application/vnd.oci.image.layer.v1.tar+gzip", &packed)],
    });
    let mut all =
        BTreeMap::from([(format!("/v2/{name}/manifests/latest"), manifest.to_string().into_bytes())]);
    for bytes in [config.into_bytes(), packed] {
        all.insert(format!("/v2/{name}/blobs/sha256:{}", sha256(&bytes)), bytes);
    }
    all
}

fn the_layer(image: &BTreeMap<String, Vec<u8>>) -> String {
    let blobs = image.iter().filter(|(path, _)| path.contains("/blobs/"));
    blobs.max_by_key(|(_, bytes)| bytes.len()).unwrap().0.clone()
}

/// Files that stay large when they are packed.
fn large() -> Vec<String> {
    let noise = super::sample::noise(600_000);
    let text = |part: &[u8]| part.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    noise.chunks(100_000).enumerate().map(|(number, part)| format!("f file{number} {}", text(part))).collect()
}

#[test]
fn a_token_is_fetched_and_renewed_and_not_given_to_others() {
    let config = json!({"auths": {"127.0.0.1": {}}});
    with_credentials("registry::a_token_is_fetched_and_renewed_and_not_given_to_others", &config, || {
        let image = one_layer("a/b", &["f hello world"]);
        let layer = the_layer(&image);
        let blob = image[&layer].clone();
        let other = Fake::start(move |_, _| answer(200, blob.clone()));
        let elsewhere = format!("http://localhost:{}/blob", other.port);
        let mut tokens = 0;
        let served = image.clone();
        let fake = Fake::start(move |port, request| {
            if request.path.starts_with("/token") {
                tokens += 1;
                return answer(200, json!({"access_token": format!("t{tokens}")}).to_string());
            }
            // The first token is good for the manifest alone.
            let wanted = if request.path.contains("/manifests/") { "Bearer t1" } else { "Bearer t2" };
            if request.headers.get("authorization").map(String::as_str) != Some(wanted) {
                let mut refused = answer(401, "");
                let asked = format!("Bearer realm=\"http://127.0.0.1:{port}/token\",service=\"here\"");
                refused.headers.push(("WWW-Authenticate", asked));
                return refused;
            }
            if request.path == layer {
                let mut moved = answer(307, "");
                moved.headers.push(("Location", elsewhere.clone()));
                return moved;
            }
            served
                .get(&request.path)
                .map_or_else(|| answer(404, "no such"), |bytes| answer(200, bytes.clone()))
        });
        let host = format!("127.0.0.1:{}", fake.port);
        let own = Path::new(&std::env::var_os("DOCKER_CONFIG").unwrap()).join("config.json");
        let me = String::from_utf8(through("base64", &["-w0"], b"me:secret")).unwrap();
        std::fs::write(&own, json!({"auths": {host.as_str(): {"auth": me}}}).to_string()).unwrap();
        let scratch = Scratch::new();
        assert_eq!(image::cat(&built(&scratch, &from(&fake.reference("a/b"))), "/hello"), "world");
        let asked = fake.asked();
        let token = asked.iter().find(|request| request.path.starts_with("/token")).unwrap();
        assert_eq!(token.path, "/token?scope=repository:a/b:pull&service=here");
        assert_eq!(token.headers["authorization"], format!("Basic {me}"));
        assert_eq!(other.asked().len(), 1);
        assert!(!other.asked()[0].headers.contains_key("authorization"), "{:?}", other.asked());
        // A token that stands for a password is sent in a form, and to nobody else.
        std::fs::write(&own, json!({"auths": {host.as_str(): {"identitytoken": "id+"}}}).to_string())
            .unwrap();
        let before = asked.len();
        let _ = refused(&fake.reference("a/c"));
        let posted =
            fake.asked().split_off(before).into_iter().find(|request| request.method == "POST").unwrap();
        assert!(posted.path == "/token" && posted.body.contains("refresh_token=id%2B"), "{posted:?}");
        assert!(posted.body.contains("scope=repository:a/c:pull"), "{posted:?}");
    });
}

#[test]
fn a_connection_that_breaks_is_gone_on_with() {
    let files = large();
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    for ranges in [true, false] {
        let image = one_layer("a", &files);
        let layer = the_layer(&image);
        assert!(image[&layer].len() > 600_000, "{}", image[&layer].len());
        let (mut failures, mut cuts) = (1, 2);
        let fake = Fake::start(move |_, request| {
            if failures > 0 {
                failures -= 1;
                return answer(503, "busy");
            }
            let Some(bytes) = image.get(&request.path) else { return answer(404, "") };
            let from =
                request.headers.get("range").and_then(|range| range[6..].strip_suffix('-')?.parse().ok());
            let from: usize = from.filter(|_| ranges).unwrap_or(0);
            let mut given = answer(if from > 0 { 206 } else { 200 }, &bytes[from..]);
            if request.path.contains("/blobs/") && bytes.len() > 600_000 && cuts > 0 {
                cuts -= 1;
                given.cut = Some(if ranges { 300_001 } else { 300_001 + (1 - cuts) * 200_000 });
            }
            given
        });
        let scratch = Scratch::new();
        let made = built(&scratch, &from(&fake.reference("a")));
        assert_eq!(format!("f file5 {}", image::cat(&made, "/file5")), files[5]);
        let begun = fake
            .asked()
            .iter()
            .filter_map(|request| request.headers.get("range").cloned())
            .collect::<Vec<_>>();
        assert_eq!(begun.len(), 2, "{begun:?}");
        assert_eq!(begun[0], "bytes=300001-");
    }
}

#[test]
fn what_a_registry_says_is_checked() {
    let image = one_layer("a", &["f hello world"]);
    let layer = the_layer(&image);
    let manifest = "/v2/a/manifests/latest".to_owned();
    let digest = format!("sha256:{}", "ab".repeat(32));
    let with = |path: &str, bytes: Vec<u8>| {
        let mut changed = image.clone();
        changed.insert(path.to_owned(), bytes);
        changed
    };
    let mut damaged = image[&layer].clone();
    *damaged.last_mut().unwrap() ^= 1;
    let mut nameless = image.clone();
    nameless.insert(format!("/v2/a/manifests/{digest}"), image[&manifest].clone());
    let without_size = String::from_utf8(image[&manifest].clone()).unwrap().replace("\"size\"", "\"length\"");
    let cases = [
        (with(&layer, damaged), "a".to_owned(), "its digest is sha256:"),
        (with(&layer, b"short".to_vec()), "a".to_owned(), "cannot be fetched"),
        (with(&manifest, b"no json".to_vec()), "a".to_owned(), "is not as it must be"),
        (with(&manifest, vec![b' '; (4 << 20) + 1]), "a".to_owned(), "a manifest of more than"),
        (with(&manifest, without_size.into_bytes()), "a".to_owned(), "is missing in the image"),
        (nameless, format!("a@{digest}"), "the manifest's digest is"),
    ];
    for (served, name, reason) in cases {
        let fake = Fake::start(move |_, request| {
            served.get(&request.path).map_or_else(|| answer(404, ""), |bytes| answer(200, bytes.clone()))
        });
        let error = refused(&fake.reference(&name));
        assert!(error.contains(reason), "{error:?} lacks {reason:?}");
    }
    for (asked, reason) in [
        ("Bearer realm=\"ftp://x/token\"", "which is no https address"),
        ("Negotiate", "in a way that is not supported"),
    ] {
        let fake = Fake::start(move |_, _| {
            let mut refused = answer(401, "");
            refused.headers.push(("WWW-Authenticate", asked.to_owned()));
            refused
        });
        let error = refused(&fake.reference("a"));
        assert!(error.contains(reason), "{error:?} lacks {reason:?}");
    }
}
