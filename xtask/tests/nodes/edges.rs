//! What each edge owes its clients beside the plain way: loopback, hairpin, refusal, distribution, and
//! changes that are followed.
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::json;
use socket2::{Domain, Socket, Type};
use xtask::lab::counters::Edge;
use xtask::lab::{AgentOptions, Call, Caller, Family, Outcome, Protocol, Xdp, eventually};

use crate::world::{
    AT_ONCE, Findings, PORT, SILENCE, SOON, TARGET_PORT, World, at_vip, node_port, options, service,
    set_offloads, until,
};

fn families_and_protocols() -> impl Iterator<Item = (Family, Protocol)> {
    Family::ALL.into_iter().flat_map(|family| Protocol::ALL.map(|protocol| (family, protocol)))
}

fn loopback(family: Family, port: u16) -> SocketAddr {
    match family {
        Family::V4 => SocketAddr::from(([127, 0, 0, 1], port)),
        Family::V6 => SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], port)),
    }
}

#[test]
fn node_processes_reach_node_ports_on_loopback_and_by_mapped_addresses() -> Result<()> {
    let world =
        World::with_services(options(), |world| vec![service(1, [&world.a1]), service(2, [&world.b1])])?;
    let mut findings = Findings::default();
    for (family, protocol) in families_and_protocols() {
        for node in world.lab().nodes() {
            for (number, server) in [(1, "a1"), (2, "b1")] {
                let calls = [
                    Call::new(protocol, loopback(family, node_port(number))),
                    Call::new(protocol, loopback(family, node_port(number))).unconnected(),
                    Call::new(protocol, loopback(family, node_port(number))).mapped(),
                    Call::new(protocol, node.at(family, node_port(number))).mapped(),
                    Call::new(protocol, at_vip(number, family, PORT)).mapped(),
                    Call::new(protocol, at_vip(number, family, PORT)).mapped().unconnected(),
                    Call::new(protocol, at_vip(number, family, PORT)).unconnected(),
                ];
                for call in calls {
                    if findings.enough() {
                        break;
                    }
                    let what = format!("{} -> {call:?}", node.name);
                    let Some(outcome) = findings.take(node.ask(call), || what.clone()) else { continue };
                    findings.check(outcome.server() == Some(server), || format!("{what}: {outcome}"));
                }
            }
        }
        // Mapped addresses of pods are translated as packets, not as sockets.
        let call = Call::new(protocol, at_vip(2, family, PORT)).mapped();
        let outcome = world.a2.ask(call.clone())?;
        findings.check(outcome.server() == Some("b1"), || format!("a2 -> {call:?}: {outcome}"));
    }
    findings.report();
    Ok(())
}

#[test]
fn a_pod_reaches_itself_through_its_service() -> Result<()> {
    let world =
        World::with_services(options(), |world| vec![service(1, [&world.a1]), service(2, [&world.b1])])?;
    let mut findings = Findings::default();
    for (family, protocol) in families_and_protocols() {
        for (pod, node, number) in [(&world.a1, world.node_a(), 1), (&world.b1, world.node_b(), 2)] {
            for target in [at_vip(number, family, PORT), node.at(family, node_port(number))] {
                if findings.enough() {
                    break;
                }
                let call = Call::new(protocol, target);
                let outcome = pod.ask(call.clone())?;
                let what = || format!("{} -> itself by {call:?}: {outcome}", pod.name());
                findings.check(outcome.server() == Some(pod.name()), what);
                // With its own address as the source, the pod would answer itself and nobody would translate.
                findings.check(outcome.seen_as().is_some_and(|saw| saw.ip() != pod.addrs.of(family)), what);
                let transfer = pod.transfer(call.clone(), 1_000_000);
                findings.check(transfer.is_ok(), || format!("{}: {transfer:?}", what()));
            }
        }
    }
    findings.report();
    Ok(())
}

/// Everybody who can ask for a Service, each at another edge.
fn clients(world: &World) -> [(&Caller, &str); 5] {
    [
        (&world.a2, "pod on a routed node"),
        (&world.b2, "pod on a bridged node"),
        (world.node_a(), "process on node-a"),
        (world.node_b(), "process on node-b"),
        (&world.lab().outside, "outside"),
    ]
}

fn refused_at_once(findings: &mut Findings, client: (&Caller, &str), call: Call) {
    if findings.enough() {
        return;
    }
    let (caller, who) = client;
    let what = format!("{who} -> {call:?}");
    let begin = Instant::now();
    let Some(outcome) = findings.take(caller.ask(call), || what.clone()) else { return };
    let took = begin.elapsed();
    findings.check(outcome == Outcome::Refused, || format!("{what}: {outcome}"));
    findings.check(took < AT_ONCE, || format!("{what}: only after {took:?}"));
}

/// What a process is told that pings `addr`; an answer counts for nothing.
fn ping(addr: IpAddr) -> io::Error {
    let attempt = || -> io::Result<()> {
        // The echo request with its checksum; for IPv6 the kernel computes that.
        let (domain, protocol, head) = match addr {
            IpAddr::V4(_) => (Domain::IPV4, socket2::Protocol::ICMPV4, [8, 0, 0xf7, 0xff]),
            IpAddr::V6(_) => (Domain::IPV6, socket2::Protocol::ICMPV6, [128, 0, 0, 0]),
        };
        let mut socket = Socket::new(domain, Type::from(nix::libc::SOCK_RAW), Some(protocol))?;
        socket.set_read_timeout(Some(AT_ONCE))?;
        socket.connect(&SocketAddr::new(addr, 0).into())?;
        let mut echo = [0; 64];
        echo[..4].copy_from_slice(&head);
        socket.send(&echo)?;
        // A raw socket is given the ICMP error itself, too.
        while socket.read(&mut [0; 256])? > 0 {}
        Ok(())
    };
    attempt().err().unwrap_or_else(|| ErrorKind::Other.into())
}

/// Contract rule 15.
#[test]
fn a_ping_to_a_cluster_ip_is_refused_at_once() -> Result<()> {
    for xdp in [Xdp::Native, Xdp::Off] {
        let world = World::with_services(AgentOptions { xdp, ..options() }, |w| vec![service(1, [&w.a1])])?;
        world.route_services_through(world.node_a())?;
        for family in Family::ALL {
            let addr = at_vip(1, family, PORT).ip();
            for (who, ns) in
                [("a2", &world.a2.ns), ("b2", &world.b2.ns), ("outside", &world.lab().outside.ns)]
            {
                let err = ns.run(|| ping(addr))?;
                ensure!(err.kind() == ErrorKind::ConnectionRefused, "{who} pings {addr}: {err}");
            }
        }
    }
    Ok(())
}

fn frontends_without_endpoints_are_refused(options: AgentOptions) -> Result<()> {
    let world = World::with_services(options, |_| vec![service(1, [])])?;
    world.route_services_through(world.node_a())?;
    let mut findings = Findings::default();
    for (family, protocol) in families_and_protocols() {
        for client in clients(&world) {
            refused_at_once(&mut findings, client, Call::new(protocol, at_vip(1, family, PORT)));
            for node in world.lab().nodes() {
                refused_at_once(&mut findings, client, Call::new(protocol, node.at(family, node_port(1))));
            }
        }
        for node in world.lab().nodes() {
            let call = Call::new(protocol, loopback(family, node_port(1)));
            refused_at_once(&mut findings, (node, "process by loopback"), call);
        }
    }
    findings.report();
    Ok(())
}

#[test]
fn frontends_without_endpoints_are_refused_at_once() -> Result<()> {
    frontends_without_endpoints_are_refused(options())
}

#[test]
fn frontends_without_endpoints_are_refused_at_once_by_tc() -> Result<()> {
    frontends_without_endpoints_are_refused(AgentOptions { xdp: Xdp::Off, ..options() })
}

/// A sender that leaves the checksum to a device behind, and an answer that is made of its packet and gets its own from
/// the device it goes back through: what a virtual machine's network card does.
#[test]
fn refusals_of_packets_with_unfinished_checksums_arrive() -> Result<()> {
    let world = World::with_services(AgentOptions { xdp: Xdp::Off, ..options() }, |_| vec![service(1, [])])?;
    let lab = world.lab();
    set_offloads(&lab.outside.ns, "eth0", &["tx", "on"])?;
    for (node, pod) in [(world.node_a(), &world.a1), (world.node_b(), &world.b1)] {
        set_offloads(&lab.router, &node.name, &["tx", "on"])?;
        set_offloads(&node.ns, &pod.device, &["tx", "off"])?;
    }
    let mut findings = Findings::default();
    for (family, protocol) in families_and_protocols() {
        for node in lab.nodes() {
            let call = Call::new(protocol, node.at(family, node_port(1)));
            refused_at_once(&mut findings, (&lab.outside, "outside"), call.patience(SILENCE));
        }
        for pod in [&world.a1, &world.b1] {
            let call = Call::new(protocol, at_vip(1, family, PORT));
            refused_at_once(&mut findings, (pod, pod.name()), call.patience(SILENCE));
        }
    }
    findings.report();
    Ok(())
}

#[test]
fn a_cluster_ip_answers_on_no_other_port() -> Result<()> {
    let world = World::with_services(options(), |world| vec![service(1, [&world.a1, &world.b1])])?;
    world.route_services_through(world.node_b())?;
    let mut findings = Findings::default();
    for (family, protocol) in families_and_protocols() {
        for client in clients(&world) {
            // The port exists, so that a refusal of the others is no accident.
            let call = Call::new(protocol, at_vip(1, family, PORT));
            let outcome = client.0.ask(call.clone())?;
            findings.check(outcome.server().is_some(), || format!("{} -> {call:?}: {outcome}", client.1));
            for port in [TARGET_PORT, node_port(1)] {
                refused_at_once(&mut findings, client, Call::new(protocol, at_vip(1, family, port)));
            }
        }
    }
    findings.report();
    Ok(())
}

#[test]
fn connections_are_spread_over_all_backends() -> Result<()> {
    const CALLS: u32 = 600;
    let world = World::with_services(options(), |world| vec![service(1, world.pods())])?;
    let mut findings = Findings::default();
    for (family, protocol) in families_and_protocols() {
        for (caller, who) in clients(&world) {
            let target = if caller.name() == "outside" {
                world.node_a().at(family, node_port(1))
            } else {
                at_vip(1, family, PORT)
            };
            let tally = caller.ask_many(Call::new(protocol, target), CALLS)?;
            let what = || format!("{who}, {protocol}, {family:?}: {tally:?}");
            findings.check(tally.failures.is_empty() && tally.answers.len() == 4, what);
            // 25 % each; 5 standard deviations are 9 %.
            let even =
                tally.answers.values().all(|count| (CALLS * 16 / 100..=CALLS * 34 / 100).contains(count));
            findings.check(even, what);
        }
    }
    findings.report();
    Ok(())
}

#[test]
fn two_thousand_short_connections_all_succeed() -> Result<()> {
    const CALLS: u32 = 2000;
    let world =
        World::with_services(options(), |world| vec![service(1, [&world.a1]), service(2, [&world.b1])])?;
    let (node_a, lab) = (world.node_a(), world.lab());
    let paths: [(&Caller, SocketAddr, &str); 6] = [
        (&lab.outside, node_a.at(Family::V4, node_port(1)), "a1"),
        (&lab.outside, node_a.at(Family::V4, node_port(2)), "b1"),
        (&lab.far, node_a.at(Family::V6, node_port(2)), "b1"),
        (&world.a2, at_vip(2, Family::V4, PORT), "b1"),
        (&world.b2, at_vip(2, Family::V6, PORT), "b1"),
        (node_a, at_vip(2, Family::V4, PORT), "b1"),
    ];
    let mut findings = Findings::default();
    for (caller, target, server) in paths {
        let begin = Instant::now();
        let tally = caller.ask_many(Call::tcp(target), CALLS)?;
        eprintln!("{} -> {target}: {CALLS} connections in {:?}", caller.name(), begin.elapsed());
        findings.check(tally.answers == BTreeMap::from([(server.to_owned(), CALLS)]), || {
            format!("{} -> {target}: {tally:?}", caller.name())
        });
    }
    findings.report();
    Ok(())
}

#[test]
fn changes_of_endpoints_are_followed() -> Result<()> {
    let world = World::with_services(options(), |world| vec![service(1, [&world.a1])])?;
    let manifests = &world.cluster.manifests;
    let calls = |family| {
        [
            (&*world.lab().outside, world.node_a().at(family, node_port(1))),
            (&*world.b2, at_vip(1, family, PORT)),
            (&**world.node_b(), at_vip(1, family, PORT)),
        ]
    };
    for family in Family::ALL {
        for (caller, target) in calls(family) {
            assert_eq!(caller.ask(Call::tcp(target))?.server(), Some("a1"));
        }
    }
    manifests.apply(&service(1, [&world.a1, &world.b1]))?;
    for family in Family::ALL {
        for (caller, target) in calls(family) {
            until(caller, &Call::tcp(target), |outcome| outcome.server() == Some("b1"))?;
        }
    }
    manifests.apply(&service(1, [&world.b1]))?;
    for family in Family::ALL {
        for (caller, target) in calls(family) {
            eventually(SOON, || {
                let tally = caller.ask_many(Call::tcp(target), 20)?;
                ensure!(tally.answers.get("b1") == Some(&20), "{} -> {target}: {tally:?}", caller.name());
                Ok(())
            })?;
        }
    }
    manifests.apply(&service(1, []))?;
    for (caller, target) in calls(Family::V4) {
        until(caller, &Call::tcp(target), |outcome| *outcome == Outcome::Refused)?;
    }
    manifests.apply(&service(1, [&world.a1]))?;
    for (caller, target) in calls(Family::V4) {
        until(caller, &Call::tcp(target), |outcome| outcome.server() == Some("a1"))?;
    }
    Ok(())
}

#[test]
fn a_deleted_service_is_gone_and_the_others_stay() -> Result<()> {
    let world =
        World::with_services(options(), |world| vec![service(1, [&world.a1]), service(2, [&world.a1])])?;
    world.route_services_through(world.node_a())?;
    let gone = |outcome: &Outcome| !matches!(outcome, Outcome::Answer(_));
    world.cluster.manifests.delete("service-1")?;
    for (family, protocol) in families_and_protocols() {
        for (caller, who) in clients(&world) {
            for target in [at_vip(1, family, PORT), world.node_a().at(family, node_port(1))] {
                until(caller, &Call::new(protocol, target), gone)?;
            }
            let still = caller.ask(Call::new(protocol, at_vip(2, family, PORT)))?;
            assert_eq!(still.server(), Some("a1"), "{who}: {still}");
        }
    }
    // Nothing of the node listens there: its own stack refuses, as for any other port.
    let call = Call::tcp(world.node_a().at(Family::V4, node_port(1)));
    assert_eq!(world.lab().outside.ask(call)?, Outcome::Refused);
    Ok(())
}

#[test]
fn a_udp_client_that_keeps_its_port_moves_to_a_living_backend() -> Result<()> {
    let world = World::with_services(options(), |world| vec![service(1, [&world.b1])])?;
    let clients = [
        (&*world.a2, at_vip(1, Family::V4, PORT)),
        (&*world.lab().outside, world.node_a().at(Family::V6, node_port(1))),
        (&**world.node_a(), at_vip(1, Family::V6, PORT)),
    ];
    let mut open = Vec::new();
    for (caller, target) in clients {
        let (call, first) = caller.open(Call::udp(target).unconnected().patience(SILENCE))?;
        assert_eq!(first.server(), Some("b1"), "{}", caller.name());
        open.push((caller, call));
    }
    world.cluster.manifests.apply(&service(1, [&world.a1]))?;
    for (caller, call) in &open {
        eventually(SOON, || {
            let outcome = call.again()?;
            ensure!(outcome.server() == Some("a1"), "{}: {outcome}", caller.name());
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn pods_that_come_while_the_agent_runs_are_served() -> Result<()> {
    let world = World::with_services(options(), |world| vec![service(1, [&world.a1])])?;
    for node in world.lab().nodes() {
        let pod = world.lab().add_pod(node, &format!("late-{}", node.name))?;
        for (family, protocol) in families_and_protocols() {
            let call = Call::new(protocol, at_vip(1, family, PORT));
            until(&pod, &call, |outcome| outcome.server() == Some("a1"))?;
        }
        pod.listen(Protocol::Tcp, TARGET_PORT)?;
        world.cluster.manifests.apply(&service(2, [&pod]))?;
        let call = Call::tcp(at_vip(2, Family::V4, PORT));
        until(&pod, &call, |outcome| outcome.server() == Some(pod.name()))?;
        until(&world.a2, &call, |outcome| outcome.server() == Some(pod.name()))?;
        world.lab().remove_pod(node, pod)?;
    }
    // An agent that lost a device still follows its manifests.
    world.cluster.manifests.apply(&service(2, [&world.b1]))?;
    until(&world.a2, &Call::tcp(at_vip(2, Family::V4, PORT)), |outcome| outcome.server() == Some("b1"))?;
    Ok(())
}

/// Rule 1: a reverse key belongs to one flow.
#[test]
fn one_client_port_through_many_frontends_to_one_backend() -> Result<()> {
    const FROM: u16 = 40000;
    let world = World::with_services(options(), |world| {
        let (a1, b1) = (&world.a1, &world.b1);
        vec![service(1, [a1]), service(2, [a1]), service(3, [b1]), service(4, [b1])]
    })?;
    let (node_a, node_b) = (world.node_a(), world.node_b());
    for (family, protocol) in families_and_protocols() {
        let mut open = Vec::new();
        for number in 1..=4 {
            let server = if number <= 2 { "a1" } else { "b1" };
            let calls: [(&Caller, SocketAddr); 5] = [
                (&world.lab().outside, node_a.at(family, node_port(number))),
                (&world.lab().outside, node_b.at(family, node_port(number))),
                (&world.a2, at_vip(number, family, PORT)),
                (&world.a2, node_a.at(family, node_port(number))),
                (&world.b2, at_vip(number, family, PORT)),
            ];
            for (caller, target) in calls {
                let what = format!("{} -> {target}, {protocol}", caller.name());
                let (call, first) = caller.open(Call::new(protocol, target).from_port(FROM).abrupt())?;
                assert_eq!(first.server(), Some(server), "{what}: {first}");
                open.push((what, call, first));
            }
        }
        for _ in 0..3 {
            for (what, call, first) in &open {
                assert_eq!(call.again()?, *first, "{what}");
            }
        }
    }
    Ok(())
}

/// Rule 5: a new SYN on an old tuple is a new connection.
#[test]
fn a_client_port_is_used_again_at_once() -> Result<()> {
    let world =
        World::with_services(options(), |world| vec![service(1, [&world.a1]), service(2, [&world.b1])])?;
    let mut findings = Findings::default();
    for family in Family::ALL {
        for (number, server) in [(1, "a1"), (2, "b1")] {
            let calls: [(&Caller, SocketAddr); 3] = [
                (&world.lab().outside, world.node_a().at(family, node_port(number))),
                (&world.a2, at_vip(number, family, PORT)),
                (&world.b2, at_vip(number, family, PORT)),
            ];
            for (caller, target) in calls {
                let tally = caller.ask_many(Call::tcp(target).from_port(40000).abrupt(), 50)?;
                let all = BTreeMap::from([(server.to_owned(), 50)]);
                findings.check(tally.answers == all, || format!("{} -> {target}: {tally:?}", caller.name()));
            }
        }
    }
    findings.report();
    Ok(())
}

/// Socket programs see every process below their cgroup, also those of pods.
#[test]
fn sockets_of_pods_are_translated_only_if_asked_for() -> Result<()> {
    for (socket_lb, edge) in [("host", Edge::Pod), ("all", Edge::Socket), ("off", Edge::Pod)] {
        let mut options = options();
        options.args.extend(["--socket-lb".to_owned(), socket_lb.to_owned()]);
        let world = World::with_services(options, |world| vec![service(1, [&world.b1])])?;
        let process = world.lab().process_in_pod(world.node_a(), &world.a2)?;
        for (family, protocol) in families_and_protocols() {
            let agent = world.cluster.agent(world.node_a())?;
            let before = agent.counters()?;
            let outcome = process.ask(Call::new(protocol, at_vip(1, family, PORT)))?;
            assert_eq!(outcome.server(), Some("b1"), "--socket-lb={socket_lb}: {outcome}");
            let saw = outcome.seen_as().map(|saw| saw.ip());
            assert_eq!(saw, Some(world.a2.addrs.of(family)), "--socket-lb={socket_lb}");
            let deeds: Vec<_> = agent.counters()?.since(&before).deeds().collect();
            let at: BTreeSet<_> = deeds.iter().map(|(hook, ..)| Edge::of(*hook)).collect();
            assert_eq!(at, BTreeSet::from([edge]), "--socket-lb={socket_lb}: {deeds:?}");
        }
        // Without socket programs, a node's process is on its own.
        let call = Call::tcp(at_vip(1, Family::V4, PORT)).patience(SILENCE);
        let answered = world.node_a().ask(call)?.server().is_some();
        assert_eq!(answered, socket_lb != "off", "--socket-lb={socket_lb}");
    }
    Ok(())
}

#[test]
fn a_broken_manifest_is_named_and_stops_nothing() -> Result<()> {
    let world = World::with_services(options(), |world| vec![service(1, [&world.a1])])?;
    let manifests = &world.cluster.manifests;
    manifests.write_text("broken", "kind: Service\n  metadata: [\n")?;
    manifests.apply(&service(2, [&world.b1]))?;
    until(&world.a2, &Call::tcp(at_vip(2, Family::V4, PORT)), |outcome| outcome.server() == Some("b1"))?;
    assert_eq!(world.a2.ask(Call::tcp(at_vip(1, Family::V4, PORT)))?.server(), Some("a1"));
    let log = world.cluster.agent(world.node_a())?.log();
    assert!(log.contains("broken.yaml"), "{log}");
    Ok(())
}

#[test]
fn endpoints_that_are_not_ready_get_nothing() -> Result<()> {
    let world = World::with_services(options(), |world| {
        let mut mixed = service(1, [&world.a1, &world.b1]);
        mixed.endpoints[0].ready = false;
        mixed.endpoints[0].serving = false;
        vec![mixed]
    })?;
    let tally = world.a2.ask_many(Call::tcp(at_vip(1, Family::V4, PORT)), 50)?;
    assert_eq!(tally.answers, BTreeMap::from([("b1".to_owned(), 50)]), "{tally:?}");
    Ok(())
}

#[test]
fn connections_to_a_terminating_backend_go_on() -> Result<()> {
    let world = World::with_services(options(), |world| vec![service(1, [&world.b1])])?;
    let clients: [(&Caller, SocketAddr); 4] = [
        (&world.lab().outside, world.node_a().at(Family::V4, node_port(1))),
        (&world.lab().far, world.node_b().at(Family::V6, node_port(1))),
        (&world.a2, at_vip(1, Family::V6, PORT)),
        (world.node_a(), at_vip(1, Family::V4, PORT)),
    ];
    let mut open = Vec::new();
    for (caller, target) in clients {
        let (call, first) = caller.open(Call::tcp(target))?;
        assert_eq!(first.server(), Some("b1"), "{}: {first}", caller.name());
        open.push((caller, call, first));
    }
    let mut draining = service(1, [&world.b1, &world.a1]);
    draining.endpoints[0].ready = false;
    draining.endpoints[0].terminating = true;
    world.cluster.manifests.apply(&draining)?;
    for (caller, target) in clients {
        eventually(SOON, || {
            let tally = caller.ask_many(Call::tcp(target), 10)?;
            ensure!(tally.answers.get("a1") == Some(&10), "{} -> {target}: {tally:?}", caller.name());
            Ok(())
        })?;
    }
    for (caller, call, first) in &open {
        assert_eq!(call.again()?, *first, "{}", caller.name());
    }
    // With nobody else left, those that still serve are better than nobody.
    draining.endpoints.truncate(1);
    world.cluster.manifests.apply(&draining)?;
    for (caller, target) in clients {
        until(caller, &Call::tcp(target), |outcome| outcome.server() == Some("b1"))?;
    }
    Ok(())
}

#[test]
fn traffic_policy_local_keeps_outside_clients_on_the_node() -> Result<()> {
    let world = World::with_services(options(), |world| {
        let mut local = service(1, [&world.a1]);
        local.spec = json!({ "externalTrafficPolicy": "Local" });
        vec![local]
    })?;
    let outside = &world.lab().outside;
    for family in Family::ALL {
        let here = outside.ask(Call::tcp(world.node_a().at(family, node_port(1))))?;
        assert_eq!(here.server(), Some("a1"), "{here}");
        assert_eq!(here.seen_as().map(|saw| saw.ip()), Some(outside.addrs.of(family)));
        let there = Call::tcp(world.node_b().at(family, node_port(1))).patience(SILENCE);
        assert_eq!(outside.ask(there)?, Outcome::TimedOut);
        // Pods and processes are not restricted by it.
        for caller in [&*world.b2, &**world.node_b()] {
            let outcome = caller.ask(Call::tcp(world.node_b().at(family, node_port(1))))?;
            assert_eq!(outcome.server(), Some("a1"), "{}: {outcome}", caller.name());
        }
    }
    Ok(())
}
