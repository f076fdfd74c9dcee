//! ICMP errors about translated packets reach whoever sent them, in their own words.

use anyhow::{Context as _, Result, ensure};
use xtask::lab::{AgentOptions, Call, Caller, Family, Outcome, Service, Xdp};

use crate::world::{AT_ONCE, PORT, World, at_vip, deaf, node_port, options, service};

/// Bytes of a transfer: many segments of any size.
const BULK: u64 = 300_000;
/// A link narrower than Ethernet, and wide enough for IPv6.
const NARROW: u16 = 1300;

fn two_services(world: &World) -> Vec<Service> {
    vec![service(1, [&world.a1]), service(2, [&world.b1])]
}

fn modes() -> [AgentOptions; 2] {
    [Xdp::Native, Xdp::Off].map(|xdp| AgentOptions { xdp, ..options() })
}

/// Answers of full size meet a narrow link on their way to the client. Its router tells the sender, which is the frontend
/// as far as it knows.
#[test]
fn path_mtu_discovery_works_towards_clients() -> Result<()> {
    for mode in modes() {
        let world = World::with_services(mode, two_services)?;
        world.lab().narrow_far(NARROW)?;
        for family in Family::ALL {
            for (n, backend) in [(1, "here"), (2, "there")] {
                let call = Call::tcp(world.node_a().at(family, node_port(n)));
                let transfer = world.lab().far.transfer(call, BULK);
                transfer.with_context(|| format!("{family:?}, backend {backend}"))?;
            }
        }
    }
    Ok(())
}

/// Requests of full size meet a narrow link on their way to a backend elsewhere: the node itself tells the client.
#[test]
fn path_mtu_discovery_works_towards_backends() -> Result<()> {
    for mode in modes() {
        let world = World::with_services(mode, two_services)?;
        let [v4, v6] = world.node_b().addrs.both();
        let [pods4, pods6] = world.node_b().pod_cidrs();
        world.node_a().ns.ip(&format!(
            "route change {pods4} via {v4} mtu {NARROW}\n\
             route change {pods6} via {v6} mtu {NARROW}\n"
        ))?;
        for family in Family::ALL {
            let node_port = Call::tcp(world.node_a().at(family, node_port(2)));
            let cluster_ip = Call::tcp(at_vip(2, family, PORT));
            let callers: [(&Caller, &Call); 3] =
                [(&world.lab().outside, &node_port), (&world.a2, &cluster_ip), (world.node_a(), &cluster_ip)];
            for (caller, call) in callers {
                let transfer = caller.transfer(call.clone(), BULK);
                transfer.with_context(|| format!("{} -> {call:?}", caller.name()))?;
            }
        }
    }
    Ok(())
}

/// A backend where nobody listens says so, and every client hears it.
#[test]
fn port_unreachable_from_a_backend_reaches_the_client() -> Result<()> {
    for mode in modes() {
        let world = World::with_services(mode, |world| vec![deaf(1, &world.a1), deaf(2, &world.b1)])?;
        for family in Family::ALL {
            for n in [1, 2] {
                let cluster_ip = Call::udp(at_vip(n, family, PORT));
                let node_port = Call::udp(world.node_a().at(family, node_port(n)));
                let callers: [(&Caller, &Call); 6] = [
                    (&world.lab().outside, &node_port),
                    (&world.lab().far, &node_port),
                    (&world.a2, &cluster_ip),
                    (&world.b2, &cluster_ip),
                    (if n == 1 { &world.a1 } else { &world.b1 }, &cluster_ip),
                    (world.node_a(), &cluster_ip),
                ];
                for (caller, call) in callers {
                    let outcome = caller.ask(call.clone().patience(AT_ONCE))?;
                    ensure!(outcome == Outcome::Refused, "{} -> {call:?}: {outcome}", caller.name());
                }
            }
        }
    }
    Ok(())
}
