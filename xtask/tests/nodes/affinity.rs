//! `sessionAffinity: ClientIP`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;
use xtask::lab::{Call, Family, Node, Protocol, Service, eventually};

use crate::cells::{Client, Frontend, Kind, each_at_once};
use crate::world::{SILENCE, SOON, World, balanced, node_port, of_family, options, until, until_only};

/// s.
const TIME_OUT: u64 = 5;

fn sticky(mut service: Service) -> Service {
    service.spec["sessionAffinity"] = json!("ClientIP");
    service.spec["sessionAffinityConfig"] = json!({ "clientIP": { "timeoutSeconds": TIME_OUT } });
    service
}

/// Every address by which one node sees this client ask for Service number `n`; for outside clients that is `via`.
fn targets(client: &Client<'_>, via: &Node, n: u8, family: Family) -> Vec<SocketAddr> {
    let node = client.home.unwrap_or(via);
    let frontends =
        [Frontend::ClusterIp, Frontend::LoadBalancerIp, Frontend::ExternalIp, Frontend::NodePort(node)];
    let mut targets = frontends.map(|frontend| frontend.target(n, family)).to_vec();
    if client.kind == Kind::Process {
        let loopback: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        targets.push(SocketAddr::new(of_family(loopback, family), node_port(n)));
    }
    targets
}

/// Rules 118, 140: one endpoint for a client by every frontend and edge, until it has been idle for the time-out.
#[test]
fn a_client_keeps_its_endpoint_until_it_has_been_idle() -> Result<()> {
    // One Service is asked all the time, the others are left alone; with each of them a client that is forgotten
    // gets its endpoint again by chance in one of two cases.
    const BUSY: u8 = 1;
    const IDLE: [u8; 4] = [2, 3, 4, 5];
    let world = World::with_services(options(), |world| {
        (1..=5).map(|n| sticky(balanced(n, [&world.a1, &world.b1]))).collect()
    })?;
    world.route_services_through(world.node_a())?;
    let node_a = world.node_a();
    let moved = each_at_once(&world.clients(), |client| {
        // A UDP socket on a port that one before it had would go on with that one's flow.
        let next_port = AtomicU16::new(10_000);
        let ask = |n, family, protocol, target| -> Result<String> {
            let from = next_port.fetch_add(1, Ordering::Relaxed);
            let outcome = client.caller.ask(Call::new(protocol, target).from_port(from))?;
            let server = outcome.server().map(str::to_owned);
            ensure!(server.is_some(), "{} -> Service {n}, {family:?}: {outcome}", client.caller.name());
            Ok(server.unwrap_or_default())
        };
        let every = |n, family, protocol| -> Result<String> {
            let targets = targets(client, node_a, n, family);
            let first = ask(n, family, protocol, targets[0])?;
            for target in targets.iter().cycle().take(12) {
                let server = ask(n, family, protocol, *target)?;
                let who = client.caller.name();
                ensure!(server == first, "{who} -> {target}, {protocol}: {server} after {first}");
            }
            Ok(first)
        };
        let all =
            || Family::ALL.into_iter().flat_map(|family| Protocol::ALL.map(|protocol| (family, protocol)));
        let mut before = Vec::new();
        for (family, protocol) in all() {
            for n in IDLE {
                before.push((n, family, protocol, every(n, family, protocol)?));
            }
        }
        let begin = Instant::now();
        let mut kept = Vec::new();
        for (family, protocol) in all() {
            kept.push((family, protocol, every(BUSY, family, protocol)?));
        }
        // Longer than the time-out, which counts from the last connection.
        while begin.elapsed() < Duration::from_secs(TIME_OUT + 1) {
            let last = Instant::now();
            thread::sleep(Duration::from_millis(400));
            for (family, protocol, server) in &mut kept {
                let now = ask(BUSY, *family, *protocol, targets(client, node_a, BUSY, *family)[0])?;
                // A machine that slept proves nothing.
                if last.elapsed() < Duration::from_secs(TIME_OUT - 1) {
                    ensure!(now == *server, "{}: {now} after {server}", client.caller.name());
                }
                *server = now;
            }
        }
        let mut moved = 0;
        for (n, family, protocol, server) in before {
            if every(n, family, protocol)? != server {
                moved += 1;
            }
        }
        Ok((client.caller.name(), moved))
    })?;
    for (who, moved) in moved {
        // 16 chances of 1/2 each.
        ensure!(moved > 0, "{who} kept every endpoint beyond the time-out");
    }
    Ok(())
}

/// Rules 118 and 148: switched on and off; an endpoint that is gone or that the policy excludes is not kept.
#[test]
fn affinity_is_switched_and_gives_way_to_changes() -> Result<()> {
    let world = World::with_services(options(), |world| {
        let both = balanced(1, [&world.a1, &world.b1]);
        vec![both, sticky(balanced(2, [&world.b1])), sticky(balanced(3, [&world.b1]))]
    })?;
    world.route_services_through(world.node_a())?;
    let (manifests, node_port) = (&world.cluster.manifests, Frontend::NodePort(world.node_a()));
    let clients = [
        (&*world.lab().outside, node_port),
        (&*world.a2, Frontend::ClusterIp),
        (&*world.b2, Frontend::LoadBalancerIp),
        (&**world.node_b(), Frontend::ClusterIp),
    ];
    let both = balanced(1, [&world.a1, &world.b1]);
    for family in Family::ALL {
        for (caller, frontend) in clients {
            until_only(caller, &Call::tcp(frontend.target(1, family)), &["a1", "b1"])?;
        }
        manifests.apply(&sticky(both.clone()))?;
        for (caller, frontend) in clients {
            eventually(SOON, || {
                let call = Call::tcp(frontend.target(1, family)).patience(SILENCE);
                let tally = caller.ask_many(call, 24)?;
                ensure!(
                    tally.failures.is_empty() && tally.answers.len() == 1,
                    "{}: {tally:?}",
                    caller.name()
                );
                Ok(())
            })?;
        }
        manifests.apply(&both)?;
    }
    // Service 2 excludes what the client has by its policy, service 3 does not.
    for n in [2, 3] {
        for (caller, frontend) in clients {
            assert_eq!(caller.ask(Call::tcp(frontend.target(n, Family::V4)))?.server(), Some("b1"));
        }
    }
    manifests.apply(&sticky(balanced(3, [&world.a1, &world.b1])))?;
    let mut local = sticky(balanced(2, [&world.a1, &world.b1]));
    local.spec["externalTrafficPolicy"] = json!("Local");
    manifests.apply(&local)?;
    let [(outside, _), inside @ ..] = clients;
    let at_node_port = |n| Call::tcp(node_port.target(n, Family::V4));
    until_only(outside, &at_node_port(2), &["a1"])?;
    until_only(outside, &at_node_port(3), &["b1"])?;
    for (caller, frontend) in inside {
        until_only(caller, &Call::tcp(frontend.target(2, Family::V4)), &["b1"])?;
    }
    // What is gone is not kept, and is not taken up again when it comes back.
    manifests.apply(&sticky(balanced(3, [&world.a1])))?;
    until_only(outside, &at_node_port(3), &["a1"])?;
    manifests.apply(&sticky(balanced(3, [&world.a1, &world.b1])))?;
    until(&world.lab().far, &at_node_port(3), |outcome| outcome.server().is_some())?;
    until_only(outside, &at_node_port(3), &["a1"])
}
