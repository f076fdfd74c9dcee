//! SCTP through every edge that sees packets: the lab answers only what has the right checksum.

use std::net::SocketAddr;

use anyhow::Result;
use xtask::lab::{AgentOptions, Call, Caller, Endpoint, Family, Outcome, Pod, Port, Protocol, Service, Xdp};

use crate::world::{
    AT_ONCE, Findings, PORT, TARGET_PORT, World, at_vip, node_port, options, service, until, vip,
};

/// A port of each protocol, of the same number.
fn with_sctp<'a>(n: u8, endpoints: impl IntoIterator<Item = &'a Pod>) -> Service {
    service(n, endpoints).port(sctp_port(n))
}

fn sctp_port(n: u8) -> Port {
    Port::new(Protocol::Sctp, PORT, TARGET_PORT).node_port(node_port(n))
}

/// Service 1 on node-a, Service 2 on node-b, Service 3 nowhere.
fn world(options: AgentOptions) -> Result<World> {
    World::with_services(options, |world| {
        vec![with_sctp(1, [&world.a1]), with_sctp(2, [&world.b1]), with_sctp(3, [])]
    })
}

fn sctp(target: SocketAddr) -> Call {
    Call::new(Protocol::Sctp, target)
}

/// Rules 137 and 145, except for what a process of a node asks of its own node.
fn associations_reach_their_services(options: AgentOptions) -> Result<()> {
    let world = world(options)?;
    for pod in world.pods() {
        pod.listen(Protocol::Sctp, TARGET_PORT)?;
    }
    world.route_services_through(world.node_a())?;
    let (outside, node_a, node_b) = (&world.lab().outside, world.node_a(), world.node_b());
    let mut findings = Findings::default();
    for family in Family::ALL {
        let from_outside = [
            (node_a.at(family, node_port(1)), "a1", true),
            (node_a.at(family, node_port(2)), "b1", false),
            (node_b.at(family, node_port(1)), "a1", false),
            (node_b.at(family, node_port(2)), "b1", true),
            (at_vip(1, family, PORT), "a1", true),
            (at_vip(2, family, PORT), "b1", false),
        ];
        let mut calls: Vec<(&Caller, SocketAddr, &str, bool)> =
            from_outside.map(|(target, server, kept)| (&**outside, target, server, kept)).to_vec();
        for pod in [&world.a2, &world.b2] {
            calls.push((pod, at_vip(1, family, PORT), "a1", true));
            calls.push((pod, at_vip(2, family, PORT), "b1", true));
        }
        // A pod that is its own backend sees its Service.
        calls.push((&world.a1, at_vip(1, family, PORT), "a1", false));
        // A process of a node is a client from outside to another node.
        calls.push((node_b, node_a.at(family, node_port(1)), "a1", true));
        // One port each: the same through two frontends to one backend could not be kept.
        for (port, (caller, target, server, kept)) in (41000..).zip(calls) {
            let outcome = caller.ask(sctp(target).from_port(port))?;
            let what = || format!("{} -> {target}: {outcome}", caller.name());
            findings.check(outcome.server() == Some(server), what);
            let Outcome::Answer(answer) = &outcome else { continue };
            findings.check((answer.introduction.saw == answer.local) == kept, what);
        }
    }
    findings.report();
    Ok(())
}

#[test]
fn sctp_reaches_its_services_from_outside_and_from_pods() -> Result<()> {
    associations_reach_their_services(options())
}

#[test]
fn sctp_reaches_its_services_from_outside_and_from_pods_by_tc() -> Result<()> {
    associations_reach_their_services(AgentOptions { xdp: Xdp::Off, ..options() })
}

#[test]
fn sctp_without_endpoints_is_refused_at_once() -> Result<()> {
    let world = world(options())?;
    let mut findings = Findings::default();
    for family in Family::ALL {
        for (caller, target) in [
            (&*world.lab().outside, world.node_a().at(family, node_port(3))),
            (&*world.a2, at_vip(3, family, PORT)),
            (&*world.a2, at_vip(1, family, TARGET_PORT)),
        ] {
            let outcome = caller.ask(sctp(target).patience(AT_ONCE))?;
            findings
                .check(outcome == Outcome::Refused, || format!("{} -> {target}: {outcome}", caller.name()));
        }
    }
    findings.report();
    Ok(())
}

/// Rules 113 and 127: the ports of one number come and go each for itself.
#[test]
fn sctp_ends_and_begins_without_the_other_protocols() -> Result<()> {
    let world = world(options())?;
    world.a1.listen(Protocol::Sctp, TARGET_PORT)?;
    let target = world.node_a().at(Family::V4, node_port(1));
    let (outside, manifests) = (&world.lab().outside, &world.cluster.manifests);
    let answers = |protocol| until(outside, &Call::new(protocol, target), |it| it.server() == Some("a1"));
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        answers(protocol)?;
    }
    manifests.apply(&service(1, [&world.a1]))?;
    until(outside, &sctp(target), |it| it.server().is_none())?;
    answers(Protocol::Tcp)?;
    let mut alone = Service::new("service-1", &vip(1)).port(sctp_port(1));
    alone.endpoints = vec![Endpoint::from(&world.a1)];
    manifests.apply(&alone)?;
    answers(Protocol::Sctp)?;
    until(outside, &Call::tcp(target), |it| it.server().is_none())?;
    Ok(())
}
