//! The Kubernetes source on the wire, against a double of the API server.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod bad;
mod events;
mod interruptions;
mod kept;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use fairlead::agent::Agent;
use fairlead::compile::Facts;
use fairlead::datapath::fake::FakeMaps;
use fairlead::entries::{Algorithm, Family, Limits};
use fairlead::health::Health;
use fairlead::model::{Change, Objects};
use fairlead::source::kubernetes::{Nodes, Options, client, follow, follow_with};
use fairlead::source::{CHANNEL, Event};
use kube::runtime::utils::Backoff;
use lb_common::abi::Window;
use lb_double::{CIDRS, Double, Mood, NODES, PODS, SERVICES, SLICES};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Machines are shared and slow.
const PATIENCE: Duration = Duration::from_secs(20);

const OURS: Nodes<'_> = Nodes { name: "node-a", all: false };

struct Impatient;

impl Iterator for Impatient {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(Duration::from_millis(10))
    }
}

impl Backoff for Impatient {
    fn reset(&mut self) {}
}

struct World {
    double: Double,
    events: mpsc::Receiver<Event>,
    tasks: JoinSet<()>,
    patience: Duration,
}

impl World {
    async fn start(double: Double) -> Self {
        Self::start_with(double, &Objects::default()).await
    }

    /// With what an earlier agent has kept.
    async fn start_with(double: Double, kept: &Objects) -> Self {
        let client = client(&options(&double)).await.unwrap();
        let (sender, events) = mpsc::channel(CHANNEL);
        let tasks = follow_with(&client, OURS, &sender, kept, || Box::new(Impatient));
        Self { double, events, tasks, patience: PATIENCE }
    }

    /// As the agent does it, for tests whose time is not the machine's.
    async fn start_patiently(double: Double) -> Self {
        let client = client(&options(&double)).await.unwrap();
        let (sender, events) = mpsc::channel(CHANNEL);
        let tasks = follow(&client, OURS, &sender, &Objects::default());
        Self { double, events, tasks, patience: Duration::from_hours(24) }
    }

    /// The next event that is not about whether the server answers.
    async fn next(&mut self) -> Event {
        loop {
            match self.events.recv().await.unwrap() {
                Event::Answers(..) => {}
                event => return event,
            }
        }
    }

    /// Takes events until all of `expected` came, in whatever order; nothing else may come.
    async fn expect(&mut self, expected: &[&str]) {
        let mut left: Vec<&str> = expected.to_vec();
        while !left.is_empty() {
            let event = tokio::time::timeout(self.patience, self.next()).await;
            let event = show(&event.unwrap_or_else(|_| panic!("{left:?} did not come")));
            let place = left.iter().position(|expected| *expected == event);
            left.remove(place.unwrap_or_else(|| panic!("{event} came, of {left:?}")));
        }
    }

    /// Takes the initial lists, which hold `expected`.
    async fn listed(&mut self, expected: &[&str]) {
        let marks = ["listed Services", "listed EndpointSlices", "listed Pods", "listed Nodes"];
        self.expect(&[expected, &marks].concat()).await;
        self.watching().await;
    }

    async fn watching(&self) {
        let watching = || [SERVICES, SLICES, PODS, NODES].iter().all(|path| self.double.watches(path) == 1);
        let wait = async {
            while !watching() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(self.patience, wait).await.expect("watches on all four");
    }
}

fn options(double: &Double) -> Options {
    let master = Some(format!("http://{}", double.addr));
    Options { kubeconfig: None, master, node_name: "node-a".into(), all_nodes: false }
}

fn show(event: &Event) -> String {
    match event {
        Event::Listed(kind) => format!("listed {kind}"),
        Event::Answers(kind, answers) => {
            format!("{kind} {}", if *answers { "answer" } else { "do not answer" })
        }
        Event::Refused(kind) => format!("refused {kind}"),
        Event::Unreadable(kind, count) => {
            format!(
                "{count} unreadable {}",
                kind.map_or_else(|| "documents".to_owned(), |kind| kind.to_string())
            )
        }
        Event::Changed(Change::Service(service)) => match service.ports.first() {
            Some(port) => format!("{}:{}", service.name.name, port.port),
            None => service.name.name.to_string(),
        },
        Event::Changed(Change::ServiceGone(name)) => format!("-{}", name.name),
        Event::Changed(Change::Slice(slice)) => format!("slice {}", slice.name.name),
        Event::Changed(Change::SliceGone(name)) => format!("-slice {}", name.name),
        Event::Changed(Change::Pod(pod)) => format!("pod {} {}", pod.name.name, pod.ports.len()),
        Event::Changed(Change::PodGone(name)) => format!("-pod {}", name.name),
        Event::Changed(Change::Node(node)) => {
            format!("node {} {}", node.name, node.zone.as_deref().unwrap_or("?"))
        }
        Event::Changed(Change::NodeGone(name)) => format!("-node {name}"),
        Event::Changed(Change::ServiceCidr(name, nets)) => format!("cidr {name} {nets:?}"),
        Event::Changed(Change::ServiceCidrGone(name)) => format!("-cidr {name}"),
    }
}

fn service(name: &str, port: u16) -> Value {
    json!({
        "metadata": { "name": name, "namespace": "ns", "managedFields": [{ "manager": "x" }] },
        "spec": { "clusterIP": "172.30.0.1", "ports": [{ "port": port }] },
    })
}

fn slice(name: &str) -> Value {
    json!({
        "addressType": "IPv4",
        "metadata": { "name": name, "namespace": "ns", "labels": { "kubernetes.io/service-name": "a" } },
        "endpoints": [{ "addresses": ["10.0.0.1"] }],
    })
}

fn node(name: &str, zone: &str) -> Value {
    json!({ "metadata": { "name": name, "labels": { "topology.kubernetes.io/zone": zone } } })
}

fn pod(name: &str, node: &str, host_port: u16) -> Value {
    let ports = json!([{ "containerPort": 8080, "hostPort": host_port }]);
    json!({
        "metadata": { "name": name, "namespace": "ns", "managedFields": [{ "manager": "x" }] },
        "spec": { "nodeName": node, "containers": [{ "name": "c", "image": "i", "ports": ports }] },
        "status": { "phase": "Running", "podIP": "10.0.0.7" },
    })
}

#[tokio::test]
async fn lists_page_by_page_and_then_watches() {
    let double = Double::start().await;
    for (name, port) in [("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 5)] {
        double.set(SERVICES, service(name, port));
    }
    double.set(SLICES, slice("s"));
    double.set(NODES, node("node-a", "z1"));
    double.set(NODES, node("node-b", "z2"));
    let mut world = World::start(double).await;
    let all = ["a:1", "b:2", "c:3", "d:4", "e:5", "slice s", "node node-a z1"];
    world.listed(&all).await;
    world.double.set(SERVICES, service("a", 80));
    world.expect(&["a:80"]).await;
    world.double.delete(SERVICES, "b");
    world.double.delete(SLICES, "s");
    world.expect(&["-b", "-slice s"]).await;
    assert_eq!(world.tasks.len(), 5);
}

#[tokio::test]
async fn asks_only_for_what_it_uses() {
    let mut world = World::start(Double::start().await).await;
    world.listed(&[]).await;
    let requests = world.double.requests();
    let paths: BTreeSet<&str> = requests.iter().map(|(request, _)| request.as_str()).collect();
    let expected = BTreeSet::from([
        "GET /api/v1/services",
        "GET /api/v1/pods",
        "GET /api/v1/nodes",
        "GET /apis/discovery.k8s.io/v1/endpointslices",
    ]);
    assert_eq!(paths, expected);
    for (request, parameters) in &requests {
        if request.ends_with("nodes") {
            assert_eq!(parameters["fieldSelector"], "metadata.name=node-a");
        } else if request.ends_with("pods") {
            assert_eq!(parameters["fieldSelector"], "spec.nodeName=node-a");
        } else {
            let labels = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";
            assert_eq!(parameters["labelSelector"], labels);
        }
        if parameters.contains_key("watch") {
            assert_eq!(parameters["allowWatchBookmarks"], "true");
        } else {
            assert!(parameters["limit"].parse::<u32>().unwrap() <= 500);
        }
    }
}

#[tokio::test]
async fn service_cidrs_are_followed_where_there_are_any() {
    let double = Double::start().await;
    let cidr = |cidrs: &[&str]| json!({ "metadata": { "name": "k" }, "spec": { "cidrs": cidrs } });
    let mut world = World::start(double).await;
    // Nothing waits for them.
    world.listed(&[]).await;
    world.double.set(CIDRS, cidr(&["10.96.0.0/12", "fd00:10:96::/112"]));
    world.expect(&["cidr k [10.96.0.0/12, fd00:10:96::/112]", "listed ServiceCIDRs"]).await;
}

#[tokio::test]
async fn pods_of_this_node_are_followed() {
    let double = Double::start().await;
    double.set(PODS, pod("a", "node-a", 80));
    double.set(PODS, pod("b", "node-b", 80));
    let mut world = World::start(double).await;
    world.listed(&["pod a 1"]).await;
    world.double.set(PODS, pod("c", "node-a", 81));
    world.double.set(PODS, pod("d", "node-b", 81));
    world.double.delete(PODS, "a");
    world.expect(&["pod c 1", "-pod a"]).await;
    // One that is gone while nobody looks.
    world.double.be(Mood::GoneInStream);
    world.double.disconnect();
    world.double.delete(PODS, "c");
    loop {
        let event = tokio::time::timeout(PATIENCE, world.events.recv()).await.unwrap().unwrap();
        if show(&event) == "-pod c" {
            break;
        }
    }
}

#[tokio::test]
async fn followers_end_when_nobody_listens() {
    let mut world = World::start(Double::start().await).await;
    world.listed(&[]).await;
    drop(world.events);
    // Each notices with its next event, or while it waits to ask again.
    world.double.set(SERVICES, service("a", 1));
    world.double.set(SLICES, slice("s"));
    world.double.set(PODS, pod("a", "node-a", 80));
    world.double.set(NODES, node("node-a", "z1"));
    let end = async { while world.tasks.join_next().await.is_some() {} };
    tokio::time::timeout(PATIENCE, end).await.unwrap();
}

#[tokio::test]
async fn what_is_wrong_with_the_configuration_is_said() {
    let error = |options: Options| async move { client(&options).await.err().unwrap().to_string() };
    let nowhere = Options { kubeconfig: Some("/nowhere/config".into()), ..Options::default() };
    let text = error(nowhere).await;
    assert!(text.starts_with("kubeconfig /nowhere/config: "), "{text}");
    let text = error(Options { master: Some("not a url".into()), ..Options::default() }).await;
    assert!(text.starts_with("--master \"not a url\" is not a URL"), "{text}");
}

/// The agent between the wire and maps that are no kernel's.
struct Whole {
    world: World,
    agent: Agent<FakeMaps>,
}

impl Whole {
    async fn start(double: Double, maps: FakeMaps) -> Self {
        let facts =
            Facts { node_name: "node-a".into(), zone: None, algorithm: Algorithm::Random, mode: None };
        let mut agent = Agent::new(facts, maps, Health::new(true)).unwrap();
        agent.set_addresses(BTreeMap::new());
        Self { world: World::start(double).await, agent }
    }

    /// Lets the agent work until the frontends and their backends are these.
    async fn until(&mut self, expected: &[(&str, &[&str])]) {
        let expected: Vec<(String, Vec<String>)> = expected
            .iter()
            .map(|(key, addrs)| ((*key).into(), addrs.iter().map(ToString::to_string).collect()))
            .collect();
        let mut view = vec![];
        while view != expected {
            let event = tokio::time::timeout(PATIENCE, self.world.events.recv()).await;
            let event = event.unwrap_or_else(|_| panic!("{view:?} instead of {expected:?}")).unwrap();
            self.agent.take(event, Instant::now());
            self.agent.settle(Instant::now());
            let snapshot = self.agent.maps().snapshot();
            let backends = |window: Window| -> Vec<String> {
                let slots = if window.len > 0 { &snapshot.slots[&window.base][..] } else { &[] };
                slots.iter().map(|id| snapshot.backends[&(Family::V4, *id)].addr.to_string()).collect()
            };
            let frontends = snapshot.frontends.iter();
            view = frontends.map(|(key, entry)| (key.to_string(), backends(entry.internal))).collect();
        }
    }
}

fn complete(name: &str, n: u8) -> Value {
    json!({
        "metadata": { "name": name, "namespace": "ns" },
        "spec": { "clusterIP": format!("172.30.0.{n}"), "ports": [{ "name": "http", "port": 80 }] },
    })
}

fn endpoints(service: &str, addrs: &[&str]) -> Value {
    let endpoints: Vec<Value> = addrs.iter().map(|addr| json!({ "addresses": [addr] })).collect();
    json!({
        "addressType": "IPv4",
        "metadata": {
            "name": format!("{service}-x"), "namespace": "ns",
            "labels": { "kubernetes.io/service-name": service },
        },
        "ports": [{ "name": "http", "port": 8080 }],
        "endpoints": endpoints,
    })
}

#[tokio::test]
async fn from_the_wire_to_the_maps_through_outages_and_restarts() {
    let limits =
        Limits { services: 100, backends: 100, slots: 1600, addresses: 100, sources: 100, members: 100 };
    let double = Double::start().await;
    for (name, n) in [("a", 1), ("b", 2), ("c", 3)] {
        double.set(SERVICES, complete(name, n));
        double.set(SLICES, endpoints(name, &[&format!("10.0.0.{n}")]));
    }
    double.set(NODES, node("node-a", "z1"));
    let mut whole = Whole::start(double.clone(), FakeMaps::new(limits)).await;
    let (a, b, c) = ("172.30.0.1:80/TCP", "172.30.0.2:80/TCP", "172.30.0.3:80/TCP");
    whole.until(&[(a, &["10.0.0.1:8080"]), (b, &["10.0.0.2:8080"]), (c, &["10.0.0.3:8080"])]).await;
    double.set(SLICES, endpoints("a", &["10.0.0.1", "10.0.0.9"]));
    let more: &[&str] = &["10.0.0.1:8080", "10.0.0.9:8080"];
    whole.until(&[(a, more), (b, &["10.0.0.2:8080"]), (c, &["10.0.0.3:8080"])]).await;

    // The server is away; half of it is another when it comes back, and its history is gone.
    whole.world.watching().await;
    double.be(Mood::Forbidden(None));
    double.disconnect();
    double.delete(SERVICES, "b");
    double.delete(SLICES, "b-x");
    double.set(SLICES, endpoints("c", &[]));
    double.set(SERVICES, complete("d", 4));
    double.be(Mood::GoneInStream);
    let d = "172.30.0.4:80/TCP";
    whole.until(&[(a, more), (c, &[]), (d, &[])]).await;

    // And so is another agent's start.
    double.be(Mood::Well);
    let maps = whole.agent.maps().clone();
    drop(whole);
    double.set(SLICES, endpoints("d", &["10.0.0.4"]));
    let mut whole = Whole::start(double, maps).await;
    whole.until(&[(a, more), (c, &[]), (d, &["10.0.0.4:8080"])]).await;
    // One backend, one window, one frontend; and what the predecessor had no time to free.
    assert!(whole.agent.stats().ops < 8, "{:?}", whole.agent.stats());
}

#[tokio::test]
async fn without_a_right_to_pods_services_are_served() {
    let limits =
        Limits { services: 100, backends: 100, slots: 1600, addresses: 100, sources: 100, members: 100 };
    let double = Double::start().await;
    double.set(SERVICES, complete("a", 1));
    double.set(SLICES, endpoints("a", &["10.0.0.1"]));
    double.set(PODS, pod("p", "node-a", 80));
    double.be(Mood::Forbidden(Some(PODS)));
    let mut whole = Whole::start(double.clone(), FakeMaps::new(limits)).await;
    let service: (&str, &[&str]) = ("172.30.0.1:80/TCP", &["10.0.0.1:8080"]);
    whole.until(&[service]).await;
    // It is asked for again and again.
    double.be(Mood::Well);
    whole.until(&[("any IPv4 node address:80/TCP", &["10.0.0.7:8080"]), service]).await;
    // What is known stays when the right is taken away.
    double.be(Mood::Forbidden(Some(PODS)));
    double.disconnect();
    double.set(SERVICES, complete("b", 2));
    let b: (&str, &[&str]) = ("172.30.0.2:80/TCP", &[]);
    whole.until(&[("any IPv4 node address:80/TCP", &["10.0.0.7:8080"]), service, b]).await;
}
