//! Who wants which frontend, and what clients get there. As in the agent, of those that want one the oldest has it, then
//! the first by name.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::{Answer, Claimant, FrontendView, NodeFacts, Objects, family_name};
use crate::compile::{compile, compile_pod};
use crate::entries::{Compiled, Family, Frontend, FrontendKey, Protocol, ServiceName, Target, WhenEmpty};
use crate::finding::Finding;
use crate::model::EndpointSlice;
use crate::owner::Owner;

/// Everybody's claims on one node.
pub(super) struct Claims {
    /// When the claimants were created, and who they are: the first has it.
    by_key: BTreeMap<FrontendKey, BTreeSet<(i64, Owner)>>,
}

/// What the agent makes of a Service, or of the host ports of a Pod.
pub(super) fn compiled(owner: &Owner, objects: &Objects, node: &NodeFacts) -> (Compiled, Vec<Finding>) {
    match owner {
        Owner::Service(name) => {
            let slices = objects.slices_of(name);
            let service = objects.services.get(name);
            service.map(|service| compile(&service.model, &slices, &node.facts())).unwrap_or_default()
        }
        Owner::Pod(name) => {
            let pod = objects.host_ports.iter().find(|pod| pod.name == *name);
            pod.map(compile_pod).unwrap_or_default()
        }
    }
}

/// Whose an address is that no frontend has.
pub(super) fn whose(addr: IpAddr, objects: &Objects, node: &NodeFacts) -> String {
    if let Some(service) = objects.proxied_at(addr) {
        return format!("; the load balancer of Service {service} has {addr} for itself (ipMode Proxy)");
    }
    match objects.pod_at(addr) {
        _ if node.has(addr) => format!("; {addr} is an address of node {}", node.name),
        Some(pod) => format!("; {addr} is the address of Pod {}, and nothing is translated", pod.name),
        None => {
            format!("; {addr} is not known as an address of node {} (--node-name names another)", node.name)
        }
    }
}

impl Claims {
    /// Of all Services, and of the Pods of this node.
    pub(super) fn of(objects: &Objects, node: &NodeFacts) -> Self {
        let mut slices: BTreeMap<&ServiceName, Vec<&EndpointSlice>> = BTreeMap::new();
        for slice in &objects.slices {
            if let Some(service) = &slice.service {
                slices.entry(service).or_default().push(slice);
            }
        }
        let mut claims = Self { by_key: BTreeMap::new() };
        for (name, service) in &objects.services {
            let slices = slices.get(name).map(Vec::as_slice).unwrap_or_default();
            let (compiled, _) = compile(&service.model, slices, &node.facts());
            claims.add(service.model.created, &name.clone().into(), &compiled);
        }
        for pod in objects.host_ports.iter().filter(|pod| pod.node.as_deref() == Some(node.name.as_str())) {
            claims.add(pod.created, &pod.name.clone().into(), &compile_pod(pod).0);
        }
        claims
    }

    fn add(&mut self, created: i64, owner: &Owner, compiled: &Compiled) {
        for key in compiled.frontends.keys() {
            self.by_key.entry(*key).or_default().insert((created, owner.clone()));
        }
    }

    /// Who has a frontend.
    pub(super) fn winner(&self, key: &FrontendKey) -> Option<&Owner> {
        self.by_key.get(key)?.first().map(|(_, owner)| owner)
    }

    /// Who has this address and port, else who has the address for other ports.
    pub(super) fn owner(
        &self,
        at: SocketAddr,
        protocol: Option<Protocol>,
        node: &NodeFacts,
    ) -> Option<Owner> {
        let exact = self.matching(at, protocol, node).into_iter().next();
        let exact = exact.or_else(|| self.withheld(at, protocol, node));
        let same_address = || self.by_key.keys().find(|key| key.addr == at.ip());
        self.winner(exact.or_else(same_address)?).cloned()
    }

    /// Frontends that answer at this address: those of the address itself before those of every address of the node.
    fn matching(&self, at: SocketAddr, protocol: Option<Protocol>, node: &NodeFacts) -> Vec<&FrontendKey> {
        let any = self.everywhere(at, protocol, node).filter(|key| self.answers(key, at.ip(), node));
        self.keys(at.ip(), at.port(), protocol).chain(any).collect()
    }

    /// A NodePort that would answer at this address of the node, if NodePorts answered on it.
    pub(super) fn withheld(
        &self,
        at: SocketAddr,
        protocol: Option<Protocol>,
        node: &NodeFacts,
    ) -> Option<&FrontendKey> {
        self.everywhere(at, protocol, node).find(|key| !self.answers(key, at.ip(), node))
    }

    /// Frontends of every address of the node, this one included.
    fn everywhere(
        &self,
        at: SocketAddr,
        protocol: Option<Protocol>,
        node: &NodeFacts,
    ) -> impl Iterator<Item = &FrontendKey> {
        let own = node.has(at.ip());
        self.keys(Family::of(at.ip()).unspecified(), at.port(), protocol).filter(move |_| own)
    }

    fn keys(
        &self,
        addr: IpAddr,
        port: u16,
        protocol: Option<Protocol>,
    ) -> impl Iterator<Item = &FrontendKey> {
        let fits = move |key: &&FrontendKey| {
            key.addr == addr && key.port == port && protocol.is_none_or(|asked| asked == key.protocol)
        };
        self.by_key.keys().filter(fits)
    }

    /// Whether a frontend of every address answers at this one: host ports do.
    fn answers(&self, key: &FrontendKey, addr: IpAddr, node: &NodeFacts) -> bool {
        matches!(self.winner(key), Some(Owner::Pod(_))) || node.node_ports.answer_at(addr)
    }

    /// Whoever wants this address and port, the one who has it first.
    pub(super) fn claimants(
        &self,
        at: SocketAddr,
        protocol: Option<Protocol>,
        node: &NodeFacts,
    ) -> Vec<Claimant> {
        let mut had: BTreeMap<Protocol, &FrontendKey> = BTreeMap::new();
        let mut claimants = vec![];
        for key in self.matching(at, protocol, node) {
            let more_exact = had.get(&key.protocol).copied();
            had.entry(key.protocol).or_insert(key);
            let all = &self.by_key[key];
            for (place, (created, owner)) in all.iter().enumerate() {
                let (kind, namespace, name) = match owner {
                    Owner::Service(name) => ("Service", &name.namespace, &name.name),
                    Owner::Pod(name) => ("Pod", &name.namespace, &name.name),
                };
                claimants.push(Claimant {
                    kind,
                    namespace: namespace.to_string(),
                    name: name.to_string(),
                    frontend: key.to_string(),
                    created: *created,
                    wins: place == 0 && more_exact.is_none(),
                    why: why(place, all, more_exact.and_then(|key| self.winner(key))),
                });
            }
        }
        claimants
    }

    /// What clients get at each frontend that `owner` wants.
    pub(super) fn clients(&self, owner: &Owner, compiled: &Compiled) -> Vec<FrontendView> {
        let views = compiled.frontends.iter().map(|(key, frontend)| {
            let other = self.winner(key).filter(|winner| *winner != owner);
            let answer = |target: &Target| other.map_or_else(|| answer(target), of_other);
            FrontendView {
                key: *key,
                kind: frontend.kind.to_string(),
                address: (!key.addr.is_unspecified()).then_some(key.addr),
                family: family_name(Family::of(key.addr)),
                port: key.port,
                protocol: key.protocol.to_string(),
                source_ranges: ranges(key, frontend, compiled),
                inside: answer(&frontend.internal),
                outside: answer(&frontend.external),
                programmed: None,
            }
        });
        views.collect()
    }
}

fn ranges(key: &FrontendKey, frontend: &Frontend, compiled: &Compiled) -> Option<Vec<String>> {
    let ranges = compiled.sources.get(&Family::of(key.addr)).filter(|_| frontend.restricted)?;
    Some(ranges.iter().map(ToString::to_string).collect())
}

fn why(place: usize, all: &BTreeSet<(i64, Owner)>, more_exact: Option<&Owner>) -> String {
    let times: Vec<i64> = all.iter().map(|(created, _)| *created).collect();
    if let Some(other) = more_exact {
        return format!("{other} has this very address, which goes before every address of the node");
    }
    match (place, times.as_slice()) {
        (0, [_]) => "nobody else wants it".into(),
        (0, [own, second, ..]) if own < second => "it is the oldest of those that want it".into(),
        (0, _) => "as old as another that wants it, and the first by kind and name".into(),
        (_, [first, ..]) if times.get(place) > Some(first) => "an older one has it".into(),
        _ => "one as old has it, the first by kind and name".into(),
    }
}

fn of_other(other: &Owner) -> Answer {
    Answer { outcome: "other", backends: vec![], why: format!("{other} has this frontend and answers") }
}

fn answer(target: &Target) -> Answer {
    let backends: Vec<SocketAddr> = target.backends.iter().map(|backend| backend.addr).collect();
    let (outcome, why) = match (backends.len(), target.when_empty) {
        (0, WhenEmpty::Reject) => ("rejected", "connection refused, no endpoint may be used".to_owned()),
        (0, WhenEmpty::Drop) => {
            ("dropped", "no answer, the policy is Local and no endpoint is here".to_owned())
        }
        (1, _) => ("served", "1 endpoint".to_owned()),
        (count, _) => ("served", format!("{count} endpoints")),
    };
    Answer { outcome, backends, why }
}
