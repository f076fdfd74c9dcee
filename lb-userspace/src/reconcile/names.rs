//! What `NAMES` holds: whose frontends have which number. It is for people alone: a name that does not fit is left out.

use std::collections::BTreeMap;

use lb_common::abi::OwnerName;

use crate::entries::Op;
use crate::owner::Owner;

/// The names in the map.
#[derive(Debug)]
pub(super) struct Names {
    limit: u32,
    /// Whose they are, by number.
    held: BTreeMap<u32, Owner>,
    /// As they were found, and nobody's yet.
    found: BTreeMap<u32, OwnerName>,
}

impl Names {
    /// `found`: what the map holds already.
    pub(super) fn new(limit: u32, found: BTreeMap<u32, OwnerName>) -> Self {
        Self { limit, held: BTreeMap::new(), found }
    }

    /// The owner has frontends with this number.
    pub(super) fn set(&mut self, service: u32, owner: &Owner) -> Option<Op> {
        if self.held.contains_key(&service) {
            return None;
        }
        let found = self.found.remove(&service);
        if found.is_none() && self.held.len() + self.found.len() >= self.limit as usize {
            return None;
        }
        self.held.insert(service, owner.clone());
        (found != Some(owner.into())).then(|| Op::SetName { service, owner: owner.clone() })
    }

    /// No frontend has this number any more.
    pub(super) fn remove(&mut self, service: u32) -> Option<Op> {
        let held = self.held.remove(&service).is_some() || self.found.remove(&service).is_some();
        held.then_some(Op::RemoveName { service })
    }

    /// Whose frontends have this number.
    pub(super) fn owner(&self, service: u32) -> Option<&Owner> {
        self.held.get(&service)
    }

    /// What the map holds, from this number on.
    pub(super) fn from(&self, service: u32) -> impl Iterator<Item = Op> {
        self.held.range(service..).map(|(id, owner)| Op::SetName { service: *id, owner: owner.clone() })
    }

    /// Removes those that were found and have become nobody's.
    pub(super) fn finish(&mut self) -> Vec<Op> {
        std::mem::take(&mut self.found).into_keys().map(|service| Op::RemoveName { service }).collect()
    }
}
