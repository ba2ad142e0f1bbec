//! The L2 tables that are in memory: one copy of each at most, as many as the bound allows.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, PoisonError, Weak};

use vbd_core::range_lock::RangeLocks;
use vbd_ring::sync::{Mutex, MutexGuard};

use super::table::Table;

/// The tables. Strong references are kept within the bound; a table that somebody uses, or that is dirty, is found
/// beyond that too.
pub(in crate::live) struct Registry {
    state: Mutex<State>,
    /// Held while a table is read, made or moved, by its index.
    pub(in crate::live) changing: Arc<RangeLocks>,
    bound: usize,
}

#[derive(Default)]
struct State {
    tables: HashMap<u64, Slot>,
    /// Those with a strong reference, for the next to lose it.
    order: VecDeque<u64>,
    /// How many dead entries there may be before they are swept.
    sweep: usize,
}

struct Slot {
    weak: Weak<Table>,
    strong: Option<Arc<Table>>,
    /// Asked for since it was last passed over.
    recent: bool,
}

impl Registry {
    /// A registry that keeps at most so many tables that nobody uses.
    pub(in crate::live) fn new(bound: usize) -> Self {
        Registry { state: Mutex::default(), changing: Arc::default(), bound: bound.max(1) }
    }

    /// How many more tables may be kept.
    pub(in crate::live) fn room(&self) -> usize {
        self.bound.saturating_sub(self.state().order.len())
    }

    /// Whether the table of this index is in memory.
    pub(in crate::live) fn has(&self, index: u64) -> bool {
        self.state().tables.get(&index).is_some_and(|slot| slot.weak.strong_count() > 0)
    }

    /// The bound, in tables.
    pub(in crate::live) fn bound(&self) -> usize {
        self.bound
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The table of this index, if it is in memory.
    pub(in crate::live) fn get(&self, index: u64) -> Option<Arc<Table>> {
        let mut state = self.state();
        let slot = state.tables.get_mut(&index)?;
        let table = slot.weak.upgrade()?;
        slot.recent = true;
        if slot.strong.is_none() {
            slot.strong = Some(table.clone());
            state.keep(index, self.bound);
        }
        Some(table)
    }

    /// Adds a table that was read or made; its index is held in [`changing`](Self::changing).
    pub(in crate::live) fn add(&self, table: &Arc<Table>) {
        let mut state = self.state();
        let slot = Slot { weak: Arc::downgrade(table), strong: Some(table.clone()), recent: false };
        state.tables.insert(table.index, slot);
        state.keep(table.index, self.bound);
    }

    /// Forgets all tables, where their places mean something else from now on. None of them is dirty or in use.
    pub(in crate::live) fn clear(&self) {
        *self.state() = State::default();
    }
}

impl State {
    /// Counts a table in that got a strong reference, and takes those of others away beyond the bound.
    fn keep(&mut self, index: u64, bound: usize) {
        self.order.push_back(index);
        let mut passed = 0;
        while self.order.len() > bound {
            let Some(oldest) = self.order.pop_front() else { break };
            let Some(slot) = self.tables.get_mut(&oldest) else { continue };
            if slot.recent && passed < bound {
                slot.recent = false;
                passed += 1;
                self.order.push_back(oldest);
                continue;
            }
            slot.strong = None;
        }
        if self.tables.len() > (bound * 2).max(self.sweep) {
            self.tables.retain(|_, slot| slot.weak.strong_count() > 0);
            self.sweep = self.tables.len() * 2;
        }
    }
}
