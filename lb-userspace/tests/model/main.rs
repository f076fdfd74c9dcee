//! Tier 1: random histories of random clusters, from Kubernetes' objects to what becomes of packets, against a naive
//! reference that is written from the contract (`reference.rs`).
//!
//! Every change goes through the agent as its source would tell it, and its operations are carried out one by one.
//! After each, new packets and sockets find the old answer or the new one, and after all of them the new one.

mod cluster;
mod node;
mod reference;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use fairlead::entries::{Family, Protocol};
use fairlead::explain;
use lb_common::abi::backend_state;
use nix::time::{ClockId, clock_gettime};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngSeed, TestError, TestRunner};

use self::cluster::{
    Change, Cluster, NODE, NODE_PORTS, Places, SERVICE_PORTS, Settings, change, ip, objects, settings,
};
use self::node::{HostNode, Meaning, Seen};
use self::reference::{Answer, Ask, Client, answer};

/// Asks of one family; tells them apart by their place in the list.
fn asks(places: &Places) -> Vec<Ask> {
    let addresses = |texts: &[&str]| texts.iter().map(|text| ip(text)).collect::<Vec<IpAddr>>();
    let external = addresses(&[places.load_balancer_ips[0], places.load_balancer_ips[1], places.external_ip]);
    let rest = [places.unallocated, places.nowhere].map(ip);
    let own = addresses(&[places.node[0], places.node[1], places.loopback]);
    let services = addresses(&places.cluster_ips);
    let at = |addrs: &[IpAddr], ports: &[u16]| {
        let all = addrs.iter().flat_map(|addr| ports.iter().map(|port| SocketAddr::new(*addr, *port)));
        all.collect::<Vec<_>>()
    };
    let mut destinations = at(&services, &SERVICE_PORTS);
    destinations.extend(at(&external, &SERVICE_PORTS));
    destinations.extend(at(&own, &NODE_PORTS));
    destinations.extend(at(&own[..2], &SERVICE_PORTS));
    destinations.extend(at(&rest, &SERVICE_PORTS[..1]));
    destinations.extend(at(&[services[0], external[0]], &NODE_PORTS[..1]));
    let mut asks = vec![];
    for to in destinations {
        let mut clients = vec![
            Client::Process,
            Client::Pod(ip(places.clients[0])),
            Client::Pod(ip(places.pods_here[0])),
            Client::Wire(ip(places.clients[1])),
            Client::Wire(ip(places.outside[0])),
        ];
        // Where it matters who is outside.
        if external.contains(&to.ip()) {
            clients.extend([ip(places.other_node), ip(places.outside[1]), to.ip()].map(Client::Wire));
        }
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            asks.extend(clients.iter().map(|client| Ask { client: *client, to, protocol }));
        }
    }
    asks
}

/// Whether an answer allows what was seen.
fn allows(answer: &Answer, seen: Seen) -> bool {
    match (answer, seen) {
        (Answer::Untouched, Seen::Untouched)
        | (Answer::Rejected, Seen::Rejected)
        | (Answer::Dropped, Seen::Dropped) => true,
        (Answer::Translated(backends), Seen::Translated(backend, source)) => {
            backends.get(&backend) == Some(&source)
        }
        _ => false,
    }
}

/// A history and the node that lives through it.
struct Story {
    cluster: Cluster,
    node: HostNode,
    asks: Vec<Ask>,
    answers: Vec<Answer>,
}

impl Story {
    fn new(settings: Settings, objects: Vec<Change>, family: Family) -> Self {
        let mut cluster = Cluster { settings, ..Cluster::default() };
        for object in objects {
            cluster.apply(object);
        }
        let asks = asks(Places::of(family));
        let answers = asks.iter().map(|ask| answer(&cluster, ask)).collect();
        Self { node: HostNode::new(&cluster), cluster, asks, answers }
    }

    /// Every packet finds the answer of the contract, and no backend is left out.
    fn check(&self) -> Result<(), TestCaseError> {
        for (ask, answer) in self.asks.iter().zip(&self.answers) {
            let tries = if let Answer::Translated(backends) = answer { backends.len() + 1 } else { 1 };
            let mut seen = BTreeSet::new();
            for chance in (0..).take(tries) {
                self.node.forget();
                let one = self.node.ask(ask, chance);
                let fits = one.is_ok_and(|seen| allows(answer, seen));
                prop_assert!(fits, "{ask:?}: {one:?} instead of {answer:?}");
                seen.extend(one);
            }
            let maglev = reference::frontend(&self.cluster, ask.to, ask.protocol)
                .is_some_and(|frontend| frontend.service.maglev);
            if let Answer::Translated(backends) = answer
                && !maglev
            {
                prop_assert_eq!(seen.len(), backends.len(), "{:?}: {:?} of {:?}", ask, seen, answer);
            }
        }
        Ok(())
    }

    /// Takes a change. After every single operation each packet finds the old answer or the new one.
    fn take(&mut self, change: Change) -> Result<(), TestCaseError> {
        let Some(news) = self.cluster.apply(change) else { return Ok(()) };
        let old = std::mem::take(&mut self.answers);
        self.answers = self.asks.iter().map(|ask| answer(&self.cluster, ask)).collect();
        let (asks, new) = (&self.asks, &self.answers);
        let mut count = 0;
        let mut result = Ok(());
        self.node.take(news, &self.cluster, |node, op| {
            count += 1;
            for (i, (ask, (old, new))) in (0u32..).zip(asks.iter().zip(old.iter().zip(new))) {
                // Most asks are about nothing: they take turns.
                if (old, new) == (&Answer::Untouched, &Answer::Untouched) && !(i + count).is_multiple_of(8) {
                    continue;
                }
                node.forget();
                let seen = node.ask(ask, count);
                let fits = seen.is_ok_and(|seen| allows(old, seen) || allows(new, seen));
                if result.is_ok() && !fits {
                    result = Err(format!("after {op:?}: {ask:?}: {seen:?}, neither {old:?} nor {new:?}"));
                }
            }
        });
        result.map_err(TestCaseError::fail)
    }
}

/// Runs a property for some cases, but not for long: the time that counts is the processor's, machines may be busy. A
/// failure names the seed that repeats it.
fn holds<S: Strategy>(cases: u32, strategy: &S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let mut config = Config { failure_persistence: None, max_shrink_time: 60_000, ..Config::default() };
    let patience = if env::var_os("PROPTEST_CASES").is_some() {
        Duration::MAX
    } else {
        config.cases = cases;
        Duration::from_secs(10)
    };
    let seed = match config.rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => fastrand::u64(..),
    };
    config.rng_seed = RngSeed::Fixed(seed);
    let worked = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from);
    let (start, failed) = (worked(), Cell::new(false));
    let outcome = TestRunner::new(config).run(strategy, |value| {
        if worked().saturating_sub(start) > patience && !failed.get() {
            return Ok(());
        }
        let result = test(value);
        failed.set(failed.get() || result.is_err());
        result
    });
    match outcome {
        Ok(()) => {}
        Err(TestError::Fail(reason, value)) => {
            panic!("{reason}\nPROPTEST_RNG_SEED={seed} repeats it: {value:?}")
        }
        Err(error) => panic!("PROPTEST_RNG_SEED={seed} repeats it: {error}"),
    }
}

fn family() -> impl Strategy<Value = Family> {
    prop_oneof![Just(Family::V4), Just(Family::V6)]
}

#[test]
fn histories_answer_as_the_contract_says() {
    let strategy = (settings(), objects(), vec(change(), 1..6), family());
    holds(200, &strategy, |(settings, objects, changes, family)| {
        let mut story = Story::new(settings, objects, family);
        story.check()?;
        for change in changes {
            for step in story.cluster.in_steps(change) {
                story.take(step)?;
            }
            story.check()?;
        }
        // The maps mean what they would without a history.
        let afresh = HostNode::new(&story.cluster).snapshot();
        prop_assert_eq!(Meaning::of(&story.node.snapshot()), Meaning::of(&afresh));
        // Nothing is left of what goes.
        let services: Vec<_> = story.cluster.services.keys().copied().collect();
        for name in services {
            story.take(Change::ServiceGone(name))?;
        }
        story.take(Change::Pause)?;
        let left = story.node.snapshot();
        prop_assert!(Meaning::of(&left).is_empty(), "{left:?}");
        prop_assert!(left.sources.is_empty() && left.members.is_empty(), "{left:?}");
        prop_assert!(
            left.backends.values().all(|backend| backend.state == backend_state::UNUSED),
            "{left:?}"
        );
        Ok(())
    });
}

/// Something that happens to clients with affinity.
#[derive(Clone, Debug)]
enum Step {
    Change(Change),
    /// One of the asks, and chance.
    Connect(Index, u32),
    /// Seconds.
    Pass(u64),
}

/// A client of a port of a Service.
type Known = (&'static str, u16, Protocol, Client);

/// An explanation says what is: of all that want a frontend one has it, and is who answers when it is asked for.
#[test]
fn every_frontend_is_explained_with_one_owner() {
    let strategy = (settings(), objects(), family());
    holds(200, &strategy, |(settings, objects, family)| {
        let cluster = Story::new(settings, objects, family).cluster;
        let mut known = explain::Objects::default();
        for object in cluster.written() {
            known.add(object).map_err(TestCaseError::fail)?;
        }
        let addresses = cluster.addresses.clone();
        let node = explain::NodeFacts { addresses, known: true, ..explain::NodeFacts::unknown(NODE) };
        let mut owners: BTreeMap<_, usize> = BTreeMap::new();
        for name in cluster.services.keys() {
            let subject = explain::Subject::Service((*name).into());
            let said = explain::explain(&subject, "ns", &known, &node).unwrap();
            explain::render::text(&said, &mut vec![]).unwrap();
            serde_json::to_string(&said).unwrap();
            for client in &said.clients {
                let owned = client.inside.outcome != "other";
                *owners.entry(client.key).or_default() += usize::from(owned);
                let Some(addr) = client.address.filter(|_| owned) else { continue };
                let at =
                    explain::Subject::Address(SocketAddr::new(addr, client.port), Some(client.key.protocol));
                let asked = explain::explain(&at, "ns", &known, &node).unwrap();
                prop_assert_eq!(asked.service.map(|service| service.name), Some((*name).to_owned()));
            }
        }
        prop_assert!(owners.values().all(|count| *count == 1), "{owners:?}");
        Ok(())
    });
}

/// Rules 118 and 140: a client keeps its backend while that may be chosen, until it has opened no connection for the
/// time-out.
#[test]
fn clients_keep_their_backend_as_affinity_says() {
    let step = prop_oneof![
        2 => change().prop_map(Step::Change),
        12 => (any::<Index>(), 0..1000u32).prop_map(|(which, chance)| Step::Connect(which, chance)),
        2 => (1..15u64).prop_map(Step::Pass),
    ];
    let strategy = (settings(), objects(), vec(step, 20..60), family());
    holds(300, &strategy, |(settings, mut objects, steps, family)| {
        for object in &mut objects {
            if let Change::Service(_, service) = object {
                service.affinity = Some(10);
            }
        }
        let mut story = Story::new(settings, objects, family);
        let mut known: BTreeMap<Known, (SocketAddr, u64)> = BTreeMap::new();
        let mut now = 0;
        for step in steps {
            match step {
                Step::Change(change) => {
                    story.change(change);
                    known.retain(|client, (backend, _)| story.may_keep(client, *backend));
                }
                Step::Connect(which, chance) => story.connect(which, chance, now, &mut known)?,
                Step::Pass(seconds) => {
                    story.node.pass(seconds);
                    now += seconds;
                }
            }
        }
        Ok(())
    });
}

impl Story {
    /// Takes a change unwatched.
    fn change(&mut self, change: Change) {
        let Some(news) = self.cluster.apply(change) else { return };
        self.answers = self.asks.iter().map(|ask| answer(&self.cluster, ask)).collect();
        self.node.take(news, &self.cluster, |_, _| ());
    }

    /// Whether anybody who asks for this port may still come to the backend, and clients are still remembered.
    fn may_keep(&self, (name, port, protocol, _): &Known, backend: SocketAddr) -> bool {
        self.asks.iter().zip(&self.answers).any(|(ask, answer)| {
            let Answer::Translated(backends) = answer else { return false };
            let Some(frontend) = reference::frontend(&self.cluster, ask.to, ask.protocol) else {
                return false;
            };
            (frontend.name, frontend.port.port, frontend.port.protocol) == (*name, *port, *protocol)
                && frontend.service.affinity.is_some()
                && backends.contains_key(&backend)
        })
    }

    fn connect(
        &self,
        which: Index,
        chance: u32,
        now: u64,
        known: &mut BTreeMap<Known, (SocketAddr, u64)>,
    ) -> Result<(), TestCaseError> {
        // Only what leads somewhere is worth asking; few clients, so that they come back.
        let asks: Vec<_> = self.asks.iter().zip(&self.answers).collect();
        let asks: Vec<_> =
            asks.into_iter().filter(|(_, a)| matches!(a, Answer::Translated(b) if b.len() > 1)).collect();
        if asks.is_empty() {
            return Ok(());
        }
        let (ask, answer) = asks[which.index(asks.len())];
        self.node.forget_flows();
        let seen = self.node.ask(ask, chance);
        let fits = seen.is_ok_and(|seen| allows(answer, seen));
        prop_assert!(fits, "{ask:?}: {seen:?} instead of {answer:?}");
        let Some(frontend) = reference::frontend(&self.cluster, ask.to, ask.protocol) else { return Ok(()) };
        let (Answer::Translated(backends), Ok(Seen::Translated(backend, _)), Some(timeout)) =
            (answer, seen, frontend.service.affinity)
        else {
            return Ok(());
        };
        let client = (frontend.name, frontend.port.port, frontend.port.protocol, ask.client);
        if let Some((before, last)) = known.get(&client)
            && now - last <= u64::from(timeout)
            && backends.contains_key(before)
        {
            prop_assert_eq!(backend, *before, "{:?} after {} s", ask, now - last);
        }
        known.insert(client, (backend, now));
        Ok(())
    }
}
