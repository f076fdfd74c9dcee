//! The rewrite of one packet: addresses, ports, TTL, checksums.

use crate::abi::{Flow, FlowKey};
use crate::checksum::Diff;
use crate::family::Family;
use crate::packet::{ChecksumField, Packet};
use crate::parse::Parsed;
use crate::reason::Reason;
use crate::wire::{Be16, Ports};

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
    let key = &parsed.key;
    let addresses = address_change::<F>(key, flow);
    F::readdress(packet, &flow.src, &flow.dst, addresses, forward)?;

    if parsed.is_later_fragment() {
        return packet.readdressed::<F>(addresses);
    }
    let header = parsed.transport as usize;
    let new = Ports { src: Be16::new(flow.src_port), dst: Be16::new(flow.dst_port) };
    let old = Ports { src: Be16::new(key.src_port), dst: Be16::new(key.dst_port) };
    *packet.view_mut::<Ports>(header)? = new;
    let sum = |ports: Ports| u32::from(ports.src.raw()) + u32::from(ports.dst.raw());

    let field = if parsed.is_tcp() { ChecksumField::Tcp { header } } else { ChecksumField::Udp { header } };
    packet.update_checksum::<F>(field, addresses, Diff::between(sum(old), sum(new)))
}

/// What the new addresses change in the sums that cover them.
#[inline(never)]
fn address_change<F: Family>(key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>) -> Diff {
    Diff::between(F::sum(&key.src) + F::sum(&key.dst), F::sum(&flow.src) + F::sum(&flow.dst))
}
