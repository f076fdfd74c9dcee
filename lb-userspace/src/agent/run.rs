//! The life of the agent: opens the datapath, starts what it listens to, and stops when it is told to. The
//! programs and maps stay, and go on without it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::core::Agent;
use crate::compile::Facts;
use crate::datapath::node::{self, StateFile};
use crate::datapath::{self, Datapath, KernelMaps, SocketLb};
use crate::edges::{self, Edges, Rules, View, XdpMode};
use crate::entries::{Algorithm, Mode};
use crate::events::Events;
use crate::flows::Sweeper;
use crate::health::{self, Health};
use crate::inspect::Inspector;
use crate::kept::{Identity, Keeper, Kept};
use crate::metrics::{self, KernelCounts, Metrics};
use crate::model::Objects;
use crate::nodeports::{self, NodePortAddresses};
use crate::report::{self, Reporter};
use crate::routing::{self, Routing};
use crate::source::{CHANNEL, Event, kubernetes, manifests};

/// How long the source may take to tell everything before what was kept is served.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long an agent that ends may take to keep what it knows.
const KEEPING: Duration = Duration::from_secs(5);

/// Everything the agent is told.
#[derive(Clone, Debug)]
pub struct Config {
    pub node_name: String,
    pub source: SourceOptions,
    pub datapath: datapath::Options,
    pub cgroup_root: Option<PathBuf>,
    pub rules: Rules,
    pub xdp: XdpMode,
    pub algorithm: Algorithm,
    /// `--mode`; none: there are no tunnels between nodes.
    pub mode: Option<Mode>,
    pub nodeport_addresses: NodePortAddresses,
    /// `--source-addresses`.
    pub source_networks: Vec<IpNet>,
    /// `--cluster-cidr`; none: those that the Node object names (`--detect-local-mode=NodeCIDR`).
    pub pod_networks: Option<Vec<IpNet>>,
    /// `--map-check-period`; zero: never.
    pub map_check_period: Duration,
    /// None: nobody asks.
    pub healthz: Option<SocketAddr>,
    /// None: nobody asks.
    pub metrics: Option<SocketAddr>,
    /// Where is kept what the API server says. None: nowhere.
    pub state_file: Option<PathBuf>,
}

/// Where Services come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SourceOptions {
    Manifests(PathBuf),
    Kubernetes(kubernetes::Options),
}

/// Runs the agent until SIGTERM or SIGINT.
pub async fn run(config: Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    tracing::info!(version = env!("CARGO_PKG_VERSION"), node = config.node_name, "fairlead starts");
    raise_file_limit();
    // What can be refused without touching the node comes first.
    let health = Health::new(matches!(config.source, SourceOptions::Kubernetes(_)));
    let metrics = Metrics::new(&health);
    let mut source = Source::start(&config, &metrics).await?;
    if let Some(addr) = config.healthz {
        let addr = health::serve(addr, health.clone()).await;
        let addr = addr.with_context(|| {
            let addr = config.healthz.map(|addr| addr.to_string()).unwrap_or_default();
            format!("--healthz-bind-address {addr} (is kube-proxy still running here?)")
        })?;
        tracing::info!(%addr, "health is answered");
    }
    if let Some(addr) = config.metrics {
        let served = metrics::serve(addr, metrics.clone()).await;
        let served = served.with_context(|| format!("--metrics-bind-address {addr}"))?;
        tracing::info!(addr = %served, "metrics are answered");
    }
    let mut datapath = Datapath::open(&config.datapath)?;
    if config.mode.is_some_and(|mode| mode != Mode::Snat) && !datapath.features().checks_mtu {
        tracing::warn!(
            "this kernel (before 5.12) does not tell tc which packets fit into a tunnel: for other nodes' endpoints \
             --mode=snat is in effect here; what other nodes tunnel to this one is taken"
        );
    }
    metrics.attach(Box::new(KernelCounts::new(&datapath)?), datapath.features());
    if let Some(logger) = datapath.take_logger() {
        tokio::spawn(datapath::forward_log(logger));
    }
    tokio::spawn(Sweeper::new(&datapath)?.run(metrics.flows().clone()));
    let routes = tokio::spawn(routing::follow(Routing::open(&datapath)?));
    // Before programs are on their hooks that rely on it.
    let maps = datapath.maps()?;
    let edges = attach(&config, &datapath, &metrics)?;
    let facts = Facts {
        node_name: config.node_name.clone(),
        zone: None,
        algorithm: config.algorithm,
        mode: config.mode,
    };
    let mut agent = Agent::new(facts, maps, health)?;
    if let Some(client) = source.client.clone() {
        agent.report(Events::start(client, &config.node_name, metrics.events()));
    }
    agent.observe(metrics);
    agent.set_pod_networks(config.pod_networks.clone());
    if let Some(addr) = source.server {
        agent.reach_by(addr);
    }
    if let Some(kept) = source.kept.take() {
        let saved = Timestamp::from_second(kept.saved).unwrap_or_default();
        agent.restore(&kept.objects, saved, Instant::now() + PATIENCE);
    }
    agent.check_maps_every(config.map_check_period, Instant::now());
    let reporter = reporter(&config, &datapath, source.server)?;

    let outcome = follow(agent, source, edges.view(), reporter, &config, stop).await;
    // The follower of devices ends first, so that nothing is attached behind our back.
    drop(edges);
    // So that nobody vouches any more.
    routes.abort();
    let _ = routes.await;
    outcome
}

/// Tells `fairlead status` how the agent is.
fn reporter(config: &Config, datapath: &Datapath, server: Option<SocketAddr>) -> Result<Reporter> {
    let source = match &config.source {
        SourceOptions::Manifests(path) => ("manifests", Some(path.display().to_string())),
        SourceOptions::Kubernetes(options) => {
            ("kubernetes", options.master.clone().or_else(|| server.map(|server| server.to_string())))
        }
    };
    Ok(Reporter::new(&config.datapath.bpffs, Inspector::of(datapath)?, &config.node_name, source))
}

/// Every healthCheckNodePort takes file descriptors.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// Puts the programs on the node's hooks.
fn attach(config: &Config, datapath: &Datapath, metrics: &Metrics) -> Result<Edges> {
    let state = StateFile::new(&config.datapath.bpffs);
    node::reserve_ports(&state).context("cannot reserve the datapath's source ports")?;
    for warning in node::forwarding_warnings() {
        tracing::warn!("{warning}");
    }
    let hooks = || datapath.hooks().context("the datapath is not pinned");
    let sockets = match config.datapath.socket_lb {
        SocketLb::Off => {
            hooks()?.detach_sockets()?;
            None
        }
        SocketLb::Host | SocketLb::All => Some(hooks()?.attach_sockets(config.cgroup_root.as_deref())?),
    };
    let edges = Edges::spawn(edges::Config {
        masquerade_all: datapath.options().masquerade_all,
        hooks: hooks()?,
        map: datapath.edges_map()?,
        sources: datapath.edge_sources_map()?,
        macs: datapath.macs_map()?,
        source_networks: config.source_networks.clone(),
        rules: config.rules.clone(),
        xdp: config.xdp,
        sockets,
        state,
        reattached: metrics.reattached().clone(),
        repairs: metrics.work().repairs().clone(),
    });
    edges.context("cannot follow the node's devices")
}

/// Where events come from; ends when it is dropped.
struct Source {
    events: mpsc::Receiver<Event>,
    tasks: JoinSet<()>,
    /// The API server, if there is one: it should have an object for this node.
    client: Option<Client>,
    /// Where that is asked, if it is an address.
    server: Option<SocketAddr>,
    keeper: Option<Keeper>,
    /// What an earlier agent has kept.
    kept: Option<Kept>,
}

impl Source {
    async fn start(config: &Config, metrics: &Metrics) -> Result<Self> {
        let (sender, events) = mpsc::channel(CHANNEL);
        let options = match &config.source {
            SourceOptions::Manifests(path) => {
                manifests::follow(path, sender)?;
                tracing::info!(directory = %path.display(), "following manifests");
                let tasks = JoinSet::new();
                return Ok(Self { events, tasks, client: None, server: None, keeper: None, kept: None });
            }
            SourceOptions::Kubernetes(options) => options,
        };
        let api = kubernetes::configuration(options).await?;
        let server = kubernetes::address(&api);
        let identity = Identity { node: options.node_name.clone(), cluster: kubernetes::cluster(&api) };
        let client = kubernetes::connect(api)?;
        let new = |path: &PathBuf| Keeper::new(path, identity, metrics.clone(), Instant::now());
        let keeper = config.state_file.as_ref().map(new);
        let kept = keeper.as_ref().and_then(Keeper::read);
        let nothing = Objects::default();
        let objects = kept.as_ref().map_or(&nothing, |kept| &kept.objects);
        let nodes = kubernetes::Nodes { name: &options.node_name, all: options.all_nodes };
        let tasks = kubernetes::follow(&client, nodes, &sender, objects);
        tracing::info!("following the API server");
        Ok(Self { events, tasks, client: Some(client), server, keeper, kept })
    }

    /// When something is to be kept.
    fn next_wake(&self) -> Option<Instant> {
        self.keeper.as_ref().and_then(Keeper::next_wake)
    }

    /// Keeps what the agent knows, if it is time.
    fn keep(&mut self, agent: &Agent<KernelMaps>, now: Instant) {
        let Some(keeper) = self.keeper.as_mut().filter(|_| agent.is_complete()) else { return };
        keeper.note(agent.revision(), now);
        if keeper.next_wake().is_some_and(|at| at <= now)
            && let Some((objects, revision)) = agent.state()
        {
            keeper.write(objects, revision, now);
        }
    }
}

/// Ends when what is kept has been written.
async fn written(keeper: &mut Option<Keeper>) {
    match keeper {
        Some(keeper) => keeper.written().await,
        None => std::future::pending().await,
    }
}

/// The loop: whatever came meanwhile is taken together, and settled once.
async fn follow(
    mut agent: Agent<KernelMaps>,
    mut source: Source,
    mut view: watch::Receiver<Option<Arc<View>>>,
    mut reporter: Reporter,
    config: &Config,
    stop: impl Future<Output = &'static str>,
) -> Result<()> {
    let mut stop = std::pin::pin!(stop);
    let mut first = true;
    loop {
        let keep = source.next_wake().filter(|_| agent.is_complete());
        let wake = [agent.next_wake(), keep, Some(reporter.next_wake())].into_iter().flatten().min();
        let sleep = async {
            match wake {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        let mut addresses = false;
        tokio::select! {
            biased;
            signal = &mut stop => {
                tracing::info!(signal, "stops; the datapath goes on without the agent");
                if let Some(keeper) = source.keeper
                    && tokio::time::timeout(KEEPING, keeper.finish(agent.state())).await.is_err()
                {
                    tracing::warn!("writing the state took too long, and is given up (--state-file)");
                }
                return Ok(());
            }
            changed = view.changed() => {
                if changed.is_err() {
                    bail!("the node's devices cannot be followed any more; see the log");
                }
                addresses = true;
            }
            Some(ended) = source.tasks.join_next() => {
                // They end only when we do.
                bail!("following the API server has ended: {ended:?}");
            }
            event = source.events.recv() => {
                let Some(event) = event else {
                    bail!("following the manifests has ended; see the log");
                };
                let now = Instant::now();
                addresses |= agent.take(event, now);
                // Bounded, so that a flood of changes does not keep the maps waiting.
                for _ in 0..CHANNEL {
                    let Ok(event) = source.events.try_recv() else { break };
                    addresses |= agent.take(event, now);
                }
            }
            () = written(&mut source.keeper) => {}
            () = sleep => {}
        }
        if addresses && let Some(view) = view.borrow_and_update().as_deref() {
            let flags = nodeports::flags(&view.addresses, &config.nodeport_addresses, agent.node());
            agent.listen_on(config.nodeport_addresses.servers(&flags));
            agent.set_addresses(flags);
        }
        agent.settle(Instant::now());
        source.keep(&agent, Instant::now());
        report(&mut reporter, &agent, view.borrow().as_deref());
        if first && agent.unlisted().is_empty() {
            first = false;
            if agent.node().is_none() {
                warn_without_node(config, source.client.is_some());
            }
        }
    }
}

fn report(reporter: &mut Reporter, agent: &Agent<KernelMaps>, view: Option<&View>) {
    reporter.note_revision(agent.revision());
    let facts = report::Facts {
        findings: Box::new(agent.findings()),
        view,
        freshness: agent.health().freshness(),
        synced: agent.health().is_synced(),
        complete: agent.is_complete(),
    };
    reporter.write(facts, Instant::now());
}

/// What does not work without the Node object of this node.
fn warn_without_node(config: &Config, needs_node: bool) {
    let node = &config.node_name;
    if needs_node {
        tracing::warn!(
            node,
            "the API server knows no such Node: no endpoint is local; is --node-name right?"
        );
    }
    if config.nodeport_addresses == NodePortAddresses::Primary {
        tracing::warn!(node, "no Node object names the primary addresses: NodePorts answer nowhere");
    }
}
