//! Dates as a FAT has them.

use crate::Time;

/// A date and a time of day in UTC, two seconds fine, cut to what a FAT can say: 1980 to 2107.
pub(super) fn encode(time: Time) -> (u16, u16) {
    const FIRST: i64 = 315_532_800;
    const LAST: i64 = 4_354_819_199;
    let seconds = time.seconds.clamp(FIRST, LAST);
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let date = (year - 1980) << 9 | month << 5 | day;
    let time = (second / 3600) << 11 | (second / 60 % 60) << 5 | (second % 60 / 2);
    (u16::try_from(date).unwrap_or(0x21), u16::try_from(time).unwrap_or(0))
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
        let date = |seconds| encode(Time { seconds, nanoseconds: 0 }).0;
        assert_eq!((date(0), date(i64::MAX), date(i64::MIN)), (0x21, 127 << 9 | 12 << 5 | 31, 0x21));
        assert_eq!(
            encode(Time { seconds: 1_732_449_599, nanoseconds: 0 }),
            (44 << 9 | 11 << 5 | 24, 11 << 11 | 59 << 5 | 29)
        );
    }
}
