//! Which parts of a disk an image holds itself, and which it leaves to those that it stands on.

use vbd_core::{Client, ExtentKind, Layer, Live};

use crate::ranges::Extents;
use crate::{Error, Result};

/// The format's own view of an open image.
///
/// # Errors
/// Images of its format stand on nothing.
pub(crate) fn live<'a>(image: &'a Client, name: &str) -> Result<&'a dyn Live> {
    image
        .session()
        .live()
        .ok_or_else(|| Error::Refused(format!("{name}: images of its format stand on no others")))
}

/// Refuses to change what an image reads from below where it has snapshots, which read that too.
pub(crate) fn no_snapshots(live: &dyn Live, name: &str) -> Result<()> {
    if live.snapshots()?.is_empty() {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "{name}: its snapshots need what the images behind it hold now: delete them first, or convert the image"
    )))
}

/// What an image holds itself.
pub(crate) struct Own<'a>(pub(crate) &'a dyn Live);

impl Extents for Own<'_> {
    fn extents(&self, offset: u64, len: u64) -> Result<Vec<(u64, bool)>> {
        let extents = self.0.layer(offset, len)?;
        Ok(extents.into_iter().map(|extent| (extent.len, extent.layer != Layer::Below)).collect())
    }
}

/// What an image leaves to those below, where there is any data there, or in what is to be there in their place.
pub(crate) struct Below<'a> {
    pub(crate) image: &'a Client,
    pub(crate) live: &'a dyn Live,
    pub(crate) other: Option<&'a Client>,
}

impl Extents for Below<'_> {
    fn extents(&self, offset: u64, len: u64) -> Result<Vec<(u64, bool)>> {
        let Some(first) = self.live.layer(offset, len)?.into_iter().next() else {
            return Err(Error::Refused("the image does not tell what it holds".to_owned()));
        };
        if first.layer != Layer::Below {
            return Ok(vec![(first.len, false)]);
        }
        let (len, data) = first_extent(self.image, offset, first.len)?;
        match self.other {
            Some(other) if !data && offset < other.size() => {
                let (len, data) = first_extent(other, offset, len.min(other.size() - offset))?;
                Ok(vec![(len, data)])
            }
            _ => Ok(vec![(len, data)]),
        }
    }
}

fn first_extent(disk: &Client, offset: u64, len: u64) -> Result<(u64, bool)> {
    let extents = disk.extents(offset, len)?;
    let first =
        extents.first().ok_or_else(|| Error::Refused("a disk does not tell what it holds".to_owned()))?;
    Ok((first.len, first.kind == ExtentKind::Data))
}
