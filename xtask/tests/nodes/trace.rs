//! `fairlead trace`: what it says of a connection is what the connection does.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use xtask::lab::{Call, Caller, Family, Outcome};

use crate::world::{PORT, World, at_vip, node_port, options, service};

/// Who would answer a call from this address, and the whole trace.
fn predicted(world: &World, from: SocketAddr, to: SocketAddr) -> Result<(String, Value)> {
    let asked = ["trace", &from.to_string(), &to.to_string(), "-o", "json"];
    let said: Value = serde_json::from_str(&world.cluster.fairlead(world.node_a(), &asked)?)?;
    let backend = said["backend"]["address"].as_str().with_context(|| format!("{said:#}"))?.to_owned();
    let pods = [&world.a1, &world.b1].into_iter().zip(["a1", "b1"]);
    let name = pods
        .filter(|(pod, _)| [Family::V4, Family::V6].iter().any(|f| pod.at(*f, 0).ip().to_string() == backend))
        .map(|(_, name)| name.to_owned())
        .next();
    Ok((name.with_context(|| format!("nobody has {backend}"))?, said))
}

#[test]
fn a_trace_without_an_agent_names_the_backend_that_answers() -> Result<()> {
    let world = World::with_services(options(), |world| vec![service(1, [&world.a1, &world.b1])])?;
    for agent in world.cluster.take_agents() {
        agent.kill()?;
    }
    let lab = world.lab();
    let mut servers = BTreeSet::new();
    let cases: [(&str, &Caller, SocketAddr); 3] = [
        ("outside", &lab.outside, lab.node_a.at(Family::V4, node_port(1))),
        ("routed pod", &world.a2, at_vip(1, Family::V4, PORT)),
        ("outside, IPv6", &lab.outside, lab.node_a.at(Family::V6, node_port(1))),
    ];
    for (name, caller, target) in cases {
        let Outcome::Answer(own) = caller.ask(Call::tcp(target))? else {
            anyhow::bail!("{name}: {target} does not answer")
        };
        for port in 41000..41004 {
            let from = SocketAddr::new(own.local.ip(), port);
            let (expected, said) = predicted(&world, from, target)?;
            ensure!(said["answered"] == true && said["flow"] == "new", "{name}: {said:#}");
            let outcome = caller.ask(Call::tcp(target).from_port(port))?;
            ensure!(outcome.server() == Some(&expected), "{name}, {from}: {outcome}, but {said:#}");
            servers.insert(expected);
        }
    }
    ensure!(servers.len() == 2, "only {servers:?} ever answer");
    let story = world.cluster.fairlead(world.node_a(), &["trace", "node", "svc/service-1:80"])?;
    ensure!(story.contains("result    translated") && story.contains("2 backends"), "{story}");
    Ok(())
}
