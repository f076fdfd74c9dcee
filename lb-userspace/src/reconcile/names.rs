//! What `NAMES` holds: whose frontends have which number. It is for people alone: a name that does not fit is left out.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::abi::OwnerName;

use crate::entries::Op;
use crate::owner::Owner;

/// The names in the map.
#[derive(Debug)]
pub(super) struct Names {
    limit: u32,
    /// The numbers that have one.
    held: BTreeSet<u32>,
    /// As they were found, and nobody's yet.
    found: BTreeMap<u32, OwnerName>,
}

impl Names {
    /// `found`: what the map holds already.
    pub(super) fn new(limit: u32, found: BTreeMap<u32, OwnerName>) -> Self {
        Self { limit, held: found.keys().copied().collect(), found }
    }

    /// The owner has frontends with this number.
    pub(super) fn set(&mut self, service: u32, owner: &Owner) -> Option<Op> {
        let found = self.found.remove(&service);
        let held = self.held.contains(&service);
        let is_right = held && found.is_none_or(|name| name == OwnerName::from(owner));
        if is_right || (!held && self.held.len() >= self.limit as usize) {
            return None;
        }
        self.held.insert(service);
        Some(Op::SetName { service, owner: owner.clone() })
    }

    /// No frontend has this number any more.
    pub(super) fn remove(&mut self, service: u32) -> Option<Op> {
        self.held.remove(&service).then_some(Op::RemoveName { service })
    }

    /// Removes those that were found and have become nobody's.
    pub(super) fn finish(&mut self) -> Vec<Op> {
        std::mem::take(&mut self.found).into_keys().filter_map(|service| self.remove(service)).collect()
    }
}
