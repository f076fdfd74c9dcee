//! ICMP errors about packets of flows: whoever gets one finds in it what it has sent itself.

use std::net::{IpAddr, SocketAddr};

use lb_common::abi::Side;
use lb_common::packet::NETWORK;
use lb_common::pipeline::Verdict;
use lb_common::testing::node::{Node, Outcome};
use lb_common::testing::{Seen, TestFamily, at, icmp_error, ports, read, tcp, udp};
use lb_common::wire::tcp_flags::{ACK, SYN};
use lb_common::{Reason, both_families};

both_families! {
    errors_about_flows_are_translated_outside_and_inside
    errors_about_nothing_of_ours_pass_untouched
    an_error_that_has_come_too_far_is_dropped
}

/// Sends a packet that must be translated; returns it as it goes on.
#[track_caller]
fn translate<F: TestFamily>(node: &Node<F>, side: Side, bytes: &[u8]) -> Vec<u8> {
    let outcome = node.send(side, bytes.to_vec());
    assert_ne!(outcome.verdict, Verdict::Drop, "{:?}", outcome.reason);
    outcome.read();
    outcome.bytes
}

/// Source and destination of a packet.
#[track_caller]
fn ends(packet: &[u8]) -> (SocketAddr, SocketAddr) {
    read(packet).unwrap_or_else(|e| panic!("{e}: {packet:02x?}")).ends()
}

/// A router that is no end of any flow.
fn router<F: TestFamily>() -> IpAddr {
    at(F::UNALLOCATED, 0).ip()
}

/// The IP packet of a frame, without what changes on its way: TTL, and the IPv4 checksum over it.
fn lasting<F: TestFamily>(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if F::HEADER_LEN == 20 {
        packet[8] = 0;
        packet[10..12].fill(0);
    } else {
        packet[7] = 0;
    }
    packet
}

/// One direction of a flow, and where an error about its packets is met.
struct Way {
    name: &'static str,
    /// Where the packets are met, from whom to whom.
    side: Side,
    ends: (SocketAddr, SocketAddr),
    /// Where an error about one of them is met, and what becomes of it.
    back: Side,
    verdict: Verdict,
    reason: Reason,
    /// Who an error comes from that a router on the way has sent; `None`: the router.
    speaker: Option<IpAddr>,
}

/// Errors from the far end and from a router on the way, about every packet of a flow.
#[track_caller]
fn check<F: TestFamily>(node: &Node<F>, way: &Way, sent: &[u8]) {
    let name = way.name;
    let on_its_way = translate(node, way.side, sent);
    let (src, dst) = ends(&on_its_way);
    let packet = &on_its_way[NETWORK..];
    // The least there is, the header of a segment, and all of it.
    for quoted in [F::HEADER_LEN + 8, F::HEADER_LEN + 20, packet.len()] {
        let quote = &packet[..quoted.min(packet.len())];
        for (kind, from) in [(F::TOO_BIG, router::<F>()), (F::PORT_UNREACHABLE, dst.ip())] {
            let error = icmp_error(from, src.ip(), kind, quote);
            let Outcome { verdict, reason, bytes: after, .. } = node.send(way.back, error);
            assert_eq!((verdict, reason), (way.verdict, way.reason), "{name}, {kind:?}");
            let seen = read(&after).unwrap_or_else(|e| panic!("{name}: {e}: {after:02x?}"));
            let Seen::Icmp { src: speaker, dst: told, kind: told_kind, code, about } = seen else {
                panic!("{name}: {seen:?}")
            };
            assert_eq!((told, (told_kind, code), about), (way.ends.0.ip(), kind, way.ends), "{name}");
            let expected = if from == dst.ip() { way.ends.1.ip() } else { way.speaker.unwrap_or(from) };
            assert_eq!(speaker, expected, "{name}, {kind:?}: whose word it is");
            let quote = &after[NETWORK + F::HEADER_LEN + 8..];
            assert_eq!(lasting::<F>(quote), lasting::<F>(&sent[NETWORK..][..quote.len()]), "{name}");
        }
    }
}

/// A kind of flow.
struct Kind {
    /// What it is called, there and back.
    names: [&'static str; 2],
    client: SocketAddr,
    frontend: IpAddr,
    /// The frontend's ports.
    tcp: u16,
    udp: u16,
    /// Where requests are met, and errors about them.
    request: [Side; 2],
    /// Where answers are met, and errors about them.
    answer: [Side; 2],
    verdict: Verdict,
    reason: Reason,
}

impl Kind {
    /// Both directions, TCP and UDP, before and after the first answer.
    fn check<F: TestFamily>(&self) {
        for is_udp in [false, true] {
            let node = Node::<F>::new();
            let port = if is_udp { self.udp } else { self.tcp };
            let (client, frontend) = (self.client, SocketAddr::new(self.frontend, port));
            let packet = |from, to, flags| if is_udp { udp(from, to, b"odd") } else { tcp(from, to, flags) };
            let way = |name, [side, back]: [Side; 2], ends: (SocketAddr, SocketAddr)| {
                let speaker = (self.verdict != Verdict::Pass).then_some(ends.1.ip());
                Way { name, side, ends, back, verdict: self.verdict, reason: self.reason, speaker }
            };
            let request = way(self.names[0], self.request, (client, frontend));
            check(&node, &request, &packet(client, frontend, SYN));
            let first = translate(&node, request.side, &packet(client, frontend, SYN));
            let (seen_as, backend) = ends(&first);
            let answer = way(self.names[1], self.answer, (backend, seen_as));
            check(&node, &answer, &packet(backend, seen_as, SYN | ACK));
            check(&node, &request, &packet(client, frontend, ACK));
        }
    }
}

fn kinds<F: TestFamily>() -> [Kind; 4] {
    let (outside, pod) = (at(F::CLIENT, 40000), at(F::OTHER_POD, 40000));
    let [node, vip] = [F::NODE, F::VIP].map(|addr| at(addr, 0).ip());
    let (web, dns) = (ports::WEB, ports::DNS);
    [
        Kind {
            names: ["outside to a backend here", "a backend here to outside"],
            client: outside,
            frontend: node,
            tcp: ports::WEB_NODE,
            udp: ports::DNS_NODE,
            request: [Side::NicIn, Side::NicOut],
            answer: [Side::NicOut, Side::NicIn],
            verdict: Verdict::Pass,
            reason: Reason::Translated,
        },
        Kind {
            names: ["outside to a backend there", "a backend there to outside"],
            client: outside,
            frontend: node,
            tcp: ports::FAR_NODE,
            udp: ports::FAR_DNS_NODE,
            request: [Side::NicIn, Side::NicIn],
            answer: [Side::NicIn, Side::NicIn],
            verdict: Verdict::Forward,
            reason: Reason::Forwarded,
        },
        Kind {
            names: ["a pod to a backend", "a backend to a pod"],
            client: pod,
            frontend: vip,
            tcp: web,
            udp: dns,
            request: [Side::PodIn, Side::PodOut],
            answer: [Side::PodOut, Side::PodIn],
            verdict: Verdict::Pass,
            reason: Reason::Translated,
        },
        Kind {
            names: ["a pod to itself", "a pod back to itself"],
            client: at(F::POD, 40000),
            frontend: vip,
            tcp: web,
            udp: dns,
            request: [Side::PodIn, Side::PodIn],
            answer: [Side::PodIn, Side::PodIn],
            verdict: Verdict::SendBack,
            reason: Reason::Hairpinned,
        },
    ]
}

fn errors_about_flows_are_translated_outside_and_inside<F: TestFamily>() {
    kinds::<F>().iter().for_each(Kind::check::<F>);
}

/// Errors that are not about a flow, and those that cannot be read.
fn errors_about_nothing_of_ours_pass_untouched<F: TestFamily>() {
    let node = Node::<F>::new();
    let (client, frontend) = (at(F::CLIENT, 40000), at(F::NODE, ports::WEB_NODE));
    let request = translate(&node, Side::NicIn, &tcp(client, frontend, SYN));
    let pass = |why, error: &[u8], reason| {
        let outcome = node.send(Side::NicOut, error.to_vec());
        assert_eq!((outcome.verdict, outcome.reason), (Verdict::Pass, reason), "{why}");
        assert_eq!(outcome.bytes, error, "{why}");
    };
    let error = |kind, quote: &[u8]| icmp_error(router::<F>(), client.ip(), kind, quote);
    let quote = &request[NETWORK..];
    let ours = node.send(Side::NicOut, error(F::TOO_BIG, quote));
    assert_ne!(ours.bytes, ours.before, "this one is of the flow");

    pass("another flow", &error(F::TOO_BIG, &tcp(client, frontend, SYN)[NETWORK..]), Reason::NotOurs);
    let to_another = icmp_error(router::<F>(), at(F::OTHER_POD, 0).ip(), F::TOO_BIG, quote);
    pass("not to the quoted sender", &to_another, Reason::NotOurs);
    pass("a short quote", &error(F::TOO_BIG, &quote[..F::HEADER_LEN + 6]), Reason::Truncated);
    pass("no quote", &error(F::TOO_BIG, &[]), Reason::Truncated);
    let echo = if F::HEADER_LEN == 20 { (8, 0) } else { (128, 0) };
    pass("an echo request", &error(echo, quote), Reason::UnknownProtocol);
    if F::HEADER_LEN == 20 {
        let (mut options, mut later) = (quote.to_vec(), quote.to_vec());
        options[0] = 0x46;
        pass("a quote with options", &error(F::TOO_BIG, &options), Reason::IpOptions);
        later[7] = 1;
        pass("a quote of a later fragment", &error(F::TOO_BIG, &later), Reason::Fragment);
    }
}

/// RFC 1122, section 3.2.2: no error about an error.
fn an_error_that_has_come_too_far_is_dropped<F: TestFamily>() {
    let node = Node::<F>::new();
    let (client, frontend) = (at(F::CLIENT, 40000), at(F::NODE, ports::FAR_NODE));
    let request = translate(&node, Side::NicIn, &tcp(client, frontend, SYN));
    let (src, _) = ends(&request);
    let mut error = icmp_error(router::<F>(), src.ip(), F::TOO_BIG, &request[NETWORK..]);
    let ttl = NETWORK + if F::HEADER_LEN == 20 { 8 } else { 7 };
    error[ttl] = 1;
    let outcome = node.send(Side::NicIn, error);
    assert_eq!((outcome.verdict, outcome.reason), (Verdict::Drop, Reason::TtlExceeded));
}
