//! Key slots added and taken away: what QEMU and cryptsetup say, the power going meanwhile, and headers that lie.
#![allow(clippy::cast_possible_truncation, reason = "headers of tests are small")]

use std::path::Path;
use std::process::Command;

use vbd_luks::{FormatOptions, Header, LuksError, Secret, SlotChange, Which, format};
use vbd_testing::{Random, seeds};

fn secret(text: &str) -> Secret {
    Secret::new(text.into())
}

fn made() -> Vec<u8> {
    let options = FormatOptions { iterations: Some(1000), ..FormatOptions::default() };
    format(&secret("first"), &options).unwrap()
}

fn add(bytes: &[u8], key: &str, new: &str) -> Result<SlotChange, LuksError> {
    let room = bytes.len() as u64;
    Header::read(bytes).unwrap().add_key(bytes, room, &secret(key), &secret(new), Some(1000))
}

fn remove(bytes: &[u8], which: Which<'_>) -> Result<SlotChange, LuksError> {
    Header::read(bytes).unwrap().remove_key(bytes, bytes.len() as u64, which)
}

fn apply(bytes: &mut [u8], change: &SlotChange) {
    for step in &change.steps {
        bytes[step.offset as usize..][..step.bytes.len()].copy_from_slice(&step.bytes);
    }
}

fn opens(bytes: &[u8], key: &str) -> bool {
    Header::read(bytes).unwrap().unlock(bytes, &secret(key)).is_ok()
}

fn volume_key(bytes: &[u8], key: &str) -> Vec<u8> {
    Header::read(bytes).unwrap().unlock(bytes, &secret(key)).unwrap().key().bytes().to_vec()
}

/// Whether cryptsetup opens it with this key.
fn cryptsetup_opens(dir: &Path, bytes: &[u8], key: &str) -> bool {
    let (disk, file) = (dir.join("disk"), dir.join("key"));
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len() + (1 << 20), 0);
    std::fs::write(&disk, bytes).unwrap();
    std::fs::write(&file, key).unwrap();
    let mut command = Command::new("cryptsetup");
    command.args(["luksOpen", "--test-passphrase", "--key-file"]).args([&file, &disk]);
    command.output().expect("cryptsetup").status.success()
}

#[test]
fn keys_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = made();
    let key = volume_key(&bytes, "first");
    for number in 1..8 {
        let name = format!("key {number}");
        let change = add(&bytes, "first", &name).unwrap();
        assert_eq!(change.slots, [number]);
        apply(&mut bytes, &change);
        assert!(volume_key(&bytes, &name) == key && volume_key(&bytes, "first") == key);
    }
    assert_eq!(Header::read(&bytes[..]).unwrap().slots_in_use(), (0..8).collect::<Vec<_>>());
    assert!(add(&bytes, "first", "ninth").unwrap_err().to_string().contains("all eight key slots"));
    for name in ["first", "key 6", "key 7"] {
        assert!(cryptsetup_opens(dir.path(), &bytes, name), "{name}");
    }
    let gone = remove(&bytes, Which::Opened(&secret("first"))).unwrap();
    assert_eq!(gone.slots, [0]);
    apply(&mut bytes, &gone);
    assert!(!opens(&bytes, "first") && !cryptsetup_opens(dir.path(), &bytes, "first"));
    let change = remove(&bytes, Which::Number(6)).unwrap();
    apply(&mut bytes, &change);
    assert!(
        !opens(&bytes, "key 6") && opens(&bytes, "key 7") && cryptsetup_opens(dir.path(), &bytes, "key 7")
    );
    // A free slot is used again, and one key may open two.
    assert_eq!(add(&bytes, "key 5", "key 7").unwrap().slots, [0]);
    let change = add(&bytes, "key 5", "key 7").unwrap();
    apply(&mut bytes, &change);
    assert_eq!(Header::read(&bytes[..]).unwrap().opened(&bytes[..], &secret("key 7")).unwrap(), [0, 7]);
    assert_eq!(remove(&bytes, Which::Opened(&secret("key 7"))).unwrap().slots, [0, 7]);
    assert!(matches!(remove(&bytes, Which::Opened(&secret("none"))), Err(LuksError::WrongKey)));
    assert!(matches!(add(&bytes, "none", "new"), Err(LuksError::WrongKey)));
    assert!(remove(&bytes, Which::Number(6)).unwrap_err().to_string().contains("slot 6 is not in use"));
}

#[test]
fn the_last_key_stays() {
    let mut bytes = made();
    for which in [Which::Opened(&secret("first")), Which::Number(0)] {
        assert!(remove(&bytes, which).unwrap_err().to_string().contains("the last key"));
    }
    // Also where it is in two slots.
    let change = add(&bytes, "first", "first").unwrap();
    apply(&mut bytes, &change);
    assert!(
        remove(&bytes, Which::Opened(&secret("first"))).unwrap_err().to_string().contains("the last key")
    );
    let change = remove(&bytes, Which::Number(0)).unwrap();
    apply(&mut bytes, &change);
    assert!(opens(&bytes, "first"));
}

/// Every sector of what was written last is there or not: the key that stays opens it, and the other does where its slot is in
/// use. Once its slot is free, nothing brings it back.
#[test]
fn the_power_goes_while_keys_change() {
    for seed in seeds(4) {
        let mut random = Random::new(seed);
        let mut bytes = made();
        // The seventh slot lies in two sectors.
        let others = *random.one_of(&[0, 5, 6]);
        for number in 0..others {
            let change = add(&bytes, "first", &format!("key {number}")).unwrap();
            apply(&mut bytes, &change);
        }
        let added = add(&bytes, "first", "new").unwrap();
        look_at_cuts(&mut random, &mut bytes, &added, &["first"]);
        assert!(opens(&bytes, "new"));
        let removed = remove(&bytes, Which::Opened(&secret("first"))).unwrap();
        look_at_cuts(&mut random, &mut bytes, &removed, &["new"]);
        assert!(!opens(&bytes, "first") && opens(&bytes, "new"));
    }
}

fn look_at_cuts(random: &mut Random, bytes: &mut [u8], change: &SlotChange, stay: &[&str]) {
    for step in &change.steps {
        let start = step.offset as usize;
        for _ in 0..4 {
            let mut cut = bytes.to_vec();
            // By sectors of the disk, not of what is written.
            let mut at = start;
            while at < start + step.bytes.len() {
                let end = ((at / 512 + 1) * 512).min(start + step.bytes.len());
                if random.once_in(2) {
                    cut[at..end].copy_from_slice(&step.bytes[at - start..end - start]);
                }
                at = end;
            }
            for key in stay {
                assert!(opens(&cut, key), "{key} at {start}");
            }
        }
        bytes[start..start + step.bytes.len()].copy_from_slice(&step.bytes);
    }
}

/// Where a header says that a slot's material is over something else, nothing is written there.
#[test]
fn headers_that_lie_are_not_followed() {
    let mut good = made();
    let change = add(&good, "first", "second").unwrap();
    apply(&mut good, &change);
    let slot = |number: usize| 208 + number * 48;
    for (number, field, value) in [
        (2, 40, 0u32),     // over the header
        (2, 40, 1),        // over its end
        (2, 40, 8),        // over the first slot
        (2, 40, u32::MAX), // beyond everything
        (2, 44, 3999),     // another number of stripes
        (2, 44, u32::MAX), // more material than there can be
    ] {
        let mut bytes = good.clone();
        bytes[slot(number) + field..][..4].copy_from_slice(&value.to_be_bytes());
        let error = add(&bytes, "first", "third").unwrap_err();
        assert!(matches!(error, LuksError::Damaged(_)), "{number}, {field}, {value}: {error}");
    }
    // One that is to be wiped, and lies over another.
    let mut bytes = good.clone();
    let first = bytes[slot(0) + 40..][..4].to_vec();
    bytes[slot(1) + 40..][..4].copy_from_slice(&first);
    assert!(matches!(remove(&bytes, Which::Number(1)), Err(LuksError::Damaged(_))));
    // And where the room is less than the header says.
    let header = Header::read(&good[..]).unwrap();
    let room = 4096 + 256_000;
    assert!(header.add_key(&good[..], room, &secret("first"), &secret("x"), Some(1000)).is_err());
}
