//! A node without a kernel: the agent's operations go to the host's tables one by one, and packets and sockets meet
//! them there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use fairlead::agent::Agent;
use fairlead::compile::Facts;
use fairlead::datapath::fake::FakeMaps;
use fairlead::datapath::{ApplyError, MapError, Maps, Position};
use fairlead::edges::LocalAddress;
use fairlead::entries::{Algorithm, Family, FrontendKey, Limits, Op, Protocol, Snapshot, Table};
use fairlead::health::Health;
use fairlead::model;
use fairlead::nodeports::{self, NodePortAddresses};
use fairlead::source::{Event, Kind};
use ipnet::IpNet;
use lb_common::abi::{
    AddressInfo, Backend, MemberKey, Network, PrefixKey, ServiceKey, Side, Source as SourceEntry,
    address_flags, edge_flags,
};
use lb_common::host::{HostPacket, HostRoute, HostTables};
use lb_common::pipeline::process;
use lb_common::reason::Action;
use lb_common::socket::{self, Peer, Socket};
use lb_common::testing::{TestFamily, read, tcp, udp};
use lb_common::wire::tcp_flags;
use lb_common::{Reason, V4, V6};

use super::cluster::{self, Cluster, NODE, News, Places, ip, pod_networks};
use super::reference::{Ask, Client, Source};

const NIC: u32 = 2;
/// What the node's pods hang on.
const BRIDGE: u32 = 3;
const LIMITS: Limits =
    Limits { services: 500, backends: 500, slots: 50_000, addresses: 500, sources: 500, members: 5000 };

/// What became of one packet or socket.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Seen {
    Untouched,
    Translated(SocketAddr, Source),
    Rejected,
    Dropped,
}

/// The node, its agent and its tables.
pub struct HostNode {
    agent: Agent<Recorder>,
    v4: HostTables<V4>,
    v6: HostTables<V6>,
    now: Instant,
}

/// Maps that remember what was written to them.
struct Recorder {
    maps: FakeMaps,
    ops: Vec<Op>,
}

impl Maps for Recorder {
    fn limits(&self) -> Limits {
        self.maps.limits()
    }

    fn read(&mut self) -> Result<Snapshot, MapError> {
        self.maps.read()
    }

    fn differing(&mut self, writes: Vec<Op>) -> Result<Vec<Op>, MapError> {
        self.maps.differing(writes)
    }

    fn entries(
        &mut self,
        table: Table,
        from: Option<Position>,
        count: usize,
    ) -> Result<(Vec<Op>, Option<Position>), MapError> {
        self.maps.entries(table, from, count)
    }

    fn apply(&mut self, ops: &[Op]) -> Result<(), ApplyError> {
        self.ops.extend_from_slice(ops);
        self.maps.apply(ops)
    }
}

impl HostNode {
    /// A node that has taken over a cluster.
    pub fn new(cluster: &Cluster) -> Self {
        let mut node = Self {
            agent: agent(FakeMaps::new(LIMITS)),
            v4: tables::<V4>(&cluster::V4, cluster.settings.masquerade_all),
            v6: tables::<V6>(&cluster::V6, cluster.settings.masquerade_all),
            now: Instant::now(),
        };
        node.introduce(cluster);
        node.settle(|_, _| ());
        node
    }

    /// The agent hears of a change; its operations are carried out one by one, and after each somebody looks.
    pub fn take(&mut self, news: News, cluster: &Cluster, look: impl FnMut(&mut Self, &Op)) {
        match news {
            News::Object(change) => {
                if self.agent.take(Event::Changed(change), self.now) {
                    self.agent.set_addresses(flags(cluster));
                }
            }
            News::Addresses => self.agent.set_addresses(flags(cluster)),
            News::Pause => self.now += Duration::from_secs(2),
            News::Restart => {
                self.agent = agent(self.agent.maps().maps.clone());
                self.introduce(cluster);
            }
        }
        self.settle(look);
    }

    /// What the maps hold.
    pub fn snapshot(&mut self) -> Snapshot {
        self.agent.maps().maps.snapshot()
    }

    fn introduce(&mut self, cluster: &Cluster) {
        let events = cluster.everything().into_iter().map(Event::Changed);
        let listed = Kind::ALL.into_iter().chain([Kind::ServiceCidrs]).map(Event::Listed);
        for event in events.chain(listed) {
            self.agent.take(event, self.now);
        }
        self.agent.set_addresses(flags(cluster));
        if cluster.settings.cluster_cidr {
            self.agent.set_pod_networks(Some(pod_networks()));
        }
    }

    fn settle(&mut self, mut look: impl FnMut(&mut Self, &Op)) {
        self.agent.settle(self.now);
        assert_eq!(self.agent.stats().read, 1, "the maps refused an operation");
        for op in std::mem::take(&mut self.agent.maps().ops) {
            apply(&mut self.v4, &op);
            apply(&mut self.v6, &op);
            look(self, &op);
        }
    }

    /// One new packet or socket; `chance` decides where chance does.
    pub fn ask(&self, ask: &Ask, chance: u32) -> Result<Seen, Reason> {
        match Family::of(ask.to.ip()) {
            Family::V4 => meet(&self.v4, &cluster::V4, ask, chance),
            Family::V6 => meet(&self.v6, &cluster::V6, ask, chance),
        }
    }

    /// Nobody remembers any connection or client.
    pub fn forget(&self) {
        forget(&self.v4);
        forget(&self.v6);
    }

    /// The same, but clients are remembered.
    pub fn forget_flows(&self) {
        forget_flows(&self.v4);
        forget_flows(&self.v6);
    }

    /// Lets time pass for clients.
    pub fn pass(&self, seconds: u64) {
        for now in [&self.v4.now, &self.v6.now] {
            now.set(now.get() + seconds * 1_000_000_000);
        }
    }
}

fn agent(maps: FakeMaps) -> Agent<Recorder> {
    let facts = Facts { node_name: NODE.into(), zone: None, algorithm: Algorithm::Random, mode: None };
    Agent::new(facts, Recorder { maps, ops: vec![] }, Health::new(false)).expect("empty maps")
}

fn tables<F: TestFamily>(places: &Places, masquerades_all: bool) -> HostTables<F> {
    let mut tables = HostTables { masquerades_all, ..HostTables::default() };
    tables.edges.insert(NIC, F::edge(ip(places.node[0]), 0));
    if masquerades_all {
        tables.edges.insert(BRIDGE, F::edge(ip(places.node[0]), edge_flags::POD));
    }
    tables
}

fn flags(cluster: &Cluster) -> BTreeMap<IpAddr, u32> {
    let local =
        |addr: &IpAddr| LocalAddress { addr: *addr, device: "eth0".into(), loopback: false, global: true };
    let addresses: Vec<LocalAddress> = cluster.addresses.iter().map(local).collect();
    let allowed = match &cluster.settings.nodeport_addresses {
        cluster::NodePortAddresses::All => NodePortAddresses::All,
        cluster::NodePortAddresses::Primary => NodePortAddresses::Primary,
        cluster::NodePortAddresses::In(networks) => NodePortAddresses::In(networks.clone()),
    };
    let node = cluster
        .node
        .as_ref()
        .map(|node| model::Node { addresses: node.addresses.clone(), ..model::Node::named(NODE) });
    nodeports::flags(&addresses, &allowed, node.as_ref())
}

/// Carries out an operation, if it is of this family.
fn apply<F: TestFamily>(tables: &mut HostTables<F>, op: &Op) {
    let ours = |addr: IpAddr| addr.is_ipv4() == ip(F::NODE).is_ipv4();
    let key = |key: &FrontendKey| ServiceKey {
        addr: F::wire(key.addr),
        port: key.port,
        proto: key.protocol.number(),
        pad: 0,
    };
    match op {
        Op::SetBackend { id, entry, .. } if ours(entry.addr.ip()) => {
            let entry = Backend {
                addr: F::wire(entry.addr.ip()),
                port: entry.addr.port(),
                state: entry.state,
                flags: entry.flags,
                generation: entry.generation,
            };
            tables.backends.insert(*id, entry);
        }
        Op::WriteSlots { base, slots } | Op::MendSlots { base, slots } => {
            tables.slots.extend((*base..).zip(slots.iter().copied()));
        }
        Op::SetFrontend { key: at, entry } if ours(at.addr) => {
            tables.services.insert(key(at), *entry);
        }
        Op::RemoveFrontend { key: at } if ours(at.addr) => {
            tables.services.remove(&key(at));
        }
        Op::AddMember { window, backend } => {
            tables.members.insert(MemberKey { window: *window, backend: *backend });
        }
        Op::RemoveMember { window, backend } => {
            tables.members.remove(&MemberKey { window: *window, backend: *backend });
        }
        Op::SetNetwork { family, index, network } if ours(family.unspecified()) => {
            let index = *index as usize;
            tables.networks.resize(tables.networks.len().max(index + 1), Network::default());
            tables.networks[index] = network.map_or_else(Network::default, |(net, flags)| Network {
                addr: F::wire(net.network()),
                mask: F::wire(net.netmask()),
                flags,
            });
        }
        Op::SetSource { service, net } if ours(net.addr()) => {
            tables.sources.push(source::<F>(*service, *net));
        }
        Op::RemoveSource { service, net } if ours(net.addr()) => {
            let gone = source::<F>(*service, *net);
            tables.sources.retain(|source| *source != gone);
        }
        Op::SetAddress { addr, flags } if ours(*addr) => {
            tables.addresses.insert(F::wire(*addr), AddressInfo { flags: *flags });
        }
        Op::RemoveAddress { addr } if ours(*addr) => {
            tables.addresses.remove(&F::wire(*addr));
        }
        _ => {}
    }
}

fn source<F: TestFamily>(service: u32, net: IpNet) -> PrefixKey<SourceEntry<F::Addr>> {
    let data = SourceEntry { service, addr: F::wire(net.network()) };
    PrefixKey { prefix_len: 32 + u32::from(net.prefix_len()), data }
}

fn forget_flows<F: TestFamily>(tables: &HostTables<F>) {
    tables.flows.borrow_mut().clear();
    tables.pending.borrow_mut().clear();
    tables.sockets.borrow_mut().clear();
}

fn forget<F: TestFamily>(tables: &HostTables<F>) {
    forget_flows(tables);
    tables.affinity.borrow_mut().clear();
}

fn meet<F: TestFamily>(
    tables: &HostTables<F>,
    places: &Places,
    ask: &Ask,
    chance: u32,
) -> Result<Seen, Reason> {
    tables.random.set(chance);
    let port = 40_000 + u16::try_from(chance % 20_000).expect("a small number");
    match ask.client {
        Client::Process => connect(tables, ask, chance),
        Client::Pod(addr) => send(tables, places, Side::PodIn, SocketAddr::new(addr, port), ask),
        Client::Wire(addr) => send(tables, places, Side::NicIn, SocketAddr::new(addr, port), ask),
    }
}

fn connect<F: TestFamily>(tables: &HostTables<F>, ask: &Ask, chance: u32) -> Result<Seen, Reason> {
    let socket = Socket { cookie: chance.into(), proto: ask.protocol.number(), owner: 0 };
    let peer = Peer::<F> { addr: F::wire(ask.to.ip()), port: ask.to.port() };
    match socket::connect::<F, _>(tables, socket, peer) {
        Ok(peer) => {
            let mapped = Ipv6Addr::from(F::to_mapped(&peer.addr).octets);
            let addr = IpAddr::from(mapped).to_canonical();
            Ok(Seen::Translated(SocketAddr::new(addr, peer.port), Source::Client))
        }
        Err(reason) => refused(reason),
    }
}

fn send<F: TestFamily>(
    tables: &HostTables<F>,
    places: &Places,
    side: Side,
    from: SocketAddr,
    ask: &Ask,
) -> Result<Seen, Reason> {
    let is_udp = ask.protocol == Protocol::Udp;
    let bytes = if is_udp { udp(from, ask.to, b"?") } else { tcp(from, ask.to, tcp_flags::SYN) };
    let mut packet = HostPacket::new(&bytes, NIC).with_route(HostRoute::Out { ifindex: NIC, mtu: 1500 });
    for own in places.node {
        packet = packet.with_local::<F>(&F::wire(ip(own)));
    }
    for pod in places.pods_here {
        packet = packet.with_device::<F>(&F::wire(ip(pod)), BRIDGE);
    }
    let (_, reason) = process(&mut packet, tables, side);
    match reason {
        Reason::Translated | Reason::Forwarded | Reason::Hairpinned => {
            let (source, backend) = read(&packet.bytes()).expect("a sound packet").ends();
            let source = match source.ip() {
                addr if addr == from.ip() => Source::Client,
                // The node's address may be what was asked for; only a pod's own packets come from there.
                addr if reason == Reason::Hairpinned && addr == ask.to.ip() => Source::Frontend,
                addr if addr == ip(places.node[0]) => Source::Node,
                addr => panic!("{ask:?}: the source became {addr}"),
            };
            Ok(Seen::Translated(backend, source))
        }
        reason => {
            if reason.action() == Action::Pass {
                assert_eq!(packet.bytes(), bytes, "{ask:?}: {reason:?}");
            }
            refused(reason)
        }
    }
}

fn refused(reason: Reason) -> Result<Seen, Reason> {
    match (reason, reason.action()) {
        (Reason::BrokenWindow, _) => Err(reason),
        (_, Action::Pass) => Ok(Seen::Untouched),
        (_, Action::Reject) => Ok(Seen::Rejected),
        (_, Action::Drop) => Ok(Seen::Dropped),
        _ => Err(reason),
    }
}

/// What the maps mean, whatever ids and windows they use for it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Meaning {
    /// By address, port and protocol.
    frontends: BTreeMap<FrontendKey, Meant>,
    addresses: BTreeMap<IpAddr, u32>,
    networks: BTreeSet<(IpNet, u32)>,
    /// Frontends of the same Service, and of the same port of it.
    together: BTreeSet<BTreeSet<FrontendKey>>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Meant {
    flags: u16,
    kind: u8,
    affinity: u32,
    /// Address and flags of the backends, internal and external, and how many slots they have.
    windows: [(BTreeSet<(SocketAddr, u8)>, u32); 2],
    /// Those of them that clients may keep.
    members: [BTreeSet<SocketAddr>; 2],
    sources: BTreeSet<IpNet>,
}

impl Meaning {
    pub fn of(maps: &Snapshot) -> Self {
        let mut frontends = BTreeMap::new();
        let mut services: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        let mut ports: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for (key, entry) in &maps.frontends {
            let family = Family::of(key.addr);
            let backend = |id: &u32| &maps.backends[&(family, *id)];
            let windows = [entry.internal, entry.external];
            let meant = Meant {
                flags: entry.flags,
                kind: entry.kind,
                affinity: entry.affinity,
                windows: windows.map(|window| {
                    let ids = maps.slots.get(&window.base).filter(|_| window.len > 0).into_iter().flatten();
                    (ids.map(|id| (backend(id).addr, backend(id).flags)).collect(), window.len)
                }),
                members: windows.map(|window| {
                    let ids = maps.members.get(&window.base).filter(|_| entry.affinity > 0 && window.len > 0);
                    ids.into_iter().flatten().map(|id| backend(id).addr).collect()
                }),
                sources: maps.sources.get(&entry.id).cloned().unwrap_or_default(),
            };
            let flag = match key.protocol {
                Protocol::Tcp => address_flags::BACKEND_TCP,
                Protocol::Udp => address_flags::BACKEND_UDP,
                Protocol::Sctp => address_flags::BACKEND_SCTP,
            };
            for (addr, _) in meant.windows.iter().flat_map(|(backends, _)| backends) {
                let flags = maps.addresses.get(&addr.ip()).copied().unwrap_or_default();
                assert!(flags & flag != 0, "{addr} is a backend of {key}, and not known as one");
            }
            frontends.insert(*key, meant);
            services.entry(entry.id).or_default().insert(*key);
            ports.entry(entry.port).or_default().insert(*key);
        }
        // Those of backends that drain are known still; how long depends on the past.
        let addresses = maps.addresses.iter().map(|(addr, flags)| (*addr, flags & !address_flags::BACKEND));
        let addresses = addresses.filter(|(_, flags)| *flags != 0).collect();
        Self {
            frontends,
            addresses,
            networks: maps.networks.iter().flatten().copied().collect(),
            together: services.into_values().chain(ports.into_values()).collect(),
        }
    }

    /// Only the node's own addresses, and networks, are left.
    pub fn is_empty(&self) -> bool {
        let own = address_flags::SERVICE | address_flags::FRONTEND;
        self.frontends.is_empty() && self.addresses.values().all(|flags| flags & own == 0)
    }
}
