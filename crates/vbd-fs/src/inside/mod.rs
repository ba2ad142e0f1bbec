//! What is in an image, without mounting it: a walk through its tree, a copy of it to the host, a tar of it, two of
//! them compared; and a copy from the host into it.
//!
//! The reader ([`vbd_ext4::read`]) has checked what the image says before it comes here; what the host gets is checked
//! here: no name of an image leads out of the directory that it is copied to.

pub mod archive;
pub mod compare;
pub mod export;
pub mod import;
mod posix_acl;
pub mod walk;

pub use walk::{Found, Step, Trouble, Walk};
