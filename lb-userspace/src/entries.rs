//! The plain types between the two halves of the agent: what `compile` makes of a Service, and what
//! `reconcile` asks of the datapath. No Kubernetes type and no BPF map appears on either side of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use lb_common::abi;
use serde::{Deserialize, Serialize};

use crate::owner::Owner;

/// IP protocol of a frontend.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// IP protocol number (IANA).
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// The protocol with this IP protocol number, if it is one that Services can have.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// IP family of an entry: it decides which of the `…4` and `…6` maps holds it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    /// The family of an address.
    pub const fn of(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// The unspecified address: in a [`FrontendKey`] it stands for "any address of this node".
    pub const fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Self::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        }
    }
}

/// Kind of a frontend.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum FrontendKind {
    ClusterIP,
    NodePort,
    LoadBalancer,
    ExternalIP,
    HostPort,
}

impl FrontendKind {
    /// The number in the maps ([`abi::frontend_kind`]).
    pub const fn number(self) -> u8 {
        match self {
            Self::ClusterIP => abi::frontend_kind::CLUSTER_IP,
            Self::NodePort => abi::frontend_kind::NODE_PORT,
            Self::LoadBalancer => abi::frontend_kind::LOAD_BALANCER,
            Self::ExternalIP => abi::frontend_kind::EXTERNAL_IP,
            Self::HostPort => abi::frontend_kind::HOST_PORT,
        }
    }

    /// The kind with this number in the maps.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            abi::frontend_kind::CLUSTER_IP => Some(Self::ClusterIP),
            abi::frontend_kind::NODE_PORT => Some(Self::NodePort),
            abi::frontend_kind::LOAD_BALANCER => Some(Self::LoadBalancer),
            abi::frontend_kind::EXTERNAL_IP => Some(Self::ExternalIP),
            abi::frontend_kind::HOST_PORT => Some(Self::HostPort),
            _ => None,
        }
    }
}

impl fmt::Display for FrontendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::ClusterIP => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
            Self::ExternalIP => "ExternalIP",
            Self::HostPort => "HostPort",
        })
    }
}

/// What a client addresses. The unspecified address stands for every address that NodePorts, or host ports, answer on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrontendKey {
    pub addr: IpAddr,
    pub port: u16,
    pub protocol: Protocol,
}

impl fmt::Display for FrontendKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.addr.is_unspecified() {
            let family = if self.addr.is_ipv4() { "IPv4" } else { "IPv6" };
            write!(f, "any {family} node address:{}/{}", self.port, self.protocol)
        } else {
            write!(f, "{}/{}", SocketAddr::new(self.addr, self.port), self.protocol)
        }
    }
}

/// An endpoint as the datapath knows it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Backend {
    pub addr: SocketAddr,
    pub protocol: Protocol,
    /// It runs on this node.
    pub local: bool,
}

/// What becomes of the flows of a backend that no frontend chooses (any more).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Keep {
    /// It does not serve: TCP and SCTP connections may end on their own, UDP moves to another backend.
    Connections,
    /// It serves: every flow it has goes on.
    Flows,
}

/// What happens to a client when there is nothing to choose from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum WhenEmpty {
    /// TCP RST, ICMP port unreachable, `ECONNREFUSED`.
    Reject,
    /// Silence: endpoints exist, but the policy is Local and none is here.
    Drop,
}

/// The backends one scope of a frontend may choose from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// Sorted, without duplicates; targets of one Service often share it.
    pub backends: Arc<[Backend]>,
    pub when_empty: WhenEmpty,
}

/// Where a backend is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Place {
    /// Its id.
    pub backend: u32,
    /// Address of its node; none: this one.
    pub node: Option<IpAddr>,
}

/// How clients from outside reach backends on other nodes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Mode {
    /// Through the node that they ask, both ways: it puts its own address in place of theirs.
    Snat,
    /// The backend's node answers them itself.
    Dsr,
    /// TCP as with [`Self::Dsr`], the rest as with [`Self::Snat`].
    Hybrid,
}

impl Mode {
    /// Whether backends' nodes answer themselves.
    pub const fn is_dsr(self, protocol: Protocol) -> bool {
        match self {
            Self::Snat => false,
            Self::Dsr => true,
            Self::Hybrid => matches!(protocol, Protocol::Tcp),
        }
    }
}

/// How a backend is chosen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Algorithm {
    Random,
    Maglev,
}

/// One frontend of a Service on this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frontend {
    pub kind: FrontendKind,
    pub algorithm: Algorithm,
    /// Only the sources of its Service may ask ([`Compiled::sources`]).
    pub restricted: bool,
    /// Its backends see their clients also under `--masquerade-all`.
    pub source_kept: bool,
    /// Nodes of its backends answer clients from outside themselves.
    pub dsr: bool,
    /// The number of the Service's port: frontends of one port share what is known of a client.
    pub port: u16,
    /// How many seconds a client is remembered that opens no connection; 0: it is not.
    pub affinity: u32,
    /// For pods and processes of the node.
    pub internal: Target,
    /// For everybody else.
    pub external: Target,
}

/// Name of a Service. Many places keep it; they share it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct ServiceName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What one Service means on this node; no frontends: nothing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Compiled {
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// Who may ask for its restricted frontends, by family.
    pub sources: BTreeMap<Family, BTreeSet<IpNet>>,
    /// Endpoints that no frontend chooses now: not ready, terminating, elsewhere. Flows they have from
    /// earlier outlive the choice.
    pub kept: BTreeMap<Backend, Keep>,
    /// Nodes of backends elsewhere that frontends with [`Frontend::dsr`] choose.
    pub homes: BTreeMap<Backend, Arc<str>>,
    /// Load balancers ask for it.
    pub health: Option<HealthCheck>,
}

/// What load balancers ask a node, to find out whether to send anything there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HealthCheck {
    /// `healthCheckNodePort`.
    pub port: u16,
    /// Ready endpoints on this node.
    pub endpoints: usize,
}

/// One write to the maps. `reconcile` orders them so that no packet meets a dangling reference.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// `BACKENDS4/6[id] = …`; `state` 0 frees the id and keeps its generation.
    SetBackend { family: Family, id: u32, entry: BackendEntry },
    /// `SLOTS[base..] = slots`.
    WriteSlots { base: u32, slots: Vec<u32> },
    /// The same for a window that frontends refer to, which somebody else has written into.
    MendSlots { base: u32, slots: Vec<u32> },
    /// `SERVICES4/6[key] = entry`: the switch, atomic for each frontend.
    SetFrontend { key: FrontendKey, entry: abi::Service },
    /// Removes `SERVICES4/6[key]`; fine if it is not there.
    RemoveFrontend { key: FrontendKey },
    /// Adds a backend to those that a window of a frontend with affinity holds.
    AddMember { window: u32, backend: u32 },
    /// Removes a backend from them; fine if it is not there.
    RemoveMember { window: u32, backend: u32 },
    /// `NETWORKS4/6[index] = …` ([`abi::network_flags`]); none: the list of the family ends here.
    SetNetwork { family: Family, index: u32, network: Option<(IpNet, u32)> },
    /// Adds a network to `SOURCES4/6`: it may ask for the restricted frontends of the Service.
    SetSource { service: u32, net: IpNet },
    /// Removes a network from `SOURCES4/6`; fine if it is not there.
    RemoveSource { service: u32, net: IpNet },
    /// `NAMES[service] = owner`: whose frontends have this number.
    SetName { service: u32, owner: Owner },
    /// Removes `NAMES[service]`; fine if it is not there.
    RemoveName { service: u32 },
    /// `ADDRESSES4/6[addr].flags = flags` ([`abi::address_flags`]).
    SetAddress { addr: IpAddr, flags: u32 },
    /// Removes `ADDRESSES4/6[addr]`; fine if it is not there.
    RemoveAddress { addr: IpAddr },
    /// `PLACES4/6[key] = place`: where a backend is.
    SetPlace { key: FrontendKey, place: Place },
    /// Removes `PLACES4/6[key]`; fine if it is not there.
    RemovePlace { key: FrontendKey },
}

impl Op {
    /// Names of all maps that operations write.
    pub const MAPS: [&str; 15] = [
        "ADDRESSES4",
        "ADDRESSES6",
        "BACKENDS4",
        "BACKENDS6",
        "MEMBERS",
        "NAMES",
        "NETWORKS4",
        "NETWORKS6",
        "PLACES4",
        "PLACES6",
        "SERVICES4",
        "SERVICES6",
        "SLOTS",
        "SOURCES4",
        "SOURCES6",
    ];

    /// Name of the map it writes.
    pub fn map(&self) -> &'static str {
        let of = |is_v4: bool, maps: [&'static str; 2]| maps[usize::from(!is_v4)];
        match self {
            Self::SetBackend { family, .. } => of(*family == Family::V4, ["BACKENDS4", "BACKENDS6"]),
            Self::WriteSlots { .. } | Self::MendSlots { .. } => "SLOTS",
            Self::SetFrontend { key, .. } | Self::RemoveFrontend { key } => {
                of(key.addr.is_ipv4(), ["SERVICES4", "SERVICES6"])
            }
            Self::AddMember { .. } | Self::RemoveMember { .. } => "MEMBERS",
            Self::SetNetwork { family, .. } => of(*family == Family::V4, ["NETWORKS4", "NETWORKS6"]),
            Self::SetSource { net, .. } | Self::RemoveSource { net, .. } => {
                of(net.addr().is_ipv4(), ["SOURCES4", "SOURCES6"])
            }
            Self::SetName { .. } | Self::RemoveName { .. } => "NAMES",
            Self::SetAddress { addr, .. } | Self::RemoveAddress { addr } => {
                of(addr.is_ipv4(), ["ADDRESSES4", "ADDRESSES6"])
            }
            Self::SetPlace { key, .. } | Self::RemovePlace { key } => {
                of(key.addr.is_ipv4(), ["PLACES4", "PLACES6"])
            }
        }
    }

    /// What it is about, for people.
    pub fn subject(&self) -> String {
        match self {
            Self::SetBackend { id, entry, .. } if entry.state == abi::backend_state::UNUSED => {
                format!("backend {id}")
            }
            Self::SetBackend { id, entry, .. } => format!("backend {id} ({})", entry.addr),
            Self::WriteSlots { base, slots } | Self::MendSlots { base, slots } => {
                format!("window of {} slots at {base}", slots.len())
            }
            Self::SetFrontend { key, .. } | Self::RemoveFrontend { key } => format!("frontend {key}"),
            Self::SetNetwork { index, .. } => format!("network {index}"),
            Self::AddMember { window, backend } | Self::RemoveMember { window, backend } => {
                format!("backend {backend} of the window at {window}")
            }
            Self::SetName { service, .. } | Self::RemoveName { service } => {
                format!("name of Service {service}")
            }
            Self::SetSource { service, net } | Self::RemoveSource { service, net } => {
                format!("source range {net} of Service {service}")
            }
            Self::SetAddress { addr, .. } | Self::RemoveAddress { addr } => format!("address {addr}"),
            Self::SetPlace { key, .. } | Self::RemovePlace { key } => format!("place of {key}"),
        }
    }
}

/// What the maps hold, by what it is about; most of it is in one map for each family.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Table {
    Backends,
    Slots,
    Members,
    Sources,
    Names,
    Networks,
    Frontends,
    Addresses,
    Places,
}

/// An entry of `BACKENDS4/6`, of either family.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BackendEntry {
    pub addr: SocketAddr,
    /// [`abi::backend_state`]. Every backend of a window is `ACTIVE`; so is one that no window names but
    /// whose flows all go on. `TERMINATING`: TCP and SCTP connections go on, UDP flows move to another backend with
    /// their next packet.
    pub state: u8,
    /// [`abi::backend_flags`].
    pub flags: u8,
    pub generation: u32,
}

impl BackendEntry {
    /// What an id has that was never given out.
    pub const fn unused(family: Family) -> Self {
        let addr = SocketAddr::new(family.unspecified(), 0);
        Self { addr, state: abi::backend_state::UNUSED, flags: 0, generation: 0 }
    }
}

/// What the maps hold, read back when the agent starts.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Snapshot {
    pub frontends: BTreeMap<FrontendKey, abi::Service>,
    /// Entries that are, or once were, in use (generation not 0).
    pub backends: BTreeMap<(Family, u32), BackendEntry>,
    /// Every window that a frontend refers to, by its base.
    pub slots: BTreeMap<u32, Vec<u32>>,
    pub addresses: BTreeMap<IpAddr, u32>,
    pub places: BTreeMap<FrontendKey, Place>,
    /// Networks with their flags, in the order of the map, IPv4 and IPv6.
    pub networks: [Vec<(IpNet, u32)>; 2],
    /// Backends by the base of the window.
    pub members: BTreeMap<u32, BTreeSet<u32>>,
    /// By the number of the Service.
    pub names: BTreeMap<u32, abi::OwnerName>,
    /// By the number of the Service.
    pub sources: BTreeMap<u32, BTreeSet<IpNet>>,
}

/// How many entries the maps take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Frontends per family, and names of Services.
    pub services: u32,
    /// Backends per family; ids run from 1 to this number less 1.
    pub backends: u32,
    /// Slots for both families together; index 0 is not used.
    pub slots: u32,
    pub addresses: u32,
    /// Networks that may ask for restricted frontends, per family.
    pub sources: u32,
    /// Backends in windows of frontends with affinity, for both families together.
    pub members: u32,
}
