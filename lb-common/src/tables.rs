//! The maps as the pipeline sees them.

use core::cell::Cell;
use core::ops::Deref;

use crate::abi::{AddressInfo, Backend, Edge, Flow, FlowKey, Service, ServiceKey, SocketKey, SocketPeer};
use crate::family::Family;
use crate::reason::Reason;

/// Which flow table.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FlowTable {
    /// `FLOWS`: the other side has answered.
    Established = 0,
    /// `PENDING`: it has not yet. A flood of first packets only evicts its own kind.
    Pending = 1,
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

    fn address(&self, addr: &F::Addr) -> Option<AddressInfo>;

    fn service(&self, key: &ServiceKey<F::Addr>) -> Option<Service>;

    fn slot(&self, index: u32) -> Option<u32>;

    fn backend(&self, id: u32) -> Option<Backend<F::Addr>>;

    /// The external edge with this interface index.
    fn edge(&self, ifindex: u32) -> Option<Edge>;

    fn socket(&self, key: &SocketKey) -> Option<SocketPeer>;

    fn put_socket(&self, key: &SocketKey, peer: &SocketPeer);

    /// `CLOCK_MONOTONIC`, ns; may be a few milliseconds old.
    fn now(&self) -> u64;

    fn random(&self) -> u32;
}
