//! Somebody else writes into the maps.

use ipnet::IpNet;
use lb_common::abi::{OwnerName, address_flags, backend_state};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::strategy::ValueTree;

use super::*;
use crate::entries::{BackendEntry, Snapshot};

const PERIOD: Duration = Duration::from_secs(30);

/// Changes one entry, or some, in a way that the maps were not meant to change; which of several, the index says.
type Wound = (&'static str, fn(&mut Snapshot, &mut [u32], Index));

/// Every kind of entry is taken away, altered and added.
const WOUNDS: [Wound; 25] = [
    ("SERVICES4", |maps, _, which| {
        let key = *pick(maps.frontends.keys().filter(|key| key.addr.is_ipv4()), which);
        maps.frontends.remove(&key);
    }),
    ("SERVICES6", |maps, _, which| {
        let key = *pick(maps.frontends.keys().filter(|key| key.addr.is_ipv6()), which);
        maps.frontends.remove(&key);
    }),
    ("SERVICES4", |maps, _, which| {
        let v4 = maps.frontends.iter_mut().filter(|(key, _)| key.addr.is_ipv4());
        pick(v4, which).1.flags ^= 0x80;
    }),
    ("SERVICES6", |maps, _, which| {
        let v6 = maps.frontends.iter_mut().filter(|(key, _)| key.addr.is_ipv6());
        pick(v6, which).1.internal.base += 1;
    }),
    ("SERVICES4", |maps, _, _| {
        let entry = *maps.frontends.values().next().unwrap();
        maps.frontends.insert(FrontendKey { port: 9, ..key(0) }, entry);
    }),
    ("SERVICES6", |maps, _, _| {
        let foreign = FrontendKey { addr: "fd00::9".parse().unwrap(), ..key(0) };
        maps.frontends.insert(foreign, abi::Service::default());
    }),
    ("BACKENDS4", |maps, _, which| {
        let id = *pick(maps.backends.keys().filter(|(family, _)| *family == Family::V4), which);
        maps.backends.remove(&id);
    }),
    ("BACKENDS6", |maps, _, which| {
        let v6 = maps.backends.iter_mut().filter(|((family, _), _)| *family == Family::V6);
        pick(v6, which).1.state = backend_state::TERMINATING;
    }),
    ("BACKENDS4", |maps, _, _| {
        let addr = "192.0.2.99:9".parse().unwrap();
        let foreign = BackendEntry { addr, state: backend_state::ACTIVE, flags: 0, generation: 3 };
        maps.backends.insert((Family::V4, 77), foreign);
    }),
    ("SLOTS", |maps, slots, which| {
        let windows = maps.frontends.values().map(|entry| entry.internal).filter(|window| window.len > 0);
        let window = pick(windows, which);
        slots[(window.base + window.len - 1) as usize] = 0;
    }),
    ("SLOTS", |maps, slots, which| {
        let windows = maps.frontends.values().map(|entry| entry.external).filter(|window| window.len > 0);
        slots[pick(windows, which).base as usize] += 1;
    }),
    ("MEMBERS", |maps, _, which| {
        let window = *pick(maps.members.keys(), which);
        maps.members.remove(&window);
    }),
    ("MEMBERS", |maps, _, which| {
        pick(maps.members.values_mut(), which).insert(99);
    }),
    ("SOURCES4", |maps, _, which| {
        let nets = pick(maps.sources.values_mut(), which);
        nets.retain(|net| net.addr().is_ipv6() || net.prefix_len() == 32);
    }),
    ("SOURCES6", |maps, _, which| {
        pick(maps.sources.values_mut(), which).insert("fd09::/64".parse().unwrap());
    }),
    ("SOURCES4", |maps, _, _| {
        maps.sources.insert(99, BTreeSet::from([IpNet::from(vip(0))]));
    }),
    ("NAMES", |maps, _, which| {
        let id = *pick(maps.names.keys(), which);
        maps.names.remove(&id);
    }),
    ("NAMES", |maps, _, which| {
        *pick(maps.names.values_mut(), which) = OwnerName::from(&Owner::Service(name(999)));
    }),
    ("NAMES", |maps, _, _| {
        maps.names.insert(99, OwnerName::from(&Owner::Service(name(999))));
    }),
    ("NETWORKS4", |maps, _, _| maps.networks[0].truncate(0)),
    ("NETWORKS6", |maps, _, _| maps.networks[1][0].1 ^= 0x10),
    ("NETWORKS6", |maps, _, _| maps.networks[1].push(("fd09::/64".parse().unwrap(), 1))),
    ("ADDRESSES4", |maps, _, which| {
        let addr = *pick(maps.addresses.keys().filter(|addr| addr.is_ipv4()), which);
        maps.addresses.remove(&addr);
    }),
    ("ADDRESSES6", |maps, _, which| {
        let v6 = maps.addresses.iter_mut().filter(|(addr, _)| addr.is_ipv6());
        *pick(v6, which).1 ^= address_flags::LOOPBACK;
    }),
    ("ADDRESSES4", |maps, _, _| {
        maps.addresses.insert("192.0.2.99".parse().unwrap(), address_flags::SERVICE);
    }),
];

/// Some wounds take nothing away any more if others came first.
fn pick<T>(items: impl Iterator<Item = T>, which: Index) -> T {
    let mut items: Vec<T> = items.collect();
    items.swap_remove(which.index(items.len()))
}

/// Dual stack, with everything that a Service can have.
fn rich(n: usize) -> Event {
    let Event::Changed(Change::Service(service)) = service(n) else { unreachable!() };
    let nets = |net: &str| BTreeSet::from([net.parse().unwrap()]);
    let mut service = Arc::unwrap_or_clone(service);
    service.kind = ServiceType::LoadBalancer;
    service.ports[0].node_port = Some(30_000 + u16::try_from(n).unwrap());
    service.families = vec![Family::V4, Family::V6];
    service.cluster_ips.push(format!("fd00:1::{n}").parse().unwrap());
    service.load_balancer_ips =
        vec![format!("198.51.100.{n}").parse().unwrap(), format!("fd00:2::{n}").parse().unwrap()];
    service.source_ranges =
        BTreeMap::from([(Family::V4, nets("10.9.0.0/24")), (Family::V6, nets("fd03::/64"))]);
    service.affinity = Some(60);
    Event::Changed(Change::Service(Arc::new(service)))
}

fn slice6(n: usize, addrs: &[&str]) -> Event {
    let Event::Changed(Change::Slice(slice)) = slice(n, addrs) else { unreachable!() };
    let mut slice = Arc::unwrap_or_clone(slice);
    slice.name.name = format!("svc{n}-2").into();
    Event::Changed(Change::Slice(Arc::new(slice)))
}

fn rich_world() -> World {
    let mut world = World::new(FakeMaps::new(LIMITS));
    for n in 0..3 {
        world.take(rich(n));
        world.take(slice(n, &[&format!("10.0.0.{n}"), "10.0.1.1"]));
        world.take(slice6(n, &[&format!("fd00:3::{n}"), "fd00:3::99"]));
    }
    world.list();
    world.agent.set_addresses(BTreeMap::from([
        ("192.0.2.1".parse().unwrap(), address_flags::NODE),
        ("fd00:9::1".parse().unwrap(), address_flags::NODE),
    ]));
    let pods = ["10.0.0.0/16", "fd00:3::/64"].map(|net| net.parse().unwrap());
    world.agent.set_pod_networks(Some(pods.to_vec()));
    world.agent.check_maps_every(PERIOD, world.now);
    world.settle();
    world
}

impl World {
    /// Lets a round over the maps come and end; the operations carried out.
    fn round(&mut self) -> u64 {
        let before = self.agent.stats().ops;
        let end = self.now + PERIOD + PERIOD;
        while let Some(wake) = self.agent.next_wake().filter(|wake| *wake < end) {
            self.now = self.now.max(wake);
            self.settle();
        }
        self.now = end;
        self.agent.stats().ops - before
    }

    fn content(&mut self) -> Snapshot {
        self.agent.maps().snapshot()
    }

    fn wound(&mut self, (_, wound): Wound, which: Index) {
        self.agent.maps().damage(|maps, slots| wound(maps, slots, which));
    }
}

fn first() -> Index {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    any::<Index>().new_tree(&mut runner).unwrap().current()
}

#[test]
fn what_somebody_else_did_to_the_maps_is_undone_and_nothing_else_is_written() {
    for (i, wound) in WOUNDS.into_iter().enumerate() {
        let mut world = rich_world();
        assert_eq!(world.round(), 0, "nothing is wrong yet");
        let before = world.content();
        world.wound(wound, first());
        assert_ne!(world.content(), before, "{i}: {}", wound.0);
        let written = world.round();
        assert_eq!(world.content(), before, "{i}: {}", wound.0);
        assert!((1..=2).contains(&written), "{i}: {} needed {written} operations", wound.0);
        assert_eq!(world.agent.stats().read, 1, "{i}: {}", wound.0);
        assert_eq!(world.round(), 0, "{i}: {}", wound.0);
    }
}

#[test]
fn the_check_waits_for_its_period_and_can_be_switched_off() {
    let mut world = rich_world();
    world.round();
    let before = world.content();
    world.agent.check_maps_every(PERIOD, world.now);
    world.wound(WOUNDS[0], first());
    world.pass(PERIOD / 2);
    assert_ne!(world.content(), before);
    world.pass(PERIOD / 2);
    assert_eq!(world.content(), before);

    world.agent.check_maps_every(Duration::ZERO, world.now);
    world.wound(WOUNDS[0], first());
    world.pass(PERIOD * 100);
    assert_ne!(world.content(), before);
    assert_eq!(world.agent.next_wake(), None);
}

#[test]
fn what_waits_for_the_end_of_its_grace_time_is_left_alone() {
    let mut world = rich_world();
    world.round();
    world.agent.check_maps_every(GRACE / 4, world.now);
    world.take(gone(0));
    world.take(slice(1, &["10.0.0.77"]));
    world.settle();
    let (ops, content) = (world.agent.stats().ops, world.content());
    for _ in 0..2 {
        world.pass(GRACE / 3);
        assert_eq!((world.agent.stats().ops, world.content()), (ops, content.clone()));
    }
}

#[test]
fn the_check_takes_little_at_a_time() {
    let mut world = World::full(2000, 1);
    world.agent.check_maps_every(PERIOD, world.now);
    world.now += PERIOD;
    let mut slices = 0;
    world.agent.maps().damage(|maps, _| {
        maps.frontends.pop_last();
    });
    while world.keys().len() < 2000 {
        world.settle();
        let wake = world.agent.next_wake().unwrap();
        assert!(wake >= world.now + crate::agent::check::PAUSE);
        world.now = wake;
        slices += 1;
    }
    // Addresses and frontends that are there; then 2000 backends, windows, names and frontends that should be.
    assert!((8..=16).contains(&slices), "{slices}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_damage_heals(wounds in prop::collection::vec((0..WOUNDS.len(), any::<Index>()), 1..8)) {
        let mut world = rich_world();
        world.round();
        let before = world.content();
        let mut hurt = BTreeSet::new();
        for (wound, which) in wounds {
            // Twice the same may undo itself, or find nothing to hurt.
            if hurt.insert(WOUNDS[wound].0) {
                world.wound(WOUNDS[wound], which);
            }
        }
        world.round();
        prop_assert_eq!(world.agent.stats().read, 1);
        prop_assert_eq!(world.content(), before);
    }
}
