//! What the fuzzers do: one packet of any bytes, or a whole history of packets, evictions, waiting and changes of the
//! maps, with a naive memory of who talks to whom beside it.
//!
//! Both take the bytes that libFuzzer gives, so that a file of its corpus is a test for everybody.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use arbitrary::{Arbitrary, Unstructured};

use super::invariants::check;
use super::node::{MTU, NIC, Node};
use super::{
    Segment, TestFamily, at, cluster, fragments, icmp_error, ports, read, reassemble, sctp, tcp, udp,
};
use crate::abi::{Flow, FlowKey, Hop, Side, backend_flags, backend_state, service_flags};
use crate::family::{V4, V6};
use crate::flow::{is_reply, reverse_key, reverse_value};
use crate::host::{HostPacket, HostRoute};
use crate::pipeline::process;
use crate::reason::Reason;
use crate::tables::FlowTable;
use crate::wire::{IpProto, sctp_chunk, tcp_flags};

const TCP: u8 = IpProto::Tcp as u8;
const UDP: u8 = IpProto::Udp as u8;
const SIDES: [Side; 4] = [Side::NicIn, Side::NicOut, Side::PodIn, Side::PodOut];

/// Takes any bytes through the pipeline of a node that has flows of every kind. The first byte says at which side.
///
/// # Panics
///
/// If one of the [`invariants`](super::invariants) is broken.
pub fn any_packet(data: &[u8]) {
    let Some((how, frame)) = data.split_first() else { return };
    let side = SIDES[usize::from(how & 3)];
    let behind = how & 4 != 0;
    // The family is the program's choice: by the Ethernet type. Others never come here.
    match frame.get(12..14) {
        Some([8, 0]) => any_packet_of::<V4>(side, behind, frame),
        Some([0x86, 0xdd]) => any_packet_of::<V6>(side, behind, frame),
        _ => {}
    }
}

fn any_packet_of<F: TestFamily>(side: Side, behind: bool, frame: &[u8]) {
    let node = Node::<F> { tables: cluster::<F>(NIC), route: HostRoute::Out { ifindex: NIC, mtu: MTU } };
    let client = at(F::CLIENT, 40000);
    for (side, bytes) in [
        (Side::NicIn, tcp(client, at(F::NODE, ports::WEB_NODE), tcp_flags::SYN)),
        (Side::NicIn, udp(client, at(F::NODE, ports::FAR_DNS_NODE), b"?")),
        (Side::PodIn, tcp(at(F::POD, 40000), at(F::VIP, ports::WEB), tcp_flags::SYN)),
    ] {
        node.send(side, bytes);
    }
    for piece in fragments(&udp(client, at(F::NODE, ports::DNS_NODE), &[7; 32]), 7, 16) {
        node.send(Side::NicIn, piece);
    }
    let mut packet = HostPacket::new(frame, NIC).with_route(node.route);
    if behind {
        packet = packet.with_hook_behind();
    }
    let (verdict, reason) = process::<F, _, _>(&mut packet, &node.tables, side);
    check(frame, &packet.bytes(), verdict, reason);
    check_tables(&node, false);
}

/// Lives through a history.
///
/// # Panics
///
/// If one of the [`invariants`](super::invariants) is broken, or the pipeline contradicts the naive memory.
pub fn history(data: &[u8]) {
    let mut data = Unstructured::new(data);
    let Ok(v6) = bool::arbitrary(&mut data) else { return };
    if v6 { live::<V6>(&mut data) } else { live::<V4>(&mut data) }
}

fn live<F: TestFamily>(data: &mut Unstructured<'_>) {
    let mut lived = Lived(Vec::new());
    let mut world = World::<F>::new();
    while !data.is_empty() {
        let Ok(step) = Step::arbitrary(data) else { return };
        lived.0.push(step);
        world.step(lived.0.last().expect("the step"));
        check_tables(&world.node, world.evicted);
    }
}

/// Tells a history that ended in a panic.
struct Lived(Vec<Step>);

impl Drop for Lived {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.iter().for_each(|step| eprintln!("{step:?}"));
        }
    }
}

/// What happens next.
#[derive(Arbitrary, Debug)]
enum Step {
    /// A client asks a frontend.
    Ask {
        who: u8,
        whom: u8,
        packet: Shape,
    },
    /// A backend answers one who asked.
    Answer {
        whom: u8,
        packet: Shape,
    },
    /// Somebody on the way, or the end itself, sends an ICMP error about what was sent last.
    Complain {
        whom: u8,
        kind: u8,
        quoted: u8,
        from_end: bool,
    },
    Wait(Pause),
    /// The LRU takes one half of a flow.
    Evict {
        pending: bool,
        which: u8,
    },
    Backend {
        id: u8,
        state: u8,
        other: bool,
    },
    Slot {
        slot: u8,
        id: u8,
    },
    Chance(u8),
    Route(Way),
}

#[derive(Arbitrary, Debug)]
enum Pause {
    Moment,
    Seconds,
    Minute,
    Minutes,
    Days,
}

#[derive(Arbitrary, Debug)]
enum Way {
    Out,
    Narrow,
    Pod,
    Local,
    NoNextHop,
    Nowhere,
}

/// A packet.
#[derive(Arbitrary, Debug)]
struct Shape {
    /// TCP flags or the SCTP chunk.
    flags: u8,
    /// In steps of 16 bytes, which makes fragments possible.
    len: u8,
    ttl: u8,
    /// Bytes of each fragment, in steps of 16; 0: not fragmented.
    pieces: u8,
    /// Bytes that are damaged.
    damage: Option<(u8, u8)>,
}

/// How far a talk has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    Awaited,
    Sent,
    /// Somebody went on after it: the client has heard it.
    Heard,
}

/// A frontend was asked by a client: what the naive memory knows of it.
#[derive(Debug)]
struct Talk {
    side: Side,
    proto: u8,
    /// The client's other name, which the backend answers to.
    source: SocketAddr,
    backend: SocketAddr,
    id: u32,
    /// Of the backend, when the conversation began: one that comes after it under its number is another.
    generation: u32,
    reason: Reason,
    answer: Answer,
    ending: bool,
    last: u64,
    /// It may be forgotten: a half was evicted, or something odd came by.
    shaken: bool,
    /// The last packet, as the backend got it.
    sent: Vec<u8>,
}

impl Talk {
    /// Where the backend's answers are seen.
    fn back(&self) -> Side {
        match (self.side, self.reason) {
            (side, Reason::Forwarded | Reason::Hairpinned) => side,
            (Side::NicIn, _) => Side::NicOut,
            _ => Side::PodOut,
        }
    }

    /// Whether its tuple may be another's by now.
    fn may_be_over(&self, now: u64) -> bool {
        let seconds = match (self.answer, self.proto) {
            (Answer::Awaited, _) => 30,
            (Answer::Heard, TCP) => 86400,
            (_, UDP) | (Answer::Heard, _) => 110,
            (Answer::Sent, _) => 30,
        };
        self.shaken || self.ending || now - self.last > seconds * 1_000_000_000
    }
}

/// Entries of flow tables.
type Entries<A> = Vec<(FlowKey<A>, Flow<A>)>;

/// Who asked whom: client, frontend, protocol.
type Who = (SocketAddr, SocketAddr, u8);

struct World<F: TestFamily> {
    node: Node<F>,
    talks: BTreeMap<Who, Talk>,
    /// Half a flow has been lost at some time.
    evicted: bool,
    /// Damaged packets have opened flows that the memory does not know.
    haunted: bool,
    /// Who was refused behind the point where flows are made.
    ghosts: BTreeSet<Who>,
}

fn clients<F: TestFamily>() -> [(Side, SocketAddr); 7] {
    [
        (Side::NicIn, at(F::CLIENT, 40000)),
        (Side::NicIn, at(F::CLIENT, 40001)),
        (Side::NicIn, at(F::FAR_POD, 40000)),
        (Side::PodIn, at(F::OTHER_POD, 40000)),
        (Side::PodIn, at(F::OTHER_POD, 40001)),
        (Side::PodIn, at(F::POD, 40000)),
        (Side::PodIn, at(F::POD, 40001)),
    ]
}

const PORTS: [(u16, u16, u8); 15] = [
    (ports::WEB, ports::WEB_NODE, TCP),
    (ports::FAR, ports::FAR_NODE, TCP),
    (ports::EMPTY, ports::EMPTY_NODE, TCP),
    (ports::LOCAL, ports::LOCAL_NODE, TCP),
    (ports::MANY, ports::MANY_NODE, TCP),
    (ports::GATED, ports::GATED_NODE, TCP),
    (ports::STICKY, ports::STICKY_NODE, TCP),
    (ports::DNS, ports::DNS_NODE, UDP),
    (ports::FAR_DNS, ports::FAR_DNS_NODE, UDP),
    (ports::EMPTY, ports::EMPTY_NODE, UDP),
    (ports::SIGNAL, ports::SIGNAL_NODE, SCTP),
    (ports::FAR_SIGNAL, ports::FAR_SIGNAL_NODE, SCTP),
    (ports::EMPTY, ports::EMPTY_NODE, SCTP),
    (9, 9, TCP),
    (9, 9, UDP),
];
const SCTP: u8 = IpProto::Sctp as u8;

impl<F: TestFamily> World<F> {
    fn new() -> Self {
        let (talks, ghosts) = (BTreeMap::new(), BTreeSet::new());
        Self { node: Node::new(), talks, evicted: false, haunted: false, ghosts }
    }

    /// Whether there may be a flow that the memory does not know.
    fn is_haunted(&self, who: &Who) -> bool {
        self.haunted || self.ghosts.contains(who)
    }

    fn now(&self) -> u64 {
        self.node.tables.now.get()
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Ask { who, whom, packet } => {
                let (side, client) = clients::<F>()[usize::from(*who) % 7];
                let (port, node_port, proto) = PORTS[usize::from(*whom >> 2) % PORTS.len()];
                let frontend = match whom & 3 {
                    0 | 1 => at(F::VIP, port),
                    2 => at(F::NODE, node_port),
                    _ => at(F::UNALLOCATED, port),
                };
                self.ask(side, (client, frontend, proto), packet);
            }
            Step::Answer { whom, packet } => self.answer(*whom, packet),
            Step::Complain { whom, kind, quoted, from_end } => {
                self.complain(*whom, *kind, *quoted, *from_end);
            }
            Step::Wait(pause) => self.node.wait(match pause {
                Pause::Moment => 1_000_000,
                Pause::Seconds => 2_000_000_000,
                Pause::Minute => 61_000_000_000,
                Pause::Minutes => 250_000_000_000,
                Pause::Days => 500_000_000_000_000,
            }),
            Step::Evict { pending, which } => self.evict(*pending, *which),
            Step::Backend { id, state, other } => {
                let id = u32::from(id % 6) + 1;
                let backend = self.node.tables.backends.get_mut(&id).expect("backends 1 to 6");
                backend.state = state % 3;
                backend.generation += u32::from(*other);
            }
            Step::Slot { slot, id } => {
                // Windows of TCP hold backends of TCP.
                let (slot, id) = match slot % 13 {
                    many @ 6.. => (u32::from(many) + 94, u32::from(id % 2) + 1),
                    one => (u32::from(one) + 1, u32::from(one / 2 * 2 + id % 2) + 1),
                };
                self.node.tables.slots.insert(slot, id);
            }
            Step::Chance(chance) => self.node.tables.random.set(u32::from(*chance)),
            Step::Route(way) => {
                self.node.route = match way {
                    Way::Out => HostRoute::Out { ifindex: NIC, mtu: MTU },
                    Way::Narrow => HostRoute::Out { ifindex: NIC, mtu: 1280 },
                    Way::Pod => HostRoute::Out { ifindex: NIC + 1, mtu: MTU },
                    Way::Local => HostRoute::Local,
                    Way::NoNextHop => HostRoute::NoNextHop,
                    Way::Nowhere => HostRoute::None,
                };
            }
        }
    }

    /// Sends a packet, or its fragments; what comes out, checked, with the reason that all had.
    fn send(&mut self, side: Side, (from, to, proto): Who, shape: &Shape) -> Option<(Vec<u8>, Reason)> {
        let packet = build(from, to, proto, shape);
        let pieces = match u16::from(shape.pieces & 7) * 16 {
            size @ 1.. if shape.len > 0 && proto == UDP => fragments(&packet, 7, size.into()),
            _ => vec![packet],
        };
        let mut out = Vec::new();
        let mut reasons = Vec::new();
        for mut bytes in pieces {
            let before = self.tuples();
            if let Some((place, bits)) = shape.damage {
                let place = 14 + usize::from(place) % (bytes.len() - 14);
                bytes[place] ^= bits;
            }
            let outcome = self.node.send(side, bytes);
            check(&outcome.before, &outcome.bytes, outcome.verdict, outcome.reason);
            if shape.damage.is_some() && self.tuples() != before {
                self.talks.values_mut().for_each(|talk| talk.shaken = true);
                self.haunted = true;
            }
            out.push(outcome.bytes);
            reasons.push(outcome.reason);
        }
        let reason = reasons[0];
        if shape.damage.is_some() {
            return None;
        }
        if out.len() == 1 {
            return Some((out.remove(0), reason));
        }
        if matches!(reason, Reason::Translated | Reason::Forwarded | Reason::Hairpinned) {
            assert!(reasons.iter().all(|other| *other == reason), "rule 7: {reasons:?}");
            return Some((reassemble(&out).expect("a packet"), reason));
        }
        Some((out.remove(0), reason))
    }

    /// All there is to know of flows but the time.
    fn tuples(&self) -> Entries<F::Addr> {
        let tables =
            [FlowTable::Established, FlowTable::Pending].map(|table| self.node.tables.entries(table));
        tables
            .into_iter()
            .flatten()
            .map(|(key, flow)| (key, Flow { last_seen: 0, tick: 0, ..flow }))
            .collect()
    }

    fn ask(&mut self, side: Side, who: Who, shape: &Shape) {
        let now = self.now();
        let Some((bytes, reason)) = self.send(side, who, shape) else { return };
        let (client, frontend, proto) = who;
        let flags = control(proto, shape.flags);
        let opening = flags == tcp_flags::SYN;
        let carried = matches!(reason, Reason::Translated | Reason::Forwarded | Reason::Hairpinned);
        let ends = carried.then(|| read(&bytes).unwrap_or_else(|e| panic!("{e}")).ends());

        if let Some(talk) = self.talks.get_mut(&who) {
            let state = &self.node.tables.backends[&talk.id];
            let alive = state.state == backend_state::ACTIVE && state.generation == talk.generation;
            let stays = !talk.shaken
                && !talk.may_be_over(now)
                && if opening { talk.answer == Answer::Awaited && alive } else { proto != UDP || alive };
            // Packets of a flow go where the first went, and under the same name, or nowhere.
            if stays {
                if let Some(ends) = ends {
                    let acknowledges = flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::ACK;
                    if talk.answer == Answer::Sent && (proto != TCP || acknowledges) {
                        talk.answer = Answer::Heard;
                    }
                    assert_eq!(ends, (talk.source, talk.backend), "{who:?} moved: {talk:?}");
                    assert_eq!(reason, talk.reason, "{talk:?}");
                    talk.sent = bytes;
                } else {
                    let way = [
                        Reason::TtlExceeded,
                        Reason::PacketTooBig,
                        Reason::NoRoute,
                        Reason::NoNextHop,
                        Reason::TtlExceeded,
                    ];
                    assert!(
                        talk.reason != Reason::Translated && way.contains(&reason),
                        "{reason:?}: {talk:?}"
                    );
                }
                talk.last = now;
                talk.ending |= flags & (tcp_flags::FIN | tcp_flags::RST) != 0;
                return;
            }
            if !carried {
                // The old flow may be gone, or may have stayed as it was.
                talk.shaken = true;
            }
        }
        let Some((source, backend)) = ends else {
            if !self.is_haunted(&who) && !self.talks.contains_key(&who) {
                self.check_refusal(side, who, shape, reason);
            }
            self.ghosts.insert(who);
            return;
        };
        // An older flow may have been found instead of a new one being made.
        let old = self.talks.get(&who).filter(|old| (old.source, old.backend) == (source, backend));
        let known = old.map(|old| (old.id, old.answer));
        let id = known.map_or_else(|| self.expect_backend(side, who, backend, reason), |(id, _)| id);
        let name = match reason {
            Reason::Translated => client.ip(),
            Reason::Forwarded => at(F::NODE, 0).ip(),
            _ => frontend.ip(),
        };
        let keeps_port = reason != Reason::Forwarded && source.port() == client.port();
        assert!(
            source.ip() == name && (keeps_port || (12288..28672).contains(&source.port())),
            "{client} became {source} on its way to {backend}"
        );
        let talk = Talk {
            side,
            proto,
            source,
            backend,
            id,
            generation: self.node.tables.backends[&id].generation,
            reason,
            answer: known.map_or(Answer::Awaited, |(_, answer)| answer),
            ending: flags & (tcp_flags::FIN | tcp_flags::RST) != 0,
            last: now,
            shaken: known.is_some() || self.is_haunted(&who),
            sent: bytes,
        };
        // Rule 1: whoever had this name for this backend is over.
        let back = talk.back();
        for (other, old) in &mut self.talks {
            if *other != who
                && (old.back(), old.proto, old.source, old.backend) == (back, proto, source, backend)
            {
                // Whoever lost a half finds out with a packet a second later.
                let unaware = known.is_some() && self.evicted;
                assert!(unaware || old.may_be_over(now), "{who:?} has the name of {other:?}: {old:?}");
                old.shaken = true;
            }
        }
        self.talks.insert(who, talk);
    }

    /// The backends that a frontend may choose for a client, or why there is none.
    fn choices(&self, side: Side, (client, frontend, proto): Who) -> Result<Vec<u32>, Reason> {
        let addr = F::wire(frontend.ip());
        let node = frontend.ip() == at(F::NODE, 0).ip();
        let named = |key: &crate::abi::ServiceKey<F::Addr>| {
            key.proto == proto
                && key.port == frontend.port()
                && (key.addr == addr || (node && key.addr == F::Addr::default()))
        };
        let Some((_, service)) = self.node.tables.services.iter().find(|(key, _)| named(key)) else {
            return Err(match () {
                () if frontend.ip() == at(F::UNALLOCATED, 0).ip() => Reason::NoSuchService,
                () if node => Reason::NotOurs,
                () => Reason::UnknownPort,
            });
        };
        if service.flags & service_flags::SOURCE_RANGES != 0 && client.ip() != at(F::CLIENT, 0).ip() {
            return Err(Reason::SourceNotAllowed);
        }
        let (window, drop) = match side {
            Side::PodIn => (service.internal, service_flags::INTERNAL_DROP),
            _ => (service.external, service_flags::EXTERNAL_DROP),
        };
        if window.len == 0 {
            let drops = service.flags & drop != 0;
            return Err(if drops { Reason::NoLocalEndpoints } else { Reason::NoEndpoints });
        }
        Ok((window.base..window.base + window.len).map(|slot| self.node.tables.slots[&slot]).collect())
    }

    /// The backend that a new flow came to must be one that it may come to, and the way must be the one there.
    fn expect_backend(&self, side: Side, who: Who, backend: SocketAddr, reason: Reason) -> u32 {
        let choices = self.choices(side, who);
        let mut choices = match choices {
            _ if self.is_haunted(&who) => (1..=6).collect(),
            Ok(choices) => choices,
            Err(want) => panic!("{who:?}: {reason:?}, not {want:?}"),
        };
        if [ports::STICKY, ports::STICKY_NODE].contains(&who.1.port()) {
            // What the client had before may be in no slot any more, but is a member.
            choices.extend([1, 2]);
        }
        let wire = F::wire(backend.ip());
        let found = choices.into_iter().find(|id| {
            let entry = &self.node.tables.backends[id];
            (entry.addr, entry.port) == (wire, backend.port())
        });
        let id = found.unwrap_or_else(|| panic!("{who:?} came to {backend}"));
        let local = self.node.tables.backends[&id].flags & backend_flags::LOCAL != 0;
        let want = match () {
            () if side == Side::PodIn && backend.ip() == who.0.ip() => Reason::Hairpinned,
            () if side == Side::PodIn || local => Reason::Translated,
            () if self.node.route == (HostRoute::Out { ifindex: NIC, mtu: MTU }) => Reason::Forwarded,
            () if self.node.route == (HostRoute::Out { ifindex: NIC, mtu: 1280 }) => Reason::Forwarded,
            // An older flow, or a route to a pod of this node after all.
            () => reason,
        };
        assert!(
            reason == want || self.is_haunted(&who) || self.talks.contains_key(&who),
            "{who:?} to {backend}: {reason:?}"
        );
        id
    }

    /// A packet without a flow was not carried.
    fn check_refusal(&self, side: Side, who: Who, shape: &Shape, reason: Reason) {
        let want = match self.choices(side, who) {
            Err(reason @ (Reason::NoSuchService | Reason::NotOurs | Reason::UnknownPort)) => vec![reason],
            _ if control(who.2, shape.flags) & tcp_flags::RST != 0 => vec![Reason::StrayReset],
            Err(reason) => vec![reason],
            Ok(ids) => {
                let broken =
                    ids.iter().any(|id| self.node.tables.backends[id].state == backend_state::UNUSED);
                let mut way = match self.node.route {
                    HostRoute::Out { ifindex: NIC, .. } => vec![Reason::PacketTooBig, Reason::TtlExceeded],
                    HostRoute::NoNextHop => vec![Reason::NoNextHop],
                    HostRoute::None => vec![Reason::NoRoute],
                    // A way that is too narrow is found out before where it leads.
                    HostRoute::Out { .. } => vec![Reason::PacketTooBig],
                    HostRoute::Local => vec![],
                };
                if side == Side::PodIn {
                    way = vec![Reason::TtlExceeded];
                }
                way.extend(broken.then_some(Reason::BrokenWindow));
                way
            }
        };
        assert!(want.contains(&reason), "{who:?}: {reason:?}, not {want:?}");
    }

    fn answer(&mut self, whom: u8, shape: &Shape) {
        let now = self.now();
        let Some((who, side, end)) = self.nth(whom) else { return };
        let Some((bytes, reason)) = self.send(side, end, shape) else { return };
        let flags = control(who.2, shape.flags);
        let talk = self.talks.get_mut(&who).expect("a talk");
        match reason {
            Reason::Translated | Reason::Forwarded | Reason::Hairpinned => {
                let ends = read(&bytes).unwrap_or_else(|e| panic!("{e}")).ends();
                assert!(talk.shaken || ends == (who.1, who.0), "the answer of {talk:?}");
                // It is the answer of whoever has that name now.
                let same = |talk: &&mut Talk| {
                    (talk.back(), talk.backend, talk.source, talk.proto) == (side, end.0, end.1, end.2)
                };
                for talk in self.talks.values_mut().filter(same) {
                    talk.last = now;
                    talk.answer = match talk.answer {
                        Answer::Sent if talk.proto != TCP => Answer::Heard,
                        Answer::Awaited => Answer::Sent,
                        known => known,
                    };
                    talk.ending |= flags & (tcp_flags::FIN | tcp_flags::RST) != 0;
                }
            }
            _ => {
                let lost = talk.shaken || talk.may_be_over(now);
                let own = flags == tcp_flags::SYN;
                let way = talk.reason != Reason::Translated;
                assert!(lost || own || way, "{reason:?}: the answer of {talk:?} is lost");
                // A reply that cannot be sent on is one nevertheless.
                talk.shaken |= way && !own;
            }
        }
    }

    fn complain(&mut self, whom: u8, kind: u8, quoted: u8, from_end: bool) {
        let Some((who, side, (backend, source, _))) = self.nth(whom) else { return };
        let talk = &self.talks[&who];
        let quote = &talk.sent[14..];
        let quote = &quote[..quote.len().min(F::HEADER_LEN + 8 + usize::from(quoted))];
        let from: IpAddr = if from_end { backend.ip() } else { at(F::UNALLOCATED, 0).ip() };
        let what = [F::PORT_UNREACHABLE, F::TOO_BIG, F::TIME_EXCEEDED][usize::from(kind) % 3];
        let outcome = self.node.send(side, icmp_error(from, source.ip(), what, quote));
        check(&outcome.before, &outcome.bytes, outcome.verdict, outcome.reason);
        let extended = F::HEADER_LEN == 40 && quote[6] == IpProto::Ipv6Frag as u8;
        if talk.shaken || extended {
            return;
        }
        match outcome.reason {
            Reason::Translated | Reason::Forwarded | Reason::Hairpinned => {
                let seen = read(&outcome.bytes).unwrap_or_else(|e| panic!("{e}"));
                let super::Seen::Icmp { dst, about, .. } = seen else { panic!("{seen:?}") };
                assert_eq!((dst, about), (who.0.ip(), (who.0, who.1)), "{talk:?}");
            }
            reason => {
                let lost = talk.may_be_over(self.now()) || talk.reason != Reason::Translated;
                assert!(lost, "{reason:?}: an error about {talk:?} is lost");
            }
        }
    }

    /// One who asked; where and how its backend answers.
    fn nth(&self, n: u8) -> Option<(Who, Side, Who)> {
        let (who, talk) = self.talks.iter().nth(usize::from(n) % self.talks.len().max(1))?;
        Some((*who, talk.back(), (talk.backend, talk.source, talk.proto)))
    }

    fn evict(&mut self, pending: bool, which: u8) {
        let table = if pending { &self.node.tables.pending } else { &self.node.tables.flows };
        let mut table = table.borrow_mut();
        let nth = usize::from(which) % table.len().max(1);
        let Some(key) = table.keys().nth(nth).copied() else { return };
        let Some(flow) = table.remove(&key) else { return };
        let flow = flow.get();
        self.evicted = true;
        let (client, frontend) = if is_reply(&flow) {
            ((flow.dst, flow.dst_port), (flow.src, flow.src_port))
        } else {
            ((key.src, key.src_port), (key.dst, key.dst_port))
        };
        for ((from, to, proto), talk) in &mut self.talks {
            let same = |end: &SocketAddr, known| (F::wire(end.ip()), end.port()) == known;
            talk.shaken |= same(from, client) && same(to, frontend) && *proto == key.proto;
        }
    }
}

/// The flags of a TCP segment or what an SCTP chunk is in their words, as far as they open or end something.
fn control(proto: u8, flags: u8) -> u8 {
    let chunk = |kind| match kind {
        sctp_chunk::INIT => tcp_flags::SYN,
        sctp_chunk::INIT_ACK => tcp_flags::SYN | tcp_flags::ACK,
        sctp_chunk::ABORT | sctp_chunk::SHUTDOWN_COMPLETE => tcp_flags::RST,
        _ => 0,
    };
    match proto {
        TCP => flags & (tcp_flags::SYN | tcp_flags::ACK | tcp_flags::RST | tcp_flags::FIN),
        SCTP => chunk(flags & 15),
        _ => 0,
    }
}

fn build(from: SocketAddr, to: SocketAddr, proto: u8, shape: &Shape) -> Vec<u8> {
    let payload = vec![0x5a; usize::from(shape.len % 100) * 16];
    let mut bytes = match proto {
        TCP => {
            let mut segment = Segment::new(from, to, shape.flags);
            segment.payload = payload;
            if shape.ttl >= 0xf0 {
                segment.ttl = shape.ttl & 3;
            }
            segment.build()
        }
        UDP => udp(from, to, &payload),
        _ => sctp(from, to, shape.flags & 15, &payload),
    };
    if proto == UDP && from.is_ipv4() && shape.flags == 0xff {
        bytes[40..42].fill(0);
    }
    bytes
}

/// Each half of a flow says the same of the other, and no tuple belongs to two.
fn check_tables<F: TestFamily>(node: &Node<F>, evicted: bool) {
    let shape = |flow: Flow<F::Addr>| Flow {
        last_seen: 0,
        tick: 0,
        ack: 0,
        hop: Hop::default(),
        fits: 0,
        flags: flow.flags & 1,
        ..flow
    };
    for table in [FlowTable::Established, FlowTable::Pending] {
        let entries = node.tables.entries(table);
        for (key, flow) in &entries {
            let (other, turned) = (reverse_key(key, flow), reverse_value(key, flow));
            assert_eq!(reverse_key(&other, &turned), *key, "{flow:?}");
            assert_eq!(
                reverse_value(&other, &turned),
                Flow { ack: 0, tick: 0, hop: Hop::default(), fits: 0, ..*flow },
                "{key:?}"
            );
            let met = entries.get(&other).copied();
            assert!(evicted || met.map(shape) == Some(shape(turned)), "{key:?} {flow:?}: {met:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::Verdict;

    #[test]
    fn verdicts_are_told_apart() {
        let frame = tcp(at(V4::CLIENT, 1), at(V4::NODE, 1), tcp_flags::SYN);
        check(&frame, &frame, Verdict::Pass, Reason::NotOurs);
        let mut changed = frame.clone();
        changed[30] ^= 1;
        let lied = std::panic::catch_unwind(|| check(&frame, &changed, Verdict::Pass, Reason::NotOurs));
        assert!(lied.is_err());
        let broken = std::panic::catch_unwind(|| check(&frame, &changed, Verdict::Pass, Reason::Translated));
        assert!(broken.is_err(), "the checksums are as before");
    }
}
