//! What was kept, and the way to the API server.

use super::*;
use crate::datapath::fake::FakeMaps;
use crate::health::Freshness;
use crate::model::Objects;

const PATIENCE: Duration = Duration::from_secs(5);

fn kept_of(world: &World) -> Objects {
    world.agent.state().expect("everything is known").0
}

/// A node that has rebooted, and knows what `kept` says.
fn rebooted(kept: &Objects) -> World {
    with_maps(kept, FakeMaps::new(LIMITS))
}

fn with_maps(kept: &Objects, maps: FakeMaps) -> World {
    let mut world = World::new(maps);
    let due = world.now + PATIENCE;
    world.agent.restore(kept, Timestamp::UNIX_EPOCH, due);
    world.agent.set_addresses(BTreeMap::new());
    world
}

fn backends(world: &mut World, n: usize) -> Vec<String> {
    let snapshot = world.agent.maps().snapshot();
    let window = snapshot.frontends[&key(n)].internal;
    let slots = if window.len > 0 { &snapshot.slots[&window.base][..] } else { &[] };
    slots.iter().map(|id| snapshot.backends[&(Family::V4, *id)].addr.ip().to_string()).collect()
}

fn is_ready(world: &World) -> bool {
    world.health.is_synced() && world.agent.freshness() == Freshness::Current
}

#[test]
fn what_was_kept_is_served_once_the_source_is_late() {
    let kept = kept_of(&World::full(3, 2));
    let mut world = rebooted(&kept);
    world.settle();
    assert_eq!(world.keys(), []);
    assert_eq!(world.agent.next_wake(), Some(world.now + PATIENCE));
    world.pass(PATIENCE / 2);
    assert_eq!(world.keys(), []);
    world.pass(PATIENCE / 2);
    assert_eq!(world.keys(), [key(0), key(1), key(2)]);
    assert_eq!(backends(&mut world, 1), ["10.0.1.0", "10.0.1.1"]);
    // It is served, and it is not what the source says.
    assert!(world.health.is_synced() && !is_ready(&world));
    assert_eq!(world.agent.freshness(), Freshness::Kept(Timestamp::UNIX_EPOCH));
    assert!(!world.agent.is_complete() && world.agent.state().is_none());
    assert!(world.agent.next_wake().is_none_or(|wake| wake > world.now));
}

#[test]
fn a_source_in_time_is_the_only_one_that_counts() {
    let kept = kept_of(&World::full(3, 2));
    let mut world = rebooted(&kept);
    world.take(service(1));
    world.take(slice(1, &["10.9.9.9"]));
    // As a follower says that knows what was kept.
    world.take(gone(0));
    world.take(gone(2));
    for kind in Kind::ALL {
        assert_eq!(world.keys(), []);
        world.take(Event::Listed(kind));
        world.settle();
    }
    assert_eq!(world.keys(), [key(1)]);
    assert_eq!(backends(&mut world, 1), ["10.9.9.9"]);
    assert!(is_ready(&world));
}

#[test]
fn the_source_counts_as_a_whole_and_only_the_difference_is_written() {
    let kept = kept_of(&World::full(50, 2));
    let mut world = rebooted(&kept);
    world.pass(PATIENCE);
    let before = world.agent.stats();
    for n in 0..49 {
        world.take(service(n));
    }
    world.take(service(60));
    world.take(gone(49));
    world.take(Event::Listed(Kind::Services));
    world.pass(GRACE);
    // Nobody has said yet what 60 has, and 49 stays.
    assert_eq!((world.keys().len(), world.agent.stats()), (50, before));
    for n in 1..49 {
        let addrs: Vec<String> = (0..2).map(|e| format!("10.0.{n}.{e}")).collect();
        world.take(slice(n, &addrs.iter().map(String::as_str).collect::<Vec<_>>()));
    }
    world.take(slice(0, &["10.9.9.9"]));
    world.take(slice(60, &["10.0.60.0"]));
    for kind in [Kind::EndpointSlices, Kind::Pods, Kind::Nodes] {
        assert_eq!(world.agent.stats(), before);
        world.take(Event::Listed(kind));
        world.settle();
    }
    assert!(world.keys().contains(&key(60)) && !world.keys().contains(&key(49)));
    assert_eq!(backends(&mut world, 0), ["10.9.9.9"]);
    assert!(is_ready(&world));
    let after = world.agent.stats();
    assert_eq!(after.compiled - before.compiled, 2, "0 and 60; 49 is gone");
    assert!(after.ops - before.ops < 25, "{}", after.ops - before.ops);
    assert_eq!(after.read, 1);
}

/// An agent that died may have written to the maps what it had no time to keep.
#[test]
fn nothing_is_removed_before_the_source_has_said_so() {
    let mut before = World::full(3, 1);
    let kept = kept_of(&before);
    before.take(service(3));
    before.take(slice(3, &["10.0.3.0"]));
    before.settle();
    let mut world = with_maps(&kept, before.agent.maps().clone());
    world.pass(PATIENCE);
    world.pass(GRACE);
    assert_eq!(world.keys(), [key(0), key(1), key(2), key(3)]);
    assert_eq!(backends(&mut world, 3), ["10.0.3.0"]);
    world.list();
    world.settle();
    assert_eq!(world.keys(), [key(0), key(1), key(2)]);
}

#[test]
fn pods_that_may_not_be_read_are_not_served_from_what_was_kept() {
    let mut before = World::full(1, 1);
    let port = HostPort {
        name: String::new(),
        host_port: 8080,
        host_ip: None,
        container_port: 80,
        protocol: Protocol::Tcp,
    };
    let pod = Pod {
        node: Some("node-a".into()),
        addrs: vec!["10.0.0.7".parse().unwrap()],
        ports: vec![port],
        ..Pod::named(PodName { namespace: "ns".into(), name: "p".into() })
    };
    before.take(Event::Changed(Change::Pod(Arc::new(pod))));
    before.settle();
    let mut world = rebooted(&kept_of(&before));
    world.pass(PATIENCE);
    assert_eq!(world.keys().len(), 2);
    world.take(Event::Refused(Kind::Pods));
    for kind in [Kind::Services, Kind::EndpointSlices, Kind::Nodes] {
        world.take(Event::Listed(kind));
    }
    world.settle();
    assert_eq!(world.keys(), [key(0)]);
}

#[test]
fn a_source_that_does_not_answer_makes_stale() {
    let mut world = World::full(1, 1);
    assert!(is_ready(&world));
    // Not every server has them.
    world.take(Event::Answers(Kind::ServiceCidrs, false));
    assert_eq!(world.agent.freshness(), Freshness::Current);
    world.take(Event::Answers(Kind::Services, false));
    let Freshness::Unanswered(since) = world.agent.freshness() else { panic!("it is stale") };
    world.take(Event::Answers(Kind::Nodes, false));
    world.take(Event::Answers(Kind::Services, true));
    assert_eq!(world.agent.freshness(), Freshness::Unanswered(since));
    world.take(Event::Answers(Kind::Nodes, true));
    assert_eq!(world.agent.freshness(), Freshness::Current);
}

/// The agent reaches the API server by the address of Service 0.
fn with_lifeline(world: &mut World) {
    world.agent.reach_by((vip(0), 80).into());
}

#[test]
fn the_way_to_the_api_server_keeps_its_last_endpoints() {
    let mut world = World::new(FakeMaps::new(LIMITS));
    with_lifeline(&mut world);
    for n in 0..2 {
        world.take(service(n));
        world.take(slice(n, &["10.0.0.1", "10.0.0.2"]));
    }
    world.list();
    world.settle();
    for n in 0..2 {
        world.take(slice(n, &[]));
    }
    world.settle();
    assert_eq!(backends(&mut world, 0), ["10.0.0.1", "10.0.0.2"]);
    assert_eq!(backends(&mut world, 1), [""; 0], "nobody else keeps anything");
    assert!(world.agent.state().is_none(), "a broken moment is not worth keeping");
    // Others are followed, and so is every further change.
    world.take(slice(0, &["10.0.0.3"]));
    world.settle();
    assert_eq!(backends(&mut world, 0), ["10.0.0.3"]);
    assert!(world.agent.state().is_some());
    // Without its slices, and without itself.
    let name = SliceName { namespace: "ns".into(), name: "svc0-1".into() };
    world.take(Event::Changed(Change::SliceGone(name)));
    world.settle();
    world.take(gone(0));
    world.take(gone(1));
    world.settle();
    assert_eq!((backends(&mut world, 0), world.keys()), (vec!["10.0.0.3".into()], vec![key(0)]));
    // Also when the maps have to be read again.
    world.agent.maps().fail_after = Some(0);
    world.take(service(1));
    world.settle();
    world.pass(RETRY);
    assert_eq!(backends(&mut world, 0), ["10.0.0.3"]);
    world.take(service(0));
    world.take(slice(0, &["10.0.0.4"]));
    world.settle();
    assert_eq!(backends(&mut world, 0), ["10.0.0.4"]);
}

#[test]
fn another_service_may_become_the_way_to_the_api_server() {
    let mut world = World::new(FakeMaps::new(LIMITS));
    with_lifeline(&mut world);
    world.take(service(0));
    world.take(slice(0, &["10.0.0.1"]));
    world.list();
    world.settle();
    world.take(gone(0));
    world.settle();
    let Event::Changed(Change::Service(heir)) = service(1) else { unreachable!() };
    let heir = Service { cluster_ips: vec![vip(0)], ..Arc::unwrap_or_clone(heir) };
    world.take(Event::Changed(Change::Service(Arc::new(heir))));
    world.take(slice(1, &["10.0.0.2"]));
    world.settle();
    world.settle();
    assert_eq!((backends(&mut world, 0), world.keys()), (vec!["10.0.0.2".into()], vec![key(0)]));
    assert!(world.agent.state().is_some());
}

#[test]
fn an_agent_that_starts_in_a_broken_moment_knows_the_way_from_what_was_kept() {
    for late in [false, true] {
        let kept = kept_of(&World::full(2, 1));
        let mut world = World::new(FakeMaps::new(LIMITS));
        with_lifeline(&mut world);
        let due = world.now + PATIENCE;
        world.agent.restore(&kept, Timestamp::UNIX_EPOCH, due);
        world.agent.set_addresses(BTreeMap::new());
        if late {
            world.pass(PATIENCE);
        }
        world.take(service(0));
        world.take(slice(0, &[]));
        world.take(slice(1, &[]));
        world.list();
        world.settle();
        assert_eq!(backends(&mut world, 0), ["10.0.0.0"]);
        assert_eq!(backends(&mut world, 1), [""; 0]);
    }
}
