//! Settings of `fairlead run`: the same names on the command line and in the `--config` file.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser as _};
use clap::{Args, ValueEnum};
use ipnet::IpNet;
use lb_common::tables::Admission;
use lb_common::tunnel::DEFAULT_PORT;
use serde::Deserialize;

use crate::agent::{Config, SourceOptions};
use crate::datapath::{self, DEFAULT_BPFFS, Idle, Sizes, SweepMode, TcMode, Timeouts};
use crate::edges::{self, Rules};
use crate::entries;
use crate::kept;
use crate::nodeports::{BadNetwork, NodePortAddresses};
use crate::source::convert::parse_network;
use crate::source::kubernetes;

/// Default port of `--healthz-bind-address`, as kube-proxy's.
const HEALTHZ_PORT: u16 = 10256;
/// Default port of `--metrics-bind-address`, as kube-proxy's.
const METRICS_PORT: u16 = 10249;

/// Default of `--map-check-period`, as kube-proxy's `--iptables-sync-period`.
const MAP_CHECK_PERIOD: Duration = Duration::from_secs(30);

/// Settings as they are given, on the command line or in a file; what is not given is `None`.
#[derive(Args, Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Settings {
    /// Which Node this is [default: the host name]
    #[arg(long, alias = "hostname-override", env = "NODE_NAME", value_name = "NAME")]
    #[serde(alias = "hostname-override")]
    node_name: Option<String>,

    /// How to reach the API server [default: as a pod does]
    #[arg(long, env = "KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,

    /// URL of the API server, whatever the kubeconfig says
    #[arg(long, value_name = "URL")]
    master: Option<String>,

    /// No API server: read Services, EndpointSlices, Pods, Nodes and ServiceCIDRs from the YAML and JSON files of this
    /// directory, and follow their changes
    #[arg(long, value_name = "DIR", conflicts_with = "master")]
    manifests: Option<PathBuf>,

    /// Devices that clients outside of the node come through [default: those that carry node addresses]
    #[arg(long, value_name = "GLOB", value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_many")]
    device: Option<Vec<String>>,

    /// Devices that pods hang on [default: veth*,cali*,lxc*,eni*,azv*,gke*,nic* and the ports of cni0 and cbr0]
    #[arg(long, value_name = "GLOB", value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_many")]
    pod_device: Option<Vec<String>>,

    /// How packets from outside are met: auto takes XDP where the driver has it, else tc [default: auto]
    #[arg(long, value_name = "MODE")]
    xdp: Option<Xdp>,

    /// Whose sockets are translated when they connect: those of processes on the node, of pods too, or nobody's
    /// [default: host]
    #[arg(long, value_name = "WHOSE")]
    socket_lb: Option<SocketLb>,

    /// How Services choose a backend that do not say it themselves (annotation fairlead.io/algorithm)
    /// [default: maglev]
    #[arg(long, value_name = "NAME")]
    algorithm: Option<Algorithm>,

    /// How clients outside reach endpoints on other nodes: `snat` through the node that they ask, both ways; with `dsr` the
    /// endpoint's node answers them itself and keeps their address; `hybrid` is `dsr` for TCP, `snat` for the rest. The
    /// annotation fairlead.io/mode of a Service goes before it [default: snat]
    #[arg(long, value_name = "MODE")]
    mode: Option<Mode>,

    /// UDP port at which nodes take packets of each other (Geneve). To name it also lets Services choose `dsr` themselves where
    /// --mode is snat [default: 6081 with --mode=dsr and --mode=hybrid]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    tunnel_port: Option<u16>,

    /// Node addresses that NodePorts answer on: networks, or `primary` for those that the Node object names
    /// first [default: all]
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_many")]
    nodeport_addresses: Option<Vec<String>>,

    /// Further node addresses that outside clients' connections may bear on their way to endpoints on other nodes, beside
    /// the first of the device: those in these networks. Each is good for 16,384 connections to one endpoint
    /// [default: none]
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_many")]
    source_addresses: Option<Vec<String>>,

    /// Networks that pods have their addresses in, here and on other nodes: they are inside of the cluster
    /// wherever their packets come from
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_many")]
    cluster_cidr: Option<Vec<String>>,

    /// What tells a pod beside its device: --cluster-cidr, the podCIDRs of this Node, or devices more than
    /// --pod-device names [default: ClusterCIDR]
    #[arg(long, value_name = "MODE")]
    detect_local_mode: Option<DetectLocalMode>,

    /// BridgeInterface: the bridge that pods are on
    #[arg(long, value_name = "NAME")]
    pod_bridge_interface: Option<String>,

    /// InterfaceNamePrefix: how the names of devices begin that pods hang on
    #[arg(long, value_name = "PREFIX")]
    pod_interface_name_prefix: Option<String>,

    /// Another Service proxy is being replaced: its connections are left to the stack, which knows their translations,
    /// until they end [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    takeover: Option<bool>,

    /// Another Service proxy takes over: connections go on, new ones are left to it [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    drain: Option<bool>,

    /// Backends see this node in place of all clients; only policy Local keeps them [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    masquerade_all: Option<bool>,

    /// Where /healthz, /livez and /readyz answer; empty: nowhere [default: 0.0.0.0:10256]
    #[arg(long, value_name = "ADDRESS")]
    healthz_bind_address: Option<Bind<HEALTHZ_PORT>>,

    /// Where /metrics answers; empty: nowhere [default: 127.0.0.1:10249]
    #[arg(long, value_name = "ADDRESS")]
    metrics_bind_address: Option<Bind<METRICS_PORT>>,

    /// Where the socket programs attach [default: the cgroup2 mount]
    #[arg(long, value_name = "DIR")]
    cgroup_root: Option<PathBuf>,

    /// Where maps and programs are pinned; each agent on a machine has its own
    /// [default: /sys/fs/bpf/fairlead]
    #[arg(long, value_name = "DIR")]
    bpffs: Option<PathBuf>,

    /// Where is kept what the API server says, for a start without it; empty: nowhere
    /// [default: /var/lib/fairlead/ and the path of --bpffs, with - for /]
    #[arg(long, value_name = "FILE", value_parser = OsStringValueParser::new().map(PathBuf::from))]
    state_file: Option<PathBuf>,

    /// Entries of flows per family, of which a flow has two [default: 524288, or what is pinned]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_flows: Option<u32>,

    /// Frontends per family [default: 65536, or what is pinned]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_services: Option<u32>,

    /// Backends per family [default: 262144, or what is pinned]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    max_backends: Option<u32>,

    /// After how long without a packet a TCP connection is over, as in 24h0m0s; 0: the default [default: 24h]
    #[arg(long, value_name = "TIME")]
    conntrack_tcp_timeout_established: Option<Time>,

    /// After how long without a packet a TCP connection is over that one end has closed; 0: the default
    /// [default: 1h]
    #[arg(long, value_name = "TIME")]
    conntrack_tcp_timeout_close_wait: Option<Time>,

    /// After how long without a packet a UDP flow is over that was not answered; 0: the default [default: 30s]
    #[arg(long, value_name = "TIME")]
    conntrack_udp_timeout: Option<Time>,

    /// After how long without a packet a UDP flow is over that was; 0: the default [default: 2m]
    #[arg(long, value_name = "TIME")]
    conntrack_udp_timeout_stream: Option<Time>,

    /// What becomes of TCP connections to a backend that is no endpoint any more: they go on, as with kube-proxy,
    /// or the client's next packet is answered with a RST [default: keep]
    #[arg(long, value_name = "WHAT")]
    tcp_to_removed_backend: Option<RemovedBackend>,
    /// How often all maps are compared with what they should hold, and mended; 0: never [default: 30s]
    #[arg(long, value_name = "TIME")]
    map_check_period: Option<Time>,

    /// What is logged: a level, or levels per module as in `info,fairlead::reconcile=debug` [default: info]
    #[arg(long, env = "RUST_LOG", value_name = "FILTER")]
    log_level: Option<String>,

    /// How the log is written: for people, or a JSON object a line [default: human]
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<LogFormat>,

    /// What the programs in the kernel log; anything but off costs speed [default: off]
    #[arg(long, value_name = "LEVEL")]
    datapath_log_level: Option<DatapathLogLevel>,
}

/// `--xdp`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Xdp {
    Auto,
    Native,
    Generic,
    Off,
}

/// `--socket-lb`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum SocketLb {
    Host,
    All,
    Off,
}

impl From<SocketLb> for datapath::SocketLb {
    fn from(whose: SocketLb) -> Self {
        match whose {
            SocketLb::Host => Self::Host,
            SocketLb::All => Self::All,
            SocketLb::Off => Self::Off,
        }
    }
}

/// `--algorithm`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Algorithm {
    Random,
    Maglev,
}

/// `--mode`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    Snat,
    Dsr,
    Hybrid,
}

/// `--detect-local-mode`, with kube-proxy's values.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
enum DetectLocalMode {
    #[default]
    #[value(name = "ClusterCIDR")]
    #[serde(rename = "ClusterCIDR")]
    ClusterCidr,
    #[value(name = "NodeCIDR")]
    #[serde(rename = "NodeCIDR")]
    NodeCidr,
    #[value(name = "BridgeInterface")]
    BridgeInterface,
    #[value(name = "InterfaceNamePrefix")]
    InterfaceNamePrefix,
}

/// `--tcp-to-removed-backend`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RemovedBackend {
    Keep,
    Reset,
}

/// A time as Go writes it: `24h0m0s`, `1.5h`, `300ms`, `0`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(try_from = "String")]
struct Time(Duration);

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "0" {
            return Ok(Self::default());
        }
        let time = text.parse::<jiff::SignedDuration>().ok().and_then(|time| Duration::try_from(time).ok());
        time.map(Self).ok_or_else(|| format!("{text:?} is not a time like 24h0m0s"))
    }
}

impl TryFrom<String> for Time {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// `--log-format`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    #[default]
    Human,
    Json,
}

/// `--datapath-log-level`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum DatapathLogLevel {
    #[default]
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// `--healthz-bind-address` and `--metrics-bind-address`: an address, an address and a port, or nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "String")]
struct Bind<const PORT: u16>(Option<SocketAddr>);

impl<const PORT: u16> FromStr for Bind<PORT> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self(None));
        }
        if let Ok(addr) = text.parse::<IpAddr>() {
            return Ok(Self(Some(SocketAddr::new(addr, PORT))));
        }
        let addr = text.parse().map_err(|_| format!("{text:?} is not an address like 0.0.0.0:{PORT}"))?;
        Ok(Self(Some(addr)))
    }
}

impl<const PORT: u16> TryFrom<String> for Bind<PORT> {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Settings that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--config {path}: {source}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("--config {path}: {source}", path = path.display())]
    Parse { path: PathBuf, source: serde_yaml_ng::Error },
    #[error("the host name cannot be read ({0}); use --node-name")]
    HostName(io::Error),
    #[error(transparent)]
    Network(#[from] BadNetwork),
    #[error("--{flag}: {text:?} is not a network like 10.244.0.0/16")]
    Networks { flag: &'static str, text: String },
    #[error("--detect-local-mode={mode} and --{name} need each other")]
    LocalMode { mode: &'static str, name: &'static str },
    #[error("--device or --pod-device: {0}")]
    Glob(#[from] globset::Error),
    #[error("--manifests and --master exclude each other")]
    TwoSources,
    #[error("--takeover and --drain exclude each other")]
    TakeoverAndDrain,
    #[error(
        "--masquerade-all and --socket-lb=all exclude each other: a pod's socket that is translated keeps its address"
    )]
    MasqueradedSockets,
    #[error(
        "--masquerade-all excludes --tunnel-port, --mode=dsr and --mode=hybrid: who answers a client itself cannot hide it from the \
         backend"
    )]
    MasqueradedTunnels,
    #[error("--tunnel-port: 0 is no port")]
    TunnelPort,
}

macro_rules! or {
    ($first:ident, $second:ident, $($field:ident),* $(,)?) => {
        Settings { $($field: $first.$field.or($second.$field)),* }
    };
}

impl Settings {
    /// Reads a `--config` file.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text =
            fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
            return Ok(Self::default());
        }
        serde_yaml_ng::from_str(&text).map_err(|source| Error::Parse { path: path.to_owned(), source })
    }

    /// These settings, and `other`'s where these say nothing.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        or!(
            self,
            other,
            node_name,
            kubeconfig,
            master,
            manifests,
            device,
            pod_device,
            xdp,
            socket_lb,
            algorithm,
            mode,
            tunnel_port,
            nodeport_addresses,
            source_addresses,
            cluster_cidr,
            detect_local_mode,
            pod_bridge_interface,
            pod_interface_name_prefix,
            takeover,
            drain,
            masquerade_all,
            healthz_bind_address,
            metrics_bind_address,
            cgroup_root,
            bpffs,
            state_file,
            max_flows,
            max_services,
            max_backends,
            conntrack_tcp_timeout_established,
            conntrack_tcp_timeout_close_wait,
            conntrack_udp_timeout,
            conntrack_udp_timeout_stream,
            tcp_to_removed_backend,
            map_check_period,
            log_level,
            log_format,
            datapath_log_level,
        )
    }

    pub fn log_format(&self) -> LogFormat {
        self.log_format.unwrap_or_default()
    }

    pub fn log_level(&self) -> &str {
        self.log_level.as_deref().filter(|level| !level.is_empty()).unwrap_or("info")
    }

    /// `--takeover` and `--drain`.
    fn admission(&self) -> Result<Admission, Error> {
        match (self.takeover.unwrap_or_default(), self.drain.unwrap_or_default()) {
            (true, true) => Err(Error::TakeoverAndDrain),
            (true, false) => Ok(Admission::Opening),
            (false, true) => Ok(Admission::None),
            (false, false) => Ok(Admission::All),
        }
    }

    /// Programs of what is switched off.
    fn idle(&self) -> Idle {
        Idle { xdp: self.xdp == Some(Xdp::Off), tc: false, sockets: self.socket_lb == Some(SocketLb::Off) }
    }

    /// What the agent needs of them, with every default filled in.
    pub fn config(self) -> Result<Config, Error> {
        let (admission, idle) = (self.admission()?, self.idle());
        let node_name = match self.node_name.map(|name| name.trim().to_lowercase()) {
            Some(name) if !name.is_empty() => name,
            _ => host_name().map_err(Error::HostName)?,
        };
        if self.manifests.is_some() && self.master.is_some() {
            return Err(Error::TwoSources);
        }
        let masquerade_all = self.masquerade_all.unwrap_or(false);
        if masquerade_all && self.socket_lb == Some(SocketLb::All) {
            return Err(Error::MasqueradedSockets);
        }
        let (mode, tunnel_port) = tunnels(self.mode, self.tunnel_port, masquerade_all)?;
        let bpffs = self.bpffs.unwrap_or_else(|| DEFAULT_BPFFS.into());
        let state_file = self.state_file.unwrap_or_else(|| kept::default_path(&bpffs));
        let source = match self.manifests {
            Some(path) => SourceOptions::Manifests(path),
            None => SourceOptions::Kubernetes(kubernetes::Options {
                kubeconfig: self.kubeconfig.filter(|path| !path.as_os_str().is_empty()),
                master: self.master.filter(|url| !url.is_empty()),
                node_name: node_name.clone(),
                all_nodes: mode.is_some(),
            }),
        };
        let detection = self.detect_local_mode.unwrap_or_default();
        let bridge = named(
            detection == DetectLocalMode::BridgeInterface,
            self.pod_bridge_interface,
            ("BridgeInterface", "pod-bridge-interface"),
        )?;
        let prefix = named(
            detection == DetectLocalMode::InterfaceNamePrefix,
            self.pod_interface_name_prefix,
            ("InterfaceNamePrefix", "pod-interface-name-prefix"),
        )?;
        let mut rules = Rules::new(&self.device.unwrap_or_default(), &self.pod_device.unwrap_or_default())?;
        if let Some(name) = bridge {
            rules = rules.with_pod_bridge(name);
        }
        if let Some(prefix) = prefix {
            rules = rules.with_pod_prefix(prefix);
        }
        let cluster_networks = networks("cluster-cidr", self.cluster_cidr)?;
        let any = SocketAddr::from(([0, 0, 0, 0], HEALTHZ_PORT));
        let loopback = SocketAddr::from(([127, 0, 0, 1], METRICS_PORT));
        Ok(Config {
            node_name,
            source,
            datapath: datapath::Options {
                bpffs,
                sizes: Sizes {
                    flows: self.max_flows,
                    services: self.max_services,
                    backends: self.max_backends,
                },
                socket_lb: self.socket_lb.map(datapath::SocketLb::from).unwrap_or_default(),
                masquerade_all,
                tc: TcMode::from_env(),
                sweep: SweepMode::from_env(),
                admission,
                timeouts: Timeouts {
                    tcp_established: time(self.conntrack_tcp_timeout_established),
                    tcp_close_wait: time(self.conntrack_tcp_timeout_close_wait),
                    udp: time(self.conntrack_udp_timeout),
                    udp_stream: time(self.conntrack_udp_timeout_stream),
                },
                resets_removed: self.tcp_to_removed_backend == Some(RemovedBackend::Reset),
                tunnel_port,
                idle,
                log_level: self.datapath_log_level.unwrap_or_default() as u8,
                layout: datapath::Layout::from_env(),
            },
            cgroup_root: self.cgroup_root,
            rules,
            xdp: match self.xdp {
                Some(Xdp::Auto) | None => edges::XdpMode::Auto,
                Some(Xdp::Native) => edges::XdpMode::Native,
                Some(Xdp::Generic) => edges::XdpMode::Generic,
                Some(Xdp::Off) => edges::XdpMode::Off,
            },
            algorithm: match self.algorithm {
                Some(Algorithm::Maglev) | None => entries::Algorithm::Maglev,
                Some(Algorithm::Random) => entries::Algorithm::Random,
            },
            mode,
            source_networks: networks("source-addresses", self.source_addresses)?,
            nodeport_addresses: NodePortAddresses::parse(&self.nodeport_addresses.unwrap_or_default())?,
            pod_networks: match detection {
                DetectLocalMode::ClusterCidr => Some(cluster_networks),
                DetectLocalMode::NodeCidr => None,
                DetectLocalMode::BridgeInterface | DetectLocalMode::InterfaceNamePrefix => Some(vec![]),
            },
            map_check_period: self.map_check_period.map_or(MAP_CHECK_PERIOD, |Time(period)| period),
            healthz: self.healthz_bind_address.map_or(Some(any), |Bind(addr)| addr),
            metrics: self.metrics_bind_address.map_or(Some(loopback), |Bind(addr)| addr),
            state_file: Some(state_file).filter(|path| !path.as_os_str().is_empty()),
        })
    }
}

/// Zero: the default.
fn time(given: Option<Time>) -> Duration {
    given.unwrap_or_default().0
}

/// The name that a `--detect-local-mode` asks for, which is of no use in another; empty is as good as none.
fn named(
    asked: bool,
    value: Option<String>,
    (mode, name): (&'static str, &'static str),
) -> Result<Option<String>, Error> {
    let value = value.filter(|text| !text.is_empty());
    if asked == value.is_some() { Ok(value) } else { Err(Error::LocalMode { mode, name }) }
}

/// The mode of Services that do not choose one, if there are tunnels, and the port of these; 0: there are none.
fn tunnels(
    mode: Option<Mode>,
    port: Option<u16>,
    masquerade_all: bool,
) -> Result<(Option<entries::Mode>, u16), Error> {
    let mode = match mode {
        Some(Mode::Snat) | None => entries::Mode::Snat,
        Some(Mode::Dsr) => entries::Mode::Dsr,
        Some(Mode::Hybrid) => entries::Mode::Hybrid,
    };
    let by_mode = (mode != entries::Mode::Snat).then_some(DEFAULT_PORT);
    match port.or(by_mode) {
        Some(0) => Err(Error::TunnelPort),
        Some(_) if masquerade_all => Err(Error::MasqueradedTunnels),
        Some(port) => Ok((Some(mode), port)),
        None => Ok((None, 0)),
    }
}

/// Values of `--cluster-cidr`; empty ones as kube-proxy's configurations have them.
fn networks(flag: &'static str, values: Option<Vec<String>>) -> Result<Vec<IpNet>, Error> {
    let values = values.unwrap_or_default().into_iter().filter(|text| !text.trim().is_empty());
    values.map(|text| parse_network(&text).ok_or(Error::Networks { flag, text })).collect()
}

/// As the kubelet names its Node.
/// Name of this node, if nobody gives it another.
pub fn host_name() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/hostname")?.trim().to_lowercase())
}

/// `device: eth0`, `device: eth0,eth1` and `device: [eth0, eth1]` are all fine.
fn one_or_many<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<String>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }
    Ok(Option::deserialize(deserializer)?.map(|given| match given {
        OneOrMany::One(text) => text.split(',').map(|part| part.trim().to_owned()).collect(),
        OneOrMany::Many(texts) => texts,
    }))
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use lb_common::flow::State;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        settings: Settings,
    }

    fn line(args: &[&str]) -> Settings {
        Line::try_parse_from(["fairlead"].iter().chain(args)).unwrap().settings
    }

    fn yaml(text: &str) -> Result<Settings, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        Settings::read(file.path()).map_err(|error| error.to_string())
    }

    /// Every setting, on the command line and in a file.
    #[test]
    fn file_and_command_line_have_the_same_names() {
        let all = line(&[
            "--node-name=a",
            "--kubeconfig=/k",
            "--master=http://m",
            "--device=eth0,eth1",
            "--pod-device=veth*",
            "--xdp=native",
            "--socket-lb=all",
            "--algorithm=random",
            "--nodeport-addresses=192.0.2.0/24,fd00::/8",
            "--source-addresses=192.0.2.128/25",
            "--cluster-cidr=10.244.0.0/16,fd00:10:244::/56",
            "--detect-local-mode=NodeCIDR",
            "--pod-bridge-interface=br0",
            "--pod-interface-name-prefix=tap",
            "--takeover",
            "--drain=false",
            "--masquerade-all",
            "--healthz-bind-address=127.0.0.1:1",
            "--metrics-bind-address=127.0.0.1:2",
            "--cgroup-root=/c",
            "--bpffs=/b",
            "--state-file=/s",
            "--max-flows=1",
            "--max-services=2",
            "--max-backends=3",
            "--conntrack-tcp-timeout-established=24h0m0s",
            "--conntrack-tcp-timeout-close-wait=1h",
            "--conntrack-udp-timeout=30s",
            "--conntrack-udp-timeout-stream=0",
            "--tcp-to-removed-backend=reset",
            "--map-check-period=1m30s",
            "--log-level=debug",
            "--log-format=json",
            "--datapath-log-level=info",
        ]);
        let text = "node-name: a\nkubeconfig: /k\nmaster: http://m\ndevice: eth0,eth1\npod-device: [\"veth*\"]\n\
                    xdp: native\nsocket-lb: all\nalgorithm: random\n\
                    nodeport-addresses: [192.0.2.0/24, \"fd00::/8\"]\nsource-addresses: 192.0.2.128/25\n\
                    cluster-cidr: \"10.244.0.0/16,fd00:10:244::/56\"\ndetect-local-mode: NodeCIDR\n\
                    pod-bridge-interface: br0\npod-interface-name-prefix: tap\nmasquerade-all: true\ntakeover: true\ndrain: false\nhealthz-bind-address: 127.0.0.1:1\n\
                    metrics-bind-address: 127.0.0.1:2\n\
                    cgroup-root: /c\nbpffs: /b\nstate-file: /s\nmax-flows: 1\nmax-services: 2\nmax-backends: 3\n\
                    map-check-period: 1m30s\n\
                    conntrack-tcp-timeout-established: 24h0m0s\nconntrack-tcp-timeout-close-wait: 1h0m0s\n\
                    conntrack-udp-timeout: 30s\nconntrack-udp-timeout-stream: \"0\"\n\
                    tcp-to-removed-backend: reset\n\
                    log-level: debug\nlog-format: json\ndatapath-log-level: info\n";
        assert_eq!(yaml(text).unwrap(), all);
        let settings = line(&["--manifests=/m", "--hostname-override=b"]);
        assert_eq!(yaml("manifests: /m\nhostname-override: b").unwrap(), settings);
    }

    #[test]
    fn the_command_line_goes_before_the_file() {
        let merged = line(&["--xdp=off", "--node-name=x"]).or(yaml("xdp: native\nbpffs: /b").unwrap());
        assert_eq!(merged, line(&["--xdp=off", "--bpffs=/b", "--node-name=x"]));
    }

    #[test]
    fn what_is_unknown_is_refused() {
        let error = yaml("max-flow: 1").unwrap_err();
        assert!(error.contains("unknown field `max-flow`"), "{error}");
        let error = yaml("xdp: fast").unwrap_err();
        assert!(error.contains("unknown variant `fast`"), "{error}");
        assert!(yaml("healthz-bind-address: nowhere").is_err());
        assert_eq!(yaml("").unwrap(), Settings::default());
        assert_eq!(yaml("# nothing\n\n").unwrap(), Settings::default());
        for args in [
            &["--max-flow=1"][..],
            &["--max-flows=0"],
            &["--xdp=fast"],
            &["--manifests=/m", "--master=http://m"],
            &["--healthz-bind-address=nowhere"],
            &["--conntrack-udp-timeout=30"],
            &["--conntrack-udp-timeout=-30s"],
            &["--tcp-to-removed-backend=drop"],
            &["--map-check-period=30"],
            &["--map-check-period="],
        ] {
            assert!(Line::try_parse_from(["fairlead"].iter().chain(args)).is_err(), "{args:?}");
        }
    }

    #[test]
    fn addresses_to_bind() {
        let bind = |text: &str| text.parse::<Bind<HEALTHZ_PORT>>().unwrap().0.map(|addr| addr.to_string());
        assert_eq!(bind(""), None);
        assert_eq!(bind("0.0.0.0").as_deref(), Some("0.0.0.0:10256"));
        assert_eq!(bind("::").as_deref(), Some("[::]:10256"));
        assert_eq!(bind("[::1]:80").as_deref(), Some("[::1]:80"));
    }

    #[test]
    fn tunnels_are_there_if_a_mode_or_a_port_asks_for_them() {
        let tunnels = |args: &[&str]| {
            let config = line(args).config().unwrap();
            (config.mode, config.datapath.tunnel_port)
        };
        assert_eq!(tunnels(&[]), (None, 0));
        assert_eq!(tunnels(&["--mode=snat"]), (None, 0));
        assert_eq!(tunnels(&["--mode=dsr"]), (Some(entries::Mode::Dsr), 6081));
        assert_eq!(tunnels(&["--mode=hybrid", "--tunnel-port=7000"]), (Some(entries::Mode::Hybrid), 7000));
        assert_eq!(tunnels(&["--tunnel-port=7000"]), (Some(entries::Mode::Snat), 7000));
        for both in [["--masquerade-all", "--mode=dsr"], ["--masquerade-all", "--tunnel-port=6081"]] {
            assert!(matches!(line(&both).config(), Err(Error::MasqueradedTunnels)));
        }
        assert!(line(&["--masquerade-all", "--mode=snat"]).config().is_ok());
        let none = Settings { tunnel_port: Some(0), ..line(&[]) };
        assert!(matches!(none.config(), Err(Error::TunnelPort)));
    }

    /// As kube-proxy's flags take them, and its configurations are written.
    #[test]
    fn times() {
        let seconds = |text: &str| text.parse::<Time>().map(|time| time.0.as_secs_f64());
        for (text, expected) in [
            ("24h0m0s", 86400.0),
            ("1h", 3600.0),
            ("2m0s", 120.0),
            ("1h30m", 5400.0),
            ("1.5h", 5400.0),
            ("1m1.5s", 61.5),
            ("250ms", 0.25),
            ("0s", 0.0),
            ("0", 0.0),
        ] {
            assert_eq!(seconds(text), Ok(expected), "{text}");
        }
        for text in ["", "30", "-1s", "1x", "s"] {
            assert!(seconds(text).is_err(), "{text}");
        }
        let config = |args: &[&str]| line(args).config().unwrap().datapath;
        let all = config(&[
            "--conntrack-tcp-timeout-established=1s",
            "--conntrack-tcp-timeout-close-wait=2s",
            "--conntrack-udp-timeout=3s",
            "--conntrack-udp-timeout-stream=4s",
        ]);
        let states = [State::Established, State::HalfClosed, State::Unanswered, State::Answered];
        assert_eq!(states.map(|state| all.timeouts.of(state) / 1_000_000_000), [1, 2, 3, 4]);
        let zero = config(&["--conntrack-udp-timeout=0s"]);
        assert_eq!(states.map(|state| zero.timeouts.of(state) / 1_000_000_000), [86400, 3600, 30, 120]);
        assert!(config(&["--tcp-to-removed-backend=reset"]).resets_removed);
        assert!(!config(&["--tcp-to-removed-backend=keep"]).resets_removed);
        let period = |args: &[&str]| line(args).config().unwrap().map_check_period.as_secs();
        assert_eq!((period(&[]), period(&["--map-check-period=1m30s"])), (30, 90));
        assert_eq!(period(&["--map-check-period=0"]), 0);
    }

    #[test]
    fn local_modes() {
        let networks = |args: &[&str]| line(args).config().map(|config| config.pod_networks);
        let cidr = "--cluster-cidr=10.244.0.0/16";
        let cluster = Some(vec!["10.244.0.0/16".parse().unwrap()]);
        assert_eq!(networks(&[cidr, "--detect-local-mode=ClusterCIDR"]).unwrap(), cluster);
        assert_eq!(networks(&[cidr, "--detect-local-mode=NodeCIDR"]).unwrap(), None);
        for (mode, name) in [
            ("--detect-local-mode=BridgeInterface", "--pod-bridge-interface"),
            ("--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix"),
        ] {
            assert_eq!(networks(&[cidr, mode, &format!("{name}=x")]).unwrap(), Some(vec![]));
            for args in [&[mode][..], &[mode, &format!("{name}=")], &[&format!("{name}=x")]] {
                let error = networks(args).unwrap_err().to_string();
                assert_eq!(error, format!("{mode} and {name} need each other"));
            }
        }
    }

    #[test]
    fn masquerading_is_for_packets() {
        let given = |args: &[&str]| line(args).config().map(|config| config.datapath.masquerade_all);
        assert!(!given(&[]).unwrap() && !given(&["--masquerade-all=false"]).unwrap());
        for whose in ["host", "off"] {
            assert!(given(&["--masquerade-all", &format!("--socket-lb={whose}")]).unwrap());
        }
        let error = given(&["--masquerade-all=true", "--socket-lb=all"]).unwrap_err().to_string();
        assert!(error.starts_with("--masquerade-all and --socket-lb=all exclude each other"), "{error}");
        assert!(!given(&["--masquerade-all=false", "--socket-lb=all"]).unwrap());
    }

    #[test]
    fn defaults() {
        let config = line(&["--node-name= Node-A "]).config().unwrap();
        assert_eq!(config.node_name, "node-a");
        assert_eq!(config.healthz.unwrap().to_string(), "0.0.0.0:10256");
        assert_eq!(config.metrics.unwrap().to_string(), "127.0.0.1:10249");
        assert_eq!(line(&["--metrics-bind-address="]).config().unwrap().metrics, None);
        let metrics = line(&["--metrics-bind-address=::"]).config().unwrap().metrics;
        assert_eq!(metrics.unwrap().to_string(), "[::]:10249");
        assert_eq!(config.datapath, datapath::Options::default());
        let idle = line(&["--xdp=off", "--socket-lb=off"]).config().unwrap().datapath.idle;
        assert_eq!(idle, Idle { xdp: true, tc: false, sockets: true });
        let state_file = |args: &[&str]| line(args).config().unwrap().state_file;
        assert_eq!(config.state_file.unwrap(), Path::new("/var/lib/fairlead/sys-fs-bpf-fairlead.state"));
        assert_eq!(state_file(&["--bpffs=/b/c"]).unwrap(), Path::new("/var/lib/fairlead/b-c.state"));
        assert_eq!(state_file(&["--state-file=/s"]).unwrap(), Path::new("/s"));
        assert_eq!(state_file(&["--state-file="]), None);
        assert_eq!(config.algorithm, entries::Algorithm::Maglev);
        assert_eq!(config.nodeport_addresses, NodePortAddresses::All);
        let error = line(&["--nodeport-addresses=x"]).config().unwrap_err().to_string();
        assert!(error.starts_with("--nodeport-addresses: "), "{error}");
        let config = line(&["--cluster-cidr=10.244.7.0/16,fd00::/8"]).config().unwrap();
        let networks: Vec<String> = config.pod_networks.unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(networks, ["10.244.0.0/16", "fd00::/8"]);
        assert_eq!(line(&["--cluster-cidr="]).config().unwrap().pod_networks, Some(vec![]));
        let error = line(&["--cluster-cidr=10.244.0.0"]).config().unwrap_err().to_string();
        assert_eq!(error, "--cluster-cidr: \"10.244.0.0\" is not a network like 10.244.0.0/16");
        let error = line(&["--device=a[b"]).config().unwrap_err().to_string();
        assert!(error.starts_with("--device or --pod-device: "), "{error}");
    }
}
