//! Disk, channel, request and the ordering contract; file I/O, filters, errors.
