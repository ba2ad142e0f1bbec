//! The NBD front-end: disks over TCP and unix sockets, to any number of clients.
//!
//! A [`Server`] listens and knows disks by name. Each client's connection lives on one reactor: its handshake
//! (`negotiation`) and its requests (`transmission`) are machines that know neither sockets nor disks, and
//! `connection` brings the three together.

mod command;
mod connection;
mod control;
mod error;
mod export;
mod extents;
#[doc(hidden)]
pub mod fuzz;
mod listen;
mod memory;
mod negotiation;
mod outbox;
mod protocol;
mod server;
mod slab;
mod tls;
mod transmission;
mod transport;

pub use error::{Error, Result};
pub use export::ExportOptions;
pub use listen::Listen;
pub use server::{ClientStatus, ExportStatus, Options, Server, Status};
pub use tls::TlsOptions;
