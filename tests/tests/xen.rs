//! Xen end to end: each test boots an emulated machine with Xen 4.17 and a Debian dom0, and runs one of
//! `tests/xen-lab/cases` there, with PV guests on the disks.

use std::time::Duration;

use anyhow::Result;
use vbd_tests::XenLab;

/// How long a boot with its guests may take: many times what it needs on a quiet machine.
const LIMIT: Duration = Duration::from_secs(480);

fn case(name: &str) -> Result<()> {
    XenLab::get()?.run(name, &[], LIMIT).map(drop)
}

#[test]
fn the_peers_serve_guests_here() -> Result<()> {
    case("baselines")
}

#[test]
fn guests_are_served_beside_blkback_and_a_second_writer_is_refused() -> Result<()> {
    case("served")
}

#[test]
fn a_filesystem_is_filled_trimmed_rebooted_verified_and_grown() -> Result<()> {
    case("filesystem")
}

#[test]
fn twelve_disks_and_several_queues() -> Result<()> {
    case("twelve")
}

#[test]
fn disks_come_and_go_while_a_guest_runs() -> Result<()> {
    case("hotplug")
}

#[test]
fn a_guest_under_load_is_saved_and_restored() -> Result<()> {
    case("saved")
}

#[test]
fn a_guest_under_load_moves_to_another_domain() -> Result<()> {
    case("moved")
}

#[test]
fn vbd_is_killed_under_load_and_a_guest_destroyed_in_mid_write() -> Result<()> {
    case("killed")
}

#[test]
fn lines_of_domain_files_as_they_always_were() -> Result<()> {
    case("unchanged")
}

#[test]
fn a_driver_domain_serves_another_domain() -> Result<()> {
    case("driver")
}

#[test]
fn disks_that_were_built_start_by_pygrub() -> Result<()> {
    case("pygrub")
}
