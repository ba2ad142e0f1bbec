//! Ranges that exclude each other.
