//! A cluster as Kubernetes tells of it, in plain types, what can change in it, and the objects that tell it to the
//! agent. Everything comes from small pools, so that Services meet at addresses, ports and endpoints all the time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use fairlead::entries::{Family, Protocol};
use fairlead::model;
use fairlead::source::convert;
use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

pub const NODE: &str = "node-a";
const OTHER_NODE: &str = "node-b";
const SERVICES: [&str; 3] = ["svc-a", "svc-b", "svc-c"];
const SLICES: [&str; 5] = ["slice-1", "slice-2", "slice-3", "slice-4", "slice-5"];
const ZONES: [&str; 2] = ["zone-1", "zone-2"];
pub const SERVICE_PORTS: [u16; 2] = [80, 53];
pub const NODE_PORTS: [u16; 2] = [30080, 30081];

/// Everything that the answers to packets depend on.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    pub services: BTreeMap<&'static str, Service>,
    pub slices: BTreeMap<&'static str, Slice>,
    pub node: Option<Node>,
    /// The node's own addresses, without loopback.
    pub addresses: BTreeSet<IpAddr>,
    pub service_cidrs: BTreeMap<&'static str, Vec<IpNet>>,
    pub settings: Settings,
}

#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `--cluster-cidr` is given: [`pod_networks`].
    pub cluster_cidr: bool,
    pub nodeport_addresses: NodePortAddresses,
    /// `--masquerade-all`.
    pub masquerade_all: bool,
}

/// `--nodeport-addresses`.
#[derive(Clone, Debug, Default)]
pub enum NodePortAddresses {
    #[default]
    All,
    Primary,
    In(Vec<IpNet>),
}

#[expect(clippy::struct_excessive_bools, reason = "four independent fields of the object")]
#[derive(Clone, Debug)]
pub struct Service {
    /// `metadata.creationTimestamp`, seconds after 2026-01-01.
    pub created: u8,
    pub kind: Kind,
    pub label: Option<&'static str>,
    /// `clusterIP: None`.
    pub headless: bool,
    pub cluster_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress`, with `ipMode`.
    pub ingress: Vec<(IpAddr, Option<&'static str>)>,
    pub source_ranges: Vec<Range>,
    pub ports: Vec<ServicePort>,
    /// `sessionAffinity: ClientIP` with its time-out.
    pub affinity: Option<u32>,
    pub internal_local: bool,
    pub external_local: bool,
    pub maglev: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    ClusterIP,
    NodePort,
    LoadBalancer,
    ExternalName,
}

#[derive(Clone, Debug)]
pub struct ServicePort {
    pub name: &'static str,
    pub port: u16,
    pub protocol: Protocol,
    pub node_port: Option<u16>,
}

/// An entry of `loadBalancerSourceRanges`: what is written, and what it means.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    pub text: &'static str,
    /// As everybody writes it; empty: it means nothing.
    pub net: &'static str,
}

#[derive(Clone, Debug)]
pub struct Slice {
    pub service: &'static str,
    pub label: Option<&'static str>,
    pub family: Family,
    pub ports: Vec<(&'static str, u16, Protocol)>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug)]
pub struct Endpoint {
    pub addr: IpAddr,
    pub conditions: Conditions,
    pub node: Option<&'static str>,
    pub hints: Hints,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Conditions {
    pub ready: Option<bool>,
    pub serving: Option<bool>,
    pub terminating: Option<bool>,
}

#[derive(Clone, Debug, Default)]
pub struct Hints {
    pub zones: Vec<&'static str>,
    pub nodes: Vec<&'static str>,
}

#[derive(Clone, Debug)]
pub struct Node {
    pub zone: Option<&'static str>,
    /// `status.addresses`.
    pub addresses: Vec<IpAddr>,
}

/// One change, as it may be met.
#[derive(Clone, Debug)]
pub enum Change {
    Service(&'static str, Service),
    /// One field of a Service that is there.
    Field(&'static str, Field),
    ServiceGone(&'static str),
    Slice(&'static str, Slice),
    Conditions(&'static str, usize, Conditions),
    Hints(&'static str, Vec<Hints>),
    SliceGone(&'static str),
    Node(Option<Node>),
    Addresses(BTreeSet<IpAddr>),
    ServiceCidr(&'static str, Vec<IpNet>),
    ServiceCidrGone(&'static str),
    /// Two seconds without anything: longer than the grace time.
    Pause,
    /// The agent ends, and another takes over.
    Restart,
}

#[derive(Clone, Debug)]
pub enum Field {
    Kind(Kind),
    Label(Option<&'static str>),
    Policies(bool, bool),
    Affinity(Option<u32>),
    SourceRanges(Vec<Range>),
    Ports(Vec<ServicePort>),
    Maglev(bool),
}

/// What the agent is told of a change.
pub enum News {
    Object(model::Change),
    Addresses,
    Pause,
    Restart,
}

impl Cluster {
    /// A change of a Service's source ranges and of more, in two: ranges and frontends are in maps of their own, and
    /// a packet in between may find one changed and the other not yet.
    pub fn in_steps(&self, change: Change) -> Vec<Change> {
        if let Change::Service(name, new) = &change
            && let Some(old) = self.services.get(name)
        {
            let ranges = Service { source_ranges: new.source_ranges.clone(), ..old.clone() };
            return vec![Change::Service(name, ranges), change];
        }
        vec![change]
    }

    /// Takes a change; answers what to tell the agent. `None`: it concerns what is not there.
    pub fn apply(&mut self, change: Change) -> Option<News> {
        match change {
            Change::Service(name, service) => {
                self.services.insert(name, service);
                Some(self.tell_service(name))
            }
            Change::Field(name, field) => {
                self.services.get_mut(name)?.set(field);
                Some(self.tell_service(name))
            }
            Change::ServiceGone(name) => {
                self.services.remove(name)?;
                let name = convert::service_name(&metadata(name));
                Some(News::Object(model::Change::ServiceGone(name)))
            }
            Change::Slice(name, slice) => {
                self.slices.insert(name, slice);
                Some(self.tell_slice(name))
            }
            Change::Conditions(name, index, conditions) => {
                let endpoints = &mut self.slices.get_mut(name)?.endpoints;
                let index = index % endpoints.len().max(1);
                endpoints.get_mut(index)?.conditions = conditions;
                Some(self.tell_slice(name))
            }
            Change::Hints(name, hints) => {
                let endpoints = &mut self.slices.get_mut(name)?.endpoints;
                for (endpoint, hints) in endpoints.iter_mut().zip(hints) {
                    endpoint.hints = hints;
                }
                Some(self.tell_slice(name))
            }
            Change::SliceGone(name) => {
                self.slices.remove(name)?;
                let name = convert::slice_name(&metadata(name));
                Some(News::Object(model::Change::SliceGone(name)))
            }
            Change::Node(node) => {
                self.node = node;
                Some(News::Object(self.tell_node()))
            }
            Change::Addresses(addresses) => {
                self.addresses = addresses;
                Some(News::Addresses)
            }
            Change::ServiceCidr(name, nets) => {
                self.service_cidrs.insert(name, nets.clone());
                Some(News::Object(model::Change::ServiceCidr(name.into(), nets)))
            }
            Change::ServiceCidrGone(name) => {
                self.service_cidrs.remove(name)?;
                Some(News::Object(model::Change::ServiceCidrGone(name.into())))
            }
            Change::Pause => Some(News::Pause),
            Change::Restart => Some(News::Restart),
        }
    }

    /// Everything, as a new agent is told.
    pub fn everything(&self) -> Vec<model::Change> {
        let services = self.services.keys().map(|name| self.tell_service(name));
        let slices = self.slices.keys().map(|name| self.tell_slice(name));
        let objects = services.chain(slices).filter_map(|news| match news {
            News::Object(change) => Some(change),
            _ => None,
        });
        let cidrs = self.service_cidrs.iter();
        let cidrs = cidrs.map(|(name, nets)| model::Change::ServiceCidr((*name).into(), nets.clone()));
        objects.chain(cidrs).chain([self.tell_node()]).collect()
    }

    /// Services and slices as an API server lists them.
    pub fn written(&self) -> Vec<Value> {
        let services = self.services.iter().map(|(name, service)| ("v1", "Service", service.object(name)));
        let slices = self.slices.iter();
        let slices = slices.map(|(name, slice)| ("discovery.k8s.io/v1", "EndpointSlice", slice.object(name)));
        let with_kind = |(version, kind, mut object): (&str, &str, Value)| {
            (object["apiVersion"], object["kind"]) = (version.into(), kind.into());
            object
        };
        services.chain(slices).map(with_kind).collect()
    }

    fn tell_service(&self, name: &str) -> News {
        let object = read(self.services[name].object(name));
        News::Object(model::Change::Service(convert::service(object).into()))
    }

    fn tell_slice(&self, name: &str) -> News {
        let object = read(self.slices[name].object(name));
        News::Object(model::Change::Slice(convert::slice(object).into()))
    }

    fn tell_node(&self) -> model::Change {
        let Some(node) = &self.node else { return model::Change::NodeGone(NODE.into()) };
        let address = |addr: &IpAddr| json!({ "type": "InternalIP", "address": addr.to_string() });
        let addresses: Vec<Value> = node.addresses.iter().map(address).collect();
        let mut object = json!({
            "metadata": { "name": NODE, "labels": {} }, "status": { "addresses": addresses },
        });
        if let Some(zone) = node.zone {
            object["metadata"]["labels"]["topology.kubernetes.io/zone"] = zone.into();
        }
        model::Change::Node(Box::new(convert::node(read(object))))
    }
}

impl Service {
    fn set(&mut self, field: Field) {
        match field {
            Field::Kind(kind) => self.kind = kind,
            Field::Label(label) => self.label = label,
            Field::Policies(internal, external) => {
                (self.internal_local, self.external_local) = (internal, external);
            }
            Field::Affinity(affinity) => self.affinity = affinity,
            Field::SourceRanges(ranges) => self.source_ranges = ranges,
            Field::Ports(ports) => self.ports = ports,
            Field::Maglev(maglev) => self.maglev = maglev,
        }
    }

    fn object(&self, name: &str) -> Value {
        let ports = self.ports.iter().map(|port| {
            json!({
                "name": port.name, "port": port.port, "protocol": port.protocol.to_string(),
                "nodePort": port.node_port.unwrap_or(0),
            })
        });
        let ingress = self.ingress.iter().map(|(addr, mode)| json!({ "ip": text(*addr), "ipMode": mode }));
        let families = self.cluster_ips.iter().map(|addr| if addr.is_ipv4() { "IPv4" } else { "IPv6" });
        let cluster_ips: Vec<String> = if self.headless {
            vec!["None".into()]
        } else {
            self.cluster_ips.iter().copied().map(text).collect()
        };
        let policy = |local: bool| if local { "Local" } else { "Cluster" };
        json!({
            "metadata": {
                "namespace": "ns", "name": name, "labels": labels(self.label),
                "creationTimestamp": format!("2026-01-01T00:00:{:02}Z", self.created),
                "annotations": { "fairlead.io/algorithm": if self.maglev { "maglev" } else { "random" } },
            },
            "spec": {
                "type": format!("{:?}", self.kind),
                "clusterIPs": cluster_ips,
                "ipFamilies": families.collect::<Vec<_>>(),
                "externalIPs": self.external_ips.iter().copied().map(text).collect::<Vec<_>>(),
                "ports": ports.collect::<Vec<_>>(),
                "internalTrafficPolicy": policy(self.internal_local),
                "externalTrafficPolicy": policy(self.external_local),
                "loadBalancerSourceRanges": self.source_ranges.iter().map(|r| r.text).collect::<Vec<_>>(),
                "sessionAffinity": if self.affinity.is_some() { "ClientIP" } else { "None" },
                "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": self.affinity } },
            },
            "status": { "loadBalancer": { "ingress": ingress.collect::<Vec<_>>() } },
        })
    }
}

impl Slice {
    fn object(&self, name: &str) -> Value {
        let named = |(name, port, protocol): &(&str, u16, Protocol)| json!({ "name": name, "port": port, "protocol": protocol.to_string() });
        let hints = |names: &[&str]| names.iter().map(|name| json!({ "name": name })).collect::<Vec<_>>();
        let endpoints = self.endpoints.iter().map(|endpoint| {
            let Conditions { ready, serving, terminating } = endpoint.conditions;
            json!({
                "addresses": [text(endpoint.addr)],
                "conditions": { "ready": ready, "serving": serving, "terminating": terminating },
                "nodeName": endpoint.node,
                "hints": { "forZones": hints(&endpoint.hints.zones), "forNodes": hints(&endpoint.hints.nodes) },
            })
        });
        let mut labels = labels(self.label);
        labels["kubernetes.io/service-name"] = self.service.into();
        json!({
            "metadata": { "namespace": "ns", "name": name, "labels": labels },
            "addressType": if self.family == Family::V4 { "IPv4" } else { "IPv6" },
            "ports": self.ports.iter().map(named).collect::<Vec<_>>(),
            "endpoints": endpoints.collect::<Vec<_>>(),
        })
    }
}

fn labels(label: Option<&str>) -> Value {
    let mut labels = json!({});
    if let Some(label) = label {
        labels[label] = "".into();
    }
    labels
}

/// Rule 64: leading zeros are decimal.
fn text(addr: IpAddr) -> String {
    match addr {
        IpAddr::V4(addr) => addr.octets().map(|octet| format!("{octet:03}")).join("."),
        IpAddr::V6(addr) => addr.to_string(),
    }
}

fn metadata(name: &str) -> ObjectMeta {
    read(json!({ "namespace": "ns", "name": name }))
}

fn read<T: DeserializeOwned>(object: Value) -> T {
    serde_json::from_value(object).expect("an object of Kubernetes")
}

/// The addresses of one family that everything is made of.
#[derive(Debug)]
pub struct Places {
    pub cluster_ips: [&'static str; 3],
    /// In the first ServiceCIDR, and never a clusterIP.
    pub unallocated: &'static str,
    pub service_cidrs: [&'static str; 2],
    pub load_balancer_ips: [&'static str; 2],
    pub external_ip: &'static str,
    pub node: [&'static str; 2],
    pub loopback: &'static str,
    pub other_node: &'static str,
    pub pods_here: [&'static str; 2],
    pub pods_elsewhere: [&'static str; 2],
    pub pod_network: &'static str,
    /// Pods that are no endpoint, here and on another node.
    pub clients: [&'static str; 2],
    pub outside: [&'static str; 2],
    /// Where no Service is.
    pub nowhere: &'static str,
}

impl Places {
    pub fn of(family: Family) -> &'static Self {
        match family {
            Family::V4 => &V4,
            Family::V6 => &V6,
        }
    }
}

pub static V4: Places = Places {
    cluster_ips: ["10.96.0.1", "10.96.0.2", "10.97.0.1"],
    unallocated: "10.96.0.99",
    service_cidrs: ["10.96.0.0/24", "10.97.0.0/24"],
    load_balancer_ips: ["198.18.0.1", "198.18.0.2"],
    external_ip: "198.18.1.1",
    node: ["192.0.2.1", "192.0.2.129"],
    loopback: "127.0.0.1",
    other_node: "192.0.2.200",
    pods_here: ["10.244.1.1", "10.244.1.2"],
    pods_elsewhere: ["10.244.2.1", "10.244.2.2"],
    pod_network: "10.244.0.0/16",
    clients: ["10.244.1.9", "10.244.2.9"],
    outside: ["203.0.113.7", "203.0.113.200"],
    nowhere: "198.51.100.1",
};

pub static V6: Places = Places {
    cluster_ips: ["fd00:96::1", "fd00:96::2", "fd00:97::1"],
    unallocated: "fd00:96::99",
    service_cidrs: ["fd00:96::/112", "fd00:97::/112"],
    load_balancer_ips: ["2001:db8:b::1", "2001:db8:b::2"],
    external_ip: "2001:db8:e::1",
    node: ["2001:db8:1::1", "2001:db8:1::81"],
    loopback: "::1",
    other_node: "2001:db8:1::c8",
    pods_here: ["fd00:244:1::1", "fd00:244:1::2"],
    pods_elsewhere: ["fd00:244:2::1", "fd00:244:2::2"],
    pod_network: "fd00:244::/32",
    clients: ["fd00:244:1::9", "fd00:244:2::9"],
    outside: ["2001:db8:c::7", "2001:db8:c::c8"],
    nowhere: "2001:db8:f::1",
};

static BOTH: [&Places; 2] = [&V4, &V6];

/// Rules 23 to 25: white space, leading zeros, networks of everybody and of the other family, and what is none.
const RANGES: [Range; 7] = [
    Range { text: " 203.0.113.000/025 ", net: "203.0.113.0/25" },
    Range { text: "10.244.0.0/16", net: "10.244.0.0/16" },
    Range { text: "192.0.2.0/25", net: "192.0.2.0/25" },
    Range { text: "0.0.0.0/0", net: "0.0.0.0/0" },
    Range { text: "2001:db8:c::/121", net: "2001:db8:c::/121" },
    Range { text: "2001:db8:1::1/128", net: "2001:db8:1::1/128" },
    Range { text: "somewhere", net: "" },
];

const LABELS: [&str; 2] = ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"];

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub fn net(text: &str) -> IpNet {
    text.parse().expect("a network")
}

/// `--cluster-cidr`, where it is given.
pub fn pod_networks() -> Vec<IpNet> {
    BOTH.iter().map(|places| net(places.pod_network)).collect()
}

/// One of two, the first in most cases.
fn mostly<T: Clone + std::fmt::Debug + 'static>(
    usual: impl Strategy<Value = T> + 'static,
    other: impl Strategy<Value = T> + 'static,
) -> impl Strategy<Value = T> {
    prop_oneof![6 => usual, 1 => other]
}

fn some_of<T: Clone + std::fmt::Debug + 'static>(all: Vec<T>) -> impl Strategy<Value = Vec<T>> {
    let most = all.len();
    subsequence(all, 0..=most)
}

pub fn settings() -> impl Strategy<Value = Settings> {
    let networks = vec![net("192.0.2.0/25"), net("2001:db8:1::1/128")];
    let addresses = prop_oneof![
        3 => Just(NodePortAddresses::All),
        1 => Just(NodePortAddresses::Primary),
        1 => some_of(networks).prop_filter("none is all", |nets| !nets.is_empty()).prop_map(NodePortAddresses::In),
    ];
    (any::<[bool; 2]>(), addresses).prop_map(|([cluster_cidr, masquerade_all], nodeport_addresses)| {
        Settings { cluster_cidr, nodeport_addresses, masquerade_all }
    })
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        3 => Just(Kind::ClusterIP), 3 => Just(Kind::NodePort), 4 => Just(Kind::LoadBalancer), 1 => Just(Kind::ExternalName),
    ]
}

fn label() -> impl Strategy<Value = Option<&'static str>> {
    mostly(Just(None), select(&LABELS[..]).prop_map(Some))
}

fn ports() -> impl Strategy<Value = Vec<ServicePort>> {
    use Protocol::{Tcp, Udp};

    let every = [("web", 80, Tcp), ("dns", 53, Udp), ("dns-tcp", 53, Tcp)];
    let node_port = || prop_oneof![1 => Just(None), 3 => select(&NODE_PORTS[..]).prop_map(Some)];
    (subsequence(every.to_vec(), 1..=3), vec(node_port(), 3)).prop_map(|(ports, node_ports)| {
        let ports = ports.into_iter().zip(node_ports);
        ports
            .map(|((name, port, protocol), node_port)| ServicePort { name, port, protocol, node_port })
            .collect()
    })
}

fn source_ranges() -> impl Strategy<Value = Vec<Range>> {
    prop_oneof![2 => Just(vec![]), 3 => some_of(RANGES.to_vec())]
}

fn affinity() -> impl Strategy<Value = Option<u32>> {
    prop_oneof![2 => Just(None), 1 => select(vec![10, 20]).prop_map(Some)]
}

pub fn service() -> impl Strategy<Value = Service> {
    let cluster_ips = (0..3usize, select(vec![(true, false), (false, true), (true, true)]));
    let cluster_ips = cluster_ips.prop_map(|(n, (v4, v6))| {
        let of = |places: &Places, is: bool| is.then(|| ip(places.cluster_ips[n]));
        [of(&V4, v4), of(&V6, v6)].into_iter().flatten().collect::<Vec<_>>()
    });
    let external: Vec<_> =
        BOTH.iter().flat_map(|p| [p.external_ip, p.node[1], p.load_balancer_ips[0]]).map(ip).collect();
    let ingress: Vec<_> = BOTH.iter().flat_map(|p| p.load_balancer_ips).map(ip).collect();
    let modes = vec(select(vec![None, Some("VIP"), Some("VIP"), Some("Proxy")]), 4);
    let ingress = (some_of(ingress), modes).prop_map(|(addrs, modes)| addrs.into_iter().zip(modes).collect());
    (
        (0..4u8, kind(), label(), mostly(Just(false), Just(true)), cluster_ips),
        (some_of(external), ingress, source_ranges(), ports()),
        (affinity(), any::<bool>(), any::<bool>(), any::<bool>()),
    )
        .prop_map(|((created, kind, label, headless, cluster_ips), rest, policies)| {
            let (external_ips, ingress, source_ranges, ports) = rest;
            let (affinity, internal_local, external_local, maglev) = policies;
            Service {
                created,
                kind,
                label,
                headless,
                cluster_ips,
                external_ips,
                ingress,
                source_ranges,
                ports,
                affinity,
                internal_local,
                external_local,
                maglev,
            }
        })
}

fn conditions() -> impl Strategy<Value = Conditions> {
    let condition = || select(vec![None, Some(true), Some(false)]);
    let draining = Conditions { ready: Some(false), serving: None, terminating: Some(true) };
    let any = (condition(), condition(), condition());
    let any = any.prop_map(|(ready, serving, terminating)| Conditions { ready, serving, terminating });
    prop_oneof![2 => Just(Conditions::default()), 2 => Just(draining), 1 => any]
}

fn hints() -> impl Strategy<Value = Hints> {
    let names = |names: [&'static str; 2]| mostly(subsequence(names.to_vec(), 1..=2), Just(vec![]));
    let some = (names(ZONES), mostly(Just(vec![]), names([NODE, OTHER_NODE])));
    some.prop_map(|(zones, nodes)| Hints { zones, nodes })
}

/// In most slices nobody has hints; in the others most have.
fn some_hints(len: usize) -> impl Strategy<Value = Vec<Hints>> {
    prop_oneof![vec(Just(Hints::default()), len), vec(hints(), len)]
}

fn endpoint(family: Family) -> impl Strategy<Value = Endpoint> {
    let places = Places::of(family);
    // One pod of each node does not say where it is (rule 89); who moves to another node is another backend.
    let place = select(vec![
        (places.pods_here[0], Some(NODE)),
        (places.pods_here[1], None),
        (places.node[0], Some(NODE)),
        (places.pods_elsewhere[0], Some(OTHER_NODE)),
        (places.pods_elsewhere[1], None),
    ]);
    (place, conditions()).prop_map(|((addr, node), conditions)| Endpoint {
        addr: ip(addr),
        conditions,
        node,
        hints: Hints::default(),
    })
}

fn slice() -> impl Strategy<Value = Slice> {
    use Protocol::{Tcp, Udp};

    let every = vec![("web", Tcp), ("dns", Udp), ("dns-tcp", Tcp)];
    let ports = (mostly(Just(every.clone()), some_of(every)), select(vec![8080, 9090]));
    (select(&SERVICES[..]), label(), select(vec![Family::V4, Family::V6]), ports)
        .prop_flat_map(|(service, label, family, (ports, number))| {
            let ports = ports.into_iter().map(move |(name, protocol)| (name, number, protocol));
            let slice = Slice { service, label, family, ports: ports.collect(), endpoints: vec![] };
            (Just(slice), vec(endpoint(family), 1..5), some_hints(5))
        })
        .prop_map(|(slice, mut endpoints, hints)| {
            for (endpoint, hints) in endpoints.iter_mut().zip(hints) {
                endpoint.hints = hints;
            }
            Slice { endpoints, ..slice }
        })
}

fn node() -> impl Strategy<Value = Option<Node>> {
    let zone = prop_oneof![select(&ZONES[..]).prop_map(Some), select(vec![None, Some("")])];
    let addresses = BOTH.iter().flat_map(|places| places.node).map(ip).collect();
    let node = (zone, some_of(addresses)).prop_map(|(zone, addresses)| Some(Node { zone, addresses }));
    mostly(node, Just(None))
}

fn addresses() -> impl Strategy<Value = BTreeSet<IpAddr>> {
    some_of(BOTH.iter().flat_map(|places| places.node).map(ip).collect()).prop_map(BTreeSet::from_iter)
}

fn service_cidr() -> impl Strategy<Value = Vec<IpNet>> {
    some_of(BOTH.iter().flat_map(|places| places.service_cidrs).map(net).collect())
}

/// What makes a cluster.
pub fn objects() -> impl Strategy<Value = Vec<Change>> {
    let services = vec(service(), 3).prop_map(|all| {
        SERVICES
            .into_iter()
            .zip(all)
            .map(|(name, service)| Change::Service(name, service))
            .collect::<Vec<_>>()
    });
    let slices = vec(slice(), 5).prop_map(|all| {
        SLICES.into_iter().zip(all).map(|(name, slice)| Change::Slice(name, slice)).collect::<Vec<_>>()
    });
    let addresses = addresses().prop_map(Change::Addresses);
    (services, slices, addresses, vec(object(), 0..6)).prop_map(|(services, slices, addresses, rest)| {
        services.into_iter().chain(slices).chain([addresses]).chain(rest).collect()
    })
}

fn object() -> impl Strategy<Value = Change> {
    prop_oneof![
        6 => (select(&SERVICES[..]), service()).prop_map(|(name, service)| Change::Service(name, service)),
        8 => (select(&SLICES[..]), slice()).prop_map(|(name, slice)| Change::Slice(name, slice)),
        2 => node().prop_map(Change::Node),
        2 => addresses().prop_map(Change::Addresses),
        2 => (select(vec!["cidr-1", "cidr-2"]), service_cidr()).prop_map(|(name, nets)| Change::ServiceCidr(name, nets)),
    ]
}

fn field() -> impl Strategy<Value = Field> {
    prop_oneof![
        kind().prop_map(Field::Kind),
        label().prop_map(Field::Label),
        (any::<bool>(), any::<bool>()).prop_map(|(internal, external)| Field::Policies(internal, external)),
        affinity().prop_map(Field::Affinity),
        source_ranges().prop_map(Field::SourceRanges),
        ports().prop_map(Field::Ports),
        any::<bool>().prop_map(Field::Maglev),
    ]
}

pub fn change() -> impl Strategy<Value = Change> {
    let some_slice = || select(&SLICES[..]);
    prop_oneof![
        8 => object(),
        6 => (select(&SERVICES[..]), field()).prop_map(|(name, field)| Change::Field(name, field)),
        2 => select(&SERVICES[..]).prop_map(Change::ServiceGone),
        5 => (some_slice(), 0..5usize, conditions()).prop_map(|(name, at, to)| Change::Conditions(name, at, to)),
        3 => (some_slice(), some_hints(5)).prop_map(|(name, hints)| Change::Hints(name, hints)),
        2 => some_slice().prop_map(Change::SliceGone),
        1 => select(vec!["cidr-1", "cidr-2"]).prop_map(Change::ServiceCidrGone),
        1 => Just(Change::Pause),
        1 => Just(Change::Restart),
    ]
}
