//! Random changes, made to an image and to a tree in memory.

use proptest::prelude::*;
use vbd_ext4::edit::{Attributes, EditError, Editor, New};
use vbd_ext4::format::{FileType, ino::ROOT};

use crate::images::{KINDS, check, edit, image, part};
use crate::model::{Content, Node, Tree, number, read, read_from};
use crate::operations::attributes;

#[derive(Debug, Clone)]
enum Change {
    File { parent: usize, name: u16, size: usize, fill: u8 },
    Directory { parent: usize, name: u16 },
    Symlink { parent: usize, name: u16, length: usize },
    Special { parent: usize, name: u16 },
    Rewrite { which: usize, size: usize, fill: u8 },
    Link { parent: usize, name: u16, which: usize },
    Rename { which: usize, parent: usize, name: u16 },
    Remove { which: usize },
    RemoveAll { which: usize },
    Mode { which: usize, mode: u16 },
    Xattrs { which: usize, sizes: Vec<usize> },
    Commit,
    Reopen,
}

fn change() -> impl Strategy<Value = Change> {
    let size = || prop_oneof![0usize..300, 0usize..40_000, 0usize..1_500_000];
    let pick = || any::<u16>().prop_map(usize::from);
    let name = || prop_oneof![0u16..20, 0u16..2000];
    prop_oneof![
        8 => (pick(), name(), size(), any::<u8>()).prop_map(|(parent, name, size, fill)| Change::File { parent, name, size, fill }),
        4 => (pick(), name()).prop_map(|(parent, name)| Change::Directory { parent, name }),
        2 => (pick(), name(), 1usize..1023).prop_map(|(parent, name, length)| Change::Symlink { parent, name, length }),
        1 => (pick(), name()).prop_map(|(parent, name)| Change::Special { parent, name }),
        4 => (pick(), size(), any::<u8>()).prop_map(|(which, size, fill)| Change::Rewrite { which, size, fill }),
        3 => (pick(), name(), pick()).prop_map(|(parent, name, which)| Change::Link { parent, name, which }),
        4 => (pick(), pick(), name()).prop_map(|(which, parent, name)| Change::Rename { which, parent, name }),
        3 => pick().prop_map(|which| Change::Remove { which }),
        1 => pick().prop_map(|which| Change::RemoveAll { which }),
        2 => (pick(), 0u16..0o10000).prop_map(|(which, mode)| Change::Mode { which, mode }),
        2 => (pick(), proptest::collection::vec(0usize..500, 0..3)).prop_map(|(which, sizes)| Change::Xattrs { which, sizes }),
        2 => Just(Change::Commit),
        1 => Just(Change::Reopen),
    ]
}

/// Names of all lengths, the same for the same number.
fn name_of(number: u16) -> Vec<u8> {
    let length = 1 + usize::from(number) * 37 % 255;
    let mut name = format!("{number}").into_bytes();
    name.resize(name.len().max(length), b'\xe9');
    name
}

fn data(size: usize, fill: u8) -> Vec<u8> {
    // Every third piece of 4 KiB is a hole.
    (0..size).map(|at| if at / 4096 % 3 == 1 { 0 } else { fill }).collect()
}

fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    if path.is_empty() { name.to_vec() } else { [path, b"/", name].concat() }
}

fn parent_of(path: &[u8]) -> Vec<u8> {
    path.iter().rposition(|byte| *byte == b'/').map_or_else(Vec::new, |at| path[..at].to_vec())
}

fn name_in(path: &[u8]) -> Vec<u8> {
    path.iter().rposition(|byte| *byte == b'/').map_or_else(|| path.to_vec(), |at| path[at + 1..].to_vec())
}

fn is_below(path: &[u8], above: &[u8]) -> bool {
    above.is_empty() || path == above || path.starts_with(&[above, b"/"].concat())
}

/// The model: a tree, and which paths are one inode.
struct Model {
    tree: Tree,
    /// The inode's number by path, as the image has it.
    numbers: std::collections::BTreeMap<Vec<u8>, u32>,
}

impl Model {
    fn pick(&self, which: usize, wanted: impl Fn(&Node) -> bool) -> Option<Vec<u8>> {
        let all: Vec<&Vec<u8>> =
            self.tree.iter().filter(|(_, node)| wanted(node)).map(|(path, _)| path).collect();
        (!all.is_empty()).then(|| all[which % all.len()].clone())
    }

    fn directory(&self, which: usize) -> Vec<u8> {
        self.pick(which, |node| node.content == Content::Directory).expect("the root")
    }

    fn add(&mut self, path: Vec<u8>, ino: u32, content: Content, mode: u16) {
        if content == Content::Directory {
            self.tree.get_mut(&parent_of(&path)).unwrap().links += 1;
        }
        let links = if content == Content::Directory { 2 } else { 1 };
        self.tree.insert(path.clone(), Node { content, mode, owner: (7, 70_000), xattrs: Vec::new(), links });
        self.numbers.insert(path, ino);
    }

    /// Changes all names of an inode.
    fn all(&mut self, ino: u32, mut change: impl FnMut(&mut Node)) {
        for (path, number) in &self.numbers {
            if *number == ino {
                change(self.tree.get_mut(path).unwrap());
            }
        }
    }

    fn remove(&mut self, path: &[u8]) {
        let below: Vec<Vec<u8>> = self.tree.keys().filter(|other| is_below(other, path)).cloned().collect();
        if self.tree[path].content == Content::Directory {
            self.tree.get_mut(&parent_of(path)).unwrap().links -= 1;
        }
        for path in below {
            self.tree.remove(&path);
            let ino = self.numbers.remove(&path).unwrap();
            self.all(ino, |node| node.links -= 1);
        }
    }
}

fn apply(editor: &mut Editor, model: &mut Model, change: &Change) -> Result<(), EditError> {
    let at = |editor: &Editor, path: &[u8]| number(editor.filesystem(), path);
    match change {
        Change::File { parent, name, .. }
        | Change::Directory { parent, name }
        | Change::Symlink { parent, name, .. }
        | Change::Special { parent, name } => {
            let parent = model.directory(*parent);
            let name = name_of(*name);
            let path = join(&parent, &name);
            let target;
            let (new, content, mode) = match change {
                Change::File { size, fill, .. } => (New::File, Content::File(data(*size, *fill)), 0o644),
                Change::Directory { .. } => (New::Directory, Content::Directory, 0o755),
                Change::Symlink { length, .. } => {
                    target = vec![b's'; *length];
                    (New::Symlink(&target), Content::Symlink(target.clone()), 0o777)
                }
                _ => (New::Fifo, Content::Other(FileType::Fifo, (0, 0)), 0o600),
            };
            let directory = at(editor, &parent);
            let result = editor.create(directory, &name, new, &attributes(mode), &[]);
            if model.tree.contains_key(&path) {
                assert!(matches!(result, Err(EditError::Exists(_))));
                return Ok(());
            }
            let ino = result?;
            if let Content::File(bytes) = &content {
                editor.set_content(ino, &mut &bytes[..])?;
            }
            model.add(path, ino, content, mode);
        }
        Change::Rewrite { which, size, fill } => {
            let Some(path) = model.pick(*which, |node| matches!(node.content, Content::File(_))) else {
                return Ok(());
            };
            let ino = at(editor, &path);
            let bytes = data(*size, *fill);
            editor.set_content(ino, &mut &bytes[..])?;
            model.all(ino, |node| node.content = Content::File(bytes.clone()));
        }
        Change::Link { parent, name, which } => {
            let Some(from) = model.pick(*which, |node| node.content != Content::Directory) else {
                return Ok(());
            };
            let parent = model.directory(*parent);
            let name = name_of(*name);
            let path = join(&parent, &name);
            let (directory, ino) = (at(editor, &parent), at(editor, &from));
            let result = editor.link(directory, &name, ino);
            if model.tree.contains_key(&path) {
                assert!(matches!(result, Err(EditError::Exists(_))));
                return Ok(());
            }
            result?;
            let node = model.tree[&from].clone();
            model.tree.insert(path.clone(), node);
            model.numbers.insert(path, ino);
            model.all(ino, |node| node.links += 1);
        }
        Change::Rename { which, parent, name } => {
            let Some(from) = model.pick(*which, |_| true).filter(|path| !path.is_empty()) else {
                return Ok(());
            };
            let parent = model.directory(*parent);
            let name = name_of(*name);
            let to = join(&parent, &name);
            let (old, new) = (at(editor, &parent_of(&from)), at(editor, &parent));
            let result = editor.rename((old, &name_in(&from)), (new, &name));
            let is_directory = |path: &[u8]| model.tree[path].content == Content::Directory;
            if model.numbers.get(&to) == model.numbers.get(&from) {
                return result;
            }
            if model.tree.contains_key(&to) && (is_directory(&from) || is_directory(&to)) {
                assert!(matches!(result, Err(EditError::Exists(_))), "{result:?}");
                return Ok(());
            }
            if is_directory(&from) && is_below(&parent, &from) {
                assert!(matches!(result, Err(EditError::Kind { .. })), "{result:?}");
                return Ok(());
            }
            result?;
            if model.tree.contains_key(&to) {
                model.remove(&to);
            }
            if model.tree[&from].content == Content::Directory {
                model.tree.get_mut(&parent_of(&from)).unwrap().links -= 1;
                model.tree.get_mut(&parent).unwrap().links += 1;
            }
            let moved: Vec<Vec<u8>> =
                model.tree.keys().filter(|path| is_below(path, &from)).cloned().collect();
            for path in moved {
                let new = [&to[..], &path[from.len()..]].concat();
                let node = model.tree.remove(&path).unwrap();
                let ino = model.numbers.remove(&path).unwrap();
                model.tree.insert(new.clone(), node);
                model.numbers.insert(new, ino);
            }
        }
        Change::Remove { which } | Change::RemoveAll { which } => {
            let Some(path) = model.pick(*which, |_| true).filter(|path| !path.is_empty()) else {
                return Ok(());
            };
            let directory = at(editor, &parent_of(&path));
            let full = model.tree.keys().filter(|other| is_below(other, &path)).count() > 1;
            if matches!(change, Change::RemoveAll { .. }) {
                editor.remove_all(directory, &name_in(&path))?;
            } else {
                let result = editor.remove(directory, &name_in(&path));
                if full {
                    assert!(matches!(result, Err(EditError::NotEmpty(_))));
                    return Ok(());
                }
                result?;
            }
            model.remove(&path);
        }
        Change::Mode { which, mode } => {
            let Some(path) = model.pick(*which, |_| true) else { return Ok(()) };
            let ino = at(editor, &path);
            // Owners that come and go.
            let uid = u32::from(*mode) << (mode % 20);
            editor.set_attributes(ino, &Attributes { uid, ..attributes(*mode) })?;
            model.all(ino, |node| (node.mode, node.owner) = (*mode, (uid, 70_000)));
        }
        Change::Xattrs { which, sizes } => {
            let Some(path) = model.pick(*which, |_| true) else { return Ok(()) };
            let ino = at(editor, &path);
            let xattrs: Vec<_> = (0..)
                .zip(sizes)
                .map(|(number, size)| (format!("user.{number}").into_bytes(), vec![b'v'; *size / 2]))
                .collect();
            editor.set_xattrs(ino, &xattrs)?;
            model.all(ino, |node| node.xattrs.clone_from(&xattrs));
        }
        Change::Commit | Change::Reopen => {}
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn an_image_is_what_a_tree_in_memory_is(
        kind in 0..KINDS.len(),
        changes in proptest::collection::vec(change(), 1..120),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = image(&directory, &KINDS[kind], 64);
        let mut editor = edit(&path).unwrap();
        let tree = read(editor.filesystem());
        let mut model = Model { tree, numbers: [(Vec::new(), ROOT)].into() };
        // `lost+found` is not in the tree, and counts.
        let mut committed = read(editor.filesystem());
        for change in &changes {
            match change {
                Change::Commit => {
                    editor.commit().unwrap();
                    check(&path);
                    committed = model.tree.clone();
                }
                Change::Reopen => {
                    editor.commit().unwrap();
                    committed = model.tree.clone();
                    editor = edit(&path).unwrap();
                }
                _ => match apply(&mut editor, &mut model, change) {
                    Ok(()) => {}
                    // Blocks freed since the commit do not count: nothing was changed then.
                    Err(EditError::NoBlocks { .. }) => break,
                    Err(error) => panic!("{change:?}: {error}"),
                },
            }
        }
        if editor.commit().is_ok() {
            committed = model.tree.clone();
        }
        check(&path);
        prop_assert!(read_from(part(&path)) == committed, "the trees differ");
    }
}
