//! What `fairlead drops --follow` is told: of each packet that is lost, as it came, and of no other.

use lb_common::abi::{RefusalKey, Sample, Side};
use lb_common::testing::node::{Node, client};
use lb_common::testing::{TestFamily, at, ports, tcp, udp};
use lb_common::wire::IpProto;
use lb_common::wire::tcp_flags::{ACK, SYN};
use lb_common::{Reason, both_families};

both_families! {
    what_is_lost_is_told_as_it_came
    nobody_is_told_who_does_not_ask
    what_a_service_refuses_is_counted_by_reason
}

fn told<F: TestFamily>(node: &Node<F>) -> Vec<Sample> {
    node.tables.samples.replace(Some(vec![])).unwrap_or_default()
}

fn what_is_lost_is_told_as_it_came<F: TestFamily>() {
    let node = Node::<F>::new();
    node.tables.samples.replace(Some(vec![]));
    let from = client::<F>(40000);
    let mapped = |at: std::net::SocketAddr| F::to_mapped(&F::wire(at.ip()));
    let lost = [
        (
            tcp(from, at(F::NODE, ports::EMPTY_NODE), SYN),
            ports::EMPTY_NODE,
            IpProto::Tcp,
            Reason::NoEndpoints,
        ),
        (
            udp(from, at(F::NODE, ports::EMPTY_NODE), b"?"),
            ports::EMPTY_NODE,
            IpProto::Udp,
            Reason::NoEndpoints,
        ),
        (
            tcp(from, at(F::NODE, ports::LOCAL_NODE), SYN),
            ports::LOCAL_NODE,
            IpProto::Tcp,
            Reason::NoLocalEndpoints,
        ),
    ];
    for (packet, port, proto, reason) in lost {
        let bytes = u32::try_from(packet.len()).expect("a short one") - 14;
        assert_eq!(node.send(Side::NicIn, packet).reason, reason);
        let want = Sample {
            time: node.tables.now.get(),
            ifindex: lb_common::testing::node::NIC,
            bytes,
            src: mapped(from),
            dst: mapped(at(F::NODE, 0)),
            src_port: 40000,
            dst_port: port,
            proto: proto as u8,
            tcp_flags: if proto as u8 == IpProto::Tcp as u8 { SYN } else { 0 },
            hook: lb_common::Hook::NicIn as u8,
            reason: reason as u8,
        };
        assert_eq!(told(&node), [want]);
    }
    for carried in [tcp(from, at(F::NODE, ports::WEB_NODE), SYN), tcp(from, at(F::NODE, 1), ACK)] {
        node.send(Side::NicIn, carried);
        assert_eq!(told(&node), []);
    }
}

fn nobody_is_told_who_does_not_ask<F: TestFamily>() {
    let node = Node::<F>::new();
    node.send(Side::NicIn, tcp(client::<F>(40000), at(F::NODE, ports::EMPTY_NODE), SYN));
    assert_eq!(*node.tables.samples.borrow(), None);
}

fn what_a_service_refuses_is_counted_by_reason<F: TestFamily>() {
    let node = Node::<F>::new();
    for port in 40000..40003 {
        node.send(Side::NicIn, tcp(client::<F>(port), at(F::NODE, ports::EMPTY_NODE), SYN));
    }
    node.send(Side::NicIn, tcp(client::<F>(40000), at(F::NODE, ports::LOCAL_NODE), SYN));
    let refusals = node.tables.refusals.borrow();
    let counts: Vec<_> =
        refusals.iter().map(|(RefusalKey { reason, .. }, count)| (*reason, *count)).collect();
    let wanted = [(Reason::NoEndpoints as u32, 3), (Reason::NoLocalEndpoints as u32, 1)];
    assert!(wanted.iter().all(|want| counts.contains(want)) && counts.len() == 2, "{counts:?}");
    let all: u64 = node.tables.usage.borrow().values().map(|usage| usage.refused).sum();
    assert_eq!(all, 4);
}
