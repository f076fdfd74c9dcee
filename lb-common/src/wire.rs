//! Protocol headers as they stand in a packet.
//!
//! `network-types` describes the same headers with an alignment of 1, which costs a byte-wise load for
//! every field on the BPF target. Packet headers always start at an even address (the link layer is 14
//! bytes, VLAN tags 4, IPv4 headers and options multiples of 4, IPv6 extension headers of 8), so these views
//! have an alignment of 2; tests compare every size and offset with `network-types`.

use core::mem::size_of;

pub use network_types::eth::EtherType;
pub use network_types::ip::IpProto;

use crate::abi::{Addr4, Addr6};

/// A type that can be looked at in place in a packet.
///
/// # Safety
///
/// `repr(C)` or transparent, an alignment of 2, no padding, no invalid bit patterns.
pub unsafe trait Wire: Copy + 'static {}

/// A 16-bit number in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Be16(u16);

impl Be16 {
    /// From a number in host byte order.
    #[inline(always)]
    pub const fn new(value: u16) -> Self {
        Self(value.to_be())
    }

    /// The number in host byte order.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }

    /// The number as it lies in memory, for checksums: a one's complement sum does not mind the byte order
    /// as long as all words have the same (RFC 1071, section 2 B).
    #[inline(always)]
    pub const fn raw(self) -> u16 {
        self.0
    }

    /// The inverse of [`Be16::raw`].
    #[inline(always)]
    pub const fn from_raw(raw: u16) -> Self {
        Self(raw)
    }
}

/// A 32-bit number in network byte order.
#[repr(C, align(2))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Be32 {
    octets: [u8; 4],
}

impl Be32 {
    /// From a number in host byte order.
    #[inline(always)]
    pub const fn new(value: u32) -> Self {
        Self { octets: value.to_be_bytes() }
    }

    /// The number in host byte order.
    #[inline(always)]
    pub const fn get(self) -> u32 {
        u32::from_be_bytes(self.octets)
    }
}

/// A 32-bit number in little-endian byte order: the one there is in a packet is SCTP's checksum.
#[repr(C, align(2))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Le32 {
    octets: [u8; 4],
}

impl Le32 {
    /// From a number in host byte order.
    #[inline(always)]
    pub const fn new(value: u32) -> Self {
        Self { octets: value.to_le_bytes() }
    }

    /// The number in host byte order.
    #[inline(always)]
    pub const fn get(self) -> u32 {
        u32::from_le_bytes(self.octets)
    }
}

/// An Ethernet address.
#[repr(C, align(2))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Mac {
    pub octets: [u8; 6],
}

impl Mac {
    /// What all addresses of groups have in their [`Self::number`], that of everybody among them.
    pub const GROUP: u64 = 1;

    /// As a number, which is compared at once.
    #[inline(always)]
    pub const fn number(self) -> u64 {
        let [a0, a1, b0, b1, c0, c1] = self.octets;
        u64::from_le_bytes([a0, a1, b0, b1, c0, c1, 0, 0])
    }
}

/// Ethernet header.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EthHdr {
    pub dst: Mac,
    pub src: Mac,
    pub ether_type: Be16,
}

impl EthHdr {
    /// Bytes.
    pub const LEN: usize = size_of::<Self>();
}

/// IPv4 header without options (RFC 791).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ipv4Hdr {
    pub version_ihl: u8,
    pub tos: u8,
    pub total_len: Be16,
    pub id: Be16,
    /// Flags and fragment offset.
    pub fragment: Be16,
    pub ttl: u8,
    pub proto: u8,
    pub check: Be16,
    pub src: Addr4,
    pub dst: Addr4,
}

impl Ipv4Hdr {
    /// Bytes.
    pub const LEN: usize = size_of::<Self>();
    /// Version 4 and no options.
    pub const VERSION_IHL: u8 = 0x45;
    /// In [`Ipv4Hdr::fragment`]: do not fragment.
    pub const DONT_FRAGMENT: u16 = 0x4000;
    /// In [`Ipv4Hdr::fragment`]: more fragments follow.
    pub const MORE_FRAGMENTS: u16 = 0x2000;
    /// In [`Ipv4Hdr::fragment`]: where the fragment belongs, in units of 8 octets.
    pub const FRAGMENT_OFFSET: u16 = 0x1fff;
}

/// IPv6 header (RFC 8200).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ipv6Hdr {
    pub version_class_flow: Be32,
    pub payload_len: Be16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub src: Addr6,
    pub dst: Addr6,
}

impl Ipv6Hdr {
    /// Bytes.
    pub const LEN: usize = size_of::<Self>();
}

/// Start of the IPv6 extension headers we walk (RFC 8200, section 4): hop-by-hop, destination options, routing.
#[repr(C, align(2))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ipv6ExtHdr {
    pub next_header: u8,
    /// Length in units of 8 octets, not counting the first 8.
    pub len: u8,
    /// Routing header: its type.
    pub routing_type: u8,
    /// Routing header: hops still to visit.
    pub segments_left: u8,
}

/// IPv6 fragment header (RFC 8200, section 4.5).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ipv6FragHdr {
    pub next_header: u8,
    pub reserved: u8,
    /// Offset, two reserved bits, and whether more fragments follow.
    pub fragment: Be16,
    pub id: Be32,
}

impl Ipv6FragHdr {
    /// Bytes.
    pub const LEN: usize = size_of::<Self>();

    /// Which part of its datagram the packet is, as IPv4 says it. One that is all of it gives 0: its header is as good
    /// as none (RFC 6946).
    #[inline(always)]
    pub const fn piece(&self) -> u16 {
        let fragment = self.fragment.get();
        (fragment >> 3) | ((fragment & 1) << 13)
    }
}

/// The ports, at the same place in TCP, UDP and SCTP.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ports {
    pub src: Be16,
    pub dst: Be16,
}

/// TCP header without options (RFC 9293).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TcpHdr {
    pub ports: Ports,
    pub seq: Be32,
    pub ack: Be32,
    /// Data offset in units of 4 octets, in the upper four bits.
    pub offset: u8,
    /// [`tcp_flags`].
    pub flags: u8,
    pub window: Be16,
    pub check: Be16,
    pub urgent: Be16,
}

impl TcpHdr {
    /// Bytes.
    pub const LEN: usize = size_of::<Self>();
}

/// Bits of [`TcpHdr::flags`].
pub mod tcp_flags {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const ACK: u8 = 0x10;
}

/// UDP header (RFC 768).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UdpHdr {
    pub ports: Ports,
    pub len: Be16,
    pub check: Be16,
}

impl UdpHdr {
    /// Bytes.
    pub const LEN: usize = size_of::<Self>();
}

/// Geneve header without options (RFC 8926, section 3.4).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GeneveHdr {
    /// Version, and length of the options in units of 4 octets.
    pub version_len: u8,
    pub flags: u8,
    /// Ethertype of what is inside.
    pub protocol: Be16,
    /// Virtual network identifier, in the upper 24 bits.
    pub vni: Be32,
}

impl GeneveHdr {
    /// Bytes.
    pub const LEN: usize = size_of::<Self>();
    /// In [`GeneveHdr::flags`]: there are options that must be understood.
    pub const CRITICAL: u8 = 0x40;
}

/// Start of a Geneve option (RFC 8926, section 3.5).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GeneveOptHdr {
    pub class: Be16,
    /// The highest bit: it must be understood.
    pub kind: u8,
    /// Length in units of 4 octets, this header not counted.
    pub len: u8,
}

/// SCTP common header (RFC 9260, section 3.1).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SctpHdr {
    pub ports: Ports,
    pub tag: Be32,
    /// CRC32c ([`crate::crc32c`]).
    pub check: Le32,
}

impl SctpHdr {
    /// Bytes.
    pub const LEN: usize = size_of::<Self>();
}

/// Start of each SCTP chunk (RFC 9260, section 3.2).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SctpChunkHdr {
    /// [`sctp_chunk`].
    pub kind: u8,
    pub flags: u8,
    pub len: Be16,
}

impl SctpChunkHdr {
    /// Bytes.
    pub const LEN: usize = size_of::<Self>();
}

/// Values of [`SctpChunkHdr::kind`]: those that begin and end an association. INIT, INIT ACK and SHUTDOWN COMPLETE are
/// alone in their packet (RFC 9260, section 6.10).
pub mod sctp_chunk {
    pub const INIT: u8 = 1;
    pub const INIT_ACK: u8 = 2;
    pub const ABORT: u8 = 6;
    pub const SHUTDOWN_COMPLETE: u8 = 14;
}

/// ICMP and ICMPv6 header (RFC 792, RFC 4443).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct IcmpHdr {
    pub kind: u8,
    pub code: u8,
    pub check: Be16,
    /// Unused, or the MTU.
    pub rest: Be32,
}

impl IcmpHdr {
    /// Bytes.
    pub const LEN: usize = size_of::<Self>();
}

/// The first bytes of a packet, quoted in an ICMP error: `N` 16-bit words.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quote<const N: usize> {
    pub words: [Be16; N],
}

macro_rules! wire {
    ($($type:ty),* $(,)?) => {
        $(
            const _: () = assert!(align_of::<$type>() == 2);
            // SAFETY: `repr(C)` or transparent, asserted alignment, fields without gaps that take any bits.
            unsafe impl Wire for $type {}
        )*
    };
}
wire!(
    Be16,
    Be32,
    Mac,
    EthHdr,
    Ipv4Hdr,
    Ipv6Hdr,
    Ipv6ExtHdr,
    Ipv6FragHdr,
    Ports,
    TcpHdr,
    UdpHdr,
    IcmpHdr,
    Addr4,
    Addr6,
    Le32,
    GeneveHdr,
    GeneveOptHdr,
    SctpHdr,
    SctpChunkHdr
);
wire!(Quote<14>, Quote<24>);

#[cfg(test)]
mod tests {
    use core::mem::{align_of, offset_of};

    use network_types::{eth, icmp, ip, tcp, udp};

    use super::*;

    macro_rules! same {
        ($ours:ty = $theirs:ty $(, $field:ident $($sub:ident)? = $other:ident)*) => {
            assert_eq!(size_of::<$ours>(), size_of::<$theirs>());
            assert_eq!(align_of::<$ours>(), 2);
            $(assert_eq!(
                offset_of!($ours, $field $(. $sub)?),
                offset_of!($theirs, $other),
                "{}.{}", stringify!($ours), stringify!($field),
            );)*
        };
    }

    #[test]
    fn headers_lie_where_network_types_has_them() {
        same!(EthHdr = eth::EthHdr, dst = dst_addr, src = src_addr, ether_type = ether_type);
        same!(
            Ipv4Hdr = ip::Ipv4Hdr,
            version_ihl = vihl,
            tos = tos,
            total_len = tot_len,
            id = id,
            fragment = frags,
            ttl = ttl,
            proto = proto,
            check = check,
            src = src_addr,
            dst = dst_addr
        );
        same!(
            Ipv6Hdr = ip::Ipv6Hdr,
            version_class_flow = vcf,
            payload_len = payload_len,
            next_header = next_hdr,
            hop_limit = hop_limit,
            src = src_addr,
            dst = dst_addr
        );
        same!(
            TcpHdr = tcp::TcpHdr,
            ports src = source,
            ports dst = dest,
            seq = seq,
            ack = ack_seq,
            window = window,
            check = check,
            urgent = urg_ptr
        );
        same!(UdpHdr = udp::UdpHdr, ports src = src, ports dst = dst, len = len, check = check);
        same!(IcmpHdr = icmp::Icmpv4Hdr, kind = type_, code = code, check = check, rest = data);
        same!(IcmpHdr = icmp::Icmpv6Hdr, kind = type_, code = code, check = check, rest = data);
    }

    #[test]
    fn tcp_flags_are_the_bits_network_types_reads() {
        let read = |flags: u8| {
            let mut bytes = [0u8; TcpHdr::LEN];
            bytes[offset_of!(TcpHdr, flags)] = flags;
            // SAFETY: both are 20 bytes, and `network_types` has an alignment of 1.
            unsafe { core::mem::transmute::<[u8; 20], tcp::TcpHdr>(bytes) }
        };
        assert_eq!((read(tcp_flags::FIN).fin(), read(tcp_flags::SYN).syn()), (1, 1));
        assert_eq!((read(tcp_flags::RST).rst(), read(tcp_flags::ACK).ack()), (1, 1));
    }
}
