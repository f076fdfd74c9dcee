//! What is left to another Service proxy, before it goes and after it has come.

use std::net::SocketAddr;

use lb_common::abi::Side;
use lb_common::host::{HostPacket, HostRoute, HostTables};
use lb_common::pipeline::{Verdict, process};
use lb_common::socket::{self, Peer, Socket};
use lb_common::tables::Admission;
use lb_common::testing::{TestFamily, at, cluster, ports, read, tcp, udp};
use lb_common::wire::tcp_flags::{ACK, SYN};
use lb_common::{Reason, V4, V6};

const NIC: u32 = 7;

fn send<F: TestFamily>(tables: &HostTables<F>, side: Side, bytes: &[u8]) -> (Verdict, Reason, Vec<u8>) {
    let mut packet = HostPacket::new(bytes, NIC).with_route(HostRoute::Out { ifindex: NIC, mtu: 1500 });
    let (verdict, reason) = process::<F, _, _>(&mut packet, tables, side);
    (verdict, reason, packet.bytes())
}

/// Every kind of client and frontend, with backends here and there.
fn asks<F: TestFamily>(port: u16) -> [(Side, SocketAddr, SocketAddr); 3] {
    [
        (Side::NicIn, at(F::CLIENT, port), at(F::NODE, ports::WEB_NODE)),
        (Side::NicIn, at(F::CLIENT, port), at(F::NODE, ports::FAR_NODE)),
        (Side::PodIn, at(F::OTHER_POD, port), at(F::VIP, ports::FAR)),
    ]
}

fn takeover<F: TestFamily>() {
    let tables = HostTables { admission: Admission::Opening, ..cluster::<F>(NIC) };
    for (side, client, frontend) in asks::<F>(40000) {
        let data = tcp(client, frontend, ACK);
        let left = (Verdict::Pass, Reason::LeftToOthers, data.clone());
        assert_eq!(send(&tables, side, &data), left, "a connection of the proxy before");
        let (verdict, reason, _) = send(&tables, side, &tcp(client, frontend, SYN));
        assert!(matches!(reason, Reason::Translated | Reason::Forwarded), "{verdict:?} {reason:?}");
        let (_, reason, after) = send(&tables, side, &data);
        assert!(matches!(reason, Reason::Translated | Reason::Forwarded), "a connection of ours: {reason:?}");
        assert_ne!(after, data);
    }
    let datagram = udp(at(F::CLIENT, 40000), at(F::NODE, ports::DNS_NODE), b"nobody opens UDP");
    assert_eq!(send(&tables, Side::NicIn, &datagram).1, Reason::Translated);
}

#[test]
fn a_proxy_that_was_here_before_keeps_its_connections() {
    takeover::<V4>();
    takeover::<V6>();
}

fn drain<F: TestFamily>() {
    let mut tables = cluster::<F>(NIC);
    let answers: Vec<_> = asks::<F>(40000)
        .into_iter()
        .map(|(side, client, frontend)| {
            let (_, _, first) = send(&tables, side, &tcp(client, frontend, SYN));
            read(&first).unwrap_or_else(|e| panic!("{e}")).ends()
        })
        .collect();
    tables.admission = Admission::None;
    for ((side, client, frontend), (seen_as, backend)) in asks::<F>(40000).into_iter().zip(answers) {
        let (_, reason, after) = send(&tables, side, &tcp(client, frontend, ACK));
        assert!(matches!(reason, Reason::Translated | Reason::Forwarded), "a connection of ours: {reason:?}");
        assert_eq!(read(&after).unwrap_or_else(|e| panic!("{e}")).ends(), (seen_as, backend));
    }
    let left = |side, bytes: &[u8]| {
        let (verdict, reason, after) = send(&tables, side, bytes);
        assert_eq!((verdict, reason), (Verdict::Pass, Reason::LeftToOthers));
        assert_eq!(after, bytes);
    };
    for (side, client, frontend) in asks::<F>(40001) {
        left(side, &tcp(client, frontend, SYN));
    }
    left(Side::NicIn, &udp(at(F::CLIENT, 40001), at(F::NODE, ports::DNS_NODE), b""));
    left(Side::PodIn, &tcp(at(F::OTHER_POD, 40001), at(F::VIP, 9), SYN));
    left(Side::PodIn, &tcp(at(F::OTHER_POD, 40001), at(F::VIP, ports::EMPTY), SYN));
    left(Side::PodIn, &tcp(at(F::OTHER_POD, 40001), at(F::UNALLOCATED, 80), SYN));
    let peer = Peer::<F> { addr: F::wire(at(F::VIP, 0).ip()), port: ports::WEB };
    let asked = socket::connect(&tables, Socket { cookie: 1, proto: 6, owner: 0 }, peer);
    assert_eq!(asked, Err(Reason::LeftToOthers));
}

#[test]
fn a_proxy_that_comes_after_gets_every_new_connection() {
    drain::<V4>();
    drain::<V6>();
}
