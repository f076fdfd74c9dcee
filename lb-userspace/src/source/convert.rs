//! Kubernetes' objects -> the model's. What cannot be understood becomes a [`Finding`] of the object; the
//! rest of it is used.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;

use crate::entries::{Algorithm, Family, Protocol, ServiceName};
use crate::finding::Finding;
use crate::model::{
    Endpoint, EndpointSlice, Hints, HostPort, Ignored, Node, Pod, Policy, Service, ServicePort, ServiceType,
    SliceName, SlicePort,
};
use crate::owner::PodName;

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

/// Bytes of somebody's text in a message.
const QUOTED: usize = 100;

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
    service.source_ranges = findings.source_ranges("spec.loadBalancerSourceRanges", ranges);
    let asked = service.kind == ServiceType::LoadBalancer && service.external_policy == Policy::Local;
    let health_port = spec.health_check_node_port.filter(|number| asked && *number != 0);
    service.health_port = health_port.and_then(|number| findings.port("spec.healthCheckNodePort", number));
    for (i, port) in spec.ports.unwrap_or_default().into_iter().enumerate() {
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
    for (i, port) in object.ports.unwrap_or_default().into_iter().enumerate() {
        // No number means "all ports" for consumers that can do that; a Service cannot ask for it.
        let Some(number) = port.port else { continue };
        let Some(number) = findings.port(&format!("ports[{i}].port"), number) else { continue };
        let name = port.name.unwrap_or_default();
        // A protocol that is not supported was named with the Service's port already.
        let Some(protocol) = protocol(port.protocol.as_deref()) else { continue };
        slice.ports.push(SlicePort { name, port: number, protocol });
    }
    for (i, endpoint) in object.endpoints.unwrap_or_default().into_iter().enumerate() {
        slice.endpoints.extend(convert_endpoint(i, endpoint, family, &mut findings));
    }
    slice.endpoints.shrink_to_fit();
    slice.findings = findings.found;
    slice
}

fn convert_endpoint(
    i: usize,
    endpoint: discovery::Endpoint,
    family: Family,
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
    let hints = Hints {
        zones: hints.for_zones.unwrap_or_default().into_iter().map(|zone| zone.name.into()).collect(),
        nodes: hints.for_nodes.unwrap_or_default().into_iter().map(|node| node.name.into()).collect(),
    };
    Some(Endpoint {
        addr,
        ready: conditions.ready.unwrap_or(true),
        serving: conditions.serving.unwrap_or(true),
        terminating: conditions.terminating.unwrap_or(false),
        node: endpoint.node_name.map(String::into_boxed_str),
        hints: (hints != Hints::default()).then(|| Box::new(hints)),
    })
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

fn protocol(name: Option<&str>) -> Option<Protocol> {
    match name {
        None | Some("TCP" | "") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(_) => None,
    }
}

/// As Kubernetes reads addresses: leading zeros are decimal, an IPv4-mapped address is IPv4.
fn parse_ip(text: &str) -> Option<IpAddr> {
    let addr = text.parse().ok().or_else(|| {
        let mut octets = [0u8; 4];
        let mut parts = text.split('.');
        for octet in &mut octets {
            let part = parts.next()?;
            let digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
            *octet = if digits { part.parse().ok()? } else { return None };
        }
        parts.next().is_none().then(|| IpAddr::V4(Ipv4Addr::from(octets)))
    });
    addr.map(|addr: IpAddr| addr.to_canonical())
}

/// As Kubernetes reads networks: white space around them does not matter, nor do bits behind the prefix.
pub fn parse_network(text: &str) -> Option<IpNet> {
    let (addr, prefix) = text.trim().split_once('/')?;
    let mapped = addr.contains(':');
    let addr = parse_ip(addr)?;
    let digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
    let prefix: u8 = if digits { prefix.parse().ok()? } else { return None };
    let prefix = if mapped && addr.is_ipv4() { prefix.checked_sub(96)? } else { prefix };
    Some(IpNet::new(addr, prefix).ok()?.trunc())
}

/// What somebody wrote, as far as a message has room for it.
fn shortened(mut text: String) -> String {
    if text.len() > QUOTED {
        text.truncate(text.floor_char_boundary(QUOTED));
        text.push('…');
    }
    text
}

/// An address that no Service and no endpoint can have.
fn is_unusable(addr: IpAddr) -> bool {
    let link_local = match addr {
        IpAddr::V4(addr) => addr.is_link_local() || addr.is_broadcast(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    };
    addr.is_unspecified() || addr.is_loopback() || addr.is_multicast() || link_local
}

struct Findings {
    prefix: String,
    found: Vec<Finding>,
}

impl Findings {
    fn field(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    fn unusable(&mut self, field: &str, value: String) {
        let field = self.field(field);
        self.found.push(Finding::UnusableAddress { field, value: shortened(value) });
    }

    fn address(&mut self, field: &str, text: String) -> Option<IpAddr> {
        let Some(addr) = parse_ip(&text) else {
            let field = self.field(field);
            self.found.push(Finding::BadAddress { field, value: shortened(text) });
            return None;
        };
        if is_unusable(addr) {
            self.unusable(field, text);
            return None;
        }
        Some(addr)
    }

    /// An address of the node, whichever it has.
    fn host_ip(&mut self, field: &str, text: String) -> Option<IpAddr> {
        let addr = parse_ip(&text);
        if addr.is_none() {
            let field = self.field(field);
            self.found.push(Finding::BadAddress { field, value: text });
        }
        addr
    }

    fn addresses(&mut self, field: &str, texts: Vec<String>) -> Vec<IpAddr> {
        texts.into_iter().filter_map(|text| self.address(field, text)).collect()
    }

    /// By family; one that has no range, or one for everybody, is open to everybody. A range that cannot be read
    /// admits nobody, but it does not open what somebody meant to close.
    fn source_ranges(&mut self, field: &str, texts: Vec<String>) -> BTreeMap<Family, BTreeSet<IpNet>> {
        let mut ranges: BTreeMap<Family, BTreeSet<IpNet>> = BTreeMap::new();
        for text in texts {
            if let Some(net) = parse_network(&text) {
                ranges.entry(Family::of(net.addr())).or_default().insert(net);
            } else {
                ranges.entry(if text.contains(':') { Family::V6 } else { Family::V4 }).or_default();
                let field = self.field(field);
                self.found.push(Finding::BadNetwork { field, value: shortened(text) });
            }
        }
        ranges.retain(|_, nets| nets.iter().all(|net| net.prefix_len() > 0));
        ranges
    }

    fn port(&mut self, field: &str, value: i32) -> Option<u16> {
        let port = u16::try_from(value).ok().filter(|port| *port != 0);
        if port.is_none() {
            let field = self.field(field);
            self.found.push(Finding::BadPort { field, value: value.into() });
        }
        port
    }

    fn timeout(&mut self, seconds: Option<i32>) -> u32 {
        let taken = Service::AFFINITY_SECONDS;
        let Some(value) = seconds else { return taken };
        u32::try_from(value).ok().filter(|seconds| *seconds > 0).unwrap_or_else(|| {
            let field = self.field("spec.sessionAffinityConfig.clientIP.timeoutSeconds");
            self.found.push(Finding::BadTimeout { field, value: value.into(), taken });
            taken
        })
    }

    fn protocol(&mut self, port: String, name: Option<String>) -> Option<Protocol> {
        let converted = protocol(name.as_deref());
        if converted.is_none() {
            let protocol = shortened(name.unwrap_or_default());
            self.found.push(Finding::UnsupportedProtocol { port, protocol });
        }
        converted
    }

    /// The first of `values` is the default.
    fn one_of<T: Copy, const N: usize>(
        &mut self,
        field: &str,
        value: Option<&str>,
        values: &[(&'static str, T); N],
    ) -> T {
        const { assert!(N > 0) };
        let (default, fallback) = values[0];
        let Some(value) = value.filter(|value| !value.is_empty()) else { return fallback };
        if let Some((_, known)) = values.iter().find(|(name, _)| *name == value) {
            return *known;
        }
        let field = self.field(field);
        self.found.push(Finding::UnknownValue { field, value: shortened(value.to_owned()), taken: default });
        fallback
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn a_service(spec: &Value) -> Service {
        let object = json!({ "metadata": { "name": "svc", "namespace": "ns" }, "spec": spec });
        service(serde_json::from_value(object).unwrap())
    }

    fn a_slice(rest: &Value) -> EndpointSlice {
        let mut object = json!({
            "addressType": "IPv4",
            "metadata": { "name": "svc-1", "namespace": "ns", "labels": { SERVICE_NAME_LABEL: "svc" } },
        });
        object.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        slice(serde_json::from_value(object).unwrap())
    }

    fn texts(findings: &[Finding]) -> Vec<String> {
        findings.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_slice_says_when_what_it_follows_changed() {
        let with = |time: &str| {
            let annotations = json!({ TRIGGER_TIME: time });
            let labels = json!({ SERVICE_NAME_LABEL: "svc" });
            let metadata = json!({ "name": "s", "annotations": annotations, "labels": labels });
            a_slice(&json!({ "metadata": metadata })).triggered
        };
        assert_eq!(with("1970-01-01T00:01:00Z"), Some(60_000));
        assert_eq!(with("1970-01-01T00:00:00.25Z"), Some(250));
        // Nobody misses a time that cannot be read.
        assert_eq!(with("yesterday"), None);
        assert_eq!(a_slice(&json!({})).triggered, None);
    }

    #[test]
    fn everything_that_matters_is_taken_over() {
        let object = json!({
            "metadata": {
                "name": "svc", "namespace": "ns", "creationTimestamp": "1970-01-01T00:01:00Z", "uid": "u-1",
                "annotations": { Service::ALGORITHM: "random" },
            },
            "spec": {
                "type": "LoadBalancer",
                "clusterIP": "172.30.0.41", "clusterIPs": ["172.30.0.41", "fd00::41"],
                "ipFamilies": ["IPv4", "IPv6"],
                "externalIPs": ["192.168.99.11"],
                "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local",
                "healthCheckNodePort": 32000,
                "ports": [
                    { "name": "http", "port": 80, "nodePort": 30080, "targetPort": "web" },
                    { "name": "dns", "port": 53, "protocol": "UDP" },
                ],
            },
            "status": { "loadBalancer": { "ingress": [{ "ip": "1.2.3.4" }, { "hostname": "example.org" }] } },
        });
        let expected = Service {
            uid: "u-1".into(),
            created: 60,
            kind: ServiceType::LoadBalancer,
            algorithm: Some(Algorithm::Random),
            families: vec![Family::V4, Family::V6],
            cluster_ips: vec!["172.30.0.41".parse().unwrap(), "fd00::41".parse().unwrap()],
            external_ips: vec!["192.168.99.11".parse().unwrap()],
            load_balancer_ips: vec!["1.2.3.4".parse().unwrap()],
            internal_policy: Policy::Local,
            external_policy: Policy::Local,
            health_port: Some(32_000),
            ports: vec![
                ServicePort {
                    name: "http".into(),
                    port: 80,
                    protocol: Protocol::Tcp,
                    node_port: Some(30_080),
                },
                ServicePort { name: "dns".into(), port: 53, protocol: Protocol::Udp, node_port: None },
            ],
            ..Service::named(ServiceName { namespace: "ns".into(), name: "svc".into() })
        };
        assert_eq!(service(serde_json::from_value(object).unwrap()), expected);
    }

    #[test]
    fn a_health_port_is_for_load_balancers_with_policy_local() {
        let health_port = |kind: &str, policy: &str, port: i32| {
            let service = a_service(&json!({
                "type": kind, "clusterIP": "172.30.0.41", "externalTrafficPolicy": policy, "healthCheckNodePort": port,
            }));
            (service.health_port, texts_of(&service))
        };
        assert_eq!(health_port("LoadBalancer", "Local", 32_000), (Some(32_000), vec![]));
        assert_eq!(health_port("LoadBalancer", "Local", 0), (None, vec![]));
        assert_eq!(health_port("LoadBalancer", "Cluster", 32_000), (None, vec![]));
        assert_eq!(health_port("NodePort", "Local", 32_000), (None, vec![]));
        let text = "spec.healthCheckNodePort: 65536 is no port number; it is left out".to_owned();
        assert_eq!(health_port("LoadBalancer", "Local", 65_536), (None, vec![text]));
    }

    /// Rule 63.
    #[test]
    fn addresses_of_load_balancers_that_proxy_are_not_ours() {
        let ingress = json!([{ "ip": "1.1.1.1", "ipMode": "Proxy" }, { "ip": "1.1.1.2", "ipMode": "VIP" }, { "ip": "1.1.1.3" }]);
        let object = json!({
            "metadata": { "name": "svc" },
            "spec": { "type": "LoadBalancer", "clusterIP": "172.30.0.41" },
            "status": { "loadBalancer": { "ingress": ingress } },
        });
        let service = service(serde_json::from_value(object).unwrap());
        let vips: Vec<_> = service.load_balancer_ips.iter().map(ToString::to_string).collect();
        assert_eq!(vips, ["1.1.1.2", "1.1.1.3"]);
        assert_eq!(service.name.to_string(), "default/svc");
    }

    /// Rule 64.
    #[test]
    fn addresses_with_leading_zeros_are_decimal() {
        let service = a_service(&json!({
            "clusterIP": "172.30.0.041", "externalIPs": ["192.168.099.011", "::ffff:10.0.0.1"],
        }));
        assert_eq!(service.findings, []);
        let addrs: Vec<_> =
            service.cluster_ips.iter().chain(&service.external_ips).map(ToString::to_string).collect();
        assert_eq!(addrs, ["172.30.0.41", "192.168.99.11", "10.0.0.1"]);
        let slice = a_slice(&json!({ "endpoints": [{ "addresses": ["010.180.00.001"] }] }));
        assert_eq!(slice.endpoints[0].addr.to_string(), "10.180.0.1");
        let object = json!({
            "metadata": { "name": "svc" },
            "spec": { "type": "LoadBalancer", "clusterIPs": ["172.30.0.041"] },
            "status": { "loadBalancer": { "ingress": [{ "ip": "001.002.003.004" }] } },
        });
        let service = super::service(serde_json::from_value(object).unwrap());
        assert_eq!(
            (service.cluster_ips[0].to_string(), service.load_balancer_ips[0].to_string()),
            ("172.30.0.41".into(), "1.2.3.4".into())
        );
        let addresses = json!([{ "type": "InternalIP", "address": "192.168.000.002" }]);
        let object = json!({ "metadata": { "name": "n" }, "status": { "addresses": addresses } });
        assert_eq!(node(serde_json::from_value(object).unwrap()).addresses[0].to_string(), "192.168.0.2");
        let object = json!({ "metadata": { "name": "k" }, "spec": { "cidrs": ["010.096.0.0/012"] } });
        assert_eq!(service_cidr(serde_json::from_value(object).unwrap()).nets[0].to_string(), "10.96.0.0/12");
    }

    /// Rules 23 to 25, and 64.
    #[test]
    fn source_ranges_are_read_by_family() {
        let ranges = |texts: &[&str]| {
            let service = a_service(&json!({
                "clusterIP": "172.30.0.41", "type": "LoadBalancer", "loadBalancerSourceRanges": texts,
            }));
            let nets = |(family, nets): (&Family, &BTreeSet<IpNet>)| {
                let nets: Vec<String> = nets.iter().map(ToString::to_string).collect();
                format!("{family:?} {}", nets.join(" "))
            };
            let shown: Vec<String> = service.source_ranges.iter().map(nets).collect();
            (shown, texts_of(&service))
        };
        let good = |texts: &[&str], expected: &[&str]| {
            let (shown, findings) = ranges(texts);
            assert_eq!((shown, findings), (expected.iter().map(|s| (*s).to_owned()).collect(), vec![]));
        };
        good(&[], &[]);
        good(&[" 203.0.113.000/025\n"], &["V4 203.0.113.0/25"]);
        good(&["203.0.113.7/24", "203.0.113.0/24"], &["V4 203.0.113.0/24"]);
        good(&["10.0.0.0/8", "2001:db8::/32"], &["V4 10.0.0.0/8", "V6 2001:db8::/32"]);
        // Of a family without a range everybody may ask.
        good(&["2001:db8::/32"], &["V6 2001:db8::/32"]);
        good(&["10.0.0.0/8", "0.0.0.0/0", "fd00::/8"], &["V6 fd00::/8"]);
        good(&["::/0"], &[]);
        good(&["::ffff:10.0.0.0/104"], &["V4 10.0.0.0/8"]);
        for bad in ["10.0.0.0", "10.0.0.0/33", "10.0.0.0/+8", "10.0.0/8", "10.0.0.0/", "example.org/8"] {
            let (shown, findings) = ranges(&[bad]);
            let text = format!("spec.loadBalancerSourceRanges: {bad:?} is not a network; it admits nobody");
            assert_eq!((shown, findings), (vec!["V4 ".to_owned()], vec![text]));
        }
        assert_eq!(ranges(&["fd00::/129", "10.0.0.0/8"]).0, ["V4 10.0.0.0/8", "V6 "]);
    }

    #[test]
    fn clients_are_remembered_for_three_hours_if_nothing_else_is_said() {
        let affinity = |spec: &Value| {
            let service = a_service(spec);
            (service.affinity, texts_of(&service))
        };
        let config = |seconds: i32| {
            json!({
                "clusterIP": "172.30.0.41", "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": seconds } },
            })
        };
        assert_eq!(affinity(&json!({ "clusterIP": "172.30.0.41" })), (None, vec![]));
        assert_eq!(affinity(&json!({ "sessionAffinity": "None" })), (None, vec![]));
        assert_eq!(affinity(&json!({ "sessionAffinity": "ClientIP" })), (Some(10_800), vec![]));
        assert_eq!(affinity(&config(5)), (Some(5), vec![]));
        for seconds in [0, -1] {
            let text = format!(
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds: {seconds} is no time-out; 10800 is used"
            );
            assert_eq!(affinity(&config(seconds)), (Some(10_800), vec![text]));
        }
        let unknown = json!({ "sessionAffinity": "Cookie" });
        let text = "spec.sessionAffinity: unknown value \"Cookie\"; taken as None".to_owned();
        assert_eq!(affinity(&unknown), (None, vec![text]));
    }

    fn texts_of(service: &Service) -> Vec<String> {
        texts(&service.findings)
    }

    #[test]
    fn what_is_no_address_is_named_and_left_out() {
        let service = a_service(&json!({
            "clusterIPs": ["172.30.0.41", "172.30.0.256", "1.2.3", "1.2.3.4.5", "1.2.3.+4", "0x1.2.3.4"],
            "externalIPs": ["0.0.0.0", "127.0.0.1", "224.0.0.1", "fe80::1", "192.168.99.11", "fe80::1%eth0"],
        }));
        assert_eq!(service.cluster_ips.len(), 1);
        assert_eq!(service.external_ips.len(), 1);
        let expected = [
            "spec.clusterIPs: \"172.30.0.256\" is not an IP address; it is left out",
            "spec.clusterIPs: \"1.2.3\" is not an IP address; it is left out",
            "spec.clusterIPs: \"1.2.3.4.5\" is not an IP address; it is left out",
            "spec.clusterIPs: \"1.2.3.+4\" is not an IP address; it is left out",
            "spec.clusterIPs: \"0x1.2.3.4\" is not an IP address; it is left out",
            "spec.externalIPs: 0.0.0.0 cannot be one; it is left out",
            "spec.externalIPs: 127.0.0.1 cannot be one; it is left out",
            "spec.externalIPs: 224.0.0.1 cannot be one; it is left out",
            "spec.externalIPs: fe80::1 cannot be one; it is left out",
            "spec.externalIPs: \"fe80::1%eth0\" is not an IP address; it is left out",
        ];
        assert_eq!(texts(&service.findings), expected);
        let slice = a_slice(&json!({
            "endpoints": [{ "addresses": ["example.org"] }, { "addresses": ["fd00::1"] }, { "addresses": [] },
                          { "addresses": ["10.0.0.1", "10.0.0.2"] }],
        }));
        assert_eq!(slice.endpoints, [Endpoint::ready("10.0.0.1".parse().unwrap())]);
        let expected = [
            "EndpointSlice svc-1 endpoints[0].addresses: \"example.org\" is not an IP address; it is left out",
            "EndpointSlice svc-1 endpoints[1].addresses: fd00::1 cannot be one; it is left out",
        ];
        assert_eq!(texts(&slice.findings), expected);
    }

    #[test]
    fn what_cannot_be_served_is_named_and_the_rest_is_used() {
        let service = a_service(&json!({
            "type": "Cluster", "clusterIP": "172.30.0.41", "externalTrafficPolicy": "Remote",
            "ipFamilies": ["IPv5", "IPv4"],
            "ports": [
                { "name": "s", "port": 80, "protocol": "DCCP" }, { "port": 0 }, { "port": 65536 },
                { "port": 80, "nodePort": 70000 },
            ],
        }));
        let port = ServicePort { name: String::new(), port: 80, protocol: Protocol::Tcp, node_port: None };
        assert_eq!(service.ports, [port]);
        let expected = [
            "spec.type: unknown value \"Cluster\"; taken as ClusterIP",
            "spec.externalTrafficPolicy: unknown value \"Remote\"; taken as Cluster",
            "spec.ipFamilies: unknown value \"IPv5\"; taken as nothing",
            "port s: protocol DCCP is not supported; the port is left out",
            "spec.ports[1].port: 0 is no port number; it is left out",
            "spec.ports[2].port: 65536 is no port number; it is left out",
            "spec.ports[3].nodePort: 70000 is no port number; it is left out",
        ];
        assert_eq!(texts(&service.findings), expected);
    }

    /// Rules 65, 119 and 120.
    #[test]
    fn services_that_are_not_ours() {
        assert_eq!(a_service(&json!({ "clusterIP": "None" })).ignored, Some(Ignored::Headless));
        let named = json!({ "type": "ExternalName", "externalName": "example.org" });
        assert_eq!(a_service(&named).ignored, Some(Ignored::ExternalName));
        assert_eq!(a_service(&json!({ "clusterIP": "172.30.0.41" })).ignored, None);
        for (label, ignored) in [(PROXY_NAME_LABEL, Ignored::OtherProxy), (HEADLESS_LABEL, Ignored::Headless)]
        {
            // The label counts, whatever its value.
            let metadata = json!({ "name": "svc", "labels": { label: "" } });
            let object = json!({ "metadata": metadata, "spec": { "clusterIP": "172.30.0.41" } });
            assert_eq!(service(serde_json::from_value(object).unwrap()).ignored, Some(ignored));
            let labels = json!({ SERVICE_NAME_LABEL: "svc", label: "" });
            let slice = a_slice(&json!({ "metadata": { "name": "s", "labels": labels } }));
            assert_eq!(slice.service, None);
        }
        for address_type in ["FQDN", ""] {
            assert_eq!(a_slice(&json!({ "addressType": address_type })).service, None);
        }
    }

    #[test]
    fn a_slice_of_unknown_addresses_is_named_and_has_none() {
        let slice = a_slice(&json!({ "addressType": "IPv9", "endpoints": [{ "addresses": ["10.0.0.1"] }] }));
        assert_eq!((slice.service.unwrap().to_string(), slice.endpoints), ("ns/svc".into(), vec![]));
        let text = "EndpointSlice svc-1 addressType: unknown value \"IPv9\"; taken as FQDN";
        assert_eq!(texts(&slice.findings), [text]);
    }

    /// Rule 156.
    #[test]
    fn long_texts_are_shortened_where_they_are_quoted() {
        let long = "ü".repeat(200);
        let object = json!({
            "metadata": { "name": "svc", "annotations": { Service::ALGORITHM: long, "note": long } },
            "spec": {
                "clusterIP": "172.30.0.41", "type": long, "externalIPs": [long], "loadBalancerSourceRanges": [long],
                "ports": [{ "port": 80 }, { "port": 81, "protocol": long }],
            },
        });
        let service = service(serde_json::from_value(object).unwrap());
        assert_eq!((service.ports.len(), service.cluster_ips.len()), (1, 1));
        let quoted = format!("{}…", "ü".repeat(50));
        let texts = texts_of(&service);
        assert_eq!(texts.len(), 5, "{texts:?}");
        for text in texts {
            assert!(text.contains(&quoted) && text.len() < 250, "{text}");
        }
    }

    /// Rule 88.
    #[test]
    fn conditions_that_are_not_given_are_good() {
        let conditions = |conditions: Value| {
            let endpoints = json!([{ "addresses": ["10.0.0.1"], "conditions": conditions }]);
            let slice = a_slice(&json!({ "endpoints": endpoints }));
            let e = &slice.endpoints[0];
            (e.ready, e.serving, e.terminating)
        };
        assert_eq!(conditions(json!({})), (true, true, false));
        assert_eq!(conditions(Value::Null), (true, true, false));
        let draining = json!({ "ready": false, "serving": true, "terminating": true });
        assert_eq!(conditions(draining), (false, true, true));
        assert_eq!(conditions(json!({ "serving": false })), (true, false, false));
    }

    #[test]
    fn a_slice_is_taken_over() {
        let slice = a_slice(&json!({
            "ports": [
                { "name": "http", "port": 8080, "protocol": "TCP" }, { "port": 53, "protocol": "UDP" },
                { "name": "all" }, { "name": "s", "port": 1, "protocol": "SCTP" },
                { "name": "d", "port": 1, "protocol": "DCCP" }, { "name": "zero", "port": 0 },
            ],
            "endpoints": [{
                "addresses": ["10.0.0.1"], "nodeName": "node-a", "zone": "z9",
                "hints": { "forZones": [{ "name": "z1" }, { "name": "z2" }], "forNodes": [{ "name": "node-a" }] },
            }],
        }));
        let port = |name: &str, port, protocol| SlicePort { name: name.into(), port, protocol };
        let ports = [("http", 8080, Protocol::Tcp), ("", 53, Protocol::Udp), ("s", 1, Protocol::Sctp)];
        assert_eq!(slice.ports, ports.map(|(name, number, protocol)| port(name, number, protocol)));
        let expected = Endpoint {
            node: Some("node-a".into()),
            hints: Some(Box::new(Hints {
                zones: vec!["z1".into(), "z2".into()],
                nodes: vec!["node-a".into()],
            })),
            ..Endpoint::ready("10.0.0.1".parse().unwrap())
        };
        assert_eq!(slice.endpoints, [expected]);
        assert_eq!(slice.service.unwrap().to_string(), "ns/svc");
        assert_eq!(texts(&slice.findings).len(), 1);
    }

    fn a_pod(spec: &Value, status: &Value) -> Pod {
        let metadata = json!({
            "name": "pod", "namespace": "ns", "creationTimestamp": "2026-01-01T00:00:00Z",
            "deletionTimestamp": "2026-01-01T00:00:09Z",
        });
        pod(serde_json::from_value(json!({ "metadata": metadata, "spec": spec, "status": status })).unwrap())
    }

    fn container(ports: &Value) -> Value {
        json!({ "name": "c", "ports": ports })
    }

    fn host_port_of(name: &str, host_port: u16, host_ip: Option<&str>, container_port: u16) -> HostPort {
        let host_ip = host_ip.map(|addr| addr.parse().unwrap());
        HostPort { name: name.into(), host_port, host_ip, container_port, protocol: Protocol::Tcp }
    }

    /// Rules 64, 131 and 147.
    #[test]
    fn a_pod_is_taken_over() {
        let sidecar = json!({ "name": "s", "restartPolicy": "Always", "ports": [{ "containerPort": 2, "hostPort": 82 }] });
        let init = json!({ "name": "i", "ports": [{ "containerPort": 3, "hostPort": 83 }] });
        let ports = json!([
            { "name": "http", "containerPort": 1, "hostPort": 81, "hostIP": "192.168.000.2" },
            { "name": "quic", "containerPort": 1, "hostPort": 81, "protocol": "UDP", "hostIP": "::" },
            { "containerPort": 4 }, { "containerPort": 5, "hostPort": 0 },
        ]);
        let spec = json!({
            "nodeName": "node-a", "containers": [container(&ports)], "initContainers": [init, sidecar],
        });
        let status = json!({ "phase": "Running", "podIP": "10.0.0.1", "podIPs": [{ "ip": "10.0.0.1" }, { "ip": "fd00::1" }] });
        let expected = Pod {
            created: 1_767_225_600,
            node: Some("node-a".into()),
            addrs: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            ports: vec![
                host_port_of("http", 81, Some("192.168.0.2"), 1),
                HostPort { protocol: Protocol::Udp, ..host_port_of("quic", 81, Some("::"), 1) },
                host_port_of("", 82, None, 2),
            ],
            ..Pod::named(PodName { namespace: "ns".into(), name: "pod".into() })
        };
        assert_eq!(a_pod(&spec, &status), expected);
        let one = json!({ "phase": "Pending", "podIP": "10.0.0.1" });
        assert_eq!(a_pod(&spec, &one).addrs, expected.addrs[..1]);
    }

    #[test]
    fn pods_without_host_ports_of_ours() {
        let spec = json!({ "nodeName": "n", "containers": [container(&json!([{ "containerPort": 1, "hostPort": 81 }]))] });
        let running = json!({ "phase": "Running", "podIP": "10.0.0.1" });
        assert_eq!(a_pod(&spec, &running).ports.len(), 1);
        for phase in ["Succeeded", "Failed"] {
            assert_eq!(a_pod(&spec, &json!({ "phase": phase, "podIP": "10.0.0.1" })).ports, []);
        }
        assert_eq!(a_pod(&spec, &json!({ "phase": "Pending" })).ports, []);
        let mut host_network = spec;
        host_network["hostNetwork"] = true.into();
        assert_eq!(a_pod(&host_network, &running).ports, []);
    }

    #[test]
    fn what_is_wrong_with_a_host_port_is_named_and_the_rest_is_used() {
        let ports = json!([
            { "containerPort": 1, "hostPort": 65536 }, { "containerPort": 0, "hostPort": 81 },
            { "containerPort": 1, "hostPort": -1 }, { "containerPort": 1, "hostPort": 82, "hostIP": "localhost" },
            { "name": "x", "containerPort": 1, "hostPort": 83, "protocol": "ICMP" },
            { "containerPort": 1, "hostPort": 84 },
        ]);
        let pod = a_pod(&json!({ "containers": [container(&ports)] }), &json!({ "podIP": "10.0.0.1" }));
        assert_eq!(pod.ports, [host_port_of("", 84, None, 1)]);
        let expected = [
            "container c hostPort: 65536 is no port number; it is left out",
            "container c containerPort: 0 is no port number; it is left out",
            "container c hostPort: -1 is no port number; it is left out",
            "container c hostIP: \"localhost\" is not an IP address; it is left out",
            "port x: protocol ICMP is not supported; the port is left out",
        ];
        assert_eq!(texts(&pod.findings), expected);
    }

    #[test]
    fn a_node_is_taken_over() {
        let object = json!({
            "metadata": {
                "name": "node-a", "labels": { ZONE_LABEL: "z1" },
                "deletionTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": {
                "podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64", "pods"],
                "taints": [{ "key": TO_BE_DELETED_TAINT, "effect": "NoSchedule" }],
            },
            "status": { "addresses": [
                { "type": "Hostname", "address": "node-a" }, { "type": "ExternalIP", "address": "1.2.3.4" },
                { "type": "InternalIP", "address": "192.168.0.2" }, { "type": "InternalIP", "address": "fd00::2" },
            ] },
        });
        let node = node(serde_json::from_value(object).unwrap());
        let addresses: Vec<_> = node.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["192.168.0.2", "fd00::2", "1.2.3.4"]);
        let networks: Vec<_> = node.pod_cidrs.iter().map(ToString::to_string).collect();
        assert_eq!(networks, ["10.244.1.0/24", "fd00:10:244:1::/64"]);
        assert_eq!(node.zone.as_deref(), Some("z1"));
        assert!(node.deleting && node.to_be_deleted);
    }
}
