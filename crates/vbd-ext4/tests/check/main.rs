//! The checker against e2fsck: on clean filesystems of several makers, and on damaged ones.

mod clean;
mod damaged;
mod hostile;
#[path = "../write/model.rs"]
#[allow(dead_code, reason = "it is the writer's tests that use all of it")]
mod model;
mod tools;
