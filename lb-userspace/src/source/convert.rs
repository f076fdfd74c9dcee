//! Kubernetes' objects -> the model's. What cannot be understood becomes a [`Finding`] of the object; the
//! rest of it is used.

mod fields;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;

use crate::entries::{Algorithm, Family, Mode, Protocol, ServiceName};
use crate::model::{
    Endpoint, EndpointSlice, Hints, HostPort, Ignored, Node, Pod, Policy, Service, ServicePort, ServiceType,
    SliceName, SlicePort,
};
use crate::owner::PodName;

pub use self::fields::parse_network;
use self::fields::{Findings, parse_ip, protocol};

/// On Services and EndpointSlices: another proxy serves them.
pub const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// On Services and EndpointSlices: no proxy serves them.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
/// On EndpointSlices: the Service they belong to.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// On EndpointSlices, an annotation: when what they follow last changed.
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// Set by the cluster autoscaler before it drains a node.
const TO_BE_DELETED_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// Endpoints of an EndpointSlice (`maxEndpoints` in pkg/apis/discovery/validation/validation.go of Kubernetes).
const ENDPOINTS: usize = 1000;
/// Ports of an EndpointSlice (`maxPorts`, same file). A Service with more could not be served by any; nor has the API a limit for
/// addresses and ranges of a Service or host ports of a Pod, but the size of an object.
const ITEMS: usize = 20_000;
/// Hints of each kind for an endpoint (`maxZoneHints` and `maxNodeHints`, same file).
const HINTS: usize = 8;

/// Namespace of an object that names none.
const DEFAULT_NAMESPACE: &str = "default";

/// A Service.
pub fn service(object: core::Service) -> Service {
    let mut service = Service::named(service_name(&object.metadata));
    let mut findings = Findings { prefix: String::new(), found: vec![] };
    service.uid = object.metadata.uid.unwrap_or_default().into();
    service.created = object.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second());
    let annotations = object.metadata.annotations.unwrap_or_default();
    let labels = object.metadata.labels.unwrap_or_default();
    let spec = object.spec.unwrap_or_default();

    service.kind = findings.one_of(
        "spec.type",
        spec.type_.as_deref(),
        &[
            ("ClusterIP", ServiceType::ClusterIP),
            ("NodePort", ServiceType::NodePort),
            ("LoadBalancer", ServiceType::LoadBalancer),
            ("ExternalName", ServiceType::ExternalName),
        ],
    );
    let policies = [("Cluster", Policy::Cluster), ("Local", Policy::Local)];
    service.internal_policy =
        findings.one_of("spec.internalTrafficPolicy", spec.internal_traffic_policy.as_deref(), &policies);
    service.external_policy =
        findings.one_of("spec.externalTrafficPolicy", spec.external_traffic_policy.as_deref(), &policies);
    let affinity = [("None", false), ("ClientIP", true)];
    if findings.one_of("spec.sessionAffinity", spec.session_affinity.as_deref(), &affinity) {
        let timeout = spec.session_affinity_config.and_then(|config| config.client_ip);
        service.affinity = Some(findings.timeout(timeout.and_then(|client_ip| client_ip.timeout_seconds)));
    }
    service.algorithm = findings.one_of(
        Service::ALGORITHM,
        annotations.get(Service::ALGORITHM).map(String::as_str),
        &[("the default", None), ("random", Some(Algorithm::Random)), ("maglev", Some(Algorithm::Maglev))],
    );
    service.mode = findings.one_of(
        Service::MODE,
        annotations.get(Service::MODE).map(String::as_str),
        &[
            ("the default", None),
            ("snat", Some(Mode::Snat)),
            ("dsr", Some(Mode::Dsr)),
            ("hybrid", Some(Mode::Hybrid)),
        ],
    );
    service.families = spec
        .ip_families
        .unwrap_or_default()
        .iter()
        .filter_map(|family| {
            let families = [("nothing", None), ("IPv4", Some(Family::V4)), ("IPv6", Some(Family::V6))];
            findings.one_of("spec.ipFamilies", Some(family), &families)
        })
        .collect();

    let cluster_ips = spec.cluster_ips.filter(|ips| !ips.is_empty());
    let cluster_ips = cluster_ips.unwrap_or_else(|| spec.cluster_ip.into_iter().collect());
    let cluster_ips: Vec<String> = cluster_ips.into_iter().filter(|ip| !ip.is_empty()).collect();
    service.ignored = if labels.contains_key(PROXY_NAME_LABEL) {
        Some(Ignored::OtherProxy)
    } else if service.kind == ServiceType::ExternalName {
        Some(Ignored::ExternalName)
    } else if labels.contains_key(HEADLESS_LABEL) || cluster_ips.iter().any(|ip| ip == "None") {
        Some(Ignored::Headless)
    } else {
        None
    };
    if service.ignored.is_some() {
        return service;
    }
    service.cluster_ips = findings.addresses("spec.clusterIPs", cluster_ips);
    service.external_ips = findings.addresses("spec.externalIPs", spec.external_ips.unwrap_or_default());
    let ingress = object.status.and_then(|status| status.load_balancer).and_then(|lb| lb.ingress);
    // With `ipMode: Proxy` the load balancer wants to see the packet itself.
    let vips = ingress.unwrap_or_default().into_iter().filter(|ingress| {
        let modes = [("VIP", true), ("Proxy", false)];
        findings.one_of("status.loadBalancer.ingress.ipMode", ingress.ip_mode.as_deref(), &modes)
    });
    let vips: Vec<String> = vips.filter_map(|ingress| ingress.ip).filter(|ip| !ip.is_empty()).collect();
    service.load_balancer_ips = findings.addresses("status.loadBalancer.ingress.ip", vips);
    let ranges = spec.load_balancer_source_ranges.unwrap_or_default();
    let ranges = findings.at_most(ITEMS, "spec.loadBalancerSourceRanges", ranges);
    service.source_ranges = findings.source_ranges("spec.loadBalancerSourceRanges", ranges);
    let asked = service.kind == ServiceType::LoadBalancer && service.external_policy == Policy::Local;
    let health_port = spec.health_check_node_port.filter(|number| asked && *number != 0);
    service.health_port = health_port.and_then(|number| findings.port("spec.healthCheckNodePort", number));
    let ports = findings.at_most(ITEMS, "spec.ports", spec.ports.unwrap_or_default());
    for (i, port) in ports.into_iter().enumerate() {
        service.ports.extend(service_port(i, port, &mut findings));
    }
    service.findings = findings.found;
    service
}

fn service_port(i: usize, port: core::ServicePort, findings: &mut Findings) -> Option<ServicePort> {
    let number = findings.port(&format!("spec.ports[{i}].port"), port.port)?;
    let mut converted = ServicePort {
        name: port.name.unwrap_or_default(),
        port: number,
        protocol: Protocol::Tcp,
        node_port: None,
    };
    converted.protocol = findings.protocol(converted.label(), port.protocol)?;
    let node_port = port.node_port.filter(|number| *number != 0);
    converted.node_port =
        node_port.and_then(|number| findings.port(&format!("spec.ports[{i}].nodePort"), number));
    Some(converted)
}

/// An EndpointSlice.
pub fn slice(object: discovery::EndpointSlice) -> EndpointSlice {
    let name = slice_name(&object.metadata);
    let labels = object.metadata.labels.unwrap_or_default();
    let annotations = object.metadata.annotations.unwrap_or_default();
    let triggered = annotations.get(TRIGGER_TIME).and_then(|time| time.parse::<Timestamp>().ok());
    let mut slice = EndpointSlice {
        name,
        service: None,
        ports: vec![],
        endpoints: vec![],
        triggered: triggered.map(Timestamp::as_millisecond),
        findings: vec![],
    };
    let family = match object.address_type.as_str() {
        "IPv4" => Some(Family::V4),
        "IPv6" => Some(Family::V6),
        // Domain names, which no proxy serves; of what nobody knows the Service should hear.
        other if other.is_empty() || other == "FQDN" => return slice,
        _ => None,
    };
    if labels.contains_key(PROXY_NAME_LABEL) || labels.contains_key(HEADLESS_LABEL) {
        return slice;
    }
    let Some(service) = labels.get(SERVICE_NAME_LABEL).filter(|name| !name.is_empty()) else { return slice };
    slice.service =
        Some(ServiceName { namespace: slice.name.namespace.clone(), name: service.as_str().into() });

    let prefix = format!("EndpointSlice {} ", slice.name.name);
    let mut findings = Findings { prefix, found: vec![] };
    let Some(family) = family else {
        findings.one_of("addressType", Some(&object.address_type), &[("FQDN", ())]);
        slice.findings = findings.found;
        return slice;
    };
    let ports = findings.at_most(ITEMS, "ports", object.ports.unwrap_or_default());
    for (i, port) in ports.into_iter().enumerate() {
        // No number means "all ports" for consumers that can do that; a Service cannot ask for it.
        let Some(number) = port.port else { continue };
        let Some(number) = findings.port(&format!("ports[{i}].port"), number) else { continue };
        let name = port.name.unwrap_or_default();
        // A protocol that is not supported was named with the Service's port already.
        let Some(protocol) = protocol(port.protocol.as_deref()) else { continue };
        slice.ports.push(SlicePort { name, port: number, protocol });
    }
    let mut names = BTreeSet::new();
    let endpoints = findings.at_most(ENDPOINTS, "endpoints", object.endpoints.unwrap_or_default());
    for (i, endpoint) in endpoints.into_iter().enumerate() {
        slice.endpoints.extend(convert_endpoint(i, endpoint, family, &mut names, &mut findings));
    }
    slice.endpoints.shrink_to_fit();
    slice.findings = findings.found;
    slice
}

fn convert_endpoint(
    i: usize,
    endpoint: discovery::Endpoint,
    family: Family,
    names: &mut BTreeSet<Arc<str>>,
    findings: &mut Findings,
) -> Option<Endpoint> {
    let field = || format!("endpoints[{i}].addresses");
    let text = endpoint.addresses.into_iter().next()?;
    let addr = findings.address(&field(), text)?;
    if Family::of(addr) != family {
        findings.unusable(&field(), addr.to_string());
        return None;
    }
    let conditions = endpoint.conditions.unwrap_or_default();
    let hints = endpoint.hints.unwrap_or_default();
    let field = |name| format!("endpoints[{i}].hints.{name}");
    let zones = findings.at_most(HINTS, &field("forZones"), hints.for_zones.unwrap_or_default());
    let nodes = findings.at_most(HINTS, &field("forNodes"), hints.for_nodes.unwrap_or_default());
    let hints = Hints {
        zones: zones.into_iter().map(|zone| zone.name.into()).collect(),
        nodes: nodes.into_iter().map(|node| node.name.into()).collect(),
    };
    Some(Endpoint {
        addr,
        ready: conditions.ready.unwrap_or(true),
        serving: conditions.serving.unwrap_or(true),
        terminating: conditions.terminating.unwrap_or(false),
        node: endpoint.node_name.map(|name| shared(names, &name)),
        hints: (hints != Hints::default()).then(|| Box::new(hints)),
    })
}

/// One of `names`, which it is among from now on.
fn shared(names: &mut BTreeSet<Arc<str>>, name: &str) -> Arc<str> {
    if let Some(known) = names.get(name) {
        return Arc::clone(known);
    }
    let new: Arc<str> = name.into();
    names.insert(Arc::clone(&new));
    new
}

/// A Pod. One that ended, or that has the node's network, has no host ports of ours; one that is being deleted keeps
/// them until it is gone.
pub fn pod(object: core::Pod) -> Pod {
    let mut pod = Pod::named(pod_name(&object.metadata));
    pod.created = object.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second());
    let spec = object.spec.unwrap_or_default();
    let status = object.status.unwrap_or_default();
    pod.node = spec.node_name.map(String::into_boxed_str);
    let over = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    if over || spec.host_network == Some(true) {
        return pod;
    }
    let mut findings = Findings { prefix: String::new(), found: vec![] };
    let ips: Vec<String> = status.pod_ips.unwrap_or_default().into_iter().map(|ip| ip.ip).collect();
    let ips = if ips.is_empty() { status.pod_ip.into_iter().collect() } else { ips };
    let ips: Vec<String> = ips.into_iter().filter(|ip| !ip.is_empty()).collect();
    // Those of init containers that stay.
    let sidecars = spec.init_containers.unwrap_or_default().into_iter();
    let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let mut ports: Vec<(String, core::ContainerPort)> = vec![];
    for container in spec.containers.into_iter().chain(sidecars) {
        let own = container.ports.unwrap_or_default().into_iter();
        let own = own.filter(|port| port.host_port.is_some_and(|number| number != 0));
        ports.extend(own.map(|port| (container.name.clone(), port)));
    }
    if ips.is_empty() || ports.is_empty() {
        return pod;
    }
    pod.addrs = findings.addresses("status.podIPs", ips);
    let ports = findings.at_most(ITEMS, "spec.containers.ports", ports);
    pod.ports = ports.into_iter().filter_map(|(name, port)| host_port(&name, port, &mut findings)).collect();
    pod.findings = findings.found;
    pod
}

fn host_port(container: &str, port: core::ContainerPort, findings: &mut Findings) -> Option<HostPort> {
    let field = |name: &str| format!("container {container} {name}");
    let mut converted = HostPort {
        name: port.name.unwrap_or_default(),
        host_port: findings.port(&field("hostPort"), port.host_port?)?,
        host_ip: None,
        container_port: findings.port(&field("containerPort"), port.container_port)?,
        protocol: Protocol::Tcp,
    };
    converted.protocol = findings.protocol(converted.label(), port.protocol)?;
    if let Some(text) = port.host_ip.filter(|text| !text.is_empty()) {
        converted.host_ip = Some(findings.host_ip(&field("hostIP"), text)?);
    }
    Some(converted)
}

/// A Node.
pub fn node(object: core::Node) -> Node {
    let mut node = Node::named(object.metadata.name.unwrap_or_default());
    node.zone = object.metadata.labels.and_then(|mut labels| labels.remove(ZONE_LABEL));
    node.deleting = object.metadata.deletion_timestamp.is_some();
    let spec = object.spec.unwrap_or_default();
    let pod_cidrs = spec.pod_cidrs.unwrap_or_default();
    node.pod_cidrs = pod_cidrs.iter().filter_map(|text| parse_network(text)).collect();
    let taints = spec.taints.unwrap_or_default();
    node.to_be_deleted = taints.iter().any(|taint| taint.key == TO_BE_DELETED_TAINT);
    let addresses = object.status.and_then(|status| status.addresses).unwrap_or_default();
    for kind in ["InternalIP", "ExternalIP"] {
        let of_kind = addresses.iter().filter(|address| address.type_ == kind);
        node.addresses.extend(of_kind.filter_map(|address| parse_ip(&address.address)));
    }
    node
}

/// A ServiceCIDR.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceCidr {
    pub name: String,
    pub nets: Vec<IpNet>,
}

/// A ServiceCIDR. What is no network cannot have been used for any Service.
pub fn service_cidr(object: networking::ServiceCIDR) -> ServiceCidr {
    let cidrs = object.spec.and_then(|spec| spec.cidrs).unwrap_or_default();
    ServiceCidr {
        name: object.metadata.name.unwrap_or_default(),
        nets: cidrs.iter().filter_map(|text| parse_network(text)).collect(),
    }
}

/// Name of a Service.
pub fn service_name(metadata: &ObjectMeta) -> ServiceName {
    ServiceName { namespace: namespace(metadata), name: own_name(metadata) }
}

/// Name of a Pod.
pub fn pod_name(metadata: &ObjectMeta) -> PodName {
    PodName { namespace: namespace(metadata), name: own_name(metadata) }
}

/// Name of an EndpointSlice.
pub fn slice_name(metadata: &ObjectMeta) -> SliceName {
    SliceName { namespace: namespace(metadata), name: own_name(metadata) }
}

fn own_name(metadata: &ObjectMeta) -> Arc<str> {
    metadata.name.as_deref().unwrap_or_default().into()
}

fn namespace(metadata: &ObjectMeta) -> Arc<str> {
    metadata.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE).into()
}
