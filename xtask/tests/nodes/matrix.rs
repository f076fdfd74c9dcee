//! Every way from a client to a backend: {ClusterIP, NodePort} x {TCP, UDP} x {IPv4, IPv6} x {pod, node,
//! outside} x {backend here, backend there}, in every way to attach. Pods are on a node with host routes and
//! on one with a bridge; "there" is the other node.
use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use xtask::lab::{AgentOptions, Call, Caller, Family, Node, Pod, Protocol, Xdp};

use crate::world::{Findings, PORT, World, at_vip, node_port, options, service};

/// Bytes through each path over TCP.
const MUCH: u64 = 20_000_000;
/// The same where another test takes the same programs through the same paths; and over UDP, where datagrams
/// go one system call at a time.
const SOME: u64 = 2_000_000;

#[test]
fn xdp_and_tcx() -> Result<()> {
    every_cell(AgentOptions { xdp: Xdp::Native, ..options() }, MUCH)
}

#[test]
fn tcx_alone() -> Result<()> {
    every_cell(AgentOptions { xdp: Xdp::Off, ..options() }, SOME)
}

#[test]
fn clsact_alone() -> Result<()> {
    every_cell(AgentOptions { xdp: Xdp::Off, clsact: true, ..options() }, MUCH)
}

#[test]
fn xdp_and_clsact() -> Result<()> {
    every_cell(AgentOptions { xdp: Xdp::Native, clsact: true, ..options() }, SOME)
}

/// Who calls; it decides which source address the backend must see.
#[derive(Clone, Copy)]
enum Client<'a> {
    Pod(&'a Pod, &'a Node),
    Node(&'a Node),
    Outside(&'a Caller, IpAddr),
}

/// What is called, and the node that translates it unless the client is on another one.
#[derive(Clone, Copy)]
enum Frontend<'a> {
    /// For outside clients: by way of this node.
    ClusterIp(Option<&'a Node>),
    NodePort(&'a Node),
}

/// As many bytes, or fewer by this factor where machines are emulated.
fn fewer(bytes: u64) -> Result<u64> {
    Ok(bytes / std::env::var("FAIRLEAD_FEWER").map_or(Ok(1), |by| by.parse())?)
}

fn every_cell(options: AgentOptions, bytes: u64) -> Result<()> {
    let (bytes, datagrams) = (fewer(bytes)?, fewer(SOME)?);
    let world =
        World::with_services(options, |world| vec![service(1, [&world.a1]), service(2, [&world.b1])])?;
    let mut findings = Findings::default();
    let (node_a, node_b) = (world.node_a(), world.node_b());
    for family in Family::ALL {
        let clients = [
            Client::Pod(&world.a2, node_a),
            Client::Pod(&world.b2, node_b),
            Client::Node(node_a),
            Client::Node(node_b),
            Client::Outside(&world.lab().outside, world.lab().outside.addrs.of(family)),
            Client::Outside(&world.lab().far, world.lab().far.addrs.of(family)),
        ];
        for (number, backend, backend_node) in [(1, &world.a1, node_a), (2, &world.b1, node_b)] {
            for protocol in Protocol::ALL {
                let mut cell = |client: Client<'_>, frontend: Frontend<'_>| {
                    let cell = Cell {
                        client,
                        frontend,
                        number,
                        backend,
                        backend_node,
                        protocol,
                        family,
                        bytes,
                        datagrams,
                    };
                    cell.check(&mut findings);
                };
                for client in clients {
                    cell(client, Frontend::NodePort(node_a));
                    cell(client, Frontend::NodePort(node_b));
                    if !matches!(client, Client::Outside(..)) {
                        cell(client, Frontend::ClusterIp(None));
                    }
                }
                for node in [node_a, node_b] {
                    world.route_services_through(node)?;
                    cell(clients[4], Frontend::ClusterIp(Some(node)));
                }
            }
        }
    }
    findings.report();
    Ok(())
}

struct Cell<'a> {
    client: Client<'a>,
    frontend: Frontend<'a>,
    /// Of the Service.
    number: u8,
    backend: &'a Pod,
    backend_node: &'a Node,
    protocol: Protocol,
    family: Family,
    /// To transfer over TCP.
    bytes: u64,
    /// Bytes to transfer over the others.
    datagrams: u64,
}

impl Cell<'_> {
    fn check(&self, findings: &mut Findings) {
        if findings.enough() {
            return;
        }
        let call = Call::new(self.protocol, self.target());
        let Some(outcome) = findings.take(self.caller().ask(call.clone()), || self.describe()) else {
            return;
        };
        findings.check(outcome.server() == Some(self.backend.name()), || {
            format!("{}: {outcome}, not {}", self.describe(), self.backend.name())
        });
        let Some(saw) = outcome.seen_as() else { return };
        let sources = self.sources();
        findings.check(sources.contains(&saw.ip()), || {
            format!("{}: seen as {saw}, not {sources:?}", self.describe())
        });
        let len = match self.protocol {
            Protocol::Tcp => self.bytes,
            Protocol::Udp | Protocol::Sctp => self.datagrams,
        };
        let transfer = findings.take(self.caller().transfer(call, len), || self.describe());
        findings.check(transfer.is_none_or(|transfer| transfer.server == self.backend.name()), || {
            format!("{}: the transfer went elsewhere", self.describe())
        });
    }

    fn caller(&self) -> &Caller {
        match self.client {
            Client::Pod(pod, _) => pod,
            Client::Node(node) => node,
            Client::Outside(caller, _) => caller,
        }
    }

    fn target(&self) -> SocketAddr {
        match self.frontend {
            Frontend::ClusterIp(_) => at_vip(self.number, self.family, PORT),
            Frontend::NodePort(node) => node.at(self.family, node_port(self.number)),
        }
    }

    /// The addresses that the backend may see. The client's own is kept whenever the node that translates has
    /// the backend or the client; otherwise it must be that node's, so that the reply comes back.
    fn sources(&self) -> Vec<IpAddr> {
        let client = match self.client {
            Client::Pod(pod, _) => vec![pod.addrs.of(self.family)],
            Client::Node(node) => node.own_addrs(self.family),
            Client::Outside(_, addr) => vec![addr],
        };
        let home = match self.client {
            Client::Pod(_, node) | Client::Node(node) => Some(node),
            Client::Outside(..) => None,
        };
        let translator = match self.frontend {
            Frontend::ClusterIp(node) => node.or(home),
            Frontend::NodePort(node) => Some(node),
        };
        match translator {
            Some(node) if is(node, self.backend_node) || home.is_some_and(|home| is(home, node)) => client,
            Some(node) => vec![node.addrs.of(self.family)],
            None => client,
        }
    }

    fn describe(&self) -> String {
        let frontend = match self.frontend {
            Frontend::ClusterIp(None) => "ClusterIP".to_owned(),
            Frontend::ClusterIp(Some(node)) => format!("ClusterIP by way of {}", node.name),
            Frontend::NodePort(node) => format!("NodePort of {}", node.name),
        };
        let Self { protocol, family, backend, .. } = self;
        let (client, server) = (self.caller().name(), backend.name());
        format!("{client} -> {frontend}, {protocol}, {family:?}, backend {server}")
    }
}

fn is(a: &Node, b: &Node) -> bool {
    a.name == b.name
}
