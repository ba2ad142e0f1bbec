//! Builds, seen from outside: what is in an image, what is refused, and what is left behind.

mod compare;
mod disk;
mod failing;
mod image;
mod interrupted;
mod kernel;
mod oci;
mod packed;
mod properties;
mod refusals;
#[cfg(feature = "registry")]
mod registry;
mod room;
mod same;
mod sample;
mod setting;
mod settings;
mod tailoring;
mod verify;

/// Not a test: what a build starts under fakeroot, with this program as its helper.
#[test]
fn stage_helper() {
    if std::env::var_os("VBD_STAGE").is_some() {
        vbd_fs::serve_stage().expect("a stage that was started by a build");
    }
}
