//! The objects of Kubernetes reduced to what this node needs of them, with every default filled in.
//!
//! They are kept on the disk as they are declared here ([`crate::kept`]): whoever changes them raises the version of the
//! file.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::entries::{Algorithm, Family, Mode, Protocol, ServiceName};
use crate::finding::Finding;
use crate::owner::PodName;

/// A Service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Service {
    pub name: ServiceName,
    /// `metadata.uid`; may be empty.
    pub uid: Box<str>,
    /// `metadata.creationTimestamp`, seconds since 1970; of two Services that claim one frontend the older
    /// has it.
    pub created: i64,
    pub kind: ServiceType,
    /// Why it is not ours to serve, if it is not.
    pub ignored: Option<Ignored>,
    /// `spec.ipFamilies`.
    pub families: Vec<Family>,
    pub cluster_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress` with `ipMode: VIP` (the default).
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`: who may ask for the load-balancer IPs of a family; not there: everybody.
    pub source_ranges: BTreeMap<Family, BTreeSet<IpNet>>,
    pub ports: Vec<ServicePort>,
    /// `sessionAffinity: ClientIP`: how many seconds a client is remembered.
    pub affinity: Option<u32>,
    pub internal_policy: Policy,
    pub external_policy: Policy,
    /// `spec.healthCheckNodePort`, where it means something: type LoadBalancer with the external policy Local.
    pub health_port: Option<u16>,
    /// The annotation [`Service::ALGORITHM`].
    pub algorithm: Option<Algorithm>,
    /// The annotation [`Service::MODE`].
    pub mode: Option<Mode>,
    /// What could not be understood in the object.
    #[serde(skip)]
    pub findings: Vec<Finding>,
}

impl Service {
    /// The annotation that chooses the algorithm of one Service: `random` or `maglev`.
    pub const ALGORITHM: &str = "fairlead.io/algorithm";

    /// The annotation that chooses the mode of one Service: `snat`, `dsr` or `hybrid`.
    pub const MODE: &str = "fairlead.io/mode";

    /// Default of `sessionAffinityConfig.clientIP.timeoutSeconds`.
    pub const AFFINITY_SECONDS: u32 = 10_800;

    /// A ClusterIP Service without addresses or ports.
    pub fn named(name: ServiceName) -> Self {
        Self {
            name,
            uid: Box::default(),
            created: 0,
            kind: ServiceType::ClusterIP,
            ignored: None,
            families: vec![],
            cluster_ips: vec![],
            external_ips: vec![],
            load_balancer_ips: vec![],
            source_ranges: BTreeMap::new(),
            ports: vec![],
            affinity: None,
            internal_policy: Policy::Cluster,
            external_policy: Policy::Cluster,
            health_port: None,
            algorithm: None,
            mode: None,
            findings: vec![],
        }
    }
}

/// `spec.type`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ServiceType {
    ClusterIP,
    NodePort,
    LoadBalancer,
    ExternalName,
}

/// Why a Service is not ours to serve.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Ignored {
    /// `clusterIP: None`, or the label `service.kubernetes.io/headless`.
    Headless,
    /// `type: ExternalName`.
    ExternalName,
    /// The label `service.kubernetes.io/service-proxy-name` names another proxy.
    OtherProxy,
}

/// One entry of `spec.ports`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ServicePort {
    /// May be empty if it is the only one.
    pub name: String,
    pub port: u16,
    pub protocol: Protocol,
    pub node_port: Option<u16>,
}

impl ServicePort {
    /// Its name, or its number if it has none: how messages call it.
    pub fn label(&self) -> String {
        if self.name.is_empty() { self.port.to_string() } else { self.name.clone() }
    }
}

/// `internalTrafficPolicy` or `externalTrafficPolicy`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Policy {
    Cluster,
    Local,
}

/// Name of an EndpointSlice.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct SliceName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl fmt::Display for SliceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// An EndpointSlice.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EndpointSlice {
    pub name: SliceName,
    /// The label `kubernetes.io/service-name`; none if the slice is nobody's, headless, of another proxy,
    /// or of domain names.
    pub service: Option<ServiceName>,
    pub ports: Vec<SlicePort>,
    pub endpoints: Vec<Endpoint>,
    /// When the pod or Service changed that the slice was last changed for, milliseconds since 1970
    /// (annotation `endpoints.kubernetes.io/last-change-trigger-time`).
    pub triggered: Option<i64>,
    /// What could not be understood in the object.
    #[serde(skip)]
    pub findings: Vec<Finding>,
}

impl EndpointSlice {
    /// Whether any endpoint has a topology hint.
    pub fn has_hints(&self) -> bool {
        self.endpoints.iter().any(|e| e.hints.is_some())
    }
}

/// One entry of an EndpointSlice's `ports`: the number the Service's targetPort came to in this slice.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SlicePort {
    pub name: String,
    pub port: u16,
    pub protocol: Protocol,
}

/// One entry of an EndpointSlice's `endpoints`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Endpoint {
    /// The first address; the API gives the others no meaning.
    pub addr: IpAddr,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    /// Endpoints of a slice share it.
    pub node: Option<Arc<str>>,
    /// Most have none, and there are many endpoints.
    pub hints: Option<Box<Hints>>,
}

/// Whom an endpoint is meant for.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Hints {
    pub zones: Vec<Box<str>>,
    pub nodes: Vec<Box<str>>,
}

impl Endpoint {
    /// A ready endpoint on no node in particular.
    pub fn ready(addr: IpAddr) -> Self {
        Self { addr, ready: true, serving: true, terminating: false, node: None, hints: None }
    }

    /// The zones it is meant for.
    pub fn zone_hints(&self) -> &[Box<str>] {
        self.hints.as_ref().map(|hints| &*hints.zones).unwrap_or_default()
    }

    /// The nodes it is meant for.
    pub fn node_hints(&self) -> &[Box<str>] {
        self.hints.as_ref().map(|hints| &*hints.nodes).unwrap_or_default()
    }
}

/// A Pod, as far as its host ports go.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pod {
    pub name: PodName,
    /// `metadata.creationTimestamp`, seconds since 1970; as with Services the older has a frontend.
    pub created: i64,
    /// `spec.nodeName`.
    pub node: Option<Box<str>>,
    /// `status.podIPs`.
    pub addrs: Vec<IpAddr>,
    /// None if it has ended, has no address yet, or has the node's network.
    pub ports: Vec<HostPort>,
    /// What could not be understood in the object.
    #[serde(skip)]
    pub findings: Vec<Finding>,
}

impl Pod {
    /// A Pod on no node, without addresses or host ports.
    pub fn named(name: PodName) -> Self {
        Self { name, created: 0, node: None, addrs: vec![], ports: vec![], findings: vec![] }
    }
}

/// A port of a container that has a `hostPort`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HostPort {
    /// May be empty.
    pub name: String,
    pub host_port: u16,
    /// `hostIP`; unspecified: every address of the node of its family; none: of both families.
    pub host_ip: Option<IpAddr>,
    pub container_port: u16,
    pub protocol: Protocol,
}

impl HostPort {
    /// Its name, or the host port if it has none: how messages call it.
    pub fn label(&self) -> String {
        if self.name.is_empty() { self.host_port.to_string() } else { self.name.clone() }
    }
}

/// A Node: this one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Node {
    pub name: String,
    /// The label `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
    /// `status.addresses` of type InternalIP, then ExternalIP.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// `metadata.deletionTimestamp` is set.
    pub deleting: bool,
    /// It carries the taint `ToBeDeletedByClusterAutoscaler`.
    pub to_be_deleted: bool,
}

impl Node {
    /// A node of which only the name is known.
    pub fn named(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            zone: None,
            addresses: vec![],
            pod_cidrs: vec![],
            deleting: false,
            to_be_deleted: false,
        }
    }
}
