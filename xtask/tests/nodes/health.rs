//! healthCheckNodePort: what load balancers hear of a node, and who gets traffic there.
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xtask::lab::{AgentOptions, Call, Caller, Endpoint, Family, Service, Xdp, eventually};

use crate::world::{SOON, World, node_port, options, service, until};

/// The healthCheckNodePort of Service number `n`.
fn health_port(n: u8) -> u16 {
    32_000 + u16::from(n)
}

/// Service number `n` as cloud providers make it for `externalTrafficPolicy: Local`.
fn load_balancer(n: u8, service: Service) -> Service {
    let spec = json!({
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": health_port(n),
    });
    Service { spec, ..service }
}

/// Asks until the answer is this; no count: until nobody answers.
fn hears(caller: &Caller, at: SocketAddr, endpoints: Option<u64>) -> Result<()> {
    eventually(SOON, || {
        let heard = caller.get(at, "/");
        let well = match (endpoints, &heard) {
            (Some(count), Ok((status, body))) => {
                let body: Value = serde_json::from_str(body).unwrap_or_default();
                *status == if count > 0 { 200 } else { 503 }
                    && body["localEndpoints"] == count
                    && body["serviceProxyHealthy"] == true
            }
            (None, heard) => heard.is_err(),
            (Some(_), Err(_)) => false,
        };
        ensure!(well, "{at} for {}: {heard:?} instead of {endpoints:?}", caller.name());
        Ok(())
    })
}

/// Both nodes say this, to everybody who may ask.
fn nodes_say(world: &World, endpoints: [Option<u64>; 2]) -> Result<()> {
    let lab = world.lab();
    for (node, endpoints) in lab.nodes().into_iter().zip(endpoints) {
        for family in Family::ALL {
            let callers: [&Caller; 4] = [&lab.outside, &lab.far, &world.a2, &lab.node_b];
            for caller in callers {
                hears(caller, node.at(family, health_port(1)), endpoints)?;
            }
        }
    }
    Ok(())
}

/// Who answers on the nodePort of a node: for a client outside, and for a process of the node itself.
fn answers(world: &World, expected: [[Option<&str>; 2]; 2]) -> Result<()> {
    for (node, [outside, process]) in world.lab().nodes().into_iter().zip(expected) {
        for family in Family::ALL {
            let call = Call::tcp(node.at(family, node_port(1)));
            let outcome = until(&world.lab().outside, &call, |outcome| outcome.server() == outside)?;
            if outside.is_some_and(|server| server.starts_with(&node.name[5..])) {
                let client = world.lab().outside.addrs.of(family);
                ensure!(outcome.seen_as().is_some_and(|saw| saw.ip() == client), "the client is {outcome}");
            }
            until(node, &call, |outcome| outcome.server() == process)?;
        }
    }
    Ok(())
}

/// Rules 98, 125 and 130.
fn load_balancers_ask_each_node(options: AgentOptions) -> Result<()> {
    let world = World::with_services(options, |world| vec![load_balancer(1, service(1, [&world.a1]))])?;
    let manifests = &world.cluster.manifests;
    let local = |world: &World| {
        nodes_say(world, [Some(1), Some(0)])?;
        // A process is inside of the cluster: its own node serves it, wherever the endpoint is.
        answers(world, [[Some("a1"), Some("a1")], [None, Some("a1")]])
    };
    local(&world)?;

    // Traffic goes on while its last endpoint terminates, but no load balancer should send more.
    let mut draining = load_balancer(1, service(1, []));
    let terminating = Endpoint { ready: false, terminating: true, ..Endpoint::from(&world.a1) };
    draining.endpoints = vec![terminating];
    manifests.apply(&draining)?;
    nodes_say(&world, [Some(0), Some(0)])?;
    answers(&world, [[Some("a1"), Some("a1")], [None, Some("a1")]])?;

    let mut cluster = service(1, [&world.a1]);
    cluster.spec = json!({ "type": "LoadBalancer", "externalTrafficPolicy": "Cluster" });
    manifests.apply(&cluster)?;
    nodes_say(&world, [None, None])?;
    answers(&world, [[Some("a1"), Some("a1")], [Some("a1"), Some("a1")]])?;

    manifests.apply(&load_balancer(1, service(1, [&world.a1])))?;
    local(&world)?;

    // Another port, and none.
    let mut moved = load_balancer(1, service(1, [&world.a1, &world.a2]));
    moved.spec["healthCheckNodePort"] = json!(health_port(2));
    manifests.apply(&moved)?;
    hears(&world.lab().outside, world.node_a().at(Family::V4, health_port(2)), Some(2))?;
    nodes_say(&world, [None, None])?;
    manifests.delete("service-1")?;
    hears(&world.lab().outside, world.node_a().at(Family::V4, health_port(2)), None)
}

#[test]
fn load_balancers_ask_each_node_with_xdp() -> Result<()> {
    load_balancers_ask_each_node(options())
}

#[test]
fn load_balancers_ask_each_node_with_tc() -> Result<()> {
    load_balancers_ask_each_node(AgentOptions { xdp: Xdp::Off, ..options() })
}

#[test]
fn nothing_translates_what_load_balancers_ask() -> Result<()> {
    let world = World::with_services(options(), |world| vec![load_balancer(1, service(1, [&world.a1]))])?;
    nodes_say(&world, [Some(1), Some(0)])?;
    let agent = world.cluster.agent(world.node_a())?;
    let before = agent.counters()?;
    nodes_say(&world, [Some(1), Some(0)])?;
    let during = agent.counters()?.since(&before);
    let deeds: Vec<_> = during.deeds().collect();
    ensure!(deeds.is_empty(), "{deeds:?}");
    Ok(())
}

/// Rule 101.
#[test]
fn health_ports_listen_where_node_ports_answer() -> Result<()> {
    let mut options = options();
    options.args.push("--nodeport-addresses=192.0.2.0/24,203.0.113.0/24".into());
    let world = World::with_services(options, |world| vec![load_balancer(1, service(1, [&world.a1]))])?;
    let (node, outside) = (world.node_a(), &world.lab().outside);
    let in_range = node.at(Family::V4, health_port(1));
    hears(outside, in_range, Some(1))?;
    hears(node, in_range, Some(1))?;
    hears(outside, node.at(Family::V6, health_port(1)), None)?;
    hears(node, (Ipv4Addr::LOCALHOST, health_port(1)).into(), None)?;
    let added: SocketAddr = (Ipv4Addr::new(203, 0, 113, 77), health_port(1)).into();
    hears(node, added, None)?;
    node.ns.ip(
        "link add extra type veth peer name other\nlink set extra up\naddr add 203.0.113.77/32 dev extra",
    )?;
    hears(node, added, Some(1))?;
    node.ns.ip("link del extra")?;
    hears(node, added, None)?;
    hears(outside, in_range, Some(1))
}

#[test]
fn a_health_port_in_use_is_said_once_and_had_later() -> Result<()> {
    let world = World::with_services(options(), |_| vec![])?;
    let (node, outside) = (world.node_a(), &world.lab().outside);
    let occupied = node.ns.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, health_port(1))))?;
    let occupied = occupied.context("the port is free before")?;
    for n in [1, 2] {
        world.cluster.manifests.apply(&load_balancer(n, service(n, [&world.a1])))?;
    }
    // Everything else works: the other Service, the other family, and traffic.
    hears(outside, node.at(Family::V4, health_port(2)), Some(1))?;
    hears(outside, node.at(Family::V6, health_port(1)), Some(1))?;
    let call = Call::tcp(node.at(Family::V4, node_port(1)));
    until(outside, &call, |outcome| outcome.server() == Some("a1"))?;
    let agent = world.cluster.agent(node)?;
    let said = || agent.log().matches("healthCheckNodePort: cannot listen on 0.0.0.0:32001").count();
    eventually(SOON, || {
        ensure!(said() > 0, "nothing is said: {}", agent.log());
        Ok(())
    })?;
    drop(occupied);
    hears(outside, node.at(Family::V4, health_port(1)), Some(1))?;
    ensure!(said() == 1, "said {} times", said());
    Ok(())
}
