//! What `ADDRESSES4/6` should hold: the addresses of the node, of Services and of backends, merged.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;

use ipnet::IpNet;
use lb_common::abi::{address_flags, frontend_kind};

use crate::entries::{Backend, Family, Op, Protocol};

#[derive(Clone, Copy, Default, Debug)]
struct Wanted {
    /// Flags that this node gives it.
    node: u32,
    /// Frontends of kind ClusterIP at this address.
    cluster_ips: u32,
    /// Frontends of other kinds.
    others: u32,
    /// Backends of each protocol at this address.
    backends: [u32; BACKEND_FLAGS.len()],
}

/// What backends of a protocol make of their address.
const BACKEND_FLAGS: [(Protocol, u32); 3] = [
    (Protocol::Tcp, address_flags::BACKEND_TCP),
    (Protocol::Udp, address_flags::BACKEND_UDP),
    (Protocol::Sctp, address_flags::BACKEND_SCTP),
];

impl Wanted {
    fn flags(self) -> u32 {
        let present = BACKEND_FLAGS.iter().zip(self.backends).filter(|(_, count)| *count > 0);
        present.fold(self.own_flags(), |flags, ((_, flag), _)| flags | flag)
    }

    /// Without those of backends.
    fn own_flags(self) -> u32 {
        // On an address of the node itself other ports are not ours to reject, whatever a Service claims.
        if self.node & (address_flags::NODE | address_flags::LOOPBACK) != 0 {
            self.node
        } else if self.cluster_ips > 0 {
            self.node | address_flags::SERVICE
        } else if self.others > 0 {
            self.node | address_flags::FRONTEND
        } else {
            self.node
        }
    }

    fn backends(&mut self, protocol: Protocol) -> &mut u32 {
        let index = BACKEND_FLAGS.iter().position(|(known, _)| *known == protocol);
        &mut self.backends[index.unwrap_or_default()]
    }

    fn frontends(&mut self, kind: u8) -> &mut u32 {
        if kind == frontend_kind::CLUSTER_IP { &mut self.cluster_ips } else { &mut self.others }
    }
}

/// The addresses and what the maps have of them.
#[derive(Debug)]
pub(super) struct Addresses {
    limit: u32,
    wanted: BTreeMap<IpAddr, Wanted>,
    /// Those of the node: a node has few, Services many.
    node: BTreeSet<IpAddr>,
    held: BTreeMap<IpAddr, u32>,
    held_v6: u32,
    /// All Services have been looked at: a backend that none has is none.
    complete: bool,
}

/// No room for another address.
#[derive(Debug)]
pub(super) struct Full;

impl Addresses {
    /// `held`: what the maps hold already.
    pub(super) fn new(limit: u32, held: BTreeMap<IpAddr, u32>) -> Self {
        let held_v6 = held.keys().filter(|addr| addr.is_ipv6()).count();
        let held_v6 = u32::try_from(held_v6).unwrap_or(u32::MAX);
        Self { limit, wanted: BTreeMap::new(), node: BTreeSet::new(), held, held_v6, complete: false }
    }

    /// One more frontend of this kind ([`frontend_kind`]) at `addr`. The unspecified address stands for those of the
    /// node, which are known.
    pub(super) fn add_frontend(&mut self, addr: IpAddr, kind: u8) {
        if !addr.is_unspecified() {
            *self.wanted.entry(addr).or_default().frontends(kind) += 1;
        }
    }

    /// One frontend of this kind less at `addr`.
    pub(super) fn remove_frontend(&mut self, addr: IpAddr, kind: u8) {
        if let Some(wanted) = self.wanted.get_mut(&addr) {
            *wanted.frontends(kind) -= 1;
        }
    }

    /// One more backend.
    pub(super) fn add_backend(&mut self, backend: &Backend) {
        *self.wanted.entry(backend.addr.ip()).or_default().backends(backend.protocol) += 1;
    }

    /// One backend less.
    pub(super) fn remove_backend(&mut self, backend: &Backend) {
        if let Some(wanted) = self.wanted.get_mut(&backend.addr.ip()) {
            *wanted.backends(backend.protocol) -= 1;
        }
    }

    /// These are the node's own addresses, with their flags; answers which changed.
    pub(super) fn set_node(&mut self, flags: &BTreeMap<IpAddr, u32>) -> Vec<IpAddr> {
        let mut changed = vec![];
        let now: BTreeSet<IpAddr> = flags.keys().copied().collect();
        for addr in std::mem::replace(&mut self.node, now) {
            if !flags.contains_key(&addr)
                && let Some(wanted) = self.wanted.get_mut(&addr)
            {
                wanted.node = 0;
                changed.push(addr);
            }
        }
        for (addr, flags) in flags {
            let wanted = self.wanted.entry(*addr).or_default();
            if wanted.node != *flags {
                wanted.node = *flags;
                changed.push(*addr);
            }
        }
        changed
    }

    /// The write that makes the map right about `addr`, if one is needed.
    pub(super) fn settle(&mut self, addr: IpAddr) -> Result<Option<Op>, Full> {
        let mut flags = self.wanted_flags(addr);
        if !self.complete {
            flags |= self.held.get(&addr).map_or(0, |held| held & address_flags::BACKEND);
        }
        if flags == 0 {
            self.wanted.remove(&addr);
            let removed = self.held.remove(&addr).is_some();
            if removed && addr.is_ipv6() {
                self.held_v6 -= 1;
            }
            return Ok(removed.then_some(Op::RemoveAddress { addr }));
        }
        match self.held.get(&addr) {
            Some(held) if *held == flags => return Ok(None),
            None if self.held_of(Family::of(addr)) >= self.limit => return Err(Full),
            None if addr.is_ipv6() => self.held_v6 += 1,
            Some(_) | None => {}
        }
        self.held.insert(addr, flags);
        Ok(Some(Op::SetAddress { addr, flags }))
    }

    /// Whether the node has an address in one of these networks.
    pub(super) fn is_node_within(&self, nets: &BTreeSet<IpNet>) -> bool {
        let is_node = |addr: &&IpAddr| {
            self.wanted.get(addr).is_some_and(|wanted| wanted.node & address_flags::NODE != 0)
        };
        self.node.iter().filter(is_node).any(|addr| nets.iter().any(|net| net.contains(addr)))
    }

    /// All Services have been looked at. Answers the addresses of which the maps do not hold what is wanted: too
    /// much, or too little of a backend that was written just before another agent ended.
    pub(super) fn finish(&mut self) -> Vec<IpAddr> {
        self.complete = true;
        let wrong = |addr: &&IpAddr| self.wanted_flags(**addr) != self.held.get(addr).copied().unwrap_or(0);
        self.held.keys().chain(self.wanted.keys()).filter(wrong).copied().collect()
    }

    /// What the maps hold, after this address or from the beginning.
    pub(super) fn after(&self, addr: Option<IpAddr>) -> impl Iterator<Item = Op> {
        let from = addr.map_or(Bound::Unbounded, Bound::Excluded);
        let held = self.held.range((from, Bound::Unbounded));
        held.map(|(addr, flags)| Op::SetAddress { addr: *addr, flags: *flags })
    }

    /// Whether the maps hold the address.
    pub(super) fn has(&self, addr: &IpAddr) -> bool {
        self.held.contains_key(addr)
    }

    fn wanted_flags(&self, addr: IpAddr) -> u32 {
        self.wanted.get(&addr).map_or(0, |wanted| wanted.flags())
    }

    pub(super) fn limit(&self) -> u32 {
        self.limit
    }

    fn held_of(&self, family: Family) -> u32 {
        match family {
            Family::V4 => u32::try_from(self.held.len()).unwrap_or(u32::MAX) - self.held_v6,
            Family::V6 => self.held_v6,
        }
    }
}
