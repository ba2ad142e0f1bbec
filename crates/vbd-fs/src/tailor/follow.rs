//! Following a path in a tree: links, absolute ones too, mean this tree, and nothing leads out of it.

use std::collections::VecDeque;
use std::io;

use super::root::Kind;

/// How many links a path may lead through, as in the kernel.
const LINKS: u32 = 40;

/// A tree whose names can be looked up one by one.
pub(crate) trait Names {
    /// A directory of it.
    type Directory;
    /// What a name in a directory leads to.
    type Found;

    /// The directory that paths begin in.
    fn root(&self) -> io::Result<Self::Directory>;
    /// What has a name in a directory, not followed where it is a link; nothing where there is none.
    fn entry(&self, directory: &Self::Directory, name: &[u8]) -> io::Result<Option<Self::Found>>;
    /// What that is.
    fn kind(&self, found: &Self::Found) -> Kind;
    /// Where a link leads.
    fn target(&self, directory: &Self::Directory, name: &[u8], found: &Self::Found) -> io::Result<Vec<u8>>;
    /// The directory that a name leads to.
    fn enter(
        &self,
        directory: &Self::Directory,
        name: &[u8],
        found: &Self::Found,
    ) -> io::Result<Self::Directory>;
}

/// Where a path ends.
pub(crate) enum End<T: Names + ?Sized> {
    /// With a name in a directory, which need not be there.
    Name(T::Directory, Vec<u8>, Option<T::Found>),
    /// In a directory that was walked through: `/`, or one reached by `..`.
    Directory(T::Directory),
}

/// Walks a path name by name; a link as the last of it is followed where that is asked for.
///
/// # Errors
///
/// A directory of it is missing (ENOENT) or none (ENOTDIR), too many links (ELOOP); those of looking.
pub(crate) fn follow<T: Names + ?Sized>(tree: &T, path: &str, follow_last: bool) -> io::Result<End<T>> {
    let mut todo = parts(path.as_bytes());
    let mut here = tree.root()?;
    // The directories above: `..` goes back, and never beyond the first.
    let mut above: Vec<T::Directory> = Vec::new();
    let mut links = 0;
    while let Some(name) = todo.pop_front() {
        if name == b"." {
            continue;
        }
        if name == b".." {
            here = above.pop().unwrap_or(here);
            continue;
        }
        let Some(found) = tree.entry(&here, &name)? else {
            if todo.is_empty() {
                return Ok(End::Name(here, name, None));
            }
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        };
        match tree.kind(&found) {
            Kind::Link if follow_last || !todo.is_empty() => {
                links += 1;
                if links > LINKS {
                    return Err(io::Error::from_raw_os_error(libc::ELOOP));
                }
                let target = tree.target(&here, &name, &found)?;
                if target.starts_with(b"/") {
                    here = above.drain(..).next().unwrap_or(here);
                }
                for part in parts(&target).into_iter().rev() {
                    todo.push_front(part);
                }
            }
            _ if todo.is_empty() => return Ok(End::Name(here, name, Some(found))),
            Kind::Directory => {
                let below = tree.enter(&here, &name, &found)?;
                above.push(std::mem::replace(&mut here, below));
            }
            _ => return Err(io::Error::from_raw_os_error(libc::ENOTDIR)),
        }
    }
    Ok(End::Directory(here))
}

fn parts(path: &[u8]) -> VecDeque<Vec<u8>> {
    path.split(|&byte| byte == b'/').filter(|part| !part.is_empty()).map(<[u8]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Names with what they are: a link has a target.
    struct Map(BTreeMap<&'static str, (Kind, &'static str)>);

    impl Names for Map {
        type Directory = String;
        type Found = (Kind, &'static str);

        fn root(&self) -> io::Result<String> {
            Ok(String::new())
        }

        fn entry(&self, directory: &String, name: &[u8]) -> io::Result<Option<(Kind, &'static str)>> {
            let path = format!("{directory}/{}", String::from_utf8_lossy(name));
            Ok(self.0.get(path.as_str()).copied())
        }

        fn kind(&self, found: &(Kind, &'static str)) -> Kind {
            found.0
        }

        fn target(&self, _: &String, _: &[u8], found: &(Kind, &'static str)) -> io::Result<Vec<u8>> {
            Ok(found.1.into())
        }

        fn enter(&self, directory: &String, name: &[u8], _: &(Kind, &'static str)) -> io::Result<String> {
            Ok(format!("{directory}/{}", String::from_utf8_lossy(name)))
        }
    }

    #[test]
    fn nothing_leads_out() {
        let map = Map(BTreeMap::from([
            ("/a", (Kind::Directory, "")),
            ("/a/b", (Kind::Directory, "")),
            ("/a/f", (Kind::File, "")),
            ("/a/out", (Kind::Link, "../../../a/f")),
            ("/a/root", (Kind::Link, "/")),
            ("/a/b/up", (Kind::Link, "..")),
            ("/loop", (Kind::Link, "loop")),
            ("/dangling", (Kind::Link, "a/none")),
        ]));
        let end = |path: &str, last: bool| match follow(&map, path, last) {
            Ok(End::Name(directory, name, found)) => {
                let name = String::from_utf8(name).unwrap();
                format!("{directory}/{name}{}", if found.is_some() { "" } else { "?" })
            }
            Ok(End::Directory(directory)) => format!("{directory}/"),
            Err(error) => format!("{}", error.raw_os_error().unwrap()),
        };
        for (path, last, expected) in [
            ("/", true, "/"),
            ("..//../a/./b", true, "/a/b"),
            ("/a/out", true, "/a/f"),
            ("/a/out", false, "/a/out"),
            ("/a/root", true, "/"),
            ("/a/root/a/b/up/f", true, "/a/f"),
            ("/a/b/up", true, "/a/"),
            ("/a/b/../../../x", true, "/x?"),
            ("/dangling", true, "/a/none?"),
            ("/dangling/x", true, "2"),
            ("/a/f/x", true, "20"),
            ("/loop", true, "40"),
        ] {
            assert_eq!(end(path, last), expected, "{path}");
        }
    }
}
