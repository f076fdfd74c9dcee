//! What is wrong with a Service: everything that the Kubernetes page "Debug Services" lists, and what the agent finds
//! itself.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::chain::{self, Port};
use super::claims::Claims;
use super::objects::{Objects, Pod, Service, Target, Written};
use super::{Finding, FrontendView, NodeFacts, Severity};
use crate::compile::{Judged, families};
use crate::entries::{Compiled, Family, FrontendKey, FrontendKind, Protocol};
use crate::finding;
use crate::model::{EndpointSlice, Ignored, Policy, ServiceType};
use crate::owner::Owner;

/// Pods, labels or ports that are named in one text.
const NAMED: usize = 3;

/// What is wrong with `service`, of which `compiled` is made.
pub(super) fn find(
    service: &Service,
    objects: &Objects,
    node: &NodeFacts,
    claims: &Claims,
    compiled: &(Compiled, Vec<finding::Finding>),
) -> Vec<Finding> {
    let slices = objects.slices_of(&service.model.name);
    let selected = chain::selected(service, objects);
    let mut case = Case { service, objects, node, slices, selected, found: vec![] };
    match service.model.ignored {
        Some(why) => case.ignored(why),
        None => case.all(),
    }
    let owner = service.model.name.clone().into();
    let mut found = case.found;
    found.extend(compiled.1.iter().map(|finding| of_agent(finding, service.written.as_ref())));
    found.extend(taken(&owner, claims, &compiled.0, &chain::ports(service)));
    found
}

/// What is wrong with the host ports of a Pod.
pub(super) fn of_maps(
    owner: &Owner,
    claims: &Claims,
    compiled: &(Compiled, Vec<finding::Finding>),
) -> Vec<Finding> {
    let mut found: Vec<_> = compiled.1.iter().map(|finding| of_agent(finding, None)).collect();
    found.extend(taken(owner, claims, &compiled.0, &[]));
    found
}

/// The address is somebody's, and the port nobody's.
pub(super) fn port_not_served(
    at: SocketAddr,
    protocol: Option<Protocol>,
    frontends: &[FrontendView],
) -> Finding {
    let ports = frontends.iter().filter(|frontend| frontend.address == Some(at.ip()));
    let ports = some_of(ports.map(|frontend| format!("{}/{}", frontend.port, frontend.protocol)));
    let asked = protocol.map(|protocol| format!("/{protocol}")).unwrap_or_default();
    finding(
        Severity::Error,
        "port-not-served",
        "spec.ports",
        format!("nobody has port {}{asked} of {}; its ports are {ports}", at.port(), at.ip()),
    )
}

/// It is the port of a NodePort, and the address none of those that NodePorts answer on.
pub(super) fn node_port_address(at: SocketAddr, key: &FrontendKey, node: &NodeFacts) -> Finding {
    let text = format!(
        "{} is an address of node {} that NodePorts do not answer on: {}/{} answers on {} (--nodeport-addresses)",
        at.ip(),
        node.name,
        key.port,
        key.protocol,
        node.node_ports.places()
    );
    of_node(Severity::Error, "node-port-address", text)
}

struct Case<'a> {
    service: &'a Service,
    objects: &'a Objects,
    node: &'a NodeFacts,
    slices: Vec<&'a EndpointSlice>,
    /// `None`: not known, or it has no selector.
    selected: Option<Vec<&'a Pod>>,
    found: Vec<Finding>,
}

impl Case<'_> {
    fn error(&mut self, code: &str, field: impl Into<String>, text: impl Into<String>) {
        self.found.push(finding(Severity::Error, code, field, text));
    }

    fn warn(&mut self, code: &str, field: impl Into<String>, text: impl Into<String>) {
        self.found.push(finding(Severity::Warning, code, field, text));
    }

    fn note(&mut self, code: &str, field: impl Into<String>, text: impl Into<String>) {
        self.found.push(finding(Severity::Note, code, field, text));
    }

    fn all(&mut self) {
        self.pods();
        for port in chain::ports(self.service) {
            self.target(&port);
            self.number(&port);
        }
        self.node_ports();
        self.endpoints();
        self.addresses();
        self.source_ranges();
    }

    fn ignored(&mut self, why: Ignored) {
        match why {
            Ignored::Headless => {
                let text = "headless: clients get the addresses of its Pods from DNS and go there themselves; \
                            nothing is translated, and targetPort is the port they have to use";
                self.note("headless", "spec.clusterIP", text);
                self.pods();
            }
            Ignored::ExternalName => {
                let text = "DNS answers with another name; nothing is translated";
                self.note("external-name", "spec.type", text);
            }
            Ignored::OtherProxy => {
                let text = "a label gives it to another proxy; nothing is translated here";
                self.note("other-proxy", "metadata.labels[service.kubernetes.io/service-proxy-name]", text);
            }
        }
    }

    /// The selector, and whether what it selects is ready.
    fn pods(&mut self) {
        let Some(written) = &self.service.written else { return };
        let Some(selected) = self.selected.clone() else { return };
        if selected.is_empty() {
            let hint = self.nearly(written);
            let text = format!("the selector {} matches no Pod{hint}", labels(&written.selector));
            return self.error("selector-matches-nothing", "spec.selector", text);
        }
        let waiting: Vec<_> = selected.iter().filter(|pod| !pod.ready).collect();
        if waiting.is_empty() || written.publish_not_ready {
            return;
        }
        let named = some_of(waiting.iter().map(|pod| format!("{} ({})", pod.name.name, pod.state)));
        let field = "Pod status.conditions[Ready]";
        if waiting.len() == selected.len() {
            self.error("pods-not-ready", field, format!("none of its Pods is ready: {named}"));
        } else {
            let text = format!(
                "{} of {} Pods are not ready and get nothing: {named}",
                waiting.len(),
                selected.len()
            );
            self.warn("pods-not-ready", field, text);
        }
    }

    /// What comes near to what is selected: the Pod that has most of it, or one of another namespace.
    fn nearly(&self, written: &Written) -> String {
        let selector = &written.selector;
        let wrong = |pod: &Pod| -> Vec<String> {
            let missing = selector.iter().filter(|(key, value)| pod.labels.get(*key) != Some(value));
            missing
                .map(|(key, _)| match pod.labels.get(key) {
                    Some(has) => format!("{key}={has}"),
                    None => format!("no {key}"),
                })
                .collect()
        };
        let everywhere = self.objects.pods.iter().flat_map(|pods| pods.values());
        let own = |pod: &&Pod| pod.name.namespace == self.service.model.name.namespace;
        if everywhere.clone().filter(own).any(|pod| pod.is_selected(selector)) {
            return "; those that match have ended, or are being deleted".into();
        }
        if let Some(pod) = everywhere.filter(|pod| !pod.over).find(|pod| pod.is_selected(selector)) {
            return format!("; Pod {} does, but a Service selects in its own namespace only", pod.name);
        }
        let own = self.objects.pods_in(&self.service.model.name.namespace);
        let nearest = own.filter(|pod| selector.keys().any(|key| pod.labels.contains_key(key)));
        nearest.min_by_key(|pod| wrong(pod).len()).map_or_else(String::new, |pod| {
            format!("; Pod {} comes near, with {}", pod.name, wrong(pod).join(","))
        })
    }

    /// Whether the Pods have what a port leads to.
    fn target(&mut self, port: &Port<'_>) {
        let Some(target) = &port.target else { return };
        let field = format!("spec.ports[{}].targetPort", port.index);
        if let Target::Name(name) = target
            && name.parse::<u16>().is_ok()
        {
            let text = format!(
                "{name:?} is a text, and means a port of that name; write the number {name} without quotes"
            );
            return self.error("target-port-is-text", field, text);
        }
        let Some(pods) = self.selected.clone().filter(|pods| !pods.is_empty()) else { return };
        let has = |pod: &Pod| pod.ports.iter().any(|own| own.is(target));
        let fits = |pod: &Pod| pod.ports.iter().any(|own| own.is(target) && own.protocol == port.protocol);
        let missing: Vec<&&Pod> = pods.iter().filter(|pod| !fits(pod)).collect();
        if missing.is_empty() {
            return self.slices_follow(port, target, &pods);
        }
        let declared = pods.iter().flat_map(|pod| &pod.ports);
        let declared: BTreeSet<String> = declared
            .map(|own| {
                let name = if own.name.is_empty() { String::new() } else { format!(" ({})", own.name) };
                format!("{}/{}{name}", own.number, own.protocol)
            })
            .collect();
        let nothing = declared.is_empty();
        let declared = some_of(declared.into_iter());
        if missing.iter().any(|pod| has(pod)) {
            let text = format!(
                "targetPort {target} is declared by the Pods, but not for {}: they have {declared}",
                port.protocol
            );
            let field = format!("spec.ports[{}].protocol", port.index);
            return self.error("wrong-protocol", field, text);
        }
        match target {
            Target::Name(name) if missing.len() == pods.len() => {
                let text =
                    format!("no container of its Pods has a port named {name:?}; they have {declared}");
                self.error("named-port-missing", field, text);
            }
            Target::Name(name) => {
                let named = some_of(missing.iter().map(|pod| pod.name.name.to_string()));
                let text = format!("these Pods have no port named {name:?} and get nothing: {named}");
                self.warn("named-port-missing", field, text);
            }
            Target::Number(number) if nothing => {
                let text = format!("no container declares any port; see that one listens on {number}");
                self.note("target-port-undeclared", field, text);
            }
            Target::Number(number) if missing.len() == pods.len() => {
                let text = format!(
                    "no container declares {number}/{}, they have {declared}; if none listens there, clients are \
                     refused by the Pod",
                    port.protocol
                );
                self.warn("target-port-undeclared", field, text);
            }
            Target::Number(number) => {
                let named = some_of(missing.iter().map(|pod| pod.name.name.to_string()));
                let text = format!("these Pods do not declare {number}/{}: {named}", port.protocol);
                self.warn("target-port-undeclared", field, text);
            }
        }
    }

    /// Whether EndpointSlices have the numbers that the Pods have.
    fn slices_follow(&mut self, port: &Port<'_>, target: &Target, pods: &[&Pod]) {
        let own = pods.iter().flat_map(|pod| &pod.ports).filter(|own| own.is(target));
        let expected: BTreeSet<i32> = own.map(|own| own.number).collect();
        let numbers = self.slices.iter().flat_map(|slice| {
            let of_port = slice.ports.iter().filter(|other| other.name == port.name);
            of_port.map(|other| (slice.name.name.to_string(), other.port))
        });
        let wrong: Vec<_> = numbers.filter(|(_, number)| !expected.contains(&i32::from(*number))).collect();
        for (slice, number) in wrong {
            let text = format!(
                "EndpointSlice {slice} sends to {number}, and targetPort is {target}: the slice is older than the \
                 Service, or somebody else writes it"
            );
            let field = format!("spec.ports[{}].targetPort", port.index);
            self.warn("slice-port-differs", field, text);
        }
    }

    fn number(&mut self, port: &Port<'_>) {
        let range = &self.node.node_ports.range;
        if let Some(number) = port.from_node.filter(|number| !range.contains(*number)) {
            let text = format!(
                "nodePort {number} is not in {range}: API servers refuse it, unless their --service-node-port-range \
                 says otherwise, and processes of the node may want it"
            );
            self.warn("node-port-range", format!("spec.ports[{}].nodePort", port.index), text);
        }
    }

    /// On which addresses its NodePorts answer, if not on all.
    fn node_ports(&mut self) {
        let settled = &self.node.node_ports;
        let has_any = self.service.model.ports.iter().any(|port| port.node_port.is_some());
        let Some(addresses) = settled.addresses.as_ref().filter(|_| has_any) else { return };
        let (severity, others) = if addresses.is_empty() {
            (Severity::Warning, "")
        } else {
            (Severity::Note, ", and on no other of its addresses")
        };
        let (places, node) = (settled.places(), &self.node.name);
        let text = format!("NodePorts answer on {places} of node {node}{others} (--nodeport-addresses)");
        self.found.push(of_node(severity, "node-port-addresses", text));
    }

    /// Whether the slices have what the policies may choose from.
    fn endpoints(&mut self) {
        // What is said of Pods already says why.
        let said = self.found.iter().any(|finding| finding.severity == Severity::Error);
        let ports = chain::ports(self.service);
        let by_port: Vec<(&Port<'_>, Vec<Judged<'_>>)> = ports
            .iter()
            .filter(|port| port.served.is_some())
            .map(|port| (port, chain::judged(port, self.service, self.objects, self.node)))
            .collect();
        let any = self.slices.iter().any(|slice| !slice.endpoints.is_empty());
        if !said && !any && !by_port.is_empty() {
            self.no_endpoints();
        }
        for (port, judged) in &by_port {
            let used: Vec<_> = judged.iter().filter(|judged| judged.cluster.takes()).collect();
            if !used.is_empty() {
                self.policies(port, judged);
                self.families(judged);
            } else if !said && any && judged.is_empty() {
                let text = format!(
                    "no EndpointSlice has a port named {:?} for {}, though they have endpoints",
                    port.name, port.protocol
                );
                self.error("port-not-in-slices", format!("spec.ports[{}].name", port.index), text);
            } else if !said && !judged.is_empty() {
                let text = format!("none of {} endpoints of port {} is ready", judged.len(), port.number);
                self.error("endpoints-not-ready", "EndpointSlice endpoints[].conditions.ready", text);
            }
        }
    }

    fn no_endpoints(&mut self) {
        let name = &self.service.model.name.name;
        let slice =
            format!("no EndpointSlice with the label kubernetes.io/service-name: {name} has endpoints");
        match (&self.service.written, &self.selected) {
            (Some(written), _) if written.selector.is_empty() => {
                let text = format!("it has no selector, and {slice}");
                self.error("no-endpoints", "spec.selector", text);
            }
            (_, Some(pods)) => {
                let text = format!(
                    "{} Pods are selected, and {slice}: is the controller \
                     manager running?",
                    pods.len()
                );
                self.error("no-endpoints", "EndpointSlice metadata.labels", text);
            }
            _ => {
                self.error("no-endpoints", "EndpointSlice metadata.labels", slice);
            }
        }
    }

    /// Policy Local, and nothing here.
    fn policies(&mut self, port: &Port<'_>, judged: &[Judged<'_>]) {
        if !self.node.known || judged.iter().any(|judged| judged.local.takes()) {
            return;
        }
        let elsewhere = judged.iter().filter(|judged| judged.cluster.takes());
        let nodes: BTreeSet<String> =
            elsewhere.filter_map(|judged| judged.endpoint.node.as_deref()).map(str::to_owned).collect();
        let at = if nodes.is_empty() { "no node in particular".into() } else { some_of(nodes.into_iter()) };
        let model = &self.service.model;
        let (number, node) = (port.number, &self.node.name);
        let is_outside = model.kind != ServiceType::ClusterIP || !model.external_ips.is_empty();
        let (internal, external) = (model.internal_policy, model.external_policy);
        if internal == Policy::Local {
            let text = format!(
                "the policy is Local, and no endpoint of port {number} is on node {node}: its pods and processes get \
                 no answer at the ClusterIP; endpoints are on {at}"
            );
            self.error("no-local-endpoint", "spec.internalTrafficPolicy", text);
        }
        if external == Policy::Local && is_outside {
            let text = format!(
                "the policy is Local, and no endpoint of port {number} is on node {node}: clients outside of the \
                 cluster that come to it get no answer; endpoints are on {at}"
            );
            self.error("no-local-endpoint", "spec.externalTrafficPolicy", text);
        }
    }

    /// A family without endpoints, where another has some.
    fn families(&mut self, judged: &[Judged<'_>]) {
        for family in families(&self.service.model, &self.slices) {
            if !judged.iter().any(|judged| Family::of(judged.backend.addr.ip()) == family) {
                let text = format!("no endpoint has an address of {}", super::family_name(family));
                let known = self.found.iter().any(|finding| finding.text == text);
                if !known {
                    self.warn("family-without-endpoints", "spec.ipFamilies", text);
                }
            }
        }
    }

    fn addresses(&mut self) {
        let model = &self.service.model;
        for (i, addr) in model.external_ips.iter().enumerate() {
            if self.node.addresses.is_empty() || self.node.has(*addr) {
                continue;
            }
            let text = format!(
                "{addr} is no address of node {}: its packets come here only if somebody routes them here",
                self.node.name
            );
            self.found.push(finding(
                Severity::Note,
                "external-ip-not-here",
                format!("spec.externalIPs[{i}]"),
                text,
            ));
        }
        let Some(written) = &self.service.written else { return };
        if model.kind != ServiceType::LoadBalancer {
            return;
        }
        if written.ingress.is_empty() {
            let text = "no load balancer has given it an address yet; its NodePorts answer meanwhile";
            self.warn("load-balancer-pending", "status.loadBalancer.ingress", text);
        }
        for (i, (at, _)) in written.ingress.iter().enumerate().filter(|(_, (_, mode))| mode == "Proxy") {
            let text = format!(
                "with ipMode Proxy the nodes do not serve {at}: also clients inside go to the load balancer, which \
                 comes back through a NodePort"
            );
            self.note("ip-mode-proxy", format!("status.loadBalancer.ingress[{i}].ipMode"), text);
        }
    }

    fn source_ranges(&mut self) {
        let Some(written) = &self.service.written else { return };
        let field = "spec.loadBalancerSourceRanges";
        let ranges = some_of(written.source_ranges.iter().cloned());
        match self.service.model.kind {
            _ if written.source_ranges.is_empty() => {}
            ServiceType::LoadBalancer => {
                let text = format!(
                    "only clients in {ranges} get an answer at the load-balancer IPs, pods included; NodePorts and \
                     the ClusterIP are open to everybody"
                );
                self.note("source-ranges", field, text);
            }
            _ => {
                let text = format!("{ranges}: only type LoadBalancer has source ranges; everybody may ask");
                self.warn("source-ranges-unused", field, text);
            }
        }
    }
}

/// Frontends that somebody else has.
fn taken(owner: &Owner, claims: &Claims, compiled: &Compiled, ports: &[Port<'_>]) -> Vec<Finding> {
    let lost = compiled.frontends.iter().filter_map(|(key, frontend)| {
        let winner = claims.winner(key).filter(|winner| *winner != owner)?;
        let text = finding::Finding::Taken { key: *key, owner: winner.clone() }.to_string();
        Some(finding(
            Severity::Error,
            "taken",
            field_of_frontend(key, frontend.kind, ports),
            format!("{text}: of those that want it the oldest has it, then the first by name"),
        ))
    });
    lost.collect()
}

fn field_of_frontend(key: &FrontendKey, kind: FrontendKind, ports: &[Port<'_>]) -> String {
    match kind {
        FrontendKind::ClusterIP => "spec.clusterIPs".into(),
        FrontendKind::LoadBalancer => "status.loadBalancer.ingress".into(),
        FrontendKind::ExternalIP => "spec.externalIPs".into(),
        FrontendKind::HostPort => "Pod spec.containers[].ports[].hostPort".into(),
        FrontendKind::NodePort => {
            let own = |port: &&Port<'_>| port.from_node == Some(i32::from(key.port));
            let index = ports.iter().find(own).map_or(0, |port| port.index);
            format!("spec.ports[{index}].nodePort")
        }
    }
}

/// What the agent says of it, too.
fn of_agent(found: &finding::Finding, written: Option<&Written>) -> Finding {
    use finding::Finding as Agents;

    let of_port = |label: &str, field: &str| {
        let ports = written.into_iter().flat_map(|written| &written.ports);
        let labels = ports.map(|port| port.name.clone().unwrap_or_else(|| port.port.to_string()));
        let index = labels.enumerate().find(|(_, own)| own == label).map(|(index, _)| index);
        index.map(|index| format!("spec.ports[{index}].{field}"))
    };
    let (severity, field) = match found {
        Agents::BadAddress { field, .. }
        | Agents::BadNetwork { field, .. }
        | Agents::UnusableAddress { field, .. }
        | Agents::BadPort { field, .. } => (Severity::Error, Some(field.clone())),
        Agents::UnknownValue { field, .. } | Agents::BadTimeout { field, .. } => {
            (Severity::Warning, Some(field.clone()))
        }
        Agents::UnsupportedProtocol { port, .. } => (Severity::Error, of_port(port, "protocol")),
        Agents::NoNodePort { port } => (Severity::Error, of_port(port, "nodePort")),
        Agents::NoClusterIp => (Severity::Error, Some("spec.clusterIP".into())),
        Agents::NoPodAddress { .. } => (Severity::Error, Some("Pod spec.containers[].ports[].hostIP".into())),
        Agents::Duplicate { .. } => (Severity::Warning, Some("spec.ports".into())),
        _ => (Severity::Warning, None),
    };
    Finding { severity, code: slug(&found.kind()), field, text: found.to_string() }
}

/// `BadAddress` -> `bad-address`.
fn slug(kind: &str) -> String {
    let mut slug = String::new();
    for c in kind.chars() {
        if c.is_uppercase() && !slug.is_empty() {
            slug.push('-');
        }
        slug.extend(c.to_lowercase());
    }
    slug
}

fn finding(severity: Severity, code: &str, field: impl Into<String>, text: impl Into<String>) -> Finding {
    Finding { severity, code: code.to_owned(), field: Some(field.into()), text: text.into() }
}

/// Of a setting of the node: no field has to change.
fn of_node(severity: Severity, code: &str, text: String) -> Finding {
    Finding { severity, code: code.to_owned(), field: None, text }
}

fn labels(selector: &std::collections::BTreeMap<String, String>) -> String {
    selector.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

/// The first few; of more the number is given.
fn some_of(items: impl Iterator<Item = String>) -> String {
    let all: Vec<String> = items.collect();
    match all.len() {
        0 => "none".into(),
        count if count > NAMED => format!("{} and {} more", all[..NAMED].join(", "), count - NAMED),
        _ => all.join(", "),
    }
}
