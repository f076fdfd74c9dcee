//! What `MEMBERS` holds: the backends of windows that frontends with session affinity refer to.

use std::collections::{BTreeMap, BTreeSet};

use crate::entries::Op;

/// The backends in the map, by the base of their window.
#[derive(Debug)]
pub(super) struct Members {
    limit: u32,
    held: BTreeMap<u32, BTreeSet<u32>>,
    count: u64,
}

impl Members {
    /// `held`: what the map holds already.
    pub(super) fn new(limit: u32, held: BTreeMap<u32, BTreeSet<u32>>) -> Self {
        let count = held.values().map(|ids| ids.len() as u64).sum();
        Self { limit, held, count }
    }

    /// How many the map has of a window.
    pub(super) fn of_window(&self, window: u32) -> usize {
        self.held.get(&window).map_or(0, BTreeSet::len)
    }

    /// Entries that the map has room for.
    pub(super) fn available(&self) -> u64 {
        u64::from(self.limit).saturating_sub(self.count)
    }

    pub(super) fn limit(&self) -> u32 {
        self.limit
    }

    /// These are the backends of the window. What is stale goes first: nobody has relied on it.
    pub(super) fn set(&mut self, window: u32, ids: BTreeSet<u32>) -> Vec<Op> {
        let held = self.held.remove(&window).unwrap_or_default();
        let gone = held.difference(&ids).map(|backend| Op::RemoveMember { window, backend: *backend });
        let new = ids.difference(&held).map(|backend| Op::AddMember { window, backend: *backend });
        let ops = gone.chain(new).collect();
        self.count = self.count + ids.len() as u64 - held.len() as u64;
        if !ids.is_empty() {
            self.held.insert(window, ids);
        }
        ops
    }

    /// What the map holds, from this window and backend on.
    pub(super) fn from(&self, window: u32, backend: u32) -> impl Iterator<Item = Op> {
        let all = self.held.range(window..).flat_map(|(window, ids)| ids.iter().map(|id| (*window, *id)));
        let all = all.skip_while(move |at| *at < (window, backend));
        all.map(|(window, backend)| Op::AddMember { window, backend })
    }

    /// Whether the map holds the backend.
    pub(super) fn has(&self, window: u32, backend: u32) -> bool {
        self.held.get(&window).is_some_and(|ids| ids.contains(&backend))
    }

    /// Removes those of windows that are none.
    pub(super) fn finish(&mut self, is_window: impl Fn(u32) -> bool) -> Vec<Op> {
        let stale: Vec<u32> = self.held.keys().filter(|window| !is_window(**window)).copied().collect();
        stale.into_iter().flat_map(|window| self.set(window, BTreeSet::new())).collect()
    }
}
