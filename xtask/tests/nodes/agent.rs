//! The agent comes and goes; what it loaded stays, until it is told to clean up.
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use xtask::lab::client::OpenCall;
use xtask::lab::{Agent, AgentOptions, Call, Caller, Family, Node, Outcome, counters, eventually};

use crate::world::{PORT, SILENCE, SOON, TARGET_PORT, World, at_vip, node_port, options, service, until};

/// Calls of every edge that stay open: outside here and there, pod, process.
pub(crate) fn open_calls(world: &World) -> Result<Vec<(&'static str, OpenCall<'_>, Outcome)>> {
    let lab = world.lab();
    let calls: [(&str, &Caller, Call); 8] = [
        ("outside, backend here", &lab.outside, Call::tcp(lab.node_a.at(Family::V4, node_port(1)))),
        ("outside, backend there", &lab.outside, Call::tcp(lab.node_a.at(Family::V4, node_port(2)))),
        ("far, backend there, IPv6", &lab.far, Call::tcp(lab.node_a.at(Family::V6, node_port(2)))),
        ("routed pod", &world.a2, Call::tcp(at_vip(2, Family::V4, PORT))),
        ("bridged pod, IPv6", &world.b2, Call::tcp(at_vip(2, Family::V6, PORT))),
        ("process", &lab.node_a, Call::tcp(at_vip(2, Family::V4, PORT))),
        ("process, UDP", &lab.node_a, Call::udp(at_vip(2, Family::V4, PORT)).unconnected()),
        ("hairpin", &world.a1, Call::tcp(at_vip(1, Family::V4, PORT))),
    ];
    let mut open = Vec::new();
    for (name, caller, call) in calls {
        let (call, first) = caller.open(call)?;
        ensure!(first.server().is_some(), "{name}: {first}");
        open.push((name, call, first));
    }
    Ok(open)
}

/// Open calls go on as they were, and new ones are answered.
pub(crate) fn traffic_goes_on(world: &World, open: &[(&str, OpenCall<'_>, Outcome)]) -> Result<()> {
    for (name, call, first) in open {
        ensure!(call.again()? == *first, "{name}: {}", call.again()?);
    }
    open_calls(world).map(drop).context("new calls")
}

pub(crate) fn two_services(world: &World) -> Vec<xtask::lab::Service> {
    vec![service(1, [&world.a1]), service(2, [&world.b1])]
}

#[test]
fn traffic_goes_on_after_sigterm() -> Result<()> {
    traffic_goes_on_without_agents(|agent| {
        let status = agent.stop()?;
        ensure!(status.success(), "SIGTERM is a normal end, not {status}");
        Ok(())
    })
}

#[test]
fn traffic_goes_on_after_sigkill() -> Result<()> {
    traffic_goes_on_without_agents(|agent| agent.kill().map(drop))
}

fn traffic_goes_on_without_agents(end: impl Fn(Agent) -> Result<()>) -> Result<()> {
    let world = World::with_services(options(), two_services)?;
    for agent in world.cluster.take_agents() {
        end(agent)?;
    }
    // Twice: what was opened while no agent ran is as good as the rest.
    let open = open_calls(&world)?;
    traffic_goes_on(&world, &open)
}

#[test]
fn calls_outlive_the_agents_that_they_began_with() -> Result<()> {
    let world = World::with_services(options(), two_services)?;
    let agents = world.cluster.take_agents();
    let open = open_calls(&world)?;
    for (i, agent) in agents.into_iter().enumerate() {
        if i == 0 {
            agent.stop()?
        } else {
            agent.kill()?
        };
        traffic_goes_on(&world, &open)?;
    }
    Ok(())
}

#[test]
fn a_new_agent_takes_over_what_is_there() -> Result<()> {
    let world = World::with_services(options(), two_services)?;
    let before = Loaded::by(&*world.cluster.agent(world.node_a())?)?;
    let (call, first) = world.a2.open(Call::tcp(at_vip(2, Family::V4, PORT)))?;
    let mut agents = world.cluster.take_agents().into_iter();
    agents.next().context("two agents")?.stop()?;
    agents.next().context("two agents")?.kill()?;
    // Changes while nobody looks are without effect until somebody does.
    world.cluster.manifests.delete("service-1")?;
    world.cluster.manifests.apply(&service(3, [&world.b2]))?;
    let new = Call::tcp(at_vip(3, Family::V4, PORT));
    let outcome = world.a2.ask(new.clone().patience(SILENCE))?;
    assert!(!matches!(outcome, Outcome::Answer(_)), "{outcome}");

    world.cluster.start()?;
    assert_eq!(Loaded::by(&*world.cluster.agent(world.node_a())?)?.maps, before.maps, "other maps");
    assert_eq!(call.again()?, first, "the call from before both");
    for family in Family::ALL {
        for (caller, from) in [(&*world.a2, world.node_a()), (&**world.node_b(), world.node_b())] {
            let answer = |n, server| {
                until(caller, &Call::tcp(at_vip(n, family, PORT)), |outcome| outcome.server() == server)
                    .with_context(|| format!("Service {n} from {}", from.name))
            };
            answer(3, Some("b2"))?;
            answer(2, Some("b1"))?;
            answer(1, None)?;
        }
    }
    Ok(())
}

#[test]
fn a_restart_breaks_no_call() -> Result<()> {
    let world = World::with_services(options(), two_services)?;
    let open = open_calls(&world)?;
    for agent in world.cluster.take_agents() {
        agent.stop()?;
    }
    world.cluster.start()?;
    traffic_goes_on(&world, &open)
}

#[test]
fn cleanup_leaves_nothing() -> Result<()> {
    cleanup_leaves_a_plain_node(options())
}

#[test]
fn cleanup_leaves_nothing_of_clsact() -> Result<()> {
    cleanup_leaves_a_plain_node(AgentOptions { clsact: true, ..options() })
}

#[test]
fn cleanup_gives_back_the_reserved_ports_of_others() -> Result<()> {
    let world = World::new(options())?;
    let node = world.node_a();
    // In the range of ours, and beside it.
    node.ns.sysctl(&[("ipv4/ip_local_reserved_ports", "5000,12300,20000-20010")])?;
    world.cluster.start()?;
    ensure!(reserved_ports(node)? == "5000,12288-28671", "{}", reserved_ports(node)?);
    let refused = world.cluster.fairlead(node, &["cleanup"]).unwrap_or_else(|error| error.to_string());
    ensure!(refused.contains("failed: fairlead: an agent is running with --bpffs "), "{refused}");
    ensure!(refused.lines().count() == 1, "{refused}");
    for agent in world.cluster.take_agents() {
        agent.stop()?;
    }
    // Somebody else has reserved more meanwhile.
    node.ns.sysctl(&[("ipv4/ip_local_reserved_ports", "5000,12288-28671,40000")])?;
    world.cluster.fairlead(node, &["cleanup"])?;
    ensure!(reserved_ports(node)? == "5000,12300,20000-20010,40000", "{}", reserved_ports(node)?);
    ensure!(world.cluster.fairlead(node, &["cleanup"])? == "nothing to remove\n", "a second time");
    ensure!(reserved_ports(node)? == "5000,12300,20000-20010,40000", "{}", reserved_ports(node)?);
    Ok(())
}

fn cleanup_leaves_a_plain_node(options: AgentOptions) -> Result<()> {
    let clsact = options.clsact;
    let world = World::with_services(options, two_services)?;
    let mut before = Vec::new();
    for node in world.lab().nodes() {
        let loaded = Loaded::by(&*world.cluster.agent(node)?)?;
        // As long as a program is attached somewhere, it is there; the agent runs others itself.
        let all = 5 + lb_common::maps::programs::SOCKETS.len();
        ensure!(loaded.programs.len() >= all, "not every program is loaded: {loaded:?}");
        ensure!(loaded.now()? == loaded, "it cannot be seen: {:?} of {loaded:?}", loaded.now()?);
        let devices = if clsact { 3 } else { 0 };
        ensure!(clsact_qdiscs(node)? == devices, "not on {devices} devices: {}", clsact_qdiscs(node)?);
        ensure!(!reserved_ports(node)?.is_empty(), "no source ports are reserved");
        before.push(loaded);
    }
    for agent in world.cluster.take_agents() {
        agent.stop()?;
    }
    for (node, loaded) in world.lab().nodes().into_iter().zip(&before) {
        world.cluster.fairlead(node, &["cleanup"])?;
        let pins = world.lab().pins(node);
        ensure!(!pins.exists(), "{} is still there", pins.display());
        eventually(SOON, || {
            let now = loaded.now()?;
            ensure!(now.maps.is_empty() && now.programs.is_empty(), "still there: {now:?}");
            Ok(())
        })?;
        ensure!(clsact_qdiscs(node)? == 0, "{} qdiscs are left", clsact_qdiscs(node)?);
        ensure!(reserved_ports(node)?.is_empty(), "still reserved: {}", reserved_ports(node)?);
    }
    // Without Fairlead the nodes are plain nodes again.
    let outcome = world.a2.ask(Call::tcp(at_vip(1, Family::V4, PORT)).patience(SILENCE))?;
    assert!(!matches!(outcome, Outcome::Answer(_)), "{outcome}");
    assert_eq!(world.a2.ask(Call::tcp(world.b1.at(Family::V4, TARGET_PORT)))?.server(), Some("b1"));
    Ok(())
}

/// The clsact qdiscs of a node, which hold filters.
fn clsact_qdiscs(node: &Node) -> Result<usize> {
    let output = node.ns.run(|| Command::new("tc").args(["qdisc", "show"]).output())??;
    ensure!(output.status.success(), "tc: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).matches("clsact").count())
}

pub(crate) fn reserved_ports(node: &Node) -> Result<String> {
    let read = || std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports");
    Ok(node.ns.run(read)??.trim().to_owned())
}

/// What an agent has in the kernel.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Loaded {
    maps: BTreeSet<u64>,
    pub(crate) programs: BTreeSet<u64>,
}

impl Loaded {
    pub(crate) fn by(agent: &Agent) -> Result<Self> {
        let mut maps = BTreeSet::new();
        for name in ["SERVICES4", "FLOWS4", "FLOWS6", "COUNTERS"] {
            let pin = counters::find(agent.pins(), name)?;
            maps.insert(id_of(&bpftool(&["map", "show", "pinned"], Some(&pin))?)?);
        }
        let mut programs = BTreeSet::new();
        for program in list("prog")? {
            let used = program["map_ids"].as_array().cloned().unwrap_or_default();
            if used.iter().any(|id| id.as_u64().is_some_and(|id| maps.contains(&id))) {
                programs.insert(id_of(&program)?);
            }
        }
        Ok(Self { maps, programs })
    }

    fn now(&self) -> Result<Self> {
        let ids = |kind| -> Result<BTreeSet<u64>> { list(kind)?.iter().map(id_of).collect() };
        Ok(Self { maps: &ids("map")? & &self.maps, programs: &ids("prog")? & &self.programs })
    }
}

fn id_of(object: &Value) -> Result<u64> {
    object["id"].as_u64().with_context(|| format!("no id in {object}"))
}

/// What `bpftool KIND show` lists.
pub(crate) fn list(kind: &str) -> Result<Vec<Value>> {
    match bpftool(&[kind, "show"], None)? {
        Value::Array(all) => Ok(all),
        other => bail!("bpftool printed no list: {other}"),
    }
}

fn bpftool(args: &[&str], pin: Option<&Path>) -> Result<Value> {
    let output = Command::new("bpftool").arg("-j").args(args).args(pin).output()?;
    ensure!(output.status.success(), "bpftool {args:?}: {}", String::from_utf8_lossy(&output.stdout));
    Ok(serde_json::from_slice(&output.stdout)?)
}
