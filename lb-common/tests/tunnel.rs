//! Direct server return: what goes into a tunnel, what comes out of one, and who is believed. Both nodes are the small
//! cluster's, the second with the far backend as its own.

use std::mem::size_of;

use lb_common::abi::{
    AddressInfo, Carry, Place, ServiceKey, Side, address_flags, backend_flags, network_flags, service_flags,
};
use lb_common::flow::State;
use lb_common::host::{HostPacket, HostRoute};
use lb_common::packet::{NETWORK, Packet as _};
use lb_common::pipeline::{Verdict, process};
use lb_common::tables::FlowTable;
use lb_common::testing::node::{MTU, NIC, Node, Outcome, client};
use lb_common::testing::{Seen, TTL, TestFamily, at, icmp_error, ports, read, sctp, tcp, udp};
use lb_common::tunnel::{self, DEFAULT_PORT, TunnelHdr};
use lb_common::wire::tcp_flags::{ACK, FIN, RST, SYN};
use lb_common::wire::{IpProto, UdpHdr};
use lb_common::{Family, Reason, V4, V6, both_families};

both_families! {
    a_connection_is_tunnelled_and_its_backend_answers
    datagrams_and_associations_are_tunnelled_too
    only_clients_outside_and_services_with_the_mode_are
    an_unknown_node_leaves_it_to_the_address_of_ours
    states_follow_the_one_direction_that_is_seen
    what_does_not_fit_is_told
    an_error_about_an_answer_goes_the_way_of_the_client
    strangers_are_not_believed
    what_we_do_not_write_is_not_believed
    what_is_not_ours_is_left_alone
    nothing_that_was_tunnelled_reaches_the_stack_untranslated
    a_backend_that_went_keeps_its_connections
    flows_are_cut_off_with_the_tunnels
    a_node_that_only_takes_from_tunnels_sends_as_ever
}

/// The second node.
fn far_node<F: TestFamily>() -> &'static str {
    if F::ETHER_TYPE == V4::ETHER_TYPE { "192.0.2.2" } else { "2001:db8::2" }
}

fn wire<F: TestFamily>(addr: &str) -> F::Addr {
    F::wire(at(addr, 0).ip())
}

/// Places of the far backends, which are on `node`.
fn settle<F: TestFamily>(node: &mut Node<F>, place: F::Addr) {
    for (id, backend) in node.tables.backends.clone().into_iter().filter(|(id, _)| id % 2 == 0) {
        let proto = [IpProto::Tcp, IpProto::Udp, IpProto::Sctp][id as usize / 2 - 1] as u8;
        let key = ServiceKey { addr: backend.addr, port: backend.port, proto, pad: 0 };
        node.tables.places.insert(key, Place { backend: id, node: place });
    }
    node.tables.tunnel_port = DEFAULT_PORT;
    for service in node.tables.services.values_mut() {
        service.flags |= service_flags::DSR;
    }
}

/// The node that the client asks.
fn near<F: TestFamily>() -> Node<F> {
    let mut node = Node::new();
    settle(&mut node, wire::<F>(far_node::<F>()));
    node
}

/// The node of the far backends.
fn far<F: TestFamily>() -> Node<F> {
    let mut node = Node::new();
    settle(&mut node, F::Addr::default());
    for backend in node.tables.backends.values_mut() {
        backend.flags ^= backend_flags::LOCAL;
    }
    let own = node.tables.addresses.remove(&wire::<F>(F::NODE)).expect("the node's address");
    node.tables.addresses.insert(wire::<F>(far_node::<F>()), own);
    let peer = AddressInfo { flags: address_flags::PEER };
    node.tables.addresses.insert(wire::<F>(F::NODE), peer);
    node
}

/// Sends a frame as the entry of a program does.
fn arrive<F: TestFamily>(node: &Node<F>, bytes: &[u8]) -> Outcome {
    let mut packet = HostPacket::new(bytes, NIC).with_route(node.route);
    let (verdict, reason) = match tunnel::unwrap::<F, _, _>(&mut packet, &node.tables) {
        Err(reason) => (Verdict::Drop, reason),
        Ok(_) => process::<F, _, _>(&mut packet, &node.tables, Side::NicIn),
    };
    Outcome { verdict, reason, before: bytes.to_vec(), bytes: packet.bytes() }
}

/// Sends a packet that must be tunnelled; the frame, and the packet inside.
#[track_caller]
fn tunnelled<F: TestFamily>(node: &Node<F>, bytes: &[u8]) -> (Vec<u8>, Seen) {
    let outcome = arrive(node, bytes);
    assert_eq!((outcome.verdict, outcome.reason), (Verdict::Forward, Reason::Tunnelled));
    let mut inside = outcome.bytes.clone();
    inside.drain(NETWORK..NETWORK + usize::from(tunnel::overhead::<F>()));
    (outcome.bytes, read(&inside).unwrap_or_else(|e| panic!("{e}: {inside:02x?}")))
}

fn a_connection_is_tunnelled_and_its_backend_answers<F: TestFamily>() {
    let (near, far) = (near::<F>(), far::<F>());
    let (client, front) = (client::<F>(40000), at(F::NODE, ports::FAR_NODE));
    let (frame, inside) = tunnelled(&near, &tcp(client, front, SYN));
    assert_eq!(inside.ends(), (client, front));
    assert_eq!(inside.ttl(), Some(TTL - 1));
    let packet = HostPacket::new(&frame, NIC);
    let tunnel = *packet.view::<TunnelHdr<F::Addr>>(NETWORK + F::HEADER_LEN).expect("the headers");
    assert_eq!(tunnel.udp.ports.dst.get(), DEFAULT_PORT);
    assert_eq!(usize::from(tunnel.udp.len.get()), frame.len() - NETWORK - F::HEADER_LEN);
    assert_eq!((tunnel.target.addr, tunnel.target.port.get()), (wire::<F>(F::FAR_POD), ports::TARGET));
    assert_eq!(near.count(FlowTable::Pending), 1, "one direction");

    let seen = arrive(&far, &frame).seen(Verdict::Pass, Reason::Translated);
    assert_eq!(seen.ends(), (client, at(F::FAR_POD, ports::TARGET)));
    let answer = far.send(Side::NicOut, tcp(at(F::FAR_POD, ports::TARGET), client, SYN | ACK));
    assert_eq!(answer.seen(Verdict::Pass, Reason::Translated).ends(), (front, client));

    let (frame, _) = tunnelled(&near, &tcp(client, front, ACK));
    assert_eq!((near.count(FlowTable::Pending), near.count(FlowTable::Established)), (0, 1));
    arrive(&far, &frame).seen(Verdict::Pass, Reason::Translated);
    tunnelled(&near, &tcp(client, front, ACK));
}

fn datagrams_and_associations_are_tunnelled_too<F: TestFamily>() {
    let (near, far) = (near::<F>(), far::<F>());
    let front = at(F::NODE, ports::FAR_DNS_NODE);
    for _ in 0..2 {
        let (frame, _) = tunnelled(&near, &udp(client::<F>(5000), front, b"query"));
        let seen = arrive(&far, &frame).seen(Verdict::Pass, Reason::Translated);
        assert_eq!(seen.ends(), (client::<F>(5000), at(F::FAR_POD, ports::TARGET_UDP)));
    }
    assert_eq!(near.count(FlowTable::Established), 1, "the second is no flood's");
    let init = sctp(client::<F>(5000), at(F::NODE, ports::FAR_SIGNAL_NODE), 1, &[0; 16]);
    let (frame, _) = tunnelled(&near, &init);
    arrive(&far, &frame).seen(Verdict::Pass, Reason::Translated);
}

fn only_clients_outside_and_services_with_the_mode_are<F: TestFamily>() {
    let mut near = near::<F>();
    let front = at(F::NODE, ports::FAR_NODE);
    near.send(Side::PodIn, tcp(at(F::POD, 4000), front, SYN)).seen(Verdict::Pass, Reason::Translated);
    // A pod of another node.
    let mut network = near.tables.networks[0];
    (network.addr, network.flags) = (wire::<F>(F::CLIENT), network_flags::POD);
    near.tables.networks.push(network);
    arrive(&near, &tcp(client::<F>(4000), front, SYN)).seen(Verdict::Forward, Reason::Forwarded);
    near.tables.networks.pop();
    // A backend of this node.
    let here = at(F::NODE, ports::WEB_NODE);
    arrive(&near, &tcp(client::<F>(4001), here, SYN)).seen(Verdict::Pass, Reason::Translated);
    for service in near.tables.services.values_mut() {
        service.flags &= !service_flags::DSR;
    }
    arrive(&near, &tcp(client::<F>(4002), front, SYN)).seen(Verdict::Forward, Reason::Forwarded);
}

fn an_unknown_node_leaves_it_to_the_address_of_ours<F: TestFamily>() {
    let mut near = near::<F>();
    near.tables.places.clear();
    let syn = tcp(client::<F>(4000), at(F::NODE, ports::FAR_NODE), SYN);
    arrive(&near, &syn).seen(Verdict::Forward, Reason::Forwarded);
}

fn states_follow_the_one_direction_that_is_seen<F: TestFamily>() {
    let near = near::<F>();
    let (client, front) = (client::<F>(4000), at(F::NODE, ports::FAR_NODE));
    let state = || {
        let entries = near.tables.entries(FlowTable::Established);
        let (key, flow) = entries.iter().next().expect("one");
        assert_eq!((entries.len(), flow.carry), (1, Carry::Tunnel as u8));
        State::of(FlowTable::Established, key.proto, flow)
    };
    tunnelled(&near, &tcp(client, front, SYN));
    tunnelled(&near, &tcp(client, front, SYN));
    assert_eq!(near.count(FlowTable::Established), 0, "the same again");
    tunnelled(&near, &tcp(client, front, ACK));
    assert_eq!(state(), State::Established);
    tunnelled(&near, &tcp(client, front, RST));
    assert_eq!(state(), State::Reset);
    tunnelled(&near, &tcp(client, front, ACK));
    assert_eq!(state(), State::Established, "who goes on was not reset");
    near.wait(2_000_000_000);
    tunnelled(&near, &tcp(client, front, ACK));
    tunnelled(&near, &tcp(client, front, FIN | ACK));
    assert_eq!(state(), State::Closed);
    // A new connection of the same name.
    tunnelled(&near, &tcp(client, front, SYN));
    assert_eq!((near.count(FlowTable::Pending), near.count(FlowTable::Established)), (1, 0));
}

fn what_does_not_fit_is_told<F: TestFamily>() {
    let near = near::<F>();
    let (client, front) = (client::<F>(4000), at(F::NODE, ports::FAR_DNS_NODE));
    let headers = F::HEADER_LEN + UdpHdr::LEN;
    let fits = MTU as usize - usize::from(tunnel::overhead::<F>()) - headers;
    tunnelled(&near, &udp(client, front, &vec![1; fits]));
    let outcome = arrive(&near, &udp(client, front, &vec![1; fits + 1]));
    let seen = outcome.seen(Verdict::SendBack, Reason::TunnelTooBig);
    let Seen::Icmp { kind, code, about, .. } = seen else { panic!("{seen:?}") };
    assert_eq!(((kind, code), about), (F::TOO_BIG, (client, front)));
    let mtu = NETWORK + F::HEADER_LEN + 6;
    let told = u16::from_be_bytes([outcome.bytes[mtu], outcome.bytes[mtu + 1]]);
    assert_eq!(usize::from(told), fits + headers);
}

fn an_error_about_an_answer_goes_the_way_of_the_client<F: TestFamily>() {
    let (near, far) = (near::<F>(), far::<F>());
    let (client, front) = (client::<F>(4000), at(F::NODE, ports::FAR_NODE));
    let (frame, _) = tunnelled(&near, &tcp(client, front, SYN));
    arrive(&far, &frame).seen(Verdict::Pass, Reason::Translated);
    let answer = tcp(front, client, SYN | ACK);
    let router = at(F::CLIENT, 0).ip();
    let error = icmp_error(router, front.ip(), F::TOO_BIG, &answer[NETWORK..]);
    let (frame, _) = tunnelled(&near, &error);
    let seen = arrive(&far, &frame).seen(Verdict::Pass, Reason::Translated);
    let Seen::Icmp { dst, about, .. } = seen else { panic!("{seen:?}") };
    assert_eq!((dst, about), (at(F::FAR_POD, 0).ip(), (at(F::FAR_POD, ports::TARGET), client)));
}

/// A frame out of the near node's tunnel.
fn frame<F: TestFamily>() -> Vec<u8> {
    tunnelled(&near::<F>(), &tcp(client::<F>(4000), at(F::NODE, ports::FAR_NODE), SYN)).0
}

/// Has a tunnel's headers say how long it is. Nobody looks at the outer checksum.
fn settle_lengths<F: TestFamily>(frame: &mut [u8]) {
    let payload = frame.len() - NETWORK - F::HEADER_LEN;
    let mut set = |at: usize, len: usize| {
        frame[at..at + 2].copy_from_slice(&u16::try_from(len).expect("a packet").to_be_bytes());
    };
    set(
        NETWORK + if F::HEADER_LEN == 40 { 4 } else { 2 },
        if F::HEADER_LEN == 40 { payload } else { payload + 20 },
    );
    set(NETWORK + F::HEADER_LEN + 4, payload);
}

fn strangers_are_not_believed<F: TestFamily>() {
    let mut far = far::<F>();
    far.tables.addresses.remove(&wire::<F>(F::NODE));
    arrive(&far, &frame::<F>()).untouched(Verdict::Drop, Reason::TunnelStranger);
    assert_eq!(far.count(FlowTable::Pending), 0);
}

fn what_we_do_not_write_is_not_believed<F: TestFamily>() {
    let geneve = NETWORK + F::HEADER_LEN + UdpHdr::LEN;
    // Version and length, flags, protocol; class, kind and length of the option.
    for at in [geneve, geneve + 1, geneve + 2, geneve + 3, geneve + 8, geneve + 9, geneve + 10, geneve + 11] {
        let far = far::<F>();
        let mut frame = frame::<F>();
        frame[at] ^= 1;
        arrive(&far, &frame).untouched(Verdict::Drop, Reason::TunnelBroken);
    }
    let far = far::<F>();
    let whole = frame::<F>();
    for len in NETWORK..whole.len() {
        let outcome = arrive(&far, &whole[..len]);
        assert!(matches!(outcome.reason, Reason::Truncated), "{len}: {:?}", outcome.reason);
    }
    // A tunnel that is right and has nothing in it, or half a header.
    for inside in [0, F::HEADER_LEN - 2] {
        let outer = usize::from(tunnel::overhead::<F>());
        let mut short = whole[..NETWORK + outer + inside].to_vec();
        settle_lengths::<F>(&mut short);
        arrive(&far, &short).untouched(Verdict::Drop, Reason::TunnelBroken);
    }
    assert_eq!(far.count(FlowTable::Pending), 0);
}

fn what_is_not_ours_is_left_alone<F: TestFamily>() {
    let far = far::<F>();
    let (geneve, whole) = (NETWORK + F::HEADER_LEN + UdpHdr::LEN, frame::<F>());
    // Another network's tunnel.
    let mut other = whole.clone();
    other[geneve + 4] ^= 1;
    arrive(&far, &other).untouched(Verdict::Pass, Reason::NotOurs);
    // On its way to somebody else.
    let mut passing = whole.clone();
    passing[NETWORK + F::HEADER_LEN - 1] ^= 4;
    arrive(&far, &passing).untouched(Verdict::Pass, Reason::NotOurs);
    // The same bytes at another port.
    let mut elsewhere = whole;
    elsewhere[NETWORK + F::HEADER_LEN + 3] ^= 1;
    arrive(&far, &elsewhere).untouched(Verdict::Pass, Reason::NotOurs);
}

fn nothing_that_was_tunnelled_reaches_the_stack_untranslated<F: TestFamily>() {
    let far = far::<F>();
    let near = near::<F>();
    let outer = frame::<F>()[..NETWORK + usize::from(tunnel::overhead::<F>())].to_vec();
    let wrap = |packet: Vec<u8>| {
        let mut frame = [outer.clone(), packet[NETWORK..].to_vec()].concat();
        settle_lengths::<F>(&mut frame);
        frame
    };
    // No frontend; a tunnel in a tunnel; a reset of nobody's connection.
    let stray = tcp(client::<F>(4000), at(F::NODE, 9), SYN);
    let nested = tunnelled(&near, &tcp(client::<F>(4001), at(F::NODE, ports::FAR_NODE), SYN)).0;
    let reset = tcp(client::<F>(4002), at(F::NODE, ports::FAR_NODE), RST);
    for packet in [stray, nested, reset] {
        let outcome = arrive(&far, &wrap(packet));
        assert_eq!(outcome.verdict, Verdict::Drop, "{:?}", outcome.reason);
    }
    assert_eq!(far.count(FlowTable::Pending), 0);
}

fn a_backend_that_went_keeps_its_connections<F: TestFamily>() {
    let (near, mut far) = (near::<F>(), far::<F>());
    let (client, front) = (client::<F>(4000), at(F::NODE, ports::FAR_NODE));
    let (syn, _) = tunnelled(&near, &tcp(client, front, SYN));
    arrive(&far, &syn).seen(Verdict::Pass, Reason::Translated);
    far.send(Side::NicOut, tcp(at(F::FAR_POD, ports::TARGET), client, SYN | ACK));
    let (ack, _) = tunnelled(&near, &tcp(client, front, ACK));
    far.tables.places.clear();
    arrive(&far, &ack).seen(Verdict::Pass, Reason::Translated);
    let (other, _) = tunnelled(&near, &tcp(self::client::<F>(4001), front, SYN));
    let outcome = arrive(&far, &other);
    assert_eq!((outcome.verdict, outcome.reason), (Verdict::Drop, Reason::NoSuchBackend));
}

fn flows_are_cut_off_with_the_tunnels<F: TestFamily>() {
    let mut near = near::<F>();
    let (client, front) = (client::<F>(4000), at(F::NODE, ports::FAR_DNS_NODE));
    for _ in 0..2 {
        tunnelled(&near, &udp(client, front, b"query"));
    }
    near.tables.tunnel_port = 0;
    near.route = HostRoute::Out { ifindex: NIC, mtu: MTU };
    arrive(&near, &udp(client, front, b"query")).seen(Verdict::Forward, Reason::Forwarded);
    assert_eq!(near.count(FlowTable::Established), 0);
}

#[test]
fn headers_are_as_long_as_they_say() {
    assert_eq!((tunnel::overhead::<V4>(), tunnel::overhead::<V6>()), (48, 80));
    assert_eq!(size_of::<TunnelHdr<<V4 as Family>::Addr>>(), 28);
    assert_eq!(size_of::<TunnelHdr<<V6 as Family>::Addr>>(), 40);
}

fn a_node_that_only_takes_from_tunnels_sends_as_ever<F: TestFamily>() {
    let (mut near, mut far) = (near::<F>(), far::<F>());
    let syn = tcp(client::<F>(40000), at(F::NODE, ports::FAR_NODE), SYN);
    let (frame, _) = tunnelled(&near, &syn);
    near.tables.sends_tunnelled = false;
    near.tables.pending.get_mut().clear();
    let outcome = arrive(&near, &syn);
    assert_eq!((outcome.verdict, outcome.reason), (Verdict::Forward, Reason::Forwarded));
    far.tables.sends_tunnelled = false;
    assert_eq!(arrive(&far, &frame).reason, Reason::Translated);
}
