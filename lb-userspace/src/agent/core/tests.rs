mod check;
mod queue;
mod restored;

use std::sync::Arc;

use lb_common::abi;

use super::*;
use crate::datapath::Position;
use crate::datapath::fake::FakeMaps;
use crate::entries::{Algorithm, Family, FrontendKey, FrontendKind, Limits, Protocol, ServiceName, Table};
use crate::model::{
    Change, Endpoint, EndpointSlice, HostPort, Pod, Service, ServicePort, ServiceType, SliceName, SlicePort,
};
use crate::owner::PodName;
use crate::source::Kind;

const LIMITS: Limits =
    Limits { services: 5000, backends: 5000, slots: 80_000, addresses: 5000, sources: 5000, members: 5000 };

fn name(n: usize) -> ServiceName {
    ServiceName { namespace: "ns".into(), name: format!("svc{n}").into() }
}

fn vip(n: usize) -> IpAddr {
    format!("172.30.{}.{}", n / 250, n % 250 + 1).parse().unwrap()
}

fn service(n: usize) -> Event {
    let port = ServicePort { name: String::new(), port: 80, protocol: Protocol::Tcp, node_port: None };
    let service = Service { cluster_ips: vec![vip(n)], ports: vec![port], ..Service::named(name(n)) };
    Event::Changed(Change::Service(Arc::new(service)))
}

/// With a load-balancer IP that not everybody may ask for.
fn restricted(n: usize) -> Event {
    let Event::Changed(Change::Service(service)) = service(n) else { unreachable!() };
    let ranges = BTreeMap::from([(Family::V4, BTreeSet::from(["10.9.0.0/24".parse().unwrap()]))]);
    let service = Service {
        kind: ServiceType::LoadBalancer,
        load_balancer_ips: vec!["192.0.2.1".parse().unwrap()],
        source_ranges: ranges,
        ..Arc::unwrap_or_clone(service)
    };
    Event::Changed(Change::Service(Arc::new(service)))
}

fn gone(n: usize) -> Event {
    Event::Changed(Change::ServiceGone(name(n)))
}

fn slice(n: usize, addrs: &[&str]) -> Event {
    Event::Changed(Change::Slice(Arc::new(EndpointSlice {
        name: SliceName { namespace: "ns".into(), name: format!("svc{n}-1").into() },
        service: Some(name(n)),
        ports: vec![SlicePort { name: String::new(), port: 8080, protocol: Protocol::Tcp }],
        endpoints: addrs.iter().map(|addr| Endpoint::ready(addr.parse().unwrap())).collect(),
        triggered: None,
        findings: vec![],
    })))
}

fn key(n: usize) -> FrontendKey {
    FrontendKey { addr: vip(n), port: 80, protocol: Protocol::Tcp }
}

struct World {
    agent: Agent<FakeMaps>,
    health: Health,
    now: Instant,
}

impl World {
    fn new(maps: FakeMaps) -> Self {
        let facts =
            Facts { node_name: "node-a".into(), zone: None, algorithm: Algorithm::Random, mode: None };
        let health = Health::new(false);
        let agent = Agent::new(facts, maps, health.clone()).unwrap();
        Self { agent, health, now: Instant::now() }
    }

    fn take(&mut self, event: Event) {
        self.agent.take(event, self.now);
    }

    fn list(&mut self) {
        for kind in Kind::ALL {
            self.take(Event::Listed(kind));
        }
        self.agent.set_addresses(BTreeMap::new());
    }

    /// `services` Services with `endpoints` endpoints each.
    fn full(services: usize, endpoints: usize) -> Self {
        Self::full_of(services, endpoints, LIMITS)
    }

    fn full_of(services: usize, endpoints: usize, limits: Limits) -> Self {
        let mut world = Self::new(FakeMaps::new(limits));
        for n in 0..services {
            world.take(service(n));
            let addrs: Vec<String> =
                (0..endpoints).map(|e| format!("10.{}.{}.{e}", n / 250, n % 250)).collect();
            world.take(slice(n, &addrs.iter().map(String::as_str).collect::<Vec<_>>()));
        }
        world.list();
        world.settle();
        world
    }

    fn settle(&mut self) {
        self.agent.settle(self.now);
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.settle();
    }

    fn keys(&mut self) -> Vec<FrontendKey> {
        self.agent.maps().snapshot().frontends.into_keys().collect()
    }
}

#[test]
fn nothing_is_written_before_everything_is_listed_and_the_addresses_are_known() {
    for addresses_first in [false, true] {
        let mut world = World::new(FakeMaps::new(LIMITS));
        if addresses_first {
            world.agent.set_addresses(BTreeMap::new());
        }
        world.take(service(0));
        for kind in Kind::ALL {
            world.settle();
            assert!(!world.health.is_synced() && world.keys().is_empty());
            world.take(Event::Listed(kind));
        }
        if !addresses_first {
            world.settle();
            assert!(!world.health.is_synced() && world.keys().is_empty());
            world.agent.set_addresses(BTreeMap::new());
        }
        world.settle();
        assert_eq!(world.keys(), [key(0)]);
        assert!(world.health.is_synced());
    }
}

/// What was done: Services compiled, Services that the reconciler looked at, map operations, maps read.
fn work(world: &mut World, change: impl FnOnce(&mut World)) -> (u64, u64, u64, u64) {
    let (before, visited) = (world.agent.stats(), world.agent.visited());
    change(world);
    world.settle();
    world.pass(GRACE);
    let after = world.agent.stats();
    let visited = world.agent.visited() - visited;
    (after.compiled - before.compiled, visited, after.ops - before.ops, after.read - before.read)
}

/// The work of a change does not depend on how many Services there are.
#[test]
fn a_change_costs_what_it_changes() {
    const LARGE: Limits =
        Limits { services: 20_000, backends: 120_000, slots: 400_000, addresses: 140_000, ..LIMITS };
    for services in [10, 10_000] {
        let mut world = World::full_of(services, 10, LARGE);
        let node = |zone: &str, deleting| {
            let node = Node { zone: Some(zone.into()), deleting, ..Node::named("node-a") };
            Event::Changed(Change::Node(Box::new(node)))
        };
        let ten = |last: &str| {
            let mut addrs: Vec<String> = (0..9).map(|e| format!("10.0.7.{e}")).collect();
            addrs.push(last.to_owned());
            slice(7, &addrs.iter().map(String::as_str).collect::<Vec<_>>())
        };
        // New backend, window, frontend, address; the old backend retired and freed, its address removed.
        assert_eq!(work(&mut world, |world| world.take(ten("10.0.7.99"))), (1, 1, 7, 0));
        assert_eq!(work(&mut world, |world| world.take(ten("10.0.7.99"))), (0, 0, 0, 0));
        // Nothing is hinted, so not even the zone matters.
        assert_eq!(work(&mut world, |world| world.take(node("z1", false))), (0, 0, 0, 0));
        assert_eq!(work(&mut world, |world| world.take(node("z1", true))), (0, 0, 0, 0));
        let addresses = |addrs: &[&str]| {
            let addrs = addrs.iter().map(|addr| addr.parse().unwrap());
            addrs.map(|addr| (addr, abi::address_flags::NODE)).collect()
        };
        let set = |addrs: &[&str]| {
            let addrs = addresses(addrs);
            |world: &mut World| world.agent.set_addresses(addrs)
        };
        assert_eq!(work(&mut world, set(&["10.9.0.1", "10.9.0.2"])), (0, 0, 2, 0));
        assert_eq!(work(&mut world, set(&["10.9.0.2", "10.9.0.3"])), (0, 0, 2, 0));
        // Only a Service with source ranges is looked at when the node's addresses change.
        world.take(restricted(3));
        world.settle();
        assert_eq!(work(&mut world, set(&["10.9.0.2"])), (0, 1, 1, 0));
        // A frontend, its address, a range, and the load-balancer IP for the node's own packets.
        assert_eq!(work(&mut world, |world| world.take(service(3))), (1, 1, 4, 0));
        // A frontend, its address, the name, and ten backends retired and freed with their addresses.
        assert_eq!(work(&mut world, |world| world.take(gone(3))), (0, 1, 33, 0));
    }
}

#[test]
fn many_changes_of_one_service_are_one() {
    let mut world = World::full(3, 1);
    let before = world.agent.stats();
    for i in 0..100 {
        world.take(slice(1, &[&format!("10.9.9.{i}")]));
    }
    world.settle();
    assert_eq!(world.agent.stats().compiled - before.compiled, 1);
}

/// Rule 70.
#[test]
fn a_new_agent_writes_only_what_changed_meanwhile() {
    let mut old = World::full(50, 2);
    let maps = old.agent.maps().clone();
    let mut world = World::new(maps);
    for n in 1..50 {
        world.take(service(n));
        let addr = format!("10.0.{n}.");
        world.take(slice(n, &[&format!("{addr}0"), &format!("{addr}1")]));
    }
    world.list();
    world.settle();
    // Service 0 is gone: its frontend, its address, its name, two backends to retire.
    assert_eq!(world.agent.stats().ops, 5);
    assert_eq!(world.keys().len(), 49);
    world.pass(GRACE);
    assert_eq!(world.agent.stats().ops, 9);
}

#[test]
fn a_service_that_goes_is_removed() {
    let mut world = World::full(2, 1);
    world.take(Event::Changed(Change::ServiceGone(name(0))));
    world.settle();
    assert_eq!(world.keys(), [key(1)]);
    // Slices that stay behind do nothing.
    world.take(slice(0, &["10.0.0.9"]));
    world.settle();
    assert_eq!(world.keys(), [key(1)]);
}

fn pod(name: &str, created: i64, host_port: u16) -> Event {
    let port = HostPort {
        name: String::new(),
        host_port,
        host_ip: None,
        container_port: 8080,
        protocol: Protocol::Tcp,
    };
    let name = PodName { namespace: "ns".into(), name: name.into() };
    Event::Changed(Change::Pod(Arc::new(Pod {
        created,
        node: Some("node-a".into()),
        addrs: vec!["10.0.0.7".parse().unwrap()],
        ports: vec![port],
        ..Pod::named(name)
    })))
}

/// A frontend at any address of the node: its kind, and what was said of the Pod.
fn any_address(world: &mut World, port: u16, pod: &str) -> (Option<u8>, Vec<String>) {
    let key = FrontendKey { addr: [0, 0, 0, 0].into(), port, protocol: Protocol::Tcp };
    let kind = world.agent.maps().snapshot().frontends.get(&key).map(|entry| entry.kind);
    let name = PodName { namespace: "ns".into(), name: pod.into() };
    let said = world.agent.said.get(&name.into()).into_iter().flatten();
    (kind, said.map(ToString::to_string).collect())
}

#[test]
fn of_a_host_port_and_a_node_port_the_older_counts() {
    let host_port = Some(FrontendKind::HostPort.number());
    let mut world = World::full(1, 1);
    world.take(pod("a", 10, 30_080));
    world.settle();
    assert_eq!(any_address(&mut world, 30_080, "a"), (host_port, vec![]));
    // A Service that is older, by all accounts.
    let Event::Changed(Change::Service(mut older)) = service(0) else { unreachable!() };
    let changed = Arc::make_mut(&mut older);
    (changed.kind, changed.ports[0].node_port) = (crate::model::ServiceType::NodePort, Some(30_080));
    world.take(Event::Changed(Change::Service(older)));
    world.settle();
    let text = "any IPv4 node address:30080/TCP belongs to Service ns/svc0; it is left out here";
    let node_port = Some(FrontendKind::NodePort.number());
    assert_eq!(any_address(&mut world, 30_080, "a"), (node_port, vec![text.to_owned()]));
    world.take(Event::Changed(Change::ServiceGone(name(0))));
    world.settle();
    assert_eq!(any_address(&mut world, 30_080, "a"), (host_port, vec![]));
}

#[test]
fn of_two_pods_the_older_has_a_host_port_until_it_is_gone() {
    let mut world = World::full(0, 0);
    world.take(pod("young", 20, 80));
    world.take(pod("old", 10, 80));
    world.settle();
    let text = "any IPv4 node address:80/TCP belongs to Pod ns/old; it is left out here";
    assert_eq!(any_address(&mut world, 80, "young").1, [text]);
    assert_eq!(any_address(&mut world, 80, "old").1, [""; 0]);
    let old = PodName { namespace: "ns".into(), name: "old".into() };
    world.take(Event::Changed(Change::PodGone(old)));
    world.settle();
    let host_port = Some(FrontendKind::HostPort.number());
    assert_eq!(any_address(&mut world, 80, "young"), (host_port, vec![]));
    assert_eq!(world.agent.reconciler.services(), 0);
}

#[test]
fn services_do_not_wait_for_pods_that_may_not_be_read() {
    let mut world = World::new(FakeMaps::new(LIMITS));
    world.take(service(0));
    for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Pods) {
        world.take(Event::Listed(kind));
    }
    world.agent.set_addresses(BTreeMap::new());
    world.settle();
    assert!(!world.health.is_synced() && world.keys().is_empty());
    world.take(Event::Refused(Kind::Pods));
    world.settle();
    assert_eq!(world.keys(), [key(0)]);
    assert!(world.health.is_synced());
    world.take(pod("a", 10, 80));
    world.take(Event::Listed(Kind::Pods));
    world.settle();
    assert_eq!(world.keys().len(), 2);
}

#[test]
fn maps_that_refuse_are_read_again_and_repaired() {
    let mut world = World::full(20, 1);
    let before = world.agent.stats();
    for fail_after in 0..4 {
        world.agent.maps().fail_after = Some(fail_after);
        let addr = format!("10.9.9.{fail_after}");
        world.take(slice(3, &[&addr]));
        world.take(slice(4, &["10.9.8.1"]));
        world.settle();
        // The others are right at once, the refused one after a while.
        world.pass(RETRY);
        let snapshot = world.agent.maps().snapshot();
        for n in [3, 4] {
            let window = snapshot.frontends[&key(n)].internal;
            let backend = snapshot.backends[&(crate::entries::Family::V4, snapshot.slots[&window.base][0])];
            let expected = if n == 3 { addr.as_str() } else { "10.9.8.1" };
            assert_eq!(backend.addr.ip().to_string(), expected, "{fail_after}");
        }
        assert_eq!(snapshot.frontends.len(), 20);
        world.pass(GRACE);
    }
    assert_eq!(world.agent.stats().read - before.read, 4);
    assert!(world.agent.next_wake().is_none());
}

/// Maps that always refuse one frontend.
struct Picky {
    maps: FakeMaps,
    hates: FrontendKey,
}

impl Maps for Picky {
    fn limits(&self) -> Limits {
        self.maps.limits()
    }

    fn read(&mut self) -> Result<crate::entries::Snapshot, MapError> {
        self.maps.read()
    }

    fn differing(&mut self, writes: Vec<Op>) -> Result<Vec<Op>, MapError> {
        self.maps.differing(writes)
    }

    fn entries(
        &mut self,
        table: Table,
        from: Option<Position>,
        count: usize,
    ) -> Result<(Vec<Op>, Option<Position>), MapError> {
        self.maps.entries(table, from, count)
    }

    fn apply(&mut self, ops: &[Op]) -> Result<(), ApplyError> {
        for (done, op) in ops.iter().enumerate() {
            if matches!(op, Op::SetFrontend { key, .. } if *key == self.hates) {
                let source = MapError::Failed { map: "TEST".into(), reason: "no".into() };
                return Err(ApplyError { done, source });
            }
            self.maps.apply(std::slice::from_ref(op)).map_err(|error| ApplyError { done, ..error })?;
        }
        Ok(())
    }
}

#[test]
fn a_service_that_is_refused_for_good_stops_no_other() {
    let facts = Facts { node_name: "node-a".into(), zone: None, algorithm: Algorithm::Random, mode: None };
    let health = Health::new(false);
    let maps = Picky { maps: FakeMaps::new(LIMITS), hates: key(1) };
    let mut agent = Agent::new(facts, maps, health.clone()).unwrap();
    let mut now = Instant::now();
    for n in 0..3 {
        agent.take(service(n), now);
        agent.take(slice(n, &["10.0.0.1"]), now);
    }
    for kind in Kind::ALL {
        agent.take(Event::Listed(kind), now);
    }
    agent.set_addresses(BTreeMap::new());
    agent.settle(now);
    assert!(health.is_synced());
    for round in 0..20 {
        now += Duration::from_secs(20);
        agent.take(slice(0, &[&format!("10.0.1.{round}")]), now);
        agent.settle(now);
        let keys: Vec<_> = agent.maps().maps.snapshot().frontends.into_keys().collect();
        assert_eq!(keys, [key(0), key(2)]);
    }
    // Tried again ever less often.
    assert!(agent.stats().read < 10, "{:?}", agent.stats());
    // Once it is gone everything is as it should be.
    agent.take(Event::Changed(Change::ServiceGone(name(1))), now);
    now += RETRY_AT_MOST;
    agent.settle(now);
    let read = agent.stats().read;
    now += RETRY_AT_MOST;
    agent.settle(now);
    assert_eq!(agent.stats().read, read);
}

fn balanced(n: usize, port: u16) -> Event {
    let Event::Changed(Change::Service(service)) = service(n) else { unreachable!() };
    Event::Changed(Change::Service(Arc::new(Service { health_port: Some(port), ..(*service).clone() })))
}

/// Rule 98: who is asked follows the Service; a port that is in use is nobody else's trouble.
#[tokio::test]
async fn health_ports_follow_their_services() {
    let mut world = World::full(2, 1);
    let [_, _, high, low] = std::process::id().to_be_bytes();
    let addr = IpAddr::from([127, high, low, 101]);
    let taken = std::net::TcpListener::bind((addr, 30_001)).unwrap();
    let listens = |port| std::net::TcpStream::connect((addr, port)).is_ok();
    world.agent.listen_on(BTreeSet::from([addr]));
    world.take(balanced(0, 30_001));
    world.take(balanced(1, 30_002));
    world.settle();
    let found = |world: &World, n| world.agent.said.get(&Owner::Service(name(n))).map_or(0, BTreeSet::len);
    assert!(listens(30_002) && found(&world, 0) == 1 && found(&world, 1) == 0);
    // Found again with every look at the Service, and there once.
    world.take(slice(0, &["10.9.9.9"]));
    world.settle();
    assert_eq!(found(&world, 0), 1);
    drop(taken);
    let wake = world.agent.next_wake().unwrap();
    world.pass(wake - world.now + RETRY);
    assert!(listens(30_001) && found(&world, 0) == 0);
    // Another policy; no Service.
    world.take(service(0));
    world.take(Event::Changed(Change::ServiceGone(name(1))));
    world.settle();
    assert!(!listens(30_001) && !listens(30_002));
}

#[test]
fn the_node_object_names_networks_of_pods_where_it_is_asked() {
    for asked in [true, false] {
        let mut world = World::full(1, 1);
        world.agent.set_pod_networks(if asked { None } else { Some(vec![]) });
        for text in ["10.244.1.0/24", "10.244.2.0/24"] {
            let node = Node { pod_cidrs: vec![text.parse().unwrap()], ..Node::named("node-a") };
            world.take(Event::Changed(Change::Node(Box::new(node))));
            world.settle();
            let [networks, _] = world.agent.maps().snapshot().networks;
            let networks: Vec<_> = networks.iter().map(|(net, flags)| (net.to_string(), *flags)).collect();
            let wanted = vec![(text.to_owned(), lb_common::abi::network_flags::POD)];
            assert_eq!(networks, if asked { wanted } else { vec![] });
        }
    }
}
