//! Answers of our own: TCP RST and ICMP errors, made of the packet that caused them.
//!
//! Every answer is at most as long as what it answers plus the headers of an ICMP error, goes back where the
//! packet came from, and bears the address the client asked for.

use crate::abi::FlowKey;
use crate::checksum;
use crate::family::{Family, icmp_error_len};
use crate::icmp;
use crate::packet::{NETWORK, Packet};
use crate::parse::Parsed;
use crate::reason::{Action, Reason};
use crate::wire::{Be16, Be32, EthHdr, IcmpHdr, IpProto, Mac, Ports, TcpHdr, tcp_flags};

/// Turns the packet into the answer that `action` asks for.
///
/// # Errors
///
/// The reason given where the packet must not be answered: it is dropped.
#[inline(always)]
pub fn respond<F: Family, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<F>,
    reason: Reason,
) -> Result<(), Reason> {
    // Errors are not answered, of fragments the first was, and who is not one host is nobody (RFC 1122, sections 3.2.2
    // and 4.2.3.10; RFC 4443, section 2.4).
    if parsed.is_later_fragment() || icmp::is_error(packet, parsed) || !is_between_hosts(packet, parsed) {
        return Err(reason);
    }
    match reason.action() {
        Action::Reject if parsed.is_tcp() => reset::<F, P>(packet, parsed, reason),
        // Who has filled the MTU of every link on the way is told of the tunnel, whether or not it has asked to be.
        Action::Shrink if !matches!(reason, Reason::TunnelTooBig) && !F::wants_too_big(packet)? => {
            Err(reason)
        }
        action => icmp_error::<F, P>(packet, parsed, action),
    }
}

/// Whether one host has sent the packet to one other, on its link and from end to end. A network's own broadcast address
/// looks like a host's.
#[inline(always)]
fn is_between_hosts<F: Family, P: Packet>(packet: &P, parsed: &Parsed<F>) -> bool {
    let is_one = |mac: Mac| mac.octets[0] & 1 == 0;
    F::is_host(&parsed.key.src)
        && packet.view::<EthHdr>(0).is_ok_and(|eth| is_one(eth.src) && is_one(eth.dst))
}

/// A RST for a segment that no connection takes (RFC 9293, section 3.10.7.1).
#[inline(never)]
fn reset<F: Family, P: Packet>(packet: &mut P, parsed: &Parsed<F>, reason: Reason) -> Result<(), Reason> {
    if parsed.tcp_flags & tcp_flags::RST != 0 {
        return Err(reason);
    }
    let tcp = packet.view::<TcpHdr>(parsed.transport as usize)?;
    let (seq, ack, offset) = (tcp.seq.get(), tcp.ack.get(), u32::from(tcp.offset >> 4) * 4);
    let (seq, ack, flags) = if parsed.tcp_flags & tcp_flags::ACK != 0 {
        (ack, 0, tcp_flags::RST)
    } else {
        let headers = u32::from(parsed.transport) - NETWORK as u32 + offset;
        let open = u32::from(parsed.tcp_flags & tcp_flags::SYN != 0);
        let close = u32::from(parsed.tcp_flags & tcp_flags::FIN != 0);
        let len = parsed.ip_len.wrapping_sub(headers).wrapping_add(open + close);
        (0, seq.wrapping_add(len), tcp_flags::RST | tcp_flags::ACK)
    };
    let (src, dst) = (parsed.key.dst, parsed.key.src);
    begin::<F, P>(packet, &src, &dst, IpProto::Tcp as u8, TcpHdr::LEN as u16)?;
    let mut tcp = TcpHdr {
        ports: Ports { src: Be16::new(parsed.key.dst_port), dst: Be16::new(parsed.key.src_port) },
        seq: Be32::new(seq),
        ack: Be32::new(ack),
        offset: (TcpHdr::LEN as u8 / 4) << 4,
        flags,
        window: Be16::new(0),
        check: Be16::new(0),
        urgent: Be16::new(0),
    };
    let sum = F::pseudo(&src, &dst, IpProto::Tcp as u8, TcpHdr::LEN as u16) + checksum::sum_of(&tcp);
    tcp.check = Be16::from_raw(checksum::finish(sum));
    *packet.view_mut::<TcpHdr>(NETWORK + F::HEADER_LEN)? = tcp;
    Ok(())
}

/// An ICMP error about the packet, quoting its IP header and 8 bytes (RFC 792, RFC 4443 section 2.4).
#[inline(never)]
fn icmp_error<F: Family, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<F>,
    action: Action,
) -> Result<(), Reason> {
    let quote: F::Quote = *packet.view::<F::Quote>(NETWORK)?;
    begin::<F, P>(packet, &parsed.key.dst, &parsed.key.src, F::ICMP, icmp_error_len::<F>())?;
    write_icmp::<F, P>(packet, parsed, action, &quote)
}

/// The ICMP message itself.
///
/// This and [`icmp_checksum`] are functions of their own so that the quote is handed over in memory and its sum in a
/// register: inlined, LLVM keeps every word of it in a register, and spills each into eight bytes of stack.
#[inline(never)]
fn write_icmp<F: Family, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<F>,
    action: Action,
    quote: &F::Quote,
) -> Result<(), Reason> {
    let ((kind, code), rest) = match action {
        Action::Expire => (F::TIME_EXCEEDED, 0),
        Action::Shrink => (F::TOO_BIG, F::too_big_rest(packet.mtu())),
        _ => (F::PORT_UNREACHABLE, 0),
    };
    let mut icmp = IcmpHdr { kind, code, check: Be16::new(0), rest: Be32::new(rest) };
    icmp.check = Be16::from_raw(icmp_checksum::<F>(&parsed.key, icmp, quote));
    *packet.view_mut::<IcmpHdr>(NETWORK + F::HEADER_LEN)? = icmp;
    checksum::copy(quote, packet.view_mut::<F::Quote>(NETWORK + F::HEADER_LEN + IcmpHdr::LEN)?);
    Ok(())
}

#[inline(never)]
fn icmp_checksum<F: Family>(key: &FlowKey<F::Addr>, icmp: IcmpHdr, quote: &F::Quote) -> u16 {
    let pseudo = F::icmp_pseudo(&key.dst, &key.src, icmp_error_len::<F>());
    checksum::finish(pseudo + checksum::sum_of(&icmp) + checksum::sum_of(quote))
}

/// Link and IP header of an answer of `payload` bytes.
#[inline(never)]
fn begin<F: Family, P: Packet>(
    packet: &mut P,
    src: &F::Addr,
    dst: &F::Addr,
    proto: u8,
    payload: u16,
) -> Result<(), Reason> {
    let eth = *packet.view::<EthHdr>(0)?;
    packet.resize(NETWORK as u16 + F::HEADER_LEN as u16 + payload)?;
    *packet.view_mut::<EthHdr>(0)? = EthHdr { dst: eth.src, src: eth.dst, ether_type: eth.ether_type };
    F::write_header(packet, src, dst, proto, payload)
}
