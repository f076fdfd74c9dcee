//! One client port, many ways to one backend, all at the same time: every connection carries its own bytes.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use xtask::lab::client::OpenCall;
use xtask::lab::{AgentOptions, Call, Caller, Family, Outcome, Pod, Protocol, Xdp, eventually};

use crate::cells::Frontend;
use crate::world::{Findings, SILENCE, SOON, TARGET_PORT, World, balanced, options};

/// How often each connection exchanges its bytes while all of them are open.
const ROUNDS: usize = 3;

/// Every way from a client to a backend, with words for it: two Services, both nodes, and the backend itself.
fn ways(world: &World, backend: &Pod, family: Family, direct_first: bool) -> Vec<(String, SocketAddr)> {
    let nodes = world.lab().nodes();
    let mut ways: Vec<(String, SocketAddr)> = [1, 2]
        .into_iter()
        .flat_map(|n| {
            [
                ("ClusterIP", Frontend::ClusterIp),
                ("load-balancer IP", Frontend::LoadBalancerIp),
                ("externalIP", Frontend::ExternalIp),
                ("nodePort of node-a", Frontend::NodePort(nodes[0])),
                ("nodePort of node-b", Frontend::NodePort(nodes[1])),
            ]
            .map(|(name, frontend)| (format!("{name} {n}"), frontend.target(n, family)))
        })
        .collect();
    let direct = ("direct".to_owned(), backend.at(family, TARGET_PORT));
    ways.insert(if direct_first { 0 } else { ways.len() }, direct);
    ways
}

/// Opens all the ways from one port, and has each exchange its bytes while the others are open.
fn all_at_once(
    findings: &mut Findings,
    client: &Caller,
    backend: &Pod,
    protocol: Protocol,
    port: u16,
    ways: &[(String, SocketAddr)],
) {
    let mut open: Vec<(&str, SocketAddr, OpenCall<'_>, Outcome)> = Vec::new();
    for (way, target) in ways {
        let what = || format!("{} port {port} {protocol} -> {way} {target}", client.name());
        let call = Call::new(protocol, *target).from_port(port).patience(SILENCE);
        let Some((call, first)) = findings.take(client.open(call), what) else { continue };
        let fine = first.server() == Some(backend.name()) && is_between(&first, port, *target);
        findings.check(fine, || format!("{}: {first:?}", what()));
        open.push((way, *target, call, first));
    }
    // Two that the backend cannot tell apart would get each other's bytes.
    let mut seen: Vec<_> = open.iter().filter_map(|(.., first)| first.seen_as()).collect();
    seen.sort_unstable();
    let count = seen.len();
    seen.dedup();
    findings.check(seen.len() == count, || format!("{} of {count} sources differ", seen.len()));
    for round in 0..ROUNDS {
        for (way, target, call, first) in open.iter().rev() {
            let what = || format!("{} port {port} {protocol} -> {way} {target}", client.name());
            if let Some(again) = findings.take(call.again(), what) {
                findings.check(again == *first, || format!("{}, round {round}: {again:?}", what()));
            }
        }
    }
}

/// Whether the client has an answer from whom it asked, at the port it asked from.
fn is_between(outcome: &Outcome, port: u16, target: SocketAddr) -> bool {
    matches!(outcome, Outcome::Answer(answer) if answer.local.port() == port && answer.peer == target)
}

fn one_port_by_every_way(options: AgentOptions) -> Result<()> {
    let world =
        World::with_services(options, |world| vec![balanced(1, [&world.a1]), balanced(2, [&world.a1])])?;
    world.route_services_through(world.node_b())?;
    let pods = ["10.244.1.0/24", "fd00:10:244:1::/64"];
    world.lab().route_through(world.node_a(), &pods)?;
    let mut findings = Findings::default();
    let lab = world.lab();
    let mut port = 20_000;
    for client in [&*world.a2, &*world.b2, &*lab.outside, &*lab.far] {
        for (protocol, family) in Protocol::ALL.into_iter().flat_map(|p| Family::ALL.map(|f| (p, f))) {
            for direct_first in [false, true] {
                port += 1;
                let ways = ways(&world, &world.a1, family, direct_first);
                all_at_once(&mut findings, client, &world.a1, protocol, port, &ways);
                if findings.enough() {
                    findings.report();
                    return Ok(());
                }
            }
        }
    }
    findings.report();
    Ok(())
}

/// Issue: the same client port through two frontends to one backend, and to the backend itself, at the same time.
#[test]
fn one_client_port_by_every_way_at_once() -> Result<()> {
    one_port_by_every_way(options())
}

/// The same where no XDP comes first.
#[test]
fn one_client_port_by_every_way_at_once_with_tc_alone() -> Result<()> {
    one_port_by_every_way(AgentOptions { xdp: Xdp::Off, ..options() })
}

/// Sockets of the node's own processes are connected to the backend itself: the kernel has a tuple once.
#[test]
fn a_bound_port_of_a_process_meets_a_backend_once() -> Result<()> {
    let world =
        World::with_services(options(), |world| vec![balanced(1, [&world.a1]), balanced(2, [&world.a1])])?;
    for family in Family::ALL {
        let call = |n| Call::tcp(Frontend::ClusterIp.target(n, family)).from_port(20_000).patience(SILENCE);
        let (first, outcome) = world.node_a().open(call(1))?;
        ensure!(outcome.server() == Some("a1"), "{outcome}");
        let second = world.node_a().ask(call(2))?;
        ensure!(matches!(&second, Outcome::Failed(error) if error.contains("os error 99")), "{second}");
        ensure!(first.again()? == outcome);
    }
    Ok(())
}

/// Rule 153: with further addresses of the device as sources there is room for more connections to one backend.
fn connections_are_spread_over_further_addresses(xdp: Xdp) -> Result<()> {
    const CONNECTIONS: usize = 48;
    let args = ["--source-addresses=192.0.2.0/24,2001:db8::/64".to_owned()].to_vec();
    let world = World::with_services(AgentOptions { xdp, args, ..options() }, |world| {
        vec![balanced(1, [&world.b1])]
    })?;
    let (node, outside) = (world.node_a(), &world.lab().outside);
    let further: Vec<IpAddr> = (70..73)
        .flat_map(|n| [IpAddr::from([192, 0, 2, n]), format!("2001:db8::{n}").parse().expect("an address")])
        .collect();
    for addr in &further {
        let (len, more) = if addr.is_ipv4() { (24, "") } else { (64, " nodad") };
        node.ns.ip(&format!("addr add {addr}/{len} dev eth0{more}\n"))?;
    }
    for family in Family::ALL {
        let target = Frontend::NodePort(node).target(1, family);
        let own = node.at(family, 0).ip();
        eventually(SOON, || {
            let mut open = Vec::new();
            for _ in 0..CONNECTIONS {
                open.push(outside.open(Call::tcp(target))?);
            }
            let mut sources: Vec<IpAddr> =
                open.iter().filter_map(|(_, first)| Some(first.seen_as()?.ip())).collect();
            sources.sort_unstable();
            sources.dedup();
            let of_family = further.iter().filter(|addr| addr.is_ipv4() == own.is_ipv4()).copied();
            let mut expected: Vec<IpAddr> = of_family.chain([own]).collect();
            expected.sort_unstable();
            ensure!(sources == expected, "{target}: backends saw {sources:?} of {expected:?}");
            for (call, first) in &open {
                ensure!(call.again()? == *first, "{target}: {first}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn connections_are_spread_over_further_addresses_by_xdp() -> Result<()> {
    connections_are_spread_over_further_addresses(Xdp::Native)
}

#[test]
fn connections_are_spread_over_further_addresses_by_tc() -> Result<()> {
    connections_are_spread_over_further_addresses(Xdp::Off)
}
