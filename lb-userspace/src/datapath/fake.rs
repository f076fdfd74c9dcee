//! Maps in memory, for tests of everything above the datapath. They refuse what the kernel's maps would
//! refuse, and also what a packet must never meet.

use std::collections::BTreeSet;

use ipnet::IpNet;
use lb_common::abi::{self, backend_state};
use lb_common::maps::MAX_NETWORKS;

use super::{ApplyError, MapError, Maps};
use crate::entries::{Family, FrontendKey, Limits, Op, Snapshot};

/// Maps in memory.
///
/// Every operation is checked: a frontend whose window holds an unwritten slot or an unused backend, or a
/// write into a window that a frontend refers to, is a failure, as it would be met by a packet.
#[derive(Clone, Debug)]
pub struct FakeMaps {
    limits: Limits,
    state: Snapshot,
    slots: Vec<u32>,
    /// Windows of frontends that a slot is in.
    refs: Vec<u32>,
    /// Operations carried out since the start.
    pub applied: u64,
    /// Operations to carry out before the next one fails.
    pub fail_after: Option<u64>,
}

impl FakeMaps {
    /// Empty maps.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            state: Snapshot::default(),
            slots: vec![0; limits.slots as usize],
            refs: vec![0; limits.slots as usize],
            applied: 0,
            fail_after: None,
        }
    }

    /// What the maps hold; like [`Maps::read`], which needs `&mut`.
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = self.state.clone();
        for service in self.state.frontends.values() {
            for window in [service.internal, service.external] {
                if window.len > 0 {
                    snapshot.slots.insert(window.base, self.window(window).to_vec());
                }
            }
        }
        snapshot
    }

    /// Backend ids of a window.
    pub fn window(&self, window: abi::Window) -> &[u32] {
        self.slots.get(window.base as usize..(window.base + window.len) as usize).unwrap_or_default()
    }

    fn failed(map: &str, reason: impl Into<String>) -> MapError {
        MapError::Failed { map: map.into(), reason: reason.into() }
    }

    fn check_frontend(&self, key: FrontendKey, entry: &abi::Service) -> Result<(), MapError> {
        for window in [entry.internal, entry.external] {
            if window.len == 0 {
                continue;
            }
            if window.base == 0 || u64::from(window.base) + u64::from(window.len) > self.slots.len() as u64 {
                return Err(Self::failed("SERVICES", format!("{key:?}: {window:?} is outside SLOTS")));
            }
            let ids: BTreeSet<u32> = self.window(window).iter().copied().collect();
            for id in ids {
                let usable = self
                    .state
                    .backends
                    .get(&(Family::of(key.addr), id))
                    .is_some_and(|b| b.state == backend_state::ACTIVE);
                if !usable {
                    return Err(Self::failed("SERVICES", format!("{key:?}: backend {id} is not active")));
                }
                let members = self.state.members.get(&window.base);
                if entry.affinity > 0 && !members.is_some_and(|ids| ids.contains(&id)) {
                    return Err(Self::failed("SERVICES", format!("{key:?}: backend {id} is no member")));
                }
            }
        }
        Ok(())
    }

    fn referred(&self, base: u32, len: u32) -> Option<FrontendKey> {
        if self.refs[base as usize..(base + len) as usize].iter().all(|refs| *refs == 0) {
            return None;
        }
        let overlaps = |w: abi::Window| w.len > 0 && w.base < base + len && base < w.base + w.len;
        self.state
            .frontends
            .iter()
            .find(|(_, service)| overlaps(service.internal) || overlaps(service.external))
            .map(|(key, _)| *key)
    }

    /// A frontend comes or goes.
    fn count(&mut self, entry: &abi::Service, change: i32) {
        for window in [entry.internal, entry.external].iter().filter(|window| window.len > 0) {
            for refs in &mut self.refs[window.base as usize..(window.base + window.len) as usize] {
                *refs = refs.saturating_add_signed(change);
            }
        }
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each operation")]
    fn apply_one(&mut self, op: &Op) -> Result<(), MapError> {
        match op {
            Op::SetBackend { family, id, entry } => {
                if *id == 0 || *id >= self.limits.backends {
                    return Err(Self::failed("BACKENDS", format!("no backend id {id}")));
                }
                if Family::of(entry.addr.ip()) != *family {
                    return Err(Self::failed("BACKENDS", format!("{} is of the other family", entry.addr)));
                }
                if entry.state != backend_state::ACTIVE {
                    for (key, service) in &self.state.frontends {
                        if Family::of(key.addr) == *family
                            && [service.internal, service.external]
                                .iter()
                                .any(|w| self.window(*w).contains(id))
                        {
                            return Err(Self::failed(
                                "BACKENDS",
                                format!("{key:?} still chooses backend {id}"),
                            ));
                        }
                    }
                }
                self.state.backends.insert((*family, *id), *entry);
            }
            Op::WriteSlots { base, slots } => {
                let len = u32::try_from(slots.len()).unwrap_or(u32::MAX);
                if *base == 0 || u64::from(*base) + u64::from(len) > self.slots.len() as u64 {
                    return Err(Self::failed("SLOTS", format!("{len} slots from {base} are out of bounds")));
                }
                if let Some(key) = self.referred(*base, len) {
                    return Err(Self::failed("SLOTS", format!("{key:?} refers to slots from {base}")));
                }
                self.slots[*base as usize..(*base + len) as usize].copy_from_slice(slots);
            }
            Op::SetFrontend { key, entry } => {
                self.check_frontend(*key, entry)?;
                let family = Family::of(key.addr);
                let held = || self.state.frontends.keys().filter(|k| Family::of(k.addr) == family).count();
                if !self.state.frontends.contains_key(key)
                    && self.state.frontends.len() >= self.limits.services as usize
                    && held() >= self.limits.services as usize
                {
                    return Err(MapError::Full { map: "SERVICES".into(), capacity: self.limits.services });
                }
                if let Some(old) = self.state.frontends.insert(*key, *entry) {
                    self.count(&old, -1);
                }
                self.count(entry, 1);
            }
            Op::RemoveFrontend { key } => {
                if let Some(old) = self.state.frontends.remove(key) {
                    self.count(&old, -1);
                }
            }
            Op::SetAddress { addr, flags } => {
                let family = Family::of(*addr);
                let held = || self.state.addresses.keys().filter(|a| Family::of(**a) == family).count();
                if !self.state.addresses.contains_key(addr)
                    && self.state.addresses.len() >= self.limits.addresses as usize
                    && held() >= self.limits.addresses as usize
                {
                    return Err(MapError::Full { map: "ADDRESSES".into(), capacity: self.limits.addresses });
                }
                self.state.addresses.insert(*addr, *flags);
            }
            Op::RemoveAddress { addr } => {
                self.state.addresses.remove(addr);
            }
            Op::AddMember { window, backend } => {
                let held: usize = self.state.members.values().map(BTreeSet::len).sum();
                let ids = self.state.members.entry(*window).or_default();
                if held >= self.limits.members as usize && !ids.contains(backend) {
                    return Err(MapError::Full { map: "MEMBERS".into(), capacity: self.limits.members });
                }
                ids.insert(*backend);
            }
            Op::RemoveMember { window, backend } => {
                for (key, service) in self.state.frontends.iter().filter(|(_, s)| s.affinity > 0) {
                    for other in [service.internal, service.external].iter().filter(|w| w.base == *window) {
                        if self.window(*other).contains(backend) {
                            let reason = format!("{key:?} still relies on {backend} in {window}");
                            return Err(Self::failed("MEMBERS", reason));
                        }
                    }
                }
                if let Some(ids) = self.state.members.get_mut(window) {
                    ids.remove(backend);
                    if ids.is_empty() {
                        self.state.members.remove(window);
                    }
                }
            }
            Op::SetName { service, owner } => {
                let names = &mut self.state.names;
                if names.len() >= self.limits.services as usize && !names.contains_key(service) {
                    return Err(MapError::Full { map: "NAMES".into(), capacity: self.limits.services });
                }
                names.insert(*service, owner.into());
            }
            Op::RemoveName { service } => {
                self.state.names.remove(service);
            }
            Op::SetNetwork { family, index, network } => {
                let list = &mut self.state.networks[usize::from(*family == Family::V6)];
                let index = *index as usize;
                match network {
                    Some(network) if index < list.len() => list[index] = *network,
                    Some(network) if index == list.len() && index < MAX_NETWORKS as usize => {
                        list.push(*network);
                    }
                    None if index + 1 == list.len() => drop(list.pop()),
                    _ => return Err(Self::failed("NETWORKS", format!("{network:?} at {index}: a gap"))),
                }
            }
            Op::SetSource { service, net } => {
                let of_family = |other: &&IpNet| other.addr().is_ipv4() == net.addr().is_ipv4();
                let held = self.state.sources.values().flatten().filter(of_family).count();
                let known = self.state.sources.get(service).is_some_and(|nets| nets.contains(net));
                if held >= self.limits.sources as usize && !known {
                    return Err(MapError::Full { map: "SOURCES".into(), capacity: self.limits.sources });
                }
                self.state.sources.entry(*service).or_default().insert(*net);
            }
            Op::RemoveSource { service, net } => {
                if let Some(nets) = self.state.sources.get_mut(service) {
                    nets.remove(net);
                    if nets.is_empty() {
                        self.state.sources.remove(service);
                    }
                }
            }
        }
        Ok(())
    }
}

impl Maps for FakeMaps {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn read(&mut self) -> Result<Snapshot, MapError> {
        Ok(self.snapshot())
    }

    fn apply(&mut self, ops: &[Op]) -> Result<(), ApplyError> {
        for (done, op) in ops.iter().enumerate() {
            if let Some(left) = &mut self.fail_after {
                if *left == 0 {
                    self.fail_after = None;
                    return Err(ApplyError { done, source: Self::failed("TEST", "told to fail") });
                }
                *left -= 1;
            }
            self.apply_one(op).map_err(|source| ApplyError { done, source })?;
            self.applied += 1;
        }
        Ok(())
    }
}
