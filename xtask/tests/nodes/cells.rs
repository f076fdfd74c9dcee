//! Every client of a Service by every frontend: who may answer and what address it may see, after the rules of
//! kube-proxy. The expectation is worked out from the manifest, with nothing of the agent.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use xtask::lab::{Call, Caller, Endpoint, Family, Node, Outcome, Protocol, Service};

use crate::world::{AT_ONCE, Findings, PORT, World, at_vip, external_ips, lb_ips, node_port, of_family};

/// How long silence is listened to. An answer that must not come would come within a few milliseconds.
const QUIET: Duration = Duration::from_millis(200);
/// So many calls meet each of two endpoints, but once in 2^63.
const MANY: usize = 64;
/// So many calls meet an endpoint that must not answer, but once in 2^10.
const SOME: usize = 10;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Pod,
    /// On a node.
    Process,
    Outside,
}

#[derive(Clone)]
pub(crate) struct Client<'a> {
    pub(crate) caller: &'a Caller,
    pub(crate) kind: Kind,
    /// The node that it is on.
    pub(crate) home: Option<&'a Node>,
    /// What it may send from.
    addrs: Vec<IpAddr>,
}

impl World {
    /// A client of each kind.
    pub(crate) fn clients(&self) -> Vec<Client<'_>> {
        let pod = [(&self.a2, self.node_a()), (&self.b2, self.node_b())].map(|(pod, node)| Client {
            caller: pod,
            kind: Kind::Pod,
            home: Some(node),
            addrs: pod.addrs.both().to_vec(),
        });
        let process = self.lab().nodes().map(|node| Client {
            caller: node,
            kind: Kind::Process,
            home: Some(node),
            addrs: Family::ALL.iter().flat_map(|family| node.own_addrs(*family)).collect(),
        });
        let outside = [&self.lab().outside, &self.lab().far].map(|machine| Client {
            caller: machine,
            kind: Kind::Outside,
            home: None,
            addrs: machine.addrs.both().to_vec(),
        });
        pod.into_iter().chain(process).chain(outside).collect()
    }
}

#[derive(Clone, Copy)]
pub(crate) enum Frontend<'a> {
    ClusterIp,
    LoadBalancerIp,
    ExternalIp,
    NodePort(&'a Node),
}

impl Frontend<'_> {
    /// Of Service number `n`.
    pub(crate) fn target(self, n: u8, family: Family) -> SocketAddr {
        match self {
            Self::ClusterIp => at_vip(n, family, PORT),
            Self::LoadBalancerIp => SocketAddr::new(of_family(lb_ips(n), family), PORT),
            Self::ExternalIp => SocketAddr::new(of_family(external_ips(n), family), PORT),
            Self::NodePort(node) => node.at(family, node_port(n)),
        }
    }
}

/// What must come of a call.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Expected {
    /// Each of these answers, and nobody else.
    Servers(BTreeSet<String>),
    /// At once.
    Refused,
    Silence,
}

/// The endpoints that may be used of these: the ready ones; without any, those that serve while they terminate.
fn usable(endpoints: &[&Endpoint]) -> BTreeSet<String> {
    let names = |fits: fn(&Endpoint) -> bool| {
        endpoints.iter().filter(|e| fits(e)).map(|e| e.pod.clone()).collect::<BTreeSet<_>>()
    };
    let ready = names(|e| e.ready);
    if ready.is_empty() { names(|e| e.serving && e.terminating) } else { ready }
}

/// One call of one client.
pub(crate) struct Cell<'a> {
    pub(crate) client: &'a Client<'a>,
    pub(crate) frontend: Frontend<'a>,
    /// Of the Service.
    pub(crate) number: u8,
    pub(crate) service: &'a Service,
    /// Where packets to the Service's own addresses enter that do not come from a node.
    pub(crate) via: &'a Node,
    pub(crate) protocol: Protocol,
    pub(crate) family: Family,
    /// The agents know the networks of pods.
    pub(crate) cluster_cidr: bool,
}

impl<'a> Cell<'a> {
    /// The node that sees the frontend first.
    fn translator(&self) -> &'a Node {
        match self.frontend {
            Frontend::NodePort(node) => node,
            _ => self.client.home.unwrap_or(self.via),
        }
    }

    fn at_home(&self) -> bool {
        self.client.home.is_some_and(|home| home.name == self.translator().name)
    }

    fn expected(&self) -> Expected {
        let here = self.translator();
        let endpoints: Vec<_> = self.service.endpoints.iter().collect();
        let cluster = usable(&endpoints);
        let inside = self.at_home() || (self.cluster_cidr && self.client.kind == Kind::Pod);
        let policy = match self.frontend {
            Frontend::ClusterIp => &self.service.spec["internalTrafficPolicy"],
            _ if inside => &serde_json::Value::Null,
            _ => &self.service.spec["externalTrafficPolicy"],
        };
        let local: Vec<_> = endpoints.into_iter().filter(|e| e.node == here.name).collect();
        let local = usable(&local);
        match (cluster.is_empty(), policy == "Local", local.is_empty()) {
            (true, ..) => Expected::Refused,
            (false, false, _) => Expected::Servers(cluster),
            (false, true, true) => Expected::Silence,
            (false, true, false) => Expected::Servers(local),
        }
    }

    /// What a server may take for the client's address. It is the client's own whenever the reply comes back to the
    /// node that translates.
    fn sources(&self, server: &str) -> Vec<IpAddr> {
        let here = self.translator();
        let is_here = self.service.endpoints.iter().any(|e| e.pod == server && e.node == here.name);
        if is_here || self.at_home() { self.client.addrs.clone() } else { vec![here.addrs.of(self.family)] }
    }

    fn describe(&self) -> String {
        let frontend = match self.frontend {
            Frontend::ClusterIp => "ClusterIP".to_owned(),
            Frontend::LoadBalancerIp => "load-balancer IP".to_owned(),
            Frontend::ExternalIp => "externalIP".to_owned(),
            Frontend::NodePort(node) => format!("NodePort of {}", node.name),
        };
        let Self { client, service, protocol, family, via, .. } = self;
        let via = if client.kind == Kind::Outside { format!(" via {}", via.name) } else { String::new() };
        format!("{} -> {frontend} of {}{via}, {protocol}, {family:?}", client.caller.name(), service.name)
    }

    /// Calls and compares; what was expected.
    fn check(&self, findings: &mut Findings) -> Result<Option<Expected>> {
        let expected = self.expected();
        let call = Call::new(self.protocol, self.frontend.target(self.number, self.family));
        match &expected {
            Expected::Servers(servers) => self.check_servers(&call, servers, findings)?,
            Expected::Refused => {
                let begin = Instant::now();
                let outcome = self.client.caller.ask(call)?;
                let took = begin.elapsed();
                findings.check(outcome == Outcome::Refused && took < AT_ONCE, || {
                    format!("{}: {outcome} after {took:?}, not refused at once", self.describe())
                });
            }
            Expected::Silence => {
                // Every other cell: the limit is waited for.
                if (self.family == Family::V4) != (self.protocol == Protocol::Tcp) {
                    return Ok(None);
                }
                let outcome = self.client.caller.ask(call.patience(QUIET))?;
                // A socket cannot be met with silence.
                let fine = match (self.client.kind, self.at_home()) {
                    (Kind::Process, true) => matches!(outcome, Outcome::Unreachable(_)),
                    _ => outcome == Outcome::TimedOut,
                };
                findings.check(fine, || format!("{}: {outcome}, not silence", self.describe()));
            }
        }
        Ok(Some(expected))
    }

    fn check_servers(&self, call: &Call, servers: &BTreeSet<String>, findings: &mut Findings) -> Result<()> {
        let everybody = self.service.endpoints.len() == servers.len();
        let mut seen = BTreeSet::new();
        for i in 0..MANY {
            if seen.len() == servers.len() && (everybody || i >= SOME) {
                return Ok(());
            }
            let outcome = self.client.caller.ask(call.clone())?;
            let server = outcome.server().unwrap_or_default().to_owned();
            let sources = self.sources(&server);
            let known = servers.contains(&server);
            if !known || !outcome.seen_as().is_some_and(|saw| sources.contains(&saw.ip())) {
                let described = self.describe();
                findings
                    .check(false, || format!("{described}: {outcome}, not {servers:?}, from {sources:?}"));
                return Ok(());
            }
            seen.insert(server);
        }
        findings.check(seen.len() == servers.len(), || {
            format!("{}: only {seen:?} of {servers:?}", self.describe())
        });
        Ok(())
    }
}

/// The cells of one client. Those that do not depend on `via` only the first time.
fn cells<'a>(
    nodes: [&'a Node; 2],
    client: &'a Client<'a>,
    services: &'a [(u8, Service)],
    via: &'a Node,
    cluster_cidr: bool,
) -> impl Iterator<Item = Cell<'a>> {
    let own = [Frontend::ClusterIp, Frontend::LoadBalancerIp, Frontend::ExternalIp];
    let node_ports = nodes.map(Frontend::NodePort);
    let first = via.name == nodes[0].name;
    let own = own.into_iter().filter(move |_| first || client.kind == Kind::Outside);
    let node_ports = node_ports.into_iter().filter(move |_| first);
    own.chain(node_ports).flat_map(move |frontend| {
        services.iter().flat_map(move |(number, service)| {
            Protocol::ALL.into_iter().flat_map(move |protocol| {
                Family::ALL.into_iter().map(move |family| Cell {
                    client,
                    frontend,
                    number: *number,
                    service,
                    via,
                    protocol,
                    family,
                    cluster_cidr,
                })
            })
        })
    })
}

/// Checks every client by every frontend of these Services; the expectations that came up, each once.
pub(crate) fn check_every_cell(
    world: &World,
    services: &[(u8, Service)],
    cluster_cidr: bool,
) -> Result<BTreeSet<Expected>> {
    let (clients, nodes) = (world.clients(), world.lab().nodes());
    let mut findings = Findings::default();
    let mut met = BTreeSet::new();
    for via in nodes {
        world.route_services_through(via)?;
        let results = each_at_once(&clients, |client| {
            let mut findings = Findings::default();
            let mut met = BTreeSet::new();
            for cell in cells(nodes, client, services, via, cluster_cidr) {
                if findings.enough() {
                    break;
                }
                met.extend(cell.check(&mut findings)?);
            }
            Ok((findings, met))
        })?;
        for (others, these) in results {
            findings.add(others);
            met.extend(these);
        }
    }
    findings.report();
    Ok(met)
}

/// Does the same with every client, all at the same time.
pub(crate) fn each_at_once<'a, T: Send>(
    clients: &[Client<'a>],
    work: impl Fn(&Client<'a>) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    thread::scope(|scope| {
        let threads: Vec<_> = clients.iter().map(|client| scope.spawn(|| work(client))).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    })
}
