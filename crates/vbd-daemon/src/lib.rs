//! Configuration, supervision and the control socket.

pub mod config;
