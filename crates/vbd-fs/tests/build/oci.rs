//! Container images as sources: layers on layers, in every form in which they are stored.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use vbd_fs::{BuildOptions, Error, Source};

use super::image;
use super::setting::{MIB, Scratch, build, options};

/// A tar of a layer, made of lines: `d PATH`, `f PATH TEXT`, `l PATH TARGET` (symbolic), `h PATH TARGET` (hard).
pub(crate) fn layer(lines: &[&str]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for line in lines {
        let mut words = line.splitn(3, ' ');
        let (kind, path, rest) =
            (words.next().unwrap(), words.next().unwrap(), words.next().unwrap_or_default());
        let mut header = tar::Header::new_gnu();
        header.set_mode(if kind == "d" { 0o755 } else { 0o640 });
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(1_600_000_000);
        header.set_size(0);
        match kind {
            "d" => header.set_entry_type(tar::EntryType::Directory),
            "l" => header.set_entry_type(tar::EntryType::Symlink),
            "h" => header.set_entry_type(tar::EntryType::Link),
            _ => header.set_size(rest.len() as u64),
        }
        if matches!(kind, "l" | "h") {
            tar.append_link(&mut header, path, rest).unwrap();
        } else {
            tar.append_data(&mut header, path, if kind == "f" { rest.as_bytes() } else { b"" }).unwrap();
        }
    }
    tar.into_inner().unwrap()
}

pub(crate) fn through(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut command = Command::new(program);
    let mut child = command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program}");
    output.stdout
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    String::from_utf8(through("sha256sum", &[], bytes)).unwrap()[..64].to_owned()
}

/// An OCI layout in a directory.
pub(crate) struct Layout(PathBuf);

impl Layout {
    pub(crate) fn new(path: PathBuf) -> Layout {
        std::fs::create_dir_all(path.join("blobs/sha256")).unwrap();
        std::fs::write(path.join("oci-layout"), "{\"imageLayoutVersion\": \"1.0.0\"}").unwrap();
        Layout(path)
    }

    /// Adds a blob and gives its descriptor.
    pub(crate) fn blob(&self, kind: &str, bytes: &[u8]) -> Value {
        let digest = sha256(bytes);
        std::fs::write(self.0.join("blobs/sha256").join(&digest), bytes).unwrap();
        json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": bytes.len()})
    }

    pub(crate) fn json(&self, kind: &str, value: &Value) -> Value {
        self.blob(kind, value.to_string().as_bytes())
    }

    /// Adds an image of layers, each compressed in its own way, and gives its manifest's descriptor.
    pub(crate) fn image(&self, layers: &[Vec<u8>]) -> Value {
        let ids: Vec<String> = layers.iter().map(|layer| format!("sha256:{}", sha256(layer))).collect();
        let stored = layers.iter().enumerate().map(|(number, layer)| match number % 3 {
            0 => self.blob("application/vnd.oci.image.layer.v1.tar+gzip", &through("gzip", &["-n"], layer)),
            1 => self.blob("application/vnd.oci.image.layer.v1.tar+zstd", &through("zstd", &["-q"], layer)),
            _ => self.blob("application/vnd.oci.image.layer.v1.tar", layer),
        });
        let stored: Vec<Value> = stored.collect();
        let config =
            json!({"architecture": "any", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ids}});
        let config = self.json("application/vnd.oci.image.config.v1+json", &config);
        let kind = "application/vnd.oci.image.manifest.v1+json";
        self.json(kind, &json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": stored}))
    }

    pub(crate) fn index(&self, manifests: &[Value]) {
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        std::fs::write(self.0.join("index.json"), index.to_string()).unwrap();
    }
}

pub(crate) fn named(mut descriptor: Value, name: &str) -> Value {
    descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": name});
    descriptor
}

fn from(source: &str) -> BuildOptions {
    let mut options = options(32 * MIB, Path::new(""));
    options.spec.from = source.parse::<Source>().unwrap();
    options
}

/// The file that a build from `source` makes, checked.
fn built(scratch: &Scratch, source: &str) -> PathBuf {
    let path = scratch.path("image");
    let mut options = from(source);
    options.force = true;
    build(&path, &options).unwrap_or_else(|e| panic!("{source}: {e}"));
    image::check(&path);
    path
}

pub(crate) fn layers() -> Vec<Vec<u8>> {
    vec![
        layer(&[
            "d etc",
            "f etc/kept of the first",
            "f etc/replaced old",
            "f etc/gone x",
            "d opaque",
            "f opaque/old x",
            "d opaque/below",
            "f opaque/below/old x",
            "d tree",
            "d tree/deep",
            "f tree/deep/file x",
            "d usr",
            "d usr/lib",
            "l lib usr/lib",
            "f first linked",
            "d becomes-file",
            "f becomes-file/x x",
            "f becomes-directory x",
        ]),
        layer(&[
            "f etc/replaced new",
            "f etc/.wh.gone ",
            // What this layer has stays, before and after the mark.
            "d opaque",
            "f opaque/before kept",
            "f opaque/.wh..wh..opq ",
            "f opaque/below/after kept",
            "f .wh.tree ",
            "f .wh.was-never-there ",
            "f lib/through the link",
            "h second first",
            "f becomes-file text",
            "d becomes-directory",
            "f becomes-directory/y y",
            "f .wh..wh.plnk mark",
        ]),
        layer(&["f tree new file of that name", "h third lib/through", "d opaque/below/more"]),
    ]
}

pub(crate) fn check(image: &Path) {
    let read = |path: &str| image::cat(image, path);
    assert_eq!((read("/etc/kept"), read("/etc/replaced")), ("of the first".into(), "new".into()));
    assert_eq!(read("/tree"), "new file of that name");
    assert_eq!((read("/opaque/before"), read("/opaque/below/after")), ("kept".into(), "kept".into()));
    assert_eq!(read("/usr/lib/through"), "the link");
    assert_eq!((read("/first"), read("/second")), ("linked".into(), "linked".into()));
    assert_eq!(image::entry(image, "/first").links, 2);
    assert_eq!(image::entry(image, "/third").links, 2);
    assert_eq!((read("/becomes-file"), read("/becomes-directory/y")), ("text".into(), "y".into()));
    for path in [
        "/etc/gone",
        "/opaque/old",
        "/opaque/below/old",
        "/.wh..wh.plnk",
        "/etc/.wh.gone",
        "/opaque/.wh..wh..opq",
    ] {
        assert!(!image::has(image, path), "{path}");
    }
}

#[test]
fn layers_in_a_layout() {
    let scratch = Scratch::new();
    let layout = Layout::new(scratch.path("layout"));
    let chosen = named(layout.image(&layers()), "v1");
    layout.index(std::slice::from_ref(&chosen));
    let path = scratch.path("layout");
    check(&built(&scratch, &format!("oci:{}", path.display())));

    // An index of images for several machines, and another name beside it.
    let other = layout.image(&[layer(&["f other x"])]);
    let platform = |mut descriptor: Value, architecture: &str| {
        descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
        descriptor
    };
    let here = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let index =
        json!({"schemaVersion": 2, "manifests": [platform(other.clone(), "s390x"), platform(chosen, here)]});
    let index = layout.json("application/vnd.oci.image.index.v1+json", &index);
    layout.index(&[named(index, "all"), named(other, "other")]);
    check(&built(&scratch, &format!("oci:{}:all", path.display())));
    let error = build(&scratch.path("x"), &from(&format!("oci:{}", path.display()))).unwrap_err().to_string();
    assert!(error.contains("several images") && error.contains("all, other"), "{error}");
    let error =
        build(&scratch.path("x"), &from(&format!("oci:{}:none", path.display()))).unwrap_err().to_string();
    assert!(error.contains("no image \"none\""), "{error}");
}

/// An archive of a directory.
fn packed(scratch: &Scratch, directory: &Path) -> PathBuf {
    let path = scratch.path("saved.tar");
    let mut command = Command::new("tar");
    assert!(command.arg("-C").arg(directory).arg("-cf").arg(&path).arg(".").status().unwrap().success());
    path
}

#[test]
fn what_docker_saves() {
    let scratch = Scratch::new();
    let directory = scratch.path("saved");
    let layers = layers();
    let ids: Vec<String> = layers.iter().map(|layer| format!("sha256:{}", sha256(layer))).collect();
    let mut names = Vec::new();
    for (number, layer) in layers.iter().enumerate() {
        let name = format!("{number}/layer.tar");
        std::fs::create_dir_all(directory.join(number.to_string())).unwrap();
        if number == 1 {
            // A link to a layer of another image, as the old form has it.
            std::fs::create_dir_all(directory.join("shared")).unwrap();
            std::fs::write(directory.join("shared/layer.tar"), layer).unwrap();
            std::os::unix::fs::symlink("../shared/layer.tar", directory.join(&name)).unwrap();
        } else {
            std::fs::write(directory.join(&name), layer).unwrap();
        }
        names.push(name);
    }
    let write = |name: &str, value: Value| std::fs::write(directory.join(name), value.to_string()).unwrap();
    write("config.json", json!({"rootfs": {"diff_ids": ids}}));
    let image = json!({"Config": "config.json", "RepoTags": ["vm:latest"], "Layers": names});
    write("manifest.json", json!([image, {"Config": "x", "RepoTags": null, "Layers": []}]));
    let archive = packed(&scratch, &directory);
    for name in ["vm", "vm:latest"] {
        check(&built(&scratch, &format!("docker-archive:{}:{name}", archive.display())));
    }

    // The same with a layout in it, as docker does since version 25.
    let layout = Layout::new(directory.clone());
    layout.index(&[named(layout.image(&layers), "latest")]);
    let archive = packed(&scratch, &directory);
    check(&built(&scratch, &format!("docker-archive:{}", archive.display())));

    let squeezed = scratch.path("squeezed");
    std::fs::write(&squeezed, through("gzip", &[], b"x")).unwrap();
    let error =
        build(&scratch.path("x"), &from(&format!("docker-archive:{}", squeezed.display()))).unwrap_err();
    assert!(error.to_string().contains("is compressed"), "{error}");
}

#[test]
fn what_does_not_match_its_digest() {
    let scratch = Scratch::new();
    let path = scratch.path("layout");
    let source = format!("oci:{}", path.display());
    let refused = |what: &str| {
        let error = build(&scratch.path("x"), &from(&source)).unwrap_err();
        assert!(
            matches!(error, Error::Archive { .. }) && error.to_string().contains(what),
            "{what}: {error}"
        );
        assert!(!scratch.path("x").exists());
    };
    let layout = Layout::new(path.clone());
    let blob = |descriptor: &Value| {
        path.join("blobs/sha256").join(&descriptor["digest"].as_str().unwrap()["sha256:".len()..])
    };
    let flip = |path: &Path, place: usize| {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[place] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    let manifest = layout.image(&layers());
    layout.index(std::slice::from_ref(&manifest));
    flip(&blob(&manifest), 3);
    refused("is damaged or not what it says");
    flip(&blob(&manifest), 3);

    let described: Value = serde_json::from_slice(&std::fs::read(blob(&manifest)).unwrap()).unwrap();
    // The third layer is a plain tar: a byte of a file's content.
    let third = blob(&described["layers"][2]);
    flip(&third, 512);
    refused("layer 3 of 3");
    refused("is damaged or not what it says");
    flip(&third, 512);
    let first = std::fs::read(blob(&described["layers"][0])).unwrap();
    std::fs::write(blob(&described["layers"][0]), &first[..first.len() - 8]).unwrap();
    refused("bytes and not what its manifest says");
    std::fs::remove_file(blob(&described["layers"][0])).unwrap();
    refused("is missing in the image");

    let config = json!({"rootfs": {"diff_ids": [format!("sha256:{}", "0".repeat(64))]}});
    let config = layout.json("application/vnd.oci.image.config.v1+json", &config);
    let tar = layout.blob("application/vnd.oci.image.layer.v1.tar", &layer(&["f a x"]));
    layout.index(&[layout.json("", &json!({"config": config, "layers": [tar]}))]);
    refused("is damaged or not what it says");
    let odd = layout.blob("application/x-other", &layer(&["f a x"]));
    layout.index(&[layout.json("", &json!({"config": config, "layers": [odd]}))]);
    refused("unknown type \"application/x-other\"");
    for bad in ["md5:abc", "sha256:../../../etc/passwd"] {
        layout.index(&[json!({"mediaType": "", "digest": bad})]);
        refused("is no SHA-256 digest");
    }
}

#[test]
fn a_layer_that_leads_out() {
    let scratch = Scratch::new();
    let layout = Layout::new(scratch.path("layout"));
    layout.index(&[layout.image(&[
        layer(&["l out ../../../..", "l absolute /", "l loop loop"]),
        layer(&["f out/inside text", "f absolute/too text"]),
    ])]);
    let source = format!("oci:{}", scratch.path("layout").display());
    let image = built(&scratch, &source);
    assert_eq!((image::cat(&image, "/inside"), image::cat(&image, "/too")), ("text".into(), "text".into()));
    layout.index(&[layout.image(&[layer(&["l loop loop"]), layer(&["f loop/x x"])])]);
    let error = build(&scratch.path("x"), &from(&source)).unwrap_err().to_string();
    assert!(error.contains("too many links"), "{error}");
}

/// What a later layer replaces makes room for what replaces it; the same layers make the same bytes then, too.
#[test]
fn layers_together_are_larger_than_the_image() {
    let scratch = Scratch::new();
    let source = Layout::new(scratch.path("layout"));
    let layers: Vec<Vec<u8>> = ["a", "b", "c", "d"]
        .iter()
        .map(|letter| {
            layer(&[&format!("f small-{letter} text"), &format!("f large {}", letter.repeat(9 << 20))])
        })
        .collect();
    source.index(&[source.image(&layers)]);
    let from = format!("oci:{}", scratch.path("layout").display());
    let mut options = from_layers(&from);
    let images = ["one", "two"].map(|name| scratch.path(name));
    for image in &images {
        build(image, &options).unwrap();
        image::check(image);
        assert!(image::cat(image, "/large") == "d".repeat(9 << 20));
        assert_eq!(image::cat(image, "/small-b"), "text");
    }
    let [one, two] = images.map(|image| std::fs::read(image).unwrap());
    assert!(one == two, "the images differ");
    // Twice as much at one time is too much.
    options.spec.from = {
        let both = layer(&[
            &format!("f first {}", "e".repeat(14 << 20)),
            &format!("f second {}", "f".repeat(14 << 20)),
        ]);
        source.index(&[source.image(&[layers[0].clone(), both])]);
        from.parse().unwrap()
    };
    let error = build(&scratch.path("three"), &options).unwrap_err();
    assert!(matches!(error, Error::NoRoom(_)), "{error}");
}

fn from_layers(source: &str) -> BuildOptions {
    BuildOptions { time: Some(vbd_fs::Time { seconds: 1_700_000_000, nanoseconds: 0 }), ..from(source) }
}
