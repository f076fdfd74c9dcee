//! SCTP on the host: associations are followed as TCP connections are.

use std::net::SocketAddr;

use lb_common::abi::{Side, backend_state};
use lb_common::flow::State;
use lb_common::pipeline::Verdict;
use lb_common::tables::FlowTable;
use lb_common::testing::node::{DATA, Node, client};
use lb_common::testing::{TestFamily, at, ports, sctp, udp};
use lb_common::wire::sctp_chunk::{ABORT, INIT, INIT_ACK, SHUTDOWN_COMPLETE};
use lb_common::{Reason, both_families};

both_families! {
    sctp_associations_go_the_same_ways
    one_port_number_leads_elsewhere_for_each_protocol
    an_init_on_an_old_tuple_is_a_new_association
    an_association_ends_with_an_abort_or_a_completed_shutdown
    sctp_stays_with_a_backend_that_is_gone
    aborts_without_an_association_pass
    an_sctp_checksum_that_is_still_to_come_stays_zero
}

fn sctp_associations_go_the_same_ways<F: TestFamily>() {
    let node = Node::<F>::new();
    let init = |from, to| sctp(from, to, INIT, &[1; 16]);
    let (client, pod) = (client::<F>(40000), at(F::OTHER_POD, 40000));
    // NodePort and ClusterIP to a pod of this node: from outside, from a pod.
    let backend = at(F::POD, ports::TARGET_SCTP);
    for (asker, frontend, into, back) in [
        (client, at(F::NODE, ports::SIGNAL_NODE), Side::NicIn, Side::NicOut),
        (pod, at(F::VIP, ports::SIGNAL), Side::PodIn, Side::PodOut),
    ] {
        let sent = node.send(into, init(asker, frontend));
        assert_eq!(sent.seen(Verdict::Pass, Reason::Translated).ends(), (asker, backend));
        let reply = node.send(back, sctp(backend, asker, INIT_ACK, &[2; 316]));
        assert_eq!(reply.seen(Verdict::Pass, Reason::Translated).ends(), (frontend, asker));
        let data = node.send(into, sctp(asker, frontend, DATA, &[3; 1301]));
        assert_eq!(data.seen(Verdict::Pass, Reason::Translated).ends(), (asker, backend));
    }
    // To a pod of another node: with this node's address and a port of ours, and back.
    let frontend = at(F::NODE, ports::FAR_SIGNAL_NODE);
    let (src, dst) =
        node.send(Side::NicIn, init(client, frontend)).seen(Verdict::Forward, Reason::Forwarded).ends();
    assert_eq!((src.ip(), dst), (at(F::NODE, 0).ip(), at(F::FAR_POD, ports::TARGET_SCTP)));
    assert_ne!(src.port(), client.port());
    let reply = node.send(Side::NicIn, sctp(dst, src, INIT_ACK, &[2; 316]));
    assert_eq!(reply.seen(Verdict::Forward, Reason::Forwarded).ends(), (frontend, client));
    // From a pod to itself.
    let (itself, frontend) = (at(F::POD, 40000), at(F::VIP, ports::SIGNAL));
    let (src, dst) =
        node.send(Side::PodIn, init(itself, frontend)).seen(Verdict::SendBack, Reason::Hairpinned).ends();
    assert_eq!((src.ip(), dst), (frontend.ip(), backend));
}

fn one_port_number_leads_elsewhere_for_each_protocol<F: TestFamily>() {
    // Contract, rules 11 and 113.
    let node = Node::<F>::new();
    let client = client::<F>(40000);
    for frontend in [at(F::VIP, ports::DNS), at(F::NODE, ports::DNS_NODE)] {
        let target = |bytes| node.send(Side::NicIn, bytes).seen(Verdict::Pass, Reason::Translated).ends().1;
        assert_eq!(target(udp(client, frontend, b"")), at(F::POD, ports::TARGET_UDP));
        assert_eq!(target(sctp(client, frontend, INIT, &[1; 16])), at(F::POD, ports::TARGET_SCTP));
    }
}

/// An association of a client outside with the pod of this node.
fn associate<F: TestFamily>(node: &Node<F>) -> (SocketAddr, SocketAddr, SocketAddr) {
    let (client, frontend, backend) =
        (client::<F>(40000), at(F::NODE, ports::SIGNAL_NODE), at(F::POD, ports::TARGET_SCTP));
    node.send(Side::NicIn, sctp(client, frontend, INIT, &[1; 16]));
    node.send(Side::NicOut, sctp(backend, client, INIT_ACK, &[2; 16]));
    node.send(Side::NicIn, sctp(client, frontend, DATA, &[3; 16]));
    assert_eq!((node.count(FlowTable::Established), node.count(FlowTable::Pending)), (2, 0));
    (client, frontend, backend)
}

fn an_init_on_an_old_tuple_is_a_new_association<F: TestFamily>() {
    let mut node = Node::<F>::new();
    let (client, frontend, _) = associate(&node);
    node.tables.slots.insert(5, 6);
    let data = node.send(Side::NicIn, sctp(client, frontend, DATA, &[3; 16]));
    data.seen(Verdict::Pass, Reason::Translated);
    let init = node.send(Side::NicIn, sctp(client, frontend, INIT, &[1; 16]));
    let (_, dst) = init.seen(Verdict::Forward, Reason::Forwarded).ends();
    assert_eq!(dst, at(F::FAR_POD, ports::TARGET_SCTP));
}

fn an_association_ends_with_an_abort_or_a_completed_shutdown<F: TestFamily>() {
    // Another frontend's client of the same port may have the tuple once it is over, and keeps its port.
    for (last, over) in [(ABORT, true), (SHUTDOWN_COMPLETE, true), (DATA, false)] {
        let node = Node::<F>::new();
        let (client, frontend, _) = associate(&node);
        let packet = node.send(Side::NicIn, sctp(client, frontend, last, &[]));
        packet.seen(Verdict::Pass, Reason::Translated);
        let init = node.send(Side::NicIn, sctp(client, at(F::VIP, ports::SIGNAL), INIT, &[1; 16]));
        let (src, _) = init.seen(Verdict::Pass, Reason::Translated).ends();
        assert_eq!(src.port() == client.port(), over, "chunk {last}");
    }
    // Or once its ends are silent.
    let timeout = State::Associated.default_timeout();
    for (wait, over) in [(timeout, false), (timeout + 1, true)] {
        let node = Node::<F>::new();
        let (client, ..) = associate(&node);
        node.wait(wait);
        let init = node.send(Side::NicIn, sctp(client, at(F::VIP, ports::SIGNAL), INIT, &[1; 16]));
        let (src, _) = init.seen(Verdict::Pass, Reason::Translated).ends();
        assert_eq!(src.port() == client.port(), over, "after {wait} ns");
    }
}

fn sctp_stays_with_a_backend_that_is_gone<F: TestFamily>() {
    for state in [backend_state::TERMINATING, backend_state::UNUSED] {
        let mut node = Node::<F>::new();
        let (client, frontend, backend) = associate(&node);
        node.tables.slots.insert(5, 6);
        node.tables.backends.get_mut(&5).expect("backend 5").state = state;
        let data = node.send(Side::NicIn, sctp(client, frontend, DATA, &[3; 16]));
        assert_eq!(data.seen(Verdict::Pass, Reason::Translated).ends(), (client, backend));
        let init = node.send(Side::NicIn, sctp(client, frontend, INIT, &[1; 16]));
        init.seen(Verdict::Forward, Reason::Forwarded);
    }
}

fn aborts_without_an_association_pass<F: TestFamily>() {
    let node = Node::<F>::new();
    for kind in [ABORT, SHUTDOWN_COMPLETE] {
        let packet = sctp(client::<F>(40000), at(F::NODE, ports::SIGNAL_NODE), kind, &[]);
        node.send(Side::NicIn, packet).untouched(Verdict::Pass, Reason::StrayReset);
    }
    assert_eq!(node.count(FlowTable::Pending), 0);
}

fn an_sctp_checksum_that_is_still_to_come_stays_zero<F: TestFamily>() {
    let node = Node::<F>::new();
    let (pod, frontend, backend) =
        (at(F::OTHER_POD, 40000), at(F::VIP, ports::SIGNAL), at(F::POD, ports::TARGET_SCTP));
    let check = 14 + F::HEADER_LEN + 8..14 + F::HEADER_LEN + 12;
    let mut sent = sctp(pod, frontend, INIT, &[1; 16]);
    sent[check.clone()].fill(0);
    let outcome = node.send(Side::PodIn, sent);
    assert_eq!(outcome.verdict, Verdict::Pass);
    assert_eq!(outcome.bytes[check.clone()], [0; 4]);
    // With the field that the device will fill in, the packet is the one that the backend expects.
    let mut want = sctp(pod, backend, INIT, &[1; 16]);
    want[check].fill(0);
    assert_eq!(outcome.bytes[14 + F::HEADER_LEN..], want[14 + F::HEADER_LEN..]);
}
