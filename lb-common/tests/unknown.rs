//! What is not understood passes untouched, and is counted by what was not understood.

use lb_common::abi::Side;
use lb_common::pipeline::Verdict;
use lb_common::tables::FlowTable;
use lb_common::testing::node::{Node, client};
use lb_common::testing::{Seen, TestFamily, at, icmp_error, ports, sctp, tcp, udp};
use lb_common::wire::sctp_chunk::INIT;
use lb_common::wire::tcp_flags::SYN;
use lb_common::{Reason, V4, V6, both_families};

both_families! {
    what_is_cut_short_passes_at_every_side
    what_is_not_understood_passes_at_every_side
    protocols_that_services_do_not_have_are_rejected_there
    icmp_errors_and_neighbours_are_let_pass
}

/// A packet of any protocol: `first` is its first byte behind the IP header.
fn other<F: TestFamily>(dst: &str, proto: u8, first: u8) -> Vec<u8> {
    let mut bytes = udp(client::<F>(0), at(dst, 0), &[0; 24]);
    let (field, payload) = if F::HEADER_LEN == 40 { (20, 54) } else { (23, 34) };
    bytes[field] = proto;
    bytes[payload] = first;
    bytes
}

const GRE: u8 = 47;
const ESP: u8 = 50;

fn protocols_that_services_do_not_have_are_rejected_there<F: TestFamily>() {
    let node = Node::<F>::new();
    let echo = if F::HEADER_LEN == 40 { 128 } else { 8 };
    for (proto, first) in [(F::ICMP, echo), (GRE, 0), (ESP, 0)] {
        for side in [Side::NicIn, Side::PodIn] {
            let refused = node.send(side, other::<F>(F::VIP, proto, first));
            let seen = refused.seen(Verdict::SendBack, Reason::UnservedProtocol);
            let Seen::Icmp { src, dst, kind, code, .. } = seen else { panic!("{seen:?}") };
            assert_eq!((src, dst), (at(F::VIP, 0).ip(), client::<F>(0).ip()));
            assert_eq!((kind, code), F::PORT_UNREACHABLE);
            let dropped = node.send(side, other::<F>(F::UNALLOCATED, proto, first));
            dropped.untouched(Verdict::Drop, Reason::NoSuchService);
            // The node and pods answer for themselves.
            for addr in [F::NODE, F::OTHER_POD] {
                let passed = node.send(side, other::<F>(addr, proto, first));
                passed.untouched(Verdict::Pass, Reason::UnknownProtocol);
            }
        }
        let passed = node.send(Side::NicOut, other::<F>(F::VIP, proto, first));
        passed.untouched(Verdict::Pass, Reason::UnknownProtocol);
    }
    let usage = node.tables.usage.borrow();
    assert!(usage.is_empty(), "{usage:?}");
}

fn icmp_errors_and_neighbours_are_let_pass<F: TestFamily>() {
    let node = Node::<F>::new();
    let kinds: &[u8] =
        if F::HEADER_LEN == 40 { &[1, 2, 3, 4, 127, 133, 135, 136, 137] } else { &[3, 4, 5, 11, 12] };
    for kind in kinds {
        for addr in [F::VIP, F::UNALLOCATED] {
            let passed = node.send(Side::NicIn, other::<F>(addr, F::ICMP, *kind));
            // Errors are read, and found to be about nothing of ours.
            let reason = if F::is_icmp_error(*kind) { passed.reason } else { Reason::UnknownProtocol };
            passed.untouched(Verdict::Pass, reason);
        }
    }
}

/// Changes a frame and expects it to pass untouched.
#[track_caller]
fn passes<F: TestFamily>(reason: Reason, mut bytes: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) {
    change(&mut bytes);
    Node::<F>::new().send(Side::NicIn, bytes).untouched(Verdict::Pass, reason);
}

fn frame<F: TestFamily>() -> Vec<u8> {
    tcp(client::<F>(40000), at(F::NODE, ports::WEB_NODE), SYN)
}

#[test]
fn headers_that_are_not_understood_pass_in_ipv4() {
    passes::<V4>(Reason::IpOptions, frame::<V4>(), |b| b[14] = 0x46);
    passes::<V4>(Reason::Truncated, frame::<V4>(), |b| b[14] = 0x44);
    passes::<V4>(Reason::NotIp, frame::<V4>(), |b| b[14] = 0x65);
    passes::<V4>(Reason::Fragment, frame::<V4>(), |b| b[21] = 1);
    passes::<V4>(Reason::UnknownProtocol, frame::<V4>(), |b| b[23] = 47);
    // Lengths that lie: longer than the frame, shorter than its headers.
    passes::<V4>(Reason::Truncated, frame::<V4>(), |b| b[17] = 41);
    passes::<V4>(Reason::Truncated, frame::<V4>(), |b| b[17] = 39);
    passes::<V4>(Reason::Truncated, frame::<V4>(), |b| b[17] = 0);
    // A TCP header shorter than a TCP header, and longer than its packet.
    passes::<V4>(Reason::Truncated, frame::<V4>(), |b| b[46] = 0x40);
    passes::<V4>(Reason::Truncated, frame::<V4>(), |b| b[46] = 0x60);
    for len in 14..frame::<V4>().len() {
        passes::<V4>(Reason::Truncated, frame::<V4>(), |b| b.truncate(len));
    }
    let datagram = udp(client::<V4>(5000), at(V4::NODE, ports::DNS_NODE), b"four");
    passes::<V4>(Reason::Truncated, datagram.clone(), |b| b[39] = 13);
    passes::<V4>(Reason::Truncated, datagram, |b| b[39] = 7);
}

#[test]
fn sctp_packets_without_a_whole_header_pass() {
    let packet = || sctp(client::<V4>(5000), at(V4::NODE, ports::SIGNAL_NODE), INIT, &[1; 16]);
    // The length of the IP packet ends within the common header, or the frame does.
    passes::<V4>(Reason::Truncated, packet(), |b| b[17] = 31);
    for len in 20..32 {
        passes::<V4>(Reason::Truncated, packet(), |b| {
            b.truncate(14 + usize::from(len));
            b[17] = len;
        });
    }
    // A common header without a chunk belongs to its association, but opens none.
    let mut bytes = packet();
    bytes.truncate(46);
    bytes[17] = 32;
    assert_eq!(Node::<V4>::new().send(Side::NicIn, bytes).verdict, Verdict::Pass);
}

#[test]
fn headers_that_are_not_understood_pass_in_ipv6() {
    passes::<V6>(Reason::NotIp, frame::<V6>(), |b| b[14] = 0x40);
    passes::<V6>(Reason::UnknownProtocol, frame::<V6>(), |b| b[20] = 47);
    passes::<V6>(Reason::Truncated, frame::<V6>(), |b| b[19] = 21);
    passes::<V6>(Reason::Truncated, frame::<V6>(), |b| b[19] = 19);
    for len in 14..frame::<V6>().len() {
        passes::<V6>(Reason::Truncated, frame::<V6>(), |b| b.truncate(len));
    }
    for (next, reason) in [
        (50, Reason::UnknownProtocol),
        (51, Reason::UnknownProtocol),
        (59, Reason::UnknownProtocol),
        (58, Reason::UnknownProtocol),
    ] {
        passes::<V6>(reason, with_extensions(&[(60, 0)], next), |_| ());
    }
    // A source route with hops left, and more headers than we walk.
    passes::<V6>(Reason::ExtensionHeader, with_extensions(&[(43, 0)], 6), |b| b[57] = 1);
    passes::<V6>(Reason::ExtensionHeader, with_extensions(&[(60, 0); 5], 6), |_| ());
    // Options behind a fragment header.
    passes::<V6>(Reason::ExtensionHeader, with_extensions(&[(44, 0), (60, 0)], 6), |_| ());
    // Headers that lead out of the packet.
    passes::<V6>(Reason::Truncated, with_extensions(&[(0, 0)], 6), |b| b[55] = 20);
    passes::<V6>(Reason::ExtensionHeader, with_extensions(&[(0, 0)], 6), |b| b[55] = 255);
}

/// A SYN behind extension headers of (kind, length field).
fn with_extensions(headers: &[(u8, u8)], last: u8) -> Vec<u8> {
    let mut bytes = frame::<V6>();
    let mut chain = Vec::new();
    for (i, (_, len)) in headers.iter().enumerate() {
        let next = headers.get(i + 1).map_or(last, |(kind, _)| *kind);
        let mut header = vec![0; 8 + 8 * usize::from(*len)];
        header[0] = next;
        header[1] = *len;
        chain.extend(header);
    }
    bytes[20] = headers[0].0;
    let payload = u16::from_be_bytes([bytes[18], bytes[19]]) + u16::try_from(chain.len()).expect("short");
    bytes[18..20].copy_from_slice(&payload.to_be_bytes());
    bytes.splice(54..54, chain);
    bytes
}

#[test]
fn extension_headers_that_can_be_walked_are_walked() {
    let node = Node::<V6>::new();
    for headers in [&[(0, 0)][..], &[(0, 1), (60, 2)], &[(43, 0)], &[(0, 0), (60, 0), (43, 1), (60, 3)]] {
        let syn = node.send(Side::NicIn, with_extensions(headers, 6));
        let (src, dst) = syn.seen(Verdict::Pass, Reason::Translated).ends();
        assert_eq!((src, dst), (client::<V6>(40000), at(V6::POD, ports::TARGET)));
    }
}

const SIDES: [Side; 4] = [Side::NicIn, Side::NicOut, Side::PodIn, Side::PodOut];

/// Packets of every kind that is translated or answered.
fn every_kind<F: TestFamily>(to: &str) -> Vec<Vec<u8>> {
    let from = client::<F>(40000);
    let about = tcp(at(to, ports::WEB), from, SYN);
    vec![
        tcp(from, at(to, ports::WEB), SYN),
        udp(from, at(to, ports::DNS), b"four"),
        sctp(from, at(to, ports::SIGNAL), INIT, &[1; 16]),
        icmp_error(from.ip(), at(to, 0).ip(), F::PORT_UNREACHABLE, &about[14..]),
        other::<F>(to, GRE, 0),
    ]
}

/// Rule 6: whatever the header says that is not there.
fn what_is_cut_short_passes_at_every_side<F: TestFamily>() {
    let node = Node::<F>::new();
    for to in [F::VIP, F::NODE, F::UNALLOCATED, F::OTHER_POD] {
        for packet in every_kind::<F>(to) {
            for side in SIDES {
                for len in 14..packet.len() {
                    node.send(side, packet[..len].to_vec()).untouched(Verdict::Pass, Reason::Truncated);
                }
            }
        }
    }
    assert_eq!(node.count(FlowTable::Pending), 0);
}

/// Rule 6, at addresses of Services too: no answer could be right about a packet that was not read.
fn what_is_not_understood_passes_at_every_side<F: TestFamily>() {
    type Change = (Reason, fn(&mut Vec<u8>));
    let in_ipv4: [Change; 7] = [
        (Reason::IpOptions, |b| b[14] = 0x46),
        (Reason::IpOptions, |b| b[14] = 0x4f),
        (Reason::Truncated, |b| b[14] = 0x44),
        (Reason::NotIp, |b| b[14] = 0x55),
        // Total lengths that lie: within the header, and beyond the frame.
        (Reason::Truncated, |b| b[16..18].fill(0)),
        (Reason::Truncated, |b| b[16..18].copy_from_slice(&[0, 19])),
        (Reason::Truncated, |b| b[16] = 0xff),
    ];
    let in_ipv6: [Change; 7] = [
        (Reason::NotIp, |b| b[14] = 0x40),
        (Reason::Truncated, |b| b[18] = 0xff),
        // A source route with hops left, options behind a fragment header, and options that lead far away.
        (Reason::ExtensionHeader, |b| prepend(b, 43, &[0, 4, 1])),
        (Reason::ExtensionHeader, |b| {
            prepend(b, 60, &[]);
            prepend(b, 44, &[]);
        }),
        (Reason::ExtensionHeader, |b| (0..2).for_each(|_| prepend(b, 44, &[]))),
        (Reason::ExtensionHeader, |b| (0..5).for_each(|_| prepend(b, 60, &[]))),
        (Reason::Truncated, |b| prepend(b, 0, &[30])),
    ];
    let changes = if F::HEADER_LEN == 20 { in_ipv4 } else { in_ipv6 };
    let node = Node::<F>::new();
    for to in [F::VIP, F::NODE, F::UNALLOCATED, F::OTHER_POD] {
        for packet in every_kind::<F>(to) {
            for (n, (reason, change)) in changes.iter().enumerate() {
                let mut bytes = packet.clone();
                change(&mut bytes);
                for side in SIDES {
                    let outcome = node.send(side, bytes.clone());
                    assert_eq!(outcome.reason, *reason, "change {n} of {packet:02x?}");
                    outcome.untouched(Verdict::Pass, *reason);
                }
            }
        }
    }
    assert_eq!(node.count(FlowTable::Pending), 0);
}

/// Puts an IPv6 extension header of 8 bytes, `fields` behind its first, before what a packet has.
fn prepend(bytes: &mut Vec<u8>, kind: u8, fields: &[u8]) {
    let mut header = [0; 8];
    header[0] = std::mem::replace(&mut bytes[20], kind);
    header[1..=fields.len()].copy_from_slice(fields);
    bytes.splice(54..54, header);
    bytes[19] += 8;
}

#[test]
fn transport_headers_in_the_padding_of_a_frame_are_none() {
    // Found by fuzzing: the length of a first fragment's datagram says nothing about the fragment's own.
    for len in 0..28 {
        let datagram = udp(client::<V4>(5000), at(V4::NODE, ports::DNS_NODE), b"four");
        passes::<V4>(Reason::Truncated, datagram, |b| {
            b[17] = len;
            b[20] = 0x20;
        });
    }
    for len in 0..16 {
        let datagram = udp(client::<V6>(5000), at(V6::NODE, ports::DNS_NODE), b"four");
        passes::<V6>(Reason::Truncated, datagram, |b| {
            prepend(b, 44, &[0, 0, 1]);
            b[19] = len;
        });
    }
}
