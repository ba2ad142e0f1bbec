//! The language of a Xen domain file: `name = value`, strings, numbers and lists (xl.cfg(5)).
//!
//! xm's files were Python programs; of those, what is plain assignment is read too (other case in names,
//! `True`, triple quotes, a backslash at the end of a line), and everything that would have to be run is
//! refused at its place.

use std::ops::Range;

use winnow::combinator::{alt, opt, preceded, repeat};
use winnow::error::{ErrMode, ParserError};
use winnow::prelude::*;
use winnow::stream::{LocatingSlice, Location, Stream};
use winnow::token::{any, one_of, take_till, take_while};

type Input<'a> = LocatingSlice<&'a str>;
type Parsed<T> = Result<T, ErrMode<SyntaxError>>;

/// Lists inside lists: deeper than any real file, and far from the end of the stack.
const MAX_DEPTH: usize = 16;

/// What cannot be read, and the byte at which it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SyntaxError {
    pub(super) offset: usize,
    pub(super) message: String,
}

impl ParserError<Input<'_>> for SyntaxError {
    type Inner = Self;

    fn from_input(input: &Input<'_>) -> Self {
        Self { offset: input.current_token_start(), message: "this cannot be read here".to_owned() }
    }

    fn into_inner(self) -> Result<Self::Inner, Self> {
        Ok(self)
    }
}

/// One assignment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) name: String,
    pub(super) offset: usize,
    /// `+=`: the value goes behind the one before.
    pub(super) append: bool,
    pub(super) value: Value,
}

/// What is assigned, with the byte at which it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Text(Text),
    /// A number or a Python constant, as written.
    Word(String, usize),
    List(Vec<Value>, usize),
}

impl Value {
    pub(super) fn offset(&self) -> usize {
        match self {
            Self::Text(text) => text.inside.start,
            Self::Word(_, offset) | Self::List(_, offset) => *offset,
        }
    }
}

/// A quoted string without its quotes, and where what is between them stands in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Text {
    pub(super) value: String,
    pub(super) inside: Range<usize>,
}

impl Text {
    /// Where in the file a byte of the value was written.
    pub(super) fn source_offset(&self, file: &str, offset: usize) -> usize {
        let mut value_length = 0;
        for (at, c) in unescape(&file[self.inside.clone()]).flatten() {
            if value_length >= offset {
                return self.inside.start + at;
            }
            value_length += c.len_utf8();
        }
        self.inside.end
    }
}

/// Reads a whole file.
pub(super) fn settings(file: &str) -> Result<Vec<Setting>, SyntaxError> {
    let mut input = LocatingSlice::new(file);
    let read = |input: &mut Input<'_>| -> Parsed<Vec<Setting>> {
        opt('\u{feff}').parse_next(input)?;
        let mut settings = Vec::new();
        loop {
            between_statements(input)?;
            if input.is_empty() {
                return Ok(settings);
            }
            settings.push(statement(input)?);
        }
    };
    read(&mut input).map_err(|error| match error {
        ErrMode::Backtrack(error) | ErrMode::Cut(error) => error,
        ErrMode::Incomplete(_) => SyntaxError::from_input(&input),
    })
}

fn fail<T>(offset: usize, message: impl Into<String>) -> Parsed<T> {
    Err(ErrMode::Cut(SyntaxError { offset, message: message.into() }))
}

/// Spaces within a line; a backslash at its end joins the next one to it.
fn spaces(input: &mut Input<'_>) -> Parsed<()> {
    let space = alt((one_of([' ', '\t', '\r', '\x0c']).void(), "\\\n".void(), "\\\r\n".void()));
    repeat::<_, _, (), _, _>(0.., space).parse_next(input)
}

fn comment(input: &mut Input<'_>) -> Parsed<()> {
    preceded('#', take_till(0.., '\n')).void().parse_next(input)
}

/// Spaces, ends of lines and comments.
fn lines(input: &mut Input<'_>) -> Parsed<()> {
    spaces(input)?;
    while opt(alt(('\n'.void(), comment))).parse_next(input)?.is_some() {
        spaces(input)?;
    }
    Ok(())
}

fn between_statements(input: &mut Input<'_>) -> Parsed<()> {
    lines(input)?;
    while opt(';').parse_next(input)?.is_some() {
        lines(input)?;
    }
    Ok(())
}

fn word<'a>(input: &mut Input<'a>) -> Parsed<&'a str> {
    (
        one_of(|c: char| c.is_ascii_alphabetic() || c == '_'),
        take_while(0.., |c: char| c.is_ascii_alphanumeric() || c == '_'),
    )
        .take()
        .parse_next(input)
}

fn statement(input: &mut Input<'_>) -> Parsed<Setting> {
    let offset = input.current_token_start();
    let Some(name) = opt(word).parse_next(input)? else {
        return fail(offset, format!("{} begins no setting: write `name = value`", start_of(input)));
    };
    if is_python(name) {
        return fail(
            offset,
            format!("`{name}` is Python, which is not run: write out the values that the program would set"),
        );
    }
    spaces(input)?;
    let append = match opt(alt(("+=", "="))).parse_next(input)? {
        Some(operator) => operator == "+=",
        None => {
            let found = start_of(input);
            return fail(
                input.current_token_start(),
                format!("`{name}` is followed by {found}, not by `=`: write `{name} = value`"),
            );
        }
    };
    spaces(input)?;
    let value = value(input, 0)?;
    spaces(input)?;
    let end = input.current_token_start();
    opt(comment).parse_next(input)?;
    if !input.is_empty() && opt(one_of(['\n', ';'])).parse_next(input)?.is_none() {
        return fail(end, after_value(input, "the next setting begins on a line of its own, or after `;`"));
    }
    Ok(Setting { name: name.to_owned(), offset, append, value })
}

fn value(input: &mut Input<'_>, depth: usize) -> Parsed<Value> {
    let offset = input.current_token_start();
    match input.chars().next() {
        Some('[') if depth >= MAX_DEPTH => {
            fail(offset, format!("lists are nested more than {MAX_DEPTH} deep"))
        }
        Some('[') => list(input, depth),
        Some('\'' | '"') => text(input).map(Value::Text),
        Some(c) if c.is_ascii_digit() || c == '-' => number(input),
        Some(c) if c.is_ascii_alphabetic() || c == '_' => {
            let name = word(input)?;
            match name {
                "True" | "False" | "None" => Ok(Value::Word(name.to_owned(), offset)),
                _ => fail(
                    offset,
                    format!(
                        "`{name}` would have to be computed: write the value out, a text in quotes (`\"{name}\"`)"
                    ),
                ),
            }
        }
        Some('(' | '{') => fail(
            offset,
            "this is Python, which is not run: write a text in quotes, a number or a list in `[...]`",
        ),
        _ => fail(
            offset,
            format!(
                "a value is missing before {}: write a text in quotes, a number or a list in `[...]`",
                start_of(input)
            ),
        ),
    }
}

fn number(input: &mut Input<'_>) -> Parsed<Value> {
    let offset = input.current_token_start();
    let mut digits = (opt('-'), take_while(1.., |c: char| c.is_ascii_alphanumeric() || c == '.')).take();
    match digits.parse_next(input) {
        Ok(number) => Ok(Value::Word(number.to_owned(), offset)),
        Err(ErrMode::Backtrack(_)) => fail(offset, "`-` without a number behind it"),
        Err(other) => Err(other),
    }
}

fn list(input: &mut Input<'_>, depth: usize) -> Parsed<Value> {
    let offset = input.current_token_start();
    '['.void().parse_next(input)?;
    let mut values = Vec::new();
    loop {
        lines(input)?;
        if opt(']').parse_next(input)?.is_some() {
            return Ok(Value::List(values, offset));
        }
        if input.is_empty() {
            return fail(offset, "this list has no end: close it with `]`");
        }
        values.push(value(input, depth + 1)?);
        lines(input)?;
        match input.chars().next() {
            Some(',') => any.void().parse_next(input)?,
            Some(']') => {}
            None => return fail(offset, "this list has no end: close it with `]`"),
            Some(_) => {
                return fail(input.current_token_start(), after_value(input, "a `,` or a `]` belongs here"));
            }
        }
    }
}

fn text(input: &mut Input<'_>) -> Parsed<Text> {
    let offset = input.current_token_start();
    let file: &str = input;
    let (quote, several_lines) = match file.as_bytes() {
        [a, b, c, ..] if a == b && b == c => (&file[..3], true),
        _ => (&file[..1], false),
    };
    let Some(length) = length_of_text(&file[quote.len()..], quote, several_lines) else {
        return fail(offset, format!("this text has no end: close it with `{quote}`"));
    };
    let inside = offset + quote.len()..offset + quote.len() + length;
    let raw = &file[quote.len()..quote.len() + length];
    let value = unescape(raw)
        .map(|read| read.map(|(_, c)| c))
        .collect::<Result<String, _>>()
        .map_err(|(at, message)| ErrMode::Cut(SyntaxError { offset: inside.start + at, message }))?;
    input.next_slice(length + 2 * quote.len());
    Ok(Text { value, inside })
}

/// How many bytes stand before the closing quote.
fn length_of_text(file: &str, quote: &str, several_lines: bool) -> Option<usize> {
    let mut at = 0;
    while let Some(next) = file[at..].chars().next() {
        if file[at..].starts_with(quote) {
            return Some(at);
        }
        if next == '\n' && !several_lines {
            return None;
        }
        at += next.len_utf8();
        if next == '\\' {
            let escaped = file[at..].chars().next().filter(|&c| c != '\n' || several_lines)?;
            at += escaped.len_utf8();
        }
    }
    None
}

/// The characters of a string with the byte at which each is written, or what is wrong with an escape.
fn unescape(raw: &str) -> impl Iterator<Item = Result<(usize, char), (usize, String)>> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at;
        let c = raw[at..].chars().next()?;
        at += c.len_utf8();
        if c != '\\' {
            return Some(Ok((start, c)));
        }
        // The grammar leaves no backslash at the end.
        let escape = raw[at..].chars().next()?;
        at += escape.len_utf8();
        let mut digits = |radix: u32, from: usize, most: usize| {
            let digits =
                raw[from..].bytes().take(most).take_while(|b| char::from(*b).is_digit(radix)).count();
            at = from + digits;
            u8::from_str_radix(&raw[from..at], radix).ok().filter(u8::is_ascii).map(char::from)
        };
        let read = match escape {
            '\\' | '\'' | '"' => Some(escape),
            'a' => Some('\x07'),
            'b' => Some('\x08'),
            'f' => Some('\x0c'),
            'n' => Some('\n'),
            'r' => Some('\r'),
            't' => Some('\t'),
            'v' => Some('\x0b'),
            'x' => digits(16, start + 2, 2),
            '0'..='7' => digits(8, start + 1, 3),
            _ => None,
        };
        Some(match read {
            Some(c) => Ok((start, c)),
            None => Err((
                start,
                format!(
                    "`\\{escape}` stands for no character here: write `\\\\` for a backslash, and others as they are"
                ),
            )),
        })
    })
}

/// What to say about something behind a value that does not belong there.
fn after_value(input: &Input<'_>, expected: &str) -> String {
    let found = start_of(input);
    match input.chars().next() {
        Some('+' | '%' | '*' | '.' | '(' | '/') => {
            format!("{found} would have to be computed, and Python is not run: write the value out")
        }
        Some('\'' | '"') => format!("{found} follows a value directly: {expected}"),
        _ => format!("{found} cannot stand behind a value: {expected}"),
    }
}

/// The word or character that comes next, quoted for a message.
fn start_of(input: &Input<'_>) -> String {
    let text: &str = input;
    match text.chars().next() {
        None => "the end of the file".to_owned(),
        Some('\n') => "the end of the line".to_owned(),
        Some(c) if c.is_alphanumeric() => {
            let word: String =
                text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').take(30).collect();
            format!("`{word}`")
        }
        Some(c) if c.is_control() => format!("`{}`", c.escape_default()),
        Some(c) => format!("`{c}`"),
    }
}

fn is_python(name: &str) -> bool {
    matches!(
        name,
        "import"
            | "from"
            | "def"
            | "class"
            | "if"
            | "elif"
            | "else"
            | "for"
            | "while"
            | "try"
            | "except"
            | "with"
            | "return"
            | "print"
            | "del"
            | "exec"
            | "global"
            | "pass"
            | "raise"
    )
}
