//! What a translation changes in a packet, and what it leaves as it is.

use lb_common::abi::Side;
use lb_common::host::HostPacket;
use lb_common::packet::Packet;
use lb_common::pipeline::Verdict;
use lb_common::testing::node::{NIC, Node, client};
use lb_common::testing::{Seen, Segment, TestFamily, at, ports, read, tcp, udp};
use lb_common::wire::tcp_flags::SYN;
use lb_common::{Reason, V4, both_families};

both_families! {
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
