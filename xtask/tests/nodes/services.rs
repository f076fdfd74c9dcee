//! What Services and EndpointSlices may look like, and how they change.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use xtask::lab::{Call, Caller, Endpoint, Family, Outcome, Port, Protocol, Service, eventually};

use crate::cells::Frontend;
use crate::world::{
    AT_ONCE, PORT, SILENCE, SOON, TARGET_PORT, World, at_vip, balanced, node_port, options, service, until,
    until_only, vip,
};

/// Where some pods listen as well.
const OTHER_PORT: u16 = 8081;

fn refused(outcome: &Outcome) -> bool {
    *outcome == Outcome::Refused
}

fn unanswered(outcome: &Outcome) -> bool {
    !matches!(outcome, Outcome::Answer(_))
}

/// Until an answer comes from `server` at this port.
fn until_at(caller: &Caller, call: &Call, server: &str, port: u16) -> Result<()> {
    until(caller, call, |outcome| match outcome {
        Outcome::Answer(answer) => {
            answer.introduction.server == server && answer.introduction.at.port() == port
        }
        _ => false,
    })
    .map(drop)
}

/// Rules 11, 12, 105, 113, 127, 128 and 139: one number for TCP and UDP, each with endpoints and a life of its own.
#[test]
fn ports_come_and_go_by_protocol() -> Result<()> {
    let port = |protocol| {
        let target = if protocol == Protocol::Tcp { TARGET_PORT } else { OTHER_PORT };
        Port::new(protocol, PORT, target).node_port(node_port(1))
    };
    let with = |ports: Vec<Port>, world: &World| {
        let mut service = balanced(1, [&world.b1]);
        service.ports = ports;
        service
    };
    let [tcp, udp] = Protocol::ALL.map(port);
    let world = World::with_services(options(), |world| vec![with(vec![tcp.clone(), udp.clone()], world)])?;
    world.b1.listen(Protocol::Udp, OTHER_PORT)?;
    world.route_services_through(world.node_a())?;
    let (lab, by_node) = (world.lab(), Frontend::NodePort(world.node_a()));
    let clients: [(&Caller, Frontend<'_>); 6] = [
        (&world.a2, Frontend::ClusterIp),
        (&world.b2, Frontend::LoadBalancerIp),
        (&lab.outside, by_node),
        (&lab.far, Frontend::ExternalIp),
        (world.node_a(), by_node),
        (world.node_b(), Frontend::ClusterIp),
    ];
    let each = |check: &dyn Fn(&Caller, Frontend<'_>, Family) -> Result<()>| -> Result<()> {
        for (caller, frontend) in clients {
            for family in Family::ALL {
                check(caller, frontend, family)?;
            }
        }
        Ok(())
    };
    let answers = |protocol| {
        let at = if protocol == Protocol::Tcp { TARGET_PORT } else { OTHER_PORT };
        each(&|caller, frontend, family| {
            until_at(caller, &Call::new(protocol, frontend.target(1, family)), "b1", at)
        })
    };
    let gone = |protocol| {
        each(&|caller, frontend, family| {
            let call = Call::new(protocol, frontend.target(1, family));
            // Ports that no frontend has are refused by us at a ClusterIP, and by the node's own stack at its address.
            match frontend {
                Frontend::ClusterIp | Frontend::NodePort(_) => until(caller, &call, refused).map(drop),
                // Nobody has the other addresses.
                _ => until(caller, &call, unanswered).map(drop),
            }
        })
    };
    answers(Protocol::Tcp)?;
    answers(Protocol::Udp)?;
    let (open, first) = world.a2.open(Call::tcp(at_vip(1, Family::V4, PORT)))?;
    let apply = |ports| world.cluster.manifests.apply(&with(ports, &world));
    apply(vec![tcp.clone()])?;
    gone(Protocol::Udp)?;
    answers(Protocol::Tcp)?;
    ensure!(open.again()? == first, "an open connection is another port's affair");
    apply(vec![udp.clone()])?;
    gone(Protocol::Tcp)?;
    answers(Protocol::Udp)?;
    apply(vec![tcp.clone().node_port(node_port(7)), udp])?;
    answers(Protocol::Udp)?;
    // A nodePort moves; the ClusterIP stays.
    for (caller, node) in [(&*lab.outside, world.node_b()), (&*world.a2, world.node_a())] {
        until_only(caller, &Call::tcp(node.at(Family::V4, node_port(7))), &["b1"])?;
        until(caller, &Call::tcp(node.at(Family::V4, node_port(1))), refused)?;
    }
    until_only(&world.a2, &Call::tcp(at_vip(1, Family::V4, PORT)), &["b1"])
}

/// Rules 66, 108, 109, 114, 119 and 120: a Service has the frontends of its type, as long as it is ours.
#[test]
fn a_service_changes_its_type_and_its_proxy() -> Result<()> {
    let world = World::with_services(options(), |world| vec![service(2, [&world.b1])])?;
    let (outside, node_a) = (&*world.lab().outside, world.node_a());
    world.route_services_through(node_a)?;
    let of_type = |kind: &str| {
        let mut service = balanced(1, [&world.b1]);
        service.spec = json!({ "type": kind });
        if matches!(kind, "ClusterIP" | "ExternalName") {
            service.ports.iter_mut().for_each(|port| port.node_port = None);
        }
        if kind == "ExternalName" {
            service.spec =
                json!({ "type": kind, "externalName": "example.org", "clusterIP": "", "clusterIPs": [] });
        }
        service
    };
    let labelled = |which: usize, label: &str| {
        let mut documents = of_type("LoadBalancer").documents();
        for document in documents.iter_mut().skip(which).take(if which == 0 { 1 } else { 2 }) {
            document["metadata"]["labels"][label] = json!("");
        }
        documents
    };
    let headless = "service.kubernetes.io/headless";
    let steps: [(&str, Vec<Value>, [bool; 3]); 13] = [
        ("ClusterIP", of_type("ClusterIP").documents(), [true, false, false]),
        ("NodePort", of_type("NodePort").documents(), [true, true, false]),
        ("LoadBalancer", of_type("LoadBalancer").documents(), [true, true, true]),
        ("another proxy", labelled(0, "service.kubernetes.io/service-proxy-name"), [false; 3]),
        ("this proxy", of_type("LoadBalancer").documents(), [true; 3]),
        ("labelled headless", labelled(0, headless), [false; 3]),
        ("with ClusterIP", of_type("LoadBalancer").documents(), [true; 3]),
        ("its slices headless", labelled(1, headless), [false; 3]),
        ("its slices back", of_type("LoadBalancer").documents(), [true; 3]),
        ("ClusterIP again", of_type("ClusterIP").documents(), [true, false, false]),
        ("ExternalName", of_type("ExternalName").documents(), [false; 3]),
        ("deleted", vec![], [false; 3]),
        ("NodePort again", of_type("NodePort").documents(), [true, true, false]),
    ];
    for (step, documents, expected) in steps {
        world.cluster.manifests.write("service-1", &documents)?;
        for family in Family::ALL {
            let by_node = Frontend::NodePort(node_a);
            for (frontend, served) in
                [Frontend::ClusterIp, by_node, Frontend::LoadBalancerIp].into_iter().zip(expected)
            {
                for caller in [outside, &world.b2, node_a] {
                    let call = Call::tcp(frontend.target(1, family)).patience(SILENCE / 2);
                    eventually(SOON, || {
                        let outcome = caller.ask(call.clone())?;
                        let fine = if served { outcome.server() == Some("b1") } else { unanswered(&outcome) };
                        ensure!(fine, "{step}: {} -> {call:?}: {outcome}", caller.name());
                        Ok(())
                    })?;
                }
            }
        }
        // What is next to it stays.
        assert_eq!(world.a2.ask(Call::tcp(at_vip(2, Family::V4, PORT)))?.server(), Some("b1"), "{step}");
    }
    Ok(())
}

/// Rules 83, 103, 104, 116, 117, 131, 132, 138 and 146: slices of all kinds.
#[test]
fn slices_of_all_kinds() -> Result<()> {
    let world = World::new(options())?;
    for pod in [&world.a1, &world.b1] {
        pod.listen(Protocol::Tcp, OTHER_PORT)?;
    }
    // Each of these Services has slices that an EndpointSlice controller, or a user, could have made.
    let two_ports = |n, endpoints: Vec<Endpoint>| {
        let mut service = Service::new(&format!("service-{n}"), &vip(n));
        service.ports = vec![
            Port::new(Protocol::Tcp, PORT, TARGET_PORT).named("web"),
            Port::new(Protocol::Tcp, PORT + 1, OTHER_PORT).named("admin"),
        ];
        service.endpoints = endpoints;
        service
    };
    let [a1, b1] = [&world.a1, &world.b1].map(Endpoint::from);
    // Its own slices, and those of another one of the same name.
    let merged = |one: &Service, other: &Service| {
        let mut documents = one.documents();
        documents.extend(other.slices().into_iter().map(|mut slice| {
            slice["metadata"]["name"] =
                json!(format!("{}-more", slice["metadata"]["name"].as_str().unwrap_or_default()));
            slice
        }));
        documents
    };
    let mut here = two_ports(1, vec![a1.clone()]);
    let mut there = two_ports(1, vec![b1.clone()]);
    // The same named targetPort, with another number on the other pod.
    here.ports[0].target_port = Some(OTHER_PORT);
    here.ports[1].target_port = Some(TARGET_PORT);
    world.cluster.manifests.write("service-1", &merged(&here, &there))?;
    // A port for each slice, and for each pod.
    here = two_ports(2, vec![a1.clone()]);
    there = two_ports(2, vec![b1.clone()]);
    let mut documents = merged(&here, &there);
    for document in documents.iter_mut().skip(1) {
        let of_there = document["metadata"]["name"].as_str().unwrap_or_default().ends_with("-more");
        let ports = document["ports"].take();
        document["ports"] = json!([ports[usize::from(of_there)]]);
    }
    world.cluster.manifests.write("service-2", &documents)?;
    // publishNotReadyAddresses: always ready, whatever becomes of them.
    let published = |endpoint: &Endpoint| Endpoint { ready: true, ..endpoint.clone().terminating(false) };
    let mut service = two_ports(3, vec![published(&a1), published(&b1)]);
    service.spec["publishNotReadyAddresses"] = json!(true);
    world.cluster.manifests.apply(&service)?;
    world
        .cluster
        .manifests
        .apply(&two_ports(4, vec![a1.clone().unready(), b1.clone().terminating(false)]))?;
    // The same pods once more, under another number.
    world.cluster.manifests.apply(&two_ports(5, vec![a1.clone(), b1.clone()]))?;
    world.cluster.start()?;

    for family in Family::ALL {
        for caller in [&*world.a2, &*world.b2, world.node_a()] {
            let web = |n| Call::tcp(at_vip(n, family, PORT));
            let admin = |n| Call::tcp(at_vip(n, family, PORT + 1));
            until_at(caller, &web(1), "a1", OTHER_PORT)?;
            until_at(caller, &web(1), "b1", TARGET_PORT)?;
            until_at(caller, &admin(1), "a1", TARGET_PORT)?;
            until_at(caller, &admin(1), "b1", OTHER_PORT)?;
            until_only(caller, &web(2), &["a1"])?;
            until_only(caller, &admin(2), &["b1"])?;
            for n in [3, 5] {
                until_only(caller, &web(n), &["a1", "b1"])?;
                until_only(caller, &admin(n), &["a1", "b1"])?;
            }
            for call in [web(4), admin(4)] {
                assert!(refused(&caller.ask(call.clone().patience(AT_ONCE))?), "{}: {call:?}", caller.name());
            }
        }
    }
    // Endpoints are added to and taken from one port at a time.
    world.cluster.manifests.write("service-2", &here.documents())?;
    until_only(&world.b2, &Call::tcp(at_vip(2, Family::V4, PORT + 1)), &["a1"])?;
    until_only(&world.b2, &Call::tcp(at_vip(2, Family::V4, PORT)), &["a1"])
}

/// Rule 145: one family, or two in either order.
#[test]
fn services_of_one_family_and_of_two() -> Result<()> {
    let [v4, v6] = vip(1);
    let orders: [(u8, &[_]); 4] = [(1, &[v4]), (2, &[v6]), (3, &[v4, v6]), (4, &[v6, v4])];
    let world = World::new(options())?;
    for (n, families) in orders {
        let mut service = service(n, [&world.b1]);
        service.cluster_ips = families.iter().map(|like| vip(n)[usize::from(like.is_ipv6())]).collect();
        world.cluster.manifests.apply(&service)?;
    }
    world.cluster.start()?;
    for (n, families) in orders {
        for family in Family::ALL {
            let served = families.iter().any(|addr| addr.is_ipv4() == (family == Family::V4));
            let [vip, node_port] =
                [Frontend::ClusterIp, Frontend::NodePort(world.node_a())].map(|f| f.target(n, family));
            let calls: [(&Caller, SocketAddr); 4] = [
                (&world.a2, vip),
                (world.node_b(), vip),
                (&world.b2, node_port),
                (&world.lab().far, node_port),
            ];
            for (caller, target) in calls {
                for protocol in Protocol::ALL {
                    let outcome = caller.ask(Call::new(protocol, target).patience(if served {
                        SOON
                    } else {
                        SILENCE / 2
                    }))?;
                    let fine = if served { outcome.server() == Some("b1") } else { unanswered(&outcome) };
                    ensure!(fine, "Service {n}: {} -> {target}, {protocol}: {outcome}", caller.name());
                }
            }
        }
    }
    Ok(())
}

/// Rules 72 to 79, and 149.
#[test]
fn topology_hints_narrow_the_choice() -> Result<()> {
    const BOTH: &[&str] = &["a1", "b1"];
    const A1: &[&str] = &["a1"];
    const B1: &[&str] = &["b1"];
    let world = World::new(options())?;
    let (manifests, node_a, node_b) = (&world.cluster.manifests, world.node_a(), world.node_b());
    manifests.apply_node_in_zone(node_a, "east")?;
    manifests.apply_node_in_zone(node_b, "west")?;
    let [a1, b1] = [&world.a1, &world.b1].map(Endpoint::from);
    let zoned = |endpoint: &Endpoint, zones: &[&str]| endpoint.clone().hints(zones, &[]);
    // Who answers on node-a, which is in the east, and who on node-b.
    let rows: [([Endpoint; 2], [&[&str]; 2]); 8] = [
        ([zoned(&a1, &["east"]), zoned(&b1, &["west"])], [A1, B1]),
        ([zoned(&a1, &["east"]), b1.clone()], [BOTH, BOTH]),
        ([zoned(&a1, &["east", "west"]), zoned(&b1, &["west"])], [A1, BOTH]),
        ([zoned(&a1, &["east"]), zoned(&b1, &["east"])], [BOTH, BOTH]),
        ([zoned(&a1, &["east"]), zoned(&b1, &["west"]).unready()], [A1, A1]),
        ([zoned(&a1, &["north"]), zoned(&b1, &["west"]).terminating(true)], [A1, A1]),
        ([a1.clone().hints(&["west"], &["node-a"]), b1.clone().hints(&["west"], &["node-b"])], [A1, B1]),
        ([a1.clone().hints(&["east"], &["node-a"]), b1.clone().hints(&["west"], &["node-a"])], [BOTH, B1]),
    ];
    for (n, (endpoints, _)) in (1..).zip(&rows) {
        manifests.apply(&balanced(n, endpoints.clone()))?;
    }
    // Policy Local knows no hints.
    let mut local = balanced(9, [zoned(&a1, &["west"]), zoned(&b1, &["east"])]);
    local.spec["externalTrafficPolicy"] = json!("Local");
    manifests.apply(&local)?;
    world.cluster.start()?;
    let (a, b) = (Frontend::NodePort(node_a), Frontend::NodePort(node_b));
    let clients: [[(&Caller, Frontend<'_>); 3]; 2] = [
        [(&world.a2, Frontend::ClusterIp), (node_a, Frontend::LoadBalancerIp), (&world.lab().outside, a)],
        [(&world.b2, Frontend::LoadBalancerIp), (node_b, Frontend::ClusterIp), (&world.lab().far, b)],
    ];
    for (n, (_, expected)) in (1..).zip(&rows) {
        for (clients, servers) in clients.iter().zip(expected) {
            for (i, (caller, frontend)) in (usize::from(n)..).zip(clients) {
                until_only(caller, &Call::tcp(frontend.target(n, Family::ALL[i % 2])), servers)?;
            }
        }
    }
    until_only(&world.lab().outside, &Call::tcp(a.target(9, Family::V4)), A1)?;
    until_only(&world.a2, &Call::tcp(a.target(9, Family::V4)), B1)?;
    // The node leaves its zone, and comes into another one.
    manifests.apply_node(node_a)?;
    for (caller, frontend) in clients[0] {
        until_only(caller, &Call::tcp(frontend.target(1, Family::V4)), BOTH)?;
        until_only(caller, &Call::tcp(frontend.target(7, Family::V6)), A1)?;
    }
    manifests.apply_node_in_zone(node_a, "west")?;
    for (caller, frontend) in clients[0] {
        until_only(caller, &Call::tcp(frontend.target(1, Family::V4)), B1)?;
    }
    Ok(())
}

/// Rule 14: nobody is at an address of a ServiceCIDR that no Service has; a new Service is served there at once.
#[test]
fn unallocated_addresses_of_a_service_network_are_silent() -> Result<()> {
    let world = World::new(options())?;
    let cidr = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": { "name": "kubernetes" },
        "spec": { "cidrs": ["10.96.0.0/16", "fd00:10:96::/112"] },
    });
    // Somebody has such an address, and everybody knows the way.
    let stranger = at_vip(9, Family::V4, PORT);
    let (address, b1) = (format!("{}/32", stranger.ip()), world.b1.addrs.v4);
    world.b1.ns.ip(&format!("addr add {address} dev lo\n"))?;
    world.b1.serve(Protocol::Tcp, &[stranger])?;
    world.node_b().ns.ip(&format!("route add {address} via {b1}\n"))?;
    world.node_a().ns.ip(&format!("route add {address} via {}\n", world.node_b().addrs.v4))?;
    world.cluster.start()?;
    world.route_services_through(world.node_a())?;
    let callers: [&Caller; 3] = [&world.a2, &world.b2, &world.lab().outside];
    let call = |family, protocol| Call::new(protocol, at_vip(1, family, PORT));
    for caller in callers {
        until_only(caller, &Call::tcp(stranger), &["b1"])?;
    }
    world.cluster.manifests.write("service-cidr", &[cidr])?;
    for caller in callers {
        until(caller, &Call::tcp(stranger), |outcome| *outcome == Outcome::TimedOut)?;
    }
    world.cluster.manifests.apply(&service(1, [&world.b1]))?;
    for caller in callers {
        for family in Family::ALL {
            for protocol in Protocol::ALL {
                until_only(caller, &call(family, protocol), &["b1"])?;
            }
        }
    }
    Ok(())
}
