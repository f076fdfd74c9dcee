//! IPv4 and IPv6: everything in which they differ. The pipeline itself is written once.

use core::fmt::Debug;
use core::hash::Hash;
use core::mem::offset_of;

use crate::abi::{Addr4, Addr6, Edge, FlowKey};
use crate::checksum::{self, Diff};
use crate::packet::{NETWORK, Packet};
use crate::parse::Parsed;
use crate::reason::Reason;
use crate::wire::{
    Be16, Be32, EtherType, IcmpHdr, IpProto, Ipv4Hdr, Ipv6ExtHdr, Ipv6FragHdr, Ipv6Hdr, Quote, Wire,
};
use crate::word;

/// An IP family.
pub trait Family: Copy + Eq + Debug + 'static {
    /// An address as it stands in a packet.
    type Addr: Wire + Eq + Ord + Hash + Default + Debug;
    /// The part of a packet that an ICMP error quotes: the IP header and the 8 bytes behind it.
    type Quote: Wire;

    /// In host byte order.
    const ETHER_TYPE: u16;
    /// `AF_INET` or `AF_INET6`.
    const ADDRESS_FAMILY: u8;
    /// Bytes of the IP header without options or extension headers.
    const HEADER_LEN: usize;
    /// Protocol number of the family's ICMP.
    const ICMP: u8;
    /// ICMP type and code: port unreachable.
    const PORT_UNREACHABLE: (u8, u8);
    /// ICMP type and code: TTL or hop limit exceeded in transit.
    const TIME_EXCEEDED: (u8, u8);
    /// ICMP type and code: fragmentation needed, or packet too big.
    const TOO_BIG: (u8, u8);

    /// How long the first fragment of a datagram is remembered, ns: as long as a receiver waits for the others.
    const FRAGMENT_TIMEOUT: u64;

    /// The protocol that stands right behind an IP header without options; 0: none does.
    fn protocol<P: Packet>(packet: &P) -> u8;

    /// Checks the IP header and finds the transport header: fills the addresses, protocol and offsets of `parsed`.
    fn parse<P: Packet>(packet: &P, parsed: &mut Parsed<Self>) -> Result<(), Reason>;

    /// Writes new addresses into the IP header, and with `forward` takes one from TTL or hop limit.
    /// `addresses` is what the addresses change in a sum.
    ///
    /// Both addresses stand in a key or in a flow: they are read by whole words, and the stack has to be aligned for that.
    fn readdress<P: Packet>(
        packet: &mut P,
        src: &Self::Addr,
        dst: &Self::Addr,
        addresses: Diff,
        forward: bool,
    ) -> Result<(), Reason>;

    /// Writes a fresh IP header without options for a packet of ours.
    fn write_header<P: Packet>(
        packet: &mut P,
        src: &Self::Addr,
        dst: &Self::Addr,
        proto: u8,
        payload: u16,
    ) -> Result<(), Reason>;

    /// Whether an ICMP message of this type reports an error about a packet, which it then quotes.
    fn is_icmp_error(kind: u8) -> bool;

    /// Reads the IP header that an ICMP error quotes at a byte offset, turned around: `key` gets the addresses and the
    /// protocol that a packet on the error's own way would have.
    fn parse_quote<P: Packet>(packet: &P, at: usize, key: &mut FlowKey<Self::Addr>) -> Result<(), Reason>;

    /// Writes new addresses into a quoted IP header; `addresses` is what they change in a sum. Returns what all of the
    /// header changes in one: its own checksum makes up for the rest.
    fn readdress_quote<P: Packet>(
        packet: &mut P,
        at: usize,
        src: &Self::Addr,
        dst: &Self::Addr,
        addresses: Diff,
    ) -> Result<Diff, Reason>;

    /// The part of `addresses` that an ICMP checksum covers.
    fn icmp_pseudo_change(addresses: Diff) -> Diff;

    /// The rest-of-header field of a "too big" message.
    fn too_big_rest(mtu: u32) -> u32;

    /// Whether a packet that is too long may be answered with "too big": not without `DF` on IPv4.
    fn wants_too_big<P: Packet>(packet: &P) -> Result<bool, Reason>;

    /// Whether ICMP messages of this type may be refused: not errors, which are never answered with errors and which
    /// somebody may wait for, nor what neighbours tell each other (RFC 1122 section 3.2.2, RFC 4443 section 2.4).
    fn may_refuse(kind: u8) -> bool;

    /// Whether an address can be one host's on the wire.
    fn is_host(addr: &Self::Addr) -> bool;

    /// Sum of the pseudo-header's words that an ICMP message of this family covers.
    fn icmp_pseudo(src: &Self::Addr, dst: &Self::Addr, len: u16) -> u32;

    /// The address as an IPv6 address: IPv4-mapped if it is IPv4 (RFC 4291, section 2.5.5.2).
    fn to_mapped(addr: &Self::Addr) -> Addr6;

    /// The inverse of [`Family::to_mapped`] for addresses that came from it.
    fn from_mapped(addr: &Addr6) -> Self::Addr;

    /// The address of an external edge; unspecified if it has none of this family.
    fn edge_addr(edge: &Edge) -> Self::Addr;

    /// How many further addresses of an external edge may be sources.
    fn edge_sources(edge: &Edge) -> u16;

    /// Whether an address is of a network.
    fn is_within(addr: &Self::Addr, network: &Self::Addr, mask: &Self::Addr) -> bool;

    /// An address as a number, of which neighbours have neighbours, the halves of a long one as one: for hashes that stay on this
    /// machine.
    fn folded(addr: &Self::Addr) -> u64;

    /// Length of the prefix that all addresses of a neighbourhood share: a ServiceCIDR has few of these, and most other
    /// addresses are of none that it has.
    const NEIGHBOURHOOD: u8;

    /// [`Family::folded`] of the first address of an address' neighbourhood.
    fn neighbourhood(addr: &Self::Addr) -> u64;

    /// Sum of an address' words.
    #[inline(always)]
    fn sum(addr: &Self::Addr) -> u32 {
        checksum::sum_of(addr)
    }

    /// Sum of the words of a TCP, UDP or ICMPv6 pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1).
    #[inline(always)]
    fn pseudo(src: &Self::Addr, dst: &Self::Addr, proto: u8, len: u16) -> u32 {
        Self::sum(src)
            + Self::sum(dst)
            + u32::from(Be16::new(u16::from(proto)).raw())
            + u32::from(Be16::new(len).raw())
    }
}

/// IPv4.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct V4;

/// IPv6.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct V6;

/// TTL and hop limit of packets of our own.
const OWN_TTL: u8 = 64;

/// Extension headers we walk at most; the kernel's own limit for options is of that order.
const MAX_EXTENSION_HEADERS: usize = 4;
/// Where a transport header behind extension headers may start at the latest; a fragment header may come on top.
pub const MAX_TRANSPORT: usize = 512;

impl Family for V4 {
    type Addr = Addr4;
    type Quote = Quote<14>;

    const ETHER_TYPE: u16 = u16::from_be(EtherType::Ipv4 as u16);
    const ADDRESS_FAMILY: u8 = 2;
    const HEADER_LEN: usize = Ipv4Hdr::LEN;
    const ICMP: u8 = IpProto::Icmp as u8;
    const PORT_UNREACHABLE: (u8, u8) = (3, 3);
    const TIME_EXCEEDED: (u8, u8) = (11, 0);
    const TOO_BIG: (u8, u8) = (3, 4);
    /// `net.ipv4.ipfrag_time`.
    const FRAGMENT_TIMEOUT: u64 = 30_000_000_000;

    #[inline(always)]
    fn protocol<P: Packet>(packet: &P) -> u8 {
        let plain = |ip: &Ipv4Hdr| if ip.version_ihl == Ipv4Hdr::VERSION_IHL { ip.proto } else { 0 };
        packet.view::<Ipv4Hdr>(NETWORK).map_or(0, plain)
    }

    #[inline(always)]
    fn parse<P: Packet>(packet: &P, parsed: &mut Parsed<Self>) -> Result<(), Reason> {
        let ip = packet.view::<Ipv4Hdr>(NETWORK)?;
        if ip.version_ihl != Ipv4Hdr::VERSION_IHL {
            return Err(match ip.version_ihl {
                0x46..=0x4f => Reason::IpOptions,
                0x40..=0x44 => Reason::Truncated,
                _ => Reason::NotIp,
            });
        }
        let room = packet.size().wrapping_sub(NETWORK as u32);
        let mut len = u32::from(ip.total_len.get());
        if len == 0 && room > u32::from(u16::MAX) {
            // A TCP segment larger than the field can say (BIG TCP, kernel commit b1a78b9b9886).
            len = room;
        }
        if len > room {
            return Err(Reason::Truncated);
        }
        parsed.fragment = ip.fragment.get() & (Ipv4Hdr::MORE_FRAGMENTS | Ipv4Hdr::FRAGMENT_OFFSET);
        parsed.id = u32::from(ip.id.get());
        parsed.id_proto = ip.proto;
        parsed.ip_len = len;
        parsed.transport = (NETWORK + Ipv4Hdr::LEN) as u16;
        parsed.ttl = ip.ttl;
        parsed.key.set_addresses([word::load64::<_, { offset_of!(Ipv4Hdr, src) }>(ip)]);
        parsed.key.proto = ip.proto;
        Ok(())
    }

    #[inline(always)]
    fn readdress<P: Packet>(
        packet: &mut P,
        src: &Addr4,
        dst: &Addr4,
        addresses: Diff,
        forward: bool,
    ) -> Result<(), Reason> {
        let ip = packet.view_mut::<Ipv4Hdr>(NETWORK)?;
        let mut diff = addresses;
        if forward {
            let word = |ttl| u32::from(u16::from_ne_bytes([ttl, ip.proto]));
            diff = diff.and(Diff::between(word(ip.ttl), word(ip.ttl.wrapping_sub(1))));
            ip.ttl = ip.ttl.wrapping_sub(1);
        }
        word::store32::<_, { offset_of!(Ipv4Hdr, src) }>(ip, word::load32::<_, 0>(src));
        word::store32::<_, { offset_of!(Ipv4Hdr, dst) }>(ip, word::load32::<_, 0>(dst));
        ip.check = Be16::from_raw(diff.apply(ip.check.raw()));
        Ok(())
    }

    #[inline(always)]
    fn write_header<P: Packet>(
        packet: &mut P,
        src: &Addr4,
        dst: &Addr4,
        proto: u8,
        payload: u16,
    ) -> Result<(), Reason> {
        let mut ip = Ipv4Hdr {
            version_ihl: Ipv4Hdr::VERSION_IHL,
            tos: 0,
            total_len: Be16::new(payload.wrapping_add(Ipv4Hdr::LEN as u16)),
            id: Be16::new(0),
            fragment: Be16::new(Ipv4Hdr::DONT_FRAGMENT),
            ttl: OWN_TTL,
            proto,
            check: Be16::new(0),
            src: *src,
            dst: *dst,
        };
        ip.check = Be16::from_raw(checksum::finish(checksum::sum_of(&ip)));
        *packet.view_mut::<Ipv4Hdr>(NETWORK)? = ip;
        Ok(())
    }

    /// Destination unreachable, time exceeded, parameter problem (RFC 792). A redirect is the router's word to its
    /// neighbour, and source quench is dead (RFC 6633).
    #[inline(always)]
    fn is_icmp_error(kind: u8) -> bool {
        matches!(kind, 3 | 11 | 12)
    }

    #[inline(always)]
    fn parse_quote<P: Packet>(packet: &P, at: usize, key: &mut FlowKey<Addr4>) -> Result<(), Reason> {
        let ip = packet.view::<Ipv4Hdr>(at)?;
        if ip.version_ihl != Ipv4Hdr::VERSION_IHL {
            return Err(Reason::IpOptions);
        }
        if ip.fragment.get() & Ipv4Hdr::FRAGMENT_OFFSET != 0 {
            return Err(Reason::Fragment);
        }
        (key.src, key.dst, key.proto) = (ip.dst, ip.src, ip.proto);
        Ok(())
    }

    #[inline(always)]
    fn readdress_quote<P: Packet>(
        packet: &mut P,
        at: usize,
        src: &Addr4,
        dst: &Addr4,
        addresses: Diff,
    ) -> Result<Diff, Reason> {
        let ip = packet.view_mut::<Ipv4Hdr>(at)?;
        let old = ip.check.raw();
        let new = addresses.apply(old);
        ip.src = *src;
        ip.dst = *dst;
        ip.check = Be16::from_raw(new);
        Ok(addresses.and(Diff::between(u32::from(old), u32::from(new))))
    }

    #[inline(always)]
    fn icmp_pseudo_change(_addresses: Diff) -> Diff {
        Diff::NONE
    }

    #[inline(always)]
    fn too_big_rest(mtu: u32) -> u32 {
        mtu & 0xffff
    }

    #[inline(always)]
    fn wants_too_big<P: Packet>(packet: &P) -> Result<bool, Reason> {
        Ok(packet.view::<Ipv4Hdr>(NETWORK)?.fragment.get() & Ipv4Hdr::DONT_FRAGMENT != 0)
    }

    #[inline(always)]
    fn may_refuse(kind: u8) -> bool {
        !matches!(kind, 3 | 4 | 5 | 11 | 12)
    }

    /// Not of "this network", loopback, multicast, or what was class E, broadcast among it (RFC 1122, section 3.2.1.3).
    #[inline(always)]
    fn is_host(addr: &Addr4) -> bool {
        !matches!(addr.octets[0], 0 | 127 | 224..)
    }

    #[inline(always)]
    fn icmp_pseudo(_src: &Addr4, _dst: &Addr4, _len: u16) -> u32 {
        0
    }

    #[inline(always)]
    fn is_within(addr: &Addr4, network: &Addr4, mask: &Addr4) -> bool {
        let bits = |addr: &Addr4| u32::from_ne_bytes(addr.octets);
        (bits(addr) ^ bits(network)) & bits(mask) == 0
    }

    #[inline(always)]
    fn folded(addr: &Addr4) -> u64 {
        u32::from_be_bytes(addr.octets).into()
    }

    const NEIGHBOURHOOD: u8 = 16;

    #[inline(always)]
    fn neighbourhood(addr: &Addr4) -> u64 {
        Self::folded(addr) & 0xffff_0000
    }

    #[inline(always)]
    fn edge_addr(edge: &Edge) -> Addr4 {
        edge.addr4
    }

    #[inline(always)]
    fn edge_sources(edge: &Edge) -> u16 {
        edge.sources4
    }

    #[inline(always)]
    fn to_mapped(addr: &Addr4) -> Addr6 {
        let [a, b, c, d] = addr.octets;
        Addr6 { octets: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] }
    }

    #[inline(always)]
    fn from_mapped(addr: &Addr6) -> Addr4 {
        let [.., a, b, c, d] = addr.octets;
        Addr4 { octets: [a, b, c, d] }
    }
}

impl Family for V6 {
    type Addr = Addr6;
    type Quote = Quote<24>;

    const ETHER_TYPE: u16 = u16::from_be(EtherType::Ipv6 as u16);
    const ADDRESS_FAMILY: u8 = 10;
    const HEADER_LEN: usize = Ipv6Hdr::LEN;
    const ICMP: u8 = IpProto::Ipv6Icmp as u8;
    const PORT_UNREACHABLE: (u8, u8) = (1, 4);
    const TIME_EXCEEDED: (u8, u8) = (3, 0);
    const TOO_BIG: (u8, u8) = (2, 0);
    /// `net.ipv6.ip6frag_time`.
    const FRAGMENT_TIMEOUT: u64 = 60_000_000_000;

    #[inline(always)]
    fn protocol<P: Packet>(packet: &P) -> u8 {
        packet.view::<Ipv6Hdr>(NETWORK).map_or(0, |ip| ip.next_header)
    }

    #[inline(always)]
    fn parse<P: Packet>(packet: &P, parsed: &mut Parsed<Self>) -> Result<(), Reason> {
        let ip = packet.view::<Ipv6Hdr>(NETWORK)?;
        if ip.version_class_flow.get() >> 28 != 6 {
            return Err(Reason::NotIp);
        }
        let room = packet.size().wrapping_sub(NETWORK as u32);
        let len = u32::from(ip.payload_len.get()) + Ipv6Hdr::LEN as u32;
        if len > room {
            return Err(Reason::Truncated);
        }
        let mut next = ip.next_header;
        parsed.ip_len = len;
        parsed.ttl = ip.hop_limit;
        parsed.key.set_addresses([
            word::load64::<_, { offset_of!(Ipv6Hdr, src) }>(ip),
            word::load64::<_, { offset_of!(Ipv6Hdr, src) + 8 }>(ip),
            word::load64::<_, { offset_of!(Ipv6Hdr, dst) }>(ip),
            word::load64::<_, { offset_of!(Ipv6Hdr, dst) + 8 }>(ip),
        ]);

        let mut transport = NETWORK + Ipv6Hdr::LEN;
        for _ in 0..MAX_EXTENSION_HEADERS {
            if !is_walkable(next) {
                break;
            }
            if transport > MAX_TRANSPORT {
                return Err(Reason::ExtensionHeader);
            }
            let header = packet.view::<Ipv6ExtHdr>(transport)?;
            if next == IpProto::Ipv6Route as u8 && header.segments_left != 0 {
                // The destination in the header is not the last one: whose connection this is, only that one knows.
                return Err(Reason::ExtensionHeader);
            }
            next = header.next_header;
            transport += 8 + 8 * header.len as usize;
        }
        if transport > MAX_TRANSPORT {
            return Err(Reason::ExtensionHeader);
        }
        if next == IpProto::Ipv6Frag as u8 {
            // What stands behind it is walked no further: fragments have their options in front, if any.
            let fragment = packet.view::<Ipv6FragHdr>(transport)?;
            next = fragment.next_header;
            transport += Ipv6FragHdr::LEN;
            parsed.fragment = fragment.piece();
            parsed.id = fragment.id.get();
        }
        parsed.transport = transport as u16;
        parsed.key.proto = next;
        if parsed.is_later_fragment() {
            return Ok(());
        }
        if is_walkable(next) || next == IpProto::Ipv6Frag as u8 {
            return Err(Reason::ExtensionHeader);
        }
        Ok(())
    }

    #[inline(always)]
    fn readdress<P: Packet>(
        packet: &mut P,
        src: &Addr6,
        dst: &Addr6,
        _addresses: Diff,
        forward: bool,
    ) -> Result<(), Reason> {
        let ip = packet.view_mut::<Ipv6Hdr>(NETWORK)?;
        if forward {
            ip.hop_limit = ip.hop_limit.wrapping_sub(1);
        }
        word::store64::<_, { offset_of!(Ipv6Hdr, src) }>(ip, word::load64::<_, 0>(src));
        word::store64::<_, { offset_of!(Ipv6Hdr, src) + 8 }>(ip, word::load64::<_, 8>(src));
        word::store64::<_, { offset_of!(Ipv6Hdr, dst) }>(ip, word::load64::<_, 0>(dst));
        word::store64::<_, { offset_of!(Ipv6Hdr, dst) + 8 }>(ip, word::load64::<_, 8>(dst));
        Ok(())
    }

    #[inline(always)]
    fn write_header<P: Packet>(
        packet: &mut P,
        src: &Addr6,
        dst: &Addr6,
        proto: u8,
        payload: u16,
    ) -> Result<(), Reason> {
        *packet.view_mut::<Ipv6Hdr>(NETWORK)? = Ipv6Hdr {
            version_class_flow: Be32::new(6 << 28),
            payload_len: Be16::new(payload),
            next_header: proto,
            hop_limit: OWN_TTL,
            src: *src,
            dst: *dst,
        };
        Ok(())
    }

    /// Below 128 (RFC 4443, section 2.1).
    #[inline(always)]
    fn is_icmp_error(kind: u8) -> bool {
        matches!(kind, 1..=4)
    }

    #[inline(always)]
    fn parse_quote<P: Packet>(packet: &P, at: usize, key: &mut FlowKey<Addr6>) -> Result<(), Reason> {
        let ip = packet.view::<Ipv6Hdr>(at)?;
        if ip.version_class_flow.get() >> 28 != 6 {
            return Err(Reason::Truncated);
        }
        (key.src, key.dst, key.proto) = (ip.dst, ip.src, ip.next_header);
        Ok(())
    }

    #[inline(always)]
    fn readdress_quote<P: Packet>(
        packet: &mut P,
        at: usize,
        src: &Addr6,
        dst: &Addr6,
        addresses: Diff,
    ) -> Result<Diff, Reason> {
        let ip = packet.view_mut::<Ipv6Hdr>(at)?;
        ip.src = *src;
        ip.dst = *dst;
        Ok(addresses)
    }

    #[inline(always)]
    fn icmp_pseudo_change(addresses: Diff) -> Diff {
        addresses
    }

    #[inline(always)]
    fn too_big_rest(mtu: u32) -> u32 {
        mtu
    }

    #[inline(always)]
    fn wants_too_big<P: Packet>(_packet: &P) -> Result<bool, Reason> {
        Ok(true)
    }

    #[inline(always)]
    fn may_refuse(kind: u8) -> bool {
        kind >= 128 && !matches!(kind, 133..=137)
    }

    /// Not multicast, nor of `::/16`: unspecified, loopback, and IPv4 addresses that are written as IPv6 (RFC 4291,
    /// sections 2.5 and 2.7).
    #[inline(always)]
    fn is_host(addr: &Addr6) -> bool {
        addr.octets[0] != 0xff && (addr.octets[0] | addr.octets[1]) != 0
    }

    #[inline(always)]
    fn icmp_pseudo(src: &Addr6, dst: &Addr6, len: u16) -> u32 {
        Self::pseudo(src, dst, Self::ICMP, len)
    }

    #[inline(always)]
    fn is_within(addr: &Addr6, network: &Addr6, mask: &Addr6) -> bool {
        let mut differ = 0;
        let mut i = 0;
        checksum::for_words(addr, |word| {
            let at = |addr: &Addr6| u16::from_ne_bytes([addr.octets[i], addr.octets[i + 1]]);
            differ |= (word ^ at(network)) & at(mask);
            i += 2;
        });
        differ == 0
    }

    #[inline(always)]
    fn folded(addr: &Addr6) -> u64 {
        let all = u128::from_be_bytes(addr.octets);
        ((all >> 64) as u64).rotate_left(29) ^ all as u64
    }

    const NEIGHBOURHOOD: u8 = 64;

    #[inline(always)]
    fn neighbourhood(addr: &Addr6) -> u64 {
        ((u128::from_be_bytes(addr.octets) >> 64) as u64).rotate_left(29)
    }

    #[inline(always)]
    fn edge_addr(edge: &Edge) -> Addr6 {
        edge.addr6
    }

    #[inline(always)]
    fn edge_sources(edge: &Edge) -> u16 {
        edge.sources6
    }

    #[inline(always)]
    fn to_mapped(addr: &Addr6) -> Addr6 {
        *addr
    }

    #[inline(always)]
    fn from_mapped(addr: &Addr6) -> Addr6 {
        *addr
    }
}

/// Extension headers with the common format (RFC 6564) that say nothing about who talks to whom.
#[inline(always)]
const fn is_walkable(next: u8) -> bool {
    next == IpProto::HopOpt as u8 || next == IpProto::Ipv6Opts as u8 || next == IpProto::Ipv6Route as u8
}

/// Bytes of an ICMP error with its quote, without the IP header.
#[inline(always)]
pub const fn icmp_error_len<F: Family>() -> u16 {
    (IcmpHdr::LEN + size_of::<F::Quote>()) as u16
}
