//! Where the data of a request is while the storage works on it: the one place that decides.

/// The choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placement {
    /// In the domain's own pages, which stay mapped for its next requests. No system call, no copy.
    Persistent,
    /// In own pages, copied by the hypervisor: one call for a batch of requests.
    Copy,
    /// In the domain's own pages, mapped for this request: two calls and a flush of address translations, whatever the
    /// length.
    Map,
}

/// What is known when a queue starts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    /// The front-end uses the same pages again and again.
    pub(crate) persistent: bool,
    /// Storage may work on the domain's pages: it needs none of them after its answer.
    pub(crate) direct: bool,
}

/// Up to so many pages a copy costs less than mapping.
const MOST_TO_COPY: usize = 32;

impl Policy {
    /// For a request with so many segments, which have no room among the persistent ones where `full`.
    #[inline]
    pub(crate) fn choose(self, segments: usize, full: bool) -> Placement {
        match self {
            Policy { direct: false, .. } => Placement::Copy,
            Policy { persistent: true, .. } if !full => Placement::Persistent,
            _ if segments <= MOST_TO_COPY => Placement::Copy,
            _ => Placement::Map,
        }
    }
}
