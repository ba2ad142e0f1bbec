//! The front-ends, as the supervisor uses them.

use std::time::Duration;

use crate::Fault;
use crate::config::NbdConfig;
use crate::service::Listener;

use super::reactors::Reactors;

/// The NBD servers of the process, each of which exports every disk that has an export's name.
pub(super) struct Exports {}

impl Exports {
    pub(super) fn bind(
        _config: Option<NbdConfig>,
        _passed: Vec<Listener>,
        _reactors: &Reactors,
        _faults: &mut Vec<Fault>,
    ) -> Self {
        Exports {}
    }

    pub(super) fn stop(&self, _within: Duration) -> Vec<Fault> {
        Vec::new()
    }
}
