//! Fragments on the host: they go the way of their first.

use std::net::SocketAddr;

use lb_common::abi::Side;
use lb_common::host::{HostPacket, HostRoute};
use lb_common::pipeline::{Verdict, process};
use lb_common::tables::FlowTable;
use lb_common::testing::node::{NIC, Node, client};
use lb_common::testing::{Seen, TTL, TestFamily, at, fragments, ports, read, reassemble, udp};
use lb_common::{Reason, V6, both_families};

both_families! {
    fragments_follow_their_first
    fragments_of_replies_follow_too
    forwarded_fragments_come_back
    a_first_fragment_that_comes_last_finds_no_followers
    foreign_fragments_are_not_remembered
    fragments_are_remembered_as_long_as_a_receiver_waits
    later_fragments_open_no_flow_and_get_no_answer
    later_fragments_for_a_service_address_are_never_let_out
}

/// A datagram of 3,000 bytes.
fn long_datagram(src: SocketAddr, dst: SocketAddr) -> Vec<u8> {
    let payload: Vec<u8> = (0..3000u16).map(|n| n.to_be_bytes()[1]).collect();
    udp(src, dst, &payload)
}

/// Sends a datagram in fragments; what becomes of it when all go the same way.
#[track_caller]
fn send_in_pieces<F: TestFamily>(node: &Node<F>, side: Side, packet: &[u8], want: Reason) -> Seen {
    let sent = fragments(packet, 0xabcd, 1448);
    assert_eq!(sent.len(), 3);
    let carried = sent.into_iter().map(|piece| {
        let outcome = node.send(side, piece);
        assert_eq!(outcome.reason, want);
        outcome.bytes
    });
    let packet = reassemble(&carried.collect::<Vec<_>>()).expect("a datagram");
    read(&packet).expect("a good packet")
}

fn fragments_follow_their_first<F: TestFamily>() {
    let node = Node::<F>::new();
    let backend = at(F::POD, ports::TARGET_UDP);
    for (side, from, frontend) in [
        (Side::NicIn, client::<F>(5000), at(F::NODE, ports::DNS_NODE)),
        (Side::PodIn, at(F::OTHER_POD, 5000), at(F::VIP, ports::DNS)),
    ] {
        let seen = send_in_pieces(&node, side, &long_datagram(from, frontend), Reason::Translated);
        assert_eq!(seen.ends(), (from, backend));
        let Seen::Udp { payload, .. } = seen else { panic!("{seen:?}") };
        assert_eq!(payload.len(), 3000);
    }
    // A datagram is known by both addresses and its number, in the place it was seen at.
    assert_eq!(node.tables.fragments.borrow().len(), 2);
    assert_eq!(node.count(FlowTable::Pending), 4);
}

fn fragments_of_replies_follow_too<F: TestFamily>() {
    let node = Node::<F>::new();
    let (client, frontend, backend) =
        (client::<F>(5000), at(F::NODE, ports::DNS_NODE), at(F::POD, ports::TARGET_UDP));
    node.send(Side::NicIn, udp(client, frontend, b"much?"));
    let seen = send_in_pieces(&node, Side::NicOut, &long_datagram(backend, client), Reason::Translated);
    assert_eq!(seen.ends(), (frontend, client));
    assert_eq!(node.count(FlowTable::Pending), 2);
}

fn forwarded_fragments_come_back<F: TestFamily>() {
    let node = Node::<F>::new();
    let (client, frontend) = (client::<F>(5000), at(F::NODE, ports::FAR_DNS_NODE));
    let seen = send_in_pieces(&node, Side::NicIn, &long_datagram(client, frontend), Reason::Forwarded);
    let (source, backend) = seen.ends();
    assert_eq!((source.ip(), backend), (at(F::NODE, 0).ip(), at(F::FAR_POD, ports::TARGET_UDP)));
    // Each fragment is a packet that a router has forwarded.
    assert_eq!(seen.ttl(), Some(TTL - 1));
    let seen = send_in_pieces(&node, Side::NicIn, &long_datagram(backend, source), Reason::Forwarded);
    assert_eq!(seen.ends(), (frontend, client));
}

fn a_first_fragment_that_comes_last_finds_no_followers<F: TestFamily>() {
    let node = Node::<F>::new();
    let packet = long_datagram(client::<F>(5000), at(F::NODE, ports::DNS_NODE));
    let [first, second, third] = &fragments(&packet, 7, 1448)[..] else { panic!("three fragments") };
    node.send(Side::NicIn, third.clone()).untouched(Verdict::Pass, Reason::Fragment);
    assert_eq!(node.send(Side::NicIn, first.clone()).reason, Reason::Translated);
    assert_eq!(node.send(Side::NicIn, second.clone()).reason, Reason::Translated);
    // What comes in any order behind the first is translated, and so is what comes twice.
    assert_eq!(node.send(Side::NicIn, third.clone()).reason, Reason::Translated);
    assert_eq!(node.send(Side::NicIn, second.clone()).reason, Reason::Translated);
    // Another datagram is another's.
    let other = fragments(&packet, 8, 1448);
    node.send(Side::NicIn, other[1].clone()).untouched(Verdict::Pass, Reason::Fragment);
    node.send(Side::PodIn, third.clone()).untouched(Verdict::Pass, Reason::Fragment);
}

fn foreign_fragments_are_not_remembered<F: TestFamily>() {
    let node = Node::<F>::new();
    for (side, src, dst, reason) in [
        (Side::NicIn, F::CLIENT, F::OTHER_POD, Reason::NotOurs),
        (Side::NicOut, F::OTHER_POD, F::CLIENT, Reason::NotOurs),
        // A port that is no frontend's, and one that is not served.
        (Side::NicIn, F::CLIENT, F::NODE, Reason::NotOurs),
        (Side::NicIn, F::CLIENT, F::VIP, Reason::UnknownPort),
    ] {
        for piece in &fragments(&long_datagram(at(src, 5000), at(dst, 9)), 7, 1448)[..1] {
            assert_eq!(node.send(side, piece.clone()).reason, reason);
        }
    }
    assert!(node.tables.fragments.borrow().is_empty());
}

fn fragments_are_remembered_as_long_as_a_receiver_waits<F: TestFamily>() {
    let node = Node::<F>::new();
    let packet = long_datagram(client::<F>(5000), at(F::NODE, ports::DNS_NODE));
    let pieces = fragments(&packet, 7, 1448);
    assert_eq!(node.send(Side::NicIn, pieces[0].clone()).reason, Reason::Translated);
    node.wait(F::FRAGMENT_TIMEOUT);
    assert_eq!(node.send(Side::NicIn, pieces[1].clone()).reason, Reason::Translated);
    node.wait(1);
    node.send(Side::NicIn, pieces[2].clone()).untouched(Verdict::Pass, Reason::Fragment);
}

fn later_fragments_open_no_flow_and_get_no_answer<F: TestFamily>() {
    let mut node = Node::<F>::new();
    let packet = long_datagram(client::<F>(5000), at(F::NODE, ports::FAR_DNS_NODE));
    let pieces = fragments(&packet, 7, 1448);
    assert_eq!(node.send(Side::NicIn, pieces[0].clone()).reason, Reason::Forwarded);
    let mut dying = pieces[1].clone();
    // TTL or hop limit; the checksum is not looked at.
    dying[if F::HEADER_LEN == 40 { 21 } else { 22 }] = 1;
    node.send(Side::NicIn, dying).untouched(Verdict::Drop, Reason::TtlExceeded);
    node.route = HostRoute::Out { ifindex: NIC, mtu: 1280 };
    node.send(Side::NicIn, pieces[1].clone()).untouched(Verdict::Drop, Reason::PacketTooBig);
    node.tables.pending.borrow_mut().clear();
    node.send(Side::NicIn, pieces[1].clone()).untouched(Verdict::Pass, Reason::Fragment);
    assert_eq!(node.count(FlowTable::Pending), 0);
}

fn later_fragments_for_a_service_address_are_never_let_out<F: TestFamily>() {
    let node = Node::<F>::new();
    for (addr, verdict, reason) in [
        (F::VIP, Verdict::Drop, Reason::StrayFragment),
        (F::UNALLOCATED, Verdict::Drop, Reason::NoSuchService),
        (F::NODE, Verdict::Pass, Reason::Fragment),
        (F::OTHER_POD, Verdict::Pass, Reason::Fragment),
    ] {
        let pieces = fragments(&long_datagram(client::<F>(5000), at(addr, ports::EMPTY)), 7, 1448);
        for side in [Side::NicIn, Side::PodIn] {
            node.send(side, pieces[1].clone()).untouched(verdict, reason);
        }
        node.send(Side::NicOut, pieces[1].clone()).untouched(Verdict::Pass, Reason::Fragment);
        // XDP passes on what it cannot finish, and so may know less than tc.
        let mut packet = HostPacket::new(&pieces[1], NIC).with_hook_behind();
        let early = process::<F, _, _>(&mut packet, &node.tables, Side::NicIn);
        assert_eq!(early, (Verdict::Pass, Reason::Fragment));
    }
}

#[test]
fn a_fragment_that_is_all_of_its_packet_is_none() {
    // RFC 6946: whoever was told of an MTU below 1280 bytes sends such packets.
    let node = Node::<V6>::new();
    let (client, frontend) = (client::<V6>(5000), at(V6::NODE, ports::DNS_NODE));
    let [atomic] = &fragments(&udp(client, frontend, b"short"), 7, 1448)[..] else { panic!("one fragment") };
    let outcome = node.send(Side::NicIn, atomic.clone());
    assert_eq!((outcome.verdict, outcome.reason), (Verdict::Pass, Reason::Translated));
    let packet = reassemble(&[outcome.bytes]).expect("a packet");
    assert_eq!(read(&packet).expect("a good packet").ends(), (client, at(V6::POD, ports::TARGET_UDP)));
    assert!(node.tables.fragments.borrow().is_empty());
}
