//! ICMP errors about packets of flows.
//!
//! A router that cannot take a packet on, or a host that has nobody for it, tells the packet's sender and quotes
//! the packet as it saw it: with the addresses of one side of the translation, to a sender who knows only those of
//! the other. So an error is translated outside and inside, and path MTU discovery (RFC 1191, RFC 8201)
//! works through every kind of flow.
//!
//! An error about a packet of one direction travels in the other. Its quote, turned around, is the tuple of that other
//! direction, and so the key of the entry that says how: the error's destination becomes the entry's, and the
//! quote becomes what that destination has sent.

use crate::abi::{Carry, Flow, FlowKey};
use crate::checksum::Diff;
use crate::family::Family;
use crate::flow;
use crate::packet::{ChecksumField, Packet};
use crate::parse::Parsed;
use crate::pipeline::{find_next_hop, is_left_alone};
use crate::reason::Reason;
use crate::rewrite::{address_change, port_change};
use crate::tables::Tables;
use crate::tunnel;
use crate::wire::{Be16, IcmpHdr, IpProto, Ports, TcpHdr};

/// Bytes behind the IP header that every error quotes (RFC 792; RFC 1812 and RFC 4443 ask for more).
const QUOTED: usize = 8;

/// Whether the packet is an ICMP error: one is never answered by another (RFC 1122, section 3.2.2).
#[inline(always)]
pub fn is_error<F: Family, P: Packet>(packet: &P, parsed: &Parsed<F>) -> bool {
    parsed.key.proto == F::ICMP
        && packet.view::<IcmpHdr>(parsed.transport as usize).is_ok_and(|icmp| F::is_icmp_error(icmp.kind))
}

/// Translates an ICMP error about a packet of a flow.
///
/// # Errors
///
/// [`Reason::NotOurs`] if the quoted packet is of no flow; the reason why the quote cannot be read; why the error cannot
/// be sent on.
#[inline(never)]
pub fn follow<F: Family, P: Packet, T: Tables<F>>(
    packet: &mut P,
    tables: &T,
    parsed: &Parsed<F>,
) -> Result<Carry, Reason> {
    if parsed.is_first_fragment() {
        return Err(Reason::Fragment);
    }
    let quote = parsed.transport as usize + IcmpHdr::LEN;
    packet.pull(quote + F::HEADER_LEN + TcpHdr::LEN);
    let mut key = FlowKey { side: parsed.key.side, ..FlowKey::default() };
    F::parse_quote(packet, quote, &mut key)?;
    let header = quote + F::HEADER_LEN;
    if parsed.len_from(header) < QUOTED as u32 {
        return Err(Reason::Truncated);
    }
    let ports = packet.view::<Ports>(header)?;
    (key.src_port, key.dst_port) = (ports.dst.get(), ports.src.get());
    if parsed.key.dst != key.dst {
        // Not the quoted packet's sender.
        return Err(Reason::NotOurs);
    }
    let entry = flow::find::<F, T>(tables, &key).ok_or(Reason::NotOurs)?;
    if is_left_alone::<F, P, T>(packet, tables, &key, &entry.get()) {
        return Err(Reason::Direct);
    }
    let carry = entry.get().carry;
    if carry != Carry::Stack as u8 && parsed.ttl <= 1 {
        return Err(Reason::TtlExceeded);
    }
    let is_tunnelled = tables.tunnel_port() != 0 && carry == Carry::Tunnel as u8;
    if carry == Carry::Forward as u8 || is_tunnelled {
        find_next_hop(packet, tables, parsed, &entry)?;
    }
    let flow = entry.get();
    if is_tunnelled {
        // About what the backend's node has answered in our name.
        return tunnel::wrap(packet, tables, parsed, &flow).map(|()| Carry::Tunnel);
    }
    let changed = requote(packet, parsed, &key, &flow)?;
    let from_end = parsed.key.src == key.src;
    readdress(packet, parsed, &flow, from_end, changed)?;
    match carry {
        carry if carry == Carry::Stack as u8 => Ok(Carry::Stack),
        carry if carry == Carry::Forward as u8 => Ok(Carry::Forward),
        _ => packet.turn_around().map(|()| Carry::Bounce),
    }
}

/// Makes the quote a packet that the error's new destination has sent. Returns what that changes in a sum.
#[inline(never)]
fn requote<F: Family, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<F>,
    key: &FlowKey<F::Addr>,
    flow: &Flow<F::Addr>,
) -> Result<Diff, Reason> {
    let quote = parsed.transport as usize + IcmpHdr::LEN;
    let addresses = Diff::unfolded(flow.addresses);
    let changed = F::readdress_quote(packet, quote, &flow.dst, &flow.src, addresses)?;

    let header = quote + F::HEADER_LEN;
    let old = Ports { src: Be16::new(key.dst_port), dst: Be16::new(key.src_port) };
    let new = Ports { src: Be16::new(flow.dst_port), dst: Be16::new(flow.src_port) };
    *packet.view_mut::<Ports>(header)? = new;
    let ports = port_change(old, new);

    let covered = addresses.and(ports);
    let check = match key.proto {
        proto if proto == IpProto::Udp as u8 => {
            requote_check(packet, ChecksumField::Udp { header }, covered)?
        }
        // With the 8 bytes of RFC 792, a segment's checksum is not quoted.
        proto if proto == IpProto::Tcp as u8 && parsed.len_from(header) >= TcpHdr::LEN as u32 => {
            requote_check(packet, ChecksumField::Tcp { header }, covered)?
        }
        _ => Diff::NONE,
    };
    Ok(changed.and(ports).and(check))
}

/// Updates a quoted transport checksum. Returns what that changes in a sum.
#[inline(always)]
fn requote_check<P: Packet>(packet: &mut P, field: ChecksumField, covered: Diff) -> Result<Diff, Reason> {
    let check = packet.view_mut::<Be16>(field.at())?;
    let (old, new) = (check.raw(), field.apply(covered, check.raw()));
    *check = Be16::from_raw(new);
    Ok(Diff::between(u32::from(old), u32::from(new)))
}

/// Gives the error its new addresses, and a checksum for these and for its new quote. `from_end`: the packet's
/// destination speaks, not a router on the way.
#[inline(never)]
fn readdress<F: Family, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<F>,
    flow: &Flow<F::Addr>,
    from_end: bool,
    quote: Diff,
) -> Result<(), Reason> {
    let forward = flow.carry != Carry::Stack as u8;
    // The word of a router on the way stays its word, unless we send it on ourselves: then a network that looks at
    // sources takes it only from the address that all else of the flow comes from.
    let src = if forward || from_end { &flow.src } else { &parsed.key.src };
    let addresses = address_change::<F>(&parsed.key.src, &parsed.key.dst, src, &flow.dst);
    F::readdress(packet, src, &flow.dst, addresses, forward)?;
    let field = ChecksumField::Icmp { header: parsed.transport as usize };
    packet.update_checksum::<F>(field, F::icmp_pseudo_change(addresses), quote)
}
