//! The maps as the pipeline sees them.

use core::cell::Cell;
use core::ops::Deref;

use crate::abi::{
    AddressInfo, Affinity, AffinityKey, Backend, Edge, EdgeSourceKey, Flow, FlowKey, Fragment, FragmentKey,
    MemberKey, OwnMac, Place, Routing, Sample, Service, ServiceKey, SocketKey, SocketPeer, Source,
};
use crate::family::Family;
use crate::reason::Reason;

/// Which flow table.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FlowTable {
    /// `FLOWS`: both ends have heard of each other.
    Established = 0,
    /// `PENDING`: they have not yet. A flood of first packets only evicts its own kind.
    Pending = 1,
}

/// What is counted of a Service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    Connection,
    /// A translated packet of so many bytes.
    Packet(u32),
    /// A packet, or a call of a socket, that does not get what it asks for.
    Refused(Reason),
}

/// Which packets without a flow may begin one, while another Service proxy is there (`--takeover`, `--drain`).
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Admission {
    /// Every packet to a frontend.
    #[default]
    All = 0,
    /// Only those that open a connection, and UDP: other connections are of the proxy that was here before, whose
    /// translations the stack knows.
    Opening = 1,
    /// None: new connections are for the proxy that comes after.
    None = 2,
}

/// The maps of one family, and what else the kernel tells: time and chance.
pub trait Tables<F: Family> {
    /// A flow in its table; changes to it are seen by all.
    type Entry: Deref<Target = Cell<Flow<F::Addr>>>;

    fn flow(&self, table: FlowTable, key: &FlowKey<F::Addr>) -> Option<Self::Entry>;

    /// Writes a flow, whether or not there is one.
    fn put_flow(
        &self,
        table: FlowTable,
        key: &FlowKey<F::Addr>,
        flow: &Cell<Flow<F::Addr>>,
    ) -> Result<(), Reason>;

    /// Writes a flow if there is none: `false` if there is one.
    fn add_flow(&self, table: FlowTable, key: &FlowKey<F::Addr>, flow: &Cell<Flow<F::Addr>>) -> bool;

    fn remove_flow(&self, table: FlowTable, key: &FlowKey<F::Addr>);

    fn fragment(&self, key: &FragmentKey<F::Addr>) -> Option<Fragment>;

    fn put_fragment(&self, key: &FragmentKey<F::Addr>, fragment: &Fragment);

    fn address(&self, addr: &F::Addr) -> Option<AddressInfo>;

    /// Whether an address may be one that `ADDRESSES` has, or had while a flow began (`ADDRESS_FILTER`). `false` is sure.
    fn may_know(&self, addr: &F::Addr) -> bool;

    /// Whether an address may be a ServiceCIDR's ([`Family::NEIGHBOURHOOD`]). `false` is sure.
    fn may_be_service(&self, addr: &F::Addr) -> bool;

    fn service(&self, key: &ServiceKey<F::Addr>) -> Option<Service>;

    /// Whether `SOURCES` names a network of this Service that has the address.
    fn is_source(&self, key: &Source<F::Addr>) -> bool;

    fn affinity(&self, key: &AffinityKey<F::Addr>) -> Option<Affinity>;

    fn put_affinity(&self, key: &AffinityKey<F::Addr>, affinity: &Affinity);

    fn is_member(&self, key: &MemberKey) -> bool;

    /// Flags of the networks that have this address ([`network_flags`](crate::abi::network_flags)).
    fn networks(&self, addr: &F::Addr) -> u32;

    /// Adds to what went through a Service.
    fn count(&self, service: u32, event: Event);

    /// Whether somebody wants to see samples.
    fn is_sampling(&self) -> bool;

    /// Shows a sample; lost if too many wait already.
    fn put_sample(&self, sample: &Sample);

    fn slot(&self, index: u32) -> Option<u32>;

    fn backend(&self, id: u32) -> Option<Backend<F::Addr>>;

    /// The edge with this interface index.
    fn edge(&self, ifindex: u32) -> Option<Edge>;

    /// Where the backend with this address, port and protocol is.
    fn place(&self, key: &ServiceKey<F::Addr>) -> Option<Place<F::Addr>>;

    /// UDP port at which nodes take packets of each other; 0: there are no tunnels.
    fn tunnel_port(&self) -> u16;

    /// Whether packets may be sent into tunnels, too.
    fn sends_tunnelled(&self) -> bool;

    /// What stands at this place of `MACS`.
    fn own_mac(&self, index: u32) -> Option<OwnMac>;

    /// A further source of an edge (`EDGE_SOURCES`).
    fn edge_source(&self, key: &EdgeSourceKey) -> Option<Edge>;

    fn socket(&self, key: &SocketKey) -> Option<SocketPeer>;

    fn put_socket(&self, key: &SocketKey, peer: &SocketPeer);

    /// Which packets without a flow may begin one.
    fn admission(&self) -> Admission;
    /// `--masquerade-all`.
    fn masquerades_all(&self) -> bool;

    /// Whether TCP to a backend that is no endpoint any more is answered with a RST.
    fn resets_removed(&self) -> bool;

    /// Without a packet for this long (ns) a flow in the [`State`](crate::flow::State) of this number is over.
    fn timeout(&self, state: u8) -> u64;

    /// How long flows may believe the next hop that they know.
    fn routing(&self) -> Routing;

    /// A clock that costs nothing, and says only whether some time has passed: it changes every 64 to 640 ms, and begins
    /// again after 65,536 of these.
    fn tick(&self) -> u16;

    /// `CLOCK_MONOTONIC`, ns; may be a few milliseconds old.
    fn now(&self) -> u64;

    fn random(&self) -> u32;
}
