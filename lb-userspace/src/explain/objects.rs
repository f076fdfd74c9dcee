//! The objects that an explanation is made of: more of them than the agent's model keeps (selectors, targetPorts, what
//! containers declare), and beside that what the agent makes of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::entries::ServiceName;
use crate::model::{self, EndpointSlice, Node};
use crate::owner::PodName;
use crate::source::convert;

/// What is known of a cluster.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    pub services: BTreeMap<ServiceName, Service>,
    pub slices: Vec<EndpointSlice>,
    /// `None`: nobody said anything of Pods.
    pub pods: Option<BTreeMap<PodName, Pod>>,
    /// Host ports of Pods, on whichever node.
    pub host_ports: Vec<model::Pod>,
    pub nodes: Vec<Node>,
}

/// A Service as the agent has it, and as it is written.
#[derive(Clone, Debug)]
pub struct Service {
    pub model: model::Service,
    /// `None`: only the agent's model of it is left.
    pub written: Option<Written>,
}

/// What the agent has no use for.
#[derive(Clone, Debug)]
pub struct Written {
    pub selector: BTreeMap<String, String>,
    /// `spec.ports`, those included that are not served.
    pub ports: Vec<core::ServicePort>,
    pub source_ranges: Vec<String>,
    /// Addresses and `ipMode` of `status.loadBalancer.ingress`.
    pub ingress: Vec<(String, String)>,
    pub publish_not_ready: bool,
}

impl Written {
    fn of(object: &core::Service) -> Self {
        let spec = object.spec.clone().unwrap_or_default();
        let balancer = object.status.as_ref().and_then(|status| status.load_balancer.clone());
        let ingress = balancer.and_then(|balancer| balancer.ingress).unwrap_or_default().into_iter();
        let ingress = ingress.map(|ingress| {
            let at = ingress.ip.or(ingress.hostname).unwrap_or_default();
            (at, ingress.ip_mode.unwrap_or_default())
        });
        Self {
            selector: spec.selector.unwrap_or_default(),
            ports: spec.ports.unwrap_or_default(),
            source_ranges: spec.load_balancer_source_ranges.unwrap_or_default(),
            ingress: ingress.collect(),
            publish_not_ready: spec.publish_not_ready_addresses == Some(true),
        }
    }
}

/// Where a port of a Service leads in a Pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    Number(i32),
    Name(String),
}

impl Target {
    /// Of an entry of `spec.ports`; without `targetPort` it is the port itself.
    pub fn of(port: &core::ServicePort) -> Self {
        match port.target_port.clone() {
            Some(IntOrString::Int(number)) if number != 0 => Self::Number(number),
            Some(IntOrString::String(name)) if !name.is_empty() => Self::Name(name),
            _ => Self::Number(port.port),
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// A Pod, as far as Services go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pod {
    pub name: PodName,
    pub labels: BTreeMap<String, String>,
    pub addrs: BTreeSet<IpAddr>,
    pub ready: bool,
    /// Why it is not ready, as far as it says.
    pub state: String,
    /// It has ended, or is being deleted: no endpoint is made of it.
    pub over: bool,
    pub ports: Vec<ContainerPort>,
}

impl Pod {
    /// Whether a selector of a Service means it.
    pub fn is_selected(&self, selector: &BTreeMap<String, String>) -> bool {
        selector.iter().all(|(key, value)| self.labels.get(key) == Some(value))
    }
}

/// An entry of a container's `ports`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ContainerPort {
    pub container: String,
    /// May be empty.
    pub name: String,
    pub number: i32,
    pub protocol: String,
    pub host_port: Option<i32>,
}

impl ContainerPort {
    /// Whether it is what a `targetPort` names, of whatever protocol.
    pub fn is(&self, target: &Target) -> bool {
        match target {
            Target::Number(number) => self.number == *number,
            Target::Name(name) => self.name == *name,
        }
    }
}

/// The protocol that a port has, written or not.
pub fn protocol(written: Option<&str>) -> &str {
    written.filter(|protocol| !protocol.is_empty()).unwrap_or("TCP")
}

impl Objects {
    /// Takes one object; kinds that explain nothing are passed over. The error names the object.
    pub fn add(&mut self, object: Value) -> Result<(), String> {
        match (object["apiVersion"].as_str().unwrap_or_default(), object["kind"].as_str().unwrap_or_default())
        {
            ("v1", "Service") => self.add_service(read(object)?),
            ("v1", "Pod") => self.add_pod(read(object)?),
            ("v1", "Node") => self.nodes.push(convert::node(read(object)?)),
            ("discovery.k8s.io/v1", "EndpointSlice") => self.slices.push(convert::slice(read(object)?)),
            (_, "") if !object.is_null() => return Err("not a Kubernetes object: no kind".into()),
            _ => {}
        }
        Ok(())
    }

    /// What the agent kept: it has no use for Pods, nor for where ports lead in them.
    pub fn kept(objects: &model::Objects) -> Self {
        let services = objects.services.iter().map(|service| {
            (service.name.clone(), Service { model: model::Service::clone(service), written: None })
        });
        let clones = |slices: &[Arc<EndpointSlice>]| slices.iter().map(|slice| (**slice).clone()).collect();
        Self {
            services: services.collect(),
            slices: clones(&objects.slices),
            pods: None,
            host_ports: objects.pods.iter().map(|pod| model::Pod::clone(pod)).collect(),
            nodes: objects.node.iter().cloned().collect(),
        }
    }

    /// The slices of a Service.
    pub fn slices_of(&self, name: &ServiceName) -> Vec<&EndpointSlice> {
        self.slices.iter().filter(|slice| slice.service.as_ref() == Some(name)).collect()
    }

    /// The Pods of a namespace, those that are over left out.
    pub fn pods_in<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Pod> {
        let pods = self.pods.iter().flat_map(BTreeMap::values);
        pods.filter(move |pod| *pod.name.namespace == *namespace && !pod.over)
    }

    /// The Pod that has an address; one that is over may have had it before another.
    pub fn pod_at(&self, addr: IpAddr) -> Option<&Pod> {
        let pods = self.pods.iter().flat_map(BTreeMap::values);
        pods.filter(|pod| pod.addrs.contains(&addr)).min_by_key(|pod| pod.over)
    }

    /// A Service of which a load balancer has this address for itself (`ipMode: Proxy`).
    pub fn proxied_at(&self, addr: IpAddr) -> Option<&ServiceName> {
        let has = |service: &Service| {
            let ingress = service.written.iter().flat_map(|written| &written.ingress);
            ingress.clone().any(|(at, mode)| mode == "Proxy" && at.parse() == Ok(addr))
        };
        self.services.iter().find(|(_, service)| has(service)).map(|(name, _)| name)
    }

    fn add_service(&mut self, object: core::Service) {
        let written = Some(Written::of(&object));
        let model = convert::service(object);
        self.services.insert(model.name.clone(), Service { model, written });
    }

    fn add_pod(&mut self, object: core::Pod) {
        let pod = pod(&object);
        let pods = self.pods.get_or_insert_default();
        if pods.insert(pod.name.clone(), pod).is_none() {
            self.host_ports.push(convert::pod(object));
        }
    }
}

fn read<T: DeserializeOwned>(object: Value) -> Result<T, String> {
    let text = |field: &Value| field.as_str().unwrap_or_default().to_owned();
    let (kind, name) = (text(&object["kind"]), text(&object["metadata"]["name"]));
    if name.is_empty() {
        return Err(format!("{kind}: metadata.name is missing"));
    }
    serde_json::from_value(object).map_err(|error| format!("{kind} {name}: {error}"))
}

fn pod(object: &core::Pod) -> Pod {
    let ObjectMeta { labels, deletion_timestamp, .. } = object.metadata.clone();
    let spec = object.spec.clone().unwrap_or_default();
    let status = object.status.clone().unwrap_or_default();
    let phase = status.phase.clone().unwrap_or_default();
    let listed = status.pod_ips.iter().flatten().map(|ip| &ip.ip);
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let ready = conditions.iter().find(|condition| condition.type_ == "Ready");
    let is_ready = ready.is_some_and(|condition| condition.status == "True");
    // Init containers that stay have ports, too.
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|container| {
        container.ports.iter().flatten().map(|port| ContainerPort {
            container: container.name.clone(),
            name: port.name.clone().unwrap_or_default(),
            number: port.container_port,
            protocol: protocol(port.protocol.as_deref()).to_owned(),
            host_port: port.host_port.filter(|number| *number != 0),
        })
    });
    Pod {
        name: convert::pod_name(&object.metadata),
        labels: labels.unwrap_or_default(),
        addrs: listed.chain(&status.pod_ip).filter_map(|text| text.parse().ok()).collect(),
        ready: is_ready,
        state: if is_ready { "ready".into() } else { why_not_ready(&status, ready) },
        over: matches!(phase.as_str(), "Succeeded" | "Failed") || deletion_timestamp.is_some(),
        ports: ports.collect(),
    }
}

/// What a waiting container says, else the condition, else the phase.
fn why_not_ready(status: &core::PodStatus, ready: Option<&core::PodCondition>) -> String {
    let containers = status.container_statuses.as_deref().unwrap_or_default();
    let waiting = containers.iter().find_map(|container| {
        let reason = container.state.as_ref()?.waiting.as_ref()?.reason.clone()?;
        Some(format!("container {} waits: {reason}", container.name))
    });
    let said = ready.and_then(|condition| condition.message.clone().or_else(|| condition.reason.clone()));
    let phase = || status.phase.as_ref().map(|phase| format!("phase {phase}"));
    waiting.or(said).or_else(phase).unwrap_or_else(|| "it does not say why".into())
}
