//! Direct server return: the node of a backend answers clients outside itself, whichever node they ask.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use lb_common::{Hook, Reason};
use serde_json::Value;
use xtask::lab::{AgentOptions, Call, Caller, Family, Machine, Node, Pod, Protocol, Xdp, eventually};

use crate::world::{Findings, SILENCE, SOON, World, deaf, node_port, options, service};

/// Bytes of a transfer: many segments of any size.
const BULK: u64 = 2_000_000;

fn answering(mode: &str, xdp: Xdp) -> AgentOptions {
    let mut options = AgentOptions { xdp, ..options() };
    options.args.extend(["--mode", mode].map(str::to_owned));
    options
}

fn world(mode: &str, xdp: Xdp) -> Result<World> {
    let services = |world: &World| vec![service(1, [&world.a1]), service(2, [&world.b1])];
    World::with_services(answering(mode, xdp), services)
}

/// Nodes that are asked, and the backend on the other one.
fn ways(world: &World) -> [(&Node, u8, &Pod); 2] {
    [(world.node_a(), 2, &world.b1), (world.node_b(), 1, &world.a1)]
}

/// What has come in through the uplink of a node, bytes.
fn received(node: &Node) -> Result<u64> {
    let output = node.ns.run(|| Command::new("ip").args(["-s", "-j", "link", "show", "eth0"]).output())??;
    let links: Value = serde_json::from_slice(&output.stdout).context("`ip -j`")?;
    links[0]["stats64"]["rx"]["bytes"].as_u64().context("a count of bytes")
}

/// Counted at a node, at whichever hook takes what comes in.
fn counted(world: &World, node: &Node, reason: Reason) -> Result<u64> {
    let counters = xtask::lab::Counters::read(&world.lab().pins(node))?;
    Ok(counters.get(Hook::Xdp, reason) + counters.get(Hook::NicIn, reason))
}

/// Asks until the backend answers: nodes learn of each other one after the other.
fn seen(caller: &Caller, call: &Call, backend: &Pod) -> Result<IpAddr> {
    eventually(SOON, || {
        let outcome = caller.ask(call.clone().patience(SILENCE))?;
        let seen = outcome.seen_as().filter(|_| outcome.server() == Some(backend.name()));
        seen.map(|seen| seen.ip()).with_context(|| format!("{} -> {call:?}: {outcome}", caller.name()))
    })
}

fn backends_answer_clients_themselves(xdp: Xdp) -> Result<()> {
    let world = world("dsr", xdp)?;
    let lab = world.lab();
    let mut findings = Findings::default();
    for family in Family::ALL {
        for (node, n, backend) in ways(&world) {
            for machine in [&lab.outside, &lab.far] {
                for protocol in Protocol::ALL {
                    let call = Call::new(protocol, node.at(family, node_port(n)));
                    let who = || format!("{} -> {call:?}", machine.name());
                    let seen = seen(machine, &call, backend)?;
                    findings.check(seen == machine.addrs.of(family), || format!("{}: {seen}", who()));
                    let before = received(node)?;
                    let transfer = machine.transfer(call.clone(), BULK);
                    findings.take(transfer, who);
                    // What the client sends, and none of what it is sent.
                    let came = received(node)? - before;
                    findings.check(came < BULK * 3 / 2, || format!("{}: {came} bytes came in", who()));
                }
            }
            findings.check(counted(&world, node, Reason::Tunnelled)? > 0, || "nothing tunnelled".to_owned());
        }
    }
    findings.report();
    Ok(())
}

#[test]
fn backends_answer_clients_themselves_by_xdp() -> Result<()> {
    backends_answer_clients_themselves(Xdp::Native)
}

#[test]
fn backends_answer_clients_themselves_by_tc() -> Result<()> {
    backends_answer_clients_themselves(Xdp::Off)
}

/// A Service's own word goes before that of the agents.
#[test]
fn hybrid_is_for_tcp_and_a_service_may_choose() -> Result<()> {
    let world = world("hybrid", Xdp::Native)?;
    let outside = &world.lab().outside;
    let (node, backend) = (world.node_a(), &world.b1);
    let check = |annotation: Option<&str>, kept: [bool; 2]| -> Result<()> {
        let mut service = service(2, [backend]);
        service.annotations.extend(annotation.map(|mode| ("fairlead.io/mode".to_owned(), mode.to_owned())));
        world.cluster.manifests.apply(&service)?;
        for family in Family::ALL {
            for (protocol, kept) in Protocol::ALL.into_iter().zip(kept) {
                let call = Call::new(protocol, node.at(family, node_port(2)));
                let expected = if kept { outside.addrs } else { node.addrs }.of(family);
                eventually(SOON, || {
                    let seen = seen(outside, &call, backend)?;
                    ensure!(seen == expected, "{annotation:?}: {protocol} seen as {seen}, not {expected}");
                    Ok(())
                })?;
            }
        }
        Ok(())
    };
    check(None, [true, false])?;
    check(Some("dsr"), [true, true])?;
    check(Some("snat"), [false, false])?;
    check(Some("nonsense"), [true, false])
}

/// A port unreachable of the backend finds the client, and packets that do not fit are answered.
#[test]
fn errors_and_narrow_ways_are_told() -> Result<()> {
    for xdp in [Xdp::Native, Xdp::Off] {
        let world = world("dsr", xdp)?;
        world.cluster.manifests.apply(&deaf(3, &world.b1))?;
        let far = &world.lab().far;
        for family in Family::ALL {
            let call = Call::udp(world.node_a().at(family, node_port(3)));
            crate::world::until(far, &call, |outcome| *outcome == xtask::lab::Outcome::Refused)?;
            // Answers that do not fit: the router tells the frontend, whose node hands it on.
            let call = Call::tcp(world.node_a().at(family, node_port(2)));
            seen(far, &call, &world.b1)?;
        }
        world.lab().narrow_far(1300)?;
        for family in Family::ALL {
            let call = Call::tcp(world.node_a().at(family, node_port(2)));
            far.transfer(call.clone(), BULK).with_context(|| format!("{xdp:?}: {call:?}"))?;
        }
    }
    Ok(())
}

/// Headers of a tunnel of ours, for a backend, with nothing of interest inside.
fn forged(backend: SocketAddr) -> Vec<u8> {
    let (SocketAddr::V4(backend), mut bytes) = (backend, vec![3, 0x40, 8, 0]) else { return vec![] };
    bytes.extend([0xfa, 0x1e, 0xad, 0, 0xff, 0xf5, 0x81, 2]);
    bytes.extend(backend.ip().octets());
    bytes.extend(backend.port().to_be_bytes());
    bytes.extend([6, 0]);
    bytes.extend([0; 60]);
    bytes
}

/// Who is no node of the cluster is not believed.
#[test]
fn strangers_tunnel_nothing() -> Result<()> {
    for xdp in [Xdp::Native, Xdp::Off] {
        let world = world("dsr", xdp)?;
        let (outside, node): (&Machine, _) = (&world.lab().outside, world.node_b());
        let call = Call::tcp(world.node_a().at(Family::V4, node_port(2)));
        seen(outside, &call, &world.b1)?;
        let before = counted(&world, node, Reason::TunnelStranger)?;
        let bytes = forged(world.b1.at(Family::V4, crate::world::TARGET_PORT));
        outside.ns.run(|| -> Result<()> {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.send_to(&bytes, node.at(Family::V4, 6081))?;
            Ok(())
        })??;
        eventually(SOON, || {
            let after = counted(&world, node, Reason::TunnelStranger)?;
            ensure!(after == before + 1, "{xdp:?}: {after} after {before}");
            Ok(())
        })?;
    }
    Ok(())
}
