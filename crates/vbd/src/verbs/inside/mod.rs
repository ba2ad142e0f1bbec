//! What the verbs share that look into a disk: `IMAGE:/path`, the partition, the lease, how entries are shown.

pub(super) mod cat;
pub(super) mod cp;
pub(super) mod df;
pub(super) mod diff;
pub(super) mod du;
mod expression;
pub(super) mod find;
pub(super) mod ls;
mod open;
mod shown;
pub(super) mod tar;
mod target;

use open::{Access, Opened};
use target::Target;
