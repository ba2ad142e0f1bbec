//! Errors of setting the server up. What goes wrong with a request or a client is answered to the client and logged.

use std::io;
use std::path::PathBuf;

/// Results of setting up.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a server or an export could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// As it was given.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// Another server is alive at the socket's path.
    #[error("{}: another server answers on this socket; stop it, or choose another path", path.display())]
    Alive {
        /// The socket.
        path: PathBuf,
    },
    /// What is at the socket's path is no socket, and is left alone.
    #[error("{}: exists and is no socket; remove it, or choose another path", path.display())]
    NotASocket {
        /// What is there.
        path: PathBuf,
    },
    /// A certificate or key cannot be used.
    #[error("{}: {why}", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// An export's name must have 1 to 4096 bytes without NUL.
    #[error("`{}` cannot be the name of an export: 1 to 4096 bytes without NUL are needed", name.escape_debug())]
    Name {
        /// The name.
        name: String,
    },
    /// There is an export with this name.
    #[error("there is an export named `{name}` already")]
    Taken {
        /// The name.
        name: String,
    },
    /// There is no export with this name.
    #[error("there is no export named `{name}`")]
    NoExport {
        /// The name.
        name: String,
    },
    /// The server has no reactor to run on, or the one it wanted has ended.
    #[error("the server has no reactor to run on")]
    NoReactor,
}
