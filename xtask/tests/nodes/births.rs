//! Pods are born and die at the pace that Kubernetes reaches at most, or that the machine reaches, and each is served.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::lab::netns::Netns;
use xtask::lab::server::Stop;
use xtask::lab::{AgentOptions, Call, Caller, Family, Node, eventually};

use crate::devices::Belongings;
use crate::world::{PORT, SOON, World, at_vip, options, service};

/// Pods that are born, and others that die, with one tick.
const BATCH: usize = 5;
/// Of devices: those that are born together. 0 is everybody else's.
const FIRST_GROUP: u32 = 1000;
/// 50 pods in a second.
const TICK: Duration = Duration::from_millis(100);
/// Namespaces that pods live in, one after the other.
const HOMES: usize = 60;
/// A new pod reaches a Service within this time, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two attempts.
const ATTEMPT: Duration = Duration::from_millis(100);
/// Pods of the short run: 8 s.
const PODS: usize = 400;

/// A namespace for pods.
struct Home {
    ns: Netns,
    caller: Caller,
    number: usize,
}

impl Home {
    fn device(&self) -> String {
        format!("cali{}", 1000 + self.number)
    }

    /// What makes a pod of it, on the node.
    fn birth(&self, group: u32) -> String {
        let (device, ns, low) = (self.device(), self.ns.name(), 100 + self.number);
        format!(
            "link add {device} group {group} type veth peer name eth0 netns {ns}\n\
             link set {device} address ee:ee:ee:ee:ee:ee up\n\
             route add 10.244.1.{low}/32 dev {device}\n"
        )
    }

    /// How long after its birth a pod reaches a Service.
    fn lag(&self, born: Instant) -> Result<Duration> {
        self.ns.ip(&format!(
            "link set eth0 up\n\
             addr add 10.244.1.{}/32 dev eth0\n\
             route add 169.254.1.1 dev eth0 scope link\n\
             neigh add 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent\n\
             route add default via 169.254.1.1 dev eth0\n",
            100 + self.number
        ))?;
        let call = Call::tcp(at_vip(1, Family::V4, PORT)).patience(ATTEMPT);
        while self.caller.ask(call.clone())?.server() != Some("a1") {
            ensure!(born.elapsed() < PATIENCE, "{} is never served", self.device());
        }
        Ok(born.elapsed())
    }
}

fn homes(world: &World, stop: &Stop) -> Result<Vec<Home>> {
    let names: Vec<String> = (0..HOMES).map(|n| format!("{}-home{n}", world.lab().prefix())).collect();
    let made = Netns::create(&names)?.into_iter().enumerate();
    let home = |(number, ns): (usize, Netns)| {
        let caller = Caller::in_thread(&format!("home{number}"), &ns, stop)?;
        Ok(Home { ns, caller, number })
    };
    made.map(home).collect()
}

/// A pod that was served, of this group.
type Served<'a> = (u32, &'a Home, Result<Duration>);

/// `count` pods, at the pace or as soon as there is a namespace; how long each waited. Those that were born together die
/// together when they have been served: one by one takes the kernel longer than the agent.
fn live(node: &Node, homes: &[Home], count: usize) -> Result<Vec<Duration>> {
    thread::scope(|scope| {
        let mut free: Vec<&Home> = homes.iter().collect();
        let (served, news) = mpsc::channel::<Served<'_>>();
        let mut groups: BTreeMap<u32, Vec<&Home>> = BTreeMap::new();
        let mut lags = vec![];
        let begun = Instant::now();
        for group in FIRST_GROUP..FIRST_GROUP + u32::try_from(count / BATCH)? {
            thread::sleep((TICK * (group - FIRST_GROUP)).saturating_sub(begun.elapsed()));
            while free.len() < BATCH {
                bury(node, news.recv().ok().into_iter(), &mut groups, &mut free, &mut lags)?;
            }
            let babies = free.split_off(free.len() - BATCH);
            node.ns.ip(&babies.iter().fold(String::new(), |script, home| script + &home.birth(group)))?;
            let born = Instant::now();
            for home in babies {
                let served = served.clone();
                scope.spawn(move || drop(served.send((group, home, home.lag(born)))));
            }
            bury(node, news.try_iter(), &mut groups, &mut free, &mut lags)?;
        }
        let pace = f64::from(u32::try_from(count)?) / begun.elapsed().as_secs_f64();
        eprintln!("{count} pods born, {pace:.0} in a second");
        drop(served);
        bury(node, news.into_iter(), &mut groups, &mut free, &mut lags)?;
        lags.sort();
        Ok(lags)
    })
}

/// Notes who was served, and takes the devices of whole groups away.
fn bury<'a>(
    node: &Node,
    news: impl Iterator<Item = Served<'a>>,
    groups: &mut BTreeMap<u32, Vec<&'a Home>>,
    free: &mut Vec<&'a Home>,
    lags: &mut Vec<Duration>,
) -> Result<()> {
    for (group, home, lag) in news {
        let so_far = || format!("{} were served, after {:?} at worst", lags.len(), lags.iter().max());
        let lag = lag.with_context(so_far)?;
        lags.push(lag);
        let together = groups.entry(group).or_default();
        together.push(home);
        if together.len() == BATCH {
            node.ns.ip(&format!("link del group {group}\n"))?;
            free.append(together);
        }
    }
    Ok(())
}

/// Both at a time would be a hundred pods a second.
static ONE_AFTER_THE_OTHER: Mutex<()> = Mutex::new(());

fn fifty_pods_a_second(options: AgentOptions) -> Result<()> {
    let _turn = ONE_AFTER_THE_OTHER.lock().unwrap_or_else(PoisonError::into_inner);
    let world = World::with_services(options, |world| vec![service(1, [&world.a1])])?;
    let (node, stop) = (world.node_a(), Stop::new()?);
    let homes = homes(&world, &stop)?;
    let agent = world.cluster.agent(node)?;
    // After the first ones an agent has all that it ever needs.
    live(node, &homes, 50)?;
    let settled = || -> Result<Belongings> {
        thread::sleep(Duration::from_millis(300));
        Belongings::of(&agent)
    };
    let before = eventually(SOON, || {
        let [one, two] = [settled()?, settled()?];
        ensure!(one == two, "{one:?}, then {two:?}");
        Ok(two)
    })?;
    let count = match std::env::var("FAIRLEAD_PODS") {
        Ok(count) => count.parse().context("FAIRLEAD_PODS")?,
        Err(_) => PODS,
    };
    let lags = live(node, &homes, count).with_context(|| {
        let log = agent.log();
        let last: Vec<&str> = log.lines().rev().take(40).collect();
        format!("the agent's log, the last line first:\n{}", last.join("\n"))
    })?;
    eprintln!("served after {:?} (median), {:?} (worst)", lags[lags.len() / 2], lags[lags.len() - 1]);
    eventually(SOON, || {
        let after = settled()?;
        ensure!(after.is_within(&before), "{after:?}, not {before:?}");
        Ok(())
    })
}

#[test]
fn fifty_pods_a_second_are_served_and_leave_nothing() -> Result<()> {
    fifty_pods_a_second(options())
}

#[test]
fn fifty_pods_a_second_are_served_and_leave_nothing_by_clsact() -> Result<()> {
    fifty_pods_a_second(AgentOptions { clsact: true, ..options() })
}
