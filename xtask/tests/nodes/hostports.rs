//! Host ports: `nodeIP:hostPort` leads to the Pod that has it, from everywhere, for as long as it has it.
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::lab::{Call, Caller, Family, Protocol};

use crate::world::{Findings, SILENCE, TARGET_PORT, World, node_port, options, service, until};

const HOST_PORT: u16 = 8443;

fn localhost(family: Family, port: u16) -> SocketAddr {
    match family {
        Family::V4 => SocketAddr::from(([127, 0, 0, 1], port)),
        Family::V6 => SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], port)),
    }
}

/// The same port of both protocols, of different Pods.
fn with_host_ports(args: &[&str]) -> Result<World> {
    let mut options = options();
    options.args.extend(args.iter().map(|arg| (*arg).to_owned()));
    let world = World::new(options)?;
    let manifests = &world.cluster.manifests;
    manifests.apply_pod(&world.a1, &[(Protocol::Tcp, "", HOST_PORT, TARGET_PORT)])?;
    manifests.apply_pod(&world.a2, &[(Protocol::Udp, "", HOST_PORT, TARGET_PORT)])?;
    manifests.apply(&service(1, [&world.b1]))?;
    world.cluster.start()?;
    Ok(world)
}

/// Who calls, and whether its own address is what the Pod sees.
fn clients(world: &World) -> [(&Caller, bool); 6] {
    let lab = world.lab();
    [
        (&lab.outside, true),
        (&lab.far, true),
        (&world.a2, true),
        (&world.b1, false),
        (&lab.node_a, false),
        (&lab.node_b, false),
    ]
}

fn leads_to_its_pod_from_everywhere(world: &World) -> Result<()> {
    let mut findings = Findings::default();
    let node = world.node_a();
    for family in Family::ALL {
        for (protocol, server) in [(Protocol::Tcp, &world.a1), (Protocol::Udp, &world.a2)] {
            for (client, keeps) in clients(world) {
                let call = Call::new(protocol, node.at(family, HOST_PORT));
                let what = format!("{} -> {call:?}", client.name());
                let Some(outcome) = findings.take(client.ask(call.clone()), || what.clone()) else {
                    continue;
                };
                let right = outcome.server() == Some(server.name());
                findings.check(right, || format!("{what}: {outcome}, not {}", server.name()));
                let hairpin = client.name() == server.name();
                if let (true, Some(saw)) = (keeps && !hairpin, outcome.seen_as()) {
                    let own = client_addr(world, client, family);
                    findings
                        .check(own.is_none_or(|own| own == saw.ip()), || format!("{what}: seen as {saw}"));
                }
                let transfer = findings.take(client.transfer(call, 1_000_000), || what.clone());
                findings.check(transfer.is_none_or(|t| t.server == server.name()), || {
                    format!("{what}: elsewhere")
                });
            }
            for call in [
                Call::new(protocol, localhost(family, HOST_PORT)),
                Call::new(protocol, localhost(family, HOST_PORT)).unconnected(),
                Call::new(protocol, node.at(family, HOST_PORT)).unconnected(),
            ] {
                let what = format!("process -> {call:?}");
                let Some(outcome) = findings.take(node.ask(call), || what.clone()) else { continue };
                findings.check(outcome.server() == Some(server.name()), || format!("{what}: {outcome}"));
            }
            // The other node has no such Pod.
            let call = Call::new(protocol, world.node_b().at(family, HOST_PORT)).patience(SILENCE);
            let outcome = world.lab().outside.ask(call)?;
            findings.check(outcome.server().is_none(), || format!("the other node: {outcome}"));
        }
    }
    findings.report();
    Ok(())
}

fn client_addr(world: &World, client: &Caller, family: Family) -> Option<std::net::IpAddr> {
    let lab = world.lab();
    [(&*lab.outside, lab.outside.addrs), (&*lab.far, lab.far.addrs), (&*world.a2, world.a2.addrs)]
        .into_iter()
        .find_map(|(known, addrs)| (known.name() == client.name()).then(|| addrs.of(family)))
}

#[test]
fn a_host_port_leads_to_its_pod_from_everywhere() -> Result<()> {
    leads_to_its_pod_from_everywhere(&with_host_ports(&[])?)
}

#[test]
fn nodeport_addresses_do_not_restrict_host_ports() -> Result<()> {
    let world = with_host_ports(&["--nodeport-addresses", "198.51.100.0/24"])?;
    leads_to_its_pod_from_everywhere(&world)?;
    let call = Call::tcp(world.node_a().at(Family::V4, node_port(1))).patience(SILENCE);
    let outcome = world.lab().outside.ask(call)?;
    ensure!(outcome.server().is_none(), "a NodePort answers where it should not: {outcome}");
    // Nobody tells it of the flag: the maps do.
    let manifests = world.cluster.manifests.dir().display().to_string();
    let explained = |port| {
        let at = world.node_a().at(Family::V4, port).to_string();
        let arguments = ["explain", &at, "--manifests", &manifests, "--node-name", &world.node_a().name];
        world.cluster.fairlead(world.node_a(), &arguments)
    };
    let told = explained(node_port(1))?;
    ensure!(told.contains("error    node-port-address\n"), "{told}");
    let told = explained(HOST_PORT)?;
    ensure!(!told.contains("node-port-address"), "{told}");
    Ok(())
}

/// Rule 147.
#[test]
fn one_host_port_by_address_and_protocol() -> Result<()> {
    let world = World::new(options())?;
    let node = world.node_a();
    let [v4, v6] = node.addrs.both().map(|addr| addr.to_string());
    let manifests = &world.cluster.manifests;
    manifests.apply_pod(
        &world.a1,
        &[(Protocol::Tcp, "127.0.0.1", 54321, TARGET_PORT), (Protocol::Tcp, &v6, 54321, TARGET_PORT)],
    )?;
    manifests.apply_pod(
        &world.a2,
        &[(Protocol::Tcp, &v4, 54321, TARGET_PORT), (Protocol::Udp, &v4, 54321, TARGET_PORT)],
    )?;
    world.cluster.start()?;
    let outside = &world.lab().outside;
    let process: &Caller = node;
    for (client, call, server) in [
        (process, Call::tcp(localhost(Family::V4, 54321)), Some("a1")),
        (process, Call::tcp(node.at(Family::V4, 54321)), Some("a2")),
        (outside, Call::tcp(node.at(Family::V4, 54321)), Some("a2")),
        (outside, Call::udp(node.at(Family::V4, 54321)), Some("a2")),
        (outside, Call::tcp(node.at(Family::V6, 54321)), Some("a1")),
        (outside, Call::udp(node.at(Family::V6, 54321)), None),
        (process, Call::udp(localhost(Family::V4, 54321)), None),
    ] {
        let outcome = client.ask(call.clone().patience(SILENCE))?;
        ensure!(outcome.server() == server, "{} -> {call:?}: {outcome}, not {server:?}", client.name());
    }
    Ok(())
}

#[test]
fn a_host_port_goes_with_its_pod_and_is_free_for_the_next() -> Result<()> {
    let world = with_host_ports(&[])?;
    let manifests = &world.cluster.manifests;
    let call = Call::tcp(world.node_a().at(Family::V4, HOST_PORT));
    let outside = &world.lab().outside;
    until(outside, &call, |outcome| outcome.server() == Some("a1"))?;
    manifests.delete_pod(&world.a1)?;
    until(outside, &call, |outcome| outcome.server().is_none())?;
    let ports = [(Protocol::Tcp, "", HOST_PORT, TARGET_PORT), (Protocol::Udp, "", HOST_PORT, TARGET_PORT)];
    manifests.apply_pod(&world.a2, &ports)?;
    until(outside, &call, |outcome| outcome.server() == Some("a2"))?;
    Ok(())
}

fn bpftool(args: &[&str], pin: &Path) -> Result<Value> {
    let output = Command::new("bpftool").arg("-j").args(args).arg("pinned").arg(pin).output()?;
    ensure!(output.status.success(), "bpftool {args:?}: {}", String::from_utf8_lossy(&output.stdout));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Whose the host port is, by the pinned maps alone: owner, namespace, name, connections.
fn shown(world: &World) -> Result<(Value, u64)> {
    let text = world.cluster.fairlead(world.node_a(), &["services", "-o", "json"])?;
    let frontends: Vec<Value> = serde_json::from_str(&text)?;
    let is_ours = |frontend: &&Value| {
        frontend["port"] == HOST_PORT && frontend["protocol"] == "TCP" && frontend["family"] == "IPv4"
    };
    let ours = frontends.iter().find(is_ours).with_context(|| text.clone())?;
    let what = ["kind", "address", "owner", "namespace", "name"].map(|field| ours[field].clone());
    Ok((what.to_vec().into(), ours["usage"]["connections"].as_u64().context("no usage")?))
}

#[test]
fn a_host_port_works_and_is_named_while_no_agent_runs() -> Result<()> {
    let world = with_host_ports(&[])?;
    let call = Call::tcp(world.node_a().at(Family::V4, HOST_PORT));
    until(&world.lab().outside, &call, |outcome| outcome.server() == Some("a1"))?;
    for agent in world.cluster.take_agents() {
        agent.kill()?;
    }
    let (what, before) = shown(&world)?;
    ensure!(what == serde_json::json!(["HostPort", null, "Pod", "default", "a1"]), "{what}");
    ensure!(world.lab().outside.ask(call.clone())?.server() == Some("a1"), "not answered");
    ensure!(shown(&world)? == (what.clone(), before + 1), "{:?} after {before}", shown(&world)?);
    let table = world.cluster.fairlead(world.node_a(), &["services"])?;
    let named = |line: &str| line.contains("HostPort") && line.contains("default/a1");
    ensure!(table.lines().any(named), "{table}");
    ensure!(
        table.lines().any(|line| line.contains("NodePort") && line.contains("default/service-1")),
        "{table}"
    );
    // Nobody needs Fairlead to read it.
    let dump = bpftool(&["map", "dump"], &world.lab().pins(world.node_a()).join("v1/NAMES"))?;
    let named = |entry: &Value| {
        entry["formatted"]["value"]["name"] == "a1" && entry["formatted"]["value"]["kind"] == 2
    };
    ensure!(dump.as_array().is_some_and(|entries| entries.iter().any(named)), "{dump}");
    // The next agent finds everything as it should be.
    world.cluster.start()?;
    until(&world.lab().outside, &call, |outcome| outcome.server() == Some("a1"))?;
    ensure!(shown(&world)?.0 == what, "{:?}", shown(&world)?);
    Ok(())
}
