//! A node of the small cluster on the host, through which tests send packets one by one.

use std::net::SocketAddr;

use super::{Seen, TestFamily, at, cluster, read};
use crate::abi::Side;
use crate::host::{HostPacket, HostRoute, HostTables};
use crate::pipeline::{Verdict, process};
use crate::reason::Reason;
use crate::tables::FlowTable;

/// The external edge of a [`Node`].
pub const NIC: u32 = 7;
/// Its MTU.
pub const MTU: u32 = 1500;
/// SCTP chunk of an association that is up.
pub const DATA: u8 = 0;

/// A node with its maps.
pub struct Node<F: TestFamily> {
    pub tables: HostTables<F>,
    pub route: HostRoute,
}

/// What became of a packet.
pub struct Outcome {
    pub verdict: Verdict,
    pub reason: Reason,
    pub before: Vec<u8>,
    pub bytes: Vec<u8>,
}

impl Outcome {
    /// The packet, which must have gone this way and be well-formed.
    #[track_caller]
    pub fn seen(&self, verdict: Verdict, reason: Reason) -> Seen {
        assert_eq!((self.verdict, self.reason), (verdict, reason));
        read(&self.bytes).unwrap_or_else(|e| panic!("{e}: {:02x?}", self.bytes))
    }

    /// The packet, which must be well-formed, whatever became of it.
    #[track_caller]
    pub fn read(&self) -> Seen {
        read(&self.bytes).unwrap_or_else(|e| panic!("{e}: {:02x?}", self.bytes))
    }

    /// The packet went this way and was not touched.
    #[track_caller]
    pub fn untouched(&self, verdict: Verdict, reason: Reason) {
        assert_eq!((self.verdict, self.reason), (verdict, reason));
        assert_eq!(self.before, self.bytes);
    }
}

impl<F: TestFamily> Default for Node<F> {
    fn default() -> Self {
        Self { tables: cluster::<F>(NIC), route: HostRoute::Out { ifindex: NIC, mtu: MTU } }
    }
}

impl<F: TestFamily> Node<F> {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn send(&self, side: Side, bytes: Vec<u8>) -> Outcome {
        let mut packet = HostPacket::new(&bytes, NIC).with_route(self.route);
        let (verdict, reason) = process::<F, _, _>(&mut packet, &self.tables, side);
        Outcome { verdict, reason, before: bytes, bytes: packet.bytes() }
    }

    /// Entries of a flow table.
    pub fn count(&self, table: FlowTable) -> usize {
        self.tables.entries(table).len()
    }

    /// Lets time pass.
    pub fn wait(&self, ns: u64) {
        self.tables.now.set(self.tables.now.get() + ns);
    }
}

/// The client outside.
pub fn client<F: TestFamily>(port: u16) -> SocketAddr {
    at(F::CLIENT, port)
}

/// A test for each family, of functions that are generic over it.
#[macro_export]
macro_rules! both_families {
    ($($name:ident)*) => {
        mod v4 { $(#[test] fn $name() { super::$name::<$crate::V4>(); })* }
        mod v6 { $(#[test] fn $name() { super::$name::<$crate::V6>(); })* }
    };
}
