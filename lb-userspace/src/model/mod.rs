//! What Kubernetes says, indexed by Service. No I/O and no decisions: [`Model::apply`] takes one change
//! and answers which Services it touches.

mod objects;
mod types;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

pub use objects::Objects;
pub use types::{
    Endpoint, EndpointSlice, Hints, HostPort, Ignored, Node, Pod, Policy, Service, ServicePort, ServiceType,
    SliceName, SlicePort,
};

use ipnet::IpNet;

use crate::entries::ServiceName;
use crate::owner::{Owner, PodName};

/// One change of one object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    Service(Arc<Service>),
    ServiceGone(ServiceName),
    Slice(Arc<EndpointSlice>),
    SliceGone(SliceName),
    Pod(Arc<Pod>),
    PodGone(PodName),
    Node(Box<Node>),
    NodeGone(String),
    /// A ServiceCIDR and its networks.
    ServiceCidr(String, Vec<IpNet>),
    ServiceCidrGone(String),
}

/// What a change touches.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Touched {
    /// Services to compile again.
    pub services: BTreeSet<ServiceName>,
    /// Pods of this node whose host ports to compile again.
    pub pods: BTreeSet<PodName>,
    /// The Node object of this node changed.
    pub node: bool,
    /// A ServiceCIDR changed.
    pub service_cidrs: bool,
    /// Addresses of another node changed.
    pub peers: bool,
}

impl Touched {
    /// Everything to compile again.
    pub fn owners(&self) -> impl Iterator<Item = Owner> {
        let services = self.services.iter().cloned().map(Owner::from);
        services.chain(self.pods.iter().cloned().map(Owner::from))
    }
}

/// The objects of the cluster as far as they concern this node.
#[derive(Debug)]
pub struct Model {
    node_name: String,
    services: BTreeMap<ServiceName, Arc<Service>>,
    /// By Service; its slices in the order of their names.
    slices: BTreeMap<ServiceName, Vec<Arc<EndpointSlice>>>,
    /// The Service that a slice is indexed under.
    slice_service: BTreeMap<SliceName, ServiceName>,
    /// Services with a hint in one of their slices: the only ones that care about this node's zone.
    hinted: BTreeSet<ServiceName>,
    /// Those of this node with host ports.
    pods: BTreeMap<PodName, Arc<Pod>>,
    node: Option<Node>,
    /// Addresses of the other nodes.
    peers: BTreeMap<String, Vec<IpAddr>>,
    service_cidrs: BTreeMap<String, Vec<IpNet>>,
}

impl Model {
    /// An empty model for the node of this name.
    pub fn new(node_name: impl Into<String>) -> Self {
        Self {
            node_name: node_name.into(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            slice_service: BTreeMap::new(),
            hinted: BTreeSet::new(),
            pods: BTreeMap::new(),
            node: None,
            peers: BTreeMap::new(),
            service_cidrs: BTreeMap::new(),
        }
    }

    /// Takes one change. A change that changes nothing touches nothing.
    pub fn apply(&mut self, change: Change) -> Touched {
        let mut touched = Touched::default();
        match change {
            Change::Service(service) => {
                if self.services.get(&service.name) != Some(&service) {
                    touched.services.insert(service.name.clone());
                    self.services.insert(service.name.clone(), service);
                }
            }
            Change::ServiceGone(name) => {
                if self.services.remove(&name).is_some() {
                    touched.services.insert(name);
                }
            }
            Change::Slice(slice) => self.set_slice(slice, &mut touched.services),
            Change::SliceGone(name) => self.remove_slice(&name, &mut touched.services),
            Change::Pod(pod) => self.set_pod(pod, &mut touched.pods),
            Change::PodGone(name) => {
                if self.pods.remove(&name).is_some() {
                    touched.pods.insert(name);
                }
            }
            Change::Node(node) if node.name != self.node_name => {
                touched.peers = self.peers.get(&node.name) != Some(&node.addresses);
                self.peers.insert(node.name, node.addresses);
            }
            Change::Node(node) => self.set_node(Some(*node), &mut touched),
            Change::NodeGone(name) => {
                if name == self.node_name {
                    self.set_node(None, &mut touched);
                } else {
                    touched.peers = self.peers.remove(&name).is_some();
                }
            }
            Change::ServiceCidr(name, nets) => {
                touched.service_cidrs = self.service_cidrs.get(&name) != Some(&nets);
                self.service_cidrs.insert(name, nets);
            }
            Change::ServiceCidrGone(name) => {
                touched.service_cidrs = self.service_cidrs.remove(&name).is_some();
            }
        }
        touched
    }

    /// Whether it knows the Service, slice or Pod of this change as it is there.
    pub fn has(&self, change: &Change) -> bool {
        match change {
            Change::Service(service) => self.services.get(&service.name) == Some(service),
            Change::Slice(slice) => {
                let of_service = slice.service.as_ref().and_then(|service| self.slices.get(service));
                of_service.is_some_and(|slices| slices.contains(slice))
            }
            Change::Pod(pod) => self.pods.get(&pod.name) == Some(pod),
            _ => false,
        }
    }

    /// The Service of this name.
    pub fn service(&self, name: &ServiceName) -> Option<&Service> {
        self.services.get(name).map(|service| &**service)
    }

    /// The Pod of this name, if it is on this node and has host ports.
    pub fn pod(&self, name: &PodName) -> Option<&Pod> {
        self.pods.get(name).map(|pod| &**pod)
    }

    /// Everything that may have frontends.
    pub fn owners(&self) -> impl Iterator<Item = Owner> {
        let services = self.services.keys().cloned().map(Owner::from);
        services.chain(self.pods.keys().cloned().map(Owner::from))
    }

    /// The slices of a Service, in the order of their names.
    pub fn slices(&self, name: &ServiceName) -> impl Iterator<Item = &EndpointSlice> {
        self.slices.get(name).into_iter().flatten().map(|slice| &**slice)
    }

    /// The Node object of this node, if there is one.
    pub fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    /// Addresses of the other nodes, by name.
    pub fn peers(&self) -> &BTreeMap<String, Vec<IpAddr>> {
        &self.peers
    }

    /// The networks of every ServiceCIDR, in the order of their names.
    pub fn service_cidrs(&self) -> impl Iterator<Item = IpNet> {
        self.service_cidrs.values().flatten().copied()
    }

    fn set_slice(&mut self, slice: Arc<EndpointSlice>, touched: &mut BTreeSet<ServiceName>) {
        let Some(service) = slice.service.clone() else {
            // Belongs to nobody (any more).
            self.remove_slice(&slice.name, touched);
            return;
        };
        if self.slice_service.get(&slice.name).is_some_and(|old| *old != service) {
            self.remove_slice(&slice.name, touched);
        }
        let of_service = self.slices.entry(service.clone()).or_default();
        match of_service.binary_search_by(|other| other.name.cmp(&slice.name)) {
            Ok(place) if of_service[place] == slice => return,
            Ok(place) => of_service[place] = slice,
            Err(place) => {
                self.slice_service.insert(slice.name.clone(), service.clone());
                of_service.insert(place, slice);
            }
        }
        self.note_hints(&service);
        touched.insert(service);
    }

    fn remove_slice(&mut self, name: &SliceName, touched: &mut BTreeSet<ServiceName>) {
        let Some(service) = self.slice_service.remove(name) else { return };
        if let Some(of_service) = self.slices.get_mut(&service) {
            of_service.retain(|slice| slice.name != *name);
            if of_service.is_empty() {
                self.slices.remove(&service);
            }
        }
        self.note_hints(&service);
        touched.insert(service);
    }

    fn set_pod(&mut self, pod: Arc<Pod>, touched: &mut BTreeSet<PodName>) {
        let ours = pod.node.as_deref() == Some(self.node_name.as_str());
        let name = pod.name.clone();
        let changed = if ours && !(pod.ports.is_empty() && pod.findings.is_empty()) {
            let changed = self.pods.get(&name) != Some(&pod);
            self.pods.insert(name.clone(), pod);
            changed
        } else {
            self.pods.remove(&name).is_some()
        };
        if changed {
            touched.insert(name);
        }
    }

    fn note_hints(&mut self, service: &ServiceName) {
        if self.slices(service).any(EndpointSlice::has_hints) {
            self.hinted.insert(service.clone());
        } else {
            self.hinted.remove(service);
        }
    }

    fn set_node(&mut self, node: Option<Node>, touched: &mut Touched) {
        if node == self.node {
            return;
        }
        let zone = |node: &Option<Node>| node.as_ref().and_then(|node| node.zone.clone());
        if zone(&self.node) != zone(&node) {
            touched.services.extend(self.hinted.iter().cloned());
        }
        touched.node = true;
        self.node = node;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> ServiceName {
        ServiceName { namespace: "ns".into(), name: name.into() }
    }

    fn slice(own: &str, service: &str, addr: &str) -> EndpointSlice {
        EndpointSlice {
            name: SliceName { namespace: "ns".into(), name: own.into() },
            service: Some(name(service)),
            ports: vec![],
            endpoints: vec![Endpoint::ready(addr.parse().unwrap())],
            triggered: None,
            findings: vec![],
        }
    }

    fn apply(model: &mut Model, change: Change) -> Vec<String> {
        model.apply(change).services.into_iter().map(|n| n.name.to_string()).collect()
    }

    fn set(model: &mut Model, slice: &EndpointSlice) -> Vec<String> {
        apply(model, Change::Slice(Arc::new(slice.clone())))
    }

    /// Rule 86.
    #[test]
    fn an_identical_update_touches_nothing() {
        let mut model = Model::new("node");
        assert_eq!(set(&mut model, &slice("a", "svc", "10.0.0.1")), ["svc"]);
        assert_eq!(set(&mut model, &slice("a", "svc", "10.0.0.1")), [""; 0]);
        assert_eq!(set(&mut model, &slice("a", "svc", "10.0.0.2")), ["svc"]);
        let service = Change::Service(Arc::new(Service::named(name("svc"))));
        let known = Change::Slice(Arc::new(slice("a", "svc", "10.0.0.2")));
        assert!(model.has(&known) && !model.has(&service));
        assert!(!model.has(&Change::Slice(Arc::new(slice("a", "svc", "10.0.0.1")))));
        assert_eq!(apply(&mut model, service.clone()), ["svc"]);
        assert!(model.has(&service));
        assert_eq!(apply(&mut model, service), [""; 0]);
    }

    /// Rules 85 and 87.
    #[test]
    fn a_slice_that_goes_takes_exactly_its_endpoints_along() {
        let mut model = Model::new("node");
        let (a, b) = (slice("a", "svc", "10.0.0.1"), slice("b", "svc", "10.0.0.2"));
        set(&mut model, &a);
        set(&mut model, &b);
        assert_eq!(apply(&mut model, Change::SliceGone(a.name.clone())), ["svc"]);
        assert_eq!(model.slices(&name("svc")).collect::<Vec<_>>(), [&b]);
        assert_eq!(apply(&mut model, Change::SliceGone(a.name)), [""; 0]);
        assert_eq!(apply(&mut model, Change::SliceGone(b.name)), ["svc"]);
        assert!(model.slices.is_empty() && model.slice_service.is_empty());
    }

    #[test]
    fn a_slice_that_changes_hands_touches_both_services() {
        let mut model = Model::new("node");
        set(&mut model, &slice("a", "old", "10.0.0.1"));
        assert_eq!(set(&mut model, &slice("a", "new", "10.0.0.1")), ["new", "old"]);
        assert_eq!(model.slices(&name("old")).count(), 0);
        let orphan = EndpointSlice { service: None, ..slice("a", "new", "10.0.0.1") };
        assert_eq!(set(&mut model, &orphan), ["new"]);
        assert!(model.slices.is_empty() && model.slice_service.is_empty());
    }

    #[test]
    fn only_pods_of_this_node_with_host_ports_are_kept() {
        let mut model = Model::new("node");
        let pod_name = PodName { namespace: "ns".into(), name: "pod".into() };
        let port = HostPort {
            name: String::new(),
            host_port: 80,
            host_ip: None,
            container_port: 8080,
            protocol: crate::entries::Protocol::Tcp,
        };
        let plain = Pod { node: Some("node".into()), ..Pod::named(pod_name.clone()) };
        let ours = Pod { ports: vec![port], ..plain.clone() };
        let elsewhere = Pod { node: Some("other".into()), ..ours.clone() };
        let mut set = |pod: &Pod| model.apply(Change::Pod(Arc::new(pod.clone()))).pods.len();
        assert_eq!([set(&plain), set(&elsewhere), set(&ours), set(&ours)], [0, 0, 1, 0]);
        // It has ended.
        assert_eq!([set(&plain), set(&plain), set(&ours)], [1, 0, 1]);
        assert_eq!(model.owners().map(|owner| owner.to_string()).collect::<Vec<_>>(), ["Pod ns/pod"]);
        assert_eq!(model.apply(Change::PodGone(pod_name.clone())).owners().count(), 1);
        assert_eq!(model.apply(Change::PodGone(pod_name)).owners().count(), 0);
        assert!(model.pods.is_empty());
    }

    #[test]
    fn only_hinted_services_care_about_the_zone() {
        let mut model = Model::new("node");
        let mut hinted = slice("a", "hinted", "10.0.0.1");
        hinted.endpoints[0].hints = Some(Box::new(Hints { zones: vec!["z1".into()], nodes: vec![] }));
        set(&mut model, &hinted);
        set(&mut model, &slice("b", "plain", "10.0.0.2"));
        let node = Node { zone: Some("z1".into()), ..Node::named("node") };
        assert_eq!(apply(&mut model, Change::Node(Box::new(node.clone()))), ["hinted"]);
        let labelled = Node { deleting: true, ..node };
        let touched = model.apply(Change::Node(Box::new(labelled)));
        assert!(touched.node && touched.services.is_empty());
        assert!(!model.apply(Change::Node(Box::new(Node::named("other")))).node);
        assert_eq!(apply(&mut model, Change::NodeGone("other".into())), [""; 0]);
        assert_eq!(apply(&mut model, Change::NodeGone("node".into())), ["hinted"]);
        hinted.endpoints[0].hints = None;
        set(&mut model, &hinted);
        let node = Node { zone: Some("z1".into()), ..Node::named("node") };
        assert_eq!(apply(&mut model, Change::Node(Box::new(node))), [""; 0]);
    }
}
