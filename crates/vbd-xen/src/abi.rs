//! Requests and responses as they lie in the ring (xen/io/blkif.h), in the layouts of 64-bit and 32-bit front-ends.
//!
//! Every sector, here and in xenstore, has 512 bytes, whatever the disk's own sectors are.

/// Operations.
pub(crate) mod operation {
    pub(crate) const READ: u8 = 0;
    pub(crate) const WRITE: u8 = 1;
    pub(crate) const WRITE_BARRIER: u8 = 2;
    pub(crate) const FLUSH: u8 = 3;
    pub(crate) const DISCARD: u8 = 5;
    pub(crate) const INDIRECT: u8 = 6;
}

/// Most segments in the ring entry itself.
pub(crate) const INLINE_SEGMENTS: usize = 11;
/// Segments described in a page.
pub(crate) const SEGMENTS_IN_PAGE: usize = 512;
/// Most pages of indirect segments.
pub(crate) const INDIRECT_PAGES: usize = 8;
/// Most segments in an indirect request.
pub(crate) const MOST_INDIRECT: u16 = 4096;
/// Bytes of the ring before its first entry.
pub(crate) const HEADER: usize = 64;
/// Words of the longest entry.
pub(crate) const WORDS: usize = 28;
/// The bit of a discard that asks for the data to be gone for good.
const SECURE: u8 = 1;

/// What a request is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(i16)]
pub(crate) enum Status {
    Unsupported = -2,
    Error = -1,
    Ok = 0,
}

impl From<vbd_core::ErrorKind> for Status {
    /// What a guest is told: the one table of this front-end.
    fn from(kind: vbd_core::ErrorKind) -> Self {
        use vbd_core::ErrorKind::*;
        match kind {
            Unsupported => Status::Unsupported,
            Io | NoSpace | OutOfRange | ReadOnly | FlushLost | Cancelled | Busy | Corrupt => Status::Error,
        }
    }
}

/// The layout of entries: the front-end's `protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Abi {
    /// 64-bit numbers at multiples of 8; also Arm's.
    Wide,
    /// 64-bit numbers at multiples of 4.
    Narrow,
}

impl Abi {
    /// The layout that this value of `protocol` means; without one it is this machine's own.
    pub(crate) fn parse(protocol: Option<&[u8]>) -> Option<Abi> {
        match protocol {
            None | Some(b"" | b"x86_64-abi" | b"arm-abi") => Some(Abi::Wide),
            Some(b"x86_32-abi") => Some(Abi::Narrow),
            Some(_) => None,
        }
    }

    /// Its name in xenstore.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Abi::Wide if cfg!(target_arch = "aarch64") => "arm-abi",
            Abi::Wide => "x86_64-abi",
            Abi::Narrow => "x86_32-abi",
        }
    }

    /// Bytes of an entry.
    pub(crate) fn entry(self) -> usize {
        match self {
            Abi::Wide => 112,
            Abi::Narrow => 108,
        }
    }

    /// Entries of a ring of so many pages: a power of two.
    pub(crate) fn entries(self, pages: usize) -> u32 {
        let fit = (pages * crate::sys::PAGE).saturating_sub(HEADER) / self.entry();
        fit.checked_ilog2().map_or(0, |log| 1 << log)
    }

    /// Words before the segments, or before a discard's length.
    fn head_words(self) -> usize {
        match self {
            Abi::Wide => 6,
            Abi::Narrow => 5,
        }
    }
}

/// A copy of a ring entry, of which as many words are set as its operation has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) words: [u32; WORDS],
}

/// One segment: a part of a granted page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) reference: u32,
    /// First sector in the page.
    pub(crate) first: u8,
    /// Last sector in it.
    pub(crate) last: u8,
}

impl Segment {
    /// Bytes of the page before it.
    pub(crate) fn offset(self) -> usize {
        usize::from(self.first) * 512
    }

    /// Bytes.
    pub(crate) fn len(self) -> usize {
        (usize::from(self.last) - usize::from(self.first) + 1) * 512
    }

    /// From the two words that describe it, if it lies within a page.
    #[inline]
    pub(crate) fn checked(reference: u32, place: u32) -> Option<Segment> {
        let [first, last, ..] = place.to_le_bytes();
        (first <= last && last < 8).then_some(Segment { reference, first, last })
    }
}

/// What an entry asks for. Segments are not part of it: see [`Entry::segments`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Read,
    Write,
    /// Everything before it, then a flush, then its data if it has some, durable.
    Barrier,
    /// A flush, then its data if it has some, durable.
    Flush,
    /// So many sectors.
    Discard {
        sectors: u64,
        secure: bool,
    },
    /// A read or write of so many segments, described in these pages.
    Indirect {
        write: bool,
        segments: u16,
        pages: [u32; INDIRECT_PAGES],
    },
    /// An operation that this end does not know.
    Unknown,
    /// Against the rules.
    Malformed,
}

impl Entry {
    pub(crate) const EMPTY: Entry = Entry { words: [0; WORDS] };

    /// Copies an entry out of memory that others write to, each word once.
    ///
    /// # Safety
    /// An entry of this layout is readable at `from`, which is a multiple of 4.
    #[inline]
    pub(crate) unsafe fn read(&mut self, from: *const u32, abi: Abi) -> usize {
        // SAFETY: by this function's contract; no index reaches beyond the entry's words.
        let get = |index: usize| unsafe { from.add(index).read_volatile() };
        self.words[0] = u32::from_le(get(0));
        let words = self.len(abi);
        for index in 1..words {
            self.words[index] = u32::from_le(get(index));
        }
        words
    }

    /// Words that this entry has, going by its first.
    #[inline]
    fn len(&self, abi: Abi) -> usize {
        use operation::*;
        let head = abi.head_words();
        let [operation, segments, ..] = self.words[0].to_le_bytes();
        match operation {
            READ | WRITE | WRITE_BARRIER | FLUSH => head + 2 * usize::from(segments).min(INLINE_SEGMENTS),
            DISCARD => head + 2,
            INDIRECT => head + 1 + INDIRECT_PAGES,
            _ => head,
        }
    }

    fn long(&self, index: usize) -> u64 {
        u64::from(self.words[index]) | u64::from(self.words[index + 1]) << 32
    }

    /// The operation's number, as an answer repeats it: of an indirect request the one within.
    #[inline]
    pub(crate) fn operation(&self) -> u8 {
        let [operation, inner, ..] = self.words[0].to_le_bytes();
        if operation == operation::INDIRECT { inner } else { operation }
    }

    /// The front-end's name for the request; it may use one twice.
    #[inline]
    pub(crate) fn id(&self, abi: Abi) -> u64 {
        self.long(if abi == Abi::Wide { 2 } else { 1 })
    }

    /// The first sector.
    #[inline]
    pub(crate) fn sector(&self, abi: Abi) -> u64 {
        self.long(if abi == Abi::Wide { 4 } else { 3 })
    }

    /// What is asked for.
    #[inline]
    pub(crate) fn asked(&self, abi: Abi) -> Asked {
        let [operation, second, third, fourth] = self.words[0].to_le_bytes();
        let inline = usize::from(second) <= INLINE_SEGMENTS;
        let head = abi.head_words();
        match operation {
            operation::READ if inline && second > 0 => Asked::Read,
            operation::WRITE if inline && second > 0 => Asked::Write,
            operation::WRITE_BARRIER if inline => Asked::Barrier,
            operation::FLUSH if inline => Asked::Flush,
            operation::READ | operation::WRITE | operation::WRITE_BARRIER | operation::FLUSH => {
                Asked::Malformed
            }
            operation::DISCARD => Asked::Discard { sectors: self.long(head), secure: second & SECURE != 0 },
            operation::INDIRECT => {
                let segments = u16::from_le_bytes([third, fourth]);
                let inner = matches!(second, operation::READ | operation::WRITE);
                if !inner || segments == 0 || segments > MOST_INDIRECT {
                    return Asked::Malformed;
                }
                let mut pages = [0; INDIRECT_PAGES];
                pages.copy_from_slice(&self.words[head + 1..][..INDIRECT_PAGES]);
                Asked::Indirect { write: second == operation::WRITE, segments, pages }
            }
            _ => Asked::Unknown,
        }
    }

    /// Appends the segments in the entry itself; none if one of them is not within a page.
    #[inline]
    pub(crate) fn segments(&self, abi: Abi, into: &mut Vec<Segment>) -> Option<()> {
        let count = usize::from(self.words[0].to_le_bytes()[1]).min(INLINE_SEGMENTS);
        let head = abi.head_words();
        for pair in self.words[head..head + 2 * count].chunks_exact(2) {
            into.push(Segment::checked(pair[0], pair[1])?);
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_have_the_sizes_of_the_public_header() {
        assert_eq!([1, 2, 4, 8, 16].map(|pages| Abi::Wide.entries(pages)), [32, 64, 128, 256, 512]);
        assert_eq!([1, 2, 4, 8, 16].map(|pages| Abi::Narrow.entries(pages)), [32, 64, 128, 256, 512]);
        assert_eq!(Abi::Wide.entries(0), 0);
    }

    #[test]
    fn an_entry_of_each_layout() {
        // Operation write, two segments, handle 7; id, sector, segments.
        let fields = |pad: &[u32]| {
            let mut words = vec![0x0007_0201];
            words.extend(pad);
            words.extend([0x89ab_cdef, 0x0123_4567, 99, 1, 40, 0x0700, 41, 0x0302]);
            words.resize(WORDS, 0xffff_ffff);
            words
        };
        for (abi, words) in [(Abi::Wide, fields(&[0])), (Abi::Narrow, fields(&[]))] {
            let mut entry = Entry::EMPTY;
            // SAFETY: as many words as an entry has.
            unsafe { entry.read(words.as_ptr(), abi) };
            assert_eq!(entry.id(abi), 0x0123_4567_89ab_cdef);
            assert_eq!(entry.sector(abi), 1 << 32 | 99);
            assert_eq!(entry.asked(abi), Asked::Write);
            let mut segments = Vec::new();
            entry.segments(abi, &mut segments).unwrap();
            assert_eq!(
                segments,
                [Segment { reference: 40, first: 0, last: 7 }, Segment { reference: 41, first: 2, last: 3 }]
            );
        }
    }

    #[test]
    fn segments_lie_within_a_page() {
        assert!(Segment::checked(1, 0x0800).is_none());
        assert!(Segment::checked(1, 0x0203).is_none());
        assert_eq!(Segment::checked(1, 0x0303).map(Segment::len), Some(512));
        assert_eq!(Segment::checked(1, 0x0700).map(Segment::len), Some(4096));
    }
}
