//! Agents are killed, restarted, replaced by other builds and by others with other maps, while clients keep talking:
//! nobody notices.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use xtask::lab::client::{OpenCall, Tally};
use xtask::lab::eventually;
use xtask::lab::{
    Agent, AgentOptions, Call, Caller, Family, Manifests, Node, Outcome, Pod, Port, Protocol, Service, Xdp,
};

use crate::world::{Findings, PORT, SOON, World, agent, at_vip, node_port, options, service, until, vip};

/// A datagram that is answered later is lost. Machines are shared and slow.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two rounds of calls: small maps shall not forget flows that are in use.
const PAUSE: Duration = Duration::from_millis(15);
/// New calls between two looks at those that are open.
const BATCH: u32 = 3;
/// Numbers of Services that change all the time.
const RESTLESS: std::ops::Range<u8> = 10..20;

/// Kills soon after the start, before the programs are loaded; and those after the agent has begun to write.
const EARLY: usize = 88;
const LATE: usize = 12;
/// What the log says when writing begins.
const WRITING: &str = "external edge";

/// One client: connections and UDP sockets that stay open, and new calls.
struct Client<'a> {
    caller: &'a Caller,
    open: Vec<(Call, OpenCall<'a>, Outcome)>,
    /// With whoever may answer.
    new: Vec<(Call, &'static [&'static str])>,
}

/// What clients have seen.
#[derive(Default)]
struct Seen {
    findings: Findings,
    /// Answers on open connections, answers to new calls.
    again: u32,
    new: u32,
    /// New calls that failed.
    failed: Vec<String>,
}

impl<'a> Client<'a> {
    fn new(
        caller: &'a Caller,
        open: impl IntoIterator<Item = Call>,
        new: impl IntoIterator<Item = (Call, &'static [&'static str])>,
    ) -> Result<Self> {
        let open = open.into_iter().map(|call| {
            let call = call.patience(PATIENCE);
            let (session, first) = caller.open(call.clone())?;
            ensure!(first.server().is_some(), "{} -> {}: {first}", caller.name(), call.target);
            Ok((call, session, first))
        });
        let new = new.into_iter().map(|(call, servers)| (call.patience(PATIENCE), servers));
        Ok(Self { caller, open: open.collect::<Result<_>>()?, new: new.collect() })
    }

    fn keep_talking(&self, done: &AtomicBool) -> Result<Seen> {
        let mut seen = Seen::default();
        while !done.load(Ordering::Relaxed) && !seen.findings.enough() {
            thread::sleep(PAUSE);
            for (call, session, first) in &self.open {
                let now = session.again()?;
                seen.again += 1;
                seen.findings.check(now == *first, || self.what(call, &format!("{now} after {first}")));
            }
            for (call, servers) in &self.new {
                let Tally { answers, failures } = self.caller.ask_many(call.clone(), BATCH)?;
                seen.new += answers.values().sum::<u32>();
                let known = answers.keys().all(|server| servers.contains(&&**server));
                seen.findings.check(known, || self.what(call, &format!("{answers:?}")));
                if !failures.is_empty() {
                    seen.failed.push(self.what(call, &format!("{failures:?}")));
                }
            }
        }
        Ok(seen)
    }

    fn what(&self, call: &Call, what: &str) -> String {
        format!("{} -> {:?} {}: {what}", self.caller.name(), call.protocol, call.target)
    }
}

/// Services of which everybody knows who should answer: 1 is a1 or b1, 2 is a2, 3 is b2.
fn services(world: &World) -> Vec<Service> {
    vec![service(1, [&world.a1, &world.b1]), service(2, [&world.a2]), service(3, [&world.b2])]
}

const SERVERS: [&[&str]; 3] = [&["a1", "b1"], &["a2"], &["b2"]];

/// Clients of every edge of node-a. `datagrams`: new calls over UDP, too.
fn clients(world: &World, datagrams: bool) -> Result<Vec<Client<'_>>> {
    let lab = world.lab();
    let edges: [(&Caller, &dyn Fn(u8) -> std::net::SocketAddr); 5] = [
        (&lab.outside, &|n| lab.node_a.at(Family::V4, node_port(n))),
        (&lab.far, &|n| lab.node_a.at(Family::V6, node_port(n))),
        (&world.a1, &|n| at_vip(n, Family::V4, PORT)),
        (&world.a2, &|n| at_vip(n, Family::V6, PORT)),
        (&lab.node_a, &|n| at_vip(n, Family::V4, PORT)),
    ];
    let clients = edges.into_iter().map(|(caller, at)| {
        let open = (1..=3).flat_map(|n| [Call::tcp(at(n)), Call::udp(at(n)), Call::udp(at(n)).unconnected()]);
        let new = (1..=3).zip(SERVERS).flat_map(|(n, servers)| {
            let udp = datagrams.then(|| (Call::udp(at(n)).unconnected(), servers));
            [(Call::tcp(at(n)), servers)].into_iter().chain(udp)
        });
        Client::new(caller, open, new)
    });
    clients.collect()
}

/// Writes, changes and deletes Services until it is told to stop. Each change brings new backends.
fn change_services(
    manifests: &Manifests,
    pods: [&Pod; 4],
    rng: &mut fastrand::Rng,
    done: &AtomicBool,
) -> Result<u32> {
    let mut changes = 0;
    while !done.load(Ordering::Relaxed) {
        let n = rng.u8(RESTLESS);
        let mut service = Service::new(&format!("service-{n}"), &vip(n));
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            service = service.port(Port::new(protocol, PORT, rng.u16(9000..9200)).node_port(node_port(n)));
        }
        for pod in pods.into_iter().filter(|_| rng.bool()) {
            service = service.endpoint(pod);
        }
        manifests.apply(&service)?;
        if rng.u8(..4) == 0 {
            manifests.delete(&service.name)?;
        }
        changes += 1;
        thread::sleep(Duration::from_millis(20));
    }
    Ok(changes)
}

/// Does `work` while clients talk and Services change. So many new calls may fail.
fn under_load(
    world: &World,
    clients: &[Client<'_>],
    seed: u64,
    may_fail: usize,
    work: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let done = &AtomicBool::new(false);
    let rng = &mut fastrand::Rng::with_seed(seed);
    let begun = Instant::now();
    thread::scope(|scope| {
        let talking: Vec<_> =
            clients.iter().map(|client| scope.spawn(|| client.keep_talking(done))).collect();
        let (manifests, pods) = (&world.cluster.manifests, world.pods());
        let changing = scope.spawn(move || change_services(manifests, pods, rng, done));
        let worked = work();
        done.store(true, Ordering::Relaxed);
        let mut all = Seen::default();
        for thread in talking {
            let seen = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            all.findings.add(seen.findings);
            all.again += seen.again;
            all.new += seen.new;
            all.failed.extend(seen.failed);
        }
        let changes = changing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        eprintln!(
            "{:?}: {} answers on open connections, {} to new calls, {} of which failed; \
             {changes} changes of Services",
            begun.elapsed(),
            all.again,
            all.new,
            all.failed.len()
        );
        all.findings.check(all.failed.len() <= may_fail, || format!("new calls failed: {:#?}", all.failed));
        all.findings.report();
        worked
    })
}

fn seed() -> u64 {
    let seed = std::env::var("FAIRLEAD_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    eprintln!("FAIRLEAD_SEED={seed}");
    seed
}

/// Starts an agent on node-a.
fn spawn(world: &World, options: &AgentOptions) -> Result<Agent> {
    Agent::spawn(world.lab(), world.node_a(), &agent(), &world.cluster.manifests, options)
}

/// Waits until the agent has said it once more than `before`.
fn until_said(agent: &Agent, what: &str, before: &str) -> Result<()> {
    let said = before.matches(what).count();
    eventually(SOON * 4, || {
        ensure!(agent.log().matches(what).count() > said, "has not said {what:?}:\n{}", agent.log());
        Ok(())
    })
}

/// A restarted agent follows what changed last, and knows nothing that is gone.
fn catches_up(world: &World, node: &Node) -> Result<()> {
    for n in RESTLESS {
        // It may be gone already.
        let _ = world.cluster.manifests.delete(&format!("service-{n}"));
    }
    world.cluster.manifests.apply(&service(4, [&world.b1]))?;
    until(node, &Call::tcp(at_vip(4, Family::V4, PORT)), |outcome| outcome.server() == Some("b1"))?;
    eventually(SOON, || {
        let told = world.cluster.fairlead(node, &["services", "-o", "json"])?;
        let told: serde_json::Value = serde_json::from_str(&told)?;
        let names = told.as_array().context("a list")?.iter().map(|service| service["name"].to_string());
        let names: std::collections::BTreeSet<String> = names.collect();
        ensure!(names.len() == 4, "not four Services: {names:?}");
        Ok(())
    })
}

/// Rules 110 and 151.
#[test]
fn nobody_notices_a_hundred_kills() -> Result<()> {
    let world = World::with_services(options(), services)?;
    let seed = seed();
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut agents = world.cluster.take_agents();
    let (other, first) = (agents.pop(), agents.pop().context("two agents")?);
    let mut late: Vec<bool> = [vec![false; EARLY], vec![true; LATE]].concat();
    rng.shuffle(&mut late);
    let clients = clients(&world, true)?;
    under_load(&world, &clients, seed, 0, || {
        thread::sleep(Duration::from_millis(rng.u64(..300)));
        let mut log = first.log();
        first.kill()?;
        for late in late {
            let agent = spawn(&world, &options())?;
            if late {
                until_said(&agent, WRITING, &log)?;
            }
            thread::sleep(Duration::from_millis(rng.u64(..300)));
            log = agent.log();
            agent.kill()?;
        }
        Ok(())
    })?;
    drop(clients);
    world.cluster.start()?;
    catches_up(&world, world.node_a())?;
    drop(other);
    Ok(())
}

#[test]
fn nobody_notices_another_build() -> Result<()> {
    other_builds(&options())
}

#[test]
fn nobody_notices_another_build_in_clsact_filters() -> Result<()> {
    other_builds(&AgentOptions { clsact: true, xdp: Xdp::Off, ..options() })
}

/// Programs with other load-time values take the place of each other on every hook.
fn other_builds(options: &AgentOptions) -> Result<()> {
    let world = World::with_services(options.clone(), services)?;
    let mut agents = world.cluster.take_agents();
    let (_other, mut agent) = (agents.pop(), agents.pop().context("two agents")?);
    let clients = clients(&world, true)?;
    under_load(&world, &clients, seed(), 0, || {
        for level in ["error", "off", "error", "off"] {
            agent.stop()?;
            let mut options = options.clone();
            options.args.push(format!("--datapath-log-level={level}"));
            agent = Agent::start(
                world.lab(),
                world.node_a(),
                &crate::world::agent(),
                &world.cluster.manifests,
                &options,
            )?;
        }
        Ok(())
    })
}

#[test]
fn flows_are_carried_to_maps_of_another_layout_and_back() -> Result<()> {
    other_layouts(&options())
}

#[test]
fn flows_are_carried_to_maps_of_another_layout_and_back_with_clsact() -> Result<()> {
    other_layouts(&AgentOptions { clsact: true, xdp: Xdp::Off, ..options() })
}

/// Upgrades and downgrades between two layouts, whole and killed at random moments on the way.
fn other_layouts(options: &AgentOptions) -> Result<()> {
    let world = World::with_services(options.clone(), services)?;
    let seed = seed();
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut agents = world.cluster.take_agents();
    let (_other, first) = (agents.pop(), agents.pop().context("two agents")?);
    let mut log = first.log();
    first.stop()?;
    let clients = clients(&world, false)?;
    let layout = |layout| AgentOptions { layout: Some(layout), ..options.clone() };
    // What is left is in docs/node.md: a flow that is sent on from another port, a filter, a socket's peer.
    let may_fail = clients.len();
    under_load(&world, &clients, seed, may_fail, || {
        for _ in 0..2 {
            for (there, way) in
                [("rehearsal", "killed on the way there"), ("return", "killed on the way back")]
            {
                let agent = spawn(&world, &layout(there))?;
                until_said(&agent, "the maps get another layout", &log).context(way)?;
                thread::sleep(Duration::from_micros(rng.u64(..40_000)));
                agent.kill()?;
                let agent = Agent::start(
                    world.lab(),
                    world.node_a(),
                    &crate::world::agent(),
                    &world.cluster.manifests,
                    &layout(there),
                )
                .context(way)?;
                log = agent.log();
                agent.stop()?;
            }
        }
        Ok(())
    })?;
    for line in log.lines().filter(|line| line.contains("another layout")) {
        eprintln!("{line}");
    }
    // Without the rehearsal, nothing is left of it.
    drop(clients);
    world.cluster.start()?;
    catches_up(&world, world.node_a())
}
