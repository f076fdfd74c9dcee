//! Programs of others on the same hooks, with real packets: everybody has a say, in a known order.
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lb_common::reason::{Hook, Reason};
use serde_json::Value;
use xtask::lab::foreign::{self, Foreign};
use xtask::lab::netns::Netns;
use xtask::lab::{Agent, AgentOptions, Call, Family, Outcome, Xdp, eventually};
use xtask::process;

use crate::world::{PORT, SILENCE, SOON, TARGET_PORT, World, at_vip, node_port, options, service, until};

fn world(options: AgentOptions) -> Result<World> {
    World::with_services(options, |world| vec![service(1, [&world.a1]), service(2, [&world.b1])])
}

fn load(world: &World, name: &str, kind: &str, insns: &[foreign::Insn]) -> Result<Foreign> {
    Foreign::load(world.lab().dir(), &format!("{}-{name}", world.lab().prefix()), kind, insns)
}

/// Ends the agents and takes away all that is Fairlead's.
fn clean_up(world: &World) -> Result<()> {
    for agent in world.cluster.take_agents() {
        agent.stop()?;
    }
    world.lab().nodes().into_iter().try_for_each(|node| world.cluster.fairlead(node, &["cleanup"]).map(drop))
}

/// A firewall on the uplink that knows pods, and one that knows NodePorts.
fn filters_see_what_their_place_says(clsact: bool) -> Result<()> {
    let world = world(AgentOptions { clsact, xdp: Xdp::Off, ..options() })?;
    let (node, outside) = (world.node_a(), &world.lab().outside);
    let [pods, node_ports] = [TARGET_PORT, node_port(1)].map(foreign::drop_port);
    let [pods, node_ports] =
        [load(&world, "pods", "classifier", &pods)?, load(&world, "ports", "classifier", &node_ports)?];
    let here = || Call::tcp(node.at(Family::V4, node_port(1))).patience(SILENCE);
    let there = || Call::tcp(node.at(Family::V4, node_port(2))).patience(SILENCE);
    let served = |call: Call, server| until(outside, &call, |outcome| outcome.server() == Some(server));
    let dropped = |call: Call| -> Result<()> {
        let outcome = outside.ask(call.clone())?;
        ensure!(outcome == Outcome::TimedOut, "{call:?}: {outcome}");
        Ok(())
    };
    served(here(), "a1")?;
    // After ours (with tcx, whatever its priority): it sees where packets for pods of this node really go.
    pods.put_on_clsact(&node.ns, "eth0", "ingress", 50)?;
    dropped(here()).context("a filter for pods, after ours")?;
    // What goes on to another node has left by then, and other ports are none of its business.
    served(there(), "b1").context("a backend elsewhere")?;
    remove(&world, 50)?;
    served(here(), "a1").context("without the filter")?;
    // Before ours there is only room where filters are all of one kind.
    node_ports.put_on_clsact(&node.ns, "eth0", "ingress", 3)?;
    if clsact {
        dropped(here()).context("a filter for NodePorts, before ours")?;
    } else {
        served(here(), "a1").context("a filter for NodePorts, after ours")?;
    }
    served(there(), "b1").context("another NodePort")?;
    remove(&world, 3)?;
    pods.put_on_clsact(&node.ns, "eth0", "ingress", 50)?;
    clean_up(&world)?;
    // The other's filter and its qdisc are still there, and work.
    outside.add_route(&format!("{}/32", world.a1.addrs.v4), node.addrs.v4.into())?;
    dropped(Call::tcp(world.a1.at(Family::V4, TARGET_PORT)).patience(SILENCE)).context("after cleanup")?;
    remove(&world, 50)?;
    served(Call::tcp(world.a1.at(Family::V4, TARGET_PORT)).patience(SILENCE), "a1")
        .context("and without it")?;
    Ok(())
}

/// Takes filters of others off node-a's uplink.
fn remove(world: &World, priority: u16) -> Result<()> {
    let priority = priority.to_string();
    tc(world, &["filter", "del", "dev", "eth0", "ingress", "prio", &priority])
}

fn tc(world: &World, args: &[&str]) -> Result<()> {
    world.node_a().ns.run(|| process::output(Command::new("tc").args(args)))?.map(drop)
}

/// What `ip` says about a device.
pub(crate) fn link(ns: &Netns, device: &str) -> Result<Value> {
    let text =
        ns.run(|| process::output(Command::new("ip").args(["-j", "-s", "link", "show", device])))??;
    let links: Value = serde_json::from_str(&text)?;
    Ok(links[0].clone())
}

#[test]
fn filters_of_others_see_real_addresses_behind_tcx() -> Result<()> {
    filters_see_what_their_place_says(false)
}

#[test]
fn filters_of_others_see_what_their_priority_says_beside_clsact() -> Result<()> {
    filters_see_what_their_place_says(true)
}

/// A network plugin that begins with a clean qdisc.
#[test]
fn a_qdisc_that_is_deleted_under_traffic_comes_back() -> Result<()> {
    let world = world(AgentOptions { clsact: true, xdp: Xdp::Off, ..options() })?;
    let outside = &world.lab().outside;
    let call = Call::tcp(world.node_a().at(Family::V4, node_port(1)));
    until(outside, &call, |outcome| outcome.server() == Some("a1"))?;
    tc(&world, &["qdisc", "del", "dev", "eth0", "clsact"])?;
    until(outside, &call, |outcome| outcome.server() == Some("a1"))?;
    let agent = world.cluster.agent(world.node_a())?;
    let log = agent.log();
    ensure!(log.contains("took a program off its hook"), "{log}");
    let metric = "fairlead_reattached_total{program=\"tc_nic_in\"} 1";
    let page = metrics(&world)?;
    ensure!(page.contains(metric), "{page}");
    Ok(())
}

fn metrics(world: &World) -> Result<String> {
    let (status, page) = world.node_a().get(([127, 0, 0, 1], 10249).into(), "/metrics")?;
    ensure!(status == 200, "{status}");
    Ok(page)
}

#[test]
fn an_xdp_program_of_somebody_else_keeps_the_uplink() -> Result<()> {
    let world = World::new(options())?;
    let node = world.node_a();
    let pass = load(&world, "xdp", "xdp", &foreign::always(foreign::XDP_PASS))?;
    pass.put_on_xdp(&node.ns, "eth0")?;
    let theirs = xdp(&world)?.context("it is there")?;
    for (number, pod) in [(1, &world.a1), (2, &world.b1)] {
        world.cluster.manifests.apply(&service(number, [pod]))?;
    }
    world.cluster.start()?;
    let outside = &world.lab().outside;
    for family in Family::ALL {
        for (number, server) in [(1, "a1"), (2, "b1")] {
            let call = Call::tcp(node.at(family, node_port(number)));
            until(outside, &call, |outcome| outcome.server() == Some(server))?;
            outside.transfer(call, 300_000)?;
        }
    }
    {
        let agent = world.cluster.agent(node)?;
        let line = format!("XDP on eth0 is taken by program {theirs} (foreign)");
        ensure!(agent.log().matches(&line).count() == 1, "{}", agent.log());
        ensure!(at(&agent, Hook::Xdp)? == 0 && at(&agent, Hook::NicIn)? > 0, "tc does it");
    }
    ensure!(xdp(&world)? == Some(theirs), "it is another one now: {:?}", xdp(&world)?);
    clean_up(&world)?;
    ensure!(xdp(&world)? == Some(theirs), "cleanup took it along: {:?}", xdp(&world)?);
    // Whoever makes room is followed.
    world.cluster.start()?;
    node.ns.ip("link set dev eth0 xdpdrv off\n")?;
    eventually(SOON, || {
        let now = xdp(&world)?;
        ensure!(now.is_some() && now != Some(theirs), "{now:?}");
        Ok(())
    })?;
    until(outside, &Call::tcp(node.at(Family::V4, node_port(2))), |outcome| outcome.server() == Some("b1"))?;
    ensure!(at(&*world.cluster.agent(node)?, Hook::Xdp)? > 0, "XDP does it");
    Ok(())
}

/// The program on node-a's XDP hook.
fn xdp(world: &World) -> Result<Option<u64>> {
    Ok(link(&world.node_a().ns, "eth0")?["xdp"]["prog"]["id"].as_u64())
}

/// Packets that a hook has translated.
fn at(agent: &Agent, hook: Hook) -> Result<u64> {
    let counters = agent.counters()?;
    Ok(counters.deeds().filter(|(at, ..)| *at == hook).map(|(_, _, count)| count).sum())
}

#[test]
fn socket_programs_of_others_have_their_say() -> Result<()> {
    const DENIED: u16 = 9;
    let world = World::new(options())?;
    let node = world.node_a();
    let deny = load(&world, "deny", "cgroup/connect4", &foreign::deny_port(DENIED))?;
    deny.put_on_cgroup(node.cgroup.path(), "connect4")?;
    world.cluster.manifests.apply(&service(1, [&world.b1]))?;
    let denied = || -> Result<()> {
        let outcome = node.ask(Call::tcp(world.b1.at(Family::V4, DENIED)))?;
        ensure!(matches!(&outcome, Outcome::Failed(error) if error.contains("not permitted")), "{outcome}");
        Ok(())
    };
    denied().context("before the agent")?;
    world.cluster.start()?;
    denied().context("beside the agent")?;
    let outcome = node.ask(Call::tcp(at_vip(1, Family::V4, PORT)))?;
    ensure!(outcome.server() == Some("b1"), "{outcome}");
    clean_up(&world)?;
    denied().context("after the agent")
}

/// Frames of a VLAN belong to its device, which has the tag taken off; the parent leaves them alone, whether the tag is
/// in the frame (XDP) or beside it (tc). This kernel may have no VLAN devices: programs stand in for one.
fn vlans_are_served_by_their_own_device(xdp: Xdp) -> Result<()> {
    const VLAN: u16 = 7;
    let world = World::new(AgentOptions { xdp, ..options() })?;
    let (node, outside) = (world.node_a(), &world.lab().outside);
    for ns in [&node.ns, &outside.ns] {
        ns.ip("link add vlan7 type veth peer name trunk7\nlink set trunk7 up\nlink set vlan7 up\n")?;
    }
    // Only what goes in at `trunk7` is tagged and goes out at `eth0`, and the other way round.
    for ns in [&node.ns, &outside.ns] {
        let name = ns.name().rsplit('-').next().unwrap_or_default().to_owned();
        let [eth0, trunk] = ["eth0", "trunk7"].map(|device| index(ns, device));
        let untag = load(&world, &format!("untag-{name}"), "classifier", &foreign::untag(trunk?))?;
        let tag = load(&world, &format!("tag-{name}"), "classifier", &foreign::tag(VLAN, Some(eth0?)))?;
        untag.put_on_clsact(ns, "eth0", "ingress", 50)?;
        tag.put_on_clsact(ns, "trunk7", "ingress", 50)?;
        // Checksums are complete on a wire.
        let mut tx_off = Command::new("ethtool");
        tx_off.args(["-K", "vlan7", "tx", "off"]);
        ns.run(|| process::output(&mut tx_off))??;
    }
    node.ns.ip("addr add 198.18.7.1/24 dev vlan7\n")?;
    outside.ns.ip("addr add 198.18.7.100/24 dev vlan7\n")?;
    for (number, pod) in [(1, &world.a1), (2, &world.b1)] {
        world.cluster.manifests.apply(&service(number, [pod]))?;
    }
    world.cluster.start()?;
    let before = world.cluster.agent(node)?.counters()?;
    for (number, server) in [(1, "a1"), (2, "b1")] {
        let call = Call::tcp(([198, 18, 7, 1], node_port(number)).into());
        until(outside, &call, |outcome| outcome.server() == Some(server)).context("through the VLAN")?;
        outside.transfer(call, 300_000)?;
    }
    let since = world.cluster.agent(node)?.counters()?.since(&before);
    let hook = if xdp == Xdp::Native { Hook::Xdp } else { Hook::NicIn };
    let tagged = since.get(hook, Reason::NotIp);
    ensure!(tagged > 100, "tagged frames at the parent: {since:?}");
    until(outside, &Call::tcp(node.at(Family::V4, node_port(2))), |outcome| outcome.server() == Some("b1"))
        .context("without a tag")?;
    Ok(())
}

fn index(ns: &Netns, device: &str) -> Result<u32> {
    Ok(u32::try_from(link(ns, device)?["ifindex"].as_u64().with_context(|| format!("no {device}"))?)?)
}

#[test]
fn vlans_are_served_by_their_own_device_under_xdp() -> Result<()> {
    vlans_are_served_by_their_own_device(Xdp::Native)
}

#[test]
fn vlans_are_served_by_their_own_device_under_tc() -> Result<()> {
    vlans_are_served_by_their_own_device(Xdp::Off)
}
