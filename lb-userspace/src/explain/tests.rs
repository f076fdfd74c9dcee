//! A Service that is well, and every mistake of the Kubernetes page "Debug Services" made in it.

use super::*;
use crate::source::manifests::documents;

const WELL: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, creationTimestamp: '2026-01-01T00:00:00Z'}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  selector: {app: web, tier: front}
  ports:
  - {name: http, port: 80, targetPort: http, nodePort: 30080, protocol: TCP}
status: {loadBalancer: {ingress: [{ip: 192.0.2.50, ipMode: VIP}]}}
---
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {name: web-1, namespace: shop, labels: {app: web, tier: front}}
  spec: {nodeName: node-a, containers: [{name: nginx, ports: [{name: http, containerPort: 8080}]}]}
  status: {podIP: 10.1.0.1, podIPs: [{ip: 10.1.0.1}], conditions: [{type: Ready, status: 'True'}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: web-2, namespace: shop, labels: {app: web, tier: front}}
  spec: {nodeName: node-b, containers: [{name: nginx, ports: [{name: http, containerPort: 8080}]}]}
  status: {podIP: 10.1.1.2, podIPs: [{ip: 10.1.1.2}], conditions: [{type: Ready, status: 'True'}]}
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  addressType: IPv4
  metadata: {name: web-x, namespace: shop, labels: {kubernetes.io/service-name: web}}
  ports: [{name: http, port: 8080, protocol: TCP}]
  endpoints:
  - {addresses: [10.1.0.1], nodeName: node-a, conditions: {ready: true}}
  - {addresses: [10.1.1.2], nodeName: node-b, conditions: {ready: true}}
- apiVersion: v1
  kind: Node
  metadata: {name: node-a}
  status: {addresses: [{type: InternalIP, address: 192.0.2.2}]}
- apiVersion: v1
  kind: Node
  metadata: {name: node-b}
  status: {addresses: [{type: InternalIP, address: 192.0.2.3}]}
";

fn objects(text: &str) -> Objects {
    let mut objects = Objects::default();
    for document in documents(text.as_bytes()).unwrap() {
        objects.add(document.unwrap()).unwrap();
    }
    objects
}

fn explained_on(node: &str, subject: &str, text: &str) -> Result<Explanation, Error> {
    let objects = objects(text);
    let node = NodeFacts::of(objects.nodes.iter().find(|known| known.name == node).unwrap());
    explain(&subject.parse().unwrap(), "shop", &objects, &node)
}

fn explained(text: &str) -> Explanation {
    explained_on("node-a", "svc/web", text).unwrap()
}

/// [`WELL`] with one thing changed.
fn with(old: &str, new: &str) -> String {
    assert!(WELL.contains(old), "{old}");
    WELL.replace(old, new)
}

/// Severity, code and field of every finding.
fn found(explanation: &Explanation) -> Vec<String> {
    let findings = explanation.findings.iter();
    let line = |f: &Finding| format!("{} {} {}", f.severity, f.code, f.field.as_deref().unwrap_or("-"));
    findings.map(line).collect()
}

fn only_text(text: &str, expected: &str) -> String {
    let explanation = explained(text);
    assert_eq!(found(&explanation), [expected], "{:#?}", explanation.findings);
    explanation.findings[0].text.clone()
}

fn steps(explanation: &Explanation) -> Vec<String> {
    let ports = explanation.service.iter().flat_map(|service| &service.ports);
    let steps = ports.flat_map(|port| &port.steps);
    steps
        .map(|step| {
            let fits = step.fits.map_or("?", |fits| if fits { "fits" } else { "does not" });
            format!("{} {} {fits}", step.step, step.value)
        })
        .collect()
}

fn outcomes(explanation: &Explanation) -> Vec<String> {
    let clients = explanation.clients.iter();
    clients
        .map(|client| format!("{} {} {}", client.kind, client.inside.outcome, client.outside.outcome))
        .collect()
}

#[test]
fn nothing_is_found_where_nothing_is_wrong() {
    let explanation = explained(WELL);
    assert_eq!(found(&explanation), [""; 0]);
    assert_eq!(
        steps(&explanation),
        [
            "nodePort 30080 fits",
            "port 80/TCP fits",
            "targetPort http fits",
            "containerPort 8080/TCP (http) fits"
        ]
    );
    let kinds = ["NodePort served served", "ClusterIP served served", "LoadBalancer served served"];
    assert_eq!(outcomes(&explanation), kinds);
    let service = explanation.service.unwrap();
    assert_eq!((service.pods, service.pods_ready), (Some(2), Some(2)));
    let endpoints = &service.ports[0].endpoints;
    assert_eq!(endpoints.iter().map(|endpoint| endpoint.outside.used).collect::<Vec<_>>(), [true, true]);
    assert_eq!(endpoints[0].pod.as_deref(), Some("shop/web-1"));
}

#[test]
fn no_such_service() {
    let error = |subject| explained_on("node-a", subject, WELL).unwrap_err().to_string();
    assert_eq!(error("svc/wep"), "there is no Service shop/wep");
    let elsewhere = with("name: web, namespace: shop, creat", "name: web, namespace: other, creat");
    let error = explained_on("node-a", "svc/web", &elsewhere).unwrap_err().to_string();
    assert_eq!(error, "there is no Service shop/web; one of that name is in namespace other (-n)");
}

#[test]
fn a_selector_that_matches_nothing() {
    let text = with("selector: {app: web, tier: front}", "selector: {app: web, tier: frnt}");
    let said = only_text(&text, "error selector-matches-nothing spec.selector");
    let expected =
        "the selector app=web,tier=frnt matches no Pod; Pod shop/web-1 comes near, with tier=front";
    assert_eq!(said, expected);
    let text = with("namespace: shop, labels: {app", "namespace: other, labels: {app");
    let said = only_text(&text, "error selector-matches-nothing spec.selector");
    assert!(said.contains("Pod other/web-1 does, but"), "{said}");
    let text = with("  status: {podIP: 10.1", "  status: {phase: Succeeded, podIP: 10.1");
    let said = only_text(&text, "error selector-matches-nothing spec.selector");
    assert!(said.ends_with("those that match have ended, or are being deleted"), "{said}");
}

#[test]
fn no_selector_and_nobody_who_writes_endpoints() {
    let text =
        with("  selector: {app: web, tier: front}\n", "").replace("service-name: web", "service-name: wep");
    let said = only_text(&text, "error no-endpoints spec.selector");
    assert!(said.contains("kubernetes.io/service-name: web"), "{said}");
    let text = with("service-name: web", "service-name: wep");
    only_text(&text, "error no-endpoints EndpointSlice metadata.labels");
}

#[test]
fn pods_that_are_not_ready() {
    let waiting = "containerStatuses: [{name: nginx, ready: false, restartCount: 9, image: x, imageID: x, \
                   state: {waiting: {reason: CrashLoopBackOff}}}], conditions: [{type: Ready, status: 'False'}]";
    let text = with("conditions: [{type: Ready, status: 'True'}]", waiting)
        .replace("conditions: {ready: true}", "conditions: {ready: false}");
    let said = only_text(&text, "error pods-not-ready Pod status.conditions[Ready]");
    assert!(said.contains("web-1 (container nginx waits: CrashLoopBackOff)"), "{said}");
    let explanation = explained(&text);
    let refused =
        ["NodePort rejected rejected", "ClusterIP rejected rejected", "LoadBalancer rejected rejected"];
    assert_eq!(outcomes(&explanation), refused);
    assert_eq!(explanation.service.unwrap().ports[0].endpoints[0].inside.why, "not ready");
    // One of two.
    let text = WELL.replacen("status: 'True'", "status: 'False'", 1);
    let said = only_text(&text, "warning pods-not-ready Pod status.conditions[Ready]");
    assert!(said.starts_with("1 of 2 Pods"), "{said}");
}

#[test]
fn endpoints_that_are_not_ready_though_pods_are() {
    let text = with("conditions: {ready: true}", "conditions: {ready: false}");
    only_text(&text, "error endpoints-not-ready EndpointSlice endpoints[].conditions.ready");
}

#[test]
fn a_target_port_that_nothing_declares() {
    let text = with("targetPort: http", "targetPort: 9376");
    let text = text.replace("port: 8080, protocol", "port: 9376, protocol");
    let said = only_text(&text, "warning target-port-undeclared spec.ports[0].targetPort");
    assert!(said.contains("9376/TCP") && said.contains("8080/TCP (http)"), "{said}");
    assert!(steps(&explained(&text)).contains(&"targetPort 9376 does not".to_owned()));
    let text = text.replace(", ports: [{name: http, containerPort: 8080}]", "");
    only_text(&text, "note target-port-undeclared spec.ports[0].targetPort");
    // Without it, it is the port.
    let text = with("targetPort: http, ", "").replace("port: 8080, protocol", "port: 80, protocol");
    only_text(&text, "warning target-port-undeclared spec.ports[0].targetPort");
}

#[test]
fn a_named_port_that_is_missing() {
    let text = with("name: http, containerPort", "name: web, containerPort");
    let said = only_text(&text, "error named-port-missing spec.ports[0].targetPort");
    assert!(said.contains("\"http\"") && said.contains("8080/TCP (web)"), "{said}");
    let text = WELL.replacen("name: http, containerPort", "name: web, containerPort", 1);
    let said = only_text(&text, "warning named-port-missing spec.ports[0].targetPort");
    assert!(said.ends_with("web-1"), "{said}");
}

#[test]
fn a_number_that_is_a_text() {
    let text = with("targetPort: http", "targetPort: '8080'");
    only_text(&text, "error target-port-is-text spec.ports[0].targetPort");
}

#[test]
fn a_wrong_protocol() {
    let text = with("nodePort: 30080, protocol: TCP", "nodePort: 30080, protocol: UDP")
        .replace("port: 8080, protocol: TCP", "port: 8080, protocol: UDP");
    only_text(&text, "error wrong-protocol spec.ports[0].protocol");
    let text = with("nodePort: 30080, protocol: TCP", "nodePort: 30080, protocol: QUIC");
    let explanation = explained(&text);
    assert!(
        found(&explanation).contains(&"error unsupported-protocol spec.ports[0].protocol".to_owned()),
        "{:?}",
        found(&explanation)
    );
    assert!(steps(&explanation).contains(&"port 80/QUIC does not".to_owned()));
}

#[test]
fn slices_that_do_not_follow() {
    let text = with("port: 8080, protocol", "port: 8081, protocol");
    let said = only_text(&text, "warning slice-port-differs spec.ports[0].targetPort");
    assert!(said.starts_with("EndpointSlice web-x sends to 8081"), "{said}");
    let text = with("ports: [{name: http, port: 8080", "ports: [{name: web, port: 8080");
    only_text(&text, "error port-not-in-slices spec.ports[0].name");
}

#[test]
fn policy_local_without_local_endpoints() {
    let local = |field: &str| {
        let text = with("type: LoadBalancer", &format!("type: LoadBalancer\n  {field}: Local"));
        text.replace("nodeName: node-a", "nodeName: node-c")
    };
    let text = local("externalTrafficPolicy");
    let said = only_text(&text, "error no-local-endpoint spec.externalTrafficPolicy");
    assert!(said.contains("node-b") && said.contains("node node-a"), "{said}");
    let explanation = explained(&text);
    let kinds = ["NodePort served dropped", "ClusterIP served served", "LoadBalancer served dropped"];
    assert_eq!(outcomes(&explanation), kinds);
    let endpoint = &explanation.service.unwrap().ports[0].endpoints[0];
    assert_eq!((endpoint.inside.used, endpoint.outside.used), (true, false));
    let text = local("internalTrafficPolicy");
    only_text(&text, "error no-local-endpoint spec.internalTrafficPolicy");
    assert_eq!(outcomes(&explained(&text))[1], "ClusterIP dropped dropped");
    // There, nothing is wrong with it, and nothing is said of a node that nobody knows.
    let well = with("type: LoadBalancer", "type: LoadBalancer\n  externalTrafficPolicy: Local");
    assert_eq!(found(&explained(&well)), [""; 0]);
    let unknown = NodeFacts::unknown("?");
    let explanation = explain(&"svc/web".parse().unwrap(), "shop", &objects(&well), &unknown).unwrap();
    assert_eq!((found(&explanation).len(), explanation.notes.len()), (0, 1));
}

#[test]
fn node_ports_outside_of_the_range_or_missing() {
    let said = only_text(
        &with("nodePort: 30080", "nodePort: 8080"),
        "warning node-port-range spec.ports[0].nodePort",
    );
    assert!(said.contains("30000-32767"), "{said}");
    let text = with("nodePort: 30080, ", "").replace("type: LoadBalancer", "type: NodePort");
    only_text(&text, "error no-node-port spec.ports[0].nodePort");
    assert_eq!(steps(&explained(&text))[0], "nodePort - does not");
}

#[test]
fn another_range_of_node_ports() {
    let text = with("nodePort: 30080", "nodePort: 8080");
    let objects = objects(&text);
    let mut node = NodeFacts::of(&objects.nodes[0]);
    node.node_ports.range = "8000-9000".parse().unwrap();
    let found_on =
        |node: &NodeFacts| found(&explain(&"svc/web".parse().unwrap(), "shop", &objects, node).unwrap());
    assert_eq!(found_on(&node), [""; 0]);
    node.node_ports.range = "20000-30000".parse().unwrap();
    assert_eq!(found_on(&node), ["warning node-port-range spec.ports[0].nodePort"]);
}

#[test]
fn addresses_that_node_ports_do_not_answer_on() {
    // Its host port answers everywhere.
    let text = WELL.replacen("containerPort: 8080}", "containerPort: 8080, hostPort: 8088}", 1);
    let objects = objects(&text.replace(
        "addresses: [{type: InternalIP, address: 192.0.2.2}]",
        "addresses: [{type: InternalIP, address: 192.0.2.2}, {type: ExternalIP, address: 198.51.100.2}]",
    ));
    let mut node = NodeFacts::of(&objects.nodes[0]);
    node.node_ports.addresses = Some(["192.0.2.2".parse().unwrap()].into());
    let explained = |subject: &str| explain(&subject.parse().unwrap(), "shop", &objects, &node).unwrap();
    for subject in ["svc/web", "192.0.2.2:30080"] {
        let explanation = explained(subject);
        assert_eq!(found(&explanation), ["note node-port-addresses -"], "{subject}");
        let expected = "NodePorts answer on 192.0.2.2 of node node-a, and on no other of its addresses (--nodeport-addresses)";
        assert_eq!(explanation.findings[0].text, expected);
    }
    for subject in ["198.51.100.2:30080", "127.0.0.1:30080/TCP"] {
        let explanation = explained(subject);
        let expected = ["error node-port-address -", "note node-port-addresses -"];
        assert_eq!(found(&explanation), expected, "{subject}");
        assert!(explanation.claimants.is_empty() && explanation.service.is_some(), "{subject}");
    }
    assert_eq!(
        explained("198.51.100.2:30080").findings[0].text,
        "198.51.100.2 is an address of node node-a that NodePorts do not answer on: 30080/TCP answers on 192.0.2.2 \
         (--nodeport-addresses)"
    );
    assert_eq!(explained("198.51.100.2:8088").claimants[0].name, "web-1");
    let nobody = explain(&"198.51.100.2:30080/UDP".parse().unwrap(), "shop", &objects, &node).unwrap_err();
    assert!(nobody.to_string().contains("is an address of node node-a"), "{nobody}");
}

#[test]
fn source_ranges() {
    let ranged = "type: LoadBalancer\n  loadBalancerSourceRanges: [198.51.100.0/24]";
    let text = with("type: LoadBalancer", ranged);
    only_text(&text, "note source-ranges spec.loadBalancerSourceRanges");
    let ranges = explained(&text).clients.into_iter().map(|client| client.source_ranges).collect::<Vec<_>>();
    assert_eq!(ranges, [None, None, Some(vec!["198.51.100.0/24".to_owned()])]);
    let text = text.replace("type: LoadBalancer", "type: NodePort");
    only_text(&text, "warning source-ranges-unused spec.loadBalancerSourceRanges");
}

#[test]
fn load_balancer_addresses() {
    let text = with("ipMode: VIP", "ipMode: Proxy");
    only_text(&text, "note ip-mode-proxy status.loadBalancer.ingress[0].ipMode");
    let text = with("[{ip: 192.0.2.50, ipMode: VIP}]", "[]");
    only_text(&text, "warning load-balancer-pending status.loadBalancer.ingress");
}

#[test]
fn external_ips_of_others() {
    let external =
        |addr| with("clusterIP: 10.96.0.10", &format!("clusterIP: 10.96.0.10\n  externalIPs: [{addr}]"));
    only_text(&external("203.0.113.9"), "note external-ip-not-here spec.externalIPs[0]");
    assert_eq!(found(&explained(&external("192.0.2.2"))), [""; 0]);
}

#[test]
fn services_that_nobody_translates() {
    let text =
        with("type: LoadBalancer", "type: ClusterIP").replace("clusterIP: 10.96.0.10", "clusterIP: None");
    only_text(&text, "note headless spec.clusterIP");
    let text = with("type: LoadBalancer", "type: ExternalName");
    only_text(&text, "note external-name spec.type");
}

const RIVAL: &str = "---
apiVersion: v1
kind: Service
metadata: {name: old, namespace: shop, creationTimestamp: '2025-01-01T00:00:00Z'}
spec:
  type: NodePort
  clusterIP: 10.96.0.11
  ports: [{port: 81, nodePort: 30080}]
";

#[test]
fn another_owner_of_a_port() {
    let text = format!("{WELL}{RIVAL}");
    let said = only_text(&text, "error taken spec.ports[0].nodePort");
    assert!(said.contains("belongs to Service shop/old"), "{said}");
    assert_eq!(outcomes(&explained(&text))[0], "NodePort other other");
    let explanation = explained_on("node-a", "192.0.2.2:30080", &text).unwrap();
    let claimants: Vec<_> =
        explanation.claimants.iter().map(|claimant| (claimant.name.as_str(), claimant.wins)).collect();
    assert_eq!(claimants, [("old", true), ("web", false)]);
    assert_eq!(explanation.claimants[0].why, "it is the oldest of those that want it");
    assert_eq!(explanation.claimants[1].why, "an older one has it");
    assert_eq!(explanation.service.unwrap().name, "old");
}

#[test]
fn a_host_port_beside() {
    let host_port = WELL.replacen("containerPort: 8080}", "containerPort: 8080, hostPort: 8088}", 1);
    let explanation = explained(&host_port);
    assert_eq!(found(&explanation), [""; 0]);
    assert!(steps(&explanation).contains(&"hostPort 8088/TCP fits".to_owned()), "{:?}", steps(&explanation));
    let explanation = explained_on("node-a", "192.0.2.2:8088", &host_port).unwrap();
    assert_eq!(explanation.claimants[0].name, "web-1");
    assert_eq!(outcomes(&explanation), ["HostPort served served"]);
    assert!(explanation.service.is_none());
    // It is that of a Pod elsewhere.
    assert!(explained_on("node-b", "192.0.2.3:8088", &host_port).is_err());
}

#[test]
fn whose_address_and_port_it_is() {
    for at in ["10.96.0.10:80", "192.0.2.50:80/tcp", "192.0.2.2:30080", "127.0.0.1:30080/TCP"] {
        let explanation = explained_on("node-a", at, WELL).unwrap();
        assert_eq!(explanation.claimants.len(), 1, "{at}");
        assert_eq!(explanation.service.as_ref().map(|service| service.name.as_str()), Some("web"), "{at}");
        assert_eq!(found(&explanation), [""; 0], "{at}");
    }
    for at in ["10.96.0.10:8080", "10.96.0.10:80/UDP"] {
        let explanation = explained_on("node-a", at, WELL).unwrap();
        assert_eq!(found(&explanation), ["error port-not-served spec.ports"], "{at}");
        assert!(explanation.findings[0].text.ends_with("its ports are 80/TCP"), "{:?}", explanation.findings);
    }
    // Addresses that no frontend has.
    let error = |at, text: &str| explained_on("node-a", at, text).unwrap_err().to_string();
    assert!(error("10.1.0.1:8080", WELL).contains("is the address of Pod shop/web-1"));
    assert!(error("192.0.2.2:8080", WELL).contains("is an address of node node-a"));
    let proxied = with("ipMode: VIP", "ipMode: Proxy");
    assert!(
        error("192.0.2.50:80", &proxied).contains("the load balancer of Service shop/web has 192.0.2.50")
    );
    // A NodePort of another node's address, and nobody's address.
    for at in ["192.0.2.3:30080", "203.0.113.1:80"] {
        let error = explained_on("node-a", at, WELL).unwrap_err().to_string();
        assert!(error.contains("--node-name"), "{error}");
    }
}

#[test]
fn subjects() {
    for text in
        ["web", "svc/", "svc/a/b", "10.0.0.1", "10.0.0.1:0", "10.0.0.1:80/ICMP", "host:80", "fd00::1:80/x"]
    {
        assert!(text.parse::<Subject>().is_err(), "{text}");
    }
    assert_eq!("service/web".parse(), Ok(Subject::Service("web".into())));
    let at = Subject::Address("[fd00::1]:53".parse().unwrap(), Some(Protocol::Udp));
    assert_eq!("[fd00::1]:53/udp".parse(), Ok(at));
}

#[test]
fn what_the_agent_kept_explains_less() {
    let all = objects(WELL);
    let model = crate::model::Objects {
        services: all.services.values().map(|service| service.model.clone().into()).collect(),
        slices: all.slices.iter().map(|slice| slice.clone().into()).collect(),
        node: all.nodes.first().cloned(),
        ..crate::model::Objects::default()
    };
    let kept = Objects::kept(&model);
    let node = NodeFacts::of(&kept.nodes[0]);
    let explanation = explain(&"svc/web".parse().unwrap(), "shop", &kept, &node).unwrap();
    assert_eq!(found(&explanation), [""; 0]);
    assert_eq!(steps(&explanation), ["nodePort 30080 fits", "port 80/TCP ?"]);
    assert_eq!(outcomes(&explanation), outcomes(&explained(WELL)));
}

#[test]
fn what_the_maps_have_is_compared() {
    use crate::inspect::{ScopeView, ServiceView, ShareView};

    let mut explanation = explained(WELL);
    let scope = |addrs: &[&str]| {
        let share = |addr: &&str| ShareView { id: 1, address: addr.parse().ok(), port: 8080, slots: 1 };
        let backends = addrs.iter().map(share).collect();
        ScopeView { policy: "Cluster", when_empty: "reject", window: 1, slots: 1, backends }
    };
    let entry = |address: Option<&str>, port, addrs: &[&str]| ServiceView {
        address: address.map(|addr| addr.parse().unwrap()),
        family: "IPv4",
        port,
        protocol: "TCP".into(),
        kind: "ClusterIP".into(),
        service: 1,
        owner: None,
        namespace: None,
        name: None,
        service_port: None,
        algorithm: "maglev",
        mode: "snat",
        affinity_seconds: 0,
        source_ranges: None,
        internal: scope(addrs),
        external: scope(addrs),
        usage: None,
    };
    let both = ["10.1.0.1", "10.1.1.2"];
    let maps = [entry(None, 30080, &both), entry(Some("10.96.0.10"), 80, &both[..1])];
    programmed::compare(&mut explanation, &maps);
    assert_eq!(found(&explanation), ["error programmed-differs -", "error not-programmed -"]);
    let agrees = explanation.clients.iter().map(|client| client.programmed.as_ref().unwrap().agrees);
    assert_eq!(agrees.collect::<Vec<_>>(), [true, false, false]);
    assert!(explanation.findings[0].text.contains("have 1 backends"), "{:?}", explanation.findings[0]);
}

#[test]
fn it_is_printed() {
    let mut out = vec![];
    let text = format!("{WELL}{RIVAL}");
    render::text(&explained_on("node-a", "192.0.2.2:30080", &text).unwrap(), &mut out).unwrap();
    render::text(&explained(&text), &mut out).unwrap();
    let out = String::from_utf8(out).unwrap();
    for part in ["nodePort ", "targetPort ", "containerPort ", "OWNER", "10.1.0.1:8080", "error    taken"] {
        assert!(out.contains(part), "{part}\n{out}");
    }
}
