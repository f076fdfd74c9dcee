//! What happens in a cluster, and what the maps hold then. The same with a real API server and with the double.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use fairlead::agent::Agent;
use fairlead::compile::Facts;
use fairlead::datapath::fake::FakeMaps;
use fairlead::entries::{Algorithm, Family, Limits};
use fairlead::health::Health;
use fairlead::kept::Kept;
use fairlead::model::Objects;
use fairlead::source::kubernetes::{Nodes, Options, client, follow};
use fairlead::source::{CHANNEL, Event};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::launch::Cluster;
use lb_double::{Double, NODES, SERVICES, SLICES};

const OURS: Nodes<'_> = Nodes { name: "node-a", all: false };
const PATIENCE: Duration = Duration::from_mins(2);
const LIMITS: Limits =
    Limits { services: 100, backends: 100, slots: 1600, addresses: 100, sources: 100, members: 100 };

/// An API server.
pub(crate) enum Server {
    Double(Double),
    Real { cluster: Box<Cluster>, client: Client },
}

impl Server {
    pub(crate) async fn double() -> Self {
        Self::Double(Double::start().await)
    }

    pub(crate) async fn real(assets: &Path) -> Self {
        let cluster = Box::new(Cluster::start(assets, PATIENCE).unwrap());
        let options = Options { kubeconfig: Some(cluster.kubeconfig()), ..Options::default() };
        let server = Self::Real { cluster, client: client(&options).await.unwrap() };
        server.ready().await;
        server
    }

    fn options(&self) -> Options {
        let node_name = "node-a".to_owned();
        match self {
            Self::Double(double) => {
                let master = Some(format!("http://{}", double.addr));
                Options { kubeconfig: None, master, node_name, all_nodes: false }
            }
            Self::Real { cluster, .. } => {
                Options { kubeconfig: Some(cluster.kubeconfig()), master: None, node_name, all_nodes: false }
            }
        }
    }

    /// It listens before it knows who may do what.
    async fn ready(&self) {
        let Self::Real { client, .. } = self else { return };
        let start = Instant::now();
        let services = Api::<DynamicObject>::default_namespaced_with(client.clone(), &resource(SERVICES));
        while let Err(error) = services.list(&ListParams::default()).await {
            assert!(start.elapsed() < PATIENCE, "{error}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Creates or changes an object, and its status.
    async fn apply(&self, path: &str, mut object: Value) {
        let Self::Real { client, .. } = self else {
            let Self::Double(double) = self else { return };
            double.set(path, object);
            return;
        };
        let resource = resource(path);
        object["apiVersion"] = resource.api_version.clone().into();
        object["kind"] = resource.kind.clone().into();
        let object: DynamicObject = serde_json::from_value(object).unwrap();
        let (api, params) = (api(client, path, &resource), PatchParams::apply("tests").force());
        api.patch(&object.name_any(), &params, &Patch::Apply(&object)).await.unwrap();
        if object.data.get("status").is_some() {
            api.patch_status(&object.name_any(), &params, &Patch::Apply(&object)).await.unwrap();
        }
    }

    async fn delete(&self, path: &str, name: &str) {
        match self {
            Self::Double(double) => double.delete(path, name),
            Self::Real { client, .. } => {
                let api = api(client, path, &resource(path));
                api.delete(name, &DeleteParams::default()).await.unwrap();
            }
        }
    }

    async fn interrupt(&mut self) {
        match self {
            Self::Double(double) => double.go_away().await,
            Self::Real { cluster, .. } => cluster.interrupt(),
        }
    }

    async fn resume(&mut self) {
        match self {
            Self::Double(double) => double.come_back().await,
            Self::Real { cluster, .. } => cluster.resume().unwrap(),
        }
        self.ready().await;
    }
}

fn resource(path: &str) -> ApiResource {
    let (group, kind) = match path {
        SERVICES => ("", "Service"),
        SLICES => ("discovery.k8s.io", "EndpointSlice"),
        _ => ("", "Node"),
    };
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, "v1", kind))
}

fn api(client: &Client, path: &str, resource: &ApiResource) -> Api<DynamicObject> {
    match path {
        NODES => Api::all_with(client.clone(), resource),
        _ => Api::default_namespaced_with(client.clone(), resource),
    }
}

/// The agent behind the API server, with maps that are no kernel's.
pub(crate) struct Follower {
    agent: Agent<FakeMaps>,
    events: mpsc::Receiver<Event>,
    _tasks: JoinSet<()>,
}

impl Follower {
    async fn start(server: &Server) -> Self {
        Self::with(&server.options(), LIMITS, None).await
    }

    /// With room for a large cluster, and what an earlier one has kept.
    pub(crate) async fn start_large(master: String, kept: Option<Kept>) -> Self {
        let limits =
            Limits { services: 20_000, backends: 120_000, slots: 400_000, addresses: 20_000, ..LIMITS };
        let options = Options { master: Some(master), node_name: "node-a".into(), ..Options::default() };
        Self::with(&options, limits, kept).await
    }

    async fn with(options: &Options, limits: Limits, kept: Option<Kept>) -> Self {
        let (sender, events) = mpsc::channel(CHANNEL);
        let objects = kept.map(|kept| kept.objects);
        let nothing = Objects::default();
        let told = objects.as_ref().unwrap_or(&nothing);
        let tasks = follow(&client(options).await.unwrap(), OURS, &sender, told);
        let facts =
            Facts { node_name: "node-a".into(), zone: None, algorithm: Algorithm::Random, mode: None };
        let mut agent = Agent::new(facts, FakeMaps::new(limits), Health::new(true)).unwrap();
        if let Some(objects) = objects {
            agent.restore(&objects, Timestamp::UNIX_EPOCH, Instant::now() + PATIENCE);
        }
        agent.set_addresses(BTreeMap::new());
        Self { agent, events, _tasks: tasks }
    }

    /// What the agent would keep.
    pub(crate) fn state(&self) -> Option<Objects> {
        self.agent.state().map(|(objects, _)| objects)
    }

    /// Lets the agent work until the frontends but the API server's own, and their backends, are these.
    async fn until(&mut self, expected: &[(&str, &[&str])]) {
        let expected: BTreeMap<String, Vec<String>> = expected
            .iter()
            .map(|(key, addrs)| ((*key).to_owned(), addrs.iter().map(ToString::to_string).collect()))
            .collect();
        let mut view = BTreeMap::new();
        while view != expected {
            let event = tokio::time::timeout(PATIENCE, self.events.recv()).await;
            let event = event.unwrap_or_else(|_| panic!("{view:?} instead of {expected:?}")).unwrap();
            self.agent.take(event, Instant::now());
            self.agent.settle(Instant::now());
            view = self.view();
        }
    }

    /// Lets the agent work until it has written that many frontends; they come at once.
    pub(crate) async fn until_frontends(&mut self, count: u64) {
        while self.agent.stats().ops < count {
            let event = tokio::time::timeout(PATIENCE, self.events.recv()).await.unwrap().unwrap();
            self.agent.take(event, Instant::now());
            self.agent.settle(Instant::now());
        }
    }

    fn view(&mut self) -> BTreeMap<String, Vec<String>> {
        let snapshot = self.agent.maps().snapshot();
        let frontends = snapshot.frontends.iter().filter(|(key, _)| key.port != 443);
        let backends = frontends.map(|(key, entry)| {
            let slots = if entry.internal.len > 0 { &snapshot.slots[&entry.internal.base][..] } else { &[] };
            let addr = |id: &u32| snapshot.backends[&(Family::of(key.addr), *id)].addr.to_string();
            (key.to_string(), slots.iter().map(addr).collect())
        });
        backends.collect()
    }
}

fn service(name: &str, spec: &Value) -> Value {
    json!({ "metadata": { "name": name, "namespace": "default" }, "spec": spec })
}

fn slice(service: &str, kind: &str, addrs: &[&str]) -> Value {
    let endpoints: Vec<Value> = addrs.iter().map(|addr| json!({ "addresses": [addr] })).collect();
    json!({
        "addressType": kind,
        "metadata": {
            "name": format!("{service}-{}", kind.to_lowercase()), "namespace": "default",
            "labels": { "kubernetes.io/service-name": service },
        },
        "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
        "endpoints": endpoints,
    })
}

fn port() -> Value {
    json!([{ "name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080 }])
}

async fn with_node(server: &Server) {
    server.apply(NODES, json!({ "metadata": { "name": "node-a" } })).await;
}

pub(crate) async fn services_of_every_kind(server: Server) {
    with_node(&server).await;
    let mut follower = Follower::start(&server).await;
    let (v4, v6): (&[&str], &[&str]) = (&["10.0.0.1:8080"], &["[fd00::1]:8080"]);
    let dual = json!({
        "clusterIP": "172.30.0.10", "clusterIPs": ["172.30.0.10", "fd00:30::10"],
        "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack", "ports": port(),
    });
    server.apply(SERVICES, service("dual", &dual)).await;
    server.apply(SLICES, slice("dual", "IPv4", &["10.0.0.1"])).await;
    server.apply(SLICES, slice("dual", "IPv6", &["fd00::1"])).await;
    let dual = [("172.30.0.10:80/TCP", v4), ("[fd00:30::10]:80/TCP", v6)];
    follower.until(&dual).await;

    let node_port = json!([{ "name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080 }]);
    let all = json!({
        "type": "LoadBalancer", "clusterIP": "172.30.0.11", "clusterIPs": ["172.30.0.11"],
        "externalIPs": ["192.0.2.7"], "ports": node_port,
    });
    let mut all = service("all", &all);
    all["status"] = json!({ "loadBalancer": { "ingress": [{ "ip": "192.0.2.8" }] } });
    server.apply(SERVICES, all).await;
    server.apply(SLICES, slice("all", "IPv4", &["10.0.0.1"])).await;
    let every =
        ["any IPv4 node address:30080/TCP", "172.30.0.11:80/TCP", "192.0.2.7:80/TCP", "192.0.2.8:80/TCP"];
    let every: Vec<_> = every.into_iter().map(|key| (key, v4)).chain(dual).collect();
    follower.until(&every).await;

    server.delete(SERVICES, "all").await;
    server.delete(SLICES, "dual-ipv6").await;
    follower.until(&[dual[0], (dual[1].0, &[])]).await;
}

/// Rule 110, the API server's part.
pub(crate) async fn an_api_server_that_restarts(mut server: Server) {
    with_node(&server).await;
    let mut follower = Follower::start(&server).await;
    let ip = |ip: &str| json!({ "clusterIP": ip, "clusterIPs": [ip], "ports": port() });
    server.apply(SERVICES, service("before", &ip("172.30.0.20"))).await;
    follower.until(&[("172.30.0.20:80/TCP", &[])]).await;
    server.interrupt().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    server.resume().await;
    server.apply(SERVICES, service("after", &ip("172.30.0.21"))).await;
    server.apply(SLICES, slice("before", "IPv4", &["10.0.0.2"])).await;
    follower.until(&[("172.30.0.20:80/TCP", &["10.0.0.2:8080"]), ("172.30.0.21:80/TCP", &[])]).await;
    server.delete(SERVICES, "before").await;
    follower.until(&[("172.30.0.21:80/TCP", &[])]).await;
}
