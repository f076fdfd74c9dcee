//! The ports of a Service from the outside in, and its endpoints.

use std::collections::BTreeMap;
use std::fmt::Display;

use super::objects::{ContainerPort, Objects, Pod, Service, Target, protocol};
use super::{EndpointView, NodeFacts, PortChain, ServiceChain, Step, Use};
use crate::compile::{Judged, Verdict, families, judge};
use crate::model::{Policy, ServicePort, ServiceType};

/// A port as it is written, and as the agent has it.
pub(super) struct Port<'a> {
    /// Its place in `spec.ports`.
    pub(super) index: usize,
    pub(super) name: String,
    pub(super) number: i32,
    pub(super) protocol: String,
    /// Its `nodePort`.
    pub(super) from_node: Option<i32>,
    /// `None`: not known.
    pub(super) target: Option<Target>,
    /// `None`: it is not served.
    pub(super) served: Option<&'a ServicePort>,
}

/// The ports of a Service.
pub(super) fn ports(service: &Service) -> Vec<Port<'_>> {
    let Some(written) = &service.written else {
        let known = service.model.ports.iter().enumerate().map(|(index, port)| Port {
            index,
            name: port.name.clone(),
            number: port.port.into(),
            protocol: port.protocol.to_string(),
            from_node: port.node_port.map(i32::from),
            target: None,
            served: Some(port),
        });
        return known.collect();
    };
    let ports = written.ports.iter().enumerate().map(|(index, port)| {
        let name = port.name.clone().unwrap_or_default();
        let protocol = protocol(port.protocol.as_deref());
        let served = service.model.ports.iter().find(|served| {
            let number = i32::from(served.port) == port.port;
            served.name == name && number && served.protocol.to_string() == protocol
        });
        Port {
            index,
            number: port.port,
            protocol: protocol.to_owned(),
            from_node: port.node_port.filter(|number| *number != 0),
            target: Some(Target::of(port)),
            name,
            served,
        }
    });
    ports.collect()
}

/// The Pods that a Service selects; `None`: not known, or it has no selector.
pub(super) fn selected<'a>(service: &'a Service, objects: &'a Objects) -> Option<Vec<&'a Pod>> {
    let selector = &service.written.as_ref()?.selector;
    if selector.is_empty() || objects.pods.is_none() {
        return None;
    }
    let pods = objects.pods_in(&service.model.name.namespace);
    Some(pods.filter(|pod| pod.is_selected(selector)).collect())
}

/// The chain of `service`.
pub(super) fn chain(service: &Service, objects: &Objects, node: &NodeFacts) -> ServiceChain {
    let model = &service.model;
    let pods = selected(service, objects);
    let ports = ports(service).into_iter().map(|port| PortChain {
        steps: steps(&port, service, pods.as_deref()),
        endpoints: endpoints(&port, service, objects, node),
        name: port.name,
        port: port.number,
        protocol: port.protocol,
    });
    ServiceChain {
        namespace: model.name.namespace.to_string(),
        name: model.name.name.to_string(),
        kind: type_name(model.kind),
        selector: service.written.as_ref().map(|written| written.selector.clone()),
        pods: pods.as_ref().map(Vec::len),
        pods_ready: pods.as_ref().map(|pods| pods.iter().filter(|pod| pod.ready).count()),
        internal_policy: policy_name(model.internal_policy),
        external_policy: policy_name(model.external_policy),
        ports: ports.collect(),
    }
}

fn steps(port: &Port<'_>, service: &Service, pods: Option<&[&Pod]>) -> Vec<Step> {
    let mut steps = vec![];
    let has_node_port = matches!(service.model.kind, ServiceType::NodePort | ServiceType::LoadBalancer);
    match port.from_node {
        Some(number) if has_node_port => {
            let why = format!("leads to port {}", port.number);
            steps.push(step("nodePort", number, Some(true), why));
        }
        Some(number) => steps.push(step("nodePort", number, Some(false), "its type has no nodePorts")),
        None if service.model.kind == ServiceType::NodePort => {
            steps.push(step("nodePort", "-", Some(false), "none is given"));
        }
        None => {}
    }
    let value = format!("{}/{}", port.number, port.protocol);
    let (fits, why) = match (&port.served, &port.target) {
        (None, _) if service.model.ignored.is_none() => (Some(false), "it is not served".to_owned()),
        (_, Some(target)) => (Some(true), format!("leads to targetPort {target}")),
        (_, None) => (None, "where it leads is not known without the Service itself".to_owned()),
    };
    steps.push(step("port", value, fits, why));
    if let Some(target) = &port.target {
        steps.extend(in_pods(target, &port.protocol, pods.unwrap_or_default()));
    }
    steps
}

/// `targetPort`, and what there is of it in the Pods.
fn in_pods(target: &Target, protocol: &str, pods: &[&Pod]) -> Vec<Step> {
    let mut found: BTreeMap<&ContainerPort, usize> = BTreeMap::new();
    for port in pods.iter().flat_map(|pod| &pod.ports).filter(|port| port.is(target)) {
        *found.entry(port).or_default() += 1;
    }
    let of_protocol = found.keys().any(|port| port.protocol == protocol);
    let (fits, why) = match target {
        _ if pods.is_empty() => (None, "no Pod of the Service is known".to_owned()),
        _ if of_protocol => (Some(true), "a container declares it".to_owned()),
        _ if !found.is_empty() => (Some(false), format!("no container declares it for {protocol}")),
        Target::Name(_) => (Some(false), "no container has a port of this name".to_owned()),
        Target::Number(_) => {
            (Some(false), "no container declares it; one may listen there all the same".to_owned())
        }
    };
    let mut steps = vec![step("targetPort", target, fits, why)];
    for (port, count) in &found {
        let name = if port.name.is_empty() { String::new() } else { format!(" ({})", port.name) };
        let value = format!("{}/{}{name}", port.number, port.protocol);
        let why = format!("container {}, in {count} of {} Pods", port.container, pods.len());
        steps.push(step("containerPort", value, Some(port.protocol == protocol), why));
        if let Some(number) = port.host_port {
            let why = format!("beside: on the Pod's node it leads to containerPort {}", port.number);
            steps.push(step("hostPort", format!("{number}/{}", port.protocol), Some(true), why));
        }
    }
    steps
}

fn step(step: &'static str, value: impl Display, fits: Option<bool>, why: impl Into<String>) -> Step {
    Step { step, value: value.to_string(), fits, why: why.into() }
}

/// The endpoints of a port, and what the policies make of them.
pub(super) fn judged<'a>(
    port: &Port<'_>,
    service: &Service,
    objects: &'a Objects,
    node: &NodeFacts,
) -> Vec<Judged<'a>> {
    let Some(served) = port.served else { return vec![] };
    let slices = objects.slices_of(&service.model.name);
    let families = families(&service.model, &slices).into_iter();
    families.flat_map(|family| judge(&slices, served, family, &node.facts())).collect()
}

fn endpoints(port: &Port<'_>, service: &Service, objects: &Objects, node: &NodeFacts) -> Vec<EndpointView> {
    let by_policy = |judged: &Judged<'_>, policy| match policy {
        Policy::Cluster => in_words(judged.cluster),
        Policy::Local => in_words(judged.local),
    };
    let views = judged(port, service, objects, node).into_iter().map(|judged| EndpointView {
        address: judged.backend.addr.ip(),
        port: judged.backend.addr.port(),
        pod: objects.pod_at(judged.backend.addr.ip()).map(|pod| pod.name.to_string()),
        node: judged.endpoint.node.as_deref().map(str::to_owned),
        ready: judged.endpoint.ready,
        serving: judged.endpoint.serving,
        terminating: judged.endpoint.terminating,
        inside: by_policy(&judged, service.model.internal_policy),
        outside: by_policy(&judged, service.model.external_policy),
    });
    views.collect()
}

fn in_words(verdict: Verdict) -> Use {
    let why = match verdict {
        Verdict::Used => "ready",
        Verdict::UsedUntilGone => "it terminates, and none is ready",
        Verdict::NotReady => "not ready",
        Verdict::Terminating => "it terminates, and others are ready",
        Verdict::ForOthers => "hints keep it for other zones or nodes",
        Verdict::Elsewhere => "the policy is Local, and it is not on this node",
    };
    Use { used: verdict.takes(), why }
}

const fn type_name(kind: ServiceType) -> &'static str {
    match kind {
        ServiceType::ClusterIP => "ClusterIP",
        ServiceType::NodePort => "NodePort",
        ServiceType::LoadBalancer => "LoadBalancer",
        ServiceType::ExternalName => "ExternalName",
    }
}

const fn policy_name(policy: Policy) -> &'static str {
    match policy {
        Policy::Cluster => "Cluster",
        Policy::Local => "Local",
    }
}
