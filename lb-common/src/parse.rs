//! From bytes to the five-tuple.

use core::mem::offset_of;

use crate::abi::{FlowKey, Side};
use crate::family::Family;
use crate::packet::{NETWORK, Packet};
use crate::reason::Reason;
use crate::wire::{IpProto, Ipv4Hdr, SctpChunkHdr, SctpHdr, TcpHdr, UdpHdr, sctp_chunk, tcp_flags};
use crate::word;

/// What the pipeline needs to know about a packet.
///
/// What is written together stands in the same 8 bytes: the verifier keeps the stack by these, and takes two states for
/// different if one has a word of which only a part was written. In another order the programs took three times as long to load.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parsed<F: Family> {
    pub key: FlowKey<F::Addr>,
    /// Length the IP header states, bytes, the header included.
    pub ip_len: u32,
    /// Offset of the transport header in the packet.
    pub transport: u16,
    /// Which part of its datagram the packet is, as IPv4 says it: [`Ipv4Hdr::MORE_FRAGMENTS`] and
    /// [`Ipv4Hdr::FRAGMENT_OFFSET`]. 0: all of it.
    ///
    /// Bits and no enum: a value that it knows makes the verifier walk everything behind it once for each.
    pub fragment: u16,
    /// TCP sequence number.
    pub seq: u32,
    /// TCP acknowledgement number; without ACK it says nothing.
    pub ack: u32,
    /// Identification of the datagram that a fragment is of.
    pub id: u32,
    /// TTL or hop limit.
    pub ttl: u8,
    /// TCP flags, or those that say of an SCTP association what its packet says; 0 for UDP.
    pub tcp_flags: u8,
    /// The protocol, as far as it is part of the identification of its datagram ([`crate::abi::FragmentKey::proto`]).
    pub id_proto: u8,
}

impl<F: Family> Default for Parsed<F> {
    #[inline(always)]
    fn default() -> Self {
        Self {
            key: FlowKey::default(),
            ip_len: 0,
            transport: 0,
            fragment: 0,
            seq: 0,
            ack: 0,
            id: 0,
            ttl: 0,
            tcp_flags: 0,
            id_proto: 0,
        }
    }
}

impl<F: Family> Parsed<F> {
    /// Bytes of the IP packet from the transport header on.
    #[inline(always)]
    pub const fn transport_len(&self) -> u32 {
        self.len_from(self.transport as usize)
    }

    /// Bytes of the IP packet from an offset in the frame on.
    #[inline(always)]
    pub const fn len_from(&self, at: usize) -> u32 {
        (self.ip_len + NETWORK as u32).saturating_sub(at as u32)
    }

    /// Whether the packet is TCP.
    #[inline(always)]
    pub const fn is_tcp(&self) -> bool {
        self.key.proto == IpProto::Tcp as u8
    }

    /// Whether the packet is UDP: nobody opens or closes its flows.
    #[inline(always)]
    pub const fn is_udp(&self) -> bool {
        self.key.proto == IpProto::Udp as u8
    }

    /// Whether the packet is SCTP.
    #[inline(always)]
    pub const fn is_sctp(&self) -> bool {
        self.key.proto == IpProto::Sctp as u8
    }

    /// Whether the packet is a fragment without transport header.
    #[inline(always)]
    pub const fn is_later_fragment(&self) -> bool {
        self.fragment & Ipv4Hdr::FRAGMENT_OFFSET != 0
    }

    /// Whether the packet is the fragment that has the transport header.
    #[inline(always)]
    pub const fn is_first_fragment(&self) -> bool {
        self.fragment == Ipv4Hdr::MORE_FRAGMENTS
    }

    /// Whether the packet ends a TCP connection or an SCTP association at once, if its receiver believes it.
    #[inline(always)]
    pub const fn is_reset(&self) -> bool {
        self.tcp_flags & tcp_flags::RST != 0
    }

    /// Whether the packet opens a TCP connection or an SCTP association.
    #[inline(always)]
    pub const fn is_opening(&self) -> bool {
        const MASK: u8 = tcp_flags::SYN | tcp_flags::ACK | tcp_flags::RST | tcp_flags::FIN;
        self.tcp_flags & MASK == tcp_flags::SYN
    }
}

/// Checks every header and every length of a packet and fills `parsed`; of a later fragment, all but the ports.
///
/// # Errors
///
/// The reason why the packet is left alone; nothing was changed.
#[inline(always)]
pub fn parse<F: Family, P: Packet>(packet: &P, side: Side, parsed: &mut Parsed<F>) -> Result<(), Reason> {
    F::parse(packet, parsed)?;
    parsed.key.side = side as u8;
    if u32::from(parsed.transport) > NETWORK as u32 + parsed.ip_len {
        // The headers are in what the link layer pads the frame with.
        return Err(Reason::Truncated);
    }
    if parsed.is_later_fragment() {
        return Ok(());
    }
    let transport = parsed.transport as usize;
    let room = parsed.transport_len();
    let ports;
    if parsed.is_tcp() {
        let tcp = packet.view::<TcpHdr>(transport)?;
        let header = u32::from(tcp.offset >> 4) * 4;
        if header < TcpHdr::LEN as u32 || header > room {
            return Err(Reason::Truncated);
        }
        parsed.tcp_flags = tcp.flags;
        parsed.seq = u32::from_be(word::load32::<_, { offset_of!(TcpHdr, seq) }>(tcp));
        parsed.ack = u32::from_be(word::load32::<_, { offset_of!(TcpHdr, ack) }>(tcp));
        ports = [tcp.ports.src.get(), tcp.ports.dst.get()];
    } else if parsed.is_udp() {
        let udp = packet.view::<UdpHdr>(transport)?;
        let len = u32::from(udp.len.get());
        // In a first fragment it is the length of the whole datagram.
        let cut = room < UdpHdr::LEN as u32 || (len > room && !parsed.is_first_fragment());
        if len < UdpHdr::LEN as u32 || cut {
            return Err(Reason::Truncated);
        }
        ports = [udp.ports.src.get(), udp.ports.dst.get()];
    } else if parsed.is_sctp() {
        if parsed.is_first_fragment() {
            // Its checksum covers the whole packet, whose length only the last fragment tells.
            return Err(Reason::Fragment);
        }
        let sctp = packet.view::<SctpHdr>(transport)?;
        if room < SctpHdr::LEN as u32 {
            return Err(Reason::Truncated);
        }
        ports = [sctp.ports.src.get(), sctp.ports.dst.get()];
        if room >= (SctpHdr::LEN + SctpChunkHdr::LEN) as u32 {
            parsed.tcp_flags = first_chunk(packet, transport + SctpHdr::LEN);
        }
    } else {
        return Err(Reason::UnknownProtocol);
    }
    parsed.key.set_rest(ports, parsed.key.proto, side as u8);
    Ok(())
}

/// What the first chunk of an SCTP packet says of the association, in TCP's words.
///
/// A chunk that cannot be seen says nothing: chunks of a GSO packet, which carries data, are not in its linear part.
#[inline(always)]
fn first_chunk<P: Packet>(packet: &P, at: usize) -> u8 {
    match packet.view::<SctpChunkHdr>(at).map_or(0, |chunk| chunk.kind) {
        sctp_chunk::INIT => tcp_flags::SYN,
        sctp_chunk::INIT_ACK => tcp_flags::SYN | tcp_flags::ACK,
        sctp_chunk::ABORT | sctp_chunk::SHUTDOWN_COMPLETE => tcp_flags::RST,
        _ => 0,
    }
}
