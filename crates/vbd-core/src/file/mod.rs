//! I/O on plain files and block devices.
