//! An image that is not what it was made from is no image.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use vbd_fs::{BuildOptions, Error, Progress, Step};

use super::sample::noise;
use super::setting::{MIB, Scratch, build_with, options};

/// Damages the image before it is read back: it has no name, but this process has it open.
struct Damage<'a> {
    directory: &'a Path,
    /// What is looked for in it, and changed.
    bytes: &'a [u8],
    done: bool,
}

impl Progress for Damage<'_> {
    fn step(&mut self, step: Step, _total: Option<u64>) {
        if step != Step::Verify {
            return;
        }
        let mut descriptors = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
        let is_image = |path: &std::path::PathBuf| {
            std::fs::read_link(path)
                .is_ok_and(|to| to.parent() == Some(self.directory) && to.to_string_lossy().contains('#'))
        };
        let image = descriptors.find(is_image).unwrap();
        let image: File = OpenOptions::new().read(true).write(true).open(image).unwrap();
        let mut all = vec![0; usize::try_from(image.metadata().unwrap().len()).unwrap()];
        image.read_exact_at(&mut all, 0).unwrap();
        let at = all.windows(self.bytes.len()).position(|window| window == self.bytes).unwrap();
        image.write_all_at(&[!self.bytes[0]], at as u64).unwrap();
        self.done = true;
    }
}

#[test]
fn damage_is_found_before_the_image_has_a_name() {
    let scratch = Scratch::new();
    let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
    std::fs::create_dir(&tree).unwrap();
    let content = noise(10_000);
    std::fs::write(tree.join("file"), &content).unwrap();
    std::fs::write(tree.join("name to be found"), b"").unwrap();
    std::os::unix::fs::symlink("a target to be found", tree.join("link")).unwrap();
    let directory = file.parent().unwrap().canonicalize().unwrap();
    let options = BuildOptions { verify: true, ..options(8 * MIB, &tree) };
    for (bytes, place) in
        [(&content[5000..5100], "/file"), (b"name to be found", "/"), (b"a target to be found", "/link")]
    {
        let mut damage = Damage { directory: &directory, bytes, done: false };
        let error = build_with(&file, &options, &mut damage).unwrap_err();
        assert!(damage.done);
        assert!(matches!(&error, Error::Verify { path, .. } if path == Path::new(place)), "{error}");
        assert_eq!(scratch.names(), ["tree"]);
    }
    build_with(&file, &options, &mut vbd_fs::Silent).unwrap();
}
