//! Samples: what `fairlead drops --follow` is told of packets and sockets that do not get what they ask for.

use crate::abi::{Addr6, Sample, Side};
use crate::family::Family;
use crate::packet::Packet;
use crate::parse::Parsed;
use crate::reason::{Hook, Reason};
use crate::tables::Tables;

/// Tells of a packet that is dropped or answered in the backend's place, if somebody wants to know.
#[inline(never)]
pub fn packet<F: Family, P: Packet, T: Tables<F>>(
    packet: &P,
    tables: &T,
    parsed: &Parsed<F>,
    reason: Reason,
) {
    if !tables.is_sampling() {
        return;
    }
    let key = &parsed.key;
    tables.put_sample(&Sample {
        time: tables.now(),
        ifindex: packet.ifindex(),
        bytes: parsed.ip_len,
        src: F::to_mapped(&key.src),
        dst: F::to_mapped(&key.dst),
        src_port: key.src_port,
        dst_port: key.dst_port,
        proto: key.proto,
        tcp_flags: if parsed.is_tcp() { parsed.tcp_flags } else { 0 },
        hook: if P::NEEDS_XDP_TRANSMIT { Hook::Xdp as u8 } else { Side::hook(key.side) },
        reason: reason as u8,
    });
}

/// Tells of a system call that fails, if somebody wants to know.
#[inline(always)]
pub fn call<F: Family, T: Tables<F>>(
    tables: &T,
    hook: Hook,
    proto: u8,
    addr: &F::Addr,
    port: u16,
    reason: Reason,
) {
    if !tables.is_sampling() {
        return;
    }
    tables.put_sample(&Sample {
        time: tables.now(),
        ifindex: 0,
        bytes: 0,
        src: Addr6 { octets: [0; 16] },
        dst: F::to_mapped(addr),
        src_port: 0,
        dst_port: port,
        proto,
        tcp_flags: 0,
        hook: hook as u8,
        reason: reason as u8,
    });
}
