//! The pipeline's surroundings on the host: packets in a buffer, maps in hash maps.
//!
//! Tests compare the kernel programs with this, byte by byte; fuzzers and property tests run on it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use crate::abi::{
    Addr6, AddressInfo, Affinity, AffinityKey, Backend, Edge, EdgeSourceKey, Flow, FlowKey, Fragment,
    FragmentKey, Hop, Link, MemberKey, Network, OwnMac, Place, PrefixKey, RefusalKey, Routing, Sample,
    Service, ServiceKey, SocketKey, SocketPeer, Source, Usage,
};
use crate::family::Family;
use crate::flow::State;
use crate::packet::{NETWORK, Packet, Route};
use crate::reason::Reason;
use crate::service;
use crate::tables::{Admission, Event, FlowTable, Tables};
use crate::wire::Wire;

/// What the routing table of the host says about a destination.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostRoute {
    /// Out of this device, whose MTU is this.
    Out { ifindex: u32, mtu: u32 },
    /// To the node itself.
    Local,
    /// The next hop is not resolved.
    NoNextHop,
    /// Nowhere.
    None,
}

/// A packet in a buffer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostPacket {
    /// 16-bit words, so that the packet starts at an even address as the kernel's do.
    words: Vec<u16>,
    len: usize,
    ifindex: u32,
    /// The only route, if any.
    route: HostRoute,
    /// Destinations that are the node itself, whatever the route says; IPv4-mapped if IPv4.
    local: Vec<Addr6>,
    /// Destinations behind other devices than the route says; IPv4-mapped if IPv4.
    behind: Vec<(Addr6, u32)>,
    out_ifindex: u32,
    mtu: u32,
    has_hook_behind: bool,
    chosen: u32,
}

impl HostPacket {
    /// A packet with an Ethernet header that came in through a device.
    pub fn new(bytes: &[u8], ifindex: u32) -> Self {
        let mut packet = Self {
            words: Vec::new(),
            len: 0,
            ifindex,
            route: HostRoute::None,
            local: Vec::new(),
            behind: Vec::new(),
            out_ifindex: 0,
            mtu: 0,
            has_hook_behind: false,
            chosen: 0,
        };
        packet.set(bytes);
        packet
    }

    /// The same with a route for whatever it is sent to.
    #[must_use]
    pub fn with_route(mut self, route: HostRoute) -> Self {
        self.route = route;
        self
    }

    /// The same on a node with this address.
    #[must_use]
    pub fn with_local<F: Family>(mut self, addr: &F::Addr) -> Self {
        self.local.push(F::to_mapped(addr));
        self
    }

    /// The same where the route leads to this address through another device.
    #[must_use]
    pub fn with_device<F: Family>(mut self, addr: &F::Addr, ifindex: u32) -> Self {
        self.behind.push((F::to_mapped(addr), ifindex));
        self
    }

    /// The same at a hook that has another one behind it.
    #[must_use]
    pub fn with_hook_behind(mut self) -> Self {
        self.has_hook_behind = true;
        self
    }

    /// The bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        bytes.truncate(self.len);
        bytes
    }

    fn set(&mut self, bytes: &[u8]) {
        self.words = bytes
            .chunks(2)
            .map(|pair| u16::from_ne_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))
            .collect();
        self.len = bytes.len();
    }

    fn check<T>(&self, at: usize) -> Result<(), Reason> {
        // Headers stand at even offsets (see `wire`).
        let fits = at.is_multiple_of(2) && at.checked_add(size_of::<T>()).is_some_and(|end| end <= self.len);
        if fits { Ok(()) } else { Err(Reason::Truncated) }
    }
}

impl Packet for HostPacket {
    const NEEDS_XDP_TRANSMIT: bool = false;
    const KEEPS_HOP: bool = true;

    fn size(&self) -> u32 {
        u32::try_from(self.len).unwrap_or(u32::MAX)
    }

    fn ifindex(&self) -> u32 {
        self.ifindex
    }

    fn has_hook_behind(&self) -> bool {
        self.has_hook_behind
    }

    fn view<T: Wire>(&self, at: usize) -> Result<&T, Reason> {
        self.check::<T>(at)?;
        // SAFETY: inside of the buffer, which is aligned to 2 as `at` is; `Wire` types take any bytes.
        Ok(unsafe { &*self.words.as_ptr().byte_add(at).cast::<T>() })
    }

    fn view_mut<T: Wire>(&mut self, at: usize) -> Result<&mut T, Reason> {
        self.check::<T>(at)?;
        // SAFETY: as in `view`, and the buffer is ours alone.
        Ok(unsafe { &mut *self.words.as_mut_ptr().byte_add(at).cast::<T>() })
    }

    fn resize(&mut self, len: u16) -> Result<(), Reason> {
        self.set(&vec![0; usize::from(len)]);
        Ok(())
    }

    fn widen<F: Family>(&mut self, len: u16) -> Result<(), Reason> {
        let mut bytes = self.bytes();
        bytes.splice(NETWORK..NETWORK, vec![0; usize::from(len)]);
        self.set(&bytes);
        Ok(())
    }

    fn narrow(&mut self, len: u16) -> Result<(), Reason> {
        let mut bytes = self.bytes();
        bytes.drain(NETWORK..NETWORK + usize::from(len));
        self.set(&bytes);
        Ok(())
    }

    fn chosen(&self) -> u32 {
        self.chosen
    }

    fn set_chosen(&mut self, backend: u32) {
        self.chosen = backend;
    }

    fn route<F: Family>(
        &mut self,
        _from: &F::Addr,
        to: &F::Addr,
        ip_len: u32,
        added: u16,
    ) -> Result<Route, Reason> {
        if self.local.contains(&F::to_mapped(to)) {
            return Ok(Route::Local);
        }
        match self.route {
            HostRoute::Out { ifindex, mtu } => {
                let behind = self.behind.iter().find(|(addr, _)| *addr == F::to_mapped(to));
                self.out_ifindex = behind.map_or(ifindex, |(_, ifindex)| *ifindex);
                self.mtu = mtu - u32::from(added);
                if ip_len > self.mtu { Err(Reason::PacketTooBig) } else { Ok(Route::Out) }
            }
            HostRoute::Local => Ok(Route::Local),
            HostRoute::NoNextHop => Err(Reason::NoNextHop),
            HostRoute::None => Err(Reason::NoRoute),
        }
    }

    fn out_ifindex(&self) -> u32 {
        self.out_ifindex
    }

    fn link(&self) -> Link {
        Link::default()
    }

    fn set_hop(&mut self, hop: &Hop) {
        self.out_ifindex = hop.ifindex;
    }

    fn mtu(&self) -> u32 {
        self.mtu
    }
}

type FlowMap<A> = BTreeMap<FlowKey<A>, Rc<Cell<Flow<A>>>>;

/// What becomes of an entry that left its table, whoever still looks at it: the kernel gives the memory to another flow
/// at once.
fn reuse<A: Copy + Default>(entry: Option<Rc<Cell<Flow<A>>>>) {
    if let Some(entry) = entry {
        entry.set(Flow::default());
    }
}

/// The maps of one family.
#[derive(Debug)]
pub struct HostTables<F: Family> {
    pub services: BTreeMap<ServiceKey<F::Addr>, Service>,
    pub addresses: BTreeMap<F::Addr, AddressInfo>,
    /// Addresses that have their bit in the filter. `None`: all have.
    pub filter: Option<BTreeSet<F::Addr>>,
    pub sources: Vec<PrefixKey<Source<F::Addr>>>,
    pub affinity: RefCell<BTreeMap<AffinityKey<F::Addr>, Affinity>>,
    pub members: BTreeSet<MemberKey>,
    pub networks: Vec<Network<F::Addr>>,
    pub usage: RefCell<BTreeMap<u32, Usage>>,
    pub refusals: RefCell<BTreeMap<RefusalKey, u64>>,
    /// `None`: nobody wants to see any.
    pub samples: RefCell<Option<Vec<Sample>>>,
    pub slots: BTreeMap<u32, u32>,
    pub backends: BTreeMap<u32, Backend<F::Addr>>,
    pub edges: BTreeMap<u32, Edge>,
    pub edge_sources: BTreeMap<EdgeSourceKey, Edge>,
    pub places: BTreeMap<ServiceKey<F::Addr>, Place<F::Addr>>,
    /// 0: there are no tunnels.
    pub tunnel_port: u16,
    /// Packets may be sent into tunnels, too.
    pub sends_tunnelled: bool,
    pub own_macs: BTreeMap<u32, OwnMac>,
    pub sockets: RefCell<BTreeMap<SocketKey, SocketPeer>>,
    pub flows: RefCell<FlowMap<F::Addr>>,
    pub pending: RefCell<FlowMap<F::Addr>>,
    pub fragments: RefCell<BTreeMap<FragmentKey<F::Addr>, Fragment>>,
    pub admission: Admission,
    /// `--masquerade-all`.
    pub masquerades_all: bool,
    pub resets_removed: bool,
    /// Times that are not the default, ns.
    pub timeouts: BTreeMap<State, u64>,
    pub routing: Cell<Routing>,
    /// What the clock says, ns.
    pub now: Cell<u64>,
    /// What chance says.
    pub random: Cell<u32>,
}

impl<F: Family> Default for HostTables<F> {
    fn default() -> Self {
        Self {
            services: BTreeMap::new(),
            addresses: BTreeMap::new(),
            filter: None,
            sources: Vec::new(),
            affinity: RefCell::default(),
            members: BTreeSet::new(),
            networks: Vec::new(),
            usage: RefCell::default(),
            refusals: RefCell::default(),
            samples: RefCell::default(),
            slots: BTreeMap::new(),
            backends: BTreeMap::new(),
            edges: BTreeMap::new(),
            edge_sources: BTreeMap::new(),
            places: BTreeMap::new(),
            tunnel_port: 0,
            sends_tunnelled: true,
            own_macs: BTreeMap::new(),
            sockets: RefCell::default(),
            flows: RefCell::default(),
            pending: RefCell::default(),
            fragments: RefCell::default(),
            admission: Admission::default(),
            masquerades_all: false,
            resets_removed: false,
            timeouts: BTreeMap::new(),
            routing: Cell::default(),
            now: Cell::new(10_000_000_000),
            random: Cell::new(0),
        }
    }
}

impl<F: Family> HostTables<F> {
    fn table(&self, table: FlowTable) -> &RefCell<FlowMap<F::Addr>> {
        match table {
            FlowTable::Established => &self.flows,
            FlowTable::Pending => &self.pending,
        }
    }

    /// Every entry of a flow table.
    pub fn entries(&self, table: FlowTable) -> BTreeMap<FlowKey<F::Addr>, Flow<F::Addr>> {
        self.table(table).borrow().iter().map(|(key, flow)| (*key, flow.get())).collect()
    }
}

impl<F: Family> Tables<F> for HostTables<F> {
    type Entry = Rc<Cell<Flow<F::Addr>>>;

    fn flow(&self, table: FlowTable, key: &FlowKey<F::Addr>) -> Option<Self::Entry> {
        self.table(table).borrow().get(key).cloned()
    }

    fn put_flow(
        &self,
        table: FlowTable,
        key: &FlowKey<F::Addr>,
        flow: &Cell<Flow<F::Addr>>,
    ) -> Result<(), Reason> {
        let old = self.table(table).borrow_mut().insert(*key, Rc::new(Cell::new(flow.get())));
        reuse(old);
        Ok(())
    }

    fn add_flow(&self, table: FlowTable, key: &FlowKey<F::Addr>, flow: &Cell<Flow<F::Addr>>) -> bool {
        let mut table = self.table(table).borrow_mut();
        if table.contains_key(key) {
            return false;
        }
        table.insert(*key, Rc::new(Cell::new(flow.get())));
        true
    }

    fn remove_flow(&self, table: FlowTable, key: &FlowKey<F::Addr>) {
        reuse(self.table(table).borrow_mut().remove(key));
    }

    fn fragment(&self, key: &FragmentKey<F::Addr>) -> Option<Fragment> {
        self.fragments.borrow().get(key).copied()
    }

    fn put_fragment(&self, key: &FragmentKey<F::Addr>, fragment: &Fragment) {
        self.fragments.borrow_mut().insert(*key, *fragment);
    }

    fn address(&self, addr: &F::Addr) -> Option<AddressInfo> {
        self.addresses.get(addr).copied()
    }

    fn may_know(&self, addr: &F::Addr) -> bool {
        self.filter.as_ref().is_none_or(|filter| filter.contains(addr))
    }

    fn may_be_service(&self, _addr: &F::Addr) -> bool {
        true
    }

    fn service(&self, key: &ServiceKey<F::Addr>) -> Option<Service> {
        self.services.get(key).copied()
    }

    fn is_source(&self, key: &Source<F::Addr>) -> bool {
        let bits = |addr: &F::Addr| F::to_mapped(addr).octets;
        let offset = if F::ETHER_TYPE == crate::V4::ETHER_TYPE { 96 } else { 0 };
        self.sources.iter().any(|source| {
            let len = source.prefix_len as usize - 32 + offset;
            let (a, b) = (bits(&source.data.addr), bits(&key.addr));
            source.data.service == key.service
                && (0..len).all(|bit| (a[bit / 8] ^ b[bit / 8]) & (0x80 >> (bit % 8)) == 0)
        })
    }

    fn affinity(&self, key: &AffinityKey<F::Addr>) -> Option<Affinity> {
        self.affinity.borrow().get(key).copied()
    }

    fn put_affinity(&self, key: &AffinityKey<F::Addr>, affinity: &Affinity) {
        self.affinity.borrow_mut().insert(*key, *affinity);
    }

    fn is_member(&self, key: &MemberKey) -> bool {
        self.members.contains(key)
    }

    fn networks(&self, addr: &F::Addr) -> u32 {
        service::networks::<F>(addr, |index| self.networks.get(index as usize))
    }

    fn count(&self, service: u32, event: Event) {
        let mut usage = self.usage.borrow_mut();
        let usage = usage.entry(service).or_default();
        match event {
            Event::Connection => usage.connections += 1,
            Event::Packet(bytes) => {
                usage.packets += 1;
                usage.bytes += u64::from(bytes);
            }
            Event::Refused(reason) => {
                usage.refused += 1;
                let key = RefusalKey { service, reason: reason as u32 };
                *self.refusals.borrow_mut().entry(key).or_default() += 1;
            }
        }
    }

    fn is_sampling(&self) -> bool {
        self.samples.borrow().is_some()
    }

    fn put_sample(&self, sample: &Sample) {
        if let Some(samples) = &mut *self.samples.borrow_mut() {
            samples.push(*sample);
        }
    }

    fn slot(&self, index: u32) -> Option<u32> {
        self.slots.get(&index).copied()
    }

    fn backend(&self, id: u32) -> Option<Backend<F::Addr>> {
        self.backends.get(&id).copied()
    }

    fn edge(&self, ifindex: u32) -> Option<Edge> {
        self.edges.get(&ifindex).copied()
    }

    fn place(&self, key: &ServiceKey<F::Addr>) -> Option<Place<F::Addr>> {
        self.places.get(key).copied()
    }

    fn tunnel_port(&self) -> u16 {
        self.tunnel_port
    }

    fn sends_tunnelled(&self) -> bool {
        self.sends_tunnelled
    }

    fn own_mac(&self, index: u32) -> Option<OwnMac> {
        self.own_macs.get(&index).copied()
    }

    fn edge_source(&self, key: &EdgeSourceKey) -> Option<Edge> {
        self.edge_sources.get(key).copied()
    }

    fn socket(&self, key: &SocketKey) -> Option<SocketPeer> {
        self.sockets.borrow().get(key).copied()
    }

    fn put_socket(&self, key: &SocketKey, peer: &SocketPeer) {
        self.sockets.borrow_mut().insert(*key, *peer);
    }

    fn admission(&self) -> Admission {
        self.admission
    }

    fn masquerades_all(&self) -> bool {
        self.masquerades_all
    }

    fn resets_removed(&self) -> bool {
        self.resets_removed
    }

    fn timeout(&self, state: u8) -> u64 {
        let state = State::ALL[usize::from(state)];
        self.timeouts.get(&state).copied().unwrap_or(state.default_timeout())
    }

    fn routing(&self) -> Routing {
        self.routing.get()
    }

    /// As a kernel with 250 jiffies in a second has it.
    fn tick(&self) -> u16 {
        (self.now.get() / 256_000_000) as u16
    }

    fn now(&self) -> u64 {
        self.now.get()
    }

    fn random(&self) -> u32 {
        self.random.get()
    }
}
