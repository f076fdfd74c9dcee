//! The rewrite of one packet: addresses, ports, TTL, checksums.

use crate::abi::Flow;
use crate::checksum::Diff;
use crate::crc32c;
use crate::family::Family;
use crate::packet::{ChecksumField, Packet};
use crate::parse::Parsed;
use crate::reason::Reason;
use crate::wire::{Be16, Le32, Ports, SctpHdr};

/// Gives a packet the addresses and ports of its flow, a later fragment the addresses alone; with `forward`, takes one from its TTL.
///
/// # Errors
///
/// Only if the packet changed since it was parsed, which cannot be.
#[inline(always)]
pub fn rewrite<F: Family, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<F>,
    flow: &Flow<F::Addr>,
    forward: bool,
) -> Result<(), Reason> {
    let addresses = Diff::unfolded(flow.addresses);
    F::readdress(packet, &flow.src, &flow.dst, addresses, forward)?;

    if parsed.is_later_fragment() {
        return packet.readdressed::<F>(addresses);
    }
    if parsed.is_sctp() {
        let header = parsed.transport as usize;
        let (old, new) = ports(parsed, flow);
        *packet.view_mut::<Ports>(header)? = new;
        let check = &mut packet.view_mut::<SctpHdr>(header)?.check;
        *check = Le32::new(crc32c::update(check.get(), old, new, parsed.transport_len() as u16));
        return Ok(());
    }
    readdress_segment(packet, parsed, flow, addresses)
}

/// [`rewrite`] of TCP or UDP with its header.
#[inline(always)]
pub fn rewrite_segment<F: Family, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<F>,
    flow: &Flow<F::Addr>,
    forward: bool,
) -> Result<(), Reason> {
    let addresses = Diff::unfolded(flow.addresses);
    F::readdress(packet, &flow.src, &flow.dst, addresses, forward)?;
    readdress_segment(packet, parsed, flow, addresses)
}

/// Gives TCP or UDP its new ports, and a checksum for these and for what changed with the addresses.
#[inline(always)]
fn readdress_segment<F: Family, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<F>,
    flow: &Flow<F::Addr>,
    addresses: Diff,
) -> Result<(), Reason> {
    let header = parsed.transport as usize;
    let (old, new) = ports(parsed, flow);
    *packet.view_mut::<Ports>(header)? = new;
    let field = if parsed.is_tcp() { ChecksumField::Tcp { header } } else { ChecksumField::Udp { header } };
    packet.update_checksum::<F>(field, addresses, port_change(old, new))
}

/// The ports that a packet has, and those that its flow gives it.
#[inline(always)]
fn ports<F: Family>(parsed: &Parsed<F>, flow: &Flow<F::Addr>) -> (Ports, Ports) {
    let key = &parsed.key;
    (
        Ports { src: Be16::new(key.src_port), dst: Be16::new(key.dst_port) },
        Ports { src: Be16::new(flow.src_port), dst: Be16::new(flow.dst_port) },
    )
}

/// What new addresses change in the sums that cover them.
#[inline(never)]
pub(crate) fn address_change<F: Family>(
    old_src: &F::Addr,
    old_dst: &F::Addr,
    src: &F::Addr,
    dst: &F::Addr,
) -> Diff {
    Diff::between(F::sum(old_src) + F::sum(old_dst), F::sum(src) + F::sum(dst))
}

/// What new ports change in the sums that cover them.
#[inline(always)]
pub(crate) fn port_change(old: Ports, new: Ports) -> Diff {
    let sum = |ports: Ports| u32::from(ports.src.raw()) + u32::from(ports.dst.raw());
    Diff::between(sum(old), sum(new))
}
