//! What becomes of a packet, written down from the contract, rule by rule (docs/contract.md has the numbers). No
//! maps, no windows, no memory of flows: everything is looked up anew, in the objects as Kubernetes tells them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use fairlead::entries::{Family, Protocol};

use super::cluster::{
    Cluster, Endpoint, Kind, NODE, NodePortAddresses, Places, Service, ServicePort, V4, V6, ip, net,
    pod_networks,
};

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Client {
    /// A pod of this node, through its own device.
    Pod(IpAddr),
    /// A process on this node.
    Process,
    /// Whoever comes in from outside of the node: also pods of other nodes.
    Wire(IpAddr),
}

/// What is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ask {
    pub client: Client,
    pub to: SocketAddr,
    pub protocol: Protocol,
}

/// What must become of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// It goes on as it came.
    Untouched,
    /// It goes to one of these.
    Translated(BTreeMap<SocketAddr, Source>),
    /// RST, port unreachable, `ECONNREFUSED`.
    Rejected,
    /// Silence.
    Dropped,
}

/// Which source address the backend sees.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Source {
    /// The client's own.
    Client,
    /// The node's.
    Node,
    /// The address that was asked for.
    Frontend,
}

/// What answers where something is asked.
pub struct Frontend<'a> {
    pub name: &'static str,
    pub service: &'a Service,
    pub port: &'a ServicePort,
    kind: FrontendKind,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum FrontendKind {
    ClusterIP,
    LoadBalancer,
    ExternalIP,
    NodePort,
}

/// The sets of "Endpoint choice, in one paragraph".
struct Choice {
    cluster: BTreeSet<SocketAddr>,
    local: BTreeSet<SocketAddr>,
}

pub fn answer(cluster: &Cluster, ask: &Ask) -> Answer {
    let to = ask.to.ip();
    // Nobody but the node's own processes means this node's loopback.
    if to.is_loopback() && ask.client != Client::Process {
        return Answer::Untouched;
    }
    let Some(frontend) = frontend(cluster, ask.to, ask.protocol) else {
        return without_frontend(cluster, to);
    };
    // Rules 16, 18 to 22: load-balancer IPs alone are filtered, for everybody, before anything else is decided.
    if frontend.kind == FrontendKind::LoadBalancer && !is_admitted(cluster, &frontend, ask) {
        return Answer::Dropped;
    }
    let backends = backends(cluster, &frontend, ask.client, Family::of(to));
    let choice = choose(cluster, &frontend, Family::of(to));
    if backends.is_empty() {
        // Rules 1 to 6, 54 and 55 against 46 and 53.
        return if choice.cluster.is_empty() { Answer::Rejected } else { Answer::Dropped };
    }
    let seen_as = |backend: SocketAddr| (backend, source(cluster, &frontend, ask.client, backend.ip()));
    Answer::Translated(backends.into_iter().map(seen_as).collect())
}

/// The backends that a client may come to.
fn backends(
    cluster: &Cluster,
    frontend: &Frontend<'_>,
    client: Client,
    family: Family,
) -> BTreeSet<SocketAddr> {
    let local = if frontend.kind == FrontendKind::ClusterIP {
        // Rules 43 to 45 and 49; 48: this policy concerns no other frontend; 32: no other concerns this one.
        frontend.service.internal_local
    } else {
        // Rules 33 to 41: the policy restricts who is outside of the cluster.
        frontend.service.external_local && !is_inside(cluster, client)
    };
    let choice = choose(cluster, frontend, family);
    if local { choice.local } else { choice.cluster }
}

/// What answers at an address and port.
pub fn frontend(cluster: &Cluster, to: SocketAddr, protocol: Protocol) -> Option<Frontend<'_>> {
    let exact = owner(cluster, |service| {
        let ports = service.ports.iter().filter(|p| (p.port, p.protocol) == (to.port(), protocol));
        ports
            .flat_map(|port| addresses(service).map(move |(addr, kind)| (addr, kind, port)))
            .find(|(addr, ..)| *addr == to.ip())
            .map(|(_, kind, port)| (kind, port))
    });
    exact.or_else(|| {
        if !takes_node_ports(cluster, to.ip()) {
            return None;
        }
        owner(cluster, |service| {
            let asked = (Some(to.port()), protocol);
            let has = matches!(service.kind, Kind::NodePort | Kind::LoadBalancer)
                && families(service).contains(&Family::of(to.ip()));
            let port = service.ports.iter().find(|port| (port.node_port, port.protocol) == asked)?;
            has.then_some((FrontendKind::NodePort, port))
        })
    })
}

/// Of those that claim the same the oldest, then the first by name.
fn owner<'a>(
    cluster: &'a Cluster,
    claim: impl Fn(&'a Service) -> Option<(FrontendKind, &'a ServicePort)>,
) -> Option<Frontend<'a>> {
    let served = cluster.services.iter().filter(|(_, service)| is_served(service));
    let claims = served.filter_map(|(name, service)| {
        claim(service).map(|(kind, port)| Frontend { name, service, port, kind })
    });
    claims.min_by_key(|frontend| (frontend.service.created, frontend.name))
}

/// Rules 65, 119 and 120.
fn is_served(service: &Service) -> bool {
    service.label.is_none() && !service.headless && service.kind != Kind::ExternalName
}

fn families(service: &Service) -> BTreeSet<Family> {
    service.cluster_ips.iter().map(|addr| Family::of(*addr)).collect()
}

/// Where a Service answers, NodePorts aside. An address that is both load-balancer IP and external IP is the former.
fn addresses(service: &Service) -> impl Iterator<Item = (IpAddr, FrontendKind)> {
    let cluster = service.cluster_ips.iter().map(|addr| (*addr, FrontendKind::ClusterIP));
    // Rule 63: `ipMode: Proxy` is none of ours. Rule 66: a type has its frontends and no others.
    let ingress = service.ingress.iter().filter(|_| service.kind == Kind::LoadBalancer);
    let ingress = ingress.filter(|(_, mode)| *mode != Some("Proxy"));
    let ingress = ingress.map(|(addr, _)| (*addr, FrontendKind::LoadBalancer));
    let external = service.external_ips.iter().map(|addr| (*addr, FrontendKind::ExternalIP));
    let families = families(service);
    cluster.chain(ingress).chain(external).filter(move |(addr, _)| families.contains(&Family::of(*addr)))
}

/// Rules 26 to 31; by default every address of the node, and 127.0.0.1 and ::1.
fn takes_node_ports(cluster: &Cluster, to: IpAddr) -> bool {
    let loopback = to == ip(V4.loopback) || to == ip(V6.loopback);
    let own = loopback || cluster.addresses.contains(&to);
    own && match &cluster.settings.nodeport_addresses {
        NodePortAddresses::All => true,
        NodePortAddresses::Primary => {
            let named = cluster.node.iter().flat_map(|node| &node.addresses);
            named.filter(|addr| Family::of(**addr) == Family::of(to)).collect::<Vec<_>>().first()
                == Some(&&to)
        }
        NodePortAddresses::In(networks) => networks.iter().any(|network| network.contains(&to)),
    }
}

fn without_frontend(cluster: &Cluster, to: IpAddr) -> Answer {
    if cluster.addresses.contains(&to) {
        return Answer::Untouched;
    }
    let kinds: Vec<FrontendKind> = cluster
        .services
        .values()
        .flat_map(|service| service.ports.iter().map(|port| (port.port, port.protocol)))
        .filter_map(|(port, protocol)| frontend(cluster, SocketAddr::new(to, port), protocol))
        .map(|frontend| frontend.kind)
        .collect();
    if kinds.contains(&FrontendKind::ClusterIP) {
        // Rules 12 and 13.
        Answer::Rejected
    } else if kinds.is_empty() && cluster.service_cidrs.values().flatten().any(|cidr| cidr.contains(&to)) {
        // Rule 14.
        Answer::Dropped
    } else {
        Answer::Untouched
    }
}

fn is_admitted(cluster: &Cluster, frontend: &Frontend<'_>, ask: &Ask) -> bool {
    let family = Family::of(ask.to.ip());
    let (mut ranges, mut restricted) = (vec![], false);
    for range in &frontend.service.source_ranges {
        if range.net.is_empty() {
            // It admits nobody, and does not open what was meant to be closed.
            restricted |= family == Family::V4;
        } else if Family::of(net(range.net).addr()) == family {
            restricted = true;
            ranges.push(net(range.net));
        }
    }
    // Rule 25: without a range of this family everybody may; rule 24: with one of length 0, too.
    if !restricted || ranges.iter().any(|range| range.prefix_len() == 0) {
        return true;
    }
    let is_in = |addr: IpAddr| ranges.iter().any(|range| range.contains(&addr));
    let node_is_in = cluster.addresses.iter().any(|addr| is_in(*addr));
    match ask.client {
        // Rule 21.
        Client::Process => node_is_in,
        // Rules 17, 18, 20, and 22.
        Client::Pod(addr) | Client::Wire(addr) => is_in(addr) || (node_is_in && addr == ask.to.ip()),
    }
}

/// Who is a part of the cluster: what kube-proxy asks its local detector, and the node (rule 40).
fn is_inside(cluster: &Cluster, client: Client) -> bool {
    match client {
        Client::Pod(_) | Client::Process => true,
        // Rules 41, 60 and 62: without `--cluster-cidr` nobody can tell.
        Client::Wire(addr) => {
            cluster.settings.cluster_cidr && pod_networks().iter().any(|network| network.contains(&addr))
        }
    }
}

/// Rules 7, 8, 39 and 57 to 59, with the source kept wherever the reply comes back this way without our help; rules 61
/// and 62 as kube-proxy has them.
fn source(cluster: &Cluster, frontend: &Frontend<'_>, client: Client, backend: IpAddr) -> Source {
    let kept = frontend.kind != FrontendKind::ClusterIP && frontend.service.external_local;
    match client {
        // Rule 8.
        Client::Pod(addr) if addr == backend => Source::Frontend,
        // What uses the node's network is reached without the place where kube-proxy masquerades.
        Client::Pod(_) | Client::Wire(_)
            if cluster.settings.masquerade_all && !kept && !is_own(cluster, backend) =>
        {
            Source::Node
        }
        Client::Pod(_) | Client::Process => Source::Client,
        Client::Wire(_) if is_here(cluster, backend) => Source::Client,
        Client::Wire(_) => Source::Node,
    }
}

/// What is on this node: its pods, and what uses its network.
fn is_here(cluster: &Cluster, backend: IpAddr) -> bool {
    let pods = Places::of(Family::of(backend)).pods_here;
    pods.into_iter().any(|addr| ip(addr) == backend) || is_own(cluster, backend)
}

/// The node's own addresses.
fn is_own(cluster: &Cluster, backend: IpAddr) -> bool {
    let own = Places::of(Family::of(backend)).node;
    own.into_iter().any(|addr| ip(addr) == backend) || cluster.addresses.contains(&backend)
}

fn choose(cluster: &Cluster, frontend: &Frontend<'_>, family: Family) -> Choice {
    let endpoints = endpoints(cluster, frontend, family);
    let ready: Vec<_> = endpoints.iter().filter(|(_, endpoint)| is_ready(endpoint)).collect();
    let draining: Vec<_> = endpoints.iter().filter(|(_, endpoint)| is_draining(endpoint)).collect();
    let addrs = |found: &[&(SocketAddr, &Endpoint)]| found.iter().map(|(addr, _)| *addr).collect();
    let local = |found: &[&(SocketAddr, &Endpoint)]| -> BTreeSet<SocketAddr> {
        found.iter().filter(|(_, endpoint)| is_local(endpoint)).map(|(addr, _)| *addr).collect()
    };
    // Rules 50 to 52: terminating ones only if no ready one is left, and then without hints (rule 79).
    let cluster_set = if ready.is_empty() { addrs(&draining) } else { narrow(cluster, &ready) };
    // Rules 53 and 56: the local set falls back on its own.
    let local_ready = local(&ready);
    let local_set = if local_ready.is_empty() { local(&draining) } else { local_ready };
    Choice { cluster: cluster_set, local: local_set }
}

/// Rules 72 to 78.
fn narrow(cluster: &Cluster, ready: &[&(SocketAddr, &Endpoint)]) -> BTreeSet<SocketAddr> {
    let zone = cluster.node.as_ref().and_then(|node| node.zone).filter(|zone| !zone.is_empty());
    let by = |hints: fn(&Endpoint) -> &[&'static str], ours: Option<&str>| {
        let ours = ours?;
        if ready.iter().any(|(_, endpoint)| hints(endpoint).is_empty()) {
            return None;
        }
        let for_us = ready.iter().filter(|(_, endpoint)| hints(endpoint).contains(&ours));
        let for_us: BTreeSet<SocketAddr> = for_us.map(|(addr, _)| *addr).collect();
        (!for_us.is_empty()).then_some(for_us)
    };
    by(|endpoint| &endpoint.hints.nodes, Some(NODE))
        .or_else(|| by(|endpoint| &endpoint.hints.zones, zone))
        .unwrap_or_else(|| ready.iter().map(|(addr, _)| *addr).collect())
}

/// The endpoints of a port. Rule 83: each slice has its own number for the port's name. Rule 84: of an endpoint that
/// two slices have, the more alive counts; of equals, that of the first slice.
fn endpoints<'a>(
    cluster: &'a Cluster,
    frontend: &Frontend<'_>,
    family: Family,
) -> Vec<(SocketAddr, &'a Endpoint)> {
    let mut found: Vec<(SocketAddr, &Endpoint)> = vec![];
    let slices = cluster
        .slices
        .values()
        .filter(|slice| slice.service == frontend.name && slice.family == family && slice.label.is_none());
    for slice in slices {
        for (name, number, protocol) in &slice.ports {
            if (*name, *protocol) == (frontend.port.name, frontend.port.protocol) {
                let endpoints = slice.endpoints.iter();
                found.extend(endpoints.map(|endpoint| (SocketAddr::new(endpoint.addr, *number), endpoint)));
            }
        }
    }
    let life = |e: &Endpoint| (is_terminating(e), !is_ready(e), !is_serving(e), !is_local(e));
    found.sort_by_key(|(addr, endpoint)| (*addr, life(endpoint)));
    found.dedup_by_key(|(addr, _)| *addr);
    found
}

/// Rule 88.
fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint.conditions.ready.unwrap_or(true)
}

fn is_serving(endpoint: &Endpoint) -> bool {
    endpoint.conditions.serving.unwrap_or(true)
}

fn is_terminating(endpoint: &Endpoint) -> bool {
    endpoint.conditions.terminating.unwrap_or(false)
}

/// Rules 51 and 82.
fn is_draining(endpoint: &Endpoint) -> bool {
    !is_ready(endpoint) && is_serving(endpoint) && is_terminating(endpoint)
}

/// Rule 89.
fn is_local(endpoint: &Endpoint) -> bool {
    endpoint.node == Some(NODE)
}
