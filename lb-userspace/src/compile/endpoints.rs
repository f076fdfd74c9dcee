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
    /// Nodes of those of the cluster set that are elsewhere, if they answer clients themselves.
    pub(super) homes: BTreeMap<Backend, Arc<str>>,
}

/// What one set makes of an endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    Used,
    /// It serves while it terminates, and none is ready.
    UsedUntilGone,
    /// Neither ready, nor serving while it terminates.
    NotReady,
    /// It terminates, and others are ready.
    Terminating,
    /// Hints keep it for other zones or nodes.
    ForOthers,
    /// Not on this node.
    Elsewhere,
}

impl Verdict {
    /// Whether it is in the set.
    pub const fn takes(self) -> bool {
        matches!(self, Self::Used | Self::UsedUntilGone)
    }
}

/// An endpoint, and why the policies may choose it, or may not.
#[derive(Clone, Copy, Debug)]
pub struct Judged<'a> {
    pub endpoint: &'a Endpoint,
    pub backend: Backend,
    /// In the set of the policy Cluster.
    pub cluster: Verdict,
    /// In the set of the policy Local.
    pub local: Verdict,
}

/// Every endpoint that has this port, in the order of addresses.
pub fn judge<'a>(
    slices: &[&'a EndpointSlice],
    port: &ServicePort,
    family: Family,
    facts: &Facts,
) -> Vec<Judged<'a>> {
    let candidates = candidates(slices, port, family, facts);
    let ready = || candidates.values().filter(|c| c.endpoint.ready);
    let (any, any_here) = (ready().next().is_some(), ready().any(|c| c.backend.local));
    let endpoints: Vec<_> = ready().map(|c| c.endpoint).collect();
    let narrowed = Narrow::by_hints(&endpoints, facts);
    let state = |e: &Endpoint, others_ready| match e {
        e if e.ready => Verdict::Used,
        e if !(e.serving && e.terminating) => Verdict::NotReady,
        _ if others_ready => Verdict::Terminating,
        _ => Verdict::UsedUntilGone,
    };
    let judged = candidates.values().map(|Candidate { endpoint, backend }| {
        let cluster = match state(endpoint, any) {
            Verdict::Used if !narrowed.takes(endpoint, facts) => Verdict::ForOthers,
            verdict => verdict,
        };
        let local = if backend.local { state(endpoint, any_here) } else { Verdict::Elsewhere };
        Judged { endpoint, backend: *backend, cluster, local }
    });
    judged.collect()
}

/// `dsr`: nodes of endpoints answer clients of the port themselves.
pub(super) fn choose(
    slices: &[&EndpointSlice],
    port: &ServicePort,
    family: Family,
    facts: &Facts,
    dsr: bool,
) -> Choice {
    let judged = judge(slices, port, family, facts);
    let set = |verdict: fn(&Judged<'_>) -> Verdict| {
        shared(judged.iter().filter(|judged| verdict(judged).takes()).map(|judged| judged.backend))
    };
    let ready_here = judged.iter().filter(|judged| judged.local == Verdict::Used);
    let elsewhere = judged.iter().filter(|judged| dsr && judged.cluster.takes() && !judged.backend.local);
    let homes = elsewhere.filter_map(|judged| Some((judged.backend, judged.endpoint.node.clone()?)));
    let keep = |e: &Endpoint| if e.serving || e.ready { Keep::Flows } else { Keep::Connections };
    Choice {
        cluster: set(|judged| judged.cluster),
        local: set(|judged| judged.local),
        ready_here: ready_here.map(|judged| judged.backend.addr.ip()).collect(),
        homes: homes.collect(),
        all: judged.iter().map(|judged| (judged.backend, keep(judged.endpoint))).collect(),
    }
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
