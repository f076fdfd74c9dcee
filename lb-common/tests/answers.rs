//! Who is answered: one host. Nothing is said to addresses that stand for nobody or for many (RFC 1122, sections 3.2.2 and
//! 4.2.3.10; RFC 4443, section 2.4).

use lb_common::abi::Side;
use lb_common::pipeline::Verdict;
use lb_common::testing::node::{Node, client};
use lb_common::testing::{Segment, TestFamily, at, ports, sctp, tcp, udp};
use lb_common::wire::sctp_chunk::INIT;
use lb_common::wire::tcp_flags::{ACK, SYN};
use lb_common::{Reason, both_families};

both_families! {
    nobody_is_answered
    groups_of_the_link_are_not_answered
}

/// Packets of a client that are answered, and why.
fn asked<F: TestFamily>(client: &str) -> Vec<(Vec<u8>, Reason)> {
    let client = at(client, 40000);
    let mut expired = Segment::new(client, at(F::NODE, ports::FAR_NODE), SYN);
    expired.ttl = 1;
    let long = vec![7; 1600];
    let mut packets = vec![
        (expired.build(), Reason::TtlExceeded),
        (tcp(client, at(F::VIP, 9), SYN), Reason::UnknownPort),
        (tcp(client, at(F::VIP, 9), ACK), Reason::UnknownPort),
        (udp(client, at(F::NODE, ports::EMPTY_NODE), b"?"), Reason::NoEndpoints),
        (sctp(client, at(F::NODE, ports::EMPTY_NODE), INIT, &[1; 16]), Reason::NoEndpoints),
    ];
    if F::HEADER_LEN == 40 {
        packets.push((udp(client, at(F::NODE, ports::FAR_DNS_NODE), &long), Reason::PacketTooBig));
    }
    packets
}

fn nobody_is_answered<F: TestFamily>() {
    let nobody: &[&str] = if F::HEADER_LEN == 40 {
        &["::", "::1", "ff02::1", "ff0e::7", "::ffff:203.0.113.7", "::192.0.2.9"]
    } else {
        &[
            "0.0.0.0",
            "0.0.0.9",
            "127.0.0.1",
            "127.9.9.9",
            "224.0.0.1",
            "239.1.2.3",
            "240.0.0.1",
            "255.255.255.255",
        ]
    };
    for side in [Side::NicIn, Side::PodIn] {
        for source in nobody {
            let node = Node::<F>::new();
            for (packet, reason) in asked::<F>(source) {
                let outcome = node.send(side, packet);
                // What a pod sends is left to the stack: its TTL and the MTU are not ours to look after.
                if outcome.verdict == Verdict::Pass && side == Side::PodIn {
                    assert_eq!(outcome.reason, Reason::Translated, "{source}");
                } else {
                    outcome.untouched(Verdict::Drop, reason);
                }
            }
        }
    }
    // Neighbours of these are hosts.
    let hosts: &[&str] = if F::HEADER_LEN == 40 {
        &[F::CLIENT, "64:ff9b::203.0.113.7", "fe80::1", "fd00::1"]
    } else {
        &[F::CLIENT, "1.0.0.1", "126.255.255.255", "128.0.0.1", "223.255.255.254", "169.254.1.1"]
    };
    for source in hosts {
        let node = Node::<F>::new();
        for (packet, reason) in asked::<F>(source) {
            let outcome = node.send(Side::NicIn, packet);
            assert_eq!(outcome.seen(Verdict::SendBack, reason).ends().1.ip(), at(source, 0).ip());
        }
    }
}

fn groups_of_the_link_are_not_answered<F: TestFamily>() {
    let node = Node::<F>::new();
    for (packet, reason) in asked::<F>(F::CLIENT) {
        // Destination and source; broadcast, and what IPv4 and IPv6 multicast use.
        for (at, group) in
            [(0, [0xff; 6]), (0, [1, 0, 0x5e, 0, 0, 1]), (0, [0x33, 0x33, 0, 0, 0, 1]), (6, [0xff; 6])]
        {
            let mut frame = packet.clone();
            frame[at..at + 6].copy_from_slice(&group);
            node.send(Side::NicIn, frame).untouched(Verdict::Drop, reason);
        }
    }
    let udp = udp(client::<F>(5000), at(F::NODE, ports::EMPTY_NODE), b"?");
    node.send(Side::NicIn, udp).seen(Verdict::SendBack, Reason::NoEndpoints);
}
