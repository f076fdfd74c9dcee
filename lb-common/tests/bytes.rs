//! What a translation changes in a packet, and what it leaves as it is.

use std::net::SocketAddr;

use lb_common::abi::Side;
use lb_common::checksum::Diff;
use lb_common::host::HostPacket;
use lb_common::packet::Packet;
use lb_common::pipeline::Verdict;
use lb_common::testing::invariants::check;
use lb_common::testing::node::{NIC, Node, client};
use lb_common::testing::{Seen, Segment, TestFamily, at, ports, read, tcp, udp};
use lb_common::wire::tcp_flags::{ACK, SYN};
use lb_common::{Reason, V4, both_families};

both_families! {
    a_translation_leaves_everything_else_alone
    the_stack_counts_the_ttl_of_what_it_forwards
    forwarding_takes_one_from_the_ttl_and_answers_the_last
}

fn forwarding_takes_one_from_the_ttl_and_answers_the_last<F: TestFamily>() {
    // Rule 9.
    let node = Node::<F>::new();
    let (client, frontend) = (client::<F>(40000), at(F::NODE, ports::FAR_NODE));
    for (ttl, left) in [(2, Some(1)), (1, None), (0, None)] {
        let mut syn = Segment::new(client, frontend, SYN);
        syn.ttl = ttl;
        let outcome = node.send(Side::NicIn, syn.build());
        if left.is_some() {
            assert_eq!(outcome.seen(Verdict::Forward, Reason::Forwarded).ttl(), left);
        } else {
            let seen = outcome.seen(Verdict::SendBack, Reason::TtlExceeded);
            let Seen::Icmp { src, dst, kind, code, about } = seen else { panic!("{seen:?}") };
            assert_eq!((src, dst, (kind, code)), (frontend.ip(), client.ip(), F::TIME_EXCEEDED));
            assert_eq!(about, (client, frontend));
        }
    }
}

#[test]
fn a_udp_checksum_of_zero_stays_zero() {
    let node = Node::<V4>::new();
    let mut datagram = udp(client::<V4>(5000), at(V4::NODE, ports::DNS_NODE), b"x");
    datagram[40..42].copy_from_slice(&[0, 0]);
    let outcome = node.send(Side::NicIn, datagram);
    outcome.seen(Verdict::Pass, Reason::Translated);
    assert_eq!(&outcome.bytes[40..42], &[0, 0]);
}

#[test]
fn frames_longer_than_their_packet_are_translated() {
    // Ethernet pads to 60 bytes.
    let node = Node::<V4>::new();
    let mut bytes = tcp(client::<V4>(40000), at(V4::NODE, ports::WEB_NODE), SYN);
    let len = bytes.len();
    bytes.resize(60, 0);
    let outcome = node.send(Side::NicIn, bytes);
    assert_eq!(outcome.verdict, Verdict::Pass);
    let (_, dst) = read(&outcome.bytes[..len]).expect("a good packet").ends();
    assert_eq!(dst, at(V4::POD, ports::TARGET));
}

#[test]
fn a_packet_knows_its_length() {
    assert_eq!(HostPacket::new(&[0; 33], NIC).size(), 33);
}

/// A segment with everything in it that a load balancer might forget: DSCP and ECN, an identification or flow label,
/// TCP options, and urgent data.
fn rich<F: TestFamily>(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let mut segment = Segment::new(from, to, ACK);
    // Two NOPs and a timestamp, which the header below has room for.
    segment.payload = [&[1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8][..], b"urgent!"].concat();
    let mut bytes = segment.build();
    let tcp = 14 + F::HEADER_LEN;
    let mut set = |at: usize, word: u16, check: Option<usize>| {
        let number = |bytes: &[u8], at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let change = Diff::between(u32::from(number(&bytes, at)), u32::from(word));
        bytes[at..at + 2].copy_from_slice(&word.to_be_bytes());
        if let Some(check) = check {
            let new = change.apply(number(&bytes, check));
            bytes[check..check + 2].copy_from_slice(&new.to_be_bytes());
        }
    };
    if F::HEADER_LEN == 20 {
        set(14, 0x45bb, Some(24));
        set(18, 0xbeef, Some(24));
    } else {
        set(14, 0x6bb5, None);
        set(16, 0xbeef, None);
    }
    // Header of 32 bytes; URG, ACK, ECE, CWR.
    set(tcp + 12, 0x80f0, Some(tcp + 16));
    set(tcp + 18, 7, Some(tcp + 16));
    read(&bytes).unwrap_or_else(|e| panic!("{e}: {bytes:02x?}"));
    bytes
}

/// Rule 9: addresses, ports, checksums, and the TTL of what is forwarded.
fn a_translation_leaves_everything_else_alone<F: TestFamily>() {
    let node = Node::<F>::new();
    let pod = at(F::POD, 40000);
    for (side, from, to, reason) in [
        (Side::NicIn, client::<F>(40000), at(F::NODE, ports::WEB_NODE), Reason::Translated),
        (Side::NicIn, client::<F>(40000), at(F::NODE, ports::FAR_NODE), Reason::Forwarded),
        (Side::PodIn, pod, at(F::VIP, ports::FAR), Reason::Translated),
        (Side::PodIn, pod, at(F::VIP, ports::WEB), Reason::Hairpinned),
    ] {
        let outcome = node.send(side, rich::<F>(from, to));
        assert_eq!(outcome.reason, reason);
        check(&outcome.before, &outcome.bytes, outcome.verdict, outcome.reason);
        let (sent, back) = (
            read(&outcome.bytes).expect("a good packet").ends(),
            match reason {
                Reason::Translated if side == Side::NicIn => Side::NicOut,
                Reason::Translated => Side::PodOut,
                _ => side,
            },
        );
        let reply = node.send(back, rich::<F>(sent.1, sent.0));
        assert_eq!((reply.reason, read(&reply.bytes).expect("a good packet").ends()), (reason, (to, from)));
        check(&reply.before, &reply.bytes, reply.verdict, reply.reason);
    }
}

fn the_stack_counts_the_ttl_of_what_it_forwards<F: TestFamily>() {
    let node = Node::<F>::new();
    let mut syn = Segment::new(client::<F>(40000), at(F::NODE, ports::WEB_NODE), SYN);
    // The last hop is the stack's to refuse, with the address that the client knows in its answer's quote.
    syn.ttl = 1;
    let seen = node.send(Side::NicIn, syn.build()).seen(Verdict::Pass, Reason::Translated);
    assert_eq!(seen.ttl(), Some(1));
    // A packet to a pod's own Service passes one router.
    let mut syn = Segment::new(at(F::POD, 40000), at(F::VIP, ports::WEB), SYN);
    syn.ttl = 2;
    let seen = node.send(Side::PodIn, syn.build()).seen(Verdict::SendBack, Reason::Hairpinned);
    assert_eq!(seen.ttl(), Some(1));
}
