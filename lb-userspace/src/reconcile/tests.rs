mod crash;

use std::net::SocketAddr;

use lb_common::abi::{address_flags, backend_state, service_flags};
use proptest::prelude::*;
use proptest::sample::subsequence;

use super::*;
use crate::datapath::Maps;
use crate::datapath::fake::FakeMaps;
use crate::entries::{BackendEntry, Frontend, FrontendKind, Protocol, ServiceName, Target, WhenEmpty};

const GRACE: Duration = Duration::from_secs(10);
const ROOMY: Limits =
    Limits { services: 1000, backends: 1000, slots: 16_000, addresses: 1000, sources: 1000, members: 1000 };

fn name(name: &str) -> Owner {
    ServiceName { namespace: "ns".into(), name: name.into() }.into()
}

fn backend(addr: &str) -> Backend {
    Backend { addr: addr.parse().unwrap(), protocol: Protocol::Tcp, local: false }
}

fn key(addr: &str) -> FrontendKey {
    let addr: SocketAddr = addr.parse().unwrap();
    FrontendKey { addr: addr.ip(), port: addr.port(), protocol: Protocol::Tcp }
}

fn target(backends: &[&str]) -> Target {
    let sorted: BTreeSet<Backend> = backends.iter().map(|addr| backend(addr)).collect();
    Target { backends: sorted.into_iter().collect(), when_empty: WhenEmpty::Reject }
}

fn desired(frontends: &[(&str, &[&str])]) -> Desired {
    let frontends = frontends.iter().map(|(addr, backends)| {
        let key = key(addr);
        let kind = if key.addr.is_unspecified() { FrontendKind::NodePort } else { FrontendKind::ClusterIP };
        let target = target(backends);
        let algorithm = Algorithm::Random;
        let (port, internal) = (key.port, target.clone());
        let frontend = Frontend {
            kind,
            algorithm,
            restricted: false,
            source_kept: false,
            dsr: false,
            port,
            affinity: 0,
            internal,
            external: target,
        };
        (key, frontend)
    });
    Desired { created: 0, compiled: Compiled { frontends: frontends.collect(), ..Compiled::default() } }
}

/// A reconciler, its maps, and a clock.
struct World {
    reconciler: Reconciler,
    maps: FakeMaps,
    now: Instant,
}

impl World {
    fn new(limits: Limits) -> Self {
        let maps = FakeMaps::new(limits);
        let mut world = Self {
            reconciler: Reconciler::adopt(Snapshot::default(), limits, GRACE),
            maps,
            now: Instant::now(),
        };
        assert_eq!(world.reconciler.finish(world.now), []);
        world
    }

    /// As after a restart of the agent.
    fn restart(&mut self) {
        let snapshot = self.maps.read().unwrap();
        self.reconciler = Reconciler::adopt(snapshot, self.maps.limits(), GRACE);
    }

    fn apply(&mut self, batch: &Batch) -> usize {
        self.maps.apply(&batch.ops).unwrap();
        batch.ops.len()
    }

    fn set(&mut self, service: &str, desired: Desired) -> Batch {
        let batch = self.reconciler.set_service(&name(service), desired, self.now);
        self.apply(&batch);
        batch
    }

    fn remove(&mut self, service: &str) -> Batch {
        let batch = self.reconciler.remove_service(&name(service), self.now);
        self.apply(&batch);
        batch
    }

    fn finish(&mut self) -> Vec<Op> {
        let ops = self.reconciler.finish(self.now);
        self.maps.apply(&ops).unwrap();
        ops
    }

    fn pass(&mut self, time: Duration) -> Batch {
        self.now += time;
        let batch = self.reconciler.expire(self.now);
        self.apply(&batch);
        batch
    }

    /// What the maps say: per frontend, the addresses of both windows in the order of their slots.
    fn view(&self) -> BTreeMap<FrontendKey, (u16, u8, [Vec<SocketAddr>; 2])> {
        view(&self.maps.snapshot())
    }

    fn id(&self, addr: &str) -> u32 {
        let addr = addr.parse().unwrap();
        let snapshot = self.maps.snapshot();
        let mut ids = snapshot
            .backends
            .iter()
            .filter(|(_, b)| b.addr == addr && b.state != backend_state::UNUSED)
            .map(|((_, id), _)| *id);
        let id = ids.next().unwrap();
        assert_eq!(ids.next(), None);
        id
    }

    fn entry(&self, id: u32) -> BackendEntry {
        self.maps.snapshot().backends[&(Family::V4, id)]
    }
}

fn view(snapshot: &Snapshot) -> BTreeMap<FrontendKey, (u16, u8, [Vec<SocketAddr>; 2])> {
    let addrs = |key: &FrontendKey, window: abi::Window| {
        let slots = if window.len > 0 { &snapshot.slots[&window.base][..] } else { &[] };
        slots.iter().map(|id| snapshot.backends[&(Family::of(key.addr), *id)].addr).collect()
    };
    snapshot
        .frontends
        .iter()
        .map(|(key, e)| (*key, (e.flags, e.kind, [addrs(key, e.internal), addrs(key, e.external)])))
        .collect()
}

const VIP: &str = "172.30.0.1:80";
const ONE: &str = "10.0.0.1:8080";
const TWO: &str = "10.0.0.2:8080";
const THREE: &str = "10.0.0.3:8080";

fn kinds(ops: &[Op]) -> Vec<&'static str> {
    ops.iter()
        .map(|op| match op {
            Op::SetBackend { entry, .. } => match entry.state {
                backend_state::ACTIVE => "active",
                backend_state::TERMINATING => "terminating",
                _ => "unused",
            },
            Op::WriteSlots { .. } => "slots",
            Op::MendSlots { .. } => "mended slots",
            Op::SetFrontend { .. } => "frontend",
            Op::RemoveFrontend { .. } => "-frontend",
            Op::AddMember { .. } => "member",
            Op::RemoveMember { .. } => "-member",
            Op::SetNetwork { .. } => "network",
            Op::SetName { .. } => "name",
            Op::RemoveName { .. } => "-name",
            Op::SetSource { .. } => "source",
            Op::RemoveSource { .. } => "-source",
            Op::SetAddress { .. } => "address",
            Op::RemoveAddress { .. } => "-address",
            Op::SetPlace { .. } => "place",
            Op::RemovePlace { .. } => "-place",
        })
        .collect()
}

#[test]
fn operations_come_in_the_order_that_never_dangles() {
    let mut world = World::new(ROOMY);
    let batch = world.set("svc", desired(&[(VIP, &[ONE]), ("172.30.0.1:81", &[ONE])]));
    assert_eq!(kinds(&batch.ops), ["active", "slots", "name", "frontend", "frontend", "address", "address"]);
    let batch = world.set("svc", desired(&[(VIP, &[TWO])]));
    assert_eq!(kinds(&batch.ops), ["-frontend", "active", "slots", "frontend", "address", "terminating"]);
    let batch = world.remove("svc");
    // A packet finds the Service or none, not one without this port.
    assert_eq!(kinds(&batch.ops), ["-address", "-frontend", "terminating", "-name"]);
    assert_eq!(kinds(&world.pass(GRACE).ops), ["unused", "unused", "-address", "-address"]);
    let snapshot = world.maps.snapshot();
    assert_eq!((snapshot.frontends.len(), snapshot.names.len()), (0, 0));
}

/// Rule 69.
#[test]
fn no_change_writes_nothing_and_a_change_touches_only_its_service() {
    let mut world = World::new(ROOMY);
    for i in 0..50 {
        world.set(
            &format!("svc{i}"),
            desired(&[(
                &format!("172.30.0.{i}:80"),
                &[&format!("10.0.1.{i}:80"), &format!("10.0.2.{i}:80")],
            )]),
        );
    }
    let same = desired(&[("172.30.0.7:80", &["10.0.1.7:80", "10.0.2.7:80"])]);
    assert_eq!(world.set("svc7", same).ops, []);
    let less = desired(&[("172.30.0.7:80", &["10.0.2.7:80"])]);
    assert_eq!(kinds(&world.set("svc7", less).ops), ["slots", "frontend", "terminating"]);
}

#[test]
fn targets_with_the_same_backends_share_a_window() {
    let mut world = World::new(ROOMY);
    let batch = world.set("svc", desired(&[(VIP, &[ONE, TWO]), ("0.0.0.0:30080", &[TWO, ONE])]));
    let expected = ["active", "active", "slots", "name", "frontend", "frontend"];
    assert_eq!(kinds(&batch.ops)[..6], expected);
    // One leaves: the other keeps the window.
    let batch = world.set("svc", desired(&[(VIP, &[ONE, TWO])]));
    assert_eq!(kinds(&batch.ops), ["-frontend"]);
    assert_eq!(world.pass(GRACE * 2).ops, []);
}

#[test]
fn an_empty_target_has_no_window_and_says_what_to_do() {
    let mut world = World::new(ROOMY);
    let mut wanted = desired(&[(VIP, &[])]);
    let frontend = wanted.compiled.frontends.get_mut(&key(VIP)).unwrap();
    frontend.external.when_empty = WhenEmpty::Drop;
    world.set("svc", wanted);
    let entry = world.maps.snapshot().frontends[&key(VIP)];
    assert_eq!((entry.internal, entry.external), Default::default());
    assert_eq!(entry.flags, service_flags::EXTERNAL_DROP);
}

#[test]
fn frontends_that_keep_their_clients_say_so() {
    let mut world = World::new(ROOMY);
    let mut wanted = desired(&[(VIP, &[ONE]), ("172.30.0.1:81", &[ONE])]);
    wanted.compiled.frontends.get_mut(&key(VIP)).unwrap().source_kept = true;
    world.set("svc", wanted);
    let frontends = world.maps.snapshot().frontends;
    assert_eq!(frontends[&key(VIP)].flags, service_flags::SOURCE_KEPT);
    assert_eq!(frontends[&key("172.30.0.1:81")].flags, 0);
}

#[test]
fn an_id_is_given_out_again_only_after_the_grace_time_and_with_a_new_generation() {
    let mut world = World::new(ROOMY);
    world.set("svc", desired(&[(VIP, &[ONE])]));
    let id = world.id(ONE);
    assert_eq!(world.entry(id).generation, 1);
    world.set("svc", desired(&[(VIP, &[TWO])]));
    assert_eq!(world.entry(id).state, backend_state::TERMINATING);
    world.pass(GRACE.saturating_sub(Duration::from_millis(1)));
    assert_ne!(world.id(TWO), id);
    world.set("svc", desired(&[(VIP, &[TWO, THREE])]));
    assert_ne!(world.id(THREE), id);
    world.pass(Duration::from_millis(1));
    let freed = world.entry(id);
    assert_eq!((freed.state, freed.generation), (backend_state::UNUSED, 1));
    world.set("svc", desired(&[(VIP, &["10.0.0.9:1"])]));
    assert_eq!(world.id("10.0.0.9:1"), id);
    assert_eq!(world.entry(id).generation, 2);
}

#[test]
fn a_backend_that_comes_back_in_time_is_the_same() {
    let mut world = World::new(ROOMY);
    world.set("svc", desired(&[(VIP, &[ONE])]));
    let id = world.id(ONE);
    world.set("svc", desired(&[(VIP, &[])]));
    world.pass(GRACE / 2);
    world.set("svc", desired(&[(VIP, &[ONE])]));
    let entry = world.entry(id);
    assert_eq!((entry.state, entry.generation), (backend_state::ACTIVE, 1));
    // The old retirement does not free it.
    assert_eq!(kinds(&world.pass(GRACE * 2).ops), [""; 0]);
    // Gone and back and gone: the grace time counts from the last farewell.
    world.set("svc", desired(&[(VIP, &[])]));
    world.pass(GRACE / 2);
    world.set("svc", desired(&[(VIP, &[ONE])]));
    world.set("svc", desired(&[(VIP, &[])]));
    world.pass(GRACE / 2);
    assert_eq!(world.entry(id).state, backend_state::TERMINATING);
    world.pass(GRACE / 2);
    assert_eq!(world.entry(id).state, backend_state::UNUSED);
}

#[test]
fn what_is_kept_outlives_the_choice() {
    let mut world = World::new(ROOMY);
    world.set("svc", desired(&[(VIP, &[ONE, TWO])]));
    let (one, two) = (world.id(ONE), world.id(TWO));
    let mut draining = desired(&[(VIP, &[THREE])]);
    draining.compiled.kept.insert(backend(ONE), Keep::Flows);
    draining.compiled.kept.insert(backend(TWO), Keep::Connections);
    draining.compiled.kept.insert(backend("10.0.0.4:8080"), Keep::Flows);
    world.set("svc", draining.clone());
    world.pass(GRACE * 2);
    assert_eq!(world.entry(one).state, backend_state::ACTIVE);
    assert_eq!(world.entry(two).state, backend_state::TERMINATING);
    // Never chosen, so there is nothing to keep.
    assert!(world.maps.snapshot().backends.values().all(|b| b.addr != "10.0.0.4:8080".parse().unwrap()));
    draining.compiled.kept.insert(backend(ONE), Keep::Connections);
    assert_eq!(kinds(&world.set("svc", draining.clone()).ops), ["terminating"]);
    draining.compiled.kept.clear();
    world.set("svc", draining);
    world.pass(GRACE);
    assert_eq!((world.entry(one).state, world.entry(two).state), (0, 0));
}

#[test]
fn the_older_service_has_the_frontend() {
    let mut world = World::new(ROOMY);
    let young = Desired { created: 20, ..desired(&[(VIP, &[ONE])]) };
    let old = Desired { created: 10, ..desired(&[(VIP, &[TWO]), ("172.30.0.2:80", &[TWO])]) };
    assert_eq!(world.set("young", young.clone()).findings[&name("young")], []);
    let batch = world.set("old", old.clone());
    // Both are looked at, and only the younger has something to say.
    assert_eq!(batch.findings[&name("old")], []);
    let taken = Finding::Taken { key: key(VIP), owner: name("old") };
    assert_eq!(batch.findings[&name("young")], [taken]);
    assert_eq!(world.view()[&key(VIP)].2[0], [TWO.parse().unwrap()]);
    assert!(!kinds(&batch.ops).contains(&"-frontend"));
    // The heir takes over without a moment in which nobody has it.
    let batch = world.remove("old");
    assert_eq!(kinds(&batch.ops).iter().filter(|op| **op == "-frontend").count(), 1);
    assert_eq!(batch.findings[&name("young")], []);
    assert_eq!(world.view()[&key(VIP)].2[0], [ONE.parse().unwrap()]);
    // Of the same age: the name decides.
    world.set("aaa", Desired { created: 20, ..old });
    assert_eq!(world.view()[&key(VIP)].2[0], [TWO.parse().unwrap()]);
}

#[test]
fn addresses_of_services_and_of_the_node_merge() {
    use address_flags::{LOOPBACK, NODE, NODE_PORT, SERVICE};

    let mut world = World::new(ROOMY);
    let addr = |s: &str| s.parse::<IpAddr>().unwrap();
    world.set("a", desired(&[(VIP, &[]), ("172.30.0.1:81", &[]), ("0.0.0.0:30080", &[])]));
    world.set("b", desired(&[("192.168.0.2:80", &[])]));
    let expected = BTreeMap::from([(addr("172.30.0.1"), SERVICE), (addr("192.168.0.2"), SERVICE)]);
    assert_eq!(world.maps.snapshot().addresses, expected);
    let node =
        BTreeMap::from([(addr("192.168.0.2"), NODE | NODE_PORT), (addr("127.0.0.1"), LOOPBACK | NODE_PORT)]);
    let (ops, findings) = world.reconciler.set_node_addresses(&node);
    world.maps.apply(&ops).unwrap();
    assert_eq!((ops.len(), findings), (2, vec![]));
    // An address of the node is never closed for what is not ours.
    let mut expected = node.clone();
    expected.insert(addr("172.30.0.1"), SERVICE);
    assert_eq!(world.maps.snapshot().addresses, expected);
    let (ops, _) = world.reconciler.set_node_addresses(&BTreeMap::new());
    world.maps.apply(&ops).unwrap();
    world.set("a", desired(&[(VIP, &[])]));
    let expected = BTreeMap::from([(addr("172.30.0.1"), SERVICE), (addr("192.168.0.2"), SERVICE)]);
    assert_eq!(world.maps.snapshot().addresses, expected);
    world.remove("a");
    world.remove("b");
    assert_eq!(world.maps.snapshot().addresses, BTreeMap::new());
}

/// Rules 17 and 34: an address that only load balancers and routers know is ours, too; its other ports are not.
#[test]
fn external_addresses_are_known() {
    use address_flags::{FRONTEND, NODE, SERVICE};

    let mut world = World::new(ROOMY);
    let addr: IpAddr = "203.0.113.5".parse().unwrap();
    let held = |world: &World| world.maps.snapshot().addresses.get(&addr).copied();
    let of_kind = |kind| {
        let mut desired = desired(&[("203.0.113.5:80", &[ONE])]);
        desired.compiled.frontends.get_mut(&key("203.0.113.5:80")).unwrap().kind = kind;
        desired
    };
    for kind in [FrontendKind::LoadBalancer, FrontendKind::ExternalIP] {
        let batch = world.set("svc", of_kind(kind));
        assert_eq!(kinds(&batch.ops)[..2], ["active", "slots"]);
        assert_eq!(held(&world), Some(FRONTEND));
        world.set("svc", of_kind(FrontendKind::ClusterIP));
        assert_eq!(held(&world), Some(SERVICE));
        world.set("svc", of_kind(kind));
        assert_eq!(held(&world), Some(FRONTEND));
        // While it is the node's own, it is that.
        let (ops, _) = world.reconciler.set_node_addresses(&BTreeMap::from([(addr, NODE)]));
        world.maps.apply(&ops).unwrap();
        assert_eq!(held(&world), Some(NODE));
        let (ops, _) = world.reconciler.set_node_addresses(&BTreeMap::new());
        world.maps.apply(&ops).unwrap();
        assert_eq!(held(&world), Some(FRONTEND));
        world.remove("svc");
        assert_eq!(held(&world), None);
        world.pass(GRACE);
    }
}

#[test]
fn addresses_of_backends_say_of_which_protocols() {
    use address_flags::{BACKEND_SCTP, BACKEND_TCP, BACKEND_UDP, NODE};

    let mut world = World::new(ROOMY);
    let addr: IpAddr = ONE.parse::<SocketAddr>().unwrap().ip();
    let held = |world: &World| world.maps.snapshot().addresses.get(&addr).copied();
    let of = |protocols: &[Protocol]| {
        let (mut all, one) = (Desired::default(), desired(&[(VIP, &[ONE])]));
        for protocol in protocols {
            let frontend = &one.compiled.frontends[&key(VIP)];
            let backends: Arc<[Backend]> = [Backend { protocol: *protocol, ..backend(ONE) }].into();
            let target = Target { backends, ..frontend.internal.clone() };
            let frontend = Frontend { internal: target.clone(), external: target, ..frontend.clone() };
            all.compiled.frontends.insert(FrontendKey { protocol: *protocol, ..key(VIP) }, frontend);
        }
        all
    };
    world.set("a", of(&[Protocol::Tcp, Protocol::Udp, Protocol::Sctp]));
    assert_eq!(held(&world), Some(BACKEND_TCP | BACKEND_UDP | BACKEND_SCTP));
    let (ops, _) = world.reconciler.set_node_addresses(&BTreeMap::from([(addr, NODE)]));
    world.maps.apply(&ops).unwrap();
    world.set("a", of(&[Protocol::Udp]));
    // Packets may still be on their way to it.
    assert_eq!(held(&world), Some(NODE | BACKEND_TCP | BACKEND_UDP | BACKEND_SCTP));
    world.pass(GRACE);
    assert_eq!(held(&world), Some(NODE | BACKEND_UDP));
    // A new agent takes none for gone before it has seen all Services.
    world.restart();
    let (ops, _) = world.reconciler.set_node_addresses(&BTreeMap::from([(addr, NODE)]));
    assert_eq!((ops, held(&world)), (vec![], Some(NODE | BACKEND_UDP)));
    world.finish();
    world.pass(GRACE);
    assert_eq!(held(&world), Some(NODE));
}

#[test]
fn who_does_not_fit_is_named_and_the_others_work() {
    let limits = Limits { services: 2, backends: 4, slots: 8, addresses: 6, ..ROOMY };
    let mut world = World::new(limits);
    world.set("a", desired(&[(VIP, &[ONE])]));
    let batch = world.set("wide", desired(&[("172.30.0.2:80", &[]), ("172.30.0.2:81", &[])]));
    let Finding::DoesNotFit { what: "frontends", need: 2, free: 1, .. } = batch.findings[&name("wide")][0]
    else {
        panic!("{batch:?}")
    };
    let batch = world.set("many", desired(&[("172.30.0.3:80", &[TWO, THREE, "10.0.0.4:1"])]));
    let Finding::DoesNotFit { what: "backends", need: 3, free: 2, limit: 4, .. } =
        batch.findings[&name("many")][0]
    else {
        panic!("{batch:?}")
    };
    let batch = world.set("b", desired(&[("172.30.0.4:80", &[TWO, THREE])]));
    assert_eq!(batch.findings[&name("b")], []);
    // Both fit once there is room, without being asked again.
    world.remove("b");
    world.remove("a");
    let batch = world.pass(GRACE);
    assert_eq!(batch.findings[&name("many")], []);
    assert!(world.view().contains_key(&key("172.30.0.3:80")));
    assert!(matches!(batch.findings[&name("wide")][..], [Finding::DoesNotFit { .. }]));
    world.remove("many");
    world.pass(GRACE);
    assert_eq!(world.view().len(), 2);
}

#[test]
fn many_that_do_not_fit_are_looked_at_a_few_at_a_time_and_all_in_the_end() {
    let limits = Limits { services: 1, ..ROOMY };
    let mut world = World::new(limits);
    world.set("first", desired(&[(VIP, &[ONE])]));
    // Only the last one fits.
    for i in 0..200 {
        let [one, two] = [80, 81].map(|port| format!("172.30.1.{i}:{port}"));
        world.set(&format!("wide-{i:03}"), desired(&[(&one, &[]), (&two, &[])]));
    }
    world.set("zero", desired(&[("172.30.0.2:80", &[TWO])]));
    assert_eq!(world.reconciler.unfit(), 201);
    world.remove("first");
    let (mut visited, mut passes) = (world.reconciler.visited(), 0);
    while !world.view().contains_key(&key("172.30.0.2:80")) {
        let due = world.reconciler.next_expiry().unwrap();
        world.pass(due.saturating_duration_since(world.now));
        let now = world.reconciler.visited();
        assert!(now - visited <= TRIES as u64, "{}", now - visited);
        visited = now;
        passes += 1;
    }
    assert!((7..=12).contains(&passes), "{passes}");
    assert_eq!(world.reconciler.unfit(), 200);
}

#[test]
fn a_change_that_does_not_fit_leaves_what_there_was() {
    let mut world = World::new(Limits { services: 10, backends: 3, slots: 100, addresses: 10, ..ROOMY });
    world.set("a", desired(&[(VIP, &[ONE])]));
    let before = world.view();
    let batch = world.set("a", desired(&[(VIP, &[TWO, THREE])]));
    assert_eq!(batch.ops, []);
    assert_eq!(world.view(), before);
}

#[test]
fn without_room_for_a_table_there_is_a_list() {
    let mut world = World::new(Limits { slots: 300, ..ROOMY });
    let maglev = |vip: &str| {
        let mut desired = desired(&[(vip, &[ONE, TWO])]);
        desired.compiled.frontends.get_mut(&key(vip)).unwrap().algorithm = Algorithm::Maglev;
        desired
    };
    world.set("a", maglev(VIP));
    assert_eq!(world.view()[&key(VIP)].2[0].len(), 251);
    let batch = world.set("b", maglev("172.30.0.2:80"));
    assert_eq!(batch.findings[&name("b")], [Finding::ListInsteadOfTable]);
    let (flags, _, [internal, _]) = &world.view()[&key("172.30.0.2:80")];
    assert_eq!((*flags, internal.len()), (0, 2));
    world.remove("a");
    let batch = world.pass(GRACE);
    assert_eq!(batch.findings[&name("b")], []);
    assert_eq!(world.view()[&key("172.30.0.2:80")].0, service_flags::MAGLEV);
}

/// Rule 70.
#[test]
fn a_restart_keeps_what_is_right_and_removes_what_is_stale() {
    let mut world = World::new(ROOMY);
    let stay = desired(&[(VIP, &[ONE, TWO]), ("0.0.0.0:30080", &[ONE, TWO])]);
    world.set("stay", stay.clone());
    world.set("go", desired(&[("172.30.0.9:80", &[THREE])]));
    let node = BTreeMap::from([("192.168.0.2".parse().unwrap(), address_flags::NODE)]);
    let (ops, _) = world.reconciler.set_node_addresses(&node);
    world.maps.apply(&ops).unwrap();
    let three = world.id(THREE);
    world.restart();
    assert_eq!(world.set("stay", stay).ops, []);
    assert_eq!(world.reconciler.set_node_addresses(&node).0, []);
    assert_eq!(kinds(&world.finish()), ["-address", "-frontend", "terminating", "-name"]);
    assert_eq!(kinds(&world.pass(GRACE).ops), ["unused", "-address"]);
    assert_eq!(world.entry(three).state, backend_state::UNUSED);
    assert_eq!(world.view().len(), 2);
}

#[test]
fn a_restart_keeps_draining_backends() {
    let mut world = World::new(ROOMY);
    world.set("svc", desired(&[(VIP, &[ONE, TWO])]));
    let mut draining = desired(&[(VIP, &[TWO])]);
    draining.compiled.kept.insert(backend(ONE), Keep::Connections);
    world.set("svc", draining.clone());
    let one = world.id(ONE);
    world.restart();
    assert_eq!(world.set("svc", draining).ops, []);
    assert_eq!(world.finish(), []);
    assert_eq!(world.pass(GRACE * 2).ops, []);
    assert_eq!(world.entry(one).state, backend_state::TERMINATING);
    // And gives them back their id if they are chosen again.
    world.restart();
    world.set("svc", desired(&[(VIP, &[ONE, TWO])]));
    assert_eq!(world.id(ONE), one);
    assert_eq!(world.entry(one).generation, 1);
}

#[test]
fn a_restart_repairs_what_cannot_be_right() {
    let mut world = World::new(ROOMY);
    let right = desired(&[(VIP, &[ONE, TWO]), ("172.30.0.1:81", &[THREE]), ("172.30.0.1:82", &[])]);
    world.set("svc", right.clone());
    let expected = world.view();
    let sound = world.maps.snapshot();
    let window = |base, len| abi::Window { base, len };
    let length = ROOMY.slots;
    let broken: [(&str, abi::Window); 8] = [
        (VIP, window(0, 2)),
        (VIP, window(length - 1, 5)),
        (VIP, window(u32::MAX, u32::MAX)),
        (VIP, window(1, 3)),
        (VIP, window(2, 1)),
        (VIP, window(500, 2)),
        ("172.30.0.1:81", window(2, 2)),
        ("172.30.0.1:82", window(0, u32::MAX)),
    ];
    for (addr, window) in broken {
        let mut snapshot = sound.clone();
        snapshot.frontends.get_mut(&key(addr)).unwrap().internal = window;
        if u64::from(window.base) + u64::from(window.len) <= 16 {
            let slots = (window.base..window.base + window.len)
                .map(|i| world.maps.window(abi::Window { base: i, len: 1 })[0]);
            snapshot.slots.insert(window.base, slots.collect());
        }
        let reconciler = Reconciler::adopt(snapshot, ROOMY, GRACE);
        let mut broken = World { reconciler, maps: world.maps.clone(), now: world.now };
        let batch = broken.set("svc", right.clone());
        let entry =
            batch.ops.iter().any(|op| matches!(op, Op::SetFrontend { key: k, .. } if *k == key(addr)));
        assert!(entry, "{addr} {window:?}: {batch:?}");
        broken.finish();
        broken.pass(GRACE);
        assert_eq!(broken.view(), expected, "{addr} {window:?}");
        assert_eq!(broken.set("svc", right.clone()).ops, []);
    }
}

#[test]
fn service_numbers_are_small_distinct_and_survive_a_restart() {
    let mut world = World::new(ROOMY);
    world.set("a", desired(&[(VIP, &[])]));
    world.set("b", desired(&[("172.30.0.2:80", &[])]));
    let ids = |world: &World| {
        world
            .reconciler
            .service_ids()
            .map(|(id, n)| (n.service().unwrap().name.to_string(), id))
            .collect::<Vec<_>>()
    };
    assert_eq!(ids(&world), [("a".into(), 1), ("b".into(), 2)]);
    world.restart();
    world.set("b", desired(&[("172.30.0.2:80", &[])]));
    world.set("c", desired(&[("172.30.0.3:80", &[])]));
    assert_eq!(ids(&world), [("b".into(), 2), ("c".into(), 3)]);
    world.finish();
    world.pass(GRACE);
    world.set("d", desired(&[("172.30.0.4:80", &[])]));
    assert_eq!(ids(&world), [("b".into(), 2), ("c".into(), 3), ("d".into(), 1)]);
}

#[test]
fn names_are_taken_over_repaired_and_left_out_where_there_is_no_room() {
    let named = |world: &World| {
        let names = world.maps.snapshot().names;
        names.iter().map(|(id, name)| format!("{id} {}", crate::owner::text(&name.name))).collect::<Vec<_>>()
    };
    let vip = |n: u8| format!("172.30.0.{n}:80");
    let mut world = World::new(Limits { services: 3, ..ROOMY });
    for (n, service) in [(1, "a"), (2, "b"), (3, "c")] {
        world.set(service, desired(&[(&vip(n), &[])]));
    }
    assert_eq!(named(&world), ["1 a", "2 b", "3 c"]);
    // Names are for people: a Service without one is served as well.
    let batch = world.set("d", desired(&[("[fd00::d]:80", &[])]));
    assert_eq!(kinds(&batch.ops), ["frontend", "address"]);
    world.remove("d");
    world.restart();
    assert_eq!(kinds(&world.set("a", desired(&[(&vip(1), &[])])).ops), [""; 0]);
    // Somebody else has its frontend, and so its number, by now.
    assert_eq!(kinds(&world.set("e", desired(&[(&vip(2), &[])])).ops), ["name"]);
    assert_eq!(kinds(&world.finish()), ["-address", "-frontend", "-name"]);
    assert_eq!(named(&world), ["1 a", "2 e"]);
}

/// Rules 16 to 22.
#[test]
fn sources_are_there_before_a_frontend_relies_on_them() {
    let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<BTreeSet<IpNet>>();
    let restricted = |texts: &[&str]| {
        let mut desired = desired(&[(VIP, &[]), ("172.30.0.1:81", &[])]);
        desired.compiled.frontends.get_mut(&key(VIP)).unwrap().restricted = true;
        desired.compiled.sources.insert(Family::V4, nets(texts));
        desired
    };
    let flags = |world: &World, addr: &str| world.maps.snapshot().frontends[&key(addr)].flags;
    let mut world = World::new(ROOMY);
    world.set("svc", desired(&[(VIP, &[]), ("172.30.0.1:81", &[])]));
    let batch = world.set("svc", restricted(&["203.0.113.0/24"]));
    assert_eq!(kinds(&batch.ops), ["source", "frontend"]);
    assert_eq!((flags(&world, VIP), flags(&world, "172.30.0.1:81")), (service_flags::SOURCE_RANGES, 0));
    // Changed ranges do not touch the frontend, and nobody who stays is shut out meanwhile.
    let wider = restricted(&["203.0.113.0/24", "198.51.100.0/24"]);
    assert_eq!(kinds(&world.set("svc", wider.clone()).ops), ["source"]);
    assert_eq!(kinds(&world.set("svc", restricted(&["198.51.100.0/24"])).ops), ["-source"]);
    world.set("svc", wider.clone());
    // The node is told apart, as soon as it has an address in the ranges.
    let node = BTreeMap::from([("198.51.100.7".parse().unwrap(), address_flags::NODE)]);
    let (ops, _) = world.reconciler.set_node_addresses(&node);
    world.maps.apply(&ops).unwrap();
    let batch = world.reconciler.review_sources(world.now);
    world.apply(&batch);
    assert_eq!(kinds(&batch.ops), ["source", "frontend"]);
    assert_eq!(flags(&world, VIP), service_flags::SOURCE_RANGES | service_flags::NODE_ALLOWED);
    let id = world.maps.snapshot().frontends[&key(VIP)].id;
    let held = nets(&["203.0.113.0/24", "198.51.100.0/24", "172.30.0.1/32"]);
    assert_eq!(world.maps.snapshot().sources, BTreeMap::from([(id, held)]));
    // A restart finds all of it right; what is stale goes.
    world.maps.apply(&[Op::SetSource { service: 99, net: "10.0.0.0/8".parse().unwrap() }]).unwrap();
    world.restart();
    assert_eq!(world.reconciler.set_node_addresses(&node).0, []);
    assert_eq!(world.set("svc", wider).ops, []);
    assert_eq!(kinds(&world.finish()), ["-source"]);
    let batch = world.set("svc", desired(&[(VIP, &[]), ("172.30.0.1:81", &[])]));
    assert_eq!(kinds(&batch.ops), ["frontend", "-source", "-source", "-source"]);
    assert_eq!(world.maps.snapshot().sources, BTreeMap::new());
}

#[test]
fn affinity_knows_the_members_of_its_windows() {
    let sticky = |backends: &[&str], affinity: u32| {
        let mut desired =
            desired(&[(VIP, backends), ("172.30.0.1:81", backends), ("0.0.0.0:30080", backends)]);
        for frontend in desired.compiled.frontends.values_mut() {
            frontend.affinity = affinity;
        }
        desired.compiled.frontends.get_mut(&key("0.0.0.0:30080")).unwrap().port = 80;
        desired
    };
    let port = |world: &World, addr: &str| world.maps.snapshot().frontends[&key(addr)].port;
    let mut world = World::new(ROOMY);
    let batch = world.set("svc", sticky(&[ONE, TWO], 10));
    let expected =
        ["active", "active", "slots", "member", "member", "name", "frontend", "frontend", "frontend"];
    assert_eq!(kinds(&batch.ops)[..9], expected);
    assert_eq!(port(&world, VIP), port(&world, "0.0.0.0:30080"));
    assert_ne!(port(&world, VIP), port(&world, "172.30.0.1:81"));
    world.set("other", desired(&[("172.30.0.2:80", &[ONE])]));
    assert!(![VIP, "172.30.0.1:81"].map(|addr| port(&world, addr)).contains(&port(&world, "172.30.0.2:80")));
    // Another window has members of its own; those of the old one go when nobody can ask it any more.
    let batch = world.set("svc", sticky(&[TWO], 10));
    assert_eq!(kinds(&batch.ops)[..2], ["slots", "member"]);
    assert_eq!(kinds(&world.pass(GRACE).ops), ["-member", "-member", "unused"][..2]);
    // Another time-out, and none: the same window.
    assert_eq!(kinds(&world.set("svc", sticky(&[TWO], 20)).ops), ["frontend"; 3]);
    assert_eq!(kinds(&world.set("svc", sticky(&[TWO], 0)).ops), ["frontend"; 3]);
    assert_eq!(kinds(&world.set("svc", sticky(&[TWO], 10)).ops), ["frontend"; 3]);
    // A restart keeps numbers and members; what is stale goes.
    let before = world.maps.snapshot();
    world.maps.apply(&[Op::AddMember { window: 77, backend: 7 }]).unwrap();
    world.restart();
    assert_eq!(world.set("svc", sticky(&[TWO], 10)).ops, []);
    assert_eq!(world.set("other", desired(&[("172.30.0.2:80", &[ONE])])).ops, []);
    assert_eq!(kinds(&world.finish()), ["-member"]);
    assert_eq!(world.maps.snapshot(), before);
    world.remove("svc");
    assert_eq!(kinds(&world.pass(GRACE).ops), ["-member", "unused", "-address"]);
}

#[test]
fn sources_that_do_not_fit_leave_the_service_as_it_was() {
    let mut world = World::new(Limits { sources: 1, ..ROOMY });
    let restricted = |addr: &str, nets: &[&str]| {
        let mut desired = desired(&[(addr, &[])]);
        desired.compiled.frontends.get_mut(&key(addr)).unwrap().restricted = true;
        let nets = nets.iter().map(|net| net.parse().unwrap()).collect();
        desired.compiled.sources.insert(Family::V4, nets);
        desired
    };
    world.set("a", restricted(VIP, &["10.0.0.0/8"]));
    let batch = world.set("b", restricted("172.30.0.2:80", &["10.0.0.0/8"]));
    let finding = Finding::NoRoomFor { what: "source ranges", need: 1, free: 0, limit: 1 };
    assert_eq!((batch.ops, batch.findings[&name("b")].clone()), (vec![], vec![finding]));
    world.set("a", restricted(VIP, &[]));
    let batch = world.pass(GRACE);
    assert_eq!(kinds(&batch.ops), ["source", "name", "frontend", "address"]);
}

/// One step of a history.
#[derive(Clone, Debug)]
enum Step {
    Set(usize, Desired),
    Remove(usize),
    Node(Vec<bool>),
    Pass(u64),
    Restart,
}

fn backends() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        3 => subsequence((0..8).collect::<Vec<_>>(), 0..=4),
        1 => Just(vec![]),
    ]
}

fn any_target(v6: bool) -> impl Strategy<Value = Target> {
    (backends(), any::<bool>()).prop_map(move |(indices, drop)| {
        let addr = |i: usize| {
            if v6 { format!("[fd00::{i}]:80") } else { format!("10.0.0.{i}:80") }
                .parse::<SocketAddr>()
                .unwrap()
        };
        let backends: BTreeSet<Backend> = indices
            .into_iter()
            .map(|i| Backend { addr: addr(i), protocol: Protocol::Tcp, local: i % 2 == 0 })
            .collect();
        Target {
            backends: backends.into_iter().collect(),
            when_empty: if drop { WhenEmpty::Drop } else { WhenEmpty::Reject },
        }
    })
}

fn any_frontend(v6: bool) -> impl Strategy<Value = Frontend> {
    let affinity = prop_oneof![Just(0u32), Just(10), Just(10_800)];
    (any_target(v6), any_target(v6), any::<[bool; 4]>(), affinity).prop_map(
        |(internal, external, [same, maglev, restricted, source_kept], affinity)| {
            let external = if same { internal.clone() } else { external };
            let algorithm = if maglev { Algorithm::Maglev } else { Algorithm::Random };
            Frontend {
                kind: FrontendKind::ClusterIP,
                algorithm,
                restricted,
                source_kept,
                dsr: same && maglev,
                port: 80,
                affinity,
                internal,
                external,
            }
        },
    )
}

fn any_desired() -> impl Strategy<Value = Desired> {
    // Few addresses for many services: they quarrel about frontends.
    let v4 = prop::collection::btree_map(0usize..6, any_frontend(false), 0..3);
    let v6 = prop::collection::btree_map(0usize..3, any_frontend(true), 0..2);
    let kept = prop::collection::btree_map(0usize..8, any::<bool>(), 0..4);
    let sources = prop_oneof![
        Just(vec![]),
        subsequence(vec!["10.0.0.0/8", "10.0.0.0/16", "192.168.0.0/24", "fd01::/64", "fd02::/64"], 0..=5),
    ];
    (0i64..3, v4, v6, kept, sources).prop_map(|(created, v4, v6, kept, nets)| {
        let mut frontends = BTreeMap::new();
        for (i, mut frontend) in v4 {
            let addr = [
                "0.0.0.0:30080",
                "172.30.0.1:80",
                "172.30.0.1:81",
                "172.30.0.2:80",
                "172.30.0.3:80",
                "172.30.0.4:80",
            ][i];
            if i == 0 {
                frontend.kind = FrontendKind::NodePort;
            }
            frontend.port = if i == 2 { 81 } else { 80 };
            frontends.insert(key(addr), frontend);
        }
        for (i, mut frontend) in v6 {
            frontend.port = if i == 1 { 81 } else { 80 };
            frontends.insert(key(["[fd01::1]:80", "[fd01::1]:81", "[fd01::2]:80"][i]), frontend);
        }
        let mut kept: BTreeMap<Backend, Keep> = kept
            .into_iter()
            .map(|(i, flows)| {
                let addr = format!("10.0.0.{i}:80").parse().unwrap();
                let backend = Backend { addr, protocol: Protocol::Tcp, local: i % 2 == 0 };
                (backend, if flows { Keep::Flows } else { Keep::Connections })
            })
            .collect();
        kept.retain(|b, _| {
            !frontends
                .values()
                .any(|f: &Frontend| f.internal.backends.contains(b) || f.external.backends.contains(b))
        });
        let mut sources: BTreeMap<Family, BTreeSet<IpNet>> = BTreeMap::new();
        for (key, frontend) in &frontends {
            if frontend.restricted {
                sources.entry(Family::of(key.addr)).or_default();
            }
        }
        for net in nets {
            let net: IpNet = net.parse().unwrap();
            if let Some(of_family) = sources.get_mut(&Family::of(net.addr())) {
                of_family.insert(net);
            }
        }
        Desired {
            created,
            compiled: Compiled { frontends, sources, kept, homes: BTreeMap::new(), health: None },
        }
    })
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0usize..5, any_desired()).prop_map(|(i, d)| Step::Set(i, d)),
        2 => (0usize..5).prop_map(Step::Remove),
        1 => prop::collection::vec(any::<bool>(), 3).prop_map(Step::Node),
        3 => (0u64..15).prop_map(Step::Pass),
        1 => Just(Step::Restart),
    ]
}

fn node_addresses(which: &[bool]) -> BTreeMap<IpAddr, u32> {
    let all = ["192.168.0.2", "172.30.0.1", "fd01::1"];
    let here = which.iter().zip(all).filter(|(here, _)| **here);
    here.map(|(_, addr)| (addr.parse().unwrap(), address_flags::NODE)).collect()
}

/// The naive model: who owns which frontend, and what it should say.
fn expected(services: &BTreeMap<usize, Desired>) -> BTreeMap<FrontendKey, Frontend> {
    let mut all: Vec<_> = services.iter().map(|(i, d)| (d.created, *i, d)).collect();
    all.sort_by_key(|(created, i, _)| (*created, *i));
    let mut frontends = BTreeMap::new();
    for (_, _, desired) in all {
        for (key, frontend) in &desired.compiled.frontends {
            frontends.entry(*key).or_insert_with(|| frontend.clone());
        }
    }
    frontends
}

/// The naive model: who may ask for a restricted frontend, and whether the node may.
fn admitted(
    services: &BTreeMap<usize, Desired>,
    node: &[bool],
    key: &FrontendKey,
) -> Option<(BTreeSet<IpNet>, bool)> {
    let claims = services.iter().filter(|(_, d)| d.compiled.frontends.contains_key(key));
    let (owner, desired) = claims.min_by_key(|(i, d)| (d.created, **i))?;
    if !desired.compiled.frontends[key].restricted {
        return None;
    }
    let nets = &desired.compiled.sources[&Family::of(key.addr)];
    let node_allowed = node_addresses(node).keys().any(|addr| nets.iter().any(|net| net.contains(addr)));
    let mut nets = nets.clone();
    if node_allowed {
        for (other, _) in expected(services).iter().filter(|(_, frontend)| frontend.restricted) {
            let claims = services.iter().filter(|(_, d)| d.compiled.frontends.contains_key(other));
            let who = claims.min_by_key(|(i, d)| (d.created, **i)).map(|(i, _)| i);
            if who == Some(owner) && Family::of(other.addr) == Family::of(key.addr) {
                nets.insert(other.addr.into());
            }
        }
    }
    Some((nets, node_allowed))
}

/// Compares who may ask in the maps with the naive model.
fn check_sources(snapshot: &Snapshot, services: &BTreeMap<usize, Desired>, node: &[bool]) {
    let mut total: BTreeMap<u32, BTreeSet<IpNet>> = BTreeMap::new();
    for (key, entry) in &snapshot.frontends {
        let flags = entry.flags & (service_flags::SOURCE_RANGES | service_flags::NODE_ALLOWED);
        match admitted(services, node, key) {
            None => assert_eq!(flags, 0, "{key}"),
            Some((nets, node_allowed)) => {
                let want = if node_allowed { service_flags::NODE_ALLOWED } else { 0 };
                assert_eq!(flags, service_flags::SOURCE_RANGES | want, "{key}");
                let of_family = |net: &&IpNet| Family::of(net.addr()) == Family::of(key.addr);
                let held = snapshot.sources.get(&entry.id).into_iter().flatten().filter(of_family);
                assert_eq!(held.copied().collect::<BTreeSet<_>>(), nets, "{key}");
                total.entry(entry.id).or_default().extend(nets);
            }
        }
    }
    total.retain(|_, nets| !nets.is_empty());
    assert_eq!(snapshot.sources, total);
}

/// Frontends of one port of a Service, and no others, share what is known of clients.
fn check_affinity(snapshot: &Snapshot, wanted: &BTreeMap<FrontendKey, Frontend>) {
    let mut ports: BTreeMap<u32, (u32, u16, Protocol)> = BTreeMap::new();
    for (key, entry) in &snapshot.frontends {
        assert_eq!(entry.affinity, wanted[key].affinity, "{key}");
        let port = (entry.id, wanted[key].port, key.protocol);
        assert_eq!(*ports.entry(entry.port).or_insert(port), port, "{key}");
    }
    let distinct: BTreeSet<_> = ports.values().collect();
    assert_eq!(distinct.len(), ports.len());
    assert!(!ports.contains_key(&0));
}

/// When a slot or a backend id was last to be met by a packet.
#[derive(Default)]
struct LastSeen {
    slots: BTreeMap<u32, Instant>,
    backends: BTreeMap<(Family, u32), (Instant, SocketAddr)>,
}

impl LastSeen {
    fn note(&mut self, snapshot: &Snapshot, now: Instant) {
        for (base, slots) in &snapshot.slots {
            self.slots.extend((*base..).zip(slots).map(|(index, _)| (index, now)));
        }
        for (key, entry) in &snapshot.frontends {
            for id in [entry.internal, entry.external]
                .iter()
                .filter(|w| w.len > 0)
                .flat_map(|w| &snapshot.slots[&w.base])
            {
                let id = (Family::of(key.addr), *id);
                self.backends.insert(id, (now, snapshot.backends[&id].addr));
            }
        }
    }

    /// No operation may touch what was seen less than the grace time ago.
    fn check(&self, op: &Op, now: Instant) {
        match op {
            Op::WriteSlots { base, slots } => {
                for (index, _) in (*base..).zip(slots) {
                    let seen = self.slots.get(&index);
                    assert!(
                        seen.is_none_or(|seen| now - *seen >= GRACE),
                        "slot {index} is written too early"
                    );
                }
            }
            Op::SetBackend { family, id, entry } => {
                if let Some((seen, addr)) = self.backends.get(&(*family, *id)) {
                    let same = *addr == entry.addr && entry.state != backend_state::UNUSED;
                    assert!(same || now - *seen >= GRACE, "backend {id} is given away too early");
                }
            }
            _ => {}
        }
    }
}

/// What there should be at a moment of a history.
#[derive(Clone, Default)]
struct Wanted {
    services: BTreeMap<usize, Desired>,
    /// Which of the [`node_addresses`] are there.
    node: Vec<bool>,
}

impl Wanted {
    /// Notes a step; answers what the reconciler makes of it.
    fn take(&mut self, step: &Step, world: &mut World) -> Vec<Op> {
        match step {
            Step::Set(i, desired) => {
                self.services.insert(*i, desired.clone());
                world.reconciler.set_service(&name(&i.to_string()), desired.clone(), world.now).ops
            }
            Step::Remove(i) => {
                self.services.remove(i);
                world.reconciler.remove_service(&name(&i.to_string()), world.now).ops
            }
            Step::Node(which) => {
                self.node.clone_from(which);
                let mut ops = world.reconciler.set_node_addresses(&node_addresses(which)).0;
                ops.extend(world.reconciler.review_sources(world.now).ops);
                ops
            }
            Step::Pass(seconds) => {
                world.now += Duration::from_secs(*seconds);
                world.reconciler.expire(world.now).ops
            }
            Step::Restart => self.after_restart(world),
        }
    }

    /// A new reconciler takes over the maps and is told everything.
    fn after_restart(&self, world: &mut World) -> Vec<Op> {
        // Whoever starts anew has taken its time.
        world.now += GRACE;
        world.restart();
        for (i, desired) in &self.services {
            world.reconciler.announce(&name(&i.to_string()), desired);
        }
        let mut ops = world.reconciler.set_node_addresses(&node_addresses(&self.node)).0;
        for (i, desired) in &self.services {
            ops.extend(world.reconciler.set_service(&name(&i.to_string()), desired.clone(), world.now).ops);
        }
        ops.extend(world.reconciler.finish(world.now));
        ops
    }
}

/// Plays `steps`, checking after every single operation (the fake refuses whatever dangles).
fn play(limits: Limits, steps: &[Step]) -> (World, BTreeMap<usize, Desired>, Vec<bool>) {
    let mut world = World::new(limits);
    let mut wanted = Wanted::default();
    let mut seen = LastSeen::default();
    for step in steps {
        for op in wanted.take(step, &mut world) {
            seen.note(&world.maps.snapshot(), world.now);
            seen.check(&op, world.now);
            world.maps.apply(&[op]).unwrap();
        }
    }
    (world, wanted.services, wanted.node)
}

/// The addresses as they are without backends.
fn without_backends(addresses: &BTreeMap<IpAddr, u32>) -> BTreeMap<IpAddr, u32> {
    let flags = addresses.iter().map(|(addr, flags)| (*addr, flags & !address_flags::BACKEND));
    flags.filter(|(_, flags)| *flags != 0).collect()
}

/// The addresses of backends are known as such, and no others.
fn check_backends(snapshot: &Snapshot) {
    let known = snapshot.addresses.iter().filter(|(_, flags)| **flags & address_flags::BACKEND != 0);
    let known: BTreeSet<IpAddr> = known.map(|(addr, _)| *addr).collect();
    let in_use = snapshot.backends.values().filter(|backend| backend.state != backend_state::UNUSED);
    assert_eq!(known, in_use.map(|backend| backend.addr.ip()).collect());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn histories_end_as_if_there_had_been_none(steps in prop::collection::vec(any_step(), 1..25)) {
        let (mut world, services, node) = play(ROOMY, &steps);
        let wanted = expected(&services);
        let snapshot = world.maps.snapshot();
        let view = view(&snapshot);

        // What the maps say is what is wanted.
        prop_assert_eq!(view.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
        for (key, frontend) in &wanted {
            for (target, slots) in [&frontend.internal, &frontend.external].into_iter().zip(&view[key].2) {
                let want: BTreeSet<SocketAddr> = target.backends.iter().map(|b| b.addr).collect();
                prop_assert_eq!(slots.iter().copied().collect::<BTreeSet<_>>(), want);
            }
        }

        check_sources(&snapshot, &services, &node);
        check_affinity(&snapshot, &wanted);
        let numbers: BTreeSet<u32> = snapshot.frontends.values().map(|entry| entry.id).collect();
        prop_assert_eq!(snapshot.names.keys().copied().collect::<BTreeSet<_>>(), numbers);
        for (id, owner) in world.reconciler.service_ids() {
            prop_assert!(snapshot.names.get(&id).is_none_or(|held| *held == owner.into()));
        }

        // From scratch it would be the same, slot by slot.
        let mut scratch = World::new(ROOMY);
        for (i, desired) in &services {
            scratch.set(&i.to_string(), desired.clone());
        }
        let (ops, _) = scratch.reconciler.set_node_addresses(&node_addresses(&node));
        scratch.maps.apply(&ops).unwrap();
        let ops = scratch.reconciler.review_sources(scratch.now).ops;
        scratch.maps.apply(&ops).unwrap();
        prop_assert_eq!(scratch.view(), view);
        prop_assert_eq!(
            without_backends(&scratch.maps.snapshot().addresses),
            without_backends(&snapshot.addresses)
        );

        // Saying it again writes nothing; nor does a restart, beyond retiring what was on its way out.
        for (i, desired) in &services {
            prop_assert_eq!(world.set(&i.to_string(), desired.clone()).ops, []);
        }
        let free = world.reconciler.free_slots();
        world.pass(GRACE);
        check_backends(&world.maps.snapshot());
        world.restart();
        for (i, desired) in &services {
            world.reconciler.announce(&name(&i.to_string()), desired);
        }
        prop_assert_eq!(world.reconciler.set_node_addresses(&node_addresses(&node)).0, []);
        for (i, desired) in &services {
            let ops = world.set(&i.to_string(), desired.clone()).ops;
            // Of a backend in no window a new agent cannot tell which Service had kept it.
            prop_assert!(ops.iter().all(|op| matches!(op, Op::SetBackend { .. })), "{:?}", ops);
            prop_assert!(desired.compiled.kept.len() >= ops.len(), "{:?}", ops);
        }
        prop_assert_eq!(world.finish(), []);
        prop_assert!(world.reconciler.free_slots() >= free);

        // And when all are gone nothing is left.
        for i in services.keys() {
            world.remove(&i.to_string());
        }
        let (ops, _) = world.reconciler.set_node_addresses(&BTreeMap::new());
        world.maps.apply(&ops).unwrap();
        world.pass(GRACE);
        let snapshot = world.maps.snapshot();
        prop_assert!(snapshot.frontends.is_empty() && snapshot.addresses.is_empty());
        prop_assert!(snapshot.sources.is_empty() && snapshot.members.is_empty() && snapshot.names.is_empty());
        prop_assert!(snapshot.backends.values().all(|b| b.state == backend_state::UNUSED));
        prop_assert_eq!(world.reconciler.free_slots(), u64::from(ROOMY.slots) - 1);
    }

    /// However narrow: nothing dangles, nothing is given away too early, and no write is refused.
    #[test]
    fn narrow_maps_never_break(
        steps in prop::collection::vec(any_step(), 1..25),
        services in 1u32..8,
        backends in 1u32..8,
        slots in 1u32..600,
        addresses in 1u32..4,
        sources in 0u32..6,
        members in 0u32..12,
    ) {
        let limits = Limits { services, backends, slots, addresses, sources, members };
        let (world, services, _) = play(limits, &steps);
        let wanted = expected(&services);
        for key in world.view().keys() {
            let claimed = services.values().any(|d| d.compiled.frontends.contains_key(key));
            prop_assert!(claimed || wanted.contains_key(key), "{} is nobody's", key);
        }
    }
}
