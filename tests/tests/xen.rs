//! Xen end to end: each test boots an emulated machine with Xen 4.17 and a Debian dom0, and runs one of
//! `tests/xen-lab/cases` there, with PV guests on the disks.

use std::time::Duration;

use anyhow::Result;
use vbd_tests::XenLab;

/// How long a boot with its guests may take: many times what it needs on a quiet machine.
const LIMIT: Duration = Duration::from_secs(330);

fn case(name: &str) -> Result<()> {
    XenLab::get()?.run(name, &[], LIMIT).map(drop)
}

#[test]
fn the_peers_serve_guests_here() -> Result<()> {
    case("baselines")
}
