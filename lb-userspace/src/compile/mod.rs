//! One Service, or the host ports of one Pod, on this node -> its frontends and backend sets. Pure and deterministic: it sees no map, and
//! nothing of any other Service.

mod endpoints;
mod pods;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

pub use self::endpoints::{Judged, Verdict, judge};
pub use self::pods::compile_pod;
use crate::compile::endpoints::Choice;
use crate::entries::{
    Algorithm, Backend, Compiled, Family, Frontend, FrontendKey, FrontendKind, HealthCheck, Mode, Target,
    WhenEmpty,
};
use crate::finding::Finding;
use crate::model::{EndpointSlice, Policy, Service, ServicePort, ServiceType};

/// What `compile` has to know of this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    pub node_name: String,
    pub zone: Option<String>,
    /// For Services that do not choose one themselves.
    pub algorithm: Algorithm,
    /// For Services that do not choose one themselves; none: there are no tunnels between nodes.
    pub mode: Option<Mode>,
}

/// What `service` with its `slices` means on this node, and what is wrong with it.
pub fn compile(service: &Service, slices: &[&EndpointSlice], facts: &Facts) -> (Compiled, Vec<Finding>) {
    let mut out = Output::default();
    if service.ignored.is_some() {
        return (out.compiled, out.findings);
    }
    out.findings.extend(service.findings.iter().cloned());
    if facts.mode.is_none() && service.mode.is_some_and(|mode| mode != Mode::Snat) {
        out.findings.push(Finding::NoTunnels);
    }
    out.findings.extend(slices.iter().flat_map(|slice| slice.findings.iter().cloned()));
    if service.cluster_ips.is_empty() && service.kind == ServiceType::ClusterIP {
        out.findings.push(Finding::NoClusterIp);
    }
    let algorithm = service.algorithm.unwrap_or(facts.algorithm);
    let families = families(service, slices);
    let mut ready_here: BTreeMap<Family, BTreeSet<IpAddr>> = BTreeMap::new();
    for port in &service.ports {
        let dsr = is_dsr(service, slices, port, facts);
        for family in &families {
            let choice = endpoints::choose(slices, port, *family, facts, dsr);
            for (backend, keep) in &choice.all {
                out.compiled.kept.insert(*backend, *keep);
            }
            out.add_port(service, port, *family, (algorithm, dsr), &choice);
            out.compiled.homes.extend(choice.homes);
            ready_here.entry(*family).or_default().extend(choice.ready_here);
        }
        if port.node_port.is_none() && service.kind == ServiceType::NodePort {
            out.findings.push(Finding::NoNodePort { port: port.label() });
        }
    }
    // A pod of both families is one endpoint.
    let endpoints = ready_here.values().map(BTreeSet::len).max().unwrap_or(0);
    out.compiled.health = service.health_port.map(|port| HealthCheck { port, endpoints });
    for (key, frontend) in &out.compiled.frontends {
        let family = Family::of(key.addr);
        if frontend.restricted
            && let Some(ranges) = service.source_ranges.get(&family)
        {
            out.compiled.sources.entry(family).or_insert_with(|| ranges.clone());
        }
        for target in [&frontend.internal, &frontend.external] {
            for backend in &*target.backends {
                out.compiled.kept.remove(backend);
            }
        }
    }
    (out.compiled, out.findings)
}

#[derive(Default)]
struct Output {
    compiled: Compiled,
    findings: Vec<Finding>,
}

impl Output {
    fn add_port(
        &mut self,
        service: &Service,
        port: &ServicePort,
        family: Family,
        (algorithm, dsr): (Algorithm, bool),
        choice: &Choice,
    ) {
        let internal = choice.target(service.internal_policy);
        // Pods and node processes are "inside": the external policy does not restrict them.
        let from_inside = choice.target(Policy::Cluster);
        let from_outside = choice.target(service.external_policy);
        let mut add = |kind, addr, number| {
            let (internal, external) = match kind {
                FrontendKind::ClusterIP => (internal.clone(), internal.clone()),
                _ => (from_inside.clone(), from_outside.clone()),
            };
            let key = FrontendKey { addr, port: number, protocol: port.protocol };
            let restricted =
                kind == FrontendKind::LoadBalancer && service.source_ranges.contains_key(&family);
            let affinity = service.affinity.unwrap_or(0);
            // A client that came for its address' sake keeps it; pods are in on that.
            let source_kept = kind != FrontendKind::ClusterIP && service.external_policy == Policy::Local;
            let dsr = dsr && kind != FrontendKind::ClusterIP;
            let port = port.port;
            let frontend = Frontend {
                kind,
                algorithm,
                restricted,
                source_kept,
                dsr,
                port,
                affinity,
                internal,
                external,
            };
            match self.compiled.frontends.entry(key) {
                Entry::Vacant(entry) => {
                    entry.insert(frontend);
                }
                // An address that is both externalIP and load-balancer IP is the same either way, and restricted.
                Entry::Occupied(entry)
                    if Frontend { kind, restricted, ..entry.get().clone() } == frontend => {}
                Entry::Occupied(_) => self.findings.push(Finding::Duplicate { key }),
            }
        };
        let of_family = |addrs: &[IpAddr]| {
            addrs.iter().copied().filter(|addr| Family::of(*addr) == family).collect::<BTreeSet<_>>()
        };
        for addr in of_family(&service.cluster_ips) {
            add(FrontendKind::ClusterIP, addr, port.port);
        }
        if service.kind == ServiceType::LoadBalancer {
            for addr in of_family(&service.load_balancer_ips) {
                add(FrontendKind::LoadBalancer, addr, port.port);
            }
        }
        for addr in of_family(&service.external_ips) {
            add(FrontendKind::ExternalIP, addr, port.port);
        }
        if let Some(node_port) = port.node_port
            && matches!(service.kind, ServiceType::NodePort | ServiceType::LoadBalancer)
        {
            add(FrontendKind::NodePort, family.unspecified(), node_port);
        }
    }
}

/// Whether nodes of backends answer clients of a port from outside themselves. Where hints narrow the choice, nodes do not know
/// each other's backends.
fn is_dsr(service: &Service, slices: &[&EndpointSlice], port: &ServicePort, facts: &Facts) -> bool {
    let mode = facts.mode.map(|default| service.mode.unwrap_or(default));
    mode.is_some_and(|mode| mode.is_dsr(port.protocol))
        && service.external_policy == Policy::Cluster
        && !slices.iter().any(|slice| slice.has_hints())
}

/// The families that the Service is served in. An API server fills in cluster IPs; a manifest without one
/// has the families it names, else those of its endpoints, else IPv4.
pub fn families(service: &Service, slices: &[&EndpointSlice]) -> BTreeSet<Family> {
    let mut families: BTreeSet<Family> = service.families.iter().copied().collect();
    families.extend(service.cluster_ips.iter().map(|addr| Family::of(*addr)));
    if families.is_empty() {
        families.extend(slices.iter().flat_map(|s| &s.endpoints).map(|e| Family::of(e.addr)));
    }
    if families.is_empty() {
        families.insert(Family::V4);
    }
    families
}

impl Choice {
    fn target(&self, policy: Policy) -> Target {
        match policy {
            Policy::Cluster => Target { backends: self.cluster.clone(), when_empty: WhenEmpty::Reject },
            Policy::Local => Target {
                backends: self.local.clone(),
                // The cluster set is empty only if there is no usable endpoint anywhere.
                when_empty: if self.cluster.is_empty() { WhenEmpty::Reject } else { WhenEmpty::Drop },
            },
        }
    }
}

/// Sorted, each once.
fn shared(backends: impl Iterator<Item = Backend>) -> Arc<[Backend]> {
    let sorted: BTreeSet<Backend> = backends.collect();
    sorted.into_iter().collect()
}

#[cfg(test)]
mod tests;
