//! What the maps should hold by now, in slices: for whoever looks whether they do.
//!
//! Between two batches the reconciler knows every entry of every map, those that wait for the end of their grace time
//! included. What differs was written by somebody else.

use std::net::IpAddr;
use std::ops::Bound;

use ipnet::IpNet;
use lb_common::abi;

use super::{Content, Reconciler, Window};
use crate::entries::{Family, FrontendKey, Op, Protocol, Table};
use crate::owner::Owner;

/// Slots that cost as much to compare as one entry.
const SLOTS_PER_ENTRY: usize = 16;

/// The last entry of a slice; the next slice begins behind it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Spot {
    Backend(Family, u32),
    Window(u32),
    Member(u32, u32),
    Source(u32, IpNet),
    Name(u32),
    Network(Family, u32),
    Frontend(FrontendKey),
    Address(IpAddr),
    Place(FrontendKey),
}

impl Reconciler {
    /// About `budget` entries of a table behind `after`, each as the write that makes it, and the last of them; `None`:
    /// the table ends here. To be asked when everything was carried out and [`Reconciler::finish`] was called.
    pub fn slice(&self, table: Table, after: Option<Spot>, budget: usize) -> (Vec<Op>, Option<Spot>) {
        match table {
            Table::Backends => {
                let (family, id) = match after {
                    Some(Spot::Backend(family, id)) => (family, id + 1),
                    _ => (Family::V4, 0),
                };
                let of_v6 = if family == Family::V4 { 0 } else { id };
                let v4 = (family == Family::V4).then(|| self.backends(Family::V4).from(id));
                take(v4.into_iter().flatten().chain(self.backends(Family::V6).from(of_v6)), budget)
            }
            Table::Slots => {
                let from = match after {
                    Some(Spot::Window(base)) => base + 1,
                    _ => 0,
                };
                take(self.windows_from(from), budget)
            }
            Table::Members => match after {
                Some(Spot::Member(window, backend)) => take(self.members.from(window, backend + 1), budget),
                _ => take(self.members.from(0, 0), budget),
            },
            Table::Sources => match after {
                Some(Spot::Source(service, net)) => take(self.sources.after(service, Some(net)), budget),
                _ => take(self.sources.after(0, None), budget),
            },
            Table::Names => match after {
                Some(Spot::Name(service)) => take(self.names.from(service + 1), budget),
                _ => take(self.names.from(0), budget),
            },
            // A few.
            Table::Networks => take(self.networks_in_maps(), usize::MAX),
            Table::Frontends => {
                let from = match after {
                    Some(Spot::Frontend(key)) => Bound::Excluded(key),
                    _ => Bound::Unbounded,
                };
                let installed = self.installed.range((from, Bound::Unbounded));
                let ops = installed.map(|(key, have)| Op::SetFrontend { key: *key, entry: have.entry });
                take(ops, budget)
            }
            Table::Places => match after {
                Some(Spot::Place(key)) => take(self.places.after(Some(key)), budget),
                _ => take(self.places.after(None), budget),
            },
            Table::Addresses => match after {
                Some(Spot::Address(addr)) => take(self.addresses.after(Some(addr)), budget),
                _ => take(self.addresses.after(None), budget),
            },
        }
    }

    /// Whether the maps should hold the entry that this operation would remove.
    pub fn holds(&self, removal: &Op) -> bool {
        match removal {
            Op::SetBackend { family, id, .. } => self.backends(*family).has(*id),
            Op::WriteSlots { .. } | Op::MendSlots { .. } => true,
            Op::AddMember { window, backend } | Op::RemoveMember { window, backend } => {
                self.members.has(*window, *backend)
            }
            Op::SetSource { service, net } | Op::RemoveSource { service, net } => {
                self.sources.has(*service, net)
            }
            Op::SetName { service, .. } | Op::RemoveName { service } => self.names.owner(*service).is_some(),
            Op::SetNetwork { family, index, .. } => {
                (*index as usize) < self.networks[usize::from(*family == Family::V6)].len()
            }
            Op::SetFrontend { key, .. } | Op::RemoveFrontend { key } => self.installed.contains_key(key),
            Op::SetAddress { addr, .. } | Op::RemoveAddress { addr } => self.addresses.has(addr),
            Op::SetPlace { key, .. } | Op::RemovePlace { key } => self.places.has(key),
        }
    }

    /// A Service that an entry is for. Looks at all frontends if it must: for what people are told.
    pub fn whose(&self, op: &Op) -> Option<&Owner> {
        let of_window = |base: u32| {
            let refers = |window: &abi::Window| window.len > 0 && window.base == base;
            let mut all = self.installed.values();
            let have = all.find(|have| refers(&have.entry.internal) || refers(&have.entry.external))?;
            have.owner.as_ref()
        };
        match op {
            Op::SetBackend { family, id, .. } => {
                let mut windows = self.windows.iter();
                let names = |window: &Window| window.family == *family && window.ids.contains(id);
                of_window(*windows.find(|(_, window)| names(window))?.0)
            }
            Op::WriteSlots { base, .. } | Op::MendSlots { base, .. } => of_window(*base),
            Op::AddMember { window, .. } | Op::RemoveMember { window, .. } => of_window(*window),
            Op::SetSource { service, .. }
            | Op::RemoveSource { service, .. }
            | Op::SetName { service, .. }
            | Op::RemoveName { service } => self.names.owner(*service),
            Op::SetNetwork { .. } | Op::SetPlace { .. } | Op::RemovePlace { .. } => None,
            Op::SetFrontend { key, .. } | Op::RemoveFrontend { key } => {
                self.installed.get(key)?.owner.as_ref()
            }
            Op::SetAddress { addr, .. } | Op::RemoveAddress { addr } => {
                let from = FrontendKey { addr: *addr, port: 0, protocol: Protocol::Tcp };
                let (key, have) = self.installed.range(from..).next()?;
                have.owner.as_ref().filter(|_| key.addr == *addr)
            }
        }
    }

    fn windows_from(&self, base: u32) -> impl Iterator<Item = Op> {
        self.windows.range(base..).filter_map(|(base, window)| {
            let slots = match &window.content {
                Content::Known(choices) => {
                    let ids = choices.backends.iter().map(|b| self.backends(window.family).id(b));
                    choices.fill(&ids.collect::<Option<Vec<_>>>()?)
                }
                Content::Slots(slots) => slots.clone(),
                // About to be replaced, and not to be relied on.
                Content::Foreign => return None,
            };
            Some(Op::MendSlots { base: *base, slots })
        })
    }

    fn networks_in_maps(&self) -> impl Iterator<Item = Op> {
        [Family::V4, Family::V6].into_iter().zip(&self.networks).flat_map(|(family, list)| {
            let list = (0u32..).zip(list);
            list.map(move |(index, network)| Op::SetNetwork { family, index, network: Some(*network) })
        })
    }
}

/// The beginning of `ops`, and where it ends if there is more.
fn take(ops: impl Iterator<Item = Op>, budget: usize) -> (Vec<Op>, Option<Spot>) {
    let (mut taken, mut spent) = (vec![], 0);
    for op in ops {
        spent += match &op {
            Op::MendSlots { slots, .. } => 1 + slots.len() / SLOTS_PER_ENTRY,
            _ => 1,
        };
        let spot = spot(&op);
        taken.push(op);
        if spent >= budget {
            return (taken, Some(spot));
        }
    }
    (taken, None)
}

fn spot(op: &Op) -> Spot {
    match op {
        Op::SetBackend { family, id, .. } => Spot::Backend(*family, *id),
        Op::WriteSlots { base, .. } | Op::MendSlots { base, .. } => Spot::Window(*base),
        Op::AddMember { window, backend } | Op::RemoveMember { window, backend } => {
            Spot::Member(*window, *backend)
        }
        Op::SetSource { service, net } | Op::RemoveSource { service, net } => Spot::Source(*service, *net),
        Op::SetName { service, .. } | Op::RemoveName { service } => Spot::Name(*service),
        Op::SetNetwork { family, index, .. } => Spot::Network(*family, *index),
        Op::SetFrontend { key, .. } | Op::RemoveFrontend { key } => Spot::Frontend(*key),
        Op::SetAddress { addr, .. } | Op::RemoveAddress { addr } => Spot::Address(*addr),
        Op::SetPlace { key, .. } | Op::RemovePlace { key } => Spot::Place(*key),
    }
}
