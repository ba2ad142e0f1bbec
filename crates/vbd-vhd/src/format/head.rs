//! Everything that a VHD says about itself, before its blocks.

use vbd_image::ReadAt;

use super::{DynamicHeader, FOOTER_LEN, Footer, FormatError, HEADER_LEN, Kind, ParentName, SECTOR, SizeRule};

/// Which of the footers of a disk were good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FooterPlace {
    /// All that there have to be, and they are the same.
    Good,
    /// The one at the end; its copy at the start is damaged.
    OnlyEnd,
    /// The copy at the start; the one at the end is damaged, or the file was cut or not completed.
    OnlyStart,
    /// Both, and they differ. The copy at the start counts, as it does for QEMU.
    Differ,
}

/// Footer and header of a VHD.
#[derive(Clone, Debug)]
pub struct Head {
    /// The footer that counts.
    pub footer: Footer,
    /// Where it was found.
    pub place: FooterPlace,
    /// The header, unless the disk is fixed.
    pub header: Option<DynamicHeader>,
    /// The file's length when it was looked at, in bytes.
    pub file_len: u64,
    /// Where a table of Xen's tapdisk ("tdbatmap") ends that lies behind the BAT; 0 where there is none.
    batmap_end: u64,
}

fn exactly<const N: usize>(source: &(impl ReadAt + ?Sized), offset: u64) -> std::io::Result<Option<[u8; N]>> {
    let mut bytes = [0; N];
    let filled = source.fill_at(offset, &mut bytes)?;
    Ok((filled == N).then_some(bytes))
}

impl Head {
    /// Reads a file of `file_len` bytes.
    ///
    /// # Errors
    /// It is no VHD, what it says cannot be, or it cannot be read.
    pub fn read(source: &(impl ReadAt + ?Sized), file_len: u64) -> Result<Self, FormatError> {
        let parse = |offset: Option<u64>| -> Result<Result<Footer, FormatError>, FormatError> {
            let bytes = match offset {
                Some(offset) => exactly::<FOOTER_LEN>(source, offset)?,
                None => None,
            };
            Ok(bytes.ok_or(FormatError::NotVhd).and_then(|bytes| Footer::parse(&bytes)))
        };
        let end = parse(file_len.checked_sub(FOOTER_LEN as u64))?;
        // A fixed disk has no copy: what it begins with is its guest's, and may look like one.
        if let Ok(footer) = &end
            && footer.kind == Kind::Fixed
        {
            let (footer, place) = (footer.clone(), FooterPlace::Good);
            return Ok(Head { footer, place, header: None, file_len, batmap_end: 0 });
        }
        let start = parse(Some(0))?.and_then(|footer| match footer.kind {
            Kind::Fixed => Err(FormatError::NotVhd),
            _ => Ok(footer),
        });
        let (footer, place) = match (start, end) {
            (Ok(start), Ok(end)) if start == end => (start, FooterPlace::Good),
            (Ok(start), Ok(_)) => (start, FooterPlace::Differ),
            (Ok(start), Err(_)) => (start, FooterPlace::OnlyStart),
            (Err(_), Ok(end)) => (end, FooterPlace::OnlyEnd),
            // What is wrong with a damaged footer says more than that there is none.
            (Err(start), Err(FormatError::NotVhd)) => return Err(start),
            (Err(_), Err(end)) => return Err(end),
        };
        let at = footer.data_offset;
        let needed = at.saturating_add(HEADER_LEN as u64);
        if !at.is_multiple_of(SECTOR) || needed > file_len {
            return Err(FormatError::value(
                "the data offset",
                at,
                "a multiple of 512 with a dynamic disk header there is expected",
            ));
        }
        let truncated = FormatError::Truncated { what: "the header", len: file_len, needed };
        let header = DynamicHeader::parse(&exactly::<HEADER_LEN>(source, at)?.ok_or(truncated)?)?;
        let table_end = header.table_offset + header.table_len();
        if table_end > file_len {
            let what = "the table of blocks";
            return Err(FormatError::Truncated { what, len: file_len, needed: table_end });
        }
        let batmap_end = match &footer.creator {
            b"tap\0" => batmap(source, table_end, file_len)?,
            _ => 0,
        };
        Ok(Head { footer, place, header: Some(header), file_len, batmap_end })
    }

    /// Whether tapdisk's table of full blocks lies behind the BAT.
    pub fn has_batmap(&self) -> bool {
        self.batmap_end > 0
    }

    /// Whether footer and copy differ in nothing but the size and what goes with it: its change was interrupted, and the
    /// copy at the start, which is changed first, counts.
    ///
    /// # Errors
    /// The footer at the end cannot be read.
    pub fn is_half_resized(&self, source: &(impl ReadAt + ?Sized)) -> Result<bool, FormatError> {
        let at = self.file_len.saturating_sub(FOOTER_LEN as u64);
        let Some(Ok(mut end)) = exactly::<FOOTER_LEN>(source, at)?.map(|bytes| Footer::parse(&bytes)) else {
            return Ok(false);
        };
        end.current_size = self.footer.current_size;
        end.geometry = self.footer.geometry;
        end.creator = self.footer.creator;
        Ok(self.place == FooterPlace::Differ && end == self.footer)
    }

    /// The size of the disk in bytes.
    ///
    /// # Errors
    /// The size is 0 or beyond what a VHD can have, or there is not so much in the file.
    pub fn size(&self, rule: SizeRule) -> Result<u64, FormatError> {
        let size = self.footer.size(rule);
        if size == 0 || size > super::MOST_BYTES {
            return Err(FormatError::value("the disk's size", size, "512 bytes to 2040 GiB are possible"));
        }
        match &self.header {
            None => {
                let needed = size + FOOTER_LEN as u64;
                if needed > self.file_len {
                    return Err(FormatError::Truncated { what: "the disk", len: self.file_len, needed });
                }
            }
            Some(header) if header.blocks(size) > u64::from(header.entries) => {
                return Err(FormatError::value(
                    "the number of table entries",
                    header.entries,
                    "it has to cover the disk's size",
                ));
            }
            Some(_) => {}
        }
        Ok(size)
    }

    /// The table of blocks: the sector of each, or [`UNUSED`](super::UNUSED).
    ///
    /// # Errors
    /// It cannot be read.
    pub fn table(&self, source: &(impl ReadAt + ?Sized)) -> Result<Vec<u32>, FormatError> {
        let Some(header) = &self.header else { return Ok(Vec::new()) };
        let (mut table, mut at) = (Vec::new(), header.table_offset);
        let mut left = u64::from(header.entries) * 4;
        let mut bytes = vec![0; 1 << 16];
        while left > 0 {
            let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
            let filled = source.fill_at(at, &mut bytes[..wanted])?;
            if filled < wanted {
                let needed = header.table_offset + header.table_len();
                let what = "the table of blocks";
                return Err(FormatError::Truncated { what, len: self.file_len, needed });
            }
            let entries = bytes[..wanted].chunks_exact(4);
            table.extend(entries.map(|entry| u32::from_be_bytes([entry[0], entry[1], entry[2], entry[3]])));
            at += wanted as u64;
            left -= wanted as u64;
        }
        Ok(table)
    }

    /// What lies in front of the blocks or between them: (name, first byte, end).
    pub fn structures(&self) -> Vec<(&'static str, u64, u64)> {
        let Some(header) = &self.header else { return Vec::new() };
        let mut all = vec![
            ("the footer's copy", 0, FOOTER_LEN as u64),
            ("the header", self.footer.data_offset, self.footer.data_offset + HEADER_LEN as u64),
            ("the table of blocks", header.table_offset, header.table_offset + header.table_len()),
        ];
        for locator in header.locators.iter().filter(|locator| locator.is_used()) {
            let end = locator.offset.saturating_add(locator.space_bytes());
            all.push(("a parent locator", locator.offset, end));
        }
        if self.batmap_end > 0 {
            all.push(("tapdisk's table", header.table_offset + header.table_len(), self.batmap_end));
        }
        all
    }

    /// Where the file's content ends, and the footer has its place, with this table: after the last block and whatever
    /// else there is. Entries that cannot be are left out.
    pub fn content_end(&self, table: &[u32]) -> u64 {
        let Some(header) = &self.header else { return self.file_len.saturating_sub(FOOTER_LEN as u64) };
        let room = header.bitmap_len() + u64::from(header.block_size);
        let blocks = table.iter().filter(|entry| **entry != super::UNUSED).map(|entry| {
            let end = u64::from(*entry) * SECTOR + room;
            if end > self.file_len { 0 } else { end }
        });
        let others = self.structures().into_iter().map(|(_, _, end)| end).filter(|end| *end <= self.file_len);
        blocks.chain(others).max().unwrap_or(0).next_multiple_of(SECTOR)
    }

    /// The names of the parent that can be read, best first: relative ones, then absolute ones, then the bare name in
    /// the header. Paths are what the image says: whoever opens one passes it through the gate.
    ///
    /// # Errors
    /// A locator points outside the file.
    pub fn parent_names(&self, source: &(impl ReadAt + ?Sized)) -> Result<Vec<ParentName>, FormatError> {
        let Some(header) = self.header.as_ref().filter(|_| self.footer.kind == Kind::Differencing) else {
            return Ok(Vec::new());
        };
        let mut names: Vec<ParentName> = Vec::new();
        for locator in &header.locators {
            names.extend(locator.name(source, self.file_len)?);
        }
        if !header.parent_name.is_empty() {
            let path = header.parent_name.replace('\\', "/");
            names.push(ParentName { relative: !path.starts_with('/'), path });
        }
        names.sort_by_key(|name| !name.relative);
        let mut seen = Vec::new();
        names.retain(|name| {
            let is_new = !seen.contains(name);
            seen.push(name.clone());
            is_new
        });
        Ok(names)
    }
}

/// Where tapdisk's table of full blocks ends, if there is one behind the BAT. It only saves tapdisk the look into
/// bitmaps that are full, and stays true as long as no bit is taken back, which never happens here.
fn batmap(source: &(impl ReadAt + ?Sized), at: u64, file_len: u64) -> Result<u64, FormatError> {
    let Some(bytes) = exactly::<24>(source, at)? else { return Ok(0) };
    if !bytes.starts_with(b"tdbatmap") {
        return Ok(0);
    }
    let number = |range: std::ops::Range<usize>| {
        bytes[range].iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
    };
    let end = number(8..16).saturating_add(number(16..20) * SECTOR);
    let header_end = at + SECTOR;
    Ok(if end > header_end && end <= file_len { end } else { header_end })
}
