//! Devices come, change and go under real traffic, and pods by the thousand.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::lab::netns::Netns;
use xtask::lab::{Agent, AgentOptions, Call, Caller, Family, Node, Protocol, Xdp, counters, eventually};

use crate::agent::{Loaded, list};
use crate::sharing::link;
use crate::world::{PORT, SOON, World, at_vip, node_port, options, service, until};

/// Service 1 has its backend on node-a, Service 2 on node-b.
pub(crate) fn here_and_there(xdp: Xdp) -> Result<World> {
    let options = AgentOptions { xdp, ..options() };
    World::with_services(options, |world| vec![service(1, [&world.a1]), service(2, [&world.b1])])
}

pub(crate) const SERVERS: [(u8, &str); 2] = [(1, "a1"), (2, "b1")];

/// Everybody who comes to node-a is served: from outside by its uplink, from a pod of its own.
pub(crate) fn node_a_serves(world: &World, families: &[Family]) -> Result<()> {
    for family in families {
        for (number, server) in SERVERS {
            let calls: [(&Caller, _); 3] = [
                (&world.lab().outside, world.node_a().at(*family, node_port(number))),
                (&world.lab().far, world.node_a().at(*family, node_port(number))),
                (&world.a2, at_vip(number, *family, PORT)),
            ];
            for (caller, target) in calls {
                until(caller, &Call::tcp(target), |outcome| outcome.server() == Some(server))?;
                caller.transfer(Call::tcp(target), 300_000).with_context(|| format!("to {target}"))?;
            }
        }
    }
    Ok(())
}

fn devices_change_under_traffic(xdp: Xdp) -> Result<()> {
    let world = here_and_there(xdp)?;
    let (node, outside) = (world.node_a(), &world.lab().outside);
    let ns = &node.ns;
    // Both ends tell their neighbours of a new Ethernet address.
    ns.sysctl(&[("ipv4/conf/eth0/arp_notify", "1"), ("ipv6/conf/eth0/ndisc_notify", "1")])?;
    ns.sysctl(&[("ipv6/conf/eth0/keep_addr_on_down", "1")])?;
    let mut open = Vec::new();
    for family in Family::ALL {
        for (number, server) in SERVERS {
            let (call, first) = outside.open(Call::tcp(node.at(family, node_port(number))))?;
            ensure!(first.server() == Some(server), "{first}");
            open.push((format!("{family:?} to {server}"), call, first));
        }
        let (call, first) = world.a2.open(Call::tcp(at_vip(2, family, PORT)))?;
        open.push((format!("{family:?} from a pod"), call, first));
    }
    let goes_on = |what: &str| -> Result<()> {
        for (name, call, first) in &open {
            let outcome = call.again().with_context(|| what.to_owned())?;
            ensure!(outcome == *first, "{what}, {name}: {outcome}");
        }
        node_a_serves(&world, &Family::ALL).with_context(|| what.to_owned())
    };
    goes_on("nothing has changed")?;
    ns.ip(&format!("link set {} down\nlink set {0} name lxc-two\nlink set lxc-two up\n", world.a2.device))?;
    let routes = world.a2.addrs;
    ns.ip(&format!(
        "route replace {}/32 dev lxc-two\nroute replace {}/128 dev lxc-two\n",
        routes.v4, routes.v6
    ))?;
    goes_on("a pod's device has another name")?;
    world.lab().set_mtu(1400)?;
    goes_on("the uplink is narrower")?;
    world.lab().set_mtu(1500)?;
    goes_on("the uplink is as wide as before")?;
    ns.ip("link set eth0 address 02:00:5e:00:53:01\n")?;
    goes_on("the uplink has another Ethernet address")?;
    let neighbour = format!("neigh show {}", node.addrs.v4);
    let seen = outside.ns.run(|| Command::new("ip").args(neighbour.split(' ')).output())??;
    let seen = String::from_utf8_lossy(&seen.stdout).into_owned();
    ensure!(seen.contains("02:00:5e:00:53:01"), "{seen}");
    ns.ip("link set eth0 down\nlink set eth0 up\n")?;
    // The kernel has taken the routes away, too.
    node.restore_routes()?;
    goes_on("the uplink was down")?;
    let before = ifindex(ns, "eth0")?;
    world.lab().replug(node)?;
    ensure!(ifindex(ns, "eth0")? != before, "it should be another device");
    // Until programs are on it, the node's own stack would reset what it does not know.
    node_a_serves(&world, &Family::ALL).context("the uplink is another device")?;
    goes_on("the uplink is another device")?;
    let agent = world.cluster.agent(node)?;
    ensure!(edges(&agent)?.contains(&ifindex(ns, "eth0")?), "{:?}", edges(&agent)?);
    ensure!(!edges(&agent)?.contains(&before), "{:?}", edges(&agent)?);
    Ok(())
}

#[test]
fn devices_change_under_traffic_by_xdp() -> Result<()> {
    devices_change_under_traffic(Xdp::Native)
}

#[test]
fn devices_change_under_traffic_by_tc() -> Result<()> {
    devices_change_under_traffic(Xdp::Off)
}

#[test]
fn node_addresses_come_and_go() -> Result<()> {
    let world = here_and_there(Xdp::Native)?;
    let (node, outside) = (world.node_a(), &world.lab().outside);
    let new = ["192.0.2.77", "2001:db8::77"];
    // Whether the node has them or not, packets to them come to it.
    outside.add_route("192.0.2.77/32", node.addrs.v4.into())?;
    outside.add_route("2001:db8::77/128", node.addrs.v6.into())?;
    let (open, first) = outside.open(Call::tcp(node.at(Family::V4, node_port(2))))?;
    for round in 0..2 {
        node.ns.ip("addr add 192.0.2.77/24 dev eth0\naddr add 2001:db8::77/64 dev eth0 nodad\n")?;
        for protocol in Protocol::ALL {
            for addr in new {
                for (number, server) in SERVERS {
                    let call =
                        Call::new(protocol, (addr.parse::<std::net::IpAddr>()?, node_port(number)).into());
                    until(outside, &call, |outcome| outcome.server() == Some(server))
                        .with_context(|| format!("round {round}"))?;
                }
            }
        }
        node.ns.ip("addr del 192.0.2.77/24 dev eth0\naddr del 2001:db8::77/64 dev eth0\n")?;
        for addr in new {
            for (number, _) in SERVERS {
                let call = Call::tcp((addr.parse::<std::net::IpAddr>()?, node_port(number)).into());
                until(outside, &call, |outcome| outcome.server().is_none())
                    .with_context(|| format!("round {round}"))?;
            }
        }
        ensure!(open.again()? == first, "round {round}: the other address");
    }
    Ok(())
}

fn ifindex(ns: &Netns, device: &str) -> Result<u64> {
    link(ns, device)?["ifindex"].as_u64().with_context(|| format!("no {device}"))
}

/// Interface indices in `EDGES`.
pub(crate) fn edges(agent: &Agent) -> Result<BTreeSet<u64>> {
    let dump = counters::dump(agent.pins(), "EDGES")?;
    let entries = dump.as_array().context("no list")?.iter();
    entries.map(|entry| entry["formatted"]["key"].as_u64().context("an entry without a key")).collect()
}

/// What an agent has, and what pods that came and went may leave behind.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Belongings {
    programs: usize,
    links: usize,
    pins: usize,
    edges: usize,
    files: usize,
}

impl Belongings {
    pub(crate) fn of(agent: &Agent) -> Result<Self> {
        let programs = Loaded::by(agent)?.programs;
        let links = list("link")?;
        let ours =
            links.iter().filter(|link| link["prog_id"].as_u64().is_some_and(|id| programs.contains(&id)));
        let pid = agent.pid().context("it runs")?;
        Ok(Self {
            programs: programs.len(),
            links: ours.count(),
            pins: files_below(agent.pins())?,
            edges: edges(agent)?.len(),
            files: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
        })
    }

    /// Whether there is no more of anything. There may be less: what an agent had for a moment, such as a walk over flows.
    pub(crate) fn is_within(&self, before: &Self) -> bool {
        self.programs <= before.programs
            && self.links <= before.links
            && self.pins <= before.pins
            && self.edges <= before.edges
            && self.files <= before.files
    }
}

fn files_below(dir: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        count += if path.is_dir() { files_below(&path)? } else { 1 };
    }
    Ok(count)
}

/// Resident memory of the agent, KiB.
fn memory(agent: &Agent) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid().context("it runs")?))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// So many pods come at once.
const BATCH: u32 = 50;
/// Interface index of the first.
const FIRST: u32 = 10_000;
/// Pods of a first round, after which an agent has all that it ever needs.
const WARM_UP: u32 = 4 * BATCH;

/// What a burst of netlink messages takes at worst, KiB: it is not given back to the kernel.
const MEMORY: u64 = 8192;

/// `count` pods come and go, each with a number of its own; how long each batch waited until the last of it was served.
/// Every third batch goes before anybody has looked.
fn churn(node: &Node, agent: &Agent, first: u32, count: u32, clsact: bool) -> Result<Vec<Duration>> {
    let links = counters::find(agent.pins(), "EDGES")?.with_file_name("links");
    let is_served = |i: u32| -> Result<bool> {
        if !clsact {
            return Ok(links.join(format!("tc_pod_out-{i}")).exists());
        }
        let device = format!("veth{i}");
        let show = ["filter", "show", "dev", &device, "egress"];
        let output = node.ns.run(|| Command::new("tc").args(show).output())??;
        Ok(String::from_utf8_lossy(&output.stdout).contains("fairlead/tc_pod_out"))
    };
    let mut waited = Vec::new();
    for batch in 0..count / BATCH {
        let numbers = first + batch * BATCH..first + (batch + 1) * BATCH;
        let script = numbers.clone().fold(String::new(), |script, i| {
            let add = format!("link add veth{i} index {i} group 50 type veth peer name p{i}\n");
            script + &add + &format!("link set veth{i} up\n")
        });
        node.ns.ip(&script)?;
        let up = Instant::now();
        if batch % 3 != 2 {
            eventually(SOON, || {
                // The last one is served last.
                ensure!(is_served(numbers.end - 1)?, "pods of batch {batch} are not served");
                Ok(())
            })?;
            waited.push(up.elapsed());
            for i in numbers {
                ensure!(is_served(i)?, "pod {i} is not served");
            }
        }
        // All at once: one by one takes the kernel longer than the agent.
        node.ns.ip("link del group 50\n")?;
    }
    waited.sort();
    Ok(waited)
}

fn pods_leave_nothing_behind(options: AgentOptions) -> Result<()> {
    let clsact = options.clsact;
    let world =
        World::with_services(options, |world| vec![service(1, [&world.a1]), service(2, [&world.b1])])?;
    let node = world.node_a();
    let agent = world.cluster.agent(node)?;
    churn(node, &agent, FIRST, WARM_UP, clsact)?;
    let settled = || -> Result<Belongings> {
        thread::sleep(Duration::from_millis(300));
        Belongings::of(&agent)
    };
    // What the warm-up left is on its way out.
    let before = eventually(SOON, || {
        let [one, two] = [settled()?, settled()?];
        ensure!(one == two, "{one:?}, then {two:?}");
        Ok(two)
    })?;
    let resident = memory(&agent)?;
    let (open, first) = world.a2.open(Call::tcp(at_vip(2, Family::V4, PORT)))?;
    let count = match std::env::var("FAIRLEAD_PODS") {
        Ok(count) => count.parse().context("FAIRLEAD_PODS")?,
        Err(_) => 600,
    };
    let started = Instant::now();
    let waited = churn(node, &agent, FIRST + WARM_UP, count, clsact)?;
    let took = started.elapsed();
    eprintln!(
        "{count} pods in {took:?}; {BATCH} that came at once were served after {:?} (median), {:?} (worst)",
        waited[waited.len() / 2],
        waited[waited.len() - 1]
    );
    eventually(SOON, || {
        let after = settled()?;
        ensure!(after.is_within(&before), "{after:?}, not {before:?}");
        Ok(())
    })?;
    let grown = memory(&agent)?.saturating_sub(resident);
    eprintln!("resident memory: {resident} KiB, and {grown} KiB more");
    ensure!(grown < MEMORY, "{resident} KiB of memory grew by {grown} KiB");
    ensure!(open.again()? == first, "a connection from before");
    node_a_serves(&world, &[Family::V4])?;
    for trouble in ["took a program off its hook", "an edge is not served"] {
        let log = agent.log();
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(trouble)).take(5).collect();
        ensure!(lines.is_empty(), "pods that leave are no trouble: {lines:?}");
    }
    if clsact {
        let name = agent.pins().display().to_string().trim_matches('/').replace('-', "--").replace('/', "-");
        eventually(SOON, || {
            let state: Value = serde_json::from_slice(&fs::read(format!("/run/fairlead/{name}.json"))?)?;
            let on_record = state["clsact"].as_array().context("no list of qdiscs")?;
            let gone = |ifindex: &Value| ifindex.as_u64().is_some_and(|i| i >= u64::from(FIRST));
            ensure!(!on_record.iter().any(gone), "qdiscs of pods that are gone are on record: {on_record:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn pods_that_come_and_go_leave_nothing_behind() -> Result<()> {
    pods_leave_nothing_behind(options())
}

#[test]
fn pods_that_come_and_go_leave_nothing_behind_by_clsact() -> Result<()> {
    pods_leave_nothing_behind(AgentOptions { clsact: true, ..options() })
}
