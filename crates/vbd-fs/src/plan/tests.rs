use std::os::fd::OwnedFd;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::Silent;
use crate::entry::{Entry, Node as Kind, Sink, Special};
use crate::fill::Memory;
use crate::tailor::{Root, TreeRoot};

fn meta(mode: u32) -> Meta {
    // Of this user, who need not be root.
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Meta { mode, uid, gid, mtime: Time { seconds: 1_000_000_000, nanoseconds: 5 } }
}

const LIMIT: Limit = Limit { inodes: 1 << 20, bytes: 1 << 30 };

#[derive(Debug, Clone)]
enum Change {
    Write(String, Vec<u8>),
    Directory(String),
    Link(String, String),
    Remove(String),
}

/// Paths of few names, so that they meet.
fn paths() -> impl Strategy<Value = String> {
    let part = prop::sample::select(vec!["a", "b", "c", "..", "."]);
    prop::collection::vec(part, 1..4).prop_map(|parts| format!("/{}", parts.join("/")))
}

fn changes() -> impl Strategy<Value = Change> {
    let target = prop_oneof![paths(), paths().prop_map(|path| path[1..].to_owned())];
    prop_oneof![
        (paths(), prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(path, data)| Change::Write(path, data)),
        paths().prop_map(Change::Directory),
        (paths(), target).prop_map(|(path, target)| Change::Link(path, target)),
        paths().prop_map(Change::Remove),
    ]
}

fn apply(root: &mut dyn Root, change: &Change) -> bool {
    let done = match change {
        Change::Write(path, data) => root.write(path, &mut &data[..], &meta(0o644)),
        Change::Directory(path) => root.make_directory(path, &meta(0o755)),
        Change::Link(path, target) => root.symlink(path, target),
        Change::Remove(path) => root.remove(path),
    };
    done.is_ok()
}

/// Everything that a root tells of a path, but for the time and the owner of links, which is root's.
fn told(root: &dyn Root, path: &str) -> String {
    let plain = |found: Option<crate::tailor::Attributes>| found.map(|found| found.kind);
    let list = if matches!(root.look(path), Ok(Some(found)) if found.kind == crate::tailor::Kind::Directory) {
        root.list(path).ok()
    } else {
        None
    };
    format!(
        "{path} {:?} {:?} {:?} {list:?}",
        root.look(path).ok().map(plain),
        root.look_at_link(path).ok().map(plain),
        root.read(path).ok()
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// A plan takes changes as a real directory does, whatever links are in the way.
    #[test]
    fn a_plan_is_changed_as_a_directory_is(all in prop::collection::vec(changes(), 1..16)) {
        if rustix::process::geteuid().is_root() {
            let directory = tempfile::tempdir().unwrap();
            let fd = OwnedFd::from(std::fs::File::open(directory.path()).unwrap());
            let mut real = TreeRoot::new(fd);
            let mut memory = Memory;
            let plan = Plan::new(meta(0o755), None);
            let mut planned = Gather::new(plan, &mut memory, None, LIMIT, Time::default());
            for change in &all {
                prop_assert_eq!(apply(&mut real, change), apply(&mut planned, change), "{:?} of {:?}", change, all);
                for path in ["/", "/a", "/b", "/c", "/a/b", "/b/a", "/c/c", "/a/../b", "/a/a/a"] {
                    prop_assert_eq!(told(&real, path), told(&planned, path), "after {:?} of {:?}", change, all);
                }
            }
        }
    }
}

fn add<'a>(gather: &mut Gather<'_>, path: &'a str, node: Kind<'a>) -> Result<()> {
    gather.add(Entry { path: Path::new(path), meta: meta(0o644), xattrs: &[], node }, &mut Silent)
}

fn fifo<'a>() -> Kind<'a> {
    Kind::Device { kind: Special::Fifo, major: 0, minor: 0 }
}

#[test]
fn names_and_links_are_counted_and_ordered() {
    let mut memory = Memory;
    let mut gather = Gather::new(Plan::new(meta(0o755), None), &mut memory, None, LIMIT, Time::default());
    add(&mut gather, "b/x", fifo()).unwrap();
    add(&mut gather, "a", Kind::Symlink(Path::new("b"))).unwrap();
    add(&mut gather, "b/y", Kind::HardLink("b/x".into())).unwrap();
    add(&mut gather, "b\u{1}", Kind::Directory).unwrap();
    assert!(
        add(&mut gather, "a/x", fifo()).unwrap_err().to_string().contains("leads through a, which is no")
    );
    assert!(add(&mut gather, "z", Kind::HardLink("missing".into())).is_err());
    assert!(
        add(&mut gather, "z", Kind::HardLink("b".into())).unwrap_err().to_string().contains("a directory")
    );
    assert!(add(&mut gather, "b", fifo()).unwrap_err().to_string().contains("not empty"));
    let plan = gather.plan;
    let paths = |plan: &Plan| -> Vec<String> {
        let names = plan.directories().flat_map(|(_, names)| names);
        names.map(|name| plan.path(name).display().to_string()).collect()
    };
    assert_eq!(paths(&plan), ["a", "b", "b\u{1}", "b/x", "b/y"]);
    let counts = plan.counts();
    assert_eq!((counts.directories, counts.symlinks, counts.special, counts.hard_links), (3, 1, 1, 1));
    let mut plan = plan;
    let b = plan.target(plan.lookup(plan.root(), b"b").unwrap());
    let x = plan.lookup(b, b"x").unwrap();
    assert_eq!(plan.node(plan.target(x)).links, 2);
    assert!(plan.unlink(x).is_none());
    assert_eq!(plan.path(x), Path::new("b/x"));
    assert_eq!(paths(&plan), ["a", "b", "b\u{1}", "b/y"]);
    assert_eq!(plan.entries(b), 1);
}

#[test]
fn attributes_are_kept_once_and_times_have_a_limit() {
    let latest = Time { seconds: 1000, nanoseconds: 0 };
    let mut plan = Plan::new(meta(0o755), Some(latest));
    let some = vec![("user.a".into(), vec![1; 100])];
    for name in [&b"one"[..], b"two"] {
        let text = plan.add_text(b"to").unwrap();
        let (_, node) = plan.add(plan.root(), name, meta(0o755), &some, Body::Symlink(text)).unwrap();
        assert_eq!(plan.xattrs(node), some);
        assert_eq!(plan.node(node).meta.mtime, latest);
    }
    assert!(plan.bytes() < 2 * 100);
    let one = plan.target(plan.lookup(plan.root(), b"one").unwrap());
    plan.add_xattr(one, ("user.a".into(), vec![2]));
    assert_eq!(plan.xattrs(one), [("user.a".into(), vec![2])]);
    let two = plan.target(plan.lookup(plan.root(), b"two").unwrap());
    assert_eq!(plan.xattrs(two), some);
}

/// Entries beyond what there is room for are counted, and take no memory.
#[test]
fn what_is_beyond_the_limit_is_counted() {
    let mut memory = Memory;
    let limit = Limit { inodes: 10, bytes: 1 << 20 };
    let mut gather = Gather::new(Plan::new(meta(0o755), None), &mut memory, None, limit, Time::default());
    for i in 0..1000 {
        add(&mut gather, &i.to_string(), fifo()).unwrap();
    }
    assert!(gather.plan.nodes() < 20);
    assert_eq!(gather.plan.nodes() as u64 - 1 + gather.beyond.0, 1000);
}
