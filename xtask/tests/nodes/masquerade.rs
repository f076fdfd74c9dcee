//! `--masquerade-all`: backends see the node in place of every client, whoever that is and wherever they are.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use xtask::lab::{Agent, AgentOptions, Call, Caller, Family, Node, Outcome, Protocol, Xdp};

use crate::world::{self, AT_ONCE, Findings, PORT, World, at_vip, deaf, node_port, options, service};

/// Bytes of a transfer: many segments of any size.
const BULK: u64 = 300_000;

fn masquerading(xdp: Xdp) -> AgentOptions {
    let mut options = AgentOptions { xdp, ..options() };
    options.args.push("--masquerade-all".to_owned());
    options
}

/// Who asks, where, and the node whose agent translates it.
struct Asking<'a> {
    caller: &'a Caller,
    call: Call,
    translator: &'a Node,
}

/// Every kind of client of Service `n`, by ClusterIP and NodePort, through the node of its backend and the other one.
fn askings(world: &World, n: u8, protocol: Protocol, family: Family) -> Vec<Asking<'_>> {
    let cluster_ip = || Call::new(protocol, at_vip(n, family, PORT));
    let mut askings = vec![
        Asking { caller: &world.a2, call: cluster_ip(), translator: world.node_a() },
        Asking { caller: &world.b2, call: cluster_ip(), translator: world.node_b() },
        Asking { caller: world.node_a(), call: cluster_ip(), translator: world.node_a() },
    ];
    for node in world.lab().nodes() {
        for caller in [&*world.lab().outside, &*world.lab().far, &*world.a2, &*world.b2] {
            let call = Call::new(protocol, node.at(family, node_port(n)));
            askings.push(Asking { caller, call, translator: node });
        }
    }
    askings
}

fn backends_see_the_node(xdp: Xdp) -> Result<()> {
    let services = |world: &World| vec![service(1, [&world.a1]), service(2, [&world.b1])];
    let world = World::with_services(masquerading(xdp), services)?;
    let mut findings = Findings::default();
    for family in Family::ALL {
        for (n, backend) in [(1, &world.a1), (2, &world.b1)] {
            for protocol in Protocol::ALL {
                for Asking { caller, call, translator } in askings(&world, n, protocol, family) {
                    let outcome = caller.ask(call.clone())?;
                    let what = || format!("{} -> {call:?}: {outcome}", caller.name());
                    findings.check(outcome.server() == Some(backend.name()), what);
                    let seen = outcome.seen_as().map(|saw| saw.ip());
                    let own = translator.own_addrs(family);
                    findings.check(seen.is_some_and(|seen| own.contains(&seen)), what);
                }
                if findings.enough() {
                    findings.report();
                    return Ok(());
                }
            }
            for Asking { caller, call, .. } in askings(&world, n, Protocol::Tcp, family) {
                let transfer = caller.transfer(call.clone(), BULK);
                transfer.with_context(|| format!("{} -> {call:?}", caller.name()))?;
            }
        }
    }
    findings.report();
    Ok(())
}

#[test]
fn backends_see_the_node_in_place_of_their_clients() -> Result<()> {
    backends_see_the_node(Xdp::Native)
}

#[test]
fn backends_see_the_node_in_place_of_their_clients_by_tc() -> Result<()> {
    backends_see_the_node(Xdp::Off)
}

/// The backend tells the node; the client hears it.
#[test]
fn port_unreachable_reaches_who_is_behind_the_node() -> Result<()> {
    for xdp in [Xdp::Native, Xdp::Off] {
        let services = |world: &World| vec![deaf(1, &world.a1), deaf(2, &world.b1)];
        let world = World::with_services(masquerading(xdp), services)?;
        for (family, n) in Family::ALL.into_iter().flat_map(|family| [(family, 1), (family, 2)]) {
            for Asking { caller, call, .. } in askings(&world, n, Protocol::Udp, family) {
                let outcome = caller.ask(call.clone().patience(AT_ONCE))?;
                ensure!(outcome == Outcome::Refused, "{} -> {call:?}: {outcome}", caller.name());
            }
        }
    }
    Ok(())
}

/// Who is served because of its address keeps it, and a pod that asks there, too.
#[test]
fn external_policy_local_keeps_the_client() -> Result<()> {
    for xdp in [Xdp::Native, Xdp::Off] {
        let world = World::with_services(masquerading(xdp), |world| {
            [(1, &world.a1), (2, &world.b1)]
                .map(|(n, backend)| {
                    let mut service = service(n, [backend]);
                    service.spec = json!({ "externalTrafficPolicy": "Local" });
                    service
                })
                .into()
        })?;
        let (outside, far) = (&world.lab().outside, &world.lab().far);
        for family in Family::ALL {
            for (n, node, pod) in [(1, world.node_a(), &world.a2), (2, world.node_b(), &world.b2)] {
                let call = Call::tcp(node.at(family, node_port(n)));
                let callers: [(&Caller, _); 3] =
                    [(outside, outside.addrs), (far, far.addrs), (pod, pod.addrs)];
                for (caller, addrs) in callers {
                    let outcome = caller.ask(call.clone())?;
                    let seen = outcome.seen_as().map(|saw| saw.ip());
                    ensure!(seen == Some(addrs.of(family)), "{} -> {call:?}: {outcome}", caller.name());
                }
            }
        }
    }
    Ok(())
}

/// An agent without the flag takes over: connections go on as they are, new ones are kept apart.
#[test]
fn connections_outlive_a_restart_without_the_flag() -> Result<()> {
    let services = |world: &World| vec![service(1, [&world.a1]), service(2, [&world.b1])];
    let world = World::with_services(masquerading(Xdp::Native), services)?;
    let outside = &world.lab().outside;
    let mut open = vec![];
    for (family, n) in Family::ALL.into_iter().flat_map(|family| [(family, 1), (family, 2)]) {
        let cluster_ip = Call::tcp(at_vip(n, family, PORT));
        let node_port = Call::tcp(world.node_a().at(family, node_port(n)));
        for (caller, call) in [(&*world.a2, cluster_ip), (&**outside, node_port)] {
            open.push((caller, caller.open(call)?));
        }
    }
    for agent in world.cluster.take_agents() {
        agent.stop()?;
    }
    let (lab, manifests) = (world.lab(), &world.cluster.manifests);
    let start = |node| Agent::start(lab, node, &world::agent(), manifests, &options());
    let _agents = lab.nodes().into_iter().map(start).collect::<Result<Vec<_>>>()?;
    for (caller, (connection, first)) in &open {
        let again = connection.again()?;
        ensure!(again == *first, "{}: {again} after {first}", caller.name());
    }
    for (family, n) in Family::ALL.into_iter().flat_map(|family| [(family, 1), (family, 2)]) {
        let outcome = world.a2.ask(Call::tcp(at_vip(n, family, PORT)))?;
        let seen = outcome.seen_as().map(|saw| saw.ip());
        ensure!(seen == Some(world.a2.addrs.of(family)), "{outcome}");
    }
    Ok(())
}
