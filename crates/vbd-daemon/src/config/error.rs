//! Errors and warnings that name a file, a line and a column.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A place in a configuration file. Both numbers count from 1, the column in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// The line, from 1.
    pub line: usize,
    /// The character in the line, from 1.
    pub column: usize,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// A configuration that cannot be used: which file, where in it, what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{}{}: {message}", file.display(), place(*position))]
pub struct ConfigError {
    /// The file as it was named by the caller.
    pub file: PathBuf,
    /// Where in the file; none when the file as a whole is meant (it cannot be read, for example).
    pub position: Option<Position>,
    /// What is wrong and what to do about it.
    pub message: String,
    /// The system's error, when there is one.
    #[source]
    pub source: Option<std::io::Error>,
}

/// Something in a configuration that is served all the same, but not quite as it may be expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// Where in the configuration file.
    pub position: Position,
    /// What will not happen, and why.
    pub message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.position, self.message)
    }
}

fn place(position: Option<Position>) -> String {
    position.map(|p| format!(":{p}")).unwrap_or_default()
}

/// The text of a configuration file, with what is needed to turn an offset into a place: a file of one long line
/// with a hundred thousand disks in it is told places in as quickly as any other.
pub(super) struct Source<'a> {
    pub(super) file: &'a Path,
    pub(super) text: &'a str,
    line_starts: Vec<usize>,
    /// The characters that begin before each multiple of [`STRIDE`] bytes.
    characters: Vec<usize>,
}

const STRIDE: usize = 1024;

impl<'a> Source<'a> {
    pub(super) fn new(file: &'a Path, text: &'a str) -> Self {
        let line_starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        let sums = text.as_bytes().chunks(STRIDE).scan(0, |sum, chunk| {
            *sum += characters(chunk);
            Some(*sum)
        });
        Self { file, text, line_starts, characters: std::iter::once(0).chain(sums).collect() }
    }

    /// The place of a byte offset; an offset past the end is the end, one inside a character that character.
    pub(super) fn position(&self, offset: usize) -> Position {
        let mut offset = offset.min(self.text.len());
        while !self.text.is_char_boundary(offset) {
            offset -= 1;
        }
        let line = self.line_starts.partition_point(|&start| start <= offset);
        let start = self.line_starts[line - 1];
        Position { line, column: self.characters_before(offset) - self.characters_before(start) + 1 }
    }

    fn characters_before(&self, offset: usize) -> usize {
        let stride = offset / STRIDE;
        self.characters[stride] + characters(&self.text.as_bytes()[stride * STRIDE..offset])
    }

    pub(super) fn error(&self, offset: usize, message: impl Into<String>) -> ConfigError {
        let position = Some(self.position(offset));
        ConfigError { file: self.file.to_owned(), position, message: message.into(), source: None }
    }

    /// An error at the start of a span; without one it is about the whole file.
    pub(super) fn error_in(&self, span: Option<Range<usize>>, message: impl Into<String>) -> ConfigError {
        match span {
            Some(span) => self.error(span.start, message),
            None => whole_file(self.file, message, None),
        }
    }

    pub(super) fn warning(&self, offset: usize, message: impl Into<String>) -> Warning {
        Warning { position: self.position(offset), message: message.into() }
    }
}

/// How many characters of UTF-8 begin in these bytes.
fn characters(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte & 0xc0 != 0x80).count()
}

/// An error about a file as a whole.
pub(super) fn whole_file(
    file: &Path,
    message: impl Into<String>,
    source: Option<std::io::Error>,
) -> ConfigError {
    ConfigError { file: file.to_owned(), position: None, message: message.into(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_lines_and_characters_from_one() {
        let source = Source::new(Path::new("f"), "ab\nüx\n");
        let at = |offset| {
            let p = source.position(offset);
            (p.line, p.column)
        };
        assert_eq!(at(0), (1, 1));
        assert_eq!(at(2), (1, 3));
        assert_eq!(at(3), (2, 1));
        assert_eq!(at(5), (2, 2), "after a character of two bytes");
        assert_eq!(at(4), (2, 1), "inside a character");
        assert_eq!(at(99), (3, 1));
        assert_eq!(Source::new(Path::new("f"), "").position(0), Position { line: 1, column: 1 });
    }

    #[test]
    fn positions_hold_in_long_lines() {
        let text = "xü\n".repeat(300) + &"aü".repeat(2000);
        let source = Source::new(Path::new("f"), &text);
        for (offset, _) in text.char_indices() {
            let before = &text[..offset];
            let line = before.matches('\n').count() + 1;
            let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
            assert_eq!(source.position(offset), Position { line, column }, "{offset}");
        }
    }
}
