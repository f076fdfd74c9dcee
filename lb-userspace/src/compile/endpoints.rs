//! Which endpoints of one port the policies may choose from.
//!
//! The cluster set: every ready endpoint, narrowed by hints; if there is no ready endpoint at all, every
//! one that serves while it terminates, hints ignored. The local set is decided independently, and hints
//! never apply to it: local ready ones, else local ones that serve while they terminate.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::{Facts, shared};
use crate::entries::{Backend, Family, Keep};
use crate::model::{Endpoint, EndpointSlice, ServicePort};

/// The sets of one port in one family.
pub(super) struct Choice {
    pub(super) cluster: Arc<[Backend]>,
    pub(super) local: Arc<[Backend]>,
    /// Addresses of ready endpoints on this node.
    pub(super) ready_here: BTreeSet<IpAddr>,
    /// Every endpoint, chosen or not.
    pub(super) all: BTreeMap<Backend, Keep>,
}

pub(super) fn choose(slices: &[&EndpointSlice], port: &ServicePort, family: Family, facts: &Facts) -> Choice {
    let candidates = candidates(slices, port, family, facts);
    let ready: Vec<_> = candidates.values().filter(|c| c.endpoint.ready).collect();
    let draining = || {
        let usable = |e: &Endpoint| !e.ready && e.serving && e.terminating;
        candidates.values().filter(move |c| usable(c.endpoint))
    };

    let cluster = if ready.is_empty() {
        shared(draining().map(|c| c.backend))
    } else {
        let endpoints: Vec<_> = ready.iter().map(|c| c.endpoint).collect();
        let narrowed = Narrow::by_hints(&endpoints, facts);
        shared(ready.iter().filter(|c| narrowed.takes(c.endpoint, facts)).map(|c| c.backend))
    };
    let local_ready = shared(ready.iter().map(|c| c.backend).filter(|b| b.local));
    let ready_here = local_ready.iter().map(|b| b.addr.ip()).collect();
    let local = if local_ready.is_empty() {
        shared(draining().map(|c| c.backend).filter(|b| b.local))
    } else {
        local_ready
    };
    let keep = |e: &Endpoint| if e.serving || e.ready { Keep::Flows } else { Keep::Connections };
    let all = candidates.values().map(|c| (c.backend, keep(c.endpoint))).collect();
    Choice { cluster, local, ready_here, all }
}

struct Candidate<'a> {
    endpoint: &'a Endpoint,
    backend: Backend,
}

/// The endpoints that have this port, by address and port number. Each slice has its own number for the
/// port's name.
fn candidates<'a>(
    slices: &[&'a EndpointSlice],
    port: &ServicePort,
    family: Family,
    facts: &Facts,
) -> BTreeMap<SocketAddr, Candidate<'a>> {
    let mut found: BTreeMap<SocketAddr, Candidate<'a>> = BTreeMap::new();
    for slice in slices {
        let numbers = slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol);
        for number in numbers.map(|p| p.port) {
            for endpoint in slice.endpoints.iter().filter(|e| Family::of(e.addr) == family) {
                let addr = SocketAddr::new(endpoint.addr, number);
                let local = endpoint.node.as_deref() == Some(facts.node_name.as_str());
                let backend = Backend { addr, protocol: port.protocol, local };
                let candidate = Candidate { endpoint, backend };
                // An endpoint moves from slice to slice without notice and may be seen in two: the more
                // alive one counts.
                match found.get(&addr) {
                    Some(known) if rank(known) >= rank(&candidate) => {}
                    _ => {
                        found.insert(addr, candidate);
                    }
                }
            }
        }
    }
    found
}

fn rank(candidate: &Candidate<'_>) -> (bool, bool, bool, bool) {
    let e = candidate.endpoint;
    (!e.terminating, e.ready, e.serving, candidate.backend.local)
}

/// How hints narrow the ready endpoints.
enum Narrow<'a> {
    No,
    ToNode,
    ToZone(&'a str),
}

impl<'a> Narrow<'a> {
    /// Hints count only if every ready endpoint has one and at least one of them is for us.
    fn by_hints(ready: &[&Endpoint], facts: &'a Facts) -> Self {
        let usable = |hints: fn(&Endpoint) -> &[Box<str>], ours: &str| {
            ready.iter().all(|e| !hints(e).is_empty()) && ready.iter().any(|e| names(hints(e), ours))
        };
        if usable(Endpoint::node_hints, &facts.node_name) {
            return Self::ToNode;
        }
        match facts.zone.as_deref() {
            Some(zone) if !zone.is_empty() && usable(Endpoint::zone_hints, zone) => Self::ToZone(zone),
            _ => Self::No,
        }
    }

    fn takes(&self, endpoint: &Endpoint, facts: &Facts) -> bool {
        match self {
            Self::No => true,
            Self::ToNode => names(endpoint.node_hints(), &facts.node_name),
            Self::ToZone(zone) => names(endpoint.zone_hints(), zone),
        }
    }
}

fn names(hints: &[Box<str>], ours: &str) -> bool {
    hints.iter().any(|hint| **hint == *ours)
}
