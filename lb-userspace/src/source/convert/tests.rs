use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::*;
use crate::finding::Finding;

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
            "annotations": { Service::ALGORITHM: "random", Service::MODE: "hybrid" },
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
        mode: Some(Mode::Hybrid),
        families: vec![Family::V4, Family::V6],
        cluster_ips: vec!["172.30.0.41".parse().unwrap(), "fd00::41".parse().unwrap()],
        external_ips: vec!["192.168.99.11".parse().unwrap()],
        load_balancer_ips: vec!["1.2.3.4".parse().unwrap()],
        internal_policy: Policy::Local,
        external_policy: Policy::Local,
        health_port: Some(32_000),
        ports: vec![
            ServicePort { name: "http".into(), port: 80, protocol: Protocol::Tcp, node_port: Some(30_080) },
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
    for (label, ignored) in [(PROXY_NAME_LABEL, Ignored::OtherProxy), (HEADLESS_LABEL, Ignored::Headless)] {
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

/// There may be a hundred thousand endpoints, on a thousand nodes.
#[test]
fn endpoints_of_a_slice_share_the_names_of_their_nodes() {
    let endpoint =
        |last: u8, node: &str| json!({ "addresses": [format!("10.0.0.{last}")], "nodeName": node });
    let endpoints = [endpoint(1, "node-a"), endpoint(2, "node-b"), endpoint(3, "node-a")];
    let slice = a_slice(&json!({ "endpoints": endpoints }));
    let nodes: Vec<_> = slice.endpoints.iter().map(|endpoint| endpoint.node.clone().unwrap()).collect();
    assert_eq!([&*nodes[0], &*nodes[1]], ["node-a", "node-b"]);
    assert!(Arc::ptr_eq(&nodes[0], &nodes[2]));
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
        hints: Some(Box::new(Hints { zones: vec!["z1".into(), "z2".into()], nodes: vec!["node-a".into()] })),
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
    let sidecar =
        json!({ "name": "s", "restartPolicy": "Always", "ports": [{ "containerPort": 2, "hostPort": 82 }] });
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

/// What is more than the API lets in is left out; said once, of the object.
#[test]
fn objects_are_cut_to_what_the_api_lets_in() {
    let spec = json!({
        "type": "LoadBalancer",
        "clusterIPs": vec!["172.30.0.41"; 100_000],
        "externalIPs": vec!["203.0.113.7"; 100_000],
        "loadBalancerSourceRanges": vec!["nonsense"; 100_000],
        "ports": vec![json!({ "port": 80 }); 100_000],
    });
    let service = a_service(&spec);
    assert_eq!(
        (service.cluster_ips.len(), service.external_ips.len(), service.ports.len()),
        (20_000, 20_000, 20_000)
    );
    assert!(service.findings.len() <= 20_004, "{}", service.findings.len());
    let told: Vec<String> =
        texts(&service.findings).into_iter().filter(|text| text.contains("too many")).collect();
    assert_eq!(told[0], "spec.clusterIPs: 100000 are too many; the first 20000 are used");
    assert_eq!(told.len(), 4, "{told:?}");

    let hint = |name: &str| json!(vec![json!({ "name": name }); 1000]);
    let hints = json!({ "forZones": hint("z1"), "forNodes": hint("n1") });
    let endpoint = json!({ "addresses": ["10.0.0.1"] });
    let mut endpoints = vec![endpoint; 100_000];
    endpoints[0]["hints"] = hints;
    let slice = a_slice(
        &json!({ "endpoints": endpoints, "ports": vec![json!({ "name": "x", "port": 1 }); 100_000] }),
    );
    assert_eq!((slice.endpoints.len(), slice.ports.len()), (1000, 20_000));
    let kept = slice.endpoints[0].hints.as_ref().unwrap();
    assert_eq!((kept.zones.len(), kept.nodes.len()), (8, 8));
    let prefix = "EndpointSlice svc-1 ";
    let expected = [
        "ports: 100000 are too many; the first 20000 are used",
        "endpoints: 100000 are too many; the first 1000 are used",
        "endpoints[0].hints.forZones: 1000 are too many; the first 8 are used",
        "endpoints[0].hints.forNodes: 1000 are too many; the first 8 are used",
    ];
    assert_eq!(texts(&slice.findings), expected.map(|text| format!("{prefix}{text}")));

    let one = container(&json!([{ "containerPort": 1, "hostPort": 81 }]));
    let pod = a_pod(&json!({ "containers": vec![one; 100_000] }), &json!({ "podIP": "10.0.0.1" }));
    assert_eq!(pod.ports.len(), 20_000);
    assert_eq!(
        texts(&pod.findings),
        ["spec.containers.ports: 100000 are too many; the first 20000 are used"]
    );
}
