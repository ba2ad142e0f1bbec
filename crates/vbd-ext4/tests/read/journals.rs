//! Journals of every version of checksums, as debugfs writes them: compared with what e2fsck replays.

use std::fs;

use vbd_ext4::read::Links;

use crate::sample;
use crate::support::{command, image, open, run, text};

#[test]
fn every_version_of_checksums() {
    for (features, journal, checksums) in [
        ("^metadata_csum", "jo", None),
        ("^metadata_csum,^64bit", "jo", None),
        ("metadata_csum", "jo -c -v 2", Some("journal_checksum_v2")),
        ("metadata_csum,^64bit", "jo -c -v 2", Some("journal_checksum_v2")),
        ("metadata_csum", "jo -c -v 3", Some("journal_checksum_v3")),
        ("metadata_csum,^64bit", "jo -c -v 3", Some("journal_checksum_v3")),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let tree = path.join("tree");
        fs::create_dir(&tree).unwrap();
        let old = sample::noise(3 * 1024, 1);
        fs::write(tree.join("changed"), &old).unwrap();
        fs::write(tree.join("revoked"), &old).unwrap();
        let image = image(path, Some(&tree), "16M", &["-t", "ext4", "-b", "1024", "-O", features]);
        let block = |name: &str, number: u64| {
            run("debugfs", &["-R", &format!("bmap /{name} {number}"), text(&image)]).trim().to_owned()
        };
        // One that looks like a block of the journal itself has to be escaped there.
        let mut new = sample::noise(1024, 2);
        new[..4].copy_from_slice(&0xC03B_3998u32.to_be_bytes());
        let file = path.join("new");
        fs::write(&file, &new).unwrap();
        let (changed, revoked) = (block("changed", 1), block("revoked", 1));
        let file = text(&file);
        let commands =
            format!("{journal}\njw -b {changed} {file}\njw -b {revoked} {file}\njw -r {revoked}\njc\n");
        fs::write(path.join("commands"), commands).unwrap();
        run("debugfs", &["-w", "-f", text(&path.join("commands")), text(&image)]);
        let said = run("dumpe2fs", &["-h", text(&image)]);
        assert!(checksums.is_none_or(|name| said.contains(name)), "{said}");

        let filesystem = open(&image).unwrap();
        assert_eq!((filesystem.replayed(), filesystem.notes()), (3, &[][..]));
        let content = |name: &str| {
            let inode = filesystem.lookup(name.as_bytes(), Links::Keep).unwrap();
            filesystem.read_all(&inode, 1 << 20).unwrap()
        };
        assert!(content("changed") == [&old[..1024], &new, &old[2048..]].concat(), "{features} {journal}");
        assert!(content("revoked") == old, "{features} {journal}");

        // e2fsck replays the same.
        let status = command("e2fsck", &["-fy", text(&image)]).status().unwrap();
        assert!(matches!(status.code(), Some(0 | 1)), "{status}");
        let after = open(&image).unwrap();
        assert_eq!(after.replayed(), 0);
        for name in ["changed", "revoked"] {
            let inode = after.lookup(name.as_bytes(), Links::Keep).unwrap();
            assert!(after.read_all(&inode, 1 << 20).unwrap() == content(name), "{features} {journal}");
        }
    }
}
