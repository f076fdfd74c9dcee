//! What a translation leaves alone: the richest packets there are, in every direction of every kind of flow, through the
//! loaded programs. Each is compared byte by byte with what it was ([`check`]).

use std::marker::PhantomData;
use std::net::SocketAddr;

use aya::Pod;
use lb_common::abi::{AffinityKey, Backend, Flow, FlowKey, FragmentKey, Network, ServiceKey, Source};
use lb_common::checksum::Diff;
use lb_common::packet::NETWORK;
use lb_common::testing::invariants::check;
use lb_common::testing::{Segment, TestFamily, at, ports, read, udp};
use lb_common::wire::tcp_flags::{ACK, SYN};
use lb_common::{Reason, V4, V6};

use super::{KernelFamily, Pair, Place, on_node, program};

/// Source and destination.
type Ends = (SocketAddr, SocketAddr);

const CWR: u16 = 0x80;
const ECE: u16 = 0x40;
const URG: u16 = 0x20;
const PSH: u16 = 0x08;
const DONT_FRAGMENT: u16 = 0x4000;
/// The bit that RFC 3514 gives to the evil.
const RESERVED: u16 = 0x8000;

/// MSS, SACK permitted, timestamps, window scale, a Fast Open cookie (RFC 7413).
const OPENING: [u8; 29] =
    [2, 4, 5, 0xb4, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 3, 3, 7, 34, 10, 0xde, 0xad, 0xbe, 0xef, 1, 2, 3, 4];
/// MSS, an MD5 signature (RFC 2385), window scale. It covers the addresses: who wants one learns of the translation.
const SIGNED: [u8; 25] =
    [2, 4, 5, 0xb4, 19, 18, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 3, 3, 7];
/// Timestamps and three blocks of SACK.
const BLOCKS: [u8; 36] = [
    8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 5, 26, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0,
    6, 0,
];

/// A packet whose fields are set one by one, its checksums kept right.
struct Draft<F> {
    bytes: Vec<u8>,
    family: PhantomData<F>,
}

impl<F: TestFamily> Draft<F> {
    const TRANSPORT: usize = NETWORK + F::HEADER_LEN;

    /// A segment with these options and this data.
    fn segment((from, to): Ends, flags: u8, options: &[u8], data: &[u8]) -> Self {
        let mut options = options.to_vec();
        options.resize(options.len().next_multiple_of(4), 1);
        let words = u16::try_from(5 + options.len() / 4).expect("ten words at most");
        let segment = Segment { payload: [&options, data].concat(), ..Segment::new(from, to, flags) };
        let mut draft = Self { bytes: segment.build(), family: PhantomData };
        let at = Self::TRANSPORT + 12;
        draft.set(at, draft.word(at) & 0xfff | words << 12, Some(at + 4));
        draft
    }

    fn datagram((from, to): Ends, data: &[u8]) -> Self {
        Self { bytes: udp(from, to, data), family: PhantomData }
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn set(&mut self, at: usize, word: u16, check: Option<usize>) {
        let change = Diff::between(u32::from(self.word(at)), u32::from(word));
        self.bytes[at..at + 2].copy_from_slice(&word.to_be_bytes());
        if let Some(check) = check {
            let new = change.apply(self.word(check));
            self.bytes[check..check + 2].copy_from_slice(&new.to_be_bytes());
        }
    }

    /// DSCP and ECN, the identification and the flags of fragmentation or the flow label, and the TTL.
    fn with_header(mut self, class: u8, id: u32, fragment: u16, ttl: u8) -> Self {
        let [_, label, high, low] = id.to_be_bytes();
        let low_id = u16::from_be_bytes([high, low]);
        if F::HEADER_LEN == 20 {
            self.set(14, 0x4500 | u16::from(class), Some(24));
            self.set(18, low_id, Some(24));
            self.set(20, fragment, Some(24));
            self.set(22, u16::from(ttl) << 8 | self.word(22) & 0xff, Some(24));
        } else {
            self.set(14, 0x6000 | u16::from(class) << 4 | u16::from(label & 0xf), None);
            self.set(16, low_id, None);
            self.set(20, self.word(20) & 0xff00 | u16::from(ttl), None);
        }
        self
    }

    /// The four reserved bits (NS among them), flags beside those of the state, and with an urgent pointer URG.
    fn with_bits(mut self, reserved: u16, flags: u16, urgent: u16) -> Self {
        let at = Self::TRANSPORT + 12;
        let urg = if urgent == 0 { 0 } else { URG };
        self.set(at, self.word(at) | reserved << 8 | flags | urg, Some(at + 4));
        self.set(at + 6, urgent, Some(at + 4));
        self
    }
}

/// Segments that open a connection; the last is one that every reader understands.
fn openings<F: TestFamily>(ends: Ends, flags: u8) -> Vec<Vec<u8>> {
    let segment = |options: &[u8], data: &[u8]| Draft::<F>::segment(ends, flags, options, data);
    vec![
        segment(&OPENING, b"early data").with_header(0xff, 0xf_ffff, DONT_FRAGMENT | RESERVED, 255).bytes,
        segment(&SIGNED, &[]).with_header(0xb8, 0x1_2345, 0, 2).with_bits(0xf, PSH, 0).bytes,
        segment(&OPENING, &[]).with_header(0x02, 0, DONT_FRAGMENT, 64).with_bits(0, ECE | CWR, 0).bytes,
    ]
}

/// Segments of a connection that is there.
fn going_on<F: TestFamily>(ends: Ends) -> Vec<Vec<u8>> {
    let segment = |options: &[u8], data: &[u8]| Draft::<F>::segment(ends, ACK, options, data);
    let urgent = segment(&OPENING[6..16], b"urgent!");
    vec![
        segment(&[], b"").with_header(0, 1, DONT_FRAGMENT, 64).bytes,
        segment(&BLOCKS, b"odd").with_header(0x03, 0xbeef, 0, 200).with_bits(1, ECE, 0).bytes,
        urgent.with_header(0xb9, 0xf_fffe, RESERVED, 3).with_bits(0xf, CWR | PSH, 7).bytes,
        segment(&[0xfd, 6, 0xaa, 0xbb, 1, 2], &[0xff; 1201]).with_header(0x01, 0, DONT_FRAGMENT, 2).bytes,
    ]
}

/// Datagrams, one of them without a checksum: on IPv6 only tunnels may leave it out (RFC 6935), and to see that is up to
/// the receiver.
fn datagrams<F: TestFamily>(ends: Ends) -> Vec<Vec<u8>> {
    let datagram = |data: &[u8]| Draft::<F>::datagram(ends, data);
    let mut unsummed = datagram(b"no checksum").with_header(0x2e, 77, DONT_FRAGMENT, 9);
    unsummed.set(Draft::<F>::TRANSPORT + 6, 0, None);
    vec![
        datagram(b"").with_header(0xff, 0xf_ffff, 0, 255).bytes,
        datagram(&[0xff; 1233]).with_header(0x02, 0x8000, RESERVED, 2).bytes,
        unsummed.bytes,
    ]
}

/// Ways through the node: where a packet comes in, whether from a pod, which ports of TCP and UDP it asks, how it is
/// counted, and where the answer comes.
const WAYS: [(Place, bool, [u16; 2], Reason, Place); 6] = [
    (Place::Xdp, false, [ports::WEB_NODE, ports::DNS_NODE], Reason::Translated, Place::NicOut),
    (Place::NicIn, false, [ports::WEB_NODE, ports::DNS_NODE], Reason::Translated, Place::NicOut),
    (Place::Xdp, false, [ports::FAR_NODE, ports::FAR_DNS_NODE], Reason::Forwarded, Place::Xdp),
    (Place::NicIn, false, [ports::FAR_NODE, ports::FAR_DNS_NODE], Reason::Forwarded, Place::NicIn),
    (Place::PodIn, true, [ports::FAR, ports::FAR_DNS], Reason::Translated, Place::PodOut),
    (Place::PodIn, true, [ports::WEB, ports::DNS], Reason::Hairpinned, Place::PodIn),
];

/// Sends packets that must come out as they went in, but for what a translation changes. Returns the last.
fn carry<F: KernelFamily>(pair: &mut Pair<F>, place: Place, want: Reason, packets: &[Vec<u8>]) -> Vec<u8>
where
    ServiceKey<F::Addr>: Pod,
    Backend<F::Addr>: Pod,
    lb_common::abi::Place<F::Addr>: Pod,
    AffinityKey<F::Addr>: Pod,
    FragmentKey<F::Addr>: Pod,
    Network<F::Addr>: Pod,
    Source<F::Addr>: Pod,
    FlowKey<F::Addr>: Pod,
    Flow<F::Addr>: Pod,
{
    let mut last = Vec::new();
    for packet in packets {
        let (verdict, reason, mut out) = pair.send(program(place), packet);
        assert_eq!(reason, want, "{place:?}: {packet:02x?}");
        if place == Place::Xdp && reason == Reason::Forwarded {
            // XDP writes the link header, which is not the packet's.
            out[..12].copy_from_slice(&packet[..12]);
        }
        check(packet, &out, verdict, reason);
        last = out;
    }
    last
}

fn every_way<F: KernelFamily>(device: u32)
where
    ServiceKey<F::Addr>: Pod,
    Backend<F::Addr>: Pod,
    lb_common::abi::Place<F::Addr>: Pod,
    AffinityKey<F::Addr>: Pod,
    FragmentKey<F::Addr>: Pod,
    Network<F::Addr>: Pod,
    Source<F::Addr>: Pod,
    FlowKey<F::Addr>: Pod,
    Flow<F::Addr>: Pod,
{
    let mut pair = Pair::<F>::new(device, None);
    let turned = |packet: &[u8]| {
        let (from, to) = read(packet).unwrap_or_else(|e| panic!("{e}: {packet:02x?}")).ends();
        (to, from)
    };
    for (n, (place, from_pod, [tcp_port, udp_port], reason, back)) in (0..).zip(WAYS) {
        if !pair.places().contains(&program(place)) {
            continue;
        }
        let (from, to) = if from_pod { (F::POD, F::VIP) } else { (F::CLIENT, F::NODE) };
        let ask = |port| (at(from, 42000 + n), at(to, port));

        let asked = ask(tcp_port);
        let opened = carry(&mut pair, place, reason, &openings::<F>(asked, SYN));
        let answered = turned(&opened);
        carry(&mut pair, back, reason, &openings::<F>(answered, SYN | ACK));
        carry(&mut pair, place, reason, &going_on::<F>(asked));
        carry(&mut pair, back, reason, &going_on::<F>(answered));

        let asked = ask(udp_port);
        let opened = carry(&mut pair, place, reason, &[udp(asked.0, asked.1, &[0, 0])]);
        let answered = turned(&opened);
        let replied = carry(&mut pair, back, reason, &[udp(answered.0, answered.1, &[0, 0])]);
        for (place, ends, translated) in [(place, asked, opened), (back, answered, replied)] {
            carry(&mut pair, place, reason, &datagrams::<F>(ends));
            // The sum of a datagram of zeros lacks just what its checksum says: with that in them, the checksum comes
            // out as 0, and is sent in its other spelling.
            let field = Draft::<F>::TRANSPORT + 6..Draft::<F>::TRANSPORT + 8;
            let full = udp(ends.0, ends.1, &translated[field.clone()]);
            let full = carry(&mut pair, place, reason, &[full]);
            assert_eq!(full[field], [0xff, 0xff], "{place:?}: {full:02x?}");
        }
    }
    pair.settle();
}

#[test]
fn translations_leave_everything_else_alone_in_ipv4() {
    on_node(every_way::<V4>);
}

#[test]
fn translations_leave_everything_else_alone_in_ipv6() {
    on_node(every_way::<V6>);
}
