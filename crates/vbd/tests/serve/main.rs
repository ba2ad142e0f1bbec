//! The verbs that serve disks, and those that speak to them, through the real command.

mod attach;
mod control;
mod formats;
mod harness;
mod paste;
mod up;
mod upkeep;
