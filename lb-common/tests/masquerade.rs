//! `--masquerade-all`: whose address a backend sees, and that every answer finds back to its client.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use lb_common::abi::{
    Edge, Network, Service, ServiceKey, Side, Window, address_flags, edge_flags, frontend_kind,
    network_flags, service_flags,
};
use lb_common::flow::State;
use lb_common::host::{HostPacket, HostRoute, HostTables};
use lb_common::packet::NETWORK;
use lb_common::pipeline::{Verdict, process};
use lb_common::socket::{self, Peer, Socket};
use lb_common::tables::FlowTable;
use lb_common::testing::{
    Seen, TTL, TestFamily, at, cluster, fragments, icmp_error, ports, read, reassemble, tcp, udp,
};
use lb_common::wire::IpProto;
use lb_common::wire::tcp_flags::{ACK, SYN};
use lb_common::{Reason, V4, V6, both_families};

const NIC: u32 = 7;
/// The bridge that the node's pods hang on.
const BRIDGE: u32 = 8;
/// The ports of a Service in the matrix, with endpoints here and there.
const PORT: u16 = 90;
const NODE_PORT: u16 = 30090;

/// A family with what the small cluster does not have.
trait MasqueradeFamily: TestFamily {
    /// The node's address on the bridge.
    const GATEWAY: &'static str;
    /// A load-balancer IP.
    const BALANCER: &'static str;
    /// One bits of the network of a node's pods.
    const POD_MASK: &'static str;
}

impl MasqueradeFamily for V4 {
    const GATEWAY: &'static str = "10.244.1.1";
    const BALANCER: &'static str = "198.51.100.9";
    const POD_MASK: &'static str = "255.255.255.0";
}

impl MasqueradeFamily for V6 {
    const GATEWAY: &'static str = "fd00:10:244:1::1";
    const BALANCER: &'static str = "2001:db8:b::9";
    const POD_MASK: &'static str = "ffff:ffff:ffff:ffff::";
}

both_families! {
    sources_are_as_the_contract_says
    answers_are_met_where_the_backend_is
    clients_here_and_outside_never_share_a_port
    a_lost_half_is_restored_at_its_own_edge
    ports_are_free_again_after_their_time
    flows_outlive_the_setting
    errors_find_the_way_of_answers
    fragments_find_the_way_of_their_first
    what_cannot_be_masqueraded_keeps_its_source
    the_last_hop_is_answered_to_the_pod
}

struct Node<F: TestFamily>(HostTables<F>);

impl<F: MasqueradeFamily> Node<F> {
    fn new(masquerades_all: bool) -> Self {
        let mut tables = cluster::<F>(NIC);
        tables.masquerades_all = masquerades_all;
        let wire = |text: &str| F::wire(at(text, 0).ip());
        let to_pods = F::edge(at(F::GATEWAY, 0).ip(), edge_flags::POD);
        tables.edges.insert(BRIDGE, to_pods);
        let own = tables.addresses[&wire(F::NODE)];
        tables.addresses.insert(wire(F::GATEWAY), own);
        tables.addresses.entry(wire(F::BALANCER)).or_default().flags = address_flags::FRONTEND;
        Self(tables)
    }

    fn send(&self, side: Side, bytes: &[u8]) -> (Verdict, Reason, Vec<u8>) {
        let mut packet = HostPacket::new(bytes, if side == Side::NicIn { NIC } else { BRIDGE })
            .with_route(HostRoute::Out { ifindex: NIC, mtu: 1500 })
            .with_local::<F>(&F::wire(at(F::NODE, 0).ip()));
        for pod in [F::POD, F::OTHER_POD] {
            packet = packet.with_device::<F>(&F::wire(at(pod, 0).ip()), BRIDGE);
        }
        let (verdict, reason) = process::<F, _, _>(&mut packet, &self.0, side);
        (verdict, reason, packet.bytes())
    }

    /// Sends a packet that must be translated. Returns how it goes on, and its ends then.
    #[track_caller]
    fn translate(&self, side: Side, bytes: &[u8]) -> (Verdict, (SocketAddr, SocketAddr)) {
        let (verdict, reason, after) = self.send(side, bytes);
        assert!(matches!(reason, Reason::Translated | Reason::Forwarded | Reason::Hairpinned), "{reason:?}");
        let seen = read(&after).unwrap_or_else(|e| panic!("{e}: {after:02x?}"));
        // Who sends it on takes one, and once.
        let taken = u8::from(verdict != Verdict::Pass);
        assert_eq!(seen.ttl().unwrap_or(TTL - taken), TTL - taken);
        (verdict, seen.ends())
    }

    fn forget(&self) {
        self.0.flows.borrow_mut().clear();
        self.0.pending.borrow_mut().clear();
    }
}

/// Policies of a Service.
#[derive(Clone, Copy, Default)]
struct Policies {
    external_local: bool,
    internal_local: bool,
}

/// A Service of two endpoints, backend 1 here and 2 there, that answers in three ways.
fn serve<F: MasqueradeFamily>(node: &mut Node<F>, policies: Policies) -> [SocketAddr; 3] {
    node.0.slots.extend([(200, 1), (201, 2)]);
    let window = |local: bool| Window { base: 200, len: if local { 1 } else { 2 } };
    let frontends = [at(F::VIP, PORT), at(F::NODE, NODE_PORT), at(F::BALANCER, PORT)].map(|at| (at, at.ip()));
    for ((frontend, addr), kind) in frontends.into_iter().zip([
        frontend_kind::CLUSTER_IP,
        frontend_kind::NODE_PORT,
        frontend_kind::LOAD_BALANCER,
    ]) {
        let external = kind != frontend_kind::CLUSTER_IP;
        let entry = Service {
            id: 20,
            flags: if external && policies.external_local { service_flags::SOURCE_KEPT } else { 0 },
            kind,
            internal: window(!external && policies.internal_local),
            external: window(if external { policies.external_local } else { policies.internal_local }),
            ..Service::default()
        };
        let addr = if kind == frontend_kind::NODE_PORT { F::Addr::default() } else { F::wire(addr) };
        for proto in [IpProto::Tcp, IpProto::Udp] {
            let key = ServiceKey { addr, port: frontend.port(), proto: proto as u8, pad: 0 };
            node.0.services.insert(key, entry);
        }
    }
    frontends.map(|(frontend, _)| frontend)
}

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Client {
    Pod,
    Process,
    Outside,
    /// A pod of another node, which a detector tells from the others outside.
    FarPod,
}

/// What the contract says of a client that asks one of the ways in: the backends, and of each whether it sees the client.
fn expected(
    policies: Policies,
    way: usize,
    client: Client,
    detected: bool,
    masquerades_all: bool,
) -> Vec<(u32, bool)> {
    let external = way > 0;
    let inside = client != Client::Outside && (client != Client::FarPod || detected);
    let local = if external { policies.external_local && !inside } else { policies.internal_local };
    let masqueraded = masquerades_all && !(external && policies.external_local);
    let kept = |backend| match client {
        // Its address is the node's whatever comes.
        Client::Process => true,
        Client::Pod => !masqueraded,
        // Replies of a backend elsewhere would not come back this way.
        Client::Outside | Client::FarPod => backend == 1 && !masqueraded,
    };
    [1, 2]
        .into_iter()
        .filter(|backend| !local || *backend == 1)
        .map(|backend| (backend, kept(backend)))
        .collect()
}

/// Rules 57 to 62: the 27 flows, and those of pods elsewhere, without and with a detector and `--masquerade-all`.
fn sources_are_as_the_contract_says<F: MasqueradeFamily>() {
    let settings = [(false, true), (false, false), (true, true), (true, false)];
    let services = [
        Policies::default(),
        Policies { external_local: true, ..Policies::default() },
        Policies { internal_local: true, ..Policies::default() },
    ];
    for ((masquerades_all, detected), policies) in
        settings.into_iter().flat_map(|setting| services.map(|policies| (setting, policies)))
    {
        let mut node = Node::<F>::new(masquerades_all);
        let frontends = serve(&mut node, policies);
        if detected {
            let (addr, mask) = (F::wire(at(F::FAR_POD, 0).ip()), F::wire(at(F::POD_MASK, 0).ip()));
            let wire = |text: &str| F::wire(at(text, 0).ip());
            node.0.networks.push(Network { addr, mask, flags: network_flags::POD });
            assert!(
                F::is_within(&wire(F::FAR_POD), &addr, &mask) && !F::is_within(&wire(F::POD), &addr, &mask)
            );
        }
        for (way, frontend) in frontends.into_iter().enumerate() {
            for client in [Client::Pod, Client::Process, Client::Outside, Client::FarPod] {
                let want = expected(policies, way, client, detected, masquerades_all);
                let seen = [0, 1].map(|chance| ask(&node, client, frontend, chance));
                let what = format!("{client:?} to {frontend}, detector {detected}, all {masquerades_all}");
                let seen: BTreeSet<_> = seen.into_iter().collect();
                assert_eq!(seen, want.into_iter().collect(), "{what}");
            }
        }
    }
}

/// One connection, there and back. Returns the backend and whether it saw the client.
fn ask<F: MasqueradeFamily>(
    node: &Node<F>,
    client: Client,
    frontend: SocketAddr,
    chance: u32,
) -> (u32, bool) {
    node.forget();
    node.0.random.set(chance);
    let here = at(F::POD, ports::TARGET);
    let number = |backend: SocketAddr| if backend == here { 1 } else { 2 };
    let (side, client) = match client {
        Client::Process => {
            let proto = IpProto::Tcp as u8;
            let asked = Peer::<F> { addr: F::wire(frontend.ip()), port: frontend.port() };
            let peer = socket::connect::<F, _>(&node.0, Socket { cookie: 1, proto, owner: 0 }, asked);
            let peer = peer.expect("a backend");
            return (if peer.addr == F::wire(here.ip()) { 1 } else { 2 }, true);
        }
        Client::Pod => (Side::PodIn, at(F::OTHER_POD, 40000)),
        Client::Outside => (Side::NicIn, at(F::CLIENT, 40000)),
        Client::FarPod => (Side::NicIn, far_client::<F>()),
    };
    let (verdict, (src, backend)) = node.translate(side, &tcp(client, frontend, SYN));
    let back = match (verdict, side) {
        (Verdict::Pass, Side::NicIn) => Side::NicOut,
        (Verdict::Pass, _) => Side::PodOut,
        _ if backend == here => Side::PodIn,
        _ => Side::NicIn,
    };
    assert_eq!(verdict == Verdict::Pass, src == client, "who is masqueraded is sent on");
    if src != client {
        let own = if backend == here { F::GATEWAY } else { F::NODE };
        assert_eq!(src.ip(), at(own, 0).ip());
        assert!((12288..28672).contains(&src.port()), "{src} is not of the reserved range");
    }
    for flags in [SYN | ACK, ACK] {
        let (_, ends) = node.translate(back, &tcp(backend, src, flags));
        assert_eq!(ends, (frontend, client), "the answer");
        let (_, ends) = node.translate(side, &tcp(client, frontend, ACK));
        assert_eq!(ends, (src, backend), "the rest of the connection");
    }
    (number(backend), src == client)
}

/// A pod of another node that is no backend.
fn far_client<F: TestFamily>() -> SocketAddr {
    let last = match at(F::FAR_POD, 0).ip() {
        IpAddr::V4(addr) => IpAddr::V4(u32::from(addr).wrapping_add(1).into()),
        IpAddr::V6(addr) => IpAddr::V6(u128::from(addr).wrapping_add(1).into()),
    };
    SocketAddr::new(last, 40000)
}

/// The four ways that a masqueraded connection takes: where requests are met, from whom, to which port, and where
/// answers are.
fn ways<F: MasqueradeFamily>() -> [(Side, SocketAddr, u16, Side); 4] {
    let (pod, outside) = (at(F::OTHER_POD, 5000), at(F::CLIENT, 5000));
    [
        (Side::PodIn, pod, ports::DNS_NODE, Side::PodIn),
        (Side::PodIn, pod, ports::FAR_DNS_NODE, Side::NicIn),
        (Side::NicIn, outside, ports::DNS_NODE, Side::PodIn),
        (Side::NicIn, outside, ports::FAR_DNS_NODE, Side::NicIn),
    ]
}

fn answers_are_met_where_the_backend_is<F: MasqueradeFamily>() {
    for (side, client, port, back) in ways::<F>() {
        let node = Node::<F>::new(true);
        let frontend = at(F::NODE, port);
        let (verdict, (src, backend)) = node.translate(side, &udp(client, frontend, b"query"));
        assert_eq!(verdict, Verdict::Forward);
        // An entry acts only where it was made for.
        for elsewhere in [Side::NicIn, Side::NicOut, Side::PodIn, Side::PodOut] {
            if elsewhere != back {
                let (_, reason, _) = node.send(elsewhere, &udp(backend, src, b"answer"));
                assert_eq!(reason, Reason::NotOurs, "{side:?} to {backend}, answered at {elsewhere:?}");
            }
        }
        assert_eq!(node.0.entries(FlowTable::Pending).len(), 2);
        let (verdict, ends) = node.translate(back, &udp(backend, src, b"answer"));
        assert_eq!((verdict, ends), (Verdict::Forward, (frontend, client)));
        node.translate(side, &udp(client, frontend, b"thanks"));
        assert_eq!(node.0.entries(FlowTable::Pending).len(), 0);
        assert_eq!(node.0.entries(FlowTable::Established).len(), 2);
    }
}

fn clients_here_and_outside_never_share_a_port<F: MasqueradeFamily>() {
    for port in [ports::DNS_NODE, ports::FAR_DNS_NODE] {
        let node = Node::<F>::new(true);
        let (mut sources, mut back) = (BTreeSet::new(), Vec::new());
        for (side, client, asked, answer) in ways::<F>() {
            for client_port in 1000..1500 {
                let client = SocketAddr::new(client.ip(), client_port);
                if asked == port {
                    let query = udp(client, at(F::NODE, port), b"");
                    let (_, (src, backend)) = node.translate(side, &query);
                    assert!(sources.insert(src), "{src} is two flows'");
                    back.push((answer, backend, src, client));
                }
            }
        }
        for (answer, backend, src, client) in back {
            let (_, ends) = node.translate(answer, &udp(backend, src, b""));
            assert_eq!(ends, (at(F::NODE, port), client));
        }
    }
}

fn a_lost_half_is_restored_at_its_own_edge<F: MasqueradeFamily>() {
    for (side, client, port, back) in ways::<F>() {
        let node = Node::<F>::new(true);
        let frontend = at(F::NODE, port);
        let (_, (src, backend)) = node.translate(side, &udp(client, frontend, b""));
        node.translate(back, &udp(backend, src, b""));
        node.translate(side, &udp(client, frontend, b""));
        let both = node.0.entries(FlowTable::Established);
        let sides: BTreeSet<u8> = both.keys().map(|key| key.side).collect();
        assert_eq!(sides, BTreeSet::from([side as u8, back as u8]));
        for lost in both.keys() {
            node.0.flows.borrow_mut().remove(lost);
            node.0.now.set(node.0.now.get() + 2_000_000_000);
            let left = *node.0.entries(FlowTable::Established).keys().next().expect("the other half");
            let packet = if left.dst == F::wire(frontend.ip()) && left.dst_port == port {
                udp(client, frontend, b"")
            } else {
                udp(backend, src, b"")
            };
            let at = if left.side == Side::NicIn as u8 { Side::NicIn } else { Side::PodIn };
            node.translate(at, &packet);
            let restored = node.0.entries(FlowTable::Established);
            assert!(restored.keys().eq(both.keys()), "{side:?} to {backend}");
            let rewrite = |flow: &lb_common::abi::Flow<F::Addr>| (flow.src, flow.dst, flow.flags, flow.carry);
            assert_eq!(rewrite(&restored[lost]), rewrite(&both[lost]));
        }
    }
}

fn ports_are_free_again_after_their_time<F: MasqueradeFamily>() {
    for (side, client, port, back) in ways::<F>() {
        let node = Node::<F>::new(true);
        let frontend = at(F::NODE, port);
        let (_, (src, backend)) = node.translate(side, &udp(client, frontend, b""));
        // Only the half that answers would meet: the tuple is somebody else's.
        let (reply, flow) = node
            .0
            .entries(FlowTable::Pending)
            .into_iter()
            .find(|(key, _)| key.dst == F::wire(src.ip()) && key.dst_port == src.port())
            .expect("the half of answers");
        let other = lb_common::abi::Flow { dst_port: 1, ..flow };
        for (wait, same) in [(State::Unanswered.default_timeout(), false), (1, true)] {
            node.forget();
            node.0.pending.borrow_mut().insert(reply, std::rc::Rc::new(std::cell::Cell::new(other)));
            node.0.now.set(node.0.now.get() + wait);
            let (_, (again, _)) = node.translate(side, &udp(client, frontend, b""));
            assert_eq!(again == src, same, "{back:?} of {backend}, {wait} ns later");
        }
    }
}

fn flows_outlive_the_setting<F: MasqueradeFamily>() {
    for before in [true, false] {
        for (side, client, port, _) in ways::<F>() {
            let mut node = Node::<F>::new(before);
            let frontend = at(F::NODE, port);
            let first = node.translate(side, &udp(client, frontend, b""));
            node.0.masquerades_all = !before;
            assert_eq!(node.translate(side, &udp(client, frontend, b"")), first);
        }
    }
}

/// Of both directions: from the far end.
fn errors_find_the_way_of_answers<F: MasqueradeFamily>() {
    for (side, client, port, back) in ways::<F>() {
        let node = Node::<F>::new(true);
        let frontend = at(F::NODE, port);
        let query = udp(client, frontend, b"query");
        let (verdict, _, sent) = node.send(side, &query);
        assert_eq!(verdict, Verdict::Forward);
        let (src, backend) = read(&sent).expect("sound").ends();
        let check = |met, from: SocketAddr, to: SocketAddr, quote: &[u8], told: (SocketAddr, SocketAddr)| {
            let error = icmp_error(from.ip(), to.ip(), F::PORT_UNREACHABLE, &quote[NETWORK..]);
            let (verdict, reason, after) = node.send(met, &error);
            assert_eq!((verdict, reason), (Verdict::Forward, Reason::Forwarded));
            let Ok(Seen::Icmp { src, dst, about, .. }) = read(&after) else { panic!("{after:02x?}") };
            assert_eq!((src, dst, about), (told.1.ip(), told.0.ip(), told));
        };
        check(back, backend, src, &sent, (client, frontend));
        let (_, _, answer) = node.send(back, &udp(backend, src, b"answer"));
        check(side, client, frontend, &answer, (backend, src));
    }
}

fn fragments_find_the_way_of_their_first<F: MasqueradeFamily>() {
    for (side, client, port, back) in ways::<F>() {
        let node = Node::<F>::new(true);
        let frontend = at(F::NODE, port);
        let relay = |side, whole: Vec<u8>| {
            let pieces = fragments(&whole, 7, 512);
            assert!(pieces.len() > 1);
            let relayed = pieces.iter().map(|piece| {
                let (verdict, reason, after) = node.send(side, piece);
                assert_eq!((verdict, reason), (Verdict::Forward, Reason::Forwarded));
                after
            });
            let whole = reassemble(&relayed.collect::<Vec<_>>()).expect("all of them");
            read(&whole).expect("a sound datagram").ends()
        };
        let (src, backend) = relay(side, udp(client, frontend, &[1; 1200]));
        assert_ne!(src, client);
        assert_eq!(relay(back, udp(backend, src, &[2; 1200])), (frontend, client));
    }
}

fn what_cannot_be_masqueraded_keeps_its_source<F: MasqueradeFamily>() {
    let (pod, outside) = (at(F::OTHER_POD, 5000), at(F::CLIENT, 5000));
    // No answer of a pod is seen whose device is no edge.
    let mut node = Node::<F>::new(true);
    node.0.edges.remove(&BRIDGE);
    for (side, client) in [(Side::PodIn, pod), (Side::NicIn, outside)] {
        let (verdict, (src, _)) = node.translate(side, &udp(client, at(F::NODE, ports::DNS_NODE), b""));
        assert_eq!((verdict, src), (Verdict::Pass, client));
    }
    // What is not to be masqueraded, on a way to pods that others take: an endpoint that does not name its node.
    let mut node = Node::<F>::new(false);
    node.0.backends.get_mut(&3).expect("a backend").flags = 0;
    let (verdict, (src, _)) = node.translate(Side::NicIn, &udp(outside, at(F::NODE, ports::DNS_NODE), b""));
    assert_eq!((verdict, src), (Verdict::Pass, outside));
    // A backend with the node's own address.
    let mut node = Node::<F>::new(true);
    node.0.backends.get_mut(&3).expect("a backend").addr = F::wire(at(F::NODE, 0).ip());
    for (side, client) in [(Side::PodIn, pod), (Side::NicIn, outside)] {
        let (verdict, (src, _)) = node.translate(side, &udp(client, at(F::NODE, ports::DNS_NODE), b""));
        assert_eq!((verdict, src), (Verdict::Pass, client));
    }
    // A pod that is its own backend sees the frontend.
    let node = Node::<F>::new(true);
    let (itself, frontend) = (at(F::POD, 5000), at(F::NODE, ports::DNS_NODE));
    let (verdict, (src, _)) = node.translate(Side::PodIn, &udp(itself, frontend, b""));
    assert_eq!((verdict, src.ip()), (Verdict::SendBack, frontend.ip()));
    // A node without an address of the family has nothing to show.
    let mut node = Node::<F>::new(true);
    node.0.edges.insert(BRIDGE, Edge { flags: edge_flags::POD, ..Edge::default() });
    let (verdict, reason, _) = node.send(Side::PodIn, &udp(pod, at(F::NODE, ports::DNS_NODE), b""));
    assert_eq!((verdict, reason), (Verdict::Drop, Reason::NoRoute));
}

fn the_last_hop_is_answered_to_the_pod<F: MasqueradeFamily>() {
    let node = Node::<F>::new(true);
    let mut query = lb_common::testing::Segment::new(at(F::OTHER_POD, 5000), at(F::VIP, ports::WEB), SYN);
    query.ttl = 1;
    let (verdict, reason, after) = node.send(Side::PodIn, &query.build());
    assert_eq!((verdict, reason), (Verdict::SendBack, Reason::TtlExceeded));
    let Ok(Seen::Icmp { dst, about, .. }) = read(&after) else { panic!("{after:02x?}") };
    assert_eq!((dst, about), (query.src.ip(), (query.src, query.dst)));
}
