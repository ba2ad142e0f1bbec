//! What holds for any text and any bytes.

use std::path::Component;

use proptest::prelude::*;
use vbd_fs::tailor::Mount;
use vbd_fs::tar::{check, clean_path};
use vbd_fs::{Source, Tailor};

/// Paths made of what can go wrong in one.
fn paths() -> impl Strategy<Value = Vec<u8>> {
    let parts: [&[u8]; 8] = [b"..", b".", b"", b"a", b"...", b"\xff", b"\0", b"a.."];
    let part = prop::sample::select(parts.map(<[u8]>::to_vec).to_vec());
    prop::collection::vec(part, 0..8).prop_map(|parts| parts.join(&b'/'))
}

/// An archive's bytes, some of them replaced.
fn archives() -> impl Strategy<Value = Vec<u8>> {
    let kinds = prop::sample::select(b"0125346xgLKS7V".to_vec());
    let entry = (kinds, paths(), prop::collection::vec(any::<u8>(), 0..700));
    let change = (any::<prop::sample::Index>(), any::<u8>());
    (prop::collection::vec(entry, 0..5), prop::collection::vec(change, 0..3), any::<bool>()).prop_map(
        |(entries, changes, end)| {
            let mut bytes = Vec::new();
            for (kind, path, data) in entries {
                let mut header = if kind == b'S' { tar::Header::new_gnu() } else { tar::Header::new_ustar() };
                header.as_old_mut().name[..path.len()].copy_from_slice(&path);
                header.set_entry_type(tar::EntryType::new(kind));
                header.set_size(data.len() as u64);
                header.set_mode(0o644);
                header.set_cksum();
                bytes.extend_from_slice(header.as_bytes());
                bytes.extend_from_slice(&data);
                bytes.resize(bytes.len().next_multiple_of(512), 0);
            }
            if end {
                bytes.resize(bytes.len() + 1024, 0);
            }
            for (at, byte) in changes {
                if !bytes.is_empty() {
                    let at = at.index(bytes.len());
                    bytes[at] = byte;
                }
            }
            bytes
        },
    )
}

/// A layer of a few short names.
fn layers() -> impl Strategy<Value = Vec<u8>> {
    let name =
        || prop::sample::select(vec!["a", "b", "lib", ".wh.a", ".wh.b", ".wh.lib", ".wh..wh..opq", ".wh."]);
    let path = move || prop::collection::vec(name(), 1..4).prop_map(|names| names.join("/"));
    let entry = (prop::sample::select(b"00125".to_vec()), path(), path(), any::<bool>());
    prop::collection::vec(entry, 0..12).prop_map(|entries| {
        let mut bytes = Vec::new();
        for (kind, path, target, up) in entries {
            let mut header = tar::Header::new_ustar();
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            let target = if up && kind == b'2' { format!("../../{target}") } else { target };
            header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
            header.set_entry_type(tar::EntryType::new(kind));
            header.set_size(0);
            header.set_mode(0o755);
            header.set_cksum();
            bytes.extend_from_slice(header.as_bytes());
        }
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_clean_path_stays_inside(raw in prop_oneof![paths(), prop::collection::vec(any::<u8>(), 0..40)]) {
        let dirty = raw.first().is_none_or(|&b| b == b'/') || raw.contains(&0) || raw.split(|&b| b == b'/').any(|p| p == b"..");
        match clean_path(&raw) {
            Ok(path) => {
                prop_assert!(!dirty);
                prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))), "{path:?}");
                let wanted = raw.split(|&b| b == b'/').filter(|p| !p.is_empty() && *p != b".").count();
                prop_assert_eq!(path.components().count(), wanted);
            }
            Err(_) => prop_assert!(dirty),
        }
    }

    #[test]
    fn any_archive_is_read_or_refused(bytes in archives()) {
        let _ = check(&bytes[..]);
    }

    /// Archives that were packed by others, with a few bytes replaced or cut off.
    #[test]
    fn any_packed_tree_is_read_or_refused(
        kind in prop::sample::select(vec!["cpio", "squashfs"]),
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        end in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let kept = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(kind);
        let mut all: Vec<_> = std::fs::read_dir(kept).unwrap().map(|entry| entry.unwrap().path()).collect();
        all.sort();
        let mut bytes = std::fs::read(which.get(&all)).unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(end) = end {
            bytes.truncate(end.index(bytes.len()));
        }
        match kind {
            "cpio" => drop(vbd_fs::cpio::check(&bytes[..])),
            _ => vbd_fs::squashfs::fuzz(&bytes),
        }
    }

    /// Layers with whiteouts and links between the names of other layers: a tree comes out, or an error.
    #[test]
    fn any_layers_are_applied_or_refused(layers in (layers(), layers())) {
        let mut bytes = u16::try_from(layers.0.len() / 512).unwrap().to_le_bytes().to_vec();
        bytes.extend(layers.0);
        bytes.extend(layers.1);
        vbd_fs::oci::fuzz_layers(&bytes);
    }

    /// What describes an image, with a part of it replaced.
    #[test]
    fn any_description_is_read_or_refused(at in any::<prop::sample::Index>(), with in ".{0,20}") {
        let digest = "ab".repeat(32);
        let text = format!(
            "{{\"manifests\": [{{\"mediaType\": \"a\", \"digest\": \"sha256:{digest}\", \"size\": 5}}], \
             \"config\": {{\"digest\": \"sha256:{digest}\"}}, \"layers\": [], \"rootfs\": {{\"diff_ids\": [\"{digest}\"]}}}}"
        );
        vbd_fs::oci::fuzz(text.as_bytes());
        let at = at.index(text.len());
        vbd_fs::oci::fuzz(format!("{}{with}{}", &text[..at], &text[at..]).as_bytes());
    }

    /// References, challenges and credentials, and what is nearly one.
    #[test]
    fn what_leads_to_a_registry_is_read_or_refused(
        text in prop_oneof![
            "docker://[a-z0-9.:\\[\\]/@_-]{0,30}", "[Bb]earer (realm|scope|service)=[\"a-z:/?&\\\\, =]{0,40}",
            "\\{\"auths\": \\{\"(docker.io|h)\": \\{\"auth\": \"[a-zA-Z0-9+/=]{0,12}\"\\}\\}\\}",
        ],
    ) {
        vbd_fs::oci::fuzz_registry(text.as_bytes());
    }

    #[test]
    fn a_source_is_what_it_shows(text in prop_oneof![".*", "(debian|ubuntu|oci|docker-archive|docker)(:[a-z/.:-]{0,9})?", "-"]) {
        if let Ok(source) = text.parse::<Source>() {
            prop_assert_eq!(source.to_string(), text.clone());
            prop_assert_eq!(text.parse::<Source>().unwrap(), source);
        } else {
            prop_assert!(text.is_empty() || text.contains('\0') || ["debian:", "ubuntu:", "oci:", "docker-archive:", "docker://"].iter().any(|prefix| text.starts_with(prefix)));
        }
    }

    #[test]
    fn a_mount_is_one_line(text in "[/a-z:=# \n\t-]{0,30}") {
        if let Ok(mount) = text.parse::<Mount>() {
            prop_assert!(!mount.to_string().contains(char::is_whitespace));
            prop_assert_eq!(mount.to_string().parse::<Mount>().unwrap(), mount);
        }
    }

    #[test]
    fn any_text_is_a_tailoring_or_an_error(text in ".{0,60}") {
        let _ = Tailor::from_toml(&text);
    }
}
