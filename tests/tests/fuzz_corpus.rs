//! What fuzzers found and what they start from, through the same functions, on every run of the tests.

use std::collections::BTreeSet;
use std::path::PathBuf;

use vbd_daemon::config;
use vbd_testing::corpus;

/// A fuzz target and what it calls.
type Target = (&'static str, fn(&[u8]));

const TARGETS: &[Target] = &[
    ("backup_manifest", vbd_jobs::backup::fuzz_manifest),
    ("config_toml", config::fuzz::toml),
    ("config_xl", config::fuzz::xl),
    ("cpio", |bytes| drop(vbd_fs::cpio::check(bytes))),
    ("ext4_acl", vbd_ext4::format::acl::fuzz),
    ("ext4_check", vbd_ext4::check::fuzz::check),
    ("ext4_edit", vbd_ext4::edit::fuzz::edit),
    ("ext4_quota", vbd_ext4::format::quota::fuzz),
    ("ext4_read", vbd_ext4::read::fuzz::read),
    ("fat", vbd_fs::vfat::fuzz),
    ("foreign", vbd_foreign::fuzz),
    ("luks", vbd_luks::fuzz),
    ("nbd_commands", vbd_nbd::fuzz::commands),
    ("nbd_negotiation", vbd_nbd::fuzz::negotiation),
    ("oci_layers", vbd_fs::oci::fuzz_layers),
    ("oci_manifest", vbd_fs::oci::fuzz),
    ("oci_registry", vbd_fs::oci::fuzz_registry),
    ("partition", vbd_image::partition::fuzz),
    ("probe", |bytes| drop(vbd_image::probe::filesystem_bytes(bytes))),
    ("qcow2_check", vbd_qcow2::check::fuzz::check_and_repair),
    ("qcow2_structures", vbd_qcow2::format::fuzz::structures),
    ("sidecar", vbd_image::sidecar::fuzz),
    ("squashfs", vbd_fs::squashfs::fuzz),
    ("tar", |bytes| drop(vbd_fs::tar::check(bytes))),
    ("vhd", vbd_vhd::fuzz),
    ("virtqueue_inflight", vbd_vhost_user::fuzz_inflight),
    ("virtqueue_request", vbd_vhost_user::fuzz_virtqueue),
    ("xen_ring", vbd_xen::fuzz_ring),
    ("xen_store", vbd_xen::fuzz_store),
    ("xen_target", config::fuzz::xen_target),
    ("xl_disk", config::fuzz::xl_disk),
];

#[test]
fn every_kept_input_is_answered() {
    for (target, call) in TARGETS {
        corpus::replay(target, *call);
    }
}

#[test]
fn every_target_is_here() {
    let names = |dir: &str| -> BTreeSet<String> {
        let stem = |path: &PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
        corpus::entries(&corpus::fuzz_dir().join(dir)).iter().map(stem).collect()
    };
    let here = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names("fuzz_targets"), here);
    assert_eq!(names("corpus"), here);
}
