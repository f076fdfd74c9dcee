//! Odd frames through every loaded program, one row each: what Fairlead does not understand passes untouched and counted,
//! and nobody is answered who must not be.

use aya::Pod;
use lb_common::abi::{AffinityKey, Backend, Flow, FlowKey, FragmentKey, Network, ServiceKey, Side, Source};
use lb_common::packet::NETWORK;
use lb_common::pipeline::Verdict;
use lb_common::testing::node::client;
use lb_common::testing::{Segment, TestFamily, at, fragments, icmp_error, ports, sctp, tcp, udp};
use lb_common::wire::sctp_chunk::INIT;
use lb_common::wire::tcp_flags::{ACK, SYN};
use lb_common::{Reason, V4, V6};

use super::{KernelFamily, Pair, Place, on_node, program};

/// A frame and what becomes of it.
struct Row {
    what: String,
    frame: Vec<u8>,
    /// Where: everywhere, or where packets come in.
    incoming: bool,
    verdict: Verdict,
    reason: Reason,
}

/// The table while it is written.
#[derive(Default)]
struct Table(Vec<Row>);

impl Table {
    /// Goes on untouched wherever it is seen.
    fn passes(&mut self, reason: Reason, what: impl Into<String>, frame: Vec<u8>) {
        self.0.push(Row { what: what.into(), frame, incoming: false, verdict: Verdict::Pass, reason });
    }

    /// The same for a packet that is changed first.
    fn changed(
        &mut self,
        reason: Reason,
        what: impl Into<String>,
        frame: &[u8],
        change: impl FnOnce(&mut Vec<u8>),
    ) {
        let mut frame = frame.to_vec();
        change(&mut frame);
        self.passes(reason, what, frame);
    }

    /// Has this fate where it comes in.
    fn comes_in(&mut self, verdict: Verdict, reason: Reason, what: impl Into<String>, frame: Vec<u8>) {
        self.0.push(Row { what: what.into(), frame, incoming: true, verdict, reason });
    }
}

/// Packets of every kind that is translated or answered, of flows that [`send_all`] knows if `to` is the node.
fn every_kind<F: TestFamily>(to: &str) -> [(&'static str, Vec<u8>); 4] {
    let from = client::<F>(40000);
    let about = tcp(at(to, ports::WEB_NODE), from, SYN);
    [
        ("TCP", tcp(from, at(to, ports::WEB_NODE), ACK)),
        ("UDP", udp(from, at(to, ports::DNS_NODE), b"four")),
        ("SCTP", sctp(from, at(to, ports::SIGNAL_NODE), INIT, &[1; 16])),
        ("ICMP error", icmp_error(from.ip(), at(to, 0).ip(), F::PORT_UNREACHABLE, &about[NETWORK..])),
    ]
}

/// Offset of the transport header of a packet without options.
const fn transport<F: TestFamily>() -> usize {
    NETWORK + F::HEADER_LEN
}

fn set(frame: &mut [u8], at: usize, word: u16) {
    frame[at..at + 2].copy_from_slice(&word.to_be_bytes());
}

/// What is neither IPv4 nor IPv6, or not for the programs to look into.
fn other_frames(table: &mut Table, packet: &[u8]) {
    let of_type = |kind: u16| {
        let mut frame = packet.to_vec();
        set(&mut frame, 12, kind);
        frame.resize(60, 0);
        frame
    };
    for (what, kind) in [
        ("ARP", 0x0806),
        ("RARP", 0x8035),
        ("LLDP", 0x88cc),
        ("MPLS", 0x8847),
        ("PPPoE", 0x8864),
        ("EAPOL", 0x888e),
        ("PTP", 0x88f7),
        ("an experiment", 0x88b5),
        ("type 0", 0),
        ("type 0xffff", 0xffff),
        ("802.3, length 38", 38),
        ("802.3, length 1500", 1500),
        ("802.3, length 1501", 1501),
    ] {
        table.passes(Reason::NotIp, what, of_type(kind));
    }
    // A tag in the frame belongs to a device of its own, which may be an edge: its packet is seen there, without the tag.
    for tags in
        [&[0x8100][..], &[0x88a8], &[0x9100], &[0x88a8, 0x8100], &[0x8100, 0x8100], &[0x8100, 0x8100, 0x8100]]
    {
        let mut frame = packet.to_vec();
        for tag in tags.iter().rev() {
            let [high, low] = u16::to_be_bytes(*tag);
            frame.splice(12..12, [high, low, 0, 7]);
        }
        table.passes(Reason::NotIp, format!("tags {tags:04x?}"), frame);
    }
}

/// What is cut, at every byte, and what lies about its length, in either family.
fn lengths<F: TestFamily>(table: &mut Table) {
    for to in [F::NODE, F::VIP, F::UNALLOCATED, F::OTHER_POD] {
        for (kind, packet) in every_kind::<F>(to) {
            for len in NETWORK..packet.len() {
                let what = format!("{kind} to {to}, cut to {len} bytes");
                table.passes(Reason::Truncated, what, packet[..len].to_vec());
            }
        }
    }
    let [(_, segment), (_, datagram), ..] = every_kind::<F>(F::NODE);
    let header = transport::<F>();
    for offset in (0..5).chain(6..16) {
        let what = format!("data offset {offset}");
        table.changed(Reason::Truncated, what, &segment, |b| b[header + 12] = offset << 4);
    }
    for len in (0..8).chain([13, 100, 0xffff]) {
        let what = format!("UDP length {len} of 12");
        table.changed(Reason::Truncated, what, &datagram, |b| set(b, header + 4, len));
    }
}

/// What stands in no relation to a flow or a Service, however it looks.
fn strangers<F: TestFamily>(table: &mut Table) {
    let from = client::<F>(40000);
    let (group, all) =
        if F::HEADER_LEN == 40 { ("ff0e::7", "ff02::1") } else { ("239.1.2.3", "255.255.255.255") };
    for to in [group, all] {
        table.passes(Reason::NotOurs, format!("UDP to {to}"), udp(from, at(to, ports::DNS_NODE), b"?"));
        table.passes(Reason::NotOurs, format!("TCP to {to}"), tcp(from, at(to, ports::WEB_NODE), SYN));
        table.passes(Reason::NotOurs, format!("UDP from {to}"), udp(at(to, 9), at(F::OTHER_POD, 9), b"?"));
    }
    for ttl in [0, 1] {
        let syn = Segment { ttl, ..Segment::new(from, at(F::OTHER_POD, 9), SYN) };
        table.passes(Reason::NotOurs, format!("TTL {ttl}"), syn.build());
    }
    for group in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1]] {
        table.changed(
            Reason::NotOurs,
            format!("to {group:02x?}"),
            &udp(from, at(F::OTHER_POD, 9), b"?"),
            |b| {
                b[..6].copy_from_slice(&group);
            },
        );
    }
    let about = udp(from, at(F::OTHER_POD, 9), b"?");
    for kind in [F::PORT_UNREACHABLE, F::TIME_EXCEEDED, F::TOO_BIG] {
        let error = icmp_error(at(F::OTHER_POD, 0).ip(), from.ip(), kind, &about[NETWORK..]);
        table.passes(
            Reason::NotOurs,
            format!("ICMP error {kind:?} about a stranger's packet"),
            error.clone(),
        );
        table.changed(Reason::NotOurs, "the same to another than its sender", &error, |b| {
            // The last byte of the address.
            b[transport::<F>() - 1] ^= 1;
        });
    }
    // Without its first, nobody knows whose a fragment is.
    for piece in fragments(&udp(from, at(F::NODE, ports::DNS_NODE), &[7; 64]), 9, 24).into_iter().skip(1) {
        table.passes(Reason::Fragment, "a fragment without the first", piece);
    }
}

/// Who comes with a TTL that is used up, or as somebody who cannot be answered.
fn refused<F: TestFamily>(table: &mut Table) {
    let from = client::<F>(41000);
    for ttl in [0, 1] {
        let near = Segment { ttl, ..Segment::new(client::<F>(40000), at(F::OTHER_POD, 80), ACK) };
        table.comes_in(Verdict::Pass, Reason::NotOurs, format!("TTL {ttl} to a pod"), near.build());
        let empty = Segment { ttl, ..Segment::new(from, at(F::NODE, ports::EMPTY_NODE), SYN) };
        // Only who forwards looks at it.
        let what = format!("TTL {ttl} to a frontend without endpoints");
        table.comes_in(Verdict::SendBack, Reason::NoEndpoints, what, empty.build());
    }
    let nobody: &[&str] = if F::HEADER_LEN == 40 {
        &["::", "::1", "ff02::1", "ff0e::7", "::ffff:203.0.113.7"]
    } else {
        &["0.0.0.0", "127.0.0.1", "224.0.0.1", "239.1.2.3", "240.0.0.1", "255.255.255.255"]
    };
    for source in nobody {
        let from = at(source, 40000);
        for (reason, frame) in [
            (Reason::UnknownPort, tcp(from, at(F::VIP, 9), SYN)),
            (Reason::UnknownPort, tcp(from, at(F::VIP, 9), ACK)),
            (Reason::NoEndpoints, udp(from, at(F::NODE, ports::EMPTY_NODE), b"?")),
            (Reason::NoEndpoints, sctp(from, at(F::VIP, ports::EMPTY), INIT, &[1; 16])),
        ] {
            table.comes_in(Verdict::Drop, reason, format!("asked by {source}"), frame);
        }
    }
    for (end, at_byte) in [("to", 0), ("from", 6)] {
        let mut frame = udp(from, at(F::NODE, ports::EMPTY_NODE), b"?");
        frame[at_byte..at_byte + 6].fill(0xff);
        table.comes_in(
            Verdict::Drop,
            Reason::NoEndpoints,
            format!("asked {end} everybody on the link"),
            frame,
        );
    }
}

/// IPv4 by itself.
fn headers_v4(table: &mut Table) {
    for to in [V4::NODE, V4::VIP, V4::UNALLOCATED, V4::OTHER_POD] {
        for (kind, packet) in every_kind::<V4>(to) {
            // RFC 791, RFC 1108, RFC 1393, RFC 2113, and what nobody has assigned.
            for option in [0u8, 1, 7, 68, 82, 130, 131, 134, 136, 137, 148, 158, 255] {
                let mut frame = packet.clone();
                frame.splice(34..34, [option, 4, 4, 0]);
                frame[14] = 0x46;
                frame[17] += 4;
                table.passes(Reason::IpOptions, format!("{kind} to {to} with option {option}"), frame);
            }
            table.changed(Reason::IpOptions, format!("{kind} to {to}, options cut off"), &packet, |b| {
                b[14] = 0x4f;
            });
            for words in 0..5 {
                let what = format!("{kind} to {to}, header of {words} words");
                table.changed(Reason::Truncated, what, &packet, |b| b[14] = 0x40 | words);
            }
            for version in (0..4).chain(5..16) {
                let what = format!("{kind} to {to}, version {version}");
                table.changed(Reason::NotIp, what, &packet, |b| b[14] = version << 4 | 5);
            }
            let len = u16::try_from(packet.len() - NETWORK).expect("short");
            for lie in (0..20).chain([20, 23, len + 1, len + 40, 0xffff]) {
                let what = format!("{kind} to {to}, length {lie} of {len}");
                table.changed(Reason::Truncated, what, &packet, |b| set(b, 16, lie));
            }
        }
    }
    let packet = udp(client::<V4>(40000), at(V4::NODE, ports::DNS_NODE), &[0; 24]);
    for proto in (0..=255).filter(|proto| ![1, 6, 17, 132].contains(proto)) {
        table.changed(Reason::UnknownProtocol, format!("protocol {proto}"), &packet, |b| b[23] = proto);
    }
    for kind in (0..=255).filter(|kind| ![3, 11, 12].contains(kind)) {
        table.changed(Reason::UnknownProtocol, format!("ICMP type {kind}"), &packet, |b| {
            (b[23], b[34]) = (1, kind);
        });
    }
}

/// Extension headers of 8 bytes each in front of what a packet has; `tail`: what the last of them says comes behind it.
fn chained(packet: &[u8], kinds: &[u8], tail: Option<u8>) -> Vec<u8> {
    let mut frame = packet.to_vec();
    let last = tail.unwrap_or(frame[20]);
    let next = kinds.iter().skip(1).copied().chain([last]);
    let chain: Vec<u8> = next.flat_map(|next| [next, 0, 0, 0, 0, 0, 0, 0]).collect();
    frame[20] = kinds[0];
    frame[19] += u8::try_from(chain.len()).expect("short");
    frame.splice(54..54, chain);
    frame
}

/// IPv6 by itself: RFC 8200 and the headers of IANA's registry.
fn headers_v6(table: &mut Table) {
    const HOP: u8 = 0;
    const ROUTE: u8 = 43;
    const FRAGMENT: u8 = 44;
    const OPTIONS: u8 = 60;
    for to in [V6::NODE, V6::VIP, V6::UNALLOCATED, V6::OTHER_POD] {
        for (kind, packet) in every_kind::<V6>(to) {
            for version in (0..6).chain(7..16) {
                let what = format!("{kind} to {to}, version {version}");
                table.changed(Reason::NotIp, what, &packet, |b| b[14] = version << 4);
            }
            let len = u16::try_from(packet.len() - 54).expect("short");
            for lie in [0, 1, 3, len + 1, len + 40, 0xffff] {
                let what = format!("{kind} to {to}, length {lie} of {len}");
                table.changed(Reason::Truncated, what, &packet, |b| set(b, 18, lie));
            }
            for chain in [
                &[HOP, OPTIONS, ROUTE, OPTIONS, OPTIONS][..],
                &[OPTIONS; 6],
                &[FRAGMENT, OPTIONS],
                &[FRAGMENT, HOP],
                &[FRAGMENT, ROUTE],
                &[FRAGMENT, FRAGMENT],
                &[HOP, FRAGMENT, OPTIONS],
            ] {
                let what = format!("{kind} to {to} behind {chain:?}");
                table.passes(Reason::ExtensionHeader, what, chained(&packet, chain, None));
            }
            let via = chained(&packet, &[ROUTE], None);
            let what = format!("{kind} to {to}, by way of another");
            table.changed(Reason::ExtensionHeader, what, &via, |b| b[57] = 1);
            let options = chained(&packet, &[OPTIONS, OPTIONS], None);
            for (len, reason) in [(30, Reason::Truncated), (60, Reason::ExtensionHeader)] {
                for (which, at) in [("first", 55), ("second", 63)] {
                    let what = format!("{kind} to {to}, {which} options {len} long");
                    table.changed(reason, what, &options, |b| b[at] = len);
                }
            }
        }
    }
    let packet = udp(client::<V6>(40000), at(V6::NODE, ports::DNS_NODE), &[0; 24]);
    let walked = [HOP, 6, 17, ROUTE, FRAGMENT, 58, OPTIONS, 132];
    // ESP, AH, no next header, mobility, HIP, shim6, and all that has no name yet.
    for proto in (0..=255).filter(|proto| !walked.contains(proto)) {
        table.changed(Reason::UnknownProtocol, format!("next header {proto}"), &packet, |b| b[20] = proto);
        for chain in [&[OPTIONS][..], &[HOP, ROUTE, OPTIONS]] {
            let what = format!("next header {proto} behind {chain:?}");
            table.passes(Reason::UnknownProtocol, what, chained(&packet, chain, Some(proto)));
        }
    }
    for kind in (0..=255).filter(|kind| !(1..=4).contains(kind)) {
        table.changed(Reason::UnknownProtocol, format!("ICMP type {kind}"), &packet, |b| {
            (b[20], b[54]) = (58, kind);
        });
    }
}

/// Sends each row through each program that can be run here, at which flows with the rows' tuples are established.
fn send_all<F: KernelFamily>(device: u32, headers: fn(&mut Table))
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
    let mut table = Table::default();
    other_frames(&mut table, &every_kind::<F>(F::NODE)[0].1);
    headers(&mut table);
    lengths::<F>(&mut table);
    strangers::<F>(&mut table);
    refused::<F>(&mut table);

    let mut pair = Pair::<F>::new(device, None);
    let [nic_in, nic_out] = [Place::NicIn, Place::NicOut].map(program);
    let (from, pod) = (client::<F>(40000), |port| at(F::POD, port));
    for (ask, answer) in [
        (tcp(from, at(F::NODE, ports::WEB_NODE), SYN), tcp(pod(ports::TARGET), from, SYN | ACK)),
        (udp(from, at(F::NODE, ports::DNS_NODE), b"?"), udp(pod(ports::TARGET_UDP), from, b"!")),
    ] {
        assert_eq!(pair.send(nic_in, &ask).1, Reason::Translated);
        assert_eq!(pair.send(nic_out, &answer).1, Reason::Translated);
    }
    for Row { what, frame, incoming, verdict, reason } in &table.0 {
        for place in pair.places().iter().copied() {
            let comes_in = matches!(place.1, Side::NicIn | Side::PodIn);
            // BPF_PROG_TEST_RUN has no socket buffer with less than an IP header.
            let runs = place.0 == Place::Xdp || frame.len() >= transport::<F>();
            if !runs || (*incoming && !comes_in) {
                continue;
            }
            let (became, counted, out) = pair.send(place, frame);
            assert_eq!((became, counted), (*verdict, *reason), "{what} at {place:?}: {frame:02x?}");
            assert!(
                *verdict == Verdict::SendBack || out == *frame,
                "{what} at {place:?}: {frame:02x?} {out:02x?}"
            );
        }
    }
    for (what, mut frame) in every_kind::<F>(F::NODE) {
        frame[5] ^= 1;
        for place in pair.places().iter().copied().filter(|place| place.1 == Side::NicIn) {
            let (became, counted, out) = pair.send(place, &frame);
            assert_eq!((became, counted), (Verdict::Pass, Reason::OtherHost), "{what} at {place:?}");
            assert_eq!(out, frame, "{what} at {place:?}");
        }
    }
    pair.settle();
    eprintln!("{} rows", table.0.len());
}

#[test]
fn odd_frames_pass_untouched_and_counted_in_ipv4() {
    on_node(|device| send_all::<V4>(device, headers_v4));
}

#[test]
fn odd_frames_pass_untouched_and_counted_in_ipv6() {
    on_node(|device| send_all::<V6>(device, headers_v6));
}
