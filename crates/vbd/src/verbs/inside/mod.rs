//! What the verbs share that look into a disk or change what is in it: `IMAGE:/path`, the partition, the lease, how entries are shown.

pub(super) mod cat;
pub(super) mod change;
pub(super) mod chmod;
pub(super) mod chown;
pub(super) mod cp;
pub(super) mod df;
pub(super) mod diff;
pub(super) mod du;
pub(super) mod edit;
mod expression;
pub(super) mod find;
pub(super) mod ln;
pub(super) mod ls;
pub(super) mod mkdir;
pub(super) mod mv;
mod open;
pub(super) mod rm;
mod shown;
pub(super) mod tailor;
pub(super) mod tar;
mod target;

use open::{Access, Opened};
use target::Target;
