//! The configuration through its public face.

mod docs;
mod load;
mod toml;
mod xl;
mod xl_disk;

use super::{ConfigError, Position};

/// The place and the message of an error, as `line:column message`.
fn told(error: &ConfigError) -> String {
    let Position { line, column } = error.position.expect("the error has a place");
    format!("{line}:{column} {}", error.message)
}
