//! The reactor: one io_uring (or thread pool) a thread, timers, tasks, adaptive polling.
