//! What the toolstack says is to be served: the `params` of a device.

use std::path::PathBuf;

use vbd_formats::{Format, FormatError};

/// A device's target, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// The file or block device; its path is absolute.
    pub(crate) path: PathBuf,
    /// Its format.
    pub(crate) format: Format,
    /// `w!:` in front of it: write although others may, which xl has no other way to say.
    pub(crate) forced: bool,
}

/// Prefixes that say nothing: of xend, of libxl for its device model, and the own one.
const IGNORED: [&str; 6] = ["vbd", "file", "phy", "aio", "tap", "host"];

/// Reads `/path`, `aio:/path`, `raw:/path`, `w!:/path` and what can be made of these. A format is told, never guessed.
///
/// # Errors
/// The text for people that says what to write instead.
pub(crate) fn parse(params: &str) -> Result<Target, String> {
    let mut target = Target { path: PathBuf::new(), format: Format::Raw, forced: false };
    let mut rest = params;
    while !rest.starts_with('/') {
        let Some((prefix, after)) = rest.split_once(':') else {
            return Err(format!(
                "`{}` is no absolute path: name the file or block device as `target=/path/to/file`",
                params.escape_debug()
            ));
        };
        match prefix {
            "w!" => target.forced = true,
            prefix if IGNORED.contains(&prefix) => {}
            prefix => target.format = prefix.parse().map_err(|error: FormatError| error.to_string())?,
        }
        rest = after;
    }
    if rest.contains('\0') {
        return Err(format!("`{}` has a NUL in it", params.escape_debug()));
    }
    target.path = rest.into();
    Ok(target)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn prefixes_are_taken_off_and_formats_told() {
        for params in ["/srv/vm1disk", "aio:/srv/vm1disk", "raw:/srv/vm1disk", "tap:aio:/srv/vm1disk"] {
            let target = parse(params).unwrap();
            assert_eq!(
                (target.path.as_path(), target.forced),
                (Path::new("/srv/vm1disk"), false),
                "{params}"
            );
        }
        assert!(parse("w!:/srv/shared").unwrap().forced);
        assert_eq!(parse("/srv/a:b").unwrap().path, Path::new("/srv/a:b"), "a colon in a path is its own");
        assert_eq!(parse("tap:qcow2:/srv/a").unwrap().format, Format::Qcow2);
        assert!(parse("qed:/srv/a").unwrap_err().contains("qemu-img convert"));
        assert!(parse("nonsense:/srv/a").unwrap_err().contains("unknown format `nonsense`"));
        for relative in ["", "vm1disk", "raw:", "vg/root"] {
            assert!(parse(relative).unwrap_err().contains("no absolute path"), "{relative}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_written_gives_an_absolute_path_or_an_error(params in "(raw:|w!:|aio:|:|/|\\PC|\0){0,20}") {
            if let Ok(target) = parse(&params) {
                prop_assert!(target.path.is_absolute());
                prop_assert!(params.ends_with(target.path.to_str().unwrap()));
            }
        }
    }
}
