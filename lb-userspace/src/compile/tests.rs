use std::collections::BTreeMap;

use super::*;
use crate::entries::{Keep, Protocol, ServiceName};
use crate::model::{Endpoint, Hints, SliceName, SlicePort};

const HERE: &str = "node-a";

fn facts() -> Facts {
    Facts { node_name: HERE.into(), zone: Some("z1".into()), algorithm: Algorithm::Maglev, mode: None }
}

fn ip(s: &str) -> IpAddr {
    s.parse().unwrap()
}

/// Endpoint states by the letters of `flags`: R ready, S serving, T terminating.
fn endpoint(addr: &str, node: &str, flags: &str) -> Endpoint {
    Endpoint {
        addr: ip(addr),
        ready: flags.contains('R'),
        serving: flags.contains('S') || flags.contains('R'),
        terminating: flags.contains('T'),
        node: (!node.is_empty()).then(|| node.into()),
        hints: None,
    }
}

fn zoned(addr: &str, node: &str, flags: &str, zones: &[&str]) -> Endpoint {
    let zones = zones.iter().map(|z| (*z).into()).collect();
    Endpoint { hints: Some(Box::new(Hints { zones, nodes: vec![] })), ..endpoint(addr, node, flags) }
}

fn noded(addr: &str, node: &str, nodes: &[&str]) -> Endpoint {
    let nodes = nodes.iter().map(|n| (*n).into()).collect();
    Endpoint { hints: Some(Box::new(Hints { zones: vec![], nodes })), ..endpoint(addr, node, "R") }
}

fn slice(endpoints: Vec<Endpoint>) -> EndpointSlice {
    slice_of(vec![("", 8080, Protocol::Tcp)], endpoints)
}

fn slice_of(ports: Vec<(&str, u16, Protocol)>, endpoints: Vec<Endpoint>) -> EndpointSlice {
    EndpointSlice {
        name: SliceName { namespace: "ns".into(), name: "svc-1".into() },
        service: Some(ServiceName { namespace: "ns".into(), name: "svc".into() }),
        ports: ports
            .into_iter()
            .map(|(name, port, protocol)| SlicePort { name: name.into(), port, protocol })
            .collect(),
        endpoints,
        triggered: None,
        findings: vec![],
    }
}

fn tcp(port: u16) -> ServicePort {
    ServicePort { name: String::new(), port, protocol: Protocol::Tcp, node_port: None }
}

fn cluster_ip() -> Service {
    Service {
        cluster_ips: vec![ip("172.30.0.41")],
        ports: vec![tcp(80)],
        ..Service::named(ServiceName { namespace: "ns".into(), name: "svc".into() })
    }
}

fn node_port() -> Service {
    let mut service = Service { kind: ServiceType::NodePort, ..cluster_ip() };
    service.ports[0].node_port = Some(30_080);
    service
}

fn local(service: Service) -> Service {
    Service { internal_policy: Policy::Local, external_policy: Policy::Local, ..service }
}

fn key(addr: &str, port: u16, protocol: Protocol) -> FrontendKey {
    FrontendKey { addr: ip(addr), port, protocol }
}

fn compiled(service: &Service, endpoints: Vec<Endpoint>) -> Compiled {
    compile(service, &[&slice(endpoints)], &facts()).0
}

/// `drop`, `reject`, or the last octets of the chosen addresses.
fn show(target: &Target) -> String {
    if target.backends.is_empty() {
        return match target.when_empty {
            WhenEmpty::Reject => "reject".into(),
            WhenEmpty::Drop => "drop".into(),
        };
    }
    let last = |b: &Backend| match b.addr.ip() {
        IpAddr::V4(addr) => addr.octets()[3].to_string(),
        IpAddr::V6(addr) => addr.octets()[15].to_string(),
    };
    target.backends.iter().map(last).collect::<Vec<_>>().join(" ")
}

/// (internal, external) of the cluster IP.
fn at_cluster_ip(service: &Service, endpoints: Vec<Endpoint>) -> (String, String) {
    let frontend = compiled(service, endpoints).frontends[&key("172.30.0.41", 80, Protocol::Tcp)].clone();
    assert_eq!(frontend.kind, FrontendKind::ClusterIP);
    (show(&frontend.internal), show(&frontend.external))
}

/// (internal, external) of the node port.
fn at_node_port(service: &Service, endpoints: Vec<Endpoint>) -> (String, String) {
    let frontend = compiled(service, endpoints).frontends[&key("0.0.0.0", 30_080, Protocol::Tcp)].clone();
    assert_eq!(frontend.kind, FrontendKind::NodePort);
    (show(&frontend.internal), show(&frontend.external))
}

fn both(s: &str) -> (String, String) {
    (s.into(), s.into())
}

fn pair(internal: &str, external: &str) -> (String, String) {
    (internal.into(), external.into())
}

/// Rules 1 to 6, 54 and 55.
#[test]
fn no_endpoints_reject_from_everywhere() {
    let service = Service {
        kind: ServiceType::LoadBalancer,
        external_ips: vec![ip("192.168.99.11")],
        load_balancer_ips: vec![ip("1.2.3.4")],
        ..node_port()
    };
    for service in [service.clone(), local(service)] {
        for endpoints in [vec![], vec![endpoint("10.0.0.1", HERE, ""), endpoint("10.0.1.2", "other", "T")]] {
            let compiled = compiled(&service, endpoints);
            assert_eq!(compiled.frontends.len(), 4);
            for frontend in compiled.frontends.values() {
                assert_eq!(show(&frontend.internal), "reject");
                assert_eq!(show(&frontend.external), "reject");
            }
        }
    }
}

/// Rules 7, 9, 10, 39 and 43.
#[test]
fn policy_cluster_takes_every_ready_endpoint() {
    let endpoints = || vec![endpoint("10.0.0.1", HERE, "R"), endpoint("10.0.1.2", "other", "R")];
    assert_eq!(at_cluster_ip(&node_port(), endpoints()), both("1 2"));
    assert_eq!(at_node_port(&node_port(), endpoints()), both("1 2"));
    let compiled = compiled(&cluster_ip(), endpoints());
    let backends = &compiled.frontends[&key("172.30.0.41", 80, Protocol::Tcp)].internal.backends;
    assert!(backends.iter().all(|b| b.addr.port() == 8080));
    assert_eq!(backends.iter().map(|b| b.local).collect::<Vec<_>>(), [true, false]);
}

/// Rule 11.
#[test]
fn one_port_number_with_three_protocols() {
    let mut service = cluster_ip();
    service.ports = vec![
        ServicePort { name: "p1".into(), port: 53, protocol: Protocol::Tcp, node_port: None },
        ServicePort { name: "p2".into(), port: 53, protocol: Protocol::Udp, node_port: None },
        ServicePort { name: "p3".into(), port: 53, protocol: Protocol::Sctp, node_port: None },
    ];
    let slice = slice_of(
        vec![("p1", 5353, Protocol::Tcp), ("p2", 53, Protocol::Udp), ("p3", 53, Protocol::Sctp)],
        vec![endpoint("10.0.0.1", "", "R")],
    );
    let (compiled, findings) = compile(&service, &[&slice], &facts());
    let port = |protocol| {
        let frontend = &compiled.frontends[&key("172.30.0.41", 53, protocol)];
        frontend.internal.backends.iter().map(|b| (b.addr.port(), b.protocol)).collect::<Vec<_>>()
    };
    assert_eq!(port(Protocol::Tcp), [(5353, Protocol::Tcp)]);
    assert_eq!(port(Protocol::Udp), [(53, Protocol::Udp)]);
    assert_eq!(port(Protocol::Sctp), [(53, Protocol::Sctp)]);
    assert_eq!(findings, []);
}

/// Rule 12: the name must fit, and so must the protocol.
#[test]
fn ports_are_matched_by_name_and_protocol() {
    let mut service = cluster_ip();
    service.ports[0].name = "http".into();
    for (name, protocol) in [("https", Protocol::Tcp), ("", Protocol::Tcp), ("http", Protocol::Udp)] {
        let slice = slice_of(vec![(name, 8080, protocol)], vec![endpoint("10.0.0.1", "", "R")]);
        let (compiled, _) = compile(&service, &[&slice], &facts());
        let frontend = &compiled.frontends[&key("172.30.0.41", 80, Protocol::Tcp)];
        assert_eq!(show(&frontend.internal), "reject");
    }
}

/// Rules 32 to 38 and 40: policy Local restricts only those from outside.
#[test]
fn external_policy_local() {
    let service = Service {
        kind: ServiceType::LoadBalancer,
        external_policy: Policy::Local,
        external_ips: vec![ip("192.168.99.11")],
        load_balancer_ips: vec![ip("1.2.3.4")],
        ..node_port()
    };
    let endpoints = || vec![endpoint("10.0.0.1", HERE, "R"), endpoint("10.0.1.2", "other", "R")];
    assert_eq!(at_cluster_ip(&service, endpoints()), both("1 2"));
    assert_eq!(at_node_port(&service, endpoints()), pair("1 2", "1"));
    let compiled = compiled(&service, endpoints());
    for (addr, kind) in [("192.168.99.11", FrontendKind::ExternalIP), ("1.2.3.4", FrontendKind::LoadBalancer)]
    {
        let frontend = &compiled.frontends[&key(addr, 80, Protocol::Tcp)];
        assert_eq!(frontend.kind, kind);
        assert_eq!(show(&frontend.internal), "1 2");
        assert_eq!(show(&frontend.external), "1");
        // Rules 58 and 61: under `--masquerade-all`, too.
        assert!(frontend.source_kept);
    }
    let masqueraded = compiled.frontends.values().filter(|frontend| !frontend.source_kept);
    assert!(masqueraded.map(|frontend| frontend.kind).eq([FrontendKind::ClusterIP]));
}

/// Rule 42.
#[test]
fn external_policy_means_nothing_to_a_cluster_ip() {
    let service = Service { external_policy: Policy::Local, ..cluster_ip() };
    assert_eq!(at_cluster_ip(&service, vec![endpoint("10.0.1.2", "other", "R")]), both("2"));
}

/// Rules 44, 45, 46, 47, 49, 59 and 80.
#[test]
fn internal_policy_local() {
    let service = Service { internal_policy: Policy::Local, ..cluster_ip() };
    let (here1, here3) = (endpoint("10.0.0.1", HERE, "R"), endpoint("10.0.0.3", HERE, "R"));
    let there = endpoint("10.0.1.2", "other", "R");
    assert_eq!(at_cluster_ip(&service, vec![here1.clone(), there.clone()]), both("1"));
    assert_eq!(at_cluster_ip(&service, vec![here1, there.clone(), here3]), both("1 3"));
    assert_eq!(at_cluster_ip(&service, vec![there]), both("drop"));
    assert_eq!(at_cluster_ip(&service, vec![]), both("reject"));
    assert_eq!(at_cluster_ip(&service, vec![endpoint("10.0.1.2", "other", "ST")]), both("drop"));
    assert_eq!(at_cluster_ip(&service, vec![endpoint("10.0.1.2", "other", "T")]), both("reject"));
}

/// Rule 48.
#[test]
fn internal_policy_does_not_touch_node_ports() {
    let service = Service { internal_policy: Policy::Local, ..node_port() };
    let endpoints = || vec![endpoint("10.0.0.1", HERE, "R"), endpoint("10.0.1.2", "other", "R")];
    assert_eq!(at_node_port(&service, endpoints()), both("1 2"));
    assert_eq!(at_cluster_ip(&service, endpoints()), both("1"));
}

/// Rules 50, 51, 52 and 82.
#[test]
fn terminating_endpoints_under_policy_cluster() {
    let ready = endpoint("10.0.1.1", "other", "R");
    let draining = endpoint("10.0.0.2", HERE, "ST");
    let gone = endpoint("10.0.0.3", HERE, "T");
    let unready = endpoint("10.0.0.4", HERE, "");
    assert_eq!(at_cluster_ip(&cluster_ip(), vec![ready, draining.clone(), gone.clone()]), both("1"));
    assert_eq!(at_cluster_ip(&cluster_ip(), vec![draining, gone.clone(), unready.clone()]), both("2"));
    assert_eq!(at_cluster_ip(&cluster_ip(), vec![gone, unready.clone()]), both("reject"));
    assert_eq!(at_cluster_ip(&cluster_ip(), vec![unready]), both("reject"));
    let remote = endpoint("10.0.1.5", "other", "ST");
    assert_eq!(at_node_port(&node_port(), vec![remote]), both("5"));
    // Serving but not ready, and not on its way out: a failed readiness probe. Not usable.
    assert_eq!(at_cluster_ip(&cluster_ip(), vec![endpoint("10.0.0.6", HERE, "S")]), both("reject"));
}

/// Rules 53 and 56: the local set falls back on its own.
#[test]
fn terminating_endpoints_under_policy_local() {
    let service = local(node_port());
    let remote = endpoint("10.0.1.5", "other", "ST");
    assert_eq!(at_node_port(&service, vec![remote.clone()]), pair("5", "drop"));
    let here = endpoint("10.0.0.2", HERE, "ST");
    assert_eq!(at_node_port(&service, vec![remote, here.clone()]), pair("2 5", "2"));
    let remote_ready = endpoint("10.0.1.1", "other", "R");
    assert_eq!(at_cluster_ip(&service, vec![here.clone(), remote_ready.clone()]), both("2"));
    assert_eq!(at_node_port(&service, vec![here.clone(), remote_ready]), pair("1", "2"));
    let here_ready = endpoint("10.0.0.7", HERE, "R");
    assert_eq!(at_cluster_ip(&service, vec![here, here_ready]), both("7"));
}

/// Rule 63 lies in the model (`load_balancer_ips` holds VIPs only); rules 65 and 119, 120 here.
#[test]
fn ignored_services_have_no_frontends() {
    use crate::model::Ignored;
    for ignored in [Ignored::Headless, Ignored::ExternalName, Ignored::OtherProxy] {
        let service = Service { ignored: Some(ignored), ..node_port() };
        let (compiled, findings) =
            compile(&service, &[&slice(vec![endpoint("10.0.0.1", "", "R")])], &facts());
        assert_eq!(compiled, Compiled::default());
        assert_eq!(findings, []);
    }
}

/// Rule 66.
#[test]
fn the_type_decides_which_frontends_exist() {
    use FrontendKind::{ClusterIP, LoadBalancer, NodePort};

    let mut service = Service { load_balancer_ips: vec![ip("1.2.3.4")], ..node_port() };
    let mut kinds = |kind| {
        service.kind = kind;
        compiled(&service, vec![]).frontends.values().map(|f| f.kind).collect::<BTreeSet<_>>()
    };
    assert_eq!(kinds(ServiceType::ClusterIP), BTreeSet::from([ClusterIP]));
    assert_eq!(kinds(ServiceType::NodePort), BTreeSet::from([ClusterIP, NodePort]));
    assert_eq!(kinds(ServiceType::LoadBalancer), BTreeSet::from([ClusterIP, NodePort, LoadBalancer]));
}

/// Rules 72, 73, 74, 75, 76 and 77.
#[test]
fn zone_hints() {
    let choose = |endpoints: Vec<Endpoint>, zone: Option<&str>| {
        let facts = Facts { zone: zone.map(Into::into), ..facts() };
        let (compiled, _) = compile(&cluster_ip(), &[&slice(endpoints)], &facts);
        show(&compiled.frontends[&key("172.30.0.41", 80, Protocol::Tcp)].internal)
    };
    let e1 = zoned("10.0.0.1", HERE, "R", &["z1"]);
    let e2 = zoned("10.0.0.2", "b", "R", &["z2"]);
    let e3 = zoned("10.0.0.3", "c", "R", &["z3", "z1"]);
    let bare = endpoint("10.0.0.4", "d", "R");
    let unready_bare = endpoint("10.0.0.5", "d", "");
    assert_eq!(choose(vec![e1.clone(), e2.clone()], Some("z1")), "1");
    assert_eq!(choose(vec![e1.clone(), e2.clone(), e3.clone()], Some("z1")), "1 3");
    assert_eq!(choose(vec![e1.clone(), e2.clone(), bare], Some("z1")), "1 2 4");
    assert_eq!(choose(vec![e1.clone(), e2.clone(), unready_bare], Some("z1")), "1");
    assert_eq!(choose(vec![e1.clone(), e2.clone()], None), "1 2");
    assert_eq!(choose(vec![e1.clone(), e2.clone()], Some("")), "1 2");
    assert_eq!(choose(vec![e1.clone(), e2.clone()], Some("z9")), "1 2");
    // The only endpoint for our zone is not ready: hints do not count.
    let e1_unready = zoned("10.0.0.1", HERE, "", &["z1"]);
    assert_eq!(choose(vec![e1_unready, e2.clone()], Some("z1")), "2");
    // Hints never narrow the fall-back.
    let (t1, t2) = (zoned("10.0.0.1", HERE, "ST", &["z1"]), zoned("10.0.0.2", "b", "ST", &["z2"]));
    assert_eq!(choose(vec![t1, t2], Some("z1")), "1 2");
}

/// Rule 78.
#[test]
fn node_hints_go_before_zone_hints() {
    let e1 = noded("10.0.0.1", HERE, &[HERE]);
    let e2 = noded("10.0.0.2", "b", &["b"]);
    assert_eq!(at_cluster_ip(&cluster_ip(), vec![e1.clone(), e2.clone()]), both("1"));
    let bare = endpoint("10.0.0.3", "c", "R");
    assert_eq!(at_cluster_ip(&cluster_ip(), vec![e1.clone(), e2.clone(), bare]), both("1 2 3"));
    assert_eq!(at_cluster_ip(&cluster_ip(), vec![e2.clone()]), both("2"));
    let with_zone = |mut e: Endpoint, zone: &str| {
        e.hints.as_mut().unwrap().zones.push(zone.into());
        e
    };
    // None for this node: the zone decides.
    let b = with_zone(noded("10.0.0.2", "b", &["b"]), "z1");
    let c = with_zone(noded("10.0.0.3", "c", &["c"]), "z2");
    assert_eq!(at_cluster_ip(&cluster_ip(), vec![b.clone(), c.clone()]), both("2"));
    // One for this node: it wins, whatever its zone.
    let a = with_zone(e1, "z2");
    assert_eq!(at_cluster_ip(&cluster_ip(), vec![a, b, c]), both("1"));
}

/// Rule 79.
#[test]
fn hints_never_narrow_the_local_set() {
    let service = local(node_port());
    let here = zoned("10.0.0.1", HERE, "R", &["z2"]);
    let there = zoned("10.0.0.2", "b", "R", &["z1"]);
    assert_eq!(at_node_port(&service, vec![here.clone(), there.clone()]), pair("2", "1"));
    assert_eq!(at_cluster_ip(&service, vec![here, there]), both("1"));
}

/// Rule 83.
#[test]
fn slices_have_their_own_port_numbers() {
    let mut service = cluster_ip();
    service.ports[0].name = "p80".into();
    let one = slice_of(vec![("p80", 80, Protocol::Tcp)], vec![endpoint("10.0.1.1", "", "R")]);
    let two = slice_of(vec![("p80", 8080, Protocol::Tcp)], vec![endpoint("10.0.1.2", "", "R")]);
    let (compiled, _) = compile(&service, &[&one, &two], &facts());
    let backends = &compiled.frontends[&key("172.30.0.41", 80, Protocol::Tcp)].internal.backends;
    let addrs: Vec<_> = backends.iter().map(|b| b.addr.to_string()).collect();
    assert_eq!(addrs, ["10.0.1.1:80", "10.0.1.2:8080"]);
}

/// Rule 84.
#[test]
fn of_two_sightings_the_one_that_lives_counts() {
    let alive = slice(vec![endpoint("10.0.0.1", HERE, "R"), endpoint("10.0.0.2", HERE, "R")]);
    let dying = slice(vec![endpoint("10.0.0.1", HERE, "ST")]);
    for slices in [[&alive, &dying], [&dying, &alive]] {
        let (compiled, _) = compile(&cluster_ip(), &slices, &facts());
        assert_eq!(show(&compiled.frontends[&key("172.30.0.41", 80, Protocol::Tcp)].internal), "1 2");
        assert_eq!(compiled.kept.len(), 0);
    }
}

/// Rule 89.
#[test]
fn an_endpoint_without_node_is_not_local() {
    let service = Service { internal_policy: Policy::Local, ..cluster_ip() };
    assert_eq!(at_cluster_ip(&service, vec![endpoint("10.0.0.1", "", "R")]), both("drop"));
}

/// Rule 145.
#[test]
fn dual_stack() {
    let mut service = node_port();
    service.cluster_ips = vec![ip("fd00::41"), ip("172.30.0.41")];
    let v4 = slice(vec![endpoint("10.0.0.1", HERE, "R")]);
    let v6 = slice(vec![endpoint("fd01::2", HERE, "R")]);
    let (compiled, findings) = compile(&service, &[&v4, &v6], &facts());
    let shown: Vec<_> =
        compiled.frontends.iter().map(|(key, f)| (key.to_string(), show(&f.external))).collect();
    assert_eq!(
        shown,
        [
            ("any IPv4 node address:30080/TCP".to_owned(), "1".to_owned()),
            ("172.30.0.41:80/TCP".into(), "1".into()),
            ("any IPv6 node address:30080/TCP".into(), "2".into()),
            ("[fd00::41]:80/TCP".into(), "2".into()),
        ]
    );
    assert_eq!(findings, []);
    // One family only: the other family's endpoints are nobody's.
    service.cluster_ips.remove(0);
    let (compiled, _) = compile(&service, &[&v4, &v6], &facts());
    assert_eq!(compiled.frontends.len(), 2);
}

#[test]
fn without_cluster_ip_the_endpoints_tell_the_families() {
    let mut service = node_port();
    service.cluster_ips.clear();
    let families = |service: &Service, slices: &[&EndpointSlice]| {
        let (compiled, _) = compile(service, slices, &facts());
        compiled.frontends.keys().map(|k| k.addr.to_string()).collect::<Vec<_>>()
    };
    let v6 = slice(vec![endpoint("fd01::2", HERE, "R")]);
    assert_eq!(families(&service, &[]), ["0.0.0.0"]);
    assert_eq!(families(&service, &[&v6]), ["::"]);
    service.families = vec![Family::V4, Family::V6];
    assert_eq!(families(&service, &[&v6]), ["0.0.0.0", "::"]);
}

#[test]
fn endpoints_not_chosen_keep_what_they_have() {
    let endpoints = vec![
        endpoint("10.0.0.1", HERE, "R"),
        endpoint("10.0.0.2", HERE, "ST"),
        endpoint("10.0.0.3", HERE, "T"),
        endpoint("10.0.0.4", HERE, "S"),
        endpoint("10.0.0.5", HERE, ""),
    ];
    let kept = compiled(&cluster_ip(), endpoints).kept;
    let shown: Vec<_> = kept.iter().map(|(b, k)| (b.addr.ip().to_string(), *k)).collect();
    assert_eq!(
        shown,
        [
            ("10.0.0.2".to_owned(), Keep::Flows),
            ("10.0.0.3".into(), Keep::Connections),
            ("10.0.0.4".into(), Keep::Flows),
            ("10.0.0.5".into(), Keep::Connections),
        ]
    );
    // What the NodePort chooses is not "kept", even if the cluster IP does not choose it.
    let service = Service { internal_policy: Policy::Local, ..node_port() };
    let kept = compiled(&service, vec![endpoint("10.0.1.1", "other", "R")]).kept;
    assert_eq!(kept, BTreeMap::new());
}

#[test]
fn the_mode_is_the_services_or_the_agents_and_for_outside_clients_of_policy_cluster() {
    let port = |protocol| ServicePort {
        protocol,
        ..ServicePort { node_port: Some(30080), ..cluster_ip().ports[0].clone() }
    };
    let ports = vec![port(Protocol::Tcp), port(Protocol::Udp)];
    let node_port = Service { kind: ServiceType::NodePort, ports, ..cluster_ip() };
    let dsr = |service: &Service, mode: Option<Mode>| {
        let (compiled, findings) = compile(service, &[], &Facts { mode, ..facts() });
        let dsr = compiled.frontends.iter().filter(|(_, frontend)| frontend.dsr);
        assert!(dsr.clone().all(|(key, _)| key.addr.is_unspecified()));
        (dsr.map(|(key, _)| key.protocol).collect::<Vec<_>>(), findings.contains(&Finding::NoTunnels))
    };
    let with = |mode| Service { mode, ..node_port.clone() };
    let both = vec![Protocol::Tcp, Protocol::Udp];
    assert_eq!(dsr(&with(None), None), (vec![], false));
    assert_eq!(dsr(&with(Some(Mode::Dsr)), None), (vec![], true));
    assert_eq!(dsr(&with(Some(Mode::Snat)), None), (vec![], false));
    assert_eq!(dsr(&with(None), Some(Mode::Dsr)), (both.clone(), false));
    assert_eq!(dsr(&with(None), Some(Mode::Hybrid)), (vec![Protocol::Tcp], false));
    assert_eq!(dsr(&with(Some(Mode::Dsr)), Some(Mode::Snat)), (both, false));
    assert_eq!(dsr(&with(Some(Mode::Snat)), Some(Mode::Dsr)), (vec![], false));
    let local = Service { external_policy: Policy::Local, ..node_port.clone() };
    assert_eq!(dsr(&local, Some(Mode::Dsr)), (vec![], false));
}

#[test]
fn the_annotation_chooses_the_algorithm() {
    let algorithm = |service: &Service| {
        compiled(service, vec![]).frontends.into_values().map(|f| f.algorithm).collect::<Vec<_>>()
    };
    assert_eq!(algorithm(&cluster_ip()), [Algorithm::Maglev]);
    let service = Service { algorithm: Some(Algorithm::Random), ..cluster_ip() };
    assert_eq!(algorithm(&service), [Algorithm::Random]);
}

#[test]
fn what_is_wrong_is_found_and_the_rest_works() {
    let mut service = node_port();
    service.findings.push(Finding::BadPort { field: "spec.ports[1].port".into(), value: 70_000 });
    service.ports.push(ServicePort { name: "again".into(), ..tcp(80) });
    let (compiled, findings) = compile(&service, &[], &facts());
    assert_eq!(compiled.frontends.len(), 2);
    assert_eq!(
        findings,
        [
            Finding::BadPort { field: "spec.ports[1].port".into(), value: 70_000 },
            Finding::NoNodePort { port: "again".into() },
        ]
    );
    // The second port 80 leads elsewhere: that is a conflict.
    let named = slice_of(vec![("again", 81, Protocol::Tcp)], vec![endpoint("10.0.0.1", "", "R")]);
    let (_, findings) = compile(&service, &[&named], &facts());
    assert!(findings.contains(&Finding::Duplicate { key: key("172.30.0.41", 80, Protocol::Tcp) }));
    service.kind = ServiceType::ClusterIP;
    service.cluster_ips.clear();
    assert!(compile(&service, &[], &facts()).1.contains(&Finding::NoClusterIp));
}

/// Rules 16 to 19: only the load-balancer IPs are restricted.
#[test]
fn source_ranges_restrict_load_balancer_ips_alone() {
    let range = || BTreeSet::from(["203.0.113.0/24".parse().unwrap()]);
    let service = Service {
        kind: ServiceType::LoadBalancer,
        load_balancer_ips: vec![ip("1.2.3.4"), ip("1.2.3.5")],
        external_ips: vec![ip("1.2.3.5"), ip("1.2.3.6")],
        source_ranges: BTreeMap::from([(Family::V4, range()), (Family::V6, range())]),
        ..node_port()
    };
    let (compiled, findings) = compile(&service, &[&slice(vec![])], &facts());
    assert_eq!(findings, []);
    let restricted = compiled.frontends.iter().filter(|(_, frontend)| frontend.restricted);
    let addrs: Vec<String> = restricted.map(|(key, _)| key.addr.to_string()).collect();
    assert_eq!((addrs, compiled.frontends.len()), (vec!["1.2.3.4".into(), "1.2.3.5".into()], 5));
    assert_eq!(compiled.sources, BTreeMap::from([(Family::V4, range())]));
    // Without such an address there is nothing to restrict.
    let unaddressed = Service { load_balancer_ips: vec![], ..service };
    assert_eq!(compile(&unaddressed, &[&slice(vec![])], &facts()).0.sources, BTreeMap::new());
}

/// Rules 67, 98 and 125.
#[test]
fn load_balancers_count_ready_endpoints_of_this_node() {
    let service = Service {
        kind: ServiceType::LoadBalancer,
        health_port: Some(32_000),
        ports: vec![tcp(80), ServicePort { name: "two".into(), ..tcp(81) }],
        ..local(cluster_ip())
    };
    let count = |service: &Service, slices: &[&EndpointSlice]| {
        let health = compile(service, slices, &facts()).0.health;
        health.map(|health| (health.port, health.endpoints))
    };
    let ports = || vec![("", 8080, Protocol::Tcp), ("two", 8081, Protocol::Tcp)];
    let of = |endpoints| count(&service, &[&slice_of(ports(), endpoints)]);
    assert_eq!(of(vec![]), Some((32_000, 0)));
    // However many ports it has, a pod is one endpoint.
    assert_eq!(of(vec![endpoint("10.0.0.1", HERE, "R"), endpoint("10.0.0.2", HERE, "R")]), Some((32_000, 2)));
    assert_eq!(
        of(vec![endpoint("10.0.0.1", HERE, "ST"), endpoint("10.0.0.2", "node-b", "R")]),
        Some((32_000, 0))
    );
    assert_eq!(
        of(vec![endpoint("10.0.0.1", HERE, "ST"), endpoint("10.0.0.2", HERE, "R")]),
        Some((32_000, 1))
    );
    // Of both families it is one, too.
    let dual = Service { families: vec![Family::V4, Family::V6], ..service.clone() };
    let v4 = slice_of(ports(), vec![endpoint("10.0.0.1", HERE, "R")]);
    let v6 = slice_of(ports(), vec![endpoint("fd00::1", HERE, "R"), endpoint("fd00::2", HERE, "R")]);
    assert_eq!(count(&dual, &[&v4, &v6]), Some((32_000, 2)));
    assert_eq!(count(&Service { health_port: None, ..service }, &[&v4]), None);
}
