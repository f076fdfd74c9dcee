//! What is left to another Service proxy, before it goes and after it has come.

use std::net::SocketAddr;

use lb_common::abi::Side;
use lb_common::pipeline::Verdict;
use lb_common::socket::{self, Peer, Socket};
use lb_common::tables::Admission;
use lb_common::testing::node::{Node, Outcome};
use lb_common::testing::{TestFamily, at, ports, tcp, udp};
use lb_common::wire::tcp_flags::{ACK, SYN};
use lb_common::{Reason, both_families};

both_families! {
    a_proxy_that_was_here_before_keeps_its_connections
    a_proxy_that_comes_after_gets_every_new_connection
}

/// Every kind of client and frontend, with backends here and there.
fn asks<F: TestFamily>(port: u16) -> [(Side, SocketAddr, SocketAddr); 3] {
    [
        (Side::NicIn, at(F::CLIENT, port), at(F::NODE, ports::WEB_NODE)),
        (Side::NicIn, at(F::CLIENT, port), at(F::NODE, ports::FAR_NODE)),
        (Side::PodIn, at(F::OTHER_POD, port), at(F::VIP, ports::FAR)),
    ]
}

fn a_proxy_that_was_here_before_keeps_its_connections<F: TestFamily>() {
    let mut node = Node::<F>::new();
    node.tables.admission = Admission::Opening;
    for (side, client, frontend) in asks::<F>(40000) {
        let send = |flags| node.send(side, tcp(client, frontend, flags));
        send(ACK).untouched(Verdict::Pass, Reason::LeftToOthers);
        let Outcome { verdict, reason, .. } = send(SYN);
        assert!(matches!(reason, Reason::Translated | Reason::Forwarded), "{verdict:?} {reason:?}");
        let Outcome { reason, before, bytes, .. } = send(ACK);
        assert!(matches!(reason, Reason::Translated | Reason::Forwarded), "a connection of ours: {reason:?}");
        assert_ne!(bytes, before);
    }
    let datagram = udp(at(F::CLIENT, 40000), at(F::NODE, ports::DNS_NODE), b"nobody opens UDP");
    assert_eq!(node.send(Side::NicIn, datagram).reason, Reason::Translated);
}

fn a_proxy_that_comes_after_gets_every_new_connection<F: TestFamily>() {
    let mut node = Node::<F>::new();
    let answers: Vec<_> = asks::<F>(40000)
        .into_iter()
        .map(|(side, client, frontend)| node.send(side, tcp(client, frontend, SYN)).read().ends())
        .collect();
    node.tables.admission = Admission::None;
    for ((side, client, frontend), (seen_as, backend)) in asks::<F>(40000).into_iter().zip(answers) {
        let outcome = node.send(side, tcp(client, frontend, ACK));
        let reason = outcome.reason;
        assert!(matches!(reason, Reason::Translated | Reason::Forwarded), "a connection of ours: {reason:?}");
        assert_eq!(outcome.read().ends(), (seen_as, backend));
    }
    let left = |side, bytes| node.send(side, bytes).untouched(Verdict::Pass, Reason::LeftToOthers);
    for (side, client, frontend) in asks::<F>(40001) {
        left(side, tcp(client, frontend, SYN));
    }
    left(Side::NicIn, udp(at(F::CLIENT, 40001), at(F::NODE, ports::DNS_NODE), b""));
    left(Side::PodIn, tcp(at(F::OTHER_POD, 40001), at(F::VIP, 9), SYN));
    left(Side::PodIn, tcp(at(F::OTHER_POD, 40001), at(F::VIP, ports::EMPTY), SYN));
    left(Side::PodIn, tcp(at(F::OTHER_POD, 40001), at(F::UNALLOCATED, 80), SYN));
    let peer = Peer::<F> { addr: F::wire(at(F::VIP, 0).ip()), port: ports::WEB };
    let asked = socket::connect(&node.tables, Socket { cookie: 1, proto: 6, owner: 0 }, peer);
    assert_eq!(asked, Err(Reason::LeftToOthers));
}
