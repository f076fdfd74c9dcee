//! Maps in memory, for tests of everything above the datapath. They refuse what the kernel's maps would
//! refuse, and also what a packet must never meet.

use std::collections::BTreeSet;

use ipnet::IpNet;
use lb_common::abi::{self, backend_state};
use lb_common::maps::MAX_NETWORKS;

use super::{ApplyError, MapError, Maps, Position};
use crate::entries::{BackendEntry, Family, FrontendKey, Limits, Op, Snapshot, Table};

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
    /// Runs of operations on one map, each of which is a system call or a few.
    pub runs: u64,
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
            runs: 0,
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

    /// Changes the maps behind everybody's back, in a way that no operation would.
    pub fn damage(&mut self, change: impl FnOnce(&mut Snapshot, &mut [u32])) {
        change(&mut self.state, &mut self.slots);
        self.refs.fill(0);
        let windows = self.state.frontends.values().flat_map(|entry| [entry.internal, entry.external]);
        for window in windows {
            let from = window.base as usize;
            for refs in self.refs.iter_mut().skip(from).take(window.len as usize) {
                *refs += 1;
            }
        }
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
        for window in [entry.internal, entry.external] {
            // One that was damaged may refer to anything.
            for refs in self.refs.iter_mut().skip(window.base as usize).take(window.len as usize) {
                *refs = refs.saturating_add_signed(change);
            }
        }
    }

    fn has(&self, write: &Op) -> bool {
        let state = &self.state;
        match write {
            Op::SetBackend { family, id, entry } => state.backends.get(&(*family, *id)) == Some(entry),
            Op::WriteSlots { base, slots } | Op::MendSlots { base, slots } => {
                self.slots.get(*base as usize..*base as usize + slots.len()) == Some(slots)
            }
            Op::SetFrontend { key, entry } => state.frontends.get(key) == Some(entry),
            Op::AddMember { window, backend } => {
                state.members.get(window).is_some_and(|ids| ids.contains(backend))
            }
            Op::SetNetwork { family, index, network } => {
                let list = &state.networks[usize::from(*family == Family::V6)];
                list.get(*index as usize) == network.as_ref()
            }
            Op::SetSource { service, net } => {
                state.sources.get(service).is_some_and(|nets| nets.contains(net))
            }
            Op::SetName { service, owner } => state.names.get(service) == Some(&owner.into()),
            Op::SetAddress { addr, flags } => state.addresses.get(addr) == Some(flags),
            Op::SetPlace { key, place } => state.places.get(key) == Some(place),
            Op::RemoveFrontend { .. }
            | Op::RemovePlace { .. }
            | Op::RemoveMember { .. }
            | Op::RemoveSource { .. }
            | Op::RemoveName { .. }
            | Op::RemoveAddress { .. } => false,
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
                if entry.generation == 0 {
                    self.state.backends.remove(&(*family, *id));
                } else {
                    self.state.backends.insert((*family, *id), *entry);
                }
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
            Op::MendSlots { base, slots } => {
                let place = *base as usize..*base as usize + slots.len();
                let Some(place) = self.slots.get_mut(place).filter(|_| *base > 0) else {
                    return Err(Self::failed("SLOTS", format!("{base} is out of bounds")));
                };
                place.copy_from_slice(slots);
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
            Op::SetPlace { key, place } => {
                self.state.places.insert(*key, *place);
            }
            Op::RemovePlace { key } => {
                self.state.places.remove(key);
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

    fn differing(&mut self, writes: Vec<Op>) -> Result<Vec<Op>, MapError> {
        Ok(writes.into_iter().filter(|write| !self.has(write)).collect())
    }

    /// All at once.
    fn entries(
        &mut self,
        table: Table,
        _: Option<Position>,
        _: usize,
    ) -> Result<(Vec<Op>, Option<Position>), MapError> {
        let state = &self.state;
        let ops = match table {
            Table::Backends => {
                let unused = |&(family, id): &(Family, u32)| Op::SetBackend {
                    family,
                    id,
                    entry: BackendEntry::unused(family),
                };
                state.backends.keys().map(unused).collect()
            }
            Table::Slots => vec![],
            Table::Members => {
                let all = state.members.iter().flat_map(|(window, ids)| ids.iter().map(|id| (*window, *id)));
                all.map(|(window, backend)| Op::RemoveMember { window, backend }).collect()
            }
            Table::Sources => {
                let all = state.sources.iter().flat_map(|(id, nets)| nets.iter().map(|net| (*id, *net)));
                all.map(|(service, net)| Op::RemoveSource { service, net }).collect()
            }
            Table::Names => state.names.keys().map(|id| Op::RemoveName { service: *id }).collect(),
            Table::Networks => {
                let lists = [Family::V4, Family::V6].into_iter().zip(&state.networks);
                let all = lists.flat_map(|(family, list)| (0u32..).zip(list).map(move |(i, _)| (family, i)));
                let end = |(family, index)| Op::SetNetwork { family, index, network: None };
                let ops: Vec<Op> = all.map(end).collect();
                // From the end: a list has no gaps.
                ops.into_iter().rev().collect()
            }
            Table::Frontends => state.frontends.keys().map(|key| Op::RemoveFrontend { key: *key }).collect(),
            Table::Places => state.places.keys().map(|key| Op::RemovePlace { key: *key }).collect(),
            Table::Addresses => {
                state.addresses.keys().map(|addr| Op::RemoveAddress { addr: *addr }).collect()
            }
        };
        Ok((ops, None))
    }

    fn apply(&mut self, ops: &[Op]) -> Result<(), ApplyError> {
        self.runs += ops.chunk_by(|op, next| op.map() == next.map()).count() as u64;
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
