//! Filesystems in files: build one from a tree, an archive or a suite, and tailor it.
