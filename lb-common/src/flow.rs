//! Flows: how the two entries of a connection belong together, live and end.
//!
//! An entry's key is the tuple as seen at the edge, its value the whole rewrite. So each direction says
//! everything about the other ([`reverse_key`], [`reverse_value`]): nothing has to be kept twice, and a lost half is restored from
//! the half that is left.

use core::cell::Cell;
use core::ptr::write_volatile;

use crate::abi::{
    Carry, Flow, FlowKey, Hop, Link, RESERVED_PORTS_COUNT, RESERVED_PORTS_FIRST, Side, flow_flags,
};
use crate::checksum::Diff;
use crate::family::Family;
use crate::hash;
use crate::parse::Parsed;
use crate::reason::Reason;
use crate::rewrite::address_change;
use crate::tables::{FlowTable, Tables};
use crate::wire::{IpProto, tcp_flags};

/// An entry's time is refreshed at most this often, so that packets of one flow on many CPUs do not fight for it.
const REFRESH: u64 = 1_000_000_000;
/// Source ports tried for one new flow.
const PORT_ATTEMPTS: u16 = 8;
/// How far one end may be ahead of what the other has acknowledged: data on its way. Windows are rarely larger.
const WINDOW: u32 = 1 << 20;

/// Where a flow is in its life, as far as its time depends on it.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum State {
    /// TCP or SCTP: the backend has not answered, or the client has not heard it yet.
    Opening = 0,
    /// UDP: the backend has not answered.
    Unanswered = 1,
    /// UDP: packets in both directions.
    Answered = 2,
    /// TCP: neither end has closed.
    Established = 3,
    /// TCP: one end has sent a FIN.
    HalfClosed = 4,
    /// TCP: both ends have.
    Closed = 5,
    /// A RST that is believed, an ABORT or a SHUTDOWN COMPLETE.
    Reset = 6,
    /// SCTP: its ends send each other heartbeats, every 30 s by default (RFC 9260, section 16).
    Associated = 7,
}

impl State {
    /// Every state, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::Opening,
        Self::Unanswered,
        Self::Answered,
        Self::Established,
        Self::HalfClosed,
        Self::Closed,
        Self::Reset,
        Self::Associated,
    ];

    /// The state that an entry says its flow is in.
    #[inline(always)]
    pub const fn of<A: Copy>(table: FlowTable, proto: u8, flow: &Flow<A>) -> Self {
        Self::with_flags(table, proto, flow.flags)
    }

    const fn with_flags(table: FlowTable, proto: u8, flags: u8) -> Self {
        const TCP: u8 = IpProto::Tcp as u8;
        const SCTP: u8 = IpProto::Sctp as u8;
        const BOTH: u8 = flow_flags::FIN | flow_flags::PEER_FIN;
        let pending = table as u32 == FlowTable::Pending as u32;
        // UDP never has these flags.
        if flags & flow_flags::RST != 0 {
            return Self::Reset;
        }
        match (proto, pending) {
            (TCP | SCTP, true) => Self::Opening,
            (TCP, false) => match flags & BOTH {
                0 => Self::Established,
                BOTH => Self::Closed,
                _ => Self::HalfClosed,
            },
            (SCTP, false) => Self::Associated,
            (_, true) if flags & flow_flags::ANSWERED == 0 => Self::Unanswered,
            (_, _) => Self::Answered,
        }
    }

    /// The number of the state that an entry says its flow is in, looked up: every branch of [`Self::of`] would be a way that the
    /// verifier walks again for each port that a new flow tries.
    #[inline(always)]
    pub(crate) fn number(table: FlowTable, proto: u8, flags: u8) -> u8 {
        let index = row(table, proto) | (flags & STATE_FLAGS) as usize;
        // Each row is as long as the flags may be large.
        STATES.get(index).copied().unwrap_or(Self::Established as u8)
    }

    /// Label of metrics and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Unanswered => "unanswered",
            Self::Answered => "answered",
            Self::Established => "established",
            Self::HalfClosed => "half_closed",
            Self::Closed => "closed",
            Self::Reset => "reset",
            Self::Associated => "associated",
        }
    }

    /// Without a packet for this long (ns) a flow in this state is over, if nobody has said otherwise. In brackets what
    /// nf_conntrack has (`nf_conntrack_*_timeout_*`).
    pub const fn default_timeout(self) -> u64 {
        const SECOND: u64 = 1_000_000_000;
        match self {
            // [syn_sent 120 s, syn_recv 60 s, sctp_cookie_wait 3 s]
            Self::Opening => 60 * SECOND,
            Self::Unanswered => 30 * SECOND,
            // [time_wait and last_ack 120 s and 30 s; udp_stream 120 s]
            Self::Answered | Self::Closed => 120 * SECOND,
            // [5 days; kube-proxy sets 24 h]
            Self::Established => 24 * 3600 * SECOND,
            // [close_wait 60 s; kube-proxy sets 1 h]
            Self::HalfClosed => 3600 * SECOND,
            // [close 10 s]
            Self::Reset => 10 * SECOND,
            // [sctp_established 210 s]
            Self::Associated => 210 * SECOND,
        }
    }

    /// Whether a flow that had no packet for `idle` is over, its time being `timeout` (both ns): for `End::Reuse` before it is
    /// swept.
    #[inline(always)]
    pub const fn is_over(self, idle: u64, timeout: u64, end: End) -> bool {
        is_over(self as u8, idle, timeout, end)
    }
}

/// The bits of [`Flow::flags`] that say in which state a flow is: all but [`flow_flags::CROSS`].
const STATE_FLAGS: u8 = 0x1f;
/// One row for each table and each of the protocols.
const ROW: usize = STATE_FLAGS as usize + 1;

/// [`State::of`] for everything that it may be asked.
static STATES: [u8; 6 * ROW] = {
    let mut states = [0; 6 * ROW];
    let protos = [IpProto::Tcp as u8, IpProto::Sctp as u8, IpProto::Udp as u8];
    let tables = [FlowTable::Established, FlowTable::Pending];
    let mut i = 0;
    while i < states.len() {
        let (table, proto) = (tables[i / ROW / 3], protos[i / ROW % 3]);
        states[i] = State::with_flags(table, proto, (i % ROW) as u8) as u8;
        i += 1;
    }
    states
};

/// Where the row of a table and a protocol begins in [`STATES`].
#[inline(always)]
const fn row(table: FlowTable, proto: u8) -> usize {
    const TCP: u8 = IpProto::Tcp as u8;
    const SCTP: u8 = IpProto::Sctp as u8;
    let proto = match proto {
        TCP => 0,
        SCTP => 1,
        _ => 2,
    };
    (table as usize * 3 + proto) * ROW
}

/// What the end of a flow is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Its entries are removed.
    Sweep,
    /// Its tuple goes to another flow. One that closed in good order rests as its ends' sockets do (TIME_WAIT).
    Reuse,
    /// Its tuple goes to another flow, which has found no better one.
    LastResort,
}

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
        flags: turned_flags(flow.flags),
        tick: 0,
        ack: 0,
        hop: Hop::default(),
        fits: 0,
        addresses: Diff::back(flow.addresses),
        ..*flow
    }
}

/// What became of a flow with a packet of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// It is where it was.
    Stays,
    /// It has moved from `PENDING` to `FLOWS`.
    Promoted,
    /// Its tuple is another's by now: what was left of it is forgotten ([`sync`]).
    Lost,
}

/// Notes that a packet of a flow passes.
///
/// One stage for all of it: the verifier forgets, when it returns, on which of many ways that came about.
#[inline(never)]
pub fn advance<F: Family, T: Tables<F>>(
    tables: &T,
    table: FlowTable,
    entry: &Cell<Flow<F::Addr>>,
    parsed: &Parsed<F>,
) -> Result<Progress, Reason> {
    let pending = table as u32 == FlowTable::Pending as u32;
    let mut confirmed = false;
    let mut flags = 0;
    if parsed.is_reset() {
        if !is_believed::<F, T>(tables, table, entry, parsed) {
            return Ok(Progress::Stays);
        }
        flags = flow_flags::RST;
    } else {
        confirmed = pending && is_confirmed::<F, T>(tables, entry, parsed);
        if pending && !confirmed {
            answer::<F, T>(tables, entry, parsed);
        } else {
            set_ack(entry, parsed);
        }
        if parsed.tcp_flags & tcp_flags::FIN != 0 {
            flags = flow_flags::FIN;
            if is_one_way::<F, T>(tables, entry) {
                // Nobody sees here when the other end closes.
                flags |= flow_flags::PEER_FIN;
            }
        }
    }
    let changed = see_to::<F, T>(tables, entry, flags);
    if confirmed {
        promote::<F, T>(tables, &parsed.key, entry)?;
        Ok(Progress::Promoted)
    } else if changed && !sync::<F, T>(tables, table, &parsed.key, entry) {
        Ok(Progress::Lost)
    } else {
        Ok(Progress::Stays)
    }
}

/// [`is_tunnelled`] of an entry, where there are tunnels: one field alone, because a copy of the whole flow costs stack.
#[inline(always)]
pub fn is_one_way<F: Family, T: Tables<F>>(tables: &T, entry: &Cell<Flow<F::Addr>>) -> bool {
    // SAFETY: the pointer of a live `Cell`.
    tables.tunnel_port() != 0 && unsafe { (*entry.as_ptr()).carry == Carry::Tunnel as u8 }
}

/// Remembers what a packet acknowledges.
#[inline(always)]
pub fn set_ack<F: Family>(entry: &Cell<Flow<F::Addr>>, parsed: &Parsed<F>) {
    if parsed.tcp_flags & tcp_flags::ACK != 0 {
        // SAFETY: the pointer of a live `Cell`; one field alone, so that CPUs do not undo each other's notes. What is not
        // news is not written: the line stays clean.
        unsafe {
            if (*entry.as_ptr()).ack != parsed.ack {
                (*entry.as_ptr()).ack = parsed.ack;
            }
        }
    }
}

/// Whether the receiver of a RST takes it for one of its connection. The rest is passed on and changes nothing: whoever
/// does not see the connection cannot end its flow.
///
/// It does if the sequence number is exactly what it expects next (RFC 5961, section 3.2). A sender with data on its way
/// is ahead of that: it shows by its own acknowledgement that it knows the connection. `nf_conntrack_tcp_packet()`
/// (net/netfilter/nf_conntrack_proto_tcp.c) asks for less: a sequence number not before that, and in the window.
#[inline(never)]
fn is_believed<F: Family, T: Tables<F>>(
    tables: &T,
    table: FlowTable,
    entry: &Cell<Flow<F::Addr>>,
    parsed: &Parsed<F>,
) -> bool {
    // Of a flow that is tunnelled the other node is the judge: what it does not believe the next packet takes back here.
    if !parsed.is_tcp() || is_one_way::<F, T>(tables, entry) {
        return true;
    }
    let flow = entry.get();
    let Some(other) = tables.flow(table, &reverse_key(&parsed.key, &flow)) else { return false };
    let expected = other.get().ack;
    if expected == 0 {
        // Nothing was acknowledged yet: the port is closed (RFC 9293, section 3.10.7.3).
        return table as u32 == FlowTable::Pending as u32;
    }
    let ahead = parsed.seq.wrapping_sub(expected);
    let knows = parsed.tcp_flags & tcp_flags::ACK != 0 && parsed.ack == flow.ack && flow.ack != 0;
    ahead == 0 || (knows && ahead < WINDOW)
}

/// Marks both halves of a flow as ended by a RST of ours.
#[inline(always)]
pub fn abort<F: Family, T: Tables<F>>(
    tables: &T,
    table: FlowTable,
    key: &FlowKey<F::Addr>,
    entry: &Cell<Flow<F::Addr>>,
) {
    if note(entry, flow_flags::RST, tables.now()) {
        sync::<F, T>(tables, table, key, entry);
    }
}

/// Whether a packet of an established flow has nothing to say but that the flow lives, which is known already. Of most
/// packets that is all there is to know.
#[inline(always)]
pub fn is_at_rest<F: Family, T: Tables<F>>(
    tables: &T,
    entry: &Cell<Flow<F::Addr>>,
    parsed: &Parsed<F>,
) -> bool {
    // SAFETY: the pointer of a live `Cell`; two fields alone, read where they are asked for, because programs have no stack to
    // keep them until then.
    let (flags, tick) = unsafe { ((*entry.as_ptr()).flags, (*entry.as_ptr()).tick) };
    parsed.tcp_flags & (tcp_flags::FIN | tcp_flags::RST) == 0
        && flags & flow_flags::RST == 0
        && tick == tables.tick()
}

/// [`note`]s flags and the time, if some has passed since the last packet. Then what the flow knows of its way is
/// forgotten if nobody follows the changes of routes any more.
#[inline(always)]
fn see_to<F: Family, T: Tables<F>>(tables: &T, entry: &Cell<Flow<F::Addr>>, flags: u8) -> bool {
    let (tick, now) = (tables.tick(), tables.now());
    let flow = entry.as_ptr();
    // SAFETY: as in `note`.
    unsafe {
        if (*flow).tick != tick {
            (*flow).tick = tick;
            if now >= tables.routing().until {
                (*flow).hop.generation = 0;
            }
        }
    }
    note(entry, flags, now)
}

/// Whether a flow knows where its packets go ([`Flow::hop`]), and this one fits.
#[inline(always)]
pub fn knows_hop<F: Family, T: Tables<F>>(tables: &T, flow: &Flow<F::Addr>, parsed: &Parsed<F>) -> bool {
    let generation = tables.routing().generation;
    generation != 0 && flow.hop.generation == generation && parsed.ip_len <= u32::from(flow.fits)
}

/// Remembers where a packet of a flow goes, as the routing table said after it was of this generation.
#[inline(always)]
pub fn keep_hop<F: Family, T: Tables<F>>(
    tables: &T,
    entry: &Cell<Flow<F::Addr>>,
    parsed: &Parsed<F>,
    generation: u32,
    (ifindex, link): (u32, Link),
) {
    if generation == 0 || tables.now() >= tables.routing().until {
        return;
    }
    // SAFETY: the pointer of a live `Cell`. The generation goes first and comes last: what another CPU sees half written
    // it does not believe.
    unsafe {
        let kept = &raw mut (*entry.as_ptr()).hop;
        write_volatile(&raw mut (*kept).generation, 0);
        write_volatile(&raw mut (*kept).ifindex, ifindex);
        let addresses = kept.cast::<u32>().add(Hop::LINK);
        write_volatile(addresses, link.0);
        write_volatile(addresses.add(1), link.1);
        write_volatile(addresses.add(2), link.2);
        let fits = parsed.ip_len.min(u32::from(u16::MAX)) as u16;
        write_volatile(&raw mut (*entry.as_ptr()).fits, fits);
        write_volatile(&raw mut (*kept).generation, generation);
    }
}

/// Adds flags to an entry and refreshes it; a RST is taken back by whatever comes after it. `true` if that changed the
/// entry: a refresh happens once a second.
#[inline(always)]
fn note<A: Copy>(entry: &Cell<Flow<A>>, flags: u8, now: u64) -> bool {
    let flow = entry.as_ptr();
    // SAFETY: the pointer of a live `Cell`, written field by field so that CPUs that note different things at once
    // do not undo each other; a torn or lost note costs a late refresh, nothing more.
    unsafe {
        let fresh = now.wrapping_sub((*flow).last_seen) < REFRESH;
        let known = (*flow).flags;
        let new = known & !flow_flags::RST | flags;
        if fresh && known == new {
            return false;
        }
        (*flow).flags = new;
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

/// Notes what the addresses of a flow that is not in a table yet change in the sums of its packets.
#[inline(always)]
fn set_addresses<F: Family>(key: &FlowKey<F::Addr>, entry: &Cell<Flow<F::Addr>>) {
    let flow = entry.as_ptr();
    // SAFETY: as in `set_src_port`.
    unsafe {
        let change = address_change::<F>(&key.src, &key.dst, &(*flow).src, &(*flow).dst);
        (*flow).addresses = change.folded();
    }
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

/// Whether the packets of a flow are tunnelled to another node, which answers: it has one direction here.
#[inline(always)]
pub const fn is_tunnelled<A: Copy>(flow: &Flow<A>) -> bool {
    flow.carry == Carry::Tunnel as u8
}

/// Has the packets of a flow that is not in a table yet tunnelled to this node. No packet has a port of 0: what would be the
/// key of answers is nobody's.
#[inline(always)]
pub fn tunnel_to<A: Copy>(entry: &Cell<Flow<A>>, node: A) {
    // SAFETY: as in `set_src_port`.
    unsafe {
        (*entry.as_ptr()).src = node;
        (*entry.as_ptr()).src_port = 0;
        (*entry.as_ptr()).carry = Carry::Tunnel as u8;
    }
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
fn sync<F: Family, T: Tables<F>>(
    tables: &T,
    table: FlowTable,
    key: &FlowKey<F::Addr>,
    entry: &Cell<Flow<F::Addr>>,
) -> bool {
    if is_one_way::<F, T>(tables, entry) {
        return true;
    }
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
    let mut peer = flags & (flow_flags::RST | flow_flags::ANSWERED);
    if flags & flow_flags::FIN != 0 {
        peer |= flow_flags::PEER_FIN;
    }
    if flags & flow_flags::PEER_FIN != 0 {
        peer |= flow_flags::FIN;
    }
    peer
}

/// Notes in both halves of a pending flow that a packet is the backend's answer. From then on it is known what the client
/// has to acknowledge; before, what either end acknowledges is all there is.
#[inline(never)]
fn answer<F: Family, T: Tables<F>>(tables: &T, entry: &Cell<Flow<F::Addr>>, parsed: &Parsed<F>) {
    let flow = entry.get();
    if flow.flags & flow_flags::REPLY == 0 {
        if flow.flags & flow_flags::ANSWERED == 0 {
            set_ack(entry, parsed);
        }
        return;
    }
    set_ack(entry, parsed);
    if flow.flags & flow_flags::ANSWERED != 0 {
        return;
    }
    let Some(request) = tables.flow(FlowTable::Pending, &reverse_key(&parsed.key, &flow)) else { return };
    let opens = parsed.tcp_flags & tcp_flags::SYN != 0;
    // SAFETY: the pointers of live `Cell`s, written field by field so that CPUs do not undo each other's notes.
    unsafe {
        let request = request.as_ptr();
        if opens || (*request).ack == 0 {
            (*request).ack = parsed.seq.wrapping_add(u32::from(opens));
        }
        (*request).flags |= flow_flags::ANSWERED;
        (*entry.as_ptr()).flags |= flow_flags::ANSWERED;
    }
}

/// Whether a packet of a pending flow shows that it is no flood's: its client has heard the answer. Who has sent a SYN under
/// another's address does not know what to acknowledge; who has sent a datagram so does not go on.
#[inline(always)]
fn is_confirmed<F: Family, T: Tables<F>>(
    tables: &T,
    entry: &Cell<Flow<F::Addr>>,
    parsed: &Parsed<F>,
) -> bool {
    let acknowledges = parsed.tcp_flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::ACK;
    if is_one_way::<F, T>(tables, entry) {
        // The answer does not come by here: that the client goes on is all that shows.
        return !parsed.is_tcp() || acknowledges;
    }
    // SAFETY: the pointer of a live `Cell`; two fields alone, because a copy of the whole flow costs stack.
    let (flags, ack) = unsafe { ((*entry.as_ptr()).flags, (*entry.as_ptr()).ack) };
    if flags & flow_flags::ANSWERED == 0 {
        return false;
    }
    if !parsed.is_tcp() {
        return true;
    }
    let near = parsed.ack.wrapping_sub(ack).wrapping_add(WINDOW) < 2 * WINDOW;
    flags & flow_flags::REPLY == 0 && acknowledges && near
}

/// Both halves of a flow that is confirmed move from `PENDING` to `FLOWS`.
///
/// The pending halves go last, so that no packet finds none. If the table is full for good, the flow stays pending and
/// works.
///
/// The kernel gives a removed entry's memory to another flow at once, whoever still looks at it. So what is moved is a
/// copy, taken before the entry was seen to be in its place still; else another CPU has moved it.
#[inline(never)]
fn promote<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F::Addr>,
    entry: &Cell<Flow<F::Addr>>,
) -> Result<(), Reason> {
    let flow = Cell::new(entry.get());
    if !tables.flow(FlowTable::Pending, key).is_some_and(|now| core::ptr::eq(&raw const *now, entry)) {
        return Ok(());
    }
    if is_one_way::<F, T>(tables, &flow) {
        tables.put_flow(FlowTable::Established, key, &flow)?;
        tables.remove_flow(FlowTable::Pending, key);
        return Ok(());
    }
    let other_key = reverse_key(key, &flow.get());
    let other = Cell::new(reverse_value(key, &flow.get()));
    if let Some(old) = tables.flow(FlowTable::Pending, &other_key) {
        // SAFETY: a cell of ours, and the pointer of a live one; a copy of the whole flow costs stack.
        unsafe { (*other.as_ptr()).ack = (*old.as_ptr()).ack };
    }
    tables.put_flow(FlowTable::Established, &other_key, &other)?;
    keep_newest::<F, T>(tables, FlowTable::Established, &other_key);
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

/// [`State::is_over`] for the number of a state.
#[inline(always)]
pub(crate) const fn is_over(state: u8, idle: u64, timeout: u64, end: End) -> bool {
    let given_away = match end {
        End::Sweep => false,
        End::Reuse => state == State::Reset as u8,
        End::LastResort => state == State::Reset as u8 || state == State::Closed as u8,
    };
    given_away || idle > timeout
}

/// Whether a flow has ended: its tuple may serve another.
#[inline(never)]
fn has_ended<F: Family, T: Tables<F>>(
    tables: &T,
    table: FlowTable,
    proto: u8,
    entry: &Cell<Flow<F::Addr>>,
    end: End,
) -> bool {
    // SAFETY: the pointer of a live `Cell`; two fields alone, because a copy of the whole flow costs stack.
    let (flags, last_seen) = unsafe { ((*entry.as_ptr()).flags, (*entry.as_ptr()).last_seen) };
    let state = State::number(table, proto, flags);
    is_over(state, tables.now().saturating_sub(last_seen), tables.timeout(state), end)
}

/// Enters a new flow, both halves, into `PENDING`: rule 1, the tuple a reply is known by belongs to one flow.
///
/// If the tuple is taken by a live flow (the same client port through two frontends to one backend), the
/// new flow gets another source port, of the reserved range.
#[inline(never)]
pub fn enter<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F::Addr>,
    entry: &Cell<Flow<F::Addr>>,
) -> Result<(), Reason> {
    if is_one_way::<F, T>(tables, entry) {
        return tables.put_flow(FlowTable::Pending, key, entry);
    }
    set_addresses::<F>(key, entry);
    let spread = hash::tuple::<F>(key);
    // A forwarded packet bears this node's address: it needs a port of ours from the start.
    if entry.get().carry == Carry::Forward as u8 {
        set_src_port(entry, reserved_port(spread, 0));
    }
    // To ask whether a flow has ended is dear to the verifier. So it is asked at the first port and at the last; between
    // them only what nobody has is taken. What enters the flow stands behind the loop, once.
    let mut vacant = is_vacant::<F, T>(tables, key, entry);
    if !vacant {
        vacant = reclaim::<F, T>(tables, key, entry, End::Reuse);
    }
    let mut attempt = 1;
    while !vacant && attempt < PORT_ATTEMPTS {
        set_src_port(entry, reserved_port(spread, attempt));
        vacant = is_vacant::<F, T>(tables, key, entry);
        attempt += 1;
    }
    if !vacant {
        // A port that has not been used for a while is better than one whose last packets may still be on their way.
        vacant = reclaim::<F, T>(tables, key, entry, End::LastResort);
    }
    if vacant && add_reply::<F, T>(tables, key, entry) {
        return tables.put_flow(FlowTable::Pending, key, entry);
    }
    Err(Reason::PortsExhausted)
}

/// Whether nobody has the tuple that replies of a new flow would have.
#[inline(never)]
fn is_vacant<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F::Addr>,
    entry: &Cell<Flow<F::Addr>>,
) -> bool {
    let reply_key = reverse_key(key, &entry.get());
    tables.flow(FlowTable::Established, &reply_key).is_none()
        && tables.flow(FlowTable::Pending, &reply_key).is_none()
}

/// Clears away what has the tuple that replies of a new flow would have, if that is over or this flow itself. Answers
/// whether nobody has it now.
#[inline(always)]
fn reclaim<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F::Addr>,
    entry: &Cell<Flow<F::Addr>>,
    end: End,
) -> bool {
    clear::<F, T>(tables, FlowTable::Established, key, entry, end);
    clear::<F, T>(tables, FlowTable::Pending, key, entry, end);
    // Looked up instead of told by these: the verifier goes on from here on one way instead of many.
    is_vacant::<F, T>(tables, key, entry)
}

/// [`reclaim`] in one table.
#[inline(never)]
fn clear<F: Family, T: Tables<F>>(
    tables: &T,
    table: FlowTable,
    key: &FlowKey<F::Addr>,
    entry: &Cell<Flow<F::Addr>>,
    end: End,
) {
    let reply_key = reverse_key(key, &entry.get());
    if let Some(other) = tables.flow(table, &reply_key)
        && (is_reverse(key, &other.get()) || has_ended::<F, T>(tables, table, key.proto, &other, end))
    {
        forget::<F, T>(tables, table, &reply_key, &other);
    }
}

/// Enters the reply half of a new flow; `false` if another was quicker.
#[inline(never)]
fn add_reply<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F::Addr>,
    entry: &Cell<Flow<F::Addr>>,
) -> bool {
    let reply_key = reverse_key(key, &entry.get());
    // There and back: programs have no stack for both.
    turn(key, entry);
    let added = tables.add_flow(FlowTable::Pending, &reply_key, entry);
    turn(&reply_key, entry);
    keep_newest::<F, T>(tables, FlowTable::Pending, &reply_key);
    added
}

/// Makes of the value of one direction of a flow that is in no table yet, and of its key, the value of the other: what
/// [`reverse_value`] answers.
#[inline(always)]
fn turn<A: Copy>(key: &FlowKey<A>, entry: &Cell<Flow<A>>) {
    let flow = entry.as_ptr();
    // SAFETY: as in `set_src_port`.
    unsafe {
        (*flow).src = key.dst;
        (*flow).dst = key.src;
        (*flow).src_port = key.dst_port;
        (*flow).dst_port = key.src_port;
        (*flow).flags = turned_flags((*flow).flags);
        (*flow).addresses = Diff::back((*flow).addresses);
    }
}

/// The flags of one direction as the other has them.
#[inline(always)]
const fn turned_flags(flags: u8) -> u8 {
    peer_flags(flags) | (flags & flow_flags::CROSS) | ((flags & flow_flags::REPLY) ^ flow_flags::REPLY)
}

/// Sees to it that an entry is not the next to go. The kernel's LRU first takes what nobody has looked up, be it the newest
/// (`__bpf_lru_list_shrink_inactive` in kernel/bpf/bpf_lru_list.c): in a full table one time in 128, the second half of a flow
/// would push out the first.
#[inline(always)]
fn keep_newest<F: Family, T: Tables<F>>(tables: &T, table: FlowTable, key: &FlowKey<F::Addr>) {
    let _ = tables.flow(table, key);
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
