//! The pipeline every packet goes through, written once for both families, for XDP and tc, for NICs and
//! pods, for the kernel and the host.
//!
//! An established packet costs one lookup in `FLOWS` and one rewrite, whatever the kind of translation. All others
//! come further: what is not addressed to this node or a Service leaves after one lookup more; a new connection
//! is looked up in the service tables, gets a backend and its two entries.

use core::cell::Cell;

use crate::abi::{
    AddressInfo, Carry, Edge, EdgeSourceKey, Flow, FlowKey, Hop, OwnMac, Service, ServiceKey, Side,
    address_flags, backend_flags, edge_flags, network_flags, service_flags,
};
use crate::family::Family;
use crate::flow::{self, Progress};
use crate::fragment;
use crate::hash;
use crate::icmp;
use crate::maps::MAX_MACS;
use crate::packet::{Packet, Route};
use crate::parse::{Parsed, parse};
use crate::reason::{Action, Reason};
use crate::respond::respond;
use crate::rewrite::{rewrite, rewrite_segment};
use crate::sample;
use crate::service::{self, Scope};
use crate::tables::{Admission, Event, FlowTable, Tables};
use crate::tunnel;
use crate::wire::{EthHdr, IcmpHdr, Mac, tcp_flags};

/// What the hook has to do with the packet.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Verdict {
    /// On its way: untouched, or rewritten for the stack, the pod or the client.
    Pass = 0,
    /// Out to the next hop that [`Packet::route`] found.
    Forward = 1,
    /// Back out of the device it came in through; the Ethernet addresses are turned around.
    SendBack = 2,
    Drop = 3,
}

/// Takes one packet through the pipeline. The reason is what is counted.
#[inline(always)]
pub fn process<F: Family, P: Packet, T: Tables<F>>(
    packet: &mut P,
    tables: &T,
    side: Side,
) -> (Verdict, Reason) {
    if matches!(side, Side::NicIn) && is_for_others::<F, P, T>(packet, tables) {
        return (Verdict::Pass, Reason::OtherHost);
    }
    let mut parsed = Parsed::<F>::default();
    let result = match (translate(packet, tables, side, &mut parsed), side) {
        (Err(reason), Side::NicIn | Side::PodIn) => Err(refuse(packet, tables, &parsed, reason)),
        (result, _) => result,
    };
    match result {
        Ok(Carry::Stack) => (Verdict::Pass, Reason::Translated),
        Ok(Carry::Forward) => (Verdict::Forward, Reason::Forwarded),
        Ok(Carry::Bounce) => (Verdict::SendBack, Reason::Hairpinned),
        Ok(Carry::Tunnel) => (Verdict::Forward, Reason::Tunnelled),
        Err(reason) if came_tunnelled::<F, P, T>(packet, tables) => {
            // Nobody here is to get it, and whom it is from would not take an answer that comes this way. What cannot be
            // parsed does not say where it was seen.
            parsed.key.side = side as u8;
            sample::packet::<F, P, T>(packet, tables, &parsed, reason);
            (Verdict::Drop, reason)
        }
        Err(reason) => match reason.action() {
            Action::Pass => (Verdict::Pass, reason),
            Action::Carry | Action::Drop => {
                sample::packet::<F, P, T>(packet, tables, &parsed, reason);
                (Verdict::Drop, reason)
            }
            Action::Reject | Action::Expire | Action::Shrink => {
                sample::packet::<F, P, T>(packet, tables, &parsed, reason);
                match respond(packet, &parsed, reason) {
                    Ok(()) => (Verdict::SendBack, reason),
                    Err(reason) => (Verdict::Drop, reason),
                }
            }
        },
    }
}

/// Whether another node has sent the packet through a tunnel, and has chosen its backend.
#[inline(always)]
fn came_tunnelled<F: Family, P: Packet, T: Tables<F>>(packet: &P, tables: &T) -> bool {
    tables.tunnel_port() != 0 && packet.chosen() != 0
}

/// Whether a frame that came in is another host's: a device that listens to everything, or behind a switch that does not know
/// better, sees it, and the stack will not take it (`eth_type_trans` in net/ethernet/eth.c).
#[inline(always)]
fn is_for_others<F: Family, P: Packet, T: Tables<F>>(packet: &P, tables: &T) -> bool {
    if !packet.may_be_for_others() {
        return false;
    }
    let Ok(eth) = packet.view::<EthHdr>(0) else { return false };
    let dst = eth.dst.number();
    let ifindex = packet.ifindex();
    // One of zeroes is not known.
    let differs = |own: OwnMac| own.mac.number() != 0 && own.mac.number() != dst;
    let own = tables.own_mac(ifindex & (MAX_MACS - 1));
    dst & Mac::GROUP == 0 && own.is_some_and(|own| own.ifindex == ifindex && differs(own))
}

/// Finds the flow of a packet and does as it says.
#[inline(always)]
fn translate<F: Family, P: Packet, T: Tables<F>>(
    packet: &mut P,
    tables: &T,
    side: Side,
    parsed: &mut Parsed<F>,
) -> Result<Carry, Reason> {
    match parse(packet, side, parsed) {
        Err(Reason::UnknownProtocol) if icmp::is_error(packet, parsed) => {
            return icmp::follow(packet, tables, parsed);
        }
        result => result?,
    }
    if parsed.is_later_fragment() {
        return trail(packet, tables, parsed);
    }
    let carry = match side {
        Side::NicIn | Side::PodIn => ingress(packet, tables, parsed),
        Side::NicOut | Side::PodOut => egress(packet, tables, parsed),
    }?;
    fragment::remember::<F, T>(tables, parsed);
    Ok(carry)
}

/// A packet that comes in: from outside, or from a pod.
#[inline(always)]
fn ingress<F: Family, P: Packet, T: Tables<F>>(
    packet: &mut P,
    tables: &T,
    parsed: &Parsed<F>,
) -> Result<Carry, Reason> {
    // Every entry of an incoming side has an address of this node, of a Service or of a backend as destination. Of most packets
    // that pass a node that is all there is to know.
    if !came_tunnelled::<F, P, T>(packet, tables) && !tables.may_know(&parsed.key.dst) {
        return Err(service::unknown::<F, T>(tables, &parsed.key.dst));
    }
    if let Some(entry) = tables.flow(FlowTable::Established, &parsed.key)
        && let Some(carry) = follow_established(packet, tables, parsed, &entry)?
    {
        return Ok(carry);
    }
    let info = if came_tunnelled::<F, P, T>(packet, tables) {
        // Where the client has asked is an address of the other node.
        AddressInfo { flags: address_flags::NODE_PORT }
    } else {
        service::address::<F, T>(tables, &parsed.key.dst)?
    };
    let fronts = info.flags & !(address_flags::BACKEND | address_flags::PEER) != 0;
    if !fronts && !names_backend(parsed, info) {
        return Err(Reason::NotOurs);
    }
    if let Some(entry) = tables.flow(FlowTable::Pending, &parsed.key)
        && let Some(carry) = follow(packet, tables, parsed, &entry, FlowTable::Pending)?
    {
        return Ok(carry);
    }
    if !fronts && !may_be_direct(parsed, info) {
        return Err(Reason::NotOurs);
    }
    if !is_admitted::<F, T>(tables, parsed) {
        return Err(Reason::LeftToOthers);
    }
    begin(packet, tables, parsed, info)?;
    // Looked up instead of handed over: what `begin` has on the stack is given back before the packet is carried.
    let entry = tables.flow(FlowTable::Pending, &parsed.key).ok_or(Reason::FlowTableFull)?;
    carry(packet, tables, parsed, &entry)
}

/// Whether a packet without a flow may begin one, while another Service proxy is there.
#[inline(always)]
fn is_admitted<F: Family, T: Tables<F>>(tables: &T, parsed: &Parsed<F>) -> bool {
    match tables.admission() {
        Admission::All => true,
        Admission::Opening => parsed.is_udp() || parsed.is_opening(),
        Admission::None => false,
    }
}

/// What becomes of an incoming packet that was not translated for `reason`: behind an address that is only a
/// Service's there is nobody who could make something of it, and the stack would send it out by its default route.
#[inline(always)]
fn refuse<F: Family, P: Packet, T: Tables<F>>(
    packet: &P,
    tables: &T,
    parsed: &Parsed<F>,
    reason: Reason,
) -> Reason {
    if tables.admission() as u8 == Admission::None as u8 {
        // Somebody else answers for what is no flow of ours.
        return if matches!(reason, Reason::NoSuchService) { Reason::LeftToOthers } else { reason };
    }
    let served = match reason {
        // The hook behind may know the first fragment, if that had to wait for it.
        Reason::Fragment if !packet.has_hook_behind() => Reason::StrayFragment,
        Reason::UnknownProtocol if !is_icmp_to_keep(packet, parsed) => Reason::UnservedProtocol,
        _ => return reason,
    };
    service::refuse::<F, T>(tables, &parsed.key.dst, reason, served)
}

/// Whether a packet is an ICMP message that must not be refused.
#[inline(always)]
fn is_icmp_to_keep<F: Family, P: Packet>(packet: &P, parsed: &Parsed<F>) -> bool {
    let icmp = packet.view::<IcmpHdr>(parsed.transport as usize);
    parsed.key.proto == F::ICMP && !icmp.is_ok_and(|icmp| F::may_refuse(icmp.kind))
}

/// A packet that goes out: to a client outside, or to a pod. Only replies of flows are translated here.
#[inline(always)]
fn egress<F: Family, P: Packet, T: Tables<F>>(
    packet: &mut P,
    tables: &T,
    parsed: &Parsed<F>,
) -> Result<Carry, Reason> {
    if let Some(entry) = tables.flow(FlowTable::Established, &parsed.key) {
        return follow_established(packet, tables, parsed, &entry)?.ok_or(Reason::NotOurs);
    }
    let entry = tables.flow(FlowTable::Pending, &parsed.key).ok_or(Reason::NotOurs)?;
    follow(packet, tables, parsed, &entry, FlowTable::Pending)?.ok_or(Reason::NotOurs)
}

/// A later fragment: goes the way of its first one, which has said all there is to say about the flow.
#[inline(never)]
fn trail<F: Family, P: Packet, T: Tables<F>>(
    packet: &mut P,
    tables: &T,
    parsed: &mut Parsed<F>,
) -> Result<Carry, Reason> {
    fragment::recall::<F, T>(tables, parsed)?;
    let entry = flow::find::<F, T>(tables, &parsed.key).ok_or(Reason::Fragment)?;
    carry(packet, tables, parsed, &entry)
}

/// [`follow`] for an established flow, most packets of which take the short way.
#[inline(always)]
fn follow_established<F: Family, P: Packet, T: Tables<F>>(
    packet: &mut P,
    tables: &T,
    parsed: &Parsed<F>,
    entry: &Cell<Flow<F::Addr>>,
) -> Result<Option<Carry>, Reason> {
    match follow_at_rest(packet, tables, parsed, entry)? {
        None => follow(packet, tables, parsed, entry, FlowTable::Established),
        carried => Ok(carried),
    }
}

/// A packet that has nothing to say of its flow, which is at rest, and goes where the flow knows already. `None`: it is
/// not such a packet, and nothing was done.
///
/// All that [`follow`] and [`carry`] would do is done here in one piece: a call costs a third of a look-up, and most packets
/// are such. Whatever asks for more belongs there.
#[inline(always)]
fn follow_at_rest<F: Family, P: Packet, T: Tables<F>>(
    packet: &mut P,
    tables: &T,
    parsed: &Parsed<F>,
    entry: &Cell<Flow<F::Addr>>,
) -> Result<Option<Carry>, Reason> {
    // SAFETY: the pointer of a live `Cell`, to which nothing here writes until this was used for the last time.
    let flow = unsafe { &*entry.as_ptr() };
    let forward = P::KEEPS_HOP && flow.carry == Carry::Forward as u8;
    let may_lose_backend = !flow::is_reply(flow) && (parsed.is_udp() || tables.resets_removed());
    let is_plain = !parsed.is_sctp()
        && parsed.tcp_flags & tcp_flags::SYN == 0
        && flow::is_at_rest::<F, T>(tables, entry, parsed)
        && !flow::is_direct(flow)
        && if forward {
            parsed.ttl > 1 && flow::knows_hop::<F, T>(tables, flow, parsed)
        } else {
            flow.carry == Carry::Stack as u8
        }
        && (!may_lose_backend || service::is_alive::<F, T>(tables, flow.backend, flow.generation));
    if !is_plain {
        return Ok(None);
    }
    if forward {
        packet.set_hop(&flow.hop);
    }
    flow::set_ack(entry, parsed);
    // SAFETY: as above.
    let flow = unsafe { &*entry.as_ptr() };
    tables.count(flow.service, Event::Packet(parsed.ip_len));
    rewrite_segment(packet, parsed, flow, forward)?;
    Ok(Some(if forward { Carry::Forward } else { Carry::Stack }))
}

/// A packet of a flow. `None`: the flow does not speak for this packet, which begins a new one.
#[inline(always)]
fn follow<F: Family, P: Packet, T: Tables<F>>(
    packet: &mut P,
    tables: &T,
    parsed: &Parsed<F>,
    entry: &Cell<Flow<F::Addr>>,
    table: FlowTable,
) -> Result<Option<Carry>, Reason> {
    let pending = table as u32 == FlowTable::Pending as u32;
    let flow = entry.get();
    if flow::is_reply(&flow) {
        if parsed.is_opening() {
            // The backend opens a connection of its own from the port it serves on.
            return Err(Reason::NotOurs);
        }
    } else {
        if !flow::changes_nothing(&parsed.key, &flow)
            && is_left_alone::<F, P, T>(packet, tables, &parsed.key, &flow)
        {
            return Err(Reason::Direct);
        }
        // A new SYN (INIT) on an old tuple is a new connection; on a pending one it is the first again.
        let reopens = parsed.is_opening() && !pending;
        // Of a time when there were tunnels.
        let is_cut_off = flow::is_tunnelled(&flow) && tables.tunnel_port() == 0;
        let may_move = (parsed.is_udp() || parsed.is_opening()) && !flow::is_direct(&flow);
        if reopens
            || is_cut_off
            || (may_move && !service::is_alive::<F, T>(tables, flow.backend, flow.generation))
        {
            flow::forget::<F, T>(tables, table, &parsed.key, entry);
            return Ok(None);
        }
        if parsed.is_tcp()
            && tables.resets_removed()
            && !flow::is_direct(&flow)
            && service::is_removed::<F, T>(tables, flow.backend, flow.generation)
        {
            flow::abort::<F, T>(tables, table, &parsed.key, entry);
            return Err(Reason::BackendRemoved);
        }
    }
    if !pending && flow::is_at_rest::<F, T>(tables, entry, parsed) {
        flow::set_ack(entry, parsed);
        return carry(packet, tables, parsed, entry).map(Some);
    }
    match flow::advance::<F, T>(tables, table, entry, parsed)? {
        Progress::Lost => return Ok(None),
        Progress::Stays => {}
        Progress::Promoted => {
            // The pending entry may be another flow's by now: the kernel gives out at once what was removed.
            let promoted = tables.flow(FlowTable::Established, &parsed.key).ok_or(Reason::FlowTableFull)?;
            return carry(packet, tables, parsed, &promoted).map(Some);
        }
    }
    carry(packet, tables, parsed, entry).map(Some)
}

/// Whether a packet is addressed to where a backend of its protocol is.
#[inline(always)]
fn names_backend<F: Family>(parsed: &Parsed<F>, info: AddressInfo) -> bool {
    let backend = if parsed.is_udp() {
        address_flags::BACKEND_UDP
    } else if parsed.is_tcp() {
        address_flags::BACKEND_TCP
    } else {
        address_flags::BACKEND_SCTP
    };
    info.flags & backend != 0
}

/// Whether a packet that no frontend takes begins a flow of a client with the backend that it asks for.
#[inline(always)]
fn may_be_direct<F: Family>(parsed: &Parsed<F>, info: AddressInfo) -> bool {
    names_backend(parsed, info) && (parsed.is_udp() || parsed.is_opening())
}

/// Whether XDP has had the packet: what it leaves for the stack is of a flow by now, or none of ours.
#[inline(never)]
fn is_behind_xdp<F: Family, P: Packet, T: Tables<F>>(packet: &P, tables: &T, side: u8) -> bool {
    side == Side::NicIn as u8
        && !packet.has_hook_behind()
        && tables.edge(packet.ifindex()).is_some_and(|edge| edge.flags & edge_flags::XDP_FIRST != 0)
}

/// Whether a packet with the tuple of a direct flow goes on as it is. Behind XDP it may be of a flow through a frontend:
/// XDP has translated it, and those of the direct flow have another port by now.
#[inline(always)]
pub(crate) fn is_left_alone<F: Family, P: Packet, T: Tables<F>>(
    packet: &P,
    tables: &T,
    key: &FlowKey<F::Addr>,
    flow: &Flow<F::Addr>,
) -> bool {
    flow::is_direct(flow)
        && (flow::changes_nothing(key, flow) || is_behind_xdp::<F, P, T>(packet, tables, key.side))
}

/// A packet without a flow, addressed to this node, to a Service or to a backend: enters a new flow, if there is a
/// frontend, or if it is the first to a backend itself.
#[inline(never)]
fn begin<F: Family, P: Packet, T: Tables<F>>(
    packet: &mut P,
    tables: &T,
    parsed: &Parsed<F>,
    info: AddressInfo,
) -> Result<(), Reason> {
    let key = &parsed.key;
    if info.flags & address_flags::LOOPBACK != 0 {
        return Err(Reason::NotOurs);
    }
    let mut service = Service::default();
    let found = {
        // Gives its room on the stack to the flow.
        let frontend = ServiceKey { addr: key.dst, port: key.dst_port, proto: key.proto, pad: 0 };
        service::find::<F, T>(tables, &frontend, info, &mut service)
    };
    let direct = match found {
        Err(Reason::NotOurs)
            if may_be_direct(parsed, info) && !is_behind_xdp::<F, P, T>(packet, tables, key.side) =>
        {
            true
        }
        result => result.map(|()| false)?,
    };
    if parsed.is_reset() {
        return Err(Reason::StrayReset);
    }
    let flow = Cell::new(Flow::default());
    let opened = if direct {
        open_direct::<F, T>(tables, key, &flow);
        Ok(())
    } else {
        admit::<F, P, T>(packet, tables, &service, parsed)
            .and_then(|id| open::<F, T>(tables, key, service.id, id, &flow))
            .and_then(|()| {
                if may_tunnel::<F, T>(tables, key, &service, &flow)
                    && tunnel::begin::<F, T>(tables, key.proto, &flow)
                {
                    return Ok(());
                }
                find_way(packet, tables, parsed, &flow, service::masquerades::<F, T>(tables, &service))
            })
    };
    let entered = opened.and_then(|()| flow::enter::<F, T>(tables, key, &flow));
    match entered {
        _ if direct => {}
        Ok(()) => tables.count(service.id, Event::Connection),
        Err(reason) if matches!(reason.action(), Action::Pass) => {}
        Err(reason) => tables.count(service.id, Event::Refused(reason)),
    }
    entered
}

/// Chooses a backend for a client, if it may ask for the frontend.
#[inline(always)]
fn admit<F: Family, P: Packet, T: Tables<F>>(
    packet: &P,
    tables: &T,
    service: &Service,
    parsed: &Parsed<F>,
) -> Result<u32, Reason> {
    let key = &parsed.key;
    if !service::is_source_allowed::<F, T>(tables, service, &key.src) {
        return Err(Reason::SourceNotAllowed);
    }
    if came_tunnelled::<F, P, T>(packet, tables) {
        return if packet.chosen() == tunnel::GONE {
            Err(Reason::NoSuchBackend)
        } else {
            Ok(packet.chosen())
        };
    }
    if parsed.is_tcp() && !parsed.is_opening() && service::is_chosen_at_random(service) {
        return Err(Reason::FlowLost);
    }
    let inside = key.side == Side::PodIn as u8 || tables.networks(&key.src) & network_flags::POD != 0;
    let scope = if inside { Scope::Internal } else { Scope::External };
    service::choose::<F, T>(tables, service, scope, hash::tuple::<F>(key), &key.src)
}

/// Whether a new connection is one whose backend's node shall answer: from a client outside, to another node.
#[inline(always)]
fn may_tunnel<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F::Addr>,
    service: &Service,
    entry: &Cell<Flow<F::Addr>>,
) -> bool {
    tables.tunnel_port() != 0
        && tables.sends_tunnelled()
        && service.flags & service_flags::DSR != 0
        && entry.get().carry == Carry::Forward as u8
        && !service::masquerades::<F, T>(tables, service)
        && tables.networks(&key.src) & network_flags::POD == 0
}

/// Writes down what becomes of a new connection to a backend.
#[inline(never)]
fn open<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F::Addr>,
    service: u32,
    id: u32,
    entry: &Cell<Flow<F::Addr>>,
) -> Result<(), Reason> {
    let backend = service::backend::<F, T>(tables, id)?;
    let from_pod = key.side == Side::PodIn as u8;
    // A pod that is its own backend would take a packet from itself for a stray: it gets one from the frontend,
    // and its answer finds the way back here.
    let hairpin = from_pod && backend.addr == key.src;
    let local = backend.flags & backend_flags::LOCAL != 0;
    entry.set(Flow {
        last_seen: tables.now(),
        backend: id,
        generation: backend.generation,
        service,
        src: if hairpin { key.dst } else { key.src },
        src_port: key.src_port,
        dst: backend.addr,
        dst_port: backend.port,
        flags: 0,
        carry: match (hairpin, from_pod || local) {
            (true, _) => Carry::Bounce,
            (false, true) => Carry::Stack,
            (false, false) => Carry::Forward,
        } as u8,
        tick: tables.tick(),
        ack: 0,
        hop: Hop::default(),
        fits: 0,
        addresses: 0,
    });
    Ok(())
}

/// Writes down a connection to a backend that its client has named itself.
#[inline(always)]
fn open_direct<F: Family, T: Tables<F>>(tables: &T, key: &FlowKey<F::Addr>, entry: &Cell<Flow<F::Addr>>) {
    entry.set(Flow {
        last_seen: tables.now(),
        src: key.src,
        src_port: key.src_port,
        dst: key.dst,
        dst_port: key.dst_port,
        carry: Carry::Stack as u8,
        ..Flow::default()
    });
}

/// Where a connection goes on whose client the backend shall not see, and with which source address: one from outside
/// to another node, and with `masquerades` every other but a pod's to itself.
#[inline(never)]
fn find_way<F: Family, P: Packet, T: Tables<F>>(
    packet: &mut P,
    tables: &T,
    parsed: &Parsed<F>,
    entry: &Cell<Flow<F::Addr>>,
    masquerades: bool,
) -> Result<(), Reason> {
    let Flow { src, dst, carry, .. } = entry.get();
    if carry == Carry::Bounce as u8 || (carry == Carry::Stack as u8 && !masquerades) {
        return Ok(());
    }
    let edge = match packet.route::<F>(&src, &dst, parsed.ip_len, 0)? {
        Route::Out => tables.edge(packet.out_ifindex()),
        Route::Local => None,
    };
    let from_pod = parsed.key.side == Side::PodIn as u8;
    match edge {
        Some(edge) if masquerades || edge.flags & edge_flags::POD == 0 => {
            let crosses = (edge.flags & edge_flags::POD != 0) != from_pod;
            let src = source::<F, T>(tables, packet.out_ifindex(), &edge, &parsed.key);
            flow::send_on_from(entry, src, crosses)
        }
        // A way through a device that is no external edge leads to a pod of this node after all.
        _ => {
            flow::leave_to_stack(entry);
            Ok(())
        }
    }
}

/// The source of a connection that leaves through a device: the device's address, or one of its further ones. Each has
/// its own ports towards a backend.
#[inline(always)]
fn source<F: Family, T: Tables<F>>(tables: &T, ifindex: u32, edge: &Edge, key: &FlowKey<F::Addr>) -> F::Addr {
    let sources = u32::from(F::edge_sources(edge));
    let first = F::edge_addr(edge);
    if sources == 0 {
        return first;
    }
    match hash::again(hash::tuple::<F>(key)) % (sources + 1) {
        0 => first,
        n => {
            let further = tables.edge_source(&EdgeSourceKey { ifindex, index: n - 1 });
            further.map_or(first, |further| F::edge_addr(&further))
        }
    }
}

/// Rewrites the packet as its flow says and prepares its way.
#[inline(never)]
fn carry<F: Family, P: Packet, T: Tables<F>>(
    packet: &mut P,
    tables: &T,
    parsed: &Parsed<F>,
    entry: &Cell<Flow<F::Addr>>,
) -> Result<Carry, Reason> {
    // SAFETY: the pointer of a live `Cell`, to which nothing here writes while this is used.
    let flow = unsafe { &*entry.as_ptr() };
    if flow::changes_nothing(&parsed.key, flow) {
        return Err(Reason::Direct);
    }
    // Read once: to the verifier, what is read again could be anything again.
    let (carry, is_direct) = (flow.carry, flow::is_direct(flow));
    let is_routed = carry != Carry::Stack as u8;
    // We are the router then: TTL and MTU are ours to respect.
    if is_routed && parsed.ttl <= 1 {
        return Err(Reason::TtlExceeded);
    }
    let is_tunnelled = carry == Carry::Tunnel as u8;
    if is_tunnelled && tables.tunnel_port() == 0 {
        return Err(Reason::NoRoute);
    }
    let is_tunnelled = tables.tunnel_port() != 0 && is_tunnelled;
    if carry == Carry::Forward as u8 || is_tunnelled {
        if P::KEEPS_HOP && flow::knows_hop::<F, T>(tables, flow, parsed) {
            packet.set_hop(&flow.hop);
        } else {
            find_next_hop(packet, tables, parsed, entry)?;
        }
    }
    // SAFETY: as above.
    let flow = unsafe { &*entry.as_ptr() };
    // What is left to the hook behind is counted there.
    if !is_direct {
        tables.count(flow.service, Event::Packet(parsed.ip_len));
    }
    if is_tunnelled {
        return tunnel::wrap(packet, tables, parsed, flow).map(|()| Carry::Tunnel);
    }
    rewrite(packet, parsed, flow, is_routed)?;
    if carry == Carry::Bounce as u8 {
        packet.turn_around()?;
        return Ok(Carry::Bounce);
    }
    Ok(if is_routed { Carry::Forward } else { Carry::Stack })
}

/// Has the packet remember where its flow's new destination is reached, or the node that it is tunnelled to.
#[inline(always)]
pub(crate) fn find_next_hop<F: Family, P: Packet, T: Tables<F>>(
    packet: &mut P,
    tables: &T,
    parsed: &Parsed<F>,
    entry: &Cell<Flow<F::Addr>>,
) -> Result<(), Reason> {
    if flow::is_one_way::<F, T>(tables, entry) {
        find_node(packet, tables, parsed, entry)
    } else {
        find_destination(packet, tables, parsed, entry)
    }
}

/// [`find_next_hop`] of a packet that is rewritten.
#[inline(never)]
fn find_destination<F: Family, P: Packet, T: Tables<F>>(
    packet: &mut P,
    tables: &T,
    parsed: &Parsed<F>,
    entry: &Cell<Flow<F::Addr>>,
) -> Result<(), Reason> {
    let generation = tables.routing().generation;
    let Flow { src, dst, .. } = entry.get();
    let route = packet.route::<F>(&src, &dst, parsed.ip_len, 0)?;
    keep_next_hop(packet, tables, parsed, entry, (route, generation))
}

/// [`find_next_hop`] of a packet that is tunnelled.
#[inline(never)]
fn find_node<F: Family, P: Packet, T: Tables<F>>(
    packet: &mut P,
    tables: &T,
    parsed: &Parsed<F>,
    entry: &Cell<Flow<F::Addr>>,
) -> Result<(), Reason> {
    let generation = tables.routing().generation;
    let Flow { src: node, .. } = entry.get();
    match packet.route::<F>(&F::Addr::default(), &node, parsed.ip_len, tunnel::overhead::<F>()) {
        Ok(route) => keep_next_hop(packet, tables, parsed, entry, (route, generation)),
        Err(Reason::PacketTooBig) => Err(Reason::TunnelTooBig),
        Err(reason) => Err(reason),
    }
}

/// What was found is remembered, if the packet can be sent there.
#[inline(always)]
fn keep_next_hop<F: Family, P: Packet, T: Tables<F>>(
    packet: &P,
    tables: &T,
    parsed: &Parsed<F>,
    entry: &Cell<Flow<F::Addr>>,
    (route, generation): (Route, u32),
) -> Result<(), Reason> {
    if matches!(route, Route::Local) {
        return Err(Reason::NoRoute);
    }
    if P::NEEDS_XDP_TRANSMIT && packet.out_ifindex() != packet.ifindex() {
        let transmits =
            tables.edge(packet.out_ifindex()).is_some_and(|e| e.flags & edge_flags::XDP_TRANSMIT != 0);
        if !transmits {
            return Err(Reason::NoNextHop);
        }
    }
    if P::KEEPS_HOP {
        flow::keep_hop::<F, T>(tables, entry, parsed, generation, (packet.out_ifindex(), packet.link()));
    }
    Ok(())
}
