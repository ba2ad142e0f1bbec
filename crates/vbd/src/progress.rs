//! Progress on a terminal; silence in a pipe.
