//! What tests of every tier share: packets built and read by an independent library, and a small cluster.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    IpNumber, Ipv4HeaderSlice, LaxPacketHeaders, NetHeaders, PacketBuilder, PacketHeaders, PayloadSlice,
    TransportHeader,
};

use crate::abi::{
    Addr4, Addr6, AddressInfo, Backend, Edge, MemberKey, Network, PrefixKey, Service, ServiceKey, Source,
    Window, address_flags, backend_flags, backend_state, frontend_kind, network_flags, service_flags,
};
use crate::crc32c;
use crate::family::{Family, V4, V6};
use crate::host::HostTables;
use crate::wire::{IpProto, tcp_flags};

pub mod conversation;
pub mod invariants;
pub mod node;

/// Ethernet address of whoever sends a test packet.
pub const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Ethernet address that packets of tests are sent to.
pub const RECEIVER: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// TTL of test packets.
pub const TTL: u8 = 60;

/// A family with its addresses in the small cluster.
pub trait TestFamily: Family {
    /// A client outside.
    const CLIENT: &'static str;
    /// The node.
    const NODE: &'static str;
    /// Service addresses.
    const VIP: &'static str;
    /// An address of the ServiceCIDR that no Service has.
    const UNALLOCATED: &'static str;
    /// The mask of the ServiceCIDR.
    const SERVICE_MASK: &'static str;
    /// A pod on the node: backend 1 (TCP 8080), 3 (UDP 5353) and 5 (SCTP 2905).
    const POD: &'static str;
    /// A pod on the node that is no backend.
    const OTHER_POD: &'static str;
    /// A pod on another node: backend 2 (TCP 8080), 4 (UDP 5353) and 6 (SCTP 2905).
    const FAR_POD: &'static str;

    /// The address as it stands in packets and maps.
    fn wire(addr: IpAddr) -> Self::Addr;

    /// The address in an external edge.
    fn edge(addr: IpAddr, flags: u32) -> Edge;
}

impl TestFamily for V4 {
    const CLIENT: &'static str = "203.0.113.7";
    const NODE: &'static str = "192.0.2.1";
    const VIP: &'static str = "10.96.0.10";
    const UNALLOCATED: &'static str = "10.96.0.99";
    const SERVICE_MASK: &'static str = "255.255.255.0";
    const POD: &'static str = "10.244.1.5";
    const OTHER_POD: &'static str = "10.244.1.6";
    const FAR_POD: &'static str = "10.244.2.5";

    fn wire(addr: IpAddr) -> Addr4 {
        match addr {
            IpAddr::V4(addr) => Addr4 { octets: addr.octets() },
            IpAddr::V6(addr) => panic!("{addr} is not IPv4"),
        }
    }

    fn edge(addr: IpAddr, flags: u32) -> Edge {
        Edge { addr4: Self::wire(addr), flags, ..Edge::default() }
    }
}

impl TestFamily for V6 {
    const CLIENT: &'static str = "2001:db8:c::7";
    const NODE: &'static str = "2001:db8::1";
    const VIP: &'static str = "fd00:10:96::a";
    const UNALLOCATED: &'static str = "fd00:10:96::63";
    const SERVICE_MASK: &'static str = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:0";
    const POD: &'static str = "fd00:10:244:1::5";
    const OTHER_POD: &'static str = "fd00:10:244:1::6";
    const FAR_POD: &'static str = "fd00:10:244:2::5";

    fn wire(addr: IpAddr) -> Addr6 {
        match addr {
            IpAddr::V6(addr) => Addr6 { octets: addr.octets() },
            IpAddr::V4(addr) => panic!("{addr} is not IPv6"),
        }
    }

    fn edge(addr: IpAddr, flags: u32) -> Edge {
        Edge { addr6: Self::wire(addr), flags, ..Edge::default() }
    }
}

/// An address of the small cluster with a port.
///
/// # Panics
///
/// If `addr` is no address.
pub fn at(addr: &str, port: u16) -> SocketAddr {
    SocketAddr::new(addr.parse().unwrap_or_else(|e| panic!("{addr}: {e}")), port)
}

/// Ports of the small cluster.
pub mod ports {
    /// A TCP Service with one backend on the node: `VIP:80`.
    pub const WEB: u16 = 80;
    /// Its `NodePort`.
    pub const WEB_NODE: u16 = 30080;
    /// A TCP Service with one backend on another node: `VIP:81`.
    pub const FAR: u16 = 81;
    /// Its `NodePort`.
    pub const FAR_NODE: u16 = 30081;
    /// A TCP, UDP and SCTP Service without endpoints: `VIP:82`.
    pub const EMPTY: u16 = 82;
    /// Its `NodePort`.
    pub const EMPTY_NODE: u16 = 30082;
    /// A TCP Service with policy Local and its only backend on another node: `VIP:83`.
    pub const LOCAL: u16 = 83;
    /// Its `NodePort`.
    pub const LOCAL_NODE: u16 = 30083;
    /// A UDP Service with one backend on the node: `VIP:53`.
    pub const DNS: u16 = 53;
    /// Its `NodePort`.
    pub const DNS_NODE: u16 = 30053;
    /// A UDP Service with one backend on another node: `VIP:54`.
    pub const FAR_DNS: u16 = 54;
    /// Its `NodePort`.
    pub const FAR_DNS_NODE: u16 = 30054;
    /// An SCTP Service with one backend on the node, beside the UDP Service of the same port: `VIP:53`.
    pub const SIGNAL: u16 = DNS;
    /// Its `NodePort`, of the same number as the UDP Service's.
    pub const SIGNAL_NODE: u16 = DNS_NODE;
    /// An SCTP Service with one backend on another node: `VIP:55`.
    pub const FAR_SIGNAL: u16 = 55;
    /// Its `NodePort`.
    pub const FAR_SIGNAL_NODE: u16 = 30055;
    /// A TCP Service with several backends: `VIP:84`.
    pub const MANY: u16 = 84;
    /// Its `NodePort`.
    pub const MANY_NODE: u16 = 30084;
    /// A TCP Service that only `CLIENT` may ask: `VIP:85`.
    pub const GATED: u16 = 85;
    /// Its `NodePort`, which is gated too.
    pub const GATED_NODE: u16 = 30085;
    /// A TCP Service with several backends and session affinity: `VIP:86`.
    pub const STICKY: u16 = 86;
    /// Its `NodePort`.
    pub const STICKY_NODE: u16 = 30086;
    /// What the TCP backends listen on.
    pub const TARGET: u16 = 8080;
    /// What the UDP backends listen on.
    pub const TARGET_UDP: u16 = 5353;
    /// What the SCTP backends listen on.
    pub const TARGET_SCTP: u16 = 2905;
}

const TCP: u8 = IpProto::Tcp as u8;
const UDP: u8 = IpProto::Udp as u8;
const SCTP: u8 = IpProto::Sctp as u8;

/// The maps of the small cluster's node, whose one external edge is `nic`.
pub fn cluster<F: TestFamily>(nic: u32) -> HostTables<F> {
    let mut tables = HostTables::<F>::default();
    let addr = |text: &str| F::wire(at(text, 0).ip());

    let address = |flags| AddressInfo { flags };
    tables.addresses.insert(
        addr(F::NODE),
        address(address_flags::NODE | address_flags::NODE_PORT | address_flags::HOST_PORT),
    );
    tables.addresses.insert(addr(F::VIP), address(address_flags::SERVICE));
    for pod in [F::POD, F::FAR_POD] {
        tables.addresses.insert(addr(pod), address(address_flags::BACKEND));
    }
    tables.edges.insert(nic, F::edge(at(F::NODE, 0).ip(), 0));

    let mut backend = |id: u32, text: &str, port, flags| {
        let entry = Backend { addr: addr(text), port, state: backend_state::ACTIVE, flags, generation: 1 };
        tables.backends.insert(id, entry);
        // Window `id` holds backend `id` alone.
        tables.slots.insert(id, id);
    };
    backend(1, F::POD, ports::TARGET, backend_flags::LOCAL);
    backend(2, F::FAR_POD, ports::TARGET, 0);
    backend(3, F::POD, ports::TARGET_UDP, backend_flags::LOCAL);
    backend(4, F::FAR_POD, ports::TARGET_UDP, 0);
    backend(5, F::POD, ports::TARGET_SCTP, backend_flags::LOCAL);
    backend(6, F::FAR_POD, ports::TARGET_SCTP, 0);

    // A window of a few backends, as a Maglev table would be.
    for (slot, id) in (100..).zip([1, 2, 1, 1, 2, 1, 2]) {
        tables.slots.insert(slot, id);
    }

    let one = |id: u32| Window { base: id, len: 1 };
    let none = Window { base: 0, len: 0 };
    let mut service = |id, proto, port, node_port, internal, external, flags| {
        let entry = Service {
            id,
            flags: service_flags::MAGLEV | flags,
            kind: frontend_kind::CLUSTER_IP,
            pad: 0,
            internal,
            external,
            affinity: 0,
            port: 0,
        };
        tables.services.insert(ServiceKey { addr: addr(F::VIP), port, proto, pad: 0 }, entry);
        let any = ServiceKey { addr: F::Addr::default(), port: node_port, proto, pad: 0 };
        tables.services.insert(any, Service { kind: frontend_kind::NODE_PORT, ..entry });
    };
    service(1, TCP, ports::WEB, ports::WEB_NODE, one(1), one(1), 0);
    service(2, TCP, ports::FAR, ports::FAR_NODE, one(2), one(2), 0);
    service(3, TCP, ports::EMPTY, ports::EMPTY_NODE, none, none, 0);
    service(3, UDP, ports::EMPTY, ports::EMPTY_NODE, none, none, 0);
    service(3, SCTP, ports::EMPTY, ports::EMPTY_NODE, none, none, 0);
    service(4, TCP, ports::LOCAL, ports::LOCAL_NODE, one(2), none, service_flags::EXTERNAL_DROP);
    service(5, UDP, ports::DNS, ports::DNS_NODE, one(3), one(3), 0);
    service(6, UDP, ports::FAR_DNS, ports::FAR_DNS_NODE, one(4), one(4), 0);
    service(10, SCTP, ports::SIGNAL, ports::SIGNAL_NODE, one(5), one(5), 0);
    service(11, SCTP, ports::FAR_SIGNAL, ports::FAR_SIGNAL_NODE, one(6), one(6), 0);
    let many = Window { base: 100, len: 7 };
    service(7, TCP, ports::MANY, ports::MANY_NODE, many, many, 0);
    service(8, TCP, ports::GATED, ports::GATED_NODE, many, one(1), service_flags::SOURCE_RANGES);
    let source = Source { service: 8, addr: addr(F::CLIENT) };
    tables.sources.push(PrefixKey { prefix_len: Source::<F::Addr>::BITS, data: source });
    service(9, TCP, ports::STICKY, ports::STICKY_NODE, many, many, 0);
    for local in tables.services.values_mut().filter(|service| service.id == 4) {
        if local.kind == frontend_kind::NODE_PORT {
            local.flags |= service_flags::SOURCE_KEPT;
        }
    }
    for sticky in tables.services.values_mut().filter(|service| service.id == 9) {
        (sticky.affinity, sticky.port) = (10, 1);
    }
    tables.members.extend([1, 2].map(|backend| MemberKey { window: many.base, backend }));
    let (addr, mask) = (addr(F::UNALLOCATED), addr(F::SERVICE_MASK));
    tables.networks.push(Network { addr, mask, flags: network_flags::SERVICE });
    tables
}

/// A TCP segment to be built.
#[derive(Clone, Debug)]
pub struct Segment {
    pub src: SocketAddr,
    pub dst: SocketAddr,
    /// [`tcp_flags`].
    pub flags: u8,
    pub seq: u32,
    pub ack: u32,
    pub ttl: u8,
    pub payload: Vec<u8>,
}

impl Segment {
    /// A segment without payload.
    pub fn new(src: SocketAddr, dst: SocketAddr, flags: u8) -> Self {
        Self { src, dst, flags, seq: 1000, ack: 2000, ttl: TTL, payload: Vec::new() }
    }

    /// The frame.
    ///
    /// # Panics
    ///
    /// If the addresses are of two families.
    pub fn build(&self) -> Vec<u8> {
        let mut tcp = etherparse::TcpHeader::new(self.src.port(), self.dst.port(), self.seq, 64240);
        tcp.fin = self.flags & tcp_flags::FIN != 0;
        tcp.syn = self.flags & tcp_flags::SYN != 0;
        tcp.rst = self.flags & tcp_flags::RST != 0;
        tcp.ack = self.flags & tcp_flags::ACK != 0;
        tcp.acknowledgment_number = if tcp.ack { self.ack } else { 0 };
        let mut bytes = Vec::new();
        network(self.src, self.dst, self.ttl)
            .tcp_header(tcp)
            .write(&mut bytes, &self.payload)
            .unwrap_or_else(|e| panic!("{self:?}: {e}"));
        bytes
    }
}

/// A TCP segment without payload.
pub fn tcp(src: SocketAddr, dst: SocketAddr, flags: u8) -> Vec<u8> {
    Segment::new(src, dst, flags).build()
}

/// A UDP datagram.
///
/// # Panics
///
/// If the addresses are of two families.
pub fn udp(src: SocketAddr, dst: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    network(src, dst, TTL)
        .udp(src.port(), dst.port())
        .write(&mut bytes, payload)
        .unwrap_or_else(|e| panic!("{src} to {dst}: {e}"));
    bytes
}

/// An ICMP error of this type and code that quotes a packet, given without its link header.
///
/// # Panics
///
/// If the addresses are of two families.
pub fn icmp_error(src: IpAddr, dst: IpAddr, (kind, code): (u8, u8), quote: &[u8]) -> Vec<u8> {
    let step = network(SocketAddr::new(src, 0), SocketAddr::new(dst, 0), TTL);
    let is_too_big = (kind, code) == if src.is_ipv4() { V4::TOO_BIG } else { V6::TOO_BIG };
    let (mut bytes, rest) = (Vec::new(), if is_too_big { 1280u32 } else { 0 }.to_be_bytes());
    let written = if src.is_ipv4() {
        step.icmpv4_raw(kind, code, rest).write(&mut bytes, quote)
    } else {
        step.icmpv6_raw(kind, code, rest).write(&mut bytes, quote)
    };
    written.unwrap_or_else(|e| panic!("{src} to {dst}: {e}"));
    bytes
}

/// An SCTP packet of one chunk of a kind of [`sctp_chunk`](crate::wire::sctp_chunk), padded as RFC 9260 wants it.
///
/// # Panics
///
/// If the addresses are of two families.
pub fn sctp(src: SocketAddr, dst: SocketAddr, kind: u8, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(4 + value.len()).unwrap_or_else(|e| panic!("{e}: {} bytes", value.len()));
    let mut packet = [src.port().to_be_bytes(), dst.port().to_be_bytes()].concat();
    packet.extend(0x0102_0304_u32.to_be_bytes());
    packet.extend([0; 4]);
    packet.extend([kind, 0]);
    packet.extend(len.to_be_bytes());
    packet.extend(value);
    packet.resize(packet.len().next_multiple_of(4), 0);
    let check = crc32c::compute(&packet);
    packet[8..12].copy_from_slice(&check.to_le_bytes());
    let mut bytes = Vec::new();
    network(src, dst, TTL)
        .write(&mut bytes, IpNumber::SCTP, &packet)
        .unwrap_or_else(|e| panic!("{src} to {dst}: {e}"));
    bytes
}

fn network(
    src: SocketAddr,
    dst: SocketAddr,
    ttl: u8,
) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    let ethernet = PacketBuilder::ethernet2(SENDER, RECEIVER);
    match (src.ip(), dst.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => ethernet.ipv4(src.octets(), dst.octets(), ttl),
        (IpAddr::V6(src), IpAddr::V6(dst)) => ethernet.ipv6(src.octets(), dst.octets(), ttl),
        _ => panic!("{src} and {dst} are of two families"),
    }
}

/// Offset of the payload of an IPv4 packet without options and of an IPv6 packet without extension headers.
const PAYLOAD: [usize; 2] = [34, 54];
/// Bytes of an IPv6 fragment header.
const FRAGMENT_HEADER: usize = 8;
/// Protocol number of the IPv6 fragment header.
const FRAGMENT: u8 = IpProto::Ipv6Frag as u8;

/// The fragments of a packet, with so many bytes of its payload each (RFC 791 section 3.2, RFC 8200 section 4.5).
///
/// # Panics
///
/// If the size is no multiple of 8.
pub fn fragments(packet: &[u8], id: u32, size: usize) -> Vec<Vec<u8>> {
    assert_eq!(size % 8, 0);
    let v6 = packet[12] == 0x86;
    let (header, payload) = packet.split_at(PAYLOAD[usize::from(v6)]);
    let fragment = |(n, piece): (usize, &[u8])| {
        let (at, more) = (n * size, u16::from((n + 1) * size < payload.len()));
        let offset = u16::try_from(at / 8).expect("a packet");
        let mut bytes = header.to_vec();
        if v6 {
            bytes.extend([header[20], 0]);
            bytes.extend((offset << 3 | more).to_be_bytes());
            bytes.extend(id.to_be_bytes());
            bytes[20] = FRAGMENT;
        } else {
            bytes[18..20].copy_from_slice(&id.to_be_bytes()[2..]);
            bytes[20..22].copy_from_slice(&(more << 13 | offset).to_be_bytes());
        }
        bytes.extend(piece);
        settle_header(&mut bytes);
        bytes
    };
    payload.chunks(size).enumerate().map(fragment).collect()
}

/// The packet that a receiver makes of fragments, whose headers must differ in what fragments differ in, no more.
///
/// # Errors
///
/// What is wrong with them.
pub fn reassemble(fragments: &[Vec<u8>]) -> Result<Vec<u8>, String> {
    let mut packet = Vec::new();
    let mut common = None;
    for bytes in fragments {
        let v6 = bytes[12] == 0x86;
        let mut header = bytes[..PAYLOAD[usize::from(v6)]].to_vec();
        let mut rest = &bytes[header.len()..];
        let at = if v6 {
            if header[20] != FRAGMENT {
                return Err("no fragment header".into());
            }
            header[20] = rest[0];
            let at = u16::from_be_bytes([rest[2], rest[3]]) & 0xfff8;
            rest = &rest[FRAGMENT_HEADER..];
            usize::from(at)
        } else {
            let checksum = Ipv4HeaderSlice::from_slice(&header[14..]).map_err(|e| e.to_string())?;
            if checksum.to_header().calc_header_checksum() != checksum.header_checksum() {
                return Err("IPv4 header checksum of a fragment".into());
            }
            let at = u16::from_be_bytes([header[20], header[21]]) & 0x1fff;
            header[20..22].fill(0);
            usize::from(at) * 8
        };
        if packet.is_empty() {
            packet.extend(&header);
        }
        if packet.len() != header.len() + at {
            return Err(format!("a fragment at {at}"));
        }
        packet.extend(rest);
        settle_header(&mut header);
        if *common.get_or_insert_with(|| header.clone()) != header {
            return Err(format!("headers of fragments differ: {common:02x?} and {header:02x?}"));
        }
    }
    settle_header(&mut packet);
    Ok(packet)
}

/// Sets length and checksum of the IP header to what is behind it.
fn settle_header(packet: &mut [u8]) {
    let v6 = packet[12] == 0x86;
    let len = u16::try_from(packet.len() - if v6 { 54 } else { 14 }).expect("a packet");
    let at = if v6 { 18 } else { 16 };
    packet[at..at + 2].copy_from_slice(&len.to_be_bytes());
    if !v6 {
        let header = Ipv4HeaderSlice::from_slice(&packet[14..34]).expect("an IPv4 header").to_header();
        packet[24..26].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
    }
}

/// What a reader makes of a packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Seen {
    Tcp {
        src: SocketAddr,
        dst: SocketAddr,
        flags: u8,
        seq: u32,
        ack: u32,
        ttl: u8,
        payload: Vec<u8>,
    },
    Udp {
        src: SocketAddr,
        dst: SocketAddr,
        ttl: u8,
        payload: Vec<u8>,
    },
    /// `kind`: of the first chunk.
    Sctp {
        src: SocketAddr,
        dst: SocketAddr,
        kind: u8,
        ttl: u8,
        payload: Vec<u8>,
    },
    /// An ICMP or ICMPv6 error; `about`: source and destination of the quoted packet.
    Icmp {
        src: IpAddr,
        dst: IpAddr,
        kind: u8,
        code: u8,
        about: (SocketAddr, SocketAddr),
    },
}

impl Seen {
    /// Source and destination.
    pub fn ends(&self) -> (SocketAddr, SocketAddr) {
        match self {
            Self::Tcp { src, dst, .. } | Self::Udp { src, dst, .. } | Self::Sctp { src, dst, .. } => {
                (*src, *dst)
            }
            Self::Icmp { src, dst, .. } => (SocketAddr::new(*src, 0), SocketAddr::new(*dst, 0)),
        }
    }

    /// TTL or hop limit.
    pub fn ttl(&self) -> Option<u8> {
        match self {
            Self::Tcp { ttl, .. } | Self::Udp { ttl, .. } | Self::Sctp { ttl, .. } => Some(*ttl),
            Self::Icmp { .. } => None,
        }
    }
}

/// Reads a packet and checks every length and checksum in it.
///
/// # Errors
///
/// What is wrong with it.
pub fn read(bytes: &[u8]) -> Result<Seen, String> {
    let headers = PacketHeaders::from_ethernet_slice(bytes).map_err(|e| e.to_string())?;
    let (src, dst, ttl, len) = match &headers.net {
        Some(NetHeaders::Ipv4(ip, _)) => {
            if ip.calc_header_checksum() != ip.header_checksum {
                return Err(format!("IPv4 header checksum {:#06x}", ip.header_checksum));
            }
            (ip.source.into(), ip.destination.into(), ip.time_to_live, usize::from(ip.total_len))
        }
        Some(NetHeaders::Ipv6(ip, _)) => {
            let len = usize::from(ip.payload_length) + 40;
            (IpAddr::from(ip.source), IpAddr::from(ip.destination), ip.hop_limit, len)
        }
        _ => return Err("no IP".into()),
    };
    if len + 14 != bytes.len() {
        return Err(format!("{len} bytes of IP in a frame of {}", bytes.len()));
    }
    let payload = headers.payload.slice();
    let net = headers.net.as_ref().ok_or("no IP")?;
    match &headers.transport {
        Some(TransportHeader::Tcp(tcp)) => {
            let want = match net {
                NetHeaders::Ipv4(ip, _) => tcp.calc_checksum_ipv4(ip, payload),
                NetHeaders::Ipv6(ip, _) => tcp.calc_checksum_ipv6(ip, payload),
                NetHeaders::Arp(_) => return Err("ARP".into()),
            };
            if want != Ok(tcp.checksum) {
                return Err(format!("TCP checksum {:#06x}, want {want:?}", tcp.checksum));
            }
            let flag = |set: bool, bit: u8| if set { bit } else { 0 };
            Ok(Seen::Tcp {
                src: SocketAddr::new(src, tcp.source_port),
                dst: SocketAddr::new(dst, tcp.destination_port),
                flags: flag(tcp.fin, tcp_flags::FIN)
                    | flag(tcp.syn, tcp_flags::SYN)
                    | flag(tcp.rst, tcp_flags::RST)
                    | flag(tcp.ack, tcp_flags::ACK),
                seq: tcp.sequence_number,
                ack: tcp.acknowledgment_number,
                ttl,
                payload: payload.to_vec(),
            })
        }
        Some(TransportHeader::Udp(udp)) => {
            let want = match net {
                NetHeaders::Ipv4(ip, _) => udp.calc_checksum_ipv4(ip, payload),
                NetHeaders::Ipv6(ip, _) => udp.calc_checksum_ipv6(ip, payload),
                NetHeaders::Arp(_) => return Err("ARP".into()),
            };
            let none = udp.checksum == 0 && src.is_ipv4();
            if !none && want != Ok(udp.checksum) {
                return Err(format!("UDP checksum {:#06x}, want {want:?}", udp.checksum));
            }
            Ok(Seen::Udp {
                src: SocketAddr::new(src, udp.source_port),
                dst: SocketAddr::new(dst, udp.destination_port),
                ttl,
                payload: payload.to_vec(),
            })
        }
        Some(TransportHeader::Icmpv4(icmp)) => {
            if icmp.icmp_type.calc_checksum(payload) != icmp.checksum {
                return Err(format!("ICMP checksum {:#06x}", icmp.checksum));
            }
            let [kind, code, ..] = icmp.to_bytes()[..] else { return Err("ICMP header".into()) };
            Ok(Seen::Icmp { src, dst, kind, code, about: quoted(payload)? })
        }
        Some(TransportHeader::Icmpv6(icmp)) => {
            let NetHeaders::Ipv6(ip, _) = net else { return Err("ICMPv6 in IPv4".into()) };
            let want = icmp.icmp_type.calc_checksum(ip.source, ip.destination, payload);
            if want != Ok(icmp.checksum) {
                return Err(format!("ICMPv6 checksum {:#06x}", icmp.checksum));
            }
            let [kind, code, ..] = icmp.to_bytes()[..] else { return Err("ICMPv6 header".into()) };
            Ok(Seen::Icmp { src, dst, kind, code, about: quoted(payload)? })
        }
        _ => match headers.payload {
            PayloadSlice::Ip(ip) if ip.ip_number == IpNumber::SCTP => read_sctp(src, dst, ttl, ip.payload),
            _ => Err("no transport header".into()),
        },
    }
}

fn read_sctp(src: IpAddr, dst: IpAddr, ttl: u8, packet: &[u8]) -> Result<Seen, String> {
    let (Some((header, [kind, payload @ ..])), mut covered) =
        (packet.split_first_chunk::<12>(), packet.to_vec())
    else {
        return Err(format!("{} bytes of SCTP", packet.len()));
    };
    let [a, b, c, d, .., check0, check1, check2, check3] = *header;
    covered[8..12].fill(0);
    let check = u32::from_le_bytes([check0, check1, check2, check3]);
    let want = crc32c::compute(&covered);
    if check != want {
        return Err(format!("SCTP checksum {check:#010x}, want {want:#010x}"));
    }
    Ok(Seen::Sctp {
        src: SocketAddr::new(src, u16::from_be_bytes([a, b])),
        dst: SocketAddr::new(dst, u16::from_be_bytes([c, d])),
        kind: *kind,
        ttl,
        payload: payload.to_vec(),
    })
}

/// Source and destination of the packet an ICMP error quotes; it ends after the ports.
fn quoted(payload: &[u8]) -> Result<(SocketAddr, SocketAddr), String> {
    let headers = LaxPacketHeaders::from_ip(payload).map_err(|e| e.to_string())?;
    let (src, dst, header): (IpAddr, IpAddr, usize) = match &headers.net {
        Some(NetHeaders::Ipv4(ip, _)) => (ip.source.into(), ip.destination.into(), 20),
        Some(NetHeaders::Ipv6(ip, _)) => (ip.source.into(), ip.destination.into(), 40),
        _ => return Err("no quoted IP".into()),
    };
    let Some([a, b, c, d]) = payload.get(header..header + 4) else { return Err("no quoted ports".into()) };
    Ok((
        SocketAddr::new(src, u16::from_be_bytes([*a, *b])),
        SocketAddr::new(dst, u16::from_be_bytes([*c, *d])),
    ))
}
