//! Sizes: what is read, what is refused and why, and that printing one reads back.

use proptest::prelude::*;
use vbd_image::size::{Human, Size, SizeError};

fn bytes(text: &str) -> Result<u64, SizeError> {
    text.parse::<Size>().map(Size::bytes)
}

#[test]
fn units() {
    for (text, expected) in [
        ("1", 1),
        ("512B", 512),
        ("2147484672", 2_147_484_672),
        ("1k", 1024),
        ("2G", 2 << 30),
        ("2g", 2 << 30),
        (" 2 GiB ", 2 << 30),
        ("3MiB", 3 << 20),
        ("3MB", 3_000_000),
        ("3mb", 3_000_000),
        ("1T", 1 << 40),
        ("1TB", 1_000_000_000_000),
        ("1P", 1 << 50),
        ("7E", 7 << 60),
        ("1.5G", 3 << 29),
        ("1.50GB", 1_500_000_000),
        ("0.5K", 512),
        ("1.0", 1),
        ("9223372036854775807", i64::MAX as u64),
    ] {
        assert_eq!(bytes(text), Ok(expected), "{text}");
    }
}

#[test]
fn a_fraction_of_a_byte_is_rounded_up_to_a_sector() {
    assert_eq!(bytes("0.1G"), Ok(107_374_592));
    assert_eq!(bytes("1.1KB"), Ok(1100), "a whole number of bytes stays as it is");
}

#[test]
fn refused_with_the_reason() {
    use SizeError::*;
    for (text, expected) in [
        ("", Empty),
        ("  ", Empty),
        ("0", Zero),
        ("0G", Zero),
        ("0.0M", Zero),
        ("-1", Negative("-1".into())),
        ("-2G", Negative("-2G".into())),
        ("- 2G", Negative("- 2G".into())),
        ("-x", Malformed("-x".into())),
        ("8E", TooLarge("8E".into())),
        ("9223372036854775808", TooLarge("9223372036854775808".into())),
        ("99999999999999999999999999999999999999999999G", TooLarge(format!("{}G", "9".repeat(44)))),
        ("1.5", Fraction("1.5".into())),
        ("1.5B", Fraction("1.5B".into())),
        ("2X", Unit { text: "2X".into(), unit: "X".into() }),
        ("2Gb/s", Unit { text: "2Gb/s".into(), unit: "Gb/s".into() }),
        ("2 2", Unit { text: "2 2".into(), unit: "2".into() }),
        ("2K-1", Unit { text: "2K-1".into(), unit: "K-1".into() }),
        ("2é", Unit { text: "2é".into(), unit: "é".into() }),
        ("1.2.3G", Malformed("1.2.3G".into())),
        (".5G", Malformed(".5G".into())),
        ("1.G", Malformed("1.G".into())),
        ("G", Malformed("G".into())),
        ("1.0000000000000000001G", Malformed("1.0000000000000000001G".into())),
    ] {
        assert_eq!(bytes(text), Err(expected), "{text}");
    }
}

#[test]
fn for_people() {
    for (bytes, expected) in [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2_147_484_672, "2 GiB"),
        (1_048_575, "1 MiB"),
        (u64::MAX, "16 EiB"),
    ] {
        assert_eq!(Human(bytes).to_string(), expected);
    }
    assert_eq!(format!("{:>8}", Human(1024)), "   1 KiB");
}

#[test]
fn serde_takes_numbers_and_texts() {
    let read = |json: &str| serde_json::from_str::<Size>(json);
    assert_eq!(read("4096").unwrap().bytes(), 4096);
    assert_eq!(read("\"1.5G\"").unwrap().bytes(), 3 << 29);
    for (json, expected) in [
        ("0", "size of 0"),
        ("-3", "\"-3\" is negative"),
        ("\"2X\"", "no unit"),
        ("true", "a size: a number"),
    ] {
        let error = read(json).unwrap_err().to_string();
        assert!(error.contains(expected), "{json}: {error}");
    }
    assert_eq!(serde_json::to_string(&"2G".parse::<Size>().unwrap()).unwrap(), "2147483648");
}

proptest! {
    #[test]
    fn what_is_printed_reads_back(n in 1..=i64::MAX as u64, shift in 0u32..62) {
        let size = Size::from_bytes((n >> shift << shift).max(1)).unwrap();
        prop_assert_eq!(size.to_string().parse::<Size>(), Ok(size));
    }

    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,40}", number in "[-0-9. ]{0,40}", unit in "[KMGTPEXkiIbB ]{0,4}") {
        for text in [&text, &format!("{number}{unit}")] {
            if let Ok(size) = text.parse::<Size>() {
                prop_assert!(size >= Size::from_bytes(1).unwrap() && size <= Size::MAX);
            }
        }
    }

    #[test]
    fn people_see_what_is_there_within_a_twentieth(n in 1u64..) {
        let text = Human(n).to_string();
        let (number, unit) = text.split_once(' ').unwrap();
        let power = i32::try_from("BKMGTPE".find(&unit[..1]).unwrap()).unwrap();
        let shown = number.parse::<f64>().unwrap() * 1024f64.powi(power);
        prop_assert!((shown - n as f64).abs() <= n as f64 / 20.0, "{} for {}", text, n);
    }
}
