//! The time of what is made, where it is to be the same every time.

use crate::{Error, Result, Time};

/// The time that `SOURCE_DATE_EPOCH` names, in seconds since 1970
/// (<https://reproducible-builds.org/specs/source-date-epoch/>).
///
/// # Errors
///
/// A value that is no number of seconds.
pub fn source_date_epoch() -> Result<Option<Time>> {
    let Some(value) = std::env::var_os("SOURCE_DATE_EPOCH").filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    let seconds = value.to_str().and_then(|text| text.parse().ok()).filter(|seconds| *seconds >= 0);
    let seconds = seconds.ok_or_else(|| {
        Error::Invalid(format!("SOURCE_DATE_EPOCH is {value:?}: it must be a number of seconds since 1970"))
    })?;
    Ok(Some(Time { seconds, nanoseconds: 0 }))
}
