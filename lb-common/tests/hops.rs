//! Flows remember where their packets are sent on to, for as long as nothing has changed there and somebody follows.

use lb_common::abi::{Hop, Routing, Side};
use lb_common::host::HostRoute;
use lb_common::pipeline::Verdict;
use lb_common::tables::FlowTable;
use lb_common::testing::node::{MTU, NIC, Node, client};
use lb_common::testing::{TestFamily, at, ports, tcp, udp};
use lb_common::wire::tcp_flags::{ACK, SYN};
use lb_common::{Reason, both_families};

both_families! {
    a_hop_is_asked_for_once
    a_change_is_followed_at_once
    nobody_vouches_for_an_agent_that_is_gone
    a_longer_packet_is_asked_for
    without_an_agent_every_packet_asks
}

/// A node whose agent follows changes, and a client with an established flow to a backend on another node.
fn forwarding<F: TestFamily>() -> Node<F> {
    let node = Node::<F>::new();
    follow(&node, 1);
    for flags in [SYN, ACK] {
        node.send(Side::NicIn, request::<F>(flags)).seen(Verdict::Forward, Reason::Forwarded);
    }
    node
}

/// The agent vouches for this generation.
fn follow<F: TestFamily>(node: &Node<F>, generation: u32) {
    let until = node.tables.now.get() + 2_000_000_000;
    node.tables.routing.set(Routing { until, generation, pad: 0 });
}

fn request<F: TestFamily>(flags: u8) -> Vec<u8> {
    tcp(client::<F>(40000), at(F::NODE, ports::FAR_NODE), flags)
}

/// Sends a packet after the way has gone: whether it is carried on shows whether it is known.
fn goes_on<F: TestFamily>(node: &mut Node<F>, packet: Vec<u8>) -> bool {
    let way = std::mem::replace(&mut node.route, HostRoute::None);
    let outcome = node.send(Side::NicIn, packet);
    node.route = way;
    match outcome.reason {
        Reason::Forwarded => true,
        Reason::NoRoute => false,
        other => panic!("{other:?}"),
    }
}

/// The hops that the client's flow knows.
fn hops<F: TestFamily>(node: &Node<F>) -> Vec<Hop> {
    let both = [FlowTable::Established, FlowTable::Pending].map(|table| node.tables.entries(table));
    let known = both.into_iter().flatten().map(|(_, flow)| flow.hop);
    known.filter(|hop| hop.generation != 0).collect()
}

fn a_hop_is_asked_for_once<F: TestFamily>() {
    let mut node = forwarding::<F>();
    assert_eq!(hops(&node).iter().map(|hop| (hop.generation, hop.ifindex)).collect::<Vec<_>>(), [(1, NIC)]);
    assert!(goes_on(&mut node, request::<F>(ACK)));
    node.wait(1_500_000_000);
    assert!(goes_on(&mut node, request::<F>(ACK)), "the agent still vouches");
}

fn a_change_is_followed_at_once<F: TestFamily>() {
    let mut node = forwarding::<F>();
    follow(&node, 2);
    assert!(!goes_on(&mut node, request::<F>(ACK)));
    node.send(Side::NicIn, request::<F>(ACK)).seen(Verdict::Forward, Reason::Forwarded);
    assert!(goes_on(&mut node, request::<F>(ACK)), "it was asked for anew");
    follow(&node, 0);
    assert!(!goes_on(&mut node, request::<F>(ACK)), "there is no such generation");
}

fn nobody_vouches_for_an_agent_that_is_gone<F: TestFamily>() {
    let mut node = forwarding::<F>();
    node.wait(2_300_000_000);
    assert!(!goes_on(&mut node, request::<F>(ACK)));
    node.send(Side::NicIn, request::<F>(ACK)).seen(Verdict::Forward, Reason::Forwarded);
    assert_eq!(hops(&node), [], "what is found now is not kept");
    follow(&node, 1);
    node.send(Side::NicIn, request::<F>(ACK)).seen(Verdict::Forward, Reason::Forwarded);
    assert!(goes_on(&mut node, request::<F>(ACK)), "an agent is back");
}

fn a_longer_packet_is_asked_for<F: TestFamily>() {
    let mut node = Node::<F>::new();
    follow(&node, 1);
    let datagram = |len: usize| udp(client::<F>(40000), at(F::NODE, ports::FAR_DNS_NODE), &vec![7; len]);
    node.send(Side::NicIn, datagram(100)).seen(Verdict::Forward, Reason::Forwarded);
    assert!(goes_on(&mut node, datagram(100)) && goes_on(&mut node, datagram(10)));
    assert!(!goes_on(&mut node, datagram(102)), "whether this fits is not known");
    node.send(Side::NicIn, datagram(1000)).seen(Verdict::Forward, Reason::Forwarded);
    assert!(goes_on(&mut node, datagram(1000)));
    let long = usize::try_from(MTU).expect("a small number");
    assert_eq!(node.send(Side::NicIn, datagram(long)).reason, Reason::PacketTooBig);
}

fn without_an_agent_every_packet_asks<F: TestFamily>() {
    let mut node = Node::<F>::new();
    for flags in [SYN, ACK] {
        node.send(Side::NicIn, request::<F>(flags)).seen(Verdict::Forward, Reason::Forwarded);
    }
    assert_eq!(hops(&node), []);
    assert!(!goes_on(&mut node, request::<F>(ACK)));
}
