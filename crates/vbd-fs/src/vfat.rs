//! FAT filesystems, written: the EFI system partition and seed disks. The same content gives the same bytes.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use crate::Time;

/// The smallest filesystem that is made, in bytes: with less it would be FAT12, which is of floppy disks.
pub(crate) const SMALLEST: u64 = 4 << 20;
/// The largest one: 32 bits count its sectors.
pub(crate) const LARGEST: u64 = u32::MAX as u64 * 512;
/// The largest file, by the field for its size.
const LARGEST_FILE: u64 = u32::MAX as u64;

/// What a new filesystem is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name {
    /// At most 11 bytes; see [`Name::new`].
    label: [u8; 11],
    /// The number that stands for a UUID.
    pub(crate) id: u32,
}

impl Name {
    /// Checks a label: 1 to 11 letters, digits, `-`, `_` or spaces, which are written in upper case.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(crate) fn new(label: &str, id: u32) -> Result<Name, String> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b' ');
        if label.trim().is_empty() || label.len() > 11 || !label.bytes().all(plain) {
            return Err(format!("label {label:?}: a FAT's has 1 to 11 letters, digits, - or _"));
        }
        let mut bytes = [b' '; 11];
        bytes[..label.len()].copy_from_slice(label.to_ascii_uppercase().as_bytes());
        Ok(Name { label: bytes, id })
    }

    /// The number as `UUID=` takes it.
    pub(crate) fn uuid(&self) -> String {
        format!("{:04X}-{:04X}", self.id >> 16, self.id & 0xFFFF)
    }
}

/// A part of a file, as a file of its own.
struct Section<'a> {
    file: &'a File,
    start: u64,
    length: u64,
    position: u64,
}

impl Section<'_> {
    /// How much of `wanted` bytes there is from here on.
    fn room(&self, wanted: usize) -> usize {
        usize::try_from(self.length.saturating_sub(self.position)).unwrap_or(usize::MAX).min(wanted)
    }
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = self.room(buffer.len());
        let read = self.file.read_at(&mut buffer[..room], self.start + self.position)?;
        self.position += read as u64;
        Ok(read)
    }
}

impl Write for Section<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let room = self.room(buffer.len());
        let written = self.file.write_at(&buffer[..room], self.start + self.position)?;
        self.position += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Section<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.length.checked_add_signed(by),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

thread_local! {
    /// The time of what is made in this thread: the crate asks for a provider that lives for ever.
    static NOW: Cell<Time> = const { Cell::new(Time { seconds: 0, nanoseconds: 0 }) };
}

#[derive(Debug)]
struct Clock;

static CLOCK: Clock = Clock;

impl fatfs::TimeProvider for Clock {
    fn get_current_date(&self) -> fatfs::Date {
        self.get_current_date_time().date
    }

    fn get_current_date_time(&self) -> fatfs::DateTime {
        dos_time(NOW.get())
    }
}

/// A time in UTC, cut to what a FAT can say: 1980 to 2107.
fn dos_time(time: Time) -> fatfs::DateTime {
    const FIRST: i64 = 315_532_800;
    const LAST: i64 = 4_354_819_199;
    let seconds = time.seconds.clamp(FIRST, LAST);
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let narrow = |value: i64| u16::try_from(value).unwrap_or(0);
    fatfs::DateTime {
        date: fatfs::Date { year: narrow(year), month: narrow(month), day: narrow(day) },
        time: fatfs::Time {
            hour: narrow(second / 3600),
            min: narrow(second / 60 % 60),
            sec: narrow(second % 60),
            millis: 0,
        },
    }
}

/// The date of a day counted from 1970-01-01, in the Gregorian calendar. Years are counted from March, so that the leap
/// day is their last; 719,468 days lie between that calendar's year 0 and 1970.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let of_month = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + i64::from(month <= 2), month, of_month)
}

/// A filesystem that is being filled.
pub(crate) struct Volume<'a> {
    filesystem: fatfs::FileSystem<Section<'a>>,
}

impl<'a> Volume<'a> {
    /// Makes one in `length` bytes of `file` from `start` on, which hold zeros, in sectors of `sector` bytes. All in it gets the time `time`. FAT32
    /// from 256 MiB on, FAT16 below.
    ///
    /// # Errors
    ///
    /// A length below [`SMALLEST`] or above [`LARGEST`]; those of writing.
    pub(crate) fn format(
        file: &'a File,
        start: u64,
        length: u64,
        sector: u64,
        name: &Name,
        time: Time,
    ) -> io::Result<Volume<'a>> {
        if !(SMALLEST..=LARGEST).contains(&length) {
            let reason = format!("a FAT has {} to {} bytes", SMALLEST, LARGEST);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        NOW.set(time);
        let section = || Section { file, start, length, position: 0 };
        let options = fatfs::FormatVolumeOptions::new()
            .bytes_per_sector(u16::try_from(sector).unwrap_or(512))
            .volume_id(name.id)
            .volume_label(name.label);
        fatfs::format_volume(section(), options)?;
        let options = fatfs::FsOptions::new().time_provider(&CLOCK);
        Ok(Volume { filesystem: fatfs::FileSystem::new(section(), options)? })
    }

    /// Writes a file, with the directories above it. The path has slashes between its names.
    ///
    /// # Errors
    ///
    /// Those of reading; no room; a name that a FAT cannot have; a file that is there, or one of 4 GiB.
    pub(crate) fn add(&self, path: &str, data: &mut dyn Read) -> io::Result<u64> {
        if let Some((directories, _)) = path.rsplit_once('/') {
            self.make_directories(directories)?;
        }
        let root = self.filesystem.root_dir();
        if root.open_file(path).is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let mut file = root.create_file(path)?;
        let mut buffer = vec![0; 1 << 20];
        let mut size = 0;
        loop {
            let read = match data.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            size += read as u64;
            if size > LARGEST_FILE {
                return Err(io::Error::other("a file on a FAT has less than 4 GiB"));
            }
            file.write_all(&buffer[..read]).map_err(|e| match e.kind() {
                // What the crate calls it when there is no cluster left.
                io::ErrorKind::WriteZero | io::ErrorKind::Other => {
                    io::Error::new(io::ErrorKind::StorageFull, e)
                }
                _ => e,
            })?;
        }
        file.flush()?;
        Ok(size)
    }

    /// Makes a directory and those above it, where they are missing.
    ///
    /// # Errors
    ///
    /// As [`Volume::add`].
    pub(crate) fn make_directories(&self, path: &str) -> io::Result<()> {
        let mut directory = self.filesystem.root_dir();
        for name in path.split('/').filter(|name| !name.is_empty()) {
            // One that exists is opened.
            directory = directory.create_dir(name)?;
        }
        Ok(())
    }

    /// Writes what is left to write.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub(crate) fn finish(self) -> io::Result<()> {
        // Counted now, so that it is written: without a number everybody would count by himself.
        self.filesystem.stats()?;
        self.filesystem.unmount()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_dates() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (-1, (1969, 12, 31)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (20_781, (2026, 11, 24)),
            (50_402, (2107, 12, 31)),
        ] {
            assert_eq!(civil(days), date, "{days}");
        }
    }

    #[test]
    fn times_out_of_range_are_cut() {
        let year = |seconds| dos_time(Time { seconds, nanoseconds: 0 }).date.year;
        assert_eq!((year(0), year(i64::MAX), year(i64::MIN)), (1980, 2107, 1980));
    }

    #[test]
    fn labels_a_fat_cannot_have() {
        assert_eq!(Name::new("cidata", 0x1234_ABCD).unwrap().label, *b"CIDATA     ");
        assert_eq!(Name::new("x", 0x1234_ABCD).unwrap().uuid(), "1234-ABCD");
        for bad in ["", "   ", "twelve bytes", "ä", "a/b"] {
            assert!(Name::new(bad, 0).is_err(), "{bad:?}");
        }
    }
}
