//! Sets of extended attributes, each kept once.

use std::collections::HashMap;
use std::sync::Arc;

use crate::entry::Xattr;

/// All sets; number 0 is the empty one.
pub(super) struct Attributes {
    sets: Vec<Arc<[Xattr]>>,
    numbers: HashMap<Arc<[Xattr]>, u32>,
    /// Bytes of all names and values.
    pub(super) bytes: usize,
}

impl Default for Attributes {
    fn default() -> Attributes {
        Attributes { sets: vec![Arc::from([])], numbers: HashMap::new(), bytes: 0 }
    }
}

impl Attributes {
    pub(super) fn get(&self, number: u32) -> &[Xattr] {
        &self.sets[number as usize]
    }

    /// The number of a set, which is ordered by names.
    pub(super) fn id(&mut self, set: &[Xattr]) -> u32 {
        if set.is_empty() {
            return 0;
        }
        if let Some(&number) = self.numbers.get(set) {
            return number;
        }
        // There are no more sets than nodes, whose number fits.
        let number = u32::try_from(self.sets.len()).unwrap_or(0);
        self.bytes += set.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
        let set: Arc<[Xattr]> = Arc::from(set);
        self.sets.push(Arc::clone(&set));
        self.numbers.insert(set, number);
        number
    }
}
