//! Times for people and for JSON.

use std::time::{SystemTime, UNIX_EPOCH};

/// A time as RFC 3339 writes it, in UTC and to the second: `2026-11-22T14:20:01Z`. Times before 1970 become 1970.
pub(crate) fn timestamp(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    rfc3339(i64::try_from(seconds).unwrap_or(i64::MAX))
}

/// That many seconds after 1970 (before, if negative) as RFC 3339 writes it: `2026-11-22T14:20:01Z`. Times that a file
/// cannot have become the nearest ones that have a year of four digits.
pub fn rfc3339(seconds: i64) -> String {
    const LAST: i64 = 253_402_300_799;
    const FIRST: i64 = -62_135_596_800;
    let seconds = seconds.clamp(FIRST, LAST);
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = date(days);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// Year, month and day of the month, that many days after 1970-01-01 (Gregorian calendar), from year 1 on.
fn date(days: i64) -> (i64, i64, i64) {
    // Years are counted from 1 March of year 0, so that the leap day ends a year, an era being 400 years.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let march = (5 * day + 2) / 153;
    let month = if march < 10 { march + 3 } else { march - 9 };
    (era * 400 + year + i64::from(month <= 2), month, day - (153 * march + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn timestamps() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_210_096, "2024-02-29T12:34:56Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
        assert_eq!(timestamp(UNIX_EPOCH - Duration::from_secs(1)), "1970-01-01T00:00:00Z");
        for (seconds, expected) in [
            (-1, "1969-12-31T23:59:59Z"),
            (-2_147_483_648, "1901-12-13T20:45:52Z"),
            (15_032_385_535, "2446-05-10T22:38:55Z"),
            (i64::MIN, "0001-01-01T00:00:00Z"),
            (i64::MAX, "9999-12-31T23:59:59Z"),
        ] {
            assert_eq!(rfc3339(seconds), expected);
        }
    }
}
