//! Keys and values of the BPF maps: the contract between kernel programs, agent and `bpftool`.
//!
//! Rules: `repr(C)`, no implicit padding, no `bool`, no enums with payload. Addresses are byte arrays in
//! wire order, ports and numbers are in host byte order. Sizes and offsets are asserted beside each
//! struct; [`crate::maps::LAYOUT_VERSION`] is raised whenever one of them changes.
//!
//! Index 0 of every id space means "uninitialised" and is never allocated.

use core::mem::{align_of, offset_of, size_of};

use crate::reason::Hook;
use crate::wire::{Mac, Wire};

/// An IPv4 address as it stands in a packet.
#[repr(C, align(2))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Addr4 {
    /// Octets in wire order.
    pub octets: [u8; 4],
}

/// An IPv6 address as it stands in a packet.
#[repr(C, align(2))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Addr6 {
    /// Octets in wire order.
    pub octets: [u8; 16],
}

/// Key of `SERVICES4/6`: what a client addresses.
///
/// A NodePort has the unspecified address (`0.0.0.0` / `::`): it answers on every address that `ADDRESSES`
/// marks with [`address_flags::NODE_PORT`]. A host port for any address has it, too, and answers where
/// [`address_flags::HOST_PORT`] says so.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct ServiceKey<A> {
    pub addr: A,
    /// Host byte order.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    pub pad: u8,
}

/// A run of `SLOTS`: the backends one scope of a frontend may choose from.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Window {
    /// First index in `SLOTS`.
    pub base: u32,
    /// Number of slots; 0: there is nothing to choose.
    pub len: u32,
}

/// Value of `SERVICES4/6`: one frontend.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Service {
    /// The Service this frontend belongs to; shared by all its frontends.
    pub id: u32,
    /// [`service_flags`].
    pub flags: u16,
    /// [`frontend_kind`]; the datapath tells NodePorts from host ports by it, no more.
    pub kind: u8,
    pub pad: u8,
    /// For pods and processes of the node.
    pub internal: Window,
    /// For everybody else.
    pub external: Window,
    /// Session affinity by client address: how long a client that opens no connection is remembered, seconds; 0: no
    /// affinity (`sessionAffinityConfig.clientIP.timeoutSeconds`).
    pub affinity: u32,
    /// The port of the Service this frontend belongs to; shared by all frontends of the port, and what clients are
    /// remembered by.
    pub port: u32,
}

/// Bits of [`Service::flags`].
pub mod service_flags {
    /// The windows are Maglev tables: index them by the hash of the flow. Otherwise: at random.
    pub const MAGLEV: u16 = 1 << 0;
    /// An empty internal window drops (policy Local, endpoints only elsewhere) instead of rejecting.
    pub const INTERNAL_DROP: u16 = 1 << 1;
    /// An empty external window drops instead of rejecting.
    pub const EXTERNAL_DROP: u16 = 1 << 2;
    /// Only sources that `SOURCES4/6` holds for this Service may ask (`loadBalancerSourceRanges`).
    pub const SOURCE_RANGES: u16 = 1 << 3;
    /// An address of this node is among them: its processes may ask.
    pub const NODE_ALLOWED: u16 = 1 << 4;
    /// The client's address is kept also under `--masquerade-all`: an external frontend with policy Local, a host port.
    pub const SOURCE_KEPT: u16 = 1 << 5;
    /// Backends on other nodes answer clients from outside themselves (`--mode`).
    pub const DSR: u16 = 1 << 6;
}

/// Values of [`Service::kind`].
pub mod frontend_kind {
    pub const CLUSTER_IP: u8 = 1;
    pub const NODE_PORT: u8 = 2;
    pub const LOAD_BALANCER: u8 = 3;
    pub const EXTERNAL_IP: u8 = 4;
    pub const HOST_PORT: u8 = 5;
}

/// Key of a longest-prefix-match trie (`struct bpf_lpm_trie_key`).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct PrefixKey<T> {
    /// Bits of `data` that count, from its first byte on.
    pub prefix_len: u32,
    pub data: T,
}

/// Data of the keys of `SOURCES4/6`: sources that may ask for the frontends of a Service that have
/// [`service_flags::SOURCE_RANGES`]. The prefix has the 32 bits of the Service and those of the network.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Source<A> {
    /// [`Service::id`].
    pub service: u32,
    pub addr: A,
}

impl<A> Source<A> {
    /// Prefix length of a single address.
    pub const BITS: u32 = 8 * size_of::<Self>() as u32;
}

/// Key of `AFFINITY4/6`: a client of a port of a Service.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct AffinityKey<A> {
    /// [`Service::port`].
    pub port: u32,
    /// The client's address; for sockets, see [`crate::socket`].
    pub client: A,
}

/// Value of `AFFINITY4/6`: the backend a client was given last.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Affinity {
    /// `CLOCK_MONOTONIC`, ns, of the client's last new connection.
    pub last_seen: u64,
    /// Id of the backend.
    pub backend: u32,
    /// [`Backend::generation`] when it was chosen.
    pub generation: u32,
}

/// Key of `MEMBERS`: a backend that a window of a Service with affinity holds. What a client was given before is
/// given again only while the window it asks now still has it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct MemberKey {
    /// [`Window::base`].
    pub window: u32,
    /// Id of the backend.
    pub backend: u32,
}

/// Value of `NETWORKS4/6`, indexed from 0: a network this node knows. The first without flags ends the list.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Network<A> {
    pub addr: A,
    /// One bits where the address counts.
    pub mask: A,
    /// [`network_flags`].
    pub flags: u32,
}

/// Bits of [`Network::flags`].
pub mod network_flags {
    /// A ServiceCIDR: its addresses that no Service has lead nowhere.
    pub const SERVICE: u32 = 1 << 0;
    /// Addresses of pods (`--cluster-cidr`): their packets are from inside of the cluster wherever they come in.
    pub const POD: u32 = 1 << 1;
}

/// Value of `USAGE`, per CPU, indexed by [`Service::id`]: what went through a Service.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Usage {
    /// Flows begun, and sockets connected.
    pub connections: u64,
    /// Packets translated, both directions.
    pub packets: u64,
    /// Bytes of these IP packets.
    pub bytes: u64,
    /// Packets and sockets that were rejected or dropped.
    pub refused: u64,
}

/// Value of `NAMES`, keyed by [`Service::id`]: whose frontends have this number. For people: the datapath does not look.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct OwnerName {
    /// [`owner_kind`].
    pub kind: u32,
    /// UTF-8, the rest NUL. `i8` because it is what bpftool prints as text.
    pub namespace: [i8; NAME_LEN],
    /// UTF-8, the rest NUL. The middle of a longer name is left out: it ends in what tells Pods of one owner apart.
    pub name: [i8; NAME_LEN],
}

/// Bytes of a name in [`OwnerName`].
pub const NAME_LEN: usize = 64;

/// Values of [`OwnerName::kind`].
pub mod owner_kind {
    pub const SERVICE: u32 = 1;
    /// A Pod with host ports.
    pub const POD: u32 = 2;
}

/// Value of `BACKENDS4/6`, indexed by backend id.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Backend<A> {
    pub addr: A,
    /// Host byte order.
    pub port: u16,
    /// [`backend_state`].
    pub state: u8,
    /// [`backend_flags`].
    pub flags: u8,
    /// Raised each time the id is given to another backend, so that a flow of the old one can tell.
    pub generation: u32,
}

/// Values of [`Backend::state`].
pub mod backend_state {
    /// The id is free.
    pub const UNUSED: u8 = 0;
    /// Takes new connections.
    pub const ACTIVE: u8 = 1;
    /// Keeps the connections it has.
    pub const TERMINATING: u8 = 2;
}

/// Bits of [`Backend::flags`].
pub mod backend_flags {
    /// The endpoint is on this node: the client's address is kept and the node's stack delivers.
    pub const LOCAL: u8 = 1 << 0;
}

/// Value of `ADDRESSES4/6`, keyed by address: what this node knows about an address.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct AddressInfo {
    /// [`address_flags`].
    pub flags: u32,
}

/// Bits of [`AddressInfo::flags`].
pub mod address_flags {
    /// An address of this node.
    pub const NODE: u32 = 1 << 0;
    /// NodePorts answer on this address (`--nodeport-addresses`).
    pub const NODE_PORT: u32 = 1 << 1;
    /// The address of a Service: ports that no frontend owns are rejected.
    pub const SERVICE: u32 = 1 << 2;
    /// A loopback address: only sockets of this node can ask for it.
    pub const LOOPBACK: u32 = 1 << 3;
    /// Host ports answer on this address.
    pub const HOST_PORT: u32 = 1 << 4;
    /// A load-balancer IP or external IP: its other ports are not ours.
    pub const FRONTEND: u32 = 1 << 5;
    /// A TCP backend has this address, here or elsewhere: connections to it without a frontend are flows, too, so that
    /// none through a frontend takes their tuple.
    pub const BACKEND_TCP: u32 = 1 << 6;
    /// The same of a UDP backend.
    pub const BACKEND_UDP: u32 = 1 << 7;
    /// The same of an SCTP backend.
    pub const BACKEND_SCTP: u32 = 1 << 8;
    /// An address of another node of the cluster: what it sends through a tunnel is believed.
    pub const PEER: u32 = 1 << 9;
    /// Backends of any protocol.
    pub const BACKEND: u32 = BACKEND_TCP | BACKEND_UDP | BACKEND_SCTP;
}

/// Value of `PLACES4/6`, keyed by address, port and protocol of a backend: where it is, so that packets can be tunnelled there
/// as they came.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Place<A> {
    /// Id of the backend.
    pub backend: u32,
    /// Address of its node; unspecified: this one.
    pub node: A,
}

/// Value of `EDGES`, keyed by interface index: an external edge of this node; under `--masquerade-all` also a device
/// that leads to pods.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Edge {
    /// Source of packets sent on through this device; unspecified if it has no IPv6 address.
    pub addr6: Addr6,
    /// Source of packets sent on through this device; unspecified if it has no IPv4 address.
    pub addr4: Addr4,
    /// [`edge_flags`].
    pub flags: u32,
    /// Further IPv4 sources of this device, in `EDGE_SOURCES` (`--source-addresses`).
    pub sources4: u16,
    /// Further IPv6 sources.
    pub sources6: u16,
}

/// Value of `MACS`: the Ethernet address that frames for this node have at an external edge. In an array, because every
/// frame is compared; the place of a device is its index modulo [`crate::maps::MAX_MACS`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct OwnMac {
    /// The device that has this place; others that would have it are not asked.
    pub ifindex: u32,
    /// Zeroes: any.
    pub mac: Mac,
    pub pad: u16,
}

/// Key of `EDGE_SOURCES`, whose values are edges of which the addresses alone count.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct EdgeSourceKey {
    pub ifindex: u32,
    /// From 0, below [`Edge::sources4`] or [`Edge::sources6`].
    pub index: u32,
}

/// Bits of [`Edge::flags`].
pub mod edge_flags {
    /// XDP may redirect packets to this device.
    pub const XDP_TRANSMIT: u32 = 1 << 0;
    /// Pods are behind this device, and what they answer is seen where it leaves them.
    pub const POD: u32 = 1 << 1;
    /// XDP sees what comes in through this device before tc does. What it has translated must not look to tc like a
    /// connection that somebody opens to a backend itself.
    pub const XDP_FIRST: u32 = 1 << 2;
}

/// Where a packet was seen: the edge's class and the packet's direction. Part of every flow key: an
/// entry acts only where it was made for.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Side {
    /// Came in through an external edge.
    NicIn = 1,
    /// Leaves through an external edge.
    NicOut = 2,
    /// Comes from a pod.
    PodIn = 3,
    /// Goes to a pod.
    PodOut = 4,
}

impl Side {
    /// Number of the [`Hook`] where tc sees packets of the side with this number: the same.
    #[inline(always)]
    pub const fn hook(side: u8) -> u8 {
        const _: () =
            assert!(Side::NicIn as u8 == Hook::NicIn as u8 && Side::NicOut as u8 == Hook::NicOut as u8);
        const _: () =
            assert!(Side::PodIn as u8 == Hook::PodIn as u8 && Side::PodOut as u8 == Hook::PodOut as u8);
        side
    }
}

/// Key of `FLOWS4/6` and `PENDING4/6`: the five-tuple as seen at the edge, and the [`Side`].
///
/// Aligned as nothing in it asks for: addresses are copied by words of 8 bytes then, and not of 2.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct FlowKey<A> {
    pub src: A,
    pub dst: A,
    /// Host byte order.
    pub src_port: u16,
    /// Host byte order.
    pub dst_port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// [`Side`].
    pub side: u8,
    pub pad: u16,
}

/// The kernel hashes keys by words of 4 bytes, and waits for a word that was written in pieces: so they are written by whole words.
impl<A: Wire> FlowKey<A> {
    /// Writes both addresses, as they lie in memory one behind the other.
    #[inline(always)]
    pub fn set_addresses<const WORDS: usize>(&mut self, addresses: [u64; WORDS]) {
        const { assert!(size_of::<[u64; WORDS]>() == 2 * size_of::<A>()) };
        // SAFETY: keys begin with both addresses, are aligned to 8, and take any bytes.
        unsafe { core::ptr::from_mut(self).cast::<[u64; WORDS]>().write_volatile(addresses) };
    }

    /// Writes everything else.
    #[inline(always)]
    pub fn set_rest(&mut self, [src_port, dst_port]: [u16; 2], proto: u8, side: u8) {
        let [[a, b], [c, d]] = [src_port.to_ne_bytes(), dst_port.to_ne_bytes()];
        let rest = u64::from_ne_bytes([a, b, c, d, proto, side, 0, 0]);
        // SAFETY: the last 8 bytes of the key, which take any, and are aligned to 8 (`layout!`).
        unsafe {
            core::ptr::from_mut(self).byte_add(offset_of!(Self, src_port)).cast::<u64>().write_volatile(rest);
        }
    }
}

/// Value of `FLOWS4/6` and `PENDING4/6`: the whole rewrite of one direction of a flow.
///
/// Key and value of one direction determine those of the other ([`crate::flow`]).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Flow<A> {
    /// `CLOCK_MONOTONIC`, ns; refreshed at most once a second.
    pub last_seen: u64,
    /// Id of the backend; 0: the client asks for the backend itself, and all that may change is its port.
    pub backend: u32,
    /// [`Backend::generation`] when the flow was made.
    pub generation: u32,
    /// [`Service::id`]; 0 without a frontend.
    pub service: u32,
    /// TCP: the last acknowledgement number seen in this direction; 0: none. It is the sequence number that the other
    /// end sends next.
    pub ack: u32,
    /// New source. It and the destination stand where they are copied by words of 8 bytes.
    pub src: A,
    /// New destination.
    pub dst: A,
    /// New source port, host byte order.
    pub src_port: u16,
    /// New destination port, host byte order.
    pub dst_port: u16,
    /// [`flow_flags`].
    pub flags: u8,
    /// [`Carry`].
    pub carry: u8,
    /// [`crate::Tables::tick`] when the entry was last seen to.
    pub tick: u16,
    /// Of flows that XDP sends on.
    pub hop: Hop,
    /// Longest packet that fits through on the way to `hop`, as far as is known, bytes.
    pub fits: u16,
    /// What the new addresses change in a sum that covers them ([`crate::checksum::Diff::folded`]).
    pub addresses: u16,
}

/// Where the packets of a flow are sent on to: what the routing table has said of its first ones.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Hop {
    /// [`Routing::generation`] before the routing table was asked; 0: it was not, or is to be asked again.
    pub generation: u32,
    /// Device they leave by.
    pub ifindex: u32,
    /// Ethernet address of the device.
    pub src: [u8; 6],
    /// Ethernet address of the next hop.
    pub dst: [u8; 6],
}

/// The Ethernet addresses of a [`Hop`], in three words as they lie in memory.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Link(pub u32, pub u32, pub u32);

impl Link {
    /// Of the device.
    #[inline(always)]
    pub const fn src(self) -> Mac {
        let ([s0, s1, s2, s3], [s4, s5, ..]) = (self.0.to_ne_bytes(), self.1.to_ne_bytes());
        Mac { octets: [s0, s1, s2, s3, s4, s5] }
    }

    /// Of the next hop.
    #[inline(always)]
    pub const fn dst(self) -> Mac {
        let ([.., d0, d1], [d2, d3, d4, d5]) = (self.1.to_ne_bytes(), self.2.to_ne_bytes());
        Mac { octets: [d0, d1, d2, d3, d4, d5] }
    }
}

impl Hop {
    /// Where both Ethernet addresses stand, one behind the other, in words of 4 bytes.
    pub const LINK: usize = offset_of!(Self, src) / size_of::<u32>();

    /// Both Ethernet addresses. In words, as a program otherwise copies them byte by byte.
    #[inline(always)]
    pub const fn link(&self) -> Link {
        // SAFETY: as many bytes as there are behind that place (`layout!`).
        let [first, both, last] =
            unsafe { core::ptr::from_ref(self).cast::<u32>().add(Self::LINK).cast::<[u32; 3]>().read() };
        Link(first, both, last)
    }
}

/// Value of `ROUTING`: how long flows may believe their [`Hop`]. The agent follows the changes of routes, neighbours,
/// addresses and links; without one the routing table is asked for each packet.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Routing {
    /// `CLOCK_MONOTONIC`, ns: until then the agent lives for sure.
    pub until: u64,
    /// Advances with each change; never 0.
    pub generation: u32,
    pub pad: u32,
}

/// Bits of [`Flow::flags`].
pub mod flow_flags {
    /// This entry is the backend-to-client direction.
    pub const REPLY: u8 = 1 << 0;
    /// A FIN was seen in this direction.
    pub const FIN: u8 = 1 << 1;
    /// A FIN was seen in the other direction.
    pub const PEER_FIN: u8 = 1 << 2;
    /// A RST was seen in either direction that its receiver believes, or what ends an SCTP association: ABORT, SHUTDOWN
    /// COMPLETE; and nothing else since.
    pub const RST: u8 = 1 << 3;
    /// The other direction comes in at the other class of edge: a pod and somebody outside, neither of whom sees the
    /// other's address. Only flows that are sent on have it.
    pub const CROSS: u8 = 1 << 7;
    /// The backend has answered. In `PENDING` the next packet shows that the client has heard it.
    pub const ANSWERED: u8 = 1 << 4;
}

/// What happens to a packet after its rewrite; [`Flow::carry`].
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Carry {
    /// The node's own stack takes it from here.
    Stack = 1,
    /// Sent on to the next hop of its new destination without the stack.
    Forward = 2,
    /// Sent back out of the device it came from: a pod that is its own backend.
    Bounce = 3,
    /// Sent on unchanged, but for its TTL, in a tunnel to the backend's node, which answers. New destination is the
    /// backend, new source the address of its node; such a flow has one direction.
    Tunnel = 4,
}

/// Key of `SOCKETS`: a remote address as one socket knows it. IPv4 addresses are IPv4-mapped.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct SocketKey {
    /// `bpf_get_socket_cookie()`.
    pub cookie: u64,
    pub addr: Addr6,
    /// Host byte order.
    pub port: u16,
    /// [`SocketSide`].
    pub side: u8,
    /// IP protocol number.
    pub proto: u8,
    pub pad: u32,
}

/// Which way a [`SocketKey`] translates.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SocketSide {
    /// From the frontend the process named to the backend chosen for it (unconnected UDP).
    Forward = 1,
    /// From the backend's address to the frontend the process named.
    Reply = 2,
}

/// Value of `SOCKETS`. IPv4 addresses are IPv4-mapped.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SocketPeer {
    pub addr: Addr6,
    /// Host byte order.
    pub port: u16,
    pub pad: u16,
    /// Id of the backend.
    pub backend: u32,
    /// [`Backend::generation`] when it was chosen.
    pub generation: u32,
}

/// Key of `FRAGMENTS4/6`: a datagram that comes in pieces, and the [`Side`] it was seen at.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct FragmentKey<A> {
    pub src: A,
    pub dst: A,
    /// Identification, host byte order; IPv4 has 16 bits.
    pub id: u32,
    /// IP protocol number; 0 for IPv6, where it does not identify a datagram (RFC 8200, section 4.5).
    pub proto: u8,
    /// [`Side`].
    pub side: u8,
    pub pad: u16,
}

/// Value of `FRAGMENTS4/6`: what only the first fragment of a datagram says.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Fragment {
    /// `CLOCK_MONOTONIC`, ns, of the first fragment.
    pub last_seen: u64,
    /// Host byte order.
    pub src_port: u16,
    /// Host byte order.
    pub dst_port: u16,
    /// IP protocol number of what the ports belong to.
    pub proto: u8,
    pub pad: [u8; 3],
}

/// Value of `COUNTERS`, per CPU, indexed by [`crate::reason::counter_index`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Counter {
    pub packets: u64,
    /// Bytes of IP packets, without link headers; 0 for socket hooks.
    pub bytes: u64,
}

/// Key of `REFUSALS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct RefusalKey {
    /// [`Service::id`].
    pub service: u32,
    /// [`crate::Reason`].
    pub reason: u32,
}

/// Value of `SAMPLING`: whether programs tell of packets that they do not carry on. Who wants to know says so again and
/// again, so that nobody is told when he is gone.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Sampling {
    /// `CLOCK_MONOTONIC`, ns: until then.
    pub until: u64,
    /// Samples that found no room since `until` was written.
    pub lost: u64,
}

/// What `SAMPLES` tells of a packet, or of a call of a socket, that was dropped or answered in the backend's place. IPv4
/// addresses are IPv4-mapped.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Sample {
    /// `CLOCK_MONOTONIC`, ns; as old as [`crate::Tables::now`] may be.
    pub time: u64,
    /// Device the packet came in through or goes out of; 0 for sockets.
    pub ifindex: u32,
    /// Bytes of the IP packet; 0 for sockets, and where the header cannot be believed.
    pub bytes: u32,
    /// As the packet came; unspecified for sockets.
    pub src: Addr6,
    pub dst: Addr6,
    /// Host byte order; 0 for sockets, and where there is none.
    pub src_port: u16,
    /// Host byte order.
    pub dst_port: u16,
    /// IP protocol number.
    pub proto: u8,
    pub tcp_flags: u8,
    /// [`crate::Hook`].
    pub hook: u8,
    /// [`crate::Reason`].
    pub reason: u8,
}

/// Ports that the datapath gives to flows whose source it rewrites: outside the default ephemeral range
/// (32768 to 60999), the default NodePort range (30000 to 32767) and the ports of Kubernetes' own
/// components. The agent adds them to `net.ipv4.ip_local_reserved_ports`.
pub const RESERVED_PORTS_FIRST: u16 = 12288;
/// Number of reserved source ports: a power of two, so that the datapath can mask instead of divide.
pub const RESERVED_PORTS_COUNT: u16 = 16384;

const fn assert_layout(size: usize, want_size: usize, align: usize, want_align: usize) {
    assert!(size == want_size && align == want_align);
}

macro_rules! layout {
    ($type:ty, size $size:literal, align $align:literal $(, $field:ident $offset:literal)*) => {
        const _: () = {
            assert_layout(size_of::<$type>(), $size, align_of::<$type>(), $align);
            $(assert!(offset_of!($type, $field) == $offset);)*
        };
    };
}

layout!(Addr4, size 4, align 2);
layout!(Addr6, size 16, align 2);
layout!(ServiceKey<Addr4>, size 8, align 2, port 4, proto 6);
layout!(ServiceKey<Addr6>, size 20, align 2, port 16, proto 18);
layout!(Service, size 32, align 4, flags 4, internal 8, external 16, affinity 24, port 28);
layout!(PrefixKey<Source<Addr4>>, size 12, align 4, data 4);
layout!(PrefixKey<Source<Addr6>>, size 24, align 4, data 4);
layout!(Source<Addr4>, size 8, align 4, addr 4);
layout!(Source<Addr6>, size 20, align 4, addr 4);
layout!(AffinityKey<Addr4>, size 8, align 4, client 4);
layout!(AffinityKey<Addr6>, size 20, align 4, client 4);
layout!(Affinity, size 16, align 8, backend 8, generation 12);
layout!(MemberKey, size 8, align 4, backend 4);
layout!(Network<Addr4>, size 12, align 4, mask 4, flags 8);
layout!(Network<Addr6>, size 36, align 4, mask 16, flags 32);
layout!(OwnerName, size 132, align 4, namespace 4, name 68);
layout!(Usage, size 32, align 8, packets 8, bytes 16, refused 24);
layout!(Backend<Addr4>, size 12, align 4, port 4, state 6, generation 8);
layout!(Backend<Addr6>, size 24, align 4, port 16, state 18, generation 20);
layout!(AddressInfo, size 4, align 4);
layout!(Place<Addr4>, size 8, align 4, node 4);
layout!(Place<Addr6>, size 20, align 4, node 4);
layout!(Edge, size 28, align 4, addr4 16, flags 20, sources4 24, sources6 26);
layout!(OwnMac, size 12, align 4, mac 4);
layout!(EdgeSourceKey, size 8, align 4, index 4);
layout!(FlowKey<Addr4>, size 16, align 8, src_port 8, proto 12, side 13);
layout!(FlowKey<Addr6>, size 40, align 8, src_port 32, proto 36, side 37);
layout!(Flow<Addr4>, size 64, align 8, ack 20, src 24, dst 28, src_port 32, flags 36, carry 37, tick 38, hop 40, fits 60, addresses 62);
layout!(Flow<Addr6>, size 88, align 8, ack 20, src 24, dst 40, src_port 56, flags 60, carry 61, tick 62, hop 64, fits 84, addresses 86);
layout!(Hop, size 20, align 4, ifindex 4, src 8, dst 14);
layout!(Routing, size 16, align 8, generation 8);
layout!(SocketKey, size 32, align 8, addr 8, port 24, side 26, proto 27);
layout!(SocketPeer, size 28, align 4, port 16, backend 20);
layout!(FragmentKey<Addr4>, size 16, align 4, dst 4, id 8, proto 12, side 13);
layout!(FragmentKey<Addr6>, size 40, align 4, dst 16, id 32, proto 36, side 37);
layout!(Fragment, size 16, align 8, src_port 8, dst_port 10, proto 12);
layout!(Counter, size 16, align 8);
layout!(RefusalKey, size 8, align 4, reason 4);
layout!(Sampling, size 16, align 8, lost 8);
layout!(Sample, size 56, align 8, ifindex 8, src 16, dst 32, src_port 48, proto 52, hook 54, reason 55);

#[cfg(feature = "aya")]
mod pod {
    use super::{
        Addr4, Addr6, AddressInfo, Affinity, AffinityKey, Backend, Counter, Edge, EdgeSourceKey, Flow,
        FlowKey, Fragment, FragmentKey, MemberKey, Network, OwnMac, OwnerName, Place, RefusalKey, Routing,
        Sample, Sampling, Service, ServiceKey, SocketKey, SocketPeer, Source, Usage,
    };

    macro_rules! pod {
        ($($type:ty),* $(,)?) => {
            // SAFETY: `repr(C)`, `Copy`, no padding and no pointers; every bit pattern is valid.
            $(unsafe impl aya::Pod for $type {})*
        };
    }
    pod!(Addr4, Addr6, ServiceKey<Addr4>, ServiceKey<Addr6>, Service, Backend<Addr4>, Backend<Addr6>);
    pod!(AddressInfo, Edge, EdgeSourceKey, FlowKey<Addr4>, FlowKey<Addr6>, Flow<Addr4>, Flow<Addr6>);
    pod!(FragmentKey<Addr4>, FragmentKey<Addr6>, Fragment);
    pod!(Place<Addr4>, Place<Addr6>);
    pod!(OwnMac, OwnerName, RefusalKey, Routing, Sample, Sampling);
    pod!(SocketKey, SocketPeer, Counter, Usage, Affinity, AffinityKey<Addr4>, AffinityKey<Addr6>, MemberKey);
    pod!(Source<Addr4>, Source<Addr6>, Network<Addr4>, Network<Addr6>);
}
