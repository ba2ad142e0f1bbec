//! Configuration, supervision and the control socket.
