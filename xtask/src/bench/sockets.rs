//! Group `sockets`: what applications see. Each way of reaching a Service has a lab of its own, with the same pods, and
//! all of them take turns.

use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use super::kube_proxy;
use super::results::Series;
use super::rules;
use super::server::{self, Running};
use super::{Programs, Scale};
use crate::lab::cgroup::Cgroup;
use crate::lab::netns::Netns;
use crate::lab::{AgentOptions, Cluster, Endpoint, Family, Lab, Node, Pod, Port, Protocol, Service, Xdp};
use crate::process;

const PORT: u16 = 80;
const TARGET_PORT: u16 = 8080;

const fn cluster_cidr(family: Family) -> &'static str {
    match family {
        Family::V4 => "10.244.0.0/16",
        Family::V6 => "fd00:10:244::/48",
    }
}

/// Who brings packets to a Service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Proxy {
    /// Nobody: clients ask the pod itself.
    Direct,
    /// Fairlead, with so many Services.
    Tc(u16),
    SocketLb(u16),
    /// Fairlead, where a backend's node answers clients outside itself (`--mode dsr`).
    Dsr,
    /// Rules of kube-proxy's shape, for so many Services.
    Iptables(u16),
    Nftables(u16),
    /// kube-proxy itself, with those that are asked.
    Peer,
}

/// What is measured of each.
const MODES: [&str; 4] = ["connect", "request", "stream", "datagram"];
/// A stream where nothing is left to devices.
const WITHOUT_OFFLOADS: &str = "stream-no-offloads";

/// From where to where.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    SameNode,
    OtherNode,
    Outside,
    /// From outside by a node that does not have the backend.
    OutsideOtherNode,
}

/// Services that are asked.
const ASKED: u16 = 2;

impl Proxy {
    fn name(self) -> String {
        match self {
            Self::Direct => "direct".to_owned(),
            Self::Tc(ASKED) => "tc".to_owned(),
            Self::Tc(services) => format!("tc-{services}"),
            Self::SocketLb(ASKED) => "socket-lb".to_owned(),
            Self::SocketLb(services) => format!("socket-lb-{services}"),
            Self::Dsr => "tc-dsr".to_owned(),
            Self::Iptables(services) => format!("iptables-{services}"),
            Self::Nftables(services) => format!("nftables-{services}"),
            Self::Peer => "kube-proxy".to_owned(),
        }
    }

    /// How many Services Fairlead has that nobody asks.
    const fn unasked(self) -> u16 {
        match self {
            Self::Tc(count) | Self::SocketLb(count) => count - ASKED,
            _ => 0,
        }
    }

    /// Whether it has its own way of bringing packets there.
    fn is_for(self, way: Way) -> bool {
        match self {
            // Sockets of outside machines are nobody's to translate.
            Self::SocketLb(_) => !way.is_from_outside(),
            Self::Dsr => way == Way::OutsideOtherNode,
            _ => true,
        }
    }
}

impl Way {
    const ALL: [Self; 4] = [Self::SameNode, Self::OtherNode, Self::Outside, Self::OutsideOtherNode];

    const fn name(self) -> &'static str {
        match self {
            Self::SameNode => "same node",
            Self::OtherNode => "other node",
            Self::Outside => "outside",
            Self::OutsideOtherNode => "outside, other node",
        }
    }

    const fn is_from_outside(self) -> bool {
        matches!(self, Self::Outside | Self::OutsideOtherNode)
    }

    const fn is_to_other_node(self) -> bool {
        matches!(self, Self::OtherNode | Self::OutsideOtherNode)
    }

    /// The number of the Service.
    const fn service(self) -> u16 {
        if self.is_to_other_node() { 2 } else { 1 }
    }
}

/// The group; with kube-proxy itself beside the others, if there is one.
pub fn run(scale: Scale, programs: &Programs) -> Result<Vec<Series>> {
    let kube_proxy = programs.kube_proxy.as_deref();
    let many = match scale {
        Scale::Full | Scale::Quick => 10_000,
        Scale::Smoke => 10,
    };
    let proxies = [
        Proxy::Direct,
        Proxy::Tc(ASKED),
        Proxy::Tc(many),
        Proxy::SocketLb(ASKED),
        Proxy::SocketLb(many),
        Proxy::Dsr,
        Proxy::Nftables(1),
        Proxy::Nftables(many),
        Proxy::Iptables(1),
        Proxy::Iptables(many),
    ];
    let peer = kube_proxy.map(|_| Proxy::Peer);
    measure("sockets", &proxies.into_iter().chain(peer).collect::<Vec<_>>(), scale, programs, kube_proxy)
}

/// kube-proxy itself beside Fairlead, for group `compare`.
pub fn beside(scale: Scale, programs: &Programs, kube_proxy: &Path) -> Result<Vec<Series>> {
    let proxies = [Proxy::Direct, Proxy::Tc(ASKED), Proxy::SocketLb(ASKED), Proxy::Peer];
    measure("compare", &proxies, scale, programs, Some(kube_proxy))
}

fn measure(
    group: &str,
    proxies: &[Proxy],
    scale: Scale,
    programs: &Programs,
    kube_proxy: Option<&Path>,
) -> Result<Vec<Series>> {
    let (rounds, millis) = match scale {
        Scale::Full => (15, 250),
        Scale::Quick => (5, 50),
        Scale::Smoke => (2, 20),
    };
    // The one that may not start comes first.
    let site = |proxy: &Proxy| Site::new(*proxy, programs, kube_proxy);
    let (peers, others): (Vec<_>, Vec<_>) = proxies.iter().partition(|proxy| **proxy == Proxy::Peer);
    let peers = peers.into_iter().map(site).collect::<Result<Vec<_>>>()?;
    let mut sites = others.into_iter().map(site).collect::<Result<Vec<_>>>()?;
    sites.extend(peers);
    let mut all: Vec<Series> = Vec::new();
    let situations = Way::ALL.into_iter().flat_map(|way| Family::ALL.map(|family| (way, family)));
    for round in 0..=rounds {
        for (way, family) in situations.clone() {
            for mode in MODES.into_iter().chain((way == Way::SameNode).then_some(WITHOUT_OFFLOADS)) {
                for site in &mut sites {
                    if !site.proxy.is_for(way) {
                        continue;
                    }
                    let sample = site.measure(way, family, mode, millis)?;
                    // In the first round neighbours are looked up, and caches filled.
                    if round > 0 {
                        note(&mut all, (group, site.proxy, way, family, mode), sample);
                    }
                }
            }
        }
    }
    Ok(all)
}

fn note(all: &mut Vec<Series>, situation: (&str, Proxy, Way, Family, &str), sample: f64) {
    let (group, proxy, way, family, mode) = situation;
    let family = if family == Family::V4 { "IPv4" } else { "IPv6" };
    let new = Series {
        group: group.to_owned(),
        what: mode.to_owned(),
        variant: proxy.name(),
        unit: if mode.starts_with("stream") { "Mbit/s" } else { "1/s" }.to_owned(),
        axes: [("way", way.name()), ("family", family)]
            .map(|(axis, value)| (axis.to_owned(), value.to_owned()))
            .into(),
        samples: Vec::new(),
    };
    let known = all.iter().position(|series| series.variant == new.variant && series.is_beside(&new));
    let index = known.unwrap_or_else(|| {
        all.push(new);
        all.len() - 1
    });
    if let Some(series) = all.get_mut(index) {
        series.samples.push(sample);
    }
}

/// A lab whose Services are reached in one way.
struct Site {
    proxy: Proxy,
    bench: PathBuf,
    // Servers end first, then what they live in.
    servers: Vec<Running>,
    client: Pod,
    here: Pod,
    there: Pod,
    cluster: Cluster,
}

impl Site {
    fn new(proxy: Proxy, programs: &Programs, kube_proxy: Option<&Path>) -> Result<Self> {
        let lab = Lab::new(&programs.xtask)?;
        let socket_lb = if matches!(proxy, Proxy::SocketLb(_)) { "all" } else { "host" };
        let mode = if proxy == Proxy::Dsr { "dsr" } else { "snat" };
        let args = ["--socket-lb", socket_lb, "--mode", mode, "--max-flows", "262144"];
        let args = args.map(str::to_owned).to_vec();
        let options = AgentOptions { xdp: Xdp::Off, args, ..AgentOptions::default() };
        let cluster = Cluster::new(lab, &programs.agent, options)?;
        let lab = &cluster.lab;
        let client = lab.add_pod(&lab.node_a, "client")?;
        let here = lab.add_pod(&lab.node_a, "here")?;
        let there = lab.add_pod(&lab.node_b, "there")?;
        lab.route_through(&lab.node_a, &["10.244.1.0/24", "fd00:10:244:1::/64"])?;
        lab.route_through(&lab.node_b, &["10.244.2.0/24", "fd00:10:244:2::/64"])?;
        let mut servers = Vec::new();
        for (node, pod) in [(&lab.node_a, &here), (&lab.node_b, &there)] {
            for family in Family::ALL {
                let mut command = Command::new(&programs.bench);
                command.args(["serve", &pod.at(family, TARGET_PORT).to_string()]);
                servers.push(server::start(&mut command, &pod.ns, &node.cgroup)?);
            }
        }
        match proxy {
            Proxy::Direct => {}
            Proxy::Tc(_) | Proxy::SocketLb(_) | Proxy::Dsr => {
                apply(&cluster, &here, &there)?;
                let others: Vec<_> =
                    (0..proxy.unasked()).flat_map(|number| other(number, &there).documents()).collect();
                let list = json!({ "apiVersion": "v1", "kind": "List", "items": others });
                fs::write(cluster.manifests.dir().join("others.json"), list.to_string())
                    .context("cannot write a manifest")?;
                cluster.start()?;
            }
            Proxy::Iptables(count) => {
                for (family, restore) in
                    Family::ALL.into_iter().zip(["iptables-restore", "ip6tables-restore"])
                {
                    let services = services(family, count, &here, &there)?;
                    let rules = rules::iptables(&services, cluster_cidr(family));
                    feed(&lab.node_a, Command::new(restore).arg("--noflush"), &rules)?;
                }
            }
            Proxy::Nftables(count) => {
                for family in Family::ALL {
                    let services = services(family, count, &here, &there)?;
                    let node = lab.node_a.addrs.of(family);
                    let rules = rules::nftables(&services, cluster_cidr(family), node);
                    feed(&lab.node_a, Command::new("nft").args(["-f", "-"]), &rules)?;
                }
            }
            Proxy::Peer => {
                apply(&cluster, &here, &there)?;
                let path = kube_proxy.context("no kube-proxy was given")?;
                let asked = Way::ALL.map(|way| cluster_ip(Family::V4, way.service()));
                let cidrs = Family::ALL.map(cluster_cidr).join(",");
                servers.extend(kube_proxy::start(path, programs, &cluster, &cidrs, &asked)?);
            }
        }
        Ok(Self { proxy, bench: programs.bench.clone(), servers, client, here, there, cluster })
    }

    /// How much was done in so many milliseconds, for a second.
    fn measure(&mut self, way: Way, family: Family, mode: &str, millis: u32) -> Result<f64> {
        if let Some(server) = self.servers.iter_mut().find_map(|server| server.has_ended().transpose()) {
            bail!("a server has ended: {}", server?);
        }
        let lab = &self.cluster.lab;
        let pod = if way.is_to_other_node() { &self.there } else { &self.here };
        let target = match (self.proxy, way) {
            (Proxy::Direct, _) => pod.at(family, TARGET_PORT),
            (_, Way::Outside | Way::OutsideOtherNode) => lab.node_a.at(family, node_port(way.service())),
            _ => SocketAddr::new(cluster_ip(family, way.service()), PORT),
        };
        let ns = if way.is_from_outside() { &lab.outside.ns } else { &self.client.ns };
        let offloads = mode != WITHOUT_OFFLOADS;
        if !offloads {
            self.offload(false)?;
        }
        let mode = if offloads { mode } else { "stream" };
        let mut command = Command::new(&self.bench);
        command.args(["load", mode, &target.to_string(), &millis.to_string()]);
        let done = load(&mut command, ns, &lab.node_a.cgroup)
            .with_context(|| format!("{mode} to {target} by {}, {}", self.proxy.name(), way.name()));
        if !offloads {
            self.offload(true)?;
        }
        done
    }

    /// Whether the devices of both pods on this node are given large packets and open checksums.
    fn offload(&self, on: bool) -> Result<()> {
        let state = if on { "on" } else { "off" };
        [&self.client, &self.here].into_iter().try_for_each(|pod| {
            pod.ns.run(|| {
                let args = ["-K", "eth0", "tx", state, "tso", state, "gso", state, "gro", state];
                process::output(Command::new("ethtool").args(args)).map(drop)
            })?
        })
    }
}

fn cluster_ip(family: Family, number: u16) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 0, 0).to_bits() + u32::from(number)).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number).into(),
    }
}

const fn node_port(number: u16) -> u16 {
    30_000 + number
}

/// The Services that are asked, for agents and kube-proxy.
fn apply(cluster: &Cluster, here: &Pod, there: &Pod) -> Result<()> {
    for (way, pod) in [(Way::SameNode, here), (Way::OtherNode, there)] {
        let number = way.service();
        let mut service = new_service(number);
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            service.ports.push(Port::new(protocol, PORT, TARGET_PORT).node_port(node_port(number)));
        }
        cluster.manifests.apply(&service.endpoint(Endpoint::from(pod)))?;
    }
    Ok(())
}

fn new_service(number: u16) -> Service {
    Service::new(&format!("service-{number}"), &Family::ALL.map(|family| cluster_ip(family, number)))
}

/// The number of a Service that nobody asks.
const fn unasked(number: u16) -> u16 {
    number + 10
}

/// A Service that nobody asks.
fn other(number: u16, pod: &Pod) -> Service {
    let ports = [Protocol::Tcp, Protocol::Udp].map(|protocol| Port::new(protocol, PORT, TARGET_PORT));
    let service = ports.into_iter().fold(new_service(unasked(number)), Service::port);
    service.endpoint(Endpoint::from(pod))
}

/// Services for rules: those that are asked come last, and one at least for each way.
fn services(family: Family, count: u16, here: &Pod, there: &Pod) -> Result<Vec<rules::Service>> {
    let last = |way: Way, pod: &Pod| rules::Service {
        cluster_ip: cluster_ip(family, way.service()),
        port: PORT,
        node_port: Some(node_port(way.service())),
        endpoint: pod.at(family, TARGET_PORT),
    };
    let asked = [last(Way::SameNode, here), last(Way::OtherNode, there)];
    let others = count.saturating_sub(u16::try_from(asked.len())?);
    let mut services: Vec<_> = (0..others)
        .map(|number| rules::Service {
            cluster_ip: cluster_ip(family, unasked(number)),
            port: PORT,
            node_port: None,
            endpoint: there.at(family, TARGET_PORT),
        })
        .collect();
    services.extend(asked);
    Ok(services)
}

/// Runs a command on a node with this on its standard input.
fn feed(node: &Node, command: &mut Command, input: &str) -> Result<()> {
    let mut child = node.ns.spawn(command.stdin(Stdio::piped()).stderr(Stdio::piped()))?;
    child.stdin.take().context("no pipe")?.write_all(input.as_bytes()).context("cannot write rules")?;
    let output = child.wait_with_output().context("cannot wait for it")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed: {}", process::show(command), said.lines().take(5).collect::<Vec<_>>().join("; "));
    }
    Ok(())
}

/// Runs a client: told to begin once it is in the node's cgroup, where its sockets are seen.
fn load(command: &mut Command, ns: &Netns, cgroup: &Cgroup) -> Result<f64> {
    let child = ns.spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    cgroup.adopt(child.id())?;
    let mut child = child;
    child.stdin.take().context("no pipe")?.write_all(b"\n").context("it has ended")?;
    let output = child.wait_with_output().context("cannot wait for it")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8_lossy(&output.stdout).trim().parse().context("it prints a number")
}
