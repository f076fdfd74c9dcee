//! `fairlead drops`: who is refused what, with and without an agent.

use anyhow::{Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use xtask::lab::{Call, Family, Outcome};

use crate::lines::Lines;
use crate::world::{PORT, World, at_vip, node_port, options, service};

#[test]
fn refused_clients_are_counted_and_shown_one_by_one_without_an_agent() -> Result<()> {
    let world = World::with_services(options(), |world| vec![service(1, []), service(2, [&world.a1])])?;
    let (lab, cluster) = (world.lab(), &world.cluster);
    let read = |args: &[&str]| -> Result<Value> {
        Ok(serde_json::from_str(&cluster.fairlead(world.node_a(), &[args, &["-o", "json"]].concat())?)?)
    };
    ensure!(cluster.fairlead(world.node_a(), &["drops"])?.contains("nothing was dropped or refused"));
    for agent in cluster.take_agents() {
        agent.kill()?;
    }

    let mut follower = Lines::spawn(&world, &["drops", "--follow", "-o", "json"])?;
    let begins = follower.told()?;
    ensure!(begins.contains("Ctrl-C"), "{begins}");
    // One at a time.
    let second = cluster.fairlead(world.node_a(), &["drops", "--follow"]);
    let refused = second.err().map(|error| error.to_string()).unwrap_or_default();
    ensure!(refused.contains("already"), "{refused}");

    let empty = lab.node_a.at(Family::V4, node_port(1));
    let Outcome::Refused = lab.outside.ask(Call::tcp(empty))? else { bail!("somebody answers") };
    let packet = follower.next_value()?;
    ensure!(
        packet["reason"] == "no_endpoints"
            && packet["action"] == "reject"
            && packet["destination"] == empty.to_string()
            && packet["tcp_flags"] == serde_json::json!(["SYN"])
            && packet["name"] == "service-1",
        "{packet:#}"
    );
    let Outcome::Refused = world.a2.ask(Call::tcp(at_vip(1, Family::V6, PORT)))? else {
        bail!("somebody answers")
    };
    let packet = follower.next_value()?;
    ensure!(packet["hook"] == "pod_in" && packet["name"] == "service-1", "{packet:#}");
    // What gets its answer is not shown.
    let answered = lab.outside.ask(Call::tcp(lab.node_a.at(Family::V4, node_port(2))))?;
    ensure!(answered.server() == Some("a1"), "{answered}");
    ensure!(follower.written.try_recv().is_err(), "more than what was lost is told");

    follower.end(Signal::SIGINT)?;
    let all = read(&["drops"])?;
    let count =
        |value: &Value| value.as_array().into_iter().flatten().filter_map(|it| it["packets"].as_u64()).sum();
    let (reasons, services): (u64, u64) = (count(&all["reasons"]), count(&all["services"]));
    ensure!(reasons == 2 && services == 2, "{all:#}");
    let one = read(&["drops", "service-1"])?;
    ensure!(one["services"][0]["reason"] == "no_endpoints" && one["services"][0]["packets"] == 2, "{one:#}");
    let other = read(&["drops", "service-2", "-n", "default"])?;
    ensure!(count(&other["services"]) == 0_u64, "{other:#}");
    let table = cluster.fairlead(world.node_a(), &["drops"])?;
    ensure!(table.contains("default/service-1  no_endpoints  reject  2"), "{table}");
    let wrong = cluster.fairlead(world.node_a(), &["drops", "--reason", "translated"]);
    ensure!(wrong.is_err_and(|error| error.to_string().contains("no_endpoints")), "that is no loss");
    Ok(())
}
