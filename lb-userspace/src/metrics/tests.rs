#![expect(clippy::float_cmp, reason = "whole numbers, written and read back")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lb_common::abi::{self, Usage};
use lb_common::maps::MAX_USAGES;
use lb_common::reason::{Action, Hook, Reason};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::agent::Agent;
use crate::compile::Facts;
use crate::datapath::MapError;
use crate::datapath::fake::FakeMaps;
use crate::entries::{Algorithm, Limits, Protocol};
use crate::inspect::{InspectError, MapView};
use crate::model::{Change, Endpoint, EndpointSlice, Policy, Service, ServicePort, SliceName, SlicePort};
use crate::source::{Event, Kind};

const LIMITS: Limits =
    Limits { services: 50, backends: 100, slots: 1000, addresses: 50, sources: 50, members: 50 };
const FEATURES: Features = Features {
    set_retval: true,
    coarse_clock: true,
    csum_ipv6: false,
    checks_mtu: true,
    tcx: true,
    kernel_sweep: true,
};

/// Counting maps in memory.
#[derive(Clone, Debug, Default)]
struct Fake(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    counters: BTreeMap<(Hook, Reason), abi::Counter>,
    usage: BTreeMap<u32, Usage>,
    broken: bool,
}

impl Counts for Fake {
    fn counter(&self, hook: Hook, reason: Reason) -> Result<abi::Counter, MapError> {
        let state = lock(&self.0);
        if state.broken {
            return Err(MapError::Failed { map: "COUNTERS".into(), reason: "broken".into() });
        }
        Ok(state.counters.get(&(hook, reason)).copied().unwrap_or_default())
    }

    fn usage(&self, id: u32) -> Result<Usage, MapError> {
        Ok(lock(&self.0).usage.get(&id).copied().unwrap_or_default())
    }

    fn reset_usage(&self, id: u32) -> Result<(), MapError> {
        lock(&self.0).usage.remove(&id);
        Ok(())
    }

    fn fill(&self) -> Result<Vec<MapView>, InspectError> {
        Ok(vec![MapView { map: "FLOWS4", entries: 7, max_entries: 512 }])
    }
}

impl Fake {
    fn count(&self, hook: Hook, reason: Reason, packets: u64) {
        let counter = abi::Counter { packets, bytes: 100 * packets };
        lock(&self.0).counters.insert((hook, reason), counter);
    }

    /// The kernel programs saw `connections` more.
    fn use_more(&self, id: u32, connections: u64) {
        let mut state = lock(&self.0);
        let usage = state.usage.entry(id).or_default();
        usage.connections += connections;
        usage.packets += 10 * connections;
        usage.bytes += 1000 * connections;
        usage.refused += 1;
    }
}

/// An agent over maps in memory, and its metrics.
struct World {
    agent: Agent<FakeMaps>,
    metrics: Metrics,
    counts: Fake,
    now: Instant,
}

impl World {
    fn new(maps: FakeMaps, counts: &Fake, limit: usize) -> Self {
        let facts =
            Facts { node_name: "node-a".into(), zone: None, algorithm: Algorithm::Random, mode: None };
        let health = Health::new(false);
        let metrics = Metrics::with_limit(&health, limit);
        metrics.attach(Box::new(counts.clone()), &FEATURES);
        let mut agent = Agent::new(facts, maps, health).unwrap();
        agent.observe(metrics.clone());
        let mut world = Self { agent, metrics, counts: counts.clone(), now: Instant::now() };
        for kind in Kind::ALL {
            world.take(Event::Listed(kind));
        }
        world.agent.set_addresses(BTreeMap::new());
        world
    }

    /// With Services of these numbers.
    fn with(numbers: &[u8], limit: usize) -> Self {
        let mut world = Self::new(FakeMaps::new(LIMITS), &Fake::default(), limit);
        for n in numbers {
            world.set(&service(*n));
        }
        world.settle();
        world
    }

    fn take(&mut self, event: Event) {
        self.agent.take(event, self.now);
    }

    fn set(&mut self, service: &Service) {
        self.take(Event::Changed(Change::Service(Arc::new(service.clone()))));
    }

    fn remove(&mut self, n: u8) {
        self.take(Event::Changed(Change::ServiceGone(name(n))));
        self.settle();
    }

    fn settle(&mut self) {
        self.agent.settle(self.now);
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.settle();
    }

    /// The value of a sample, as it is written.
    fn value(&self, sample: &str) -> Option<f64> {
        let text = self.metrics.render().unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '))?;
        Some(line.parse().unwrap())
    }

    fn connections(&self, n: u8) -> Option<f64> {
        self.value(&format!("fairlead_service_connections_total{{namespace=\"ns\",name=\"svc{n}\"}}"))
    }

    fn others(&self) -> Option<f64> {
        self.value("fairlead_service_connections_total{namespace=\"\",name=\"(other)\"}")
    }
}

fn name(n: u8) -> ServiceName {
    ServiceName { namespace: "ns".into(), name: format!("svc{n}").into() }
}

fn service(n: u8) -> Service {
    let port = ServicePort { name: String::new(), port: 80, protocol: Protocol::Tcp, node_port: None };
    Service { cluster_ips: vec![[172, 30, 0, n].into()], ports: vec![port], ..Service::named(name(n)) }
}

fn slice(n: u8, node: &str, triggered: Option<i64>) -> Event {
    let endpoint = Endpoint { node: Some(node.into()), ..Endpoint::ready([10, 0, 0, n].into()) };
    Event::Changed(Change::Slice(Arc::new(EndpointSlice {
        name: SliceName { namespace: "ns".into(), name: format!("svc{n}-1").into() },
        service: Some(name(n)),
        ports: vec![SlicePort { name: String::new(), port: 8080, protocol: Protocol::Tcp }],
        endpoints: vec![endpoint],
        triggered,
        findings: vec![],
    })))
}

/// Name, type and labels of each metric.
type Table = BTreeMap<String, (String, BTreeSet<String>)>;

fn documented() -> Table {
    let quoted = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    let mut table = Table::new();
    for line in include_str!("../../../docs/metrics.md").lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let name = quoted(cells[1]).remove(0);
        let entry = (cells[2].to_owned(), quoted(cells[3]).into_iter().collect());
        assert!(table.insert(name.clone(), entry).is_none(), "{name} is documented twice");
        assert!(!cells[4].is_empty(), "{name} has no meaning");
    }
    table
}

fn exported(text: &str) -> Table {
    let mut table = Table::new();
    let mut last = String::new();
    for line in text.lines() {
        if let Some(described) = line.strip_prefix("# TYPE ") {
            let (name, kind) = described.split_once(' ').unwrap();
            last = if kind == "counter" { format!("{name}_total") } else { name.to_owned() };
            assert!(table.insert(last.clone(), (kind.to_owned(), BTreeSet::new())).is_none(), "{name} twice");
        } else if !line.starts_with('#') {
            let (sample, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            assert!(sample.starts_with(&last), "{line} is not of {last}");
            let labels = sample.split_once('{').map_or("", |(_, labels)| labels);
            let labels = labels.split(',').filter_map(|label| Some(label.split_once('=')?.0.to_owned()));
            table.get_mut(&last).unwrap().1.extend(labels.filter(|label| label != "le"));
        }
    }
    table
}

#[test]
fn what_is_documented_is_exported_and_the_other_way_round() {
    let world = World::with(&[1], 10);
    let text = world.metrics.render().unwrap();
    assert!(text.ends_with("# EOF\n"), "{text}");
    assert_eq!(exported(&text), documented());
}

#[test]
fn reasons_that_lose_packets_are_there_from_the_start() {
    let world = World::with(&[], 10);
    let packets = |hook: &str, reason: &str| {
        world.value(&format!("fairlead_packets_total{{hook=\"{hook}\",reason=\"{reason}\"}}"))
    };
    assert_eq!(packets("xdp", "no_endpoints"), Some(0.0));
    assert_eq!(packets("xdp", "translated"), None);
    for reason in Reason::ALL.into_iter().filter(|r| matches!(r.action(), Action::Drop | Action::Reject)) {
        let drops = format!("fairlead_drops_total{{reason=\"{}\"}}", reason.name());
        assert_eq!(world.value(&drops), Some(0.0), "{drops}");
    }
    world.counts.count(Hook::Xdp, Reason::Translated, 5);
    world.counts.count(Hook::Xdp, Reason::NoEndpoints, 2);
    world.counts.count(Hook::Connect, Reason::NoEndpoints, 3);
    assert_eq!(packets("xdp", "translated"), Some(5.0));
    assert_eq!(world.value("fairlead_bytes_total{hook=\"xdp\",reason=\"translated\"}"), Some(500.0));
    assert_eq!(world.value("fairlead_drops_total{reason=\"no_endpoints\"}"), Some(5.0));
    // Nobody loses what is translated.
    assert_eq!(world.value("fairlead_drops_total{reason=\"translated\"}"), None);
}

#[test]
fn what_cannot_be_read_is_left_out_and_counted() {
    let world = World::with(&[1], 10);
    assert_eq!(world.value("fairlead_metrics_errors_total"), Some(0.0));
    lock(&world.counts.0).broken = true;
    assert_eq!(world.value("fairlead_drops_total{reason=\"no_endpoints\"}"), None);
    assert!(world.value("fairlead_metrics_errors_total") > Some(0.0));
    assert_eq!(world.connections(1), Some(0.0));
}

#[test]
fn a_service_is_counted_under_its_name() {
    let world = World::with(&[1, 2], 10);
    world.counts.use_more(1, 5);
    world.counts.use_more(2, 6);
    assert_eq!(world.connections(1), Some(5.0));
    let labels = "{namespace=\"ns\",name=\"svc2\"}";
    for (metric, value) in [("connections", 6.0), ("packets", 60.0), ("bytes", 6000.0), ("refused", 1.0)] {
        assert_eq!(world.value(&format!("fairlead_service_{metric}_total{labels}")), Some(value), "{metric}");
    }
    assert_eq!(world.others(), Some(0.0));
}

#[test]
fn an_id_that_changes_hands_takes_no_counts_along() {
    let mut world = World::with(&[1], 10);
    world.counts.use_more(1, 5);
    assert_eq!(world.connections(1), Some(5.0));
    world.remove(1);
    assert_eq!(world.connections(1), None);
    // What is under way counts on for a while.
    world.counts.use_more(1, 1);
    world.pass(Duration::from_secs(2));
    world.set(&service(2));
    world.settle();
    assert_eq!(world.connections(2), Some(0.0));
    world.counts.use_more(1, 3);
    assert_eq!(world.connections(2), Some(3.0), "it has the id of the other");
    assert_eq!(world.others(), Some(0.0));
}

#[test]
fn counts_outlive_the_agent() {
    let mut world = World::with(&[1, 2], 10);
    world.counts.use_more(1, 5);
    world.counts.use_more(2, 7);
    let mut next = World::new(world.agent.maps().clone(), &world.counts, 10);
    next.set(&service(1));
    next.settle();
    next.pass(Duration::from_secs(2));
    assert_eq!(next.connections(1), Some(5.0));
    // Whoever gets a number that was found and is nobody's begins at 0.
    next.set(&service(3));
    next.settle();
    assert_eq!(next.connections(3), Some(0.0));
    next.counts.use_more(2, 1);
    assert_eq!(next.connections(3), Some(1.0), "it has the id of the one that is gone");
}

#[test]
fn only_the_busiest_have_metrics_of_their_own_and_nothing_goes_backwards() {
    let mut world = World::with(&[1, 2, 3, 4], 2);
    for (id, connections) in [(1, 10), (2, 40), (3, 30), (4, 20)] {
        world.counts.use_more(id, connections);
    }
    let all = |world: &World| [1, 2, 3, 4].map(|n| world.connections(n));
    assert_eq!(all(&world), [None, Some(40.0), Some(30.0), None]);
    assert_eq!(world.others(), Some(30.0));
    // Places are kept, whoever is busier now.
    world.counts.use_more(1, 1000);
    assert_eq!(all(&world), [None, Some(40.0), Some(30.0), None]);
    assert_eq!(world.others(), Some(1030.0));
    // A place that becomes free is for the busiest; what it counted before stays where it was.
    world.counts.use_more(1, 1);
    world.remove(2);
    world.counts.use_more(1, 2);
    assert_eq!(all(&world), [Some(3.0), None, Some(30.0), None]);
    assert_eq!(world.others(), Some(1030.0));
    // The last of one that goes is not lost.
    world.counts.use_more(4, 5);
    world.remove(4);
    assert_eq!(world.others(), Some(1035.0));
    // Index 0: those that the datapath cannot tell apart.
    world.counts.use_more(0, 100);
    assert_eq!(world.others(), Some(1135.0));
    assert_eq!(world.others(), Some(1135.0));
}

#[test]
fn a_service_beyond_the_last_index_is_one_of_the_others() {
    let mut accounts = Accounts::new(10);
    accounts.assign(&name(1).into(), MAX_USAGES);
    assert_eq!(accounts.counted(), []);
    accounts.credit(&name(1).into(), MAX_USAGES, Usage { connections: 5, ..Usage::default() });
    accounts.credit_shared(Usage { connections: 7, ..Usage::default() });
    let rows = accounts.rows();
    assert_eq!(rows.len(), 1);
    assert_eq!((&*rows[0].0.name, rows[0].1.connections), ("(other)", 7));
}

#[test]
fn maps_and_sizes() {
    let mut world = World::with(&[1, 2], 10);
    world.take(slice(1, "node-a", None));
    world.settle();
    for (sample, value) in [
        ("fairlead_map_entries{map=\"FLOWS4\"}", 7.0),
        ("fairlead_map_capacity{map=\"FLOWS4\"}", 512.0),
        ("fairlead_map_entries{map=\"BACKENDS4\"}", 1.0),
        ("fairlead_map_capacity{map=\"BACKENDS4\"}", 100.0),
        ("fairlead_map_entries{map=\"BACKENDS6\"}", 0.0),
        ("fairlead_map_entries{map=\"SLOTS\"}", 1.0),
        ("fairlead_map_capacity{map=\"SLOTS\"}", 1000.0),
        ("fairlead_services", 2.0),
        ("fairlead_frontends", 2.0),
        ("fairlead_features{feature=\"tcx\"}", 1.0),
        ("fairlead_features{feature=\"csum_ipv6\"}", 0.0),
    ] {
        assert_eq!(world.value(sample), Some(value), "{sample}");
    }
    assert!(world.value("process_resident_memory_bytes") > Some(1e6));
    assert!(world.value("process_cpu_seconds_total") > Some(0.0));
    assert!(world.value("process_open_fds") > Some(2.0));
}

#[test]
fn findings_come_and_go() {
    let mut world = World::with(&[], 10);
    world.set(&Service { cluster_ips: vec![], ..service(1) });
    world.settle();
    assert_eq!(world.value("fairlead_findings"), Some(1.0));
    world.set(&service(1));
    world.settle();
    assert_eq!(world.value("fairlead_findings"), Some(0.0));
    world.set(&Service { cluster_ips: vec![], ..service(1) });
    world.settle();
    world.remove(1);
    assert_eq!(world.value("fairlead_findings"), Some(0.0));
    // Objects that are not even read.
    world.take(Event::Unreadable(Some(Kind::Services), 2));
    world.take(Event::Unreadable(None, 1));
    assert_eq!(world.value("fairlead_findings"), Some(3.0));
    world.take(Event::Unreadable(Some(Kind::Services), 0));
    assert_eq!(world.value("fairlead_findings"), Some(1.0));
}

#[test]
fn what_does_not_fit_counts_until_it_does() {
    let mut world = World::new(FakeMaps::new(Limits { services: 1, ..LIMITS }), &Fake::default(), 10);
    world.set(&service(1));
    world.set(&service(2));
    world.settle();
    assert_eq!(world.value("fairlead_services_unfit"), Some(1.0));
    world.remove(1);
    world.settle();
    world.now += Duration::from_secs(2);
    world.settle();
    assert_eq!(world.value("fairlead_services_unfit"), Some(0.0));
}

#[test]
fn repairs_count_by_map() {
    let mut world = World::with(&[1, 2], 10);
    world.agent.check_maps_every(Duration::from_secs(1), world.now);
    world.agent.maps().damage(|maps, _| {
        maps.frontends.pop_first();
        maps.names.pop_first();
    });
    while world.value("fairlead_map_check_rounds_total") == Some(0.0) {
        world.now = world.agent.next_wake().unwrap();
        world.settle();
    }
    for (map, repairs) in [("SERVICES4", 1.0), ("NAMES", 1.0), ("SERVICES6", 0.0), ("SLOTS", 0.0)] {
        let sample = format!("fairlead_map_repairs_total{{map=\"{map}\"}}");
        assert_eq!(world.value(&sample), Some(repairs), "{map}");
    }
    assert!(world.value("fairlead_map_check_entries_total") >= Some(4.0));
}

#[test]
fn changes_wait_until_they_are_in_the_maps() {
    let mut world = World::with(&[], 10);
    let state = |world: &World| {
        [
            "service_changes_total",
            "service_changes_pending",
            "endpoint_changes_total",
            "endpoint_changes_pending",
        ]
        .map(|name| world.value(&format!("kubeproxy_sync_proxy_rules_{name}")).unwrap())
    };
    let synced = |world: &World| {
        let value = |name: &str| world.value(&format!("kubeproxy_sync_proxy_rules_{name}")).unwrap();
        value("last_timestamp_seconds") >= value("last_queued_timestamp_seconds")
    };
    let syncs = "kubeproxy_sync_proxy_rules_duration_seconds_count";
    let before = world.value(syncs).unwrap();
    world.set(&service(1));
    // The same again is no change.
    world.set(&service(1));
    world.take(slice(1, "node-a", None));
    assert_eq!(state(&world), [1.0, 1.0, 1.0, 1.0]);
    assert!(!synced(&world));
    world.settle();
    assert_eq!(state(&world), [1.0, 0.0, 1.0, 0.0]);
    assert!(synced(&world));
    assert_eq!(world.value(syncs), Some(before + 1.0));
    // Nothing to do is no sync.
    world.settle();
    assert_eq!(world.value(syncs), Some(before + 1.0));
    // The maps refuse: it goes on waiting.
    world.agent.maps().fail_after = Some(0);
    world.set(&service(2));
    world.settle();
    assert_eq!(state(&world), [2.0, 1.0, 1.0, 0.0]);
    world.pass(Duration::from_secs(10));
    assert_eq!(state(&world), [2.0, 0.0, 1.0, 0.0]);
}

#[test]
fn network_programming_is_measured_from_the_change_of_the_pod() {
    let mut world = World::with(&[1], 10);
    let count = "kubeproxy_network_programming_duration_seconds_count";
    // Before the agent started: what a first list has.
    world.take(slice(1, "node-a", Some(60_000)));
    world.take(slice(1, "node-b", None));
    world.settle();
    assert_eq!(world.value(count), Some(0.0));
    let after = k8s_openapi::jiff::Timestamp::now().as_millisecond() + 10;
    world.take(slice(1, "node-a", Some(after)));
    assert_eq!(world.value(count), Some(0.0));
    world.settle();
    assert_eq!(world.value(count), Some(1.0));
    assert!(world.value("kubeproxy_network_programming_duration_seconds_sum") < Some(60.0));
    world.settle();
    assert_eq!(world.value(count), Some(1.0));
}

/// Rule 68.
#[test]
fn services_without_the_local_endpoint_they_ask_for() {
    let mut world = World::with(&[], 10);
    let state = |world: &World| {
        ["internal", "external"].map(|policy| {
            let name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";
            world.value(&format!("{name}{{traffic_policy=\"{policy}\"}}")).unwrap()
        })
    };
    let internal = Service { internal_policy: Policy::Local, ..service(1) };
    let external =
        Service { external_policy: Policy::Local, external_ips: vec![[192, 0, 2, 1].into()], ..service(2) };
    world.set(&internal);
    world.set(&external);
    world.settle();
    // No endpoint anywhere does not count.
    assert_eq!(state(&world), [0.0, 0.0]);
    world.take(slice(1, "node-b", None));
    world.settle();
    assert_eq!(state(&world), [1.0, 0.0]);
    world.take(slice(2, "node-b", None));
    world.settle();
    assert_eq!(state(&world), [1.0, 1.0]);
    world.take(slice(1, "node-a", None));
    world.settle();
    assert_eq!(state(&world), [0.0, 1.0]);
    world.remove(2);
    assert_eq!(state(&world), [0.0, 0.0]);
}

async fn ask(addr: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream.write_all(format!("{request} HTTP/1.0\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test]
async fn only_get_metrics_is_answered() {
    let health = Health::new(false);
    let metrics = Metrics::new(&health);
    let addr = serve("127.0.0.1:0".parse().unwrap(), metrics.clone()).await.unwrap();
    let answer = ask(addr, "GET /metrics").await;
    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
    assert!(answer.contains(CONTENT_TYPE) && answer.ends_with("# EOF\n"), "{answer}");
    for (request, status) in [("GET /", "404"), ("GET /healthz", "404"), ("POST /metrics", "405")] {
        let answer = ask(addr, request).await;
        assert!(answer.starts_with(&format!("HTTP/1.0 {status}")), "{request}: {answer}");
    }
    let taken = serve(addr, metrics).await.unwrap_err();
    assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
}

#[tokio::test]
async fn health_answers_are_counted() {
    let health = Health::new(false);
    let metrics = Metrics::new(&health);
    let addr = health::serve("127.0.0.1:0".parse().unwrap(), health.clone()).await.unwrap();
    ask(addr, "GET /healthz").await;
    health.note_synced();
    ask(addr, "GET /healthz").await;
    ask(addr, "GET /healthz").await;
    ask(addr, "GET /livez").await;
    let text = metrics.render().unwrap();
    for line in [
        "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
        "kubeproxy_proxy_healthz_total{code=\"200\"} 2",
        "kubeproxy_proxy_livez_total{code=\"200\"} 1",
        "kubeproxy_proxy_livez_total{code=\"503\"} 0",
    ] {
        assert!(text.lines().any(|have| have == line), "{line}\n{text}");
    }
}

/// However many Services a node has, the answer to a scraper stays of a size.
#[test]
fn ten_thousand_services_are_a_thousand_lines() {
    let limits = Limits {
        services: 20_000,
        backends: 100,
        slots: 20_000,
        addresses: 20_000,
        sources: 50,
        members: 50,
    };
    let mut world = World::new(FakeMaps::new(limits), &Fake::default(), SERVICES);
    for n in 0..10_000_u16 {
        let [high, low] = n.to_be_bytes();
        let name = ServiceName { namespace: "ns".into(), name: format!("a-service-{n}").into() };
        world.set(&Service { name, cluster_ips: vec![[172, 30, high, low].into()], ..service(1) });
    }
    world.settle();
    assert_eq!(world.value("fairlead_services"), Some(10_000.0));
    let text = world.metrics.render().unwrap();
    for metric in ["connections", "packets", "bytes", "refused"] {
        let start = format!("fairlead_service_{metric}_total{{");
        assert_eq!(text.lines().filter(|line| line.starts_with(&start)).count(), SERVICES + 1, "{metric}");
    }
    assert!(text.len() < 500_000, "{} bytes", text.len());
}
