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

    #[test]
    fn a_source_is_what_it_shows(text in prop_oneof![".*", "(debian|ubuntu)(:[a-z/.-]{0,9})?", "-"]) {
        if let Ok(source) = text.parse::<Source>() {
            prop_assert_eq!(source.to_string(), text.clone());
            prop_assert_eq!(text.parse::<Source>().unwrap(), source);
        } else {
            prop_assert!(text.is_empty() || text.contains('\0') || text.starts_with("debian:") || text.starts_with("ubuntu:"));
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
