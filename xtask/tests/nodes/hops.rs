//! Next hops that flows remember: connections follow when a way changes, with an agent and without.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use xtask::lab::{AgentOptions, Call, Family, Node, Xdp};

use crate::world::{World, node_port, options, service};

/// For so long programs believe an agent that has gone, and how often they ask.
const TRUST: Duration = Duration::from_millis(2000 + 700);

/// Node-b has another Ethernet address from now on, and node-a knows.
fn readdress(world: &World, last: u8) -> Result<()> {
    let mac = format!("02:fa:00:00:00:{last:02x}");
    let (a, b): (&Node, &Node) = (world.node_a(), world.node_b());
    b.ns.ip(&format!("link set eth0 address {mac}"))?;
    for addr in b.addrs.both() {
        a.ns.ip(&format!("neigh replace {addr} lladdr {mac} nud reachable dev eth0"))?;
    }
    Ok(())
}

#[test]
fn connections_follow_a_next_hop_that_changes() -> Result<()> {
    let mode = AgentOptions { xdp: Xdp::Native, ..options() };
    let world = World::with_services(mode, |world| vec![service(1, [&world.b1])])?;
    let calls = Family::ALL.map(|family| Call::tcp(world.node_a().at(family, node_port(1))));
    let mut open = Vec::new();
    for call in calls {
        let (connection, outcome) = world.lab().outside.open(call)?;
        ensure!(outcome.server() == Some("b1"), "{outcome}");
        open.push(connection);
    }
    let talk = |when: &str| -> Result<()> {
        for connection in &open {
            let outcome = connection.again()?;
            ensure!(outcome.server() == Some("b1"), "{when}: {outcome}");
        }
        Ok(())
    };
    talk("at first")?;
    readdress(&world, 1)?;
    talk("with another Ethernet address")?;
    readdress(&world, 2)?;
    talk("and with a third")?;
    for agent in world.cluster.take_agents() {
        agent.kill()?;
    }
    talk("without an agent")?;
    thread::sleep(TRUST);
    talk("without an agent for a while")?;
    readdress(&world, 3)?;
    talk("with a fourth, and nobody to say so")
}
