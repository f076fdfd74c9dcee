//! Flows: how the two entries of a connection belong together, live and end.
//!
//! An entry's key is the tuple as seen at the edge, its value the whole rewrite. So each direction says
//! everything about the other ([`reverse_key`], [`reverse_value`]): nothing has to be kept twice, and a lost half is restored from
//! the half that is left.

use core::cell::Cell;

use crate::abi::{Carry, Flow, FlowKey, RESERVED_PORTS_COUNT, RESERVED_PORTS_FIRST, Side, flow_flags};
use crate::family::Family;
use crate::hash;
use crate::parse::Parsed;
use crate::reason::Reason;
use crate::tables::{FlowTable, Tables};
use crate::wire::{IpProto, tcp_flags};

/// An entry's time is refreshed at most this often, so that packets of one flow on many CPUs do not fight for it.
const REFRESH: u64 = 1_000_000_000;
/// Without a packet for this long, a UDP flow is over (`nf_conntrack_udp_timeout_stream` has 120 s, too).
pub const UDP_TIMEOUT: u64 = 120_000_000_000;
/// Without a packet for this long, a TCP flow is over (`nf_conntrack_tcp_timeout_established`: 5 days).
pub const TCP_TIMEOUT: u64 = 432_000_000_000_000;
/// Without a packet for this long, an SCTP association is over (`nf_conntrack_sctp_timeout_established`: 210 s): its ends
/// send each other heartbeats, every 30 s by default (RFC 9260, section 16).
pub const SCTP_TIMEOUT: u64 = 210_000_000_000;
/// Without an answer for this long, a pending flow is over (`nf_conntrack_tcp_timeout_syn_recv`: 60 s).
pub const PENDING_TIMEOUT: u64 = 60_000_000_000;
/// Source ports tried for one new flow.
const PORT_ATTEMPTS: u16 = 8;

/// The direction an entry was made for.
#[inline(always)]
pub const fn is_reply<A: Copy>(flow: &Flow<A>) -> bool {
    flow.flags & flow_flags::REPLY != 0
}

/// Whether the flow's client asks for the backend itself. It is known so that no flow through a frontend takes its
/// tuple, and bears another source port if one has it already.
#[inline(always)]
pub const fn is_direct<A: Copy>(flow: &Flow<A>) -> bool {
    flow.backend == 0
}

/// Whether packets of a direct flow go on as they are.
#[inline(always)]
pub const fn changes_nothing<A: Copy>(key: &FlowKey<A>, flow: &Flow<A>) -> bool {
    is_direct(flow) && key.src_port == flow.src_port && key.dst_port == flow.dst_port
}

/// Where the other direction of a flow is seen.
#[inline(always)]
const fn reverse_side(side: u8, carry: u8, flags: u8) -> u8 {
    const NIC_IN: u8 = Side::NicIn as u8;
    const NIC_OUT: u8 = Side::NicOut as u8;
    const POD_IN: u8 = Side::PodIn as u8;
    const POD_OUT: u8 = Side::PodOut as u8;
    if carry == Carry::Stack as u8 {
        match (side, flags & flow_flags::REPLY != 0) {
            (NIC_IN, false) => NIC_OUT,
            (NIC_OUT, true) => NIC_IN,
            (POD_IN, false) => POD_OUT,
            _ => POD_IN,
        }
    } else if flags & flow_flags::CROSS != 0 {
        if side == NIC_IN { POD_IN } else { NIC_IN }
    } else {
        // Forwarded and hairpinned flows come back in where they went out.
        side
    }
}

/// Key of the other direction.
#[inline(always)]
pub fn reverse_key<A: Copy>(key: &FlowKey<A>, flow: &Flow<A>) -> FlowKey<A> {
    FlowKey {
        src: flow.dst,
        dst: flow.src,
        src_port: flow.dst_port,
        dst_port: flow.src_port,
        proto: key.proto,
        side: reverse_side(key.side, flow.carry, flow.flags),
        pad: 0,
    }
}

/// Value of the other direction.
#[inline(always)]
pub fn reverse_value<A: Copy>(key: &FlowKey<A>, flow: &Flow<A>) -> Flow<A> {
    Flow {
        src: key.dst,
        dst: key.src,
        src_port: key.dst_port,
        dst_port: key.src_port,
        flags: peer_flags(flow.flags)
            | (flow.flags & flow_flags::CROSS)
            | ((flow.flags & flow_flags::REPLY) ^ flow_flags::REPLY),
        pad: [0; 6],
        ..*flow
    }
}

/// Notes in an entry that a packet of its direction passed. `true`: the other half wants to know ([`sync`]).
#[inline(always)]
pub fn note_packet<F: Family>(entry: &Cell<Flow<F::Addr>>, parsed: &Parsed<F>, now: u64) -> bool {
    let mut flags = 0;
    if parsed.tcp_flags & tcp_flags::FIN != 0 {
        flags |= flow_flags::FIN;
    }
    if parsed.tcp_flags & tcp_flags::RST != 0 {
        flags |= flow_flags::RST;
    }
    note(entry, flags, now)
}

/// Adds flags to an entry and refreshes it. `true` if that changed it: a refresh happens once a second.
#[inline(always)]
fn note<A: Copy>(entry: &Cell<Flow<A>>, flags: u8, now: u64) -> bool {
    let flow = entry.as_ptr();
    // SAFETY: the pointer of a live `Cell`, written field by field so that CPUs that note different things at once
    // do not undo each other; a torn or lost note costs a late refresh, nothing more.
    unsafe {
        let fresh = now.wrapping_sub((*flow).last_seen) < REFRESH;
        let known = (*flow).flags & flags == flags;
        if fresh && known {
            return false;
        }
        (*flow).flags |= flags;
        (*flow).last_seen = now;
    }
    true
}

/// A flow by its key, established or pending.
#[inline(always)]
pub fn find<F: Family, T: Tables<F>>(tables: &T, key: &FlowKey<F::Addr>) -> Option<T::Entry> {
    match tables.flow(FlowTable::Established, key) {
        Some(entry) => Some(entry),
        None => tables.flow(FlowTable::Pending, key),
    }
}

/// Changes the source port of a flow that is not in a table yet.
#[inline(always)]
fn set_src_port<A: Copy>(entry: &Cell<Flow<A>>, port: u16) {
    // SAFETY: the pointer of a live `Cell` of ours; a copy of the whole flow costs stack that programs do not have.
    unsafe { (*entry.as_ptr()).src_port = port };
}

/// Has the packets of a flow that is not in a table yet sent on with this source address; with `crosses`, the answers are
/// met at the other class of edge.
///
/// # Errors
///
/// [`Reason::NoRoute`] without an address.
#[inline(always)]
pub fn send_on_from<A: Copy + Default + PartialEq>(
    entry: &Cell<Flow<A>>,
    src: A,
    crosses: bool,
) -> Result<(), Reason> {
    if src == A::default() {
        return Err(Reason::NoRoute);
    }
    // SAFETY: as in `set_src_port`.
    unsafe {
        (*entry.as_ptr()).src = src;
        (*entry.as_ptr()).carry = Carry::Forward as u8;
        (*entry.as_ptr()).flags |= if crosses { flow_flags::CROSS } else { 0 };
    }
    Ok(())
}

/// Has the node's stack take the packets of a flow that is not in a table yet.
#[inline(always)]
pub fn leave_to_stack<A: Copy>(entry: &Cell<Flow<A>>) {
    // SAFETY: as in `set_src_port`.
    unsafe { (*entry.as_ptr()).carry = Carry::Stack as u8 };
}

/// Tells the other half of a flow what this half knows: that the flow lives, or that it ends. Restores it if it was
/// evicted (rule 2).
///
/// `false`: another flow has been given the tuple of the half that was evicted. This half is forgotten: it would mix
/// the two up (rule 1).
#[inline(never)]
pub fn sync<F: Family, T: Tables<F>>(
    tables: &T,
    table: FlowTable,
    key: &FlowKey<F::Addr>,
    entry: &Cell<Flow<F::Addr>>,
) -> bool {
    let flow = entry.get();
    let other_key = reverse_key(key, &flow);
    for place in [FlowTable::Established, FlowTable::Pending] {
        if let Some(other) = tables.flow(place, &other_key) {
            if is_reverse(key, &other.get()) {
                note(&other, peer_flags(flow.flags), flow.last_seen);
                return true;
            }
            tables.remove_flow(table, key);
            return false;
        }
    }
    // A failure is no loss: the next refresh tries again.
    let _ = tables.add_flow(table, &other_key, &Cell::new(reverse_value(key, &flow)));
    true
}

/// Whether a value is the other direction of a key.
#[inline(always)]
fn is_reverse<A: Copy + PartialEq>(key: &FlowKey<A>, other: &Flow<A>) -> bool {
    other.dst == key.src
        && other.dst_port == key.src_port
        && other.src == key.dst
        && other.src_port == key.dst_port
}

/// What the flags of one direction mean to the other.
#[inline(always)]
const fn peer_flags(flags: u8) -> u8 {
    let mut peer = flags & flow_flags::RST;
    if flags & flow_flags::FIN != 0 {
        peer |= flow_flags::PEER_FIN;
    }
    if flags & flow_flags::PEER_FIN != 0 {
        peer |= flow_flags::FIN;
    }
    peer
}

/// The first answer: both halves move from `PENDING` to `FLOWS`.
///
/// The forward half goes first, so that no packet of the flow finds only a reply half; the pending halves go
/// last. If the table is full for good, the flow stays pending and works.
///
/// The kernel gives a removed entry's memory to another flow at once, whoever still looks at it. So what is moved is a
/// copy, taken before the entry was seen to be in its place still; else another CPU has moved it.
#[inline(never)]
pub fn promote<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F::Addr>,
    entry: &Cell<Flow<F::Addr>>,
) -> Result<(), Reason> {
    let flow = Cell::new(entry.get());
    if !tables.flow(FlowTable::Pending, key).is_some_and(|now| core::ptr::eq(&raw const *now, entry)) {
        return Ok(());
    }
    let other_key = reverse_key(key, &flow.get());
    let other = Cell::new(reverse_value(key, &flow.get()));
    tables.put_flow(FlowTable::Established, &other_key, &other)?;
    tables.put_flow(FlowTable::Established, key, &flow)?;
    tables.remove_flow(FlowTable::Pending, &other_key);
    tables.remove_flow(FlowTable::Pending, key);
    Ok(())
}

/// Forgets a flow, given one of its entries.
#[inline(never)]
pub fn forget<F: Family, T: Tables<F>>(
    tables: &T,
    table: FlowTable,
    key: &FlowKey<F::Addr>,
    entry: &Cell<Flow<F::Addr>>,
) {
    tables.remove_flow(table, &reverse_key(key, &entry.get()));
    tables.remove_flow(table, key);
}

/// Whether a flow has ended: its tuple may serve another.
#[inline(always)]
fn is_over<A: Copy>(table: FlowTable, proto: u8, flow: &Flow<A>, now: u64) -> bool {
    const TCP: u8 = IpProto::Tcp as u8;
    const SCTP: u8 = IpProto::Sctp as u8;
    const BOTH: u8 = flow_flags::FIN | flow_flags::PEER_FIN;
    let idle = now.saturating_sub(flow.last_seen);
    if table as u32 == FlowTable::Pending as u32 {
        return idle > PENDING_TIMEOUT;
    }
    let timeout = match proto {
        TCP => TCP_TIMEOUT,
        SCTP => SCTP_TIMEOUT,
        _ => UDP_TIMEOUT,
    };
    // UDP never has these flags.
    idle > timeout || flow.flags & flow_flags::RST != 0 || flow.flags & BOTH == BOTH
}

/// Enters a new flow, both halves, into `PENDING`: rule 1, the tuple a reply is known by belongs to one flow.
///
/// If the tuple is taken by a live flow (the same client port through two frontends to one backend), the
/// new flow gets another source port, of the reserved range.
#[inline(always)]
pub fn enter<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F::Addr>,
    entry: &Cell<Flow<F::Addr>>,
) -> Result<(), Reason> {
    let spread = hash::tuple::<F>(key);
    // A forwarded packet bears this node's address: it needs a port of ours from the start.
    let keeps_port = entry.get().carry != Carry::Forward as u8;
    let mut found = false;
    for attempt in 0..PORT_ATTEMPTS {
        if attempt != 0 || !keeps_port {
            set_src_port(entry, reserved_port(spread, attempt));
        }
        if is_free::<F, T>(tables, key, entry) {
            found = true;
            break;
        }
    }
    // Behind the loop: the verifier walks what is in it once for each attempt.
    if found && clear::<F, T>(tables, key, entry) && add_reply::<F, T>(tables, key, entry) {
        return tables.put_flow(FlowTable::Pending, key, entry);
    }
    Err(Reason::PortsExhausted)
}

/// Whether the tuple that replies of a new flow would have belongs to no other live flow.
#[inline(never)]
fn is_free<F: Family, T: Tables<F>>(tables: &T, key: &FlowKey<F::Addr>, entry: &Cell<Flow<F::Addr>>) -> bool {
    let reply_key = reverse_key(key, &entry.get());
    for table in [FlowTable::Established, FlowTable::Pending] {
        if let Some(other) = tables.flow(table, &reply_key)
            && !may_go::<F, T>(tables, table, key, &other)
        {
            return false;
        }
    }
    true
}

/// Clears away what is left, at the tuple of a new flow's replies, of flows that are over and of this one. `false`:
/// another CPU has given it to a flow just now.
#[inline(never)]
fn clear<F: Family, T: Tables<F>>(tables: &T, key: &FlowKey<F::Addr>, entry: &Cell<Flow<F::Addr>>) -> bool {
    let reply_key = reverse_key(key, &entry.get());
    for table in [FlowTable::Established, FlowTable::Pending] {
        if let Some(other) = tables.flow(table, &reply_key) {
            if !may_go::<F, T>(tables, table, key, &other) {
                return false;
            }
            forget::<F, T>(tables, table, &reply_key, &other);
        }
    }
    true
}

/// Whether an entry is over, or of the flow with this key itself.
#[inline(always)]
fn may_go<F: Family, T: Tables<F>>(
    tables: &T,
    table: FlowTable,
    key: &FlowKey<F::Addr>,
    other: &Cell<Flow<F::Addr>>,
) -> bool {
    let flow = other.get();
    is_reverse(key, &flow) || is_over(table, key.proto, &flow, tables.now())
}

/// Enters the reply half of a new flow; `false` if another was quicker.
#[inline(never)]
fn add_reply<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F::Addr>,
    entry: &Cell<Flow<F::Addr>>,
) -> bool {
    let reply = Cell::new(reverse_value(key, &entry.get()));
    tables.add_flow(FlowTable::Pending, &reverse_key(key, &entry.get()), &reply)
}

/// A port of the reserved range. Each flow has a stride of its own, odd, so that two that meet once do not meet again at
/// each attempt (double hashing).
#[inline(always)]
const fn reserved_port(spread: u32, attempt: u16) -> u16 {
    const MASK: u32 = RESERVED_PORTS_COUNT as u32 - 1;
    let stride = spread >> 16 | 1;
    let offset = spread.wrapping_add(stride.wrapping_mul(attempt as u32)) & MASK;
    RESERVED_PORTS_FIRST + offset as u16
}

const _: () = assert!(RESERVED_PORTS_COUNT.is_power_of_two());
const _: () = assert!(RESERVED_PORTS_FIRST as u32 + RESERVED_PORTS_COUNT as u32 <= 30000);
