//! `vbd map`.

use std::io::IsTerminal;
use std::path::PathBuf;

use anyhow::Context;
use vbd_core::ExtentKind;
use vbd_formats::Format;
use vbd_image::map::{Extent, Map, State};
use vbd_image::open;
use vbd_image::size::Human;
use vbd_jobs::Image;

use super::image::ImageArgs;
use crate::output::{self, Table};

/// Show which parts of a disk file hold data; of an image of a format, which parts of the disk in it do, in this image or in
/// those that it stands on.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file or block device
    file: PathBuf,
    /// Print JSON, sizes in bytes
    #[arg(long)]
    json: bool,
    /// Leave out the table of extents
    #[arg(long, conflicts_with = "json")]
    picture: bool,
    #[command(flatten)]
    image: ImageArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let image = open::open(&args.file)?;
    let map = match args.image.format {
        None | Some(Format::Raw) => {
            Map::of(&image).with_context(|| format!("{}: cannot map it", args.file.display()))?
        }
        Some(_) => inside(&args, &image)?,
    };
    if args.json {
        return output::print_json(&map);
    }
    let mut text = String::new();
    if !args.picture {
        let mut table = Table::new(&[">START", ">LENGTH", "STATE"]);
        for extent in &map.extents {
            let shared = if extent.shared { ", shared" } else { "" };
            let state = format!("{}{shared}", name(extent.state));
            table.row([extent.start.to_string(), extent.length.to_string(), state]);
        }
        text += &table.render(0);
        text.push('\n');
    }
    let style = Style::of_output();
    text += &picture(&map, style.columns, style.colour);
    text += &summary(&map);
    output::print(&text).context("standard output")
}

/// The map of the disk in an image.
fn inside(args: &Args, image: &open::Image) -> anyhow::Result<Map> {
    let allocated = std::os::unix::fs::MetadataExt::blocks(&image.file.metadata()?) * 512;
    let disk = Image::open(&args.image.spec(&args.file)?.read_only())?;
    let mut map = Map { size: disk.size(), allocated, extents: Vec::new() };
    disk.parts(0, map.size, |start, length, kind| {
        let state = match kind {
            ExtentKind::Data => State::Data,
            ExtentKind::Zero => State::Preallocated,
            ExtentKind::Hole => State::Hole,
        };
        match map.extents.last_mut() {
            Some(last) if last.state == state => last.length += length,
            _ => map.extents.push(Extent { start, length, state, shared: false }),
        }
        Ok::<_, vbd_core::Error>(())
    })?;
    Ok(map)
}

fn name(state: State) -> &'static str {
    match state {
        State::Data => "data",
        State::Hole => "hole",
        State::Preallocated => "preallocated",
    }
}

fn summary(map: &Map) -> String {
    let mut text = format!("{}: data {}", Human(map.size), Human(map.total(State::Data)));
    let rest = [
        ("preallocated", map.total(State::Preallocated)),
        ("holes", map.total(State::Hole)),
        ("shared with clones", map.shared()),
    ];
    for (name, bytes) in rest {
        if bytes > 0 {
            text += &format!(", {name} {}", Human(bytes));
        }
    }
    text + &format!("; allocated {}\n", Human(map.allocated))
}

/// How the output is shown.
struct Style {
    columns: usize,
    colour: bool,
}

impl Style {
    /// As wide as the terminal, with colours unless `NO_COLOR` is set; 80 columns without colours elsewhere.
    fn of_output() -> Self {
        let out = std::io::stdout();
        let size = rustix::termios::tcgetwinsize(&out).ok().map(|size| usize::from(size.ws_col));
        Style {
            columns: size.filter(|columns| *columns > 0).unwrap_or(80),
            colour: out.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        }
    }
}

const ROWS: usize = 4;
/// Room for the offset at the left, such as ` 1023.5 MiB `.
const MARGIN: usize = 12;
/// Less is not divided any further: the unit of allocation of most filesystems.
const SMALLEST_CELL: u64 = 4096;

/// A picture of the file: cells, filled as far as their part of the file holds data.
fn picture(map: &Map, columns: usize, colour: bool) -> String {
    let columns = columns.saturating_sub(MARGIN + 1).clamp(8, 128);
    let cell = map.size.div_ceil((ROWS * columns) as u64).next_multiple_of(SMALLEST_CELL).max(SMALLEST_CELL);
    let cells = cells(map, cell);
    let mut text = String::new();
    for (row, cells) in cells.chunks(columns).enumerate() {
        let start = Human((row * columns) as u64 * cell).to_string();
        text += &format!("{start:>width$} ", width = MARGIN - 1);
        let mut before = None;
        for (symbol, paint) in cells.iter().map(|cell| cell.symbol()) {
            if colour && before != Some(paint) {
                text += paint;
                before = Some(paint);
            }
            text.push(symbol);
        }
        text += if colour { "\x1b[0m\n" } else { "\n" };
    }
    text
}

/// What a cell holds, in bytes.
#[derive(Clone, Copy, Default)]
struct Cell {
    size: u64,
    data: u64,
    preallocated: u64,
}

impl Cell {
    /// The character and, for a terminal, its colour. Any data at all shows.
    fn symbol(&self) -> (char, &'static str) {
        const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
        if self.data > 0 {
            let level = usize::try_from(u128::from(self.data) * 8 / u128::from(self.size)).unwrap_or(8);
            (LEVELS[level.clamp(1, 8) - 1], "\x1b[32m")
        } else if self.preallocated > 0 {
            ('░', "\x1b[33m")
        } else {
            ('·', "\x1b[90m")
        }
    }
}

/// Divide the file into cells of that many bytes, the last one being what is left.
fn cells(map: &Map, cell: u64) -> Vec<Cell> {
    let mut cells = Vec::new();
    let mut extents = map.extents.iter().peekable();
    for number in 0..map.size.div_ceil(cell) {
        let (start, end) = (number * cell, ((number + 1) * cell).min(map.size));
        let mut found = Cell { size: end - start, ..Cell::default() };
        while let Some(extent) = extents.peek() {
            let inside = extent.end().min(end).saturating_sub(extent.start.max(start));
            match extent.state {
                State::Data => found.data += inside,
                State::Preallocated => found.preallocated += inside,
                State::Hole => {}
            }
            if extent.end() > end {
                break;
            }
            extents.next();
        }
        cells.push(found);
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(parts: &[(u64, State)]) -> Map {
        let mut extents: Vec<Extent> = Vec::new();
        for (length, state) in parts {
            let start = extents.last().map_or(0, Extent::end);
            extents.push(Extent { start, length: *length, state: *state, shared: false });
        }
        Map { size: extents.last().map_or(0, Extent::end), allocated: 0, extents }
    }

    #[test]
    fn cells_are_filled_by_their_share() {
        let map = map(&[
            (64, State::Data),
            (4096, State::Hole),
            (4096, State::Preallocated),
            (4096, State::Data),
            (2048, State::Hole),
            (1, State::Data),
        ]);
        let symbols: String = cells(&map, 4096).iter().map(|cell| cell.symbol().0).collect();
        assert_eq!(symbols, "▁░▇▁");
    }

    #[test]
    fn a_picture_has_four_rows_at_most_and_fits() {
        let row = 80 - MARGIN - 1;
        let small = picture(&map(&[(4096, State::Data), (4097, State::Hole)]), 80, false);
        assert_eq!(small, "        0 B █··\n");
        let large = picture(&map(&[(3 << 40, State::Hole), (1 << 40, State::Data)]), 80, false);
        let lines: Vec<_> = large.lines().collect();
        assert_eq!(lines.len(), ROWS);
        assert!(lines.iter().all(|line| line.chars().count() <= 79), "{large}");
        assert!(lines[0].ends_with(&"·".repeat(row)) && lines[3].contains('█'));
        assert_eq!(picture(&map(&[]), 80, false), "");
    }

    #[test]
    fn colours_change_only_where_they_have_to() {
        let map = map(&[(8192, State::Data), (4096, State::Hole)]);
        assert_eq!(picture(&map, 20, true), "        0 B \x1b[32m██\x1b[90m·\x1b[0m\n");
    }
}
