//! Two nodes with agents, four pods that answer, and what the tests ask of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use serde_json::json;
use xtask::lab::netns::Netns;
use xtask::lab::{
    AgentOptions, Call, Caller, Cluster, Endpoint, Family, Lab, Node, Outcome, Pod, Port, Protocol, Service,
    eventually,
};

/// Where every pod's servers listen, TCP and UDP.
pub(crate) const TARGET_PORT: u16 = 8080;
/// Where Services listen.
pub(crate) const PORT: u16 = 80;
/// A change of a manifest is followed within this time. Machines are shared and slow.
pub(crate) const SOON: Duration = Duration::from_secs(30);
/// Long enough for an answer that must not come.
pub(crate) const SILENCE: Duration = Duration::from_millis(800);
/// An answer "at once": below TCP's first retransmission (1 s).
pub(crate) const AT_ONCE: Duration = Duration::from_millis(900);

pub(crate) const XTASK: &str = env!("CARGO_BIN_EXE_xtask");

/// The agent: what `cargo xtask test` has built, or what stands beside this build.
pub(crate) fn agent() -> PathBuf {
    let path = std::env::var_os("FAIRLEAD_BIN")
        .map_or_else(|| Path::new(XTASK).with_file_name("fairlead"), PathBuf::from);
    assert!(path.exists(), "there is no agent at {}: run `cargo xtask test`", path.display());
    path
}

/// Small maps: several clusters run at the same time.
pub(crate) fn options() -> AgentOptions {
    let sizes = ["--max-flows", "65536", "--max-services", "1024", "--max-backends", "1024"];
    AgentOptions { args: sizes.map(str::to_owned).to_vec(), ..AgentOptions::default() }
}

/// The ClusterIPs of Service number `n`.
pub(crate) fn vip(n: u8) -> [IpAddr; 2] {
    [Ipv4Addr::new(10, 96, 0, n).into(), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, n.into()).into()]
}

/// `clusterIP:port` of Service number `n`.
pub(crate) fn at_vip(n: u8, family: Family, port: u16) -> SocketAddr {
    SocketAddr::new(of_family(vip(n), family), port)
}

/// The nodePort of Service number `n`.
pub(crate) fn node_port(n: u8) -> u16 {
    30000 + u16::from(n)
}

/// Where load-balancer IPs and externalIPs are, and the ClusterIPs.
const SERVICE_NETWORKS: [&str; 4] =
    ["10.96.0.0/16", "fd00:10:96::/112", "203.0.113.0/24", "2001:db8:cb00::/64"];

/// Service number `n`, with a load-balancer IP and an externalIP of each family.
pub(crate) fn balanced(n: u8, endpoints: impl IntoIterator<Item = impl Into<Endpoint>>) -> Service {
    let mut service = service(n, []);
    service.endpoints = endpoints.into_iter().map(Into::into).collect();
    service.spec = json!({ "type": "LoadBalancer", "externalIPs": external_ips(n) });
    service.ingress = lb_ips(n).iter().map(|addr| json!({ "ip": addr })).collect();
    service
}

/// The load-balancer IPs of Service number `n`.
pub(crate) fn lb_ips(n: u8) -> [IpAddr; 2] {
    announced(0, n)
}

/// The externalIPs of Service number `n`.
pub(crate) fn external_ips(n: u8) -> [IpAddr; 2] {
    announced(100, n)
}

/// Number `n` (below 100) of the addresses that routers know; a Service may have several kinds of them.
pub(crate) fn announced(kind: u8, n: u8) -> [IpAddr; 2] {
    let low = kind + n;
    [
        Ipv4Addr::new(203, 0, 113, low).into(),
        Ipv6Addr::new(0x2001, 0xdb8, 0xcb00, 0, 0, 0, 0, low.into()).into(),
    ]
}

/// That one of both addresses.
pub(crate) fn of_family([v4, v6]: [IpAddr; 2], family: Family) -> IpAddr {
    if family == Family::V4 { v4 } else { v6 }
}

/// Service number `n`: `PORT` and a nodePort to `TARGET_PORT`, TCP and UDP.
pub(crate) fn service<'a>(n: u8, endpoints: impl IntoIterator<Item = &'a Pod>) -> Service {
    let mut service = Service::new(&format!("service-{n}"), &vip(n));
    for protocol in Protocol::ALL {
        service = service.port(Port::new(protocol, PORT, TARGET_PORT).node_port(node_port(n)));
    }
    service.endpoints = endpoints.into_iter().map(Endpoint::from).collect();
    service
}

/// A Service over UDP on whose target port nobody listens.
pub(crate) fn deaf(n: u8, pod: &Pod) -> Service {
    let port = Port::new(Protocol::Udp, PORT, 9).node_port(node_port(n));
    let mut service = Service::new(&format!("service-{n}"), &vip(n)).port(port);
    service.endpoints = vec![Endpoint::from(pod)];
    service
}

/// Everything a test needs. Pods come before the cluster: they are dropped first.
pub(crate) struct World {
    /// On node-a, which routes to its pods.
    pub(crate) a1: Pod,
    pub(crate) a2: Pod,
    /// On node-b, which has its pods on a bridge.
    pub(crate) b1: Pod,
    pub(crate) b2: Pod,
    pub(crate) cluster: Cluster,
}

impl World {
    /// A world without Services and agents.
    pub(crate) fn new(options: AgentOptions) -> Result<Self> {
        let lab = Lab::new(Path::new(XTASK))?;
        let pod = |node: &Node, name: &str| -> Result<Pod> {
            let pod = lab.add_pod(node, name)?;
            for protocol in Protocol::ALL {
                pod.listen(protocol, TARGET_PORT)?;
            }
            Ok(pod)
        };
        Ok(Self {
            a1: pod(&lab.node_a, "a1")?,
            a2: pod(&lab.node_a, "a2")?,
            b1: pod(&lab.node_b, "b1")?,
            b2: pod(&lab.node_b, "b2")?,
            cluster: Cluster::new(lab, &agent(), options)?,
        })
    }

    /// A world with the agents running and these Services, made from its pods.
    pub(crate) fn with_services(
        options: AgentOptions,
        services: impl FnOnce(&Self) -> Vec<Service>,
    ) -> Result<Self> {
        let world = Self::new(options)?;
        for service in services(&world) {
            world.cluster.manifests.apply(&service)?;
        }
        world.cluster.start()?;
        Ok(world)
    }

    pub(crate) fn pods(&self) -> [&Pod; 4] {
        [&self.a1, &self.a2, &self.b1, &self.b2]
    }

    pub(crate) fn lab(&self) -> &Lab {
        &self.cluster.lab
    }

    pub(crate) fn node_a(&self) -> &Node {
        &self.cluster.lab.node_a
    }

    pub(crate) fn node_b(&self) -> &Node {
        &self.cluster.lab.node_b
    }

    /// Outside machines that know Services by way of `node`.
    pub(crate) fn route_services_through(&self, node: &Node) -> Result<()> {
        self.lab().route_through(node, &SERVICE_NETWORKS)
    }
}

/// Switches offloads of a device, in ethtool's words.
pub(crate) fn set_offloads(ns: &Netns, device: &str, features: &[&str]) -> Result<()> {
    let args = [&["-K", device], features].concat();
    let output = ns.run(|| Command::new("ethtool").args(&args).output())??;
    ensure!(output.status.success(), "ethtool {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Calls until `expected` is what comes back.
pub(crate) fn until(caller: &Caller, call: &Call, expected: impl Fn(&Outcome) -> bool) -> Result<Outcome> {
    eventually(SOON, || {
        let outcome = caller.ask(call.clone().patience(SILENCE))?;
        if !expected(&outcome) {
            bail!("{} -> {call:?}: {outcome}", caller.name());
        }
        Ok(outcome)
    })
}

/// Calls until exactly these answer: each of them, and nobody else.
pub(crate) fn until_only(caller: &Caller, call: &Call, servers: &[&str]) -> Result<()> {
    eventually(SOON, || {
        let tally = caller.ask_many(call.clone().patience(SILENCE), 24)?;
        let fine = tally.failures.is_empty() && tally.answers.keys().eq(servers);
        ensure!(fine, "{} -> {call:?}: {tally:?}, not {servers:?}", caller.name());
        Ok(())
    })
}

/// Collects what is wrong, so that one run shows more than the first.
#[derive(Default)]
pub(crate) struct Findings(Vec<String>);

impl Findings {
    /// So much is wrong that it need not be looked at any further: every call may wait for its answer in vain.
    pub(crate) fn enough(&self) -> bool {
        self.0.len() >= 8
    }

    pub(crate) fn check(&mut self, fine: bool, what: impl FnOnce() -> String) {
        if !fine {
            self.0.push(what());
        }
    }

    /// What `result` holds; an error is a finding.
    pub(crate) fn take<T>(&mut self, result: Result<T>, what: impl FnOnce() -> String) -> Option<T> {
        result.map_err(|err| self.0.push(format!("{}: {err:#}", what()))).ok()
    }

    pub(crate) fn add(&mut self, others: Self) {
        self.0.extend(others.0);
    }

    pub(crate) fn report(self) {
        assert!(self.0.is_empty(), "{} findings:\n{}", self.0.len(), self.0.join("\n"));
    }
}
