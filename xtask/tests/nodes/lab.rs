//! The lab itself, without any agent: what the other tests take for granted.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use xtask::lab::{Call, Caller, Family, Lab, Outcome, Pod, Protocol, custody, netns};

use crate::world::XTASK;

fn lab() -> Result<Lab> {
    Lab::new(Path::new(XTASK))
}

fn pods(lab: &Lab) -> Result<[Pod; 4]> {
    let pod = |node, name| lab.add_pod(node, name);
    Ok([pod(&lab.node_a, "a1")?, pod(&lab.node_a, "a2")?, pod(&lab.node_b, "b1")?, pod(&lab.node_b, "b2")?])
}

#[test]
fn pods_and_nodes_reach_each_other_by_their_own_addresses() -> Result<()> {
    let begin = Instant::now();
    let lab = lab()?;
    let pods = pods(&lab)?;
    eprintln!("made in {:?}", begin.elapsed());
    for (pod, protocol) in pods.iter().flat_map(|pod| Protocol::ALL.map(|protocol| (pod, protocol))) {
        pod.listen(protocol, 80)?;
    }
    for node in lab.nodes() {
        node.serve(Protocol::Tcp, &node.addrs.with_port(80))?;
    }
    for (server, family) in pods.iter().flat_map(|pod| Family::ALL.map(|family| (pod, family))) {
        let callers: [&Caller; 6] = [&pods[0], &pods[1], &pods[2], &pods[3], &lab.node_a, &lab.node_b];
        for (caller, protocol) in callers.into_iter().flat_map(|c| Protocol::ALL.map(|p| (c, p))) {
            let call = Call::new(protocol, server.at(family, 80));
            let outcome = caller.ask(call.clone())?;
            let what = format!("{} -> {call:?}: {outcome}", caller.name());
            assert_eq!(outcome.server(), Some(server.name()), "{what}");
            if let Some(pod) = pods.iter().find(|pod| pod.name() == caller.name()) {
                assert_eq!(outcome.seen_as().map(|saw| saw.ip()), Some(pod.addrs.of(family)), "{what}");
            }
            let unconnected = caller.ask(call.unconnected())?;
            assert_eq!(unconnected.server(), Some(server.name()), "{what}");
        }
    }
    for (node, family) in lab.nodes().into_iter().flat_map(|node| Family::ALL.map(|family| (node, family))) {
        for caller in [&*lab.outside, &*lab.far, &*pods[0], &*pods[2], &*lab.node_a, &*lab.node_b] {
            let outcome = caller.ask(Call::tcp(node.at(family, 80)))?;
            assert_eq!(outcome.server(), Some(node.name()), "{} {outcome}", caller.name());
        }
    }
    Ok(())
}

#[test]
fn outcomes_tell_refusal_from_silence() -> Result<()> {
    let lab = lab()?;
    let [a1, _a2, b1, _b2] = pods(&lab)?;
    b1.listen(Protocol::Tcp, 80)?;
    let silence = Duration::from_millis(500);
    for family in Family::ALL {
        for protocol in Protocol::ALL {
            assert_eq!(a1.ask(Call::new(protocol, b1.at(family, 81)))?, Outcome::Refused);
        }
    }
    // Nobody knows the way to a ClusterIP without an agent.
    let nowhere = Call::tcp("10.96.0.1:80".parse()?).patience(silence);
    assert!(matches!(lab.outside.ask(nowhere.clone())?, Outcome::Unreachable(_)));
    // A route into a node does not help: it sends the packet back to the router.
    lab.outside.add_route("10.96.0.0/16", lab.node_a.addrs.v4.into())?;
    assert!(!matches!(lab.outside.ask(nowhere)?, Outcome::Answer(_)));
    let vanished = "10.244.2.200:80".parse()?;
    let outcome = a1.ask(Call::tcp(vanished).patience(silence))?;
    assert!(matches!(outcome, Outcome::TimedOut | Outcome::Unreachable(_)), "{outcome}");
    Ok(())
}

#[test]
fn transfers_tallies_and_open_calls_work() -> Result<()> {
    let lab = lab()?;
    let [a1, _a2, b1, _b2] = pods(&lab)?;
    for protocol in Protocol::ALL {
        b1.listen(protocol, 80)?;
    }
    for protocol in Protocol::ALL {
        let call = Call::new(protocol, b1.at(Family::V6, 80));
        let begin = Instant::now();
        assert_eq!(a1.transfer(call.clone(), 5_000_000)?.server, "b1");
        eprintln!("{protocol}: 5 MB in {:?}", begin.elapsed());
        let tally = lab.node_a.ask_many(call.clone(), 100)?;
        assert_eq!((tally.answers["b1"], tally.failures.len()), (100, 0));
        let (open, first) = lab.node_a.open(call.clone().from_port(4711))?;
        assert_eq!(first.seen_as().map(|saw| saw.port()), Some(4711), "{first}");
        assert_eq!(open.again()?, first);
    }
    let (status, page) = lab.node_a.get(b1.at(Family::V4, 80), "/")?;
    assert_eq!((status, page.starts_with("b1 at 10.244.2.10:80 saw 192.0.2.1:")), (200, true), "{page}");
    Ok(())
}

#[test]
fn nothing_is_left_behind() -> Result<()> {
    let lab = lab()?;
    let prefix = lab.prefix().to_owned();
    let pods = pods(&lab)?;
    pods[0].listen(Protocol::Tcp, 80)?;
    let cgroup = lab.node_a.cgroup.path().to_owned();
    assert!(cgroup.exists());
    assert_eq!(netns::list(&format!("{prefix}-")).len(), 9);
    let [a1, ..] = pods;
    lab.remove_pod(&lab.node_a, a1)?;
    assert_eq!(netns::list(&format!("{prefix}-")).len(), 8);
    drop(lab);
    assert!(!cgroup.exists());
    assert_eq!(netns::list(&prefix), Vec::<String>::new());
    custody::tear_down(&prefix)
}
