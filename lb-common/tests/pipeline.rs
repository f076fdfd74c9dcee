//! The pipeline on the host, packet by packet, in both families: what goes in, what comes out, what is kept.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use lb_common::abi::{
    EdgeSourceKey, Flow, Hop, MemberKey, Network, PrefixKey, RESERVED_PORTS_COUNT, ServiceKey, Side, Source,
    Usage, address_flags, backend_state, edge_flags, network_flags, service_flags,
};
use lb_common::flow::{self, State};
use lb_common::host::{HostPacket, HostRoute};
use lb_common::packet::NETWORK;
use lb_common::pipeline::{Verdict, process};
use lb_common::tables::FlowTable;
use lb_common::testing::node::{DATA, MTU, NIC, Node, Outcome, client};
use lb_common::testing::{
    RECEIVER, SENDER, Seen, Segment, TTL, TestFamily, at, icmp_error, ports, read, sctp, tcp, udp,
};
use lb_common::wire::sctp_chunk::{INIT, INIT_ACK};
use lb_common::wire::tcp_flags::{ACK, FIN, RST, SYN};
use lb_common::{Family, Reason, V4, both_families};

both_families! {
    outside_to_a_backend_here_keeps_the_client
    outside_to_a_backend_there_is_forwarded_and_comes_back
    cluster_ip_from_outside_is_served_like_a_node_port
    a_pod_reaches_any_backend_with_its_own_address
    a_pod_reaches_itself_through_its_service
    udp_flows_go_the_same_ways
    frontends_without_endpoints_reset_tcp
    frontends_without_endpoints_send_port_unreachable
    policy_local_without_local_endpoints_drops
    ports_of_a_service_address_that_nobody_owns_are_rejected
    what_is_not_ours_is_left_alone
    one_client_port_through_two_frontends_gives_two_flows
    a_direct_connection_beside_one_through_a_frontend_keeps_its_own_bytes
    direct_connections_leave_no_trace_in_their_packets
    only_the_first_packet_to_a_backend_begins_a_direct_flow
    a_direct_flow_outlives_its_backend
    tc_leaves_direct_connections_to_xdp
    errors_about_direct_connections_find_their_port
    forwarded_flows_of_many_clients_never_share_a_port
    further_sources_make_room_for_more_connections_than_a_node_has_ports
    a_port_is_used_again_when_its_flow_is_over
    ports_can_run_out_and_that_is_said
    pending_flows_are_promoted_when_the_client_has_heard_the_answer
    a_lost_half_is_restored_by_the_half_that_is_left
    a_tuple_that_another_flow_took_is_given_up
    a_lost_half_of_a_pending_flow_is_restored
    a_connection_that_lost_its_flow_goes_to_its_backend_or_nowhere
    a_syn_on_an_old_tuple_is_a_new_connection
    a_retransmitted_syn_keeps_its_backend
    udp_leaves_a_dead_backend_with_its_next_packet
    tcp_stays_with_a_backend_that_is_gone
    tcp_to_a_removed_backend_is_reset_where_that_is_wanted
    resets_are_believed_from_who_knows_the_connection
    a_reset_is_taken_back_by_what_comes_after_it
    a_refused_connection_is_never_established
    flows_end_with_their_time
    a_tuple_that_has_just_closed_rests
    halves_of_a_pending_flow_stay_together
    a_backend_may_open_connections_from_its_service_port
    forwarding_respects_the_mtu
    a_way_through_no_edge_leads_to_a_local_pod
    no_route_drops
    resets_without_a_flow_pass
    a_reset_is_never_answered
    source_ranges_admit_and_drop
    affinity_keeps_a_client_on_its_backend
    affinity_ends_with_its_time_or_its_backend
    affinity_is_shared_by_the_frontends_of_a_port
    unallocated_addresses_of_a_service_cidr_are_dropped
    addresses_without_a_bit_in_the_filter_are_nobodys
    pods_of_other_nodes_are_inside_of_the_cluster
    usage_is_counted_for_each_service
}

fn outside_to_a_backend_here_keeps_the_client<F: TestFamily>() {
    let node = Node::<F>::new();
    let (client, frontend, backend) =
        (client::<F>(40000), at(F::NODE, ports::WEB_NODE), at(F::POD, ports::TARGET));

    let syn = node.send(Side::NicIn, tcp(client, frontend, SYN));
    assert_eq!(syn.seen(Verdict::Pass, Reason::Translated).ends(), (client, backend));
    let reply = node.send(Side::NicOut, tcp(backend, client, SYN | ACK));
    let seen = reply.seen(Verdict::Pass, Reason::Translated);
    assert_eq!(seen.ends(), (frontend, client));
    // The node's stack forwards: the TTL is its business.
    assert_eq!(seen.ttl(), Some(TTL));

    let mut segment = Segment::new(client, frontend, ACK);
    segment.payload = b"odd".to_vec();
    let seen = node.send(Side::NicIn, segment.build()).seen(Verdict::Pass, Reason::Translated);
    let Seen::Tcp { dst, payload, .. } = seen else { panic!("{seen:?}") };
    assert_eq!((dst, payload.as_slice()), (backend, &b"odd"[..]));
}

fn outside_to_a_backend_there_is_forwarded_and_comes_back<F: TestFamily>() {
    let node = Node::<F>::new();
    let (client, frontend, backend) =
        (client::<F>(40000), at(F::NODE, ports::FAR_NODE), at(F::FAR_POD, ports::TARGET));

    let out = node.send(Side::NicIn, tcp(client, frontend, SYN)).seen(Verdict::Forward, Reason::Forwarded);
    let (src, dst) = out.ends();
    assert_eq!((src.ip(), dst, out.ttl()), (at(F::NODE, 0).ip(), backend, Some(TTL - 1)));
    assert!((12288..28672).contains(&src.port()), "{src} is not of the reserved range");

    let back = node.send(Side::NicIn, tcp(backend, src, SYN | ACK)).seen(Verdict::Forward, Reason::Forwarded);
    assert_eq!((back.ends(), back.ttl()), ((frontend, client), Some(TTL - 1)));
    // The same way for the rest of the connection.
    let out = node.send(Side::NicIn, tcp(client, frontend, ACK)).seen(Verdict::Forward, Reason::Forwarded);
    assert_eq!(out.ends(), (src, backend));
}

fn cluster_ip_from_outside_is_served_like_a_node_port<F: TestFamily>() {
    let node = Node::<F>::new();
    let (client, backend) = (client::<F>(40000), at(F::POD, ports::TARGET));
    let here = node.send(Side::NicIn, tcp(client, at(F::VIP, ports::WEB), SYN));
    assert_eq!(here.seen(Verdict::Pass, Reason::Translated).ends(), (client, backend));
    let there = node.send(Side::NicIn, tcp(client, at(F::VIP, ports::FAR), SYN));
    let (src, _) = there.seen(Verdict::Forward, Reason::Forwarded).ends();
    assert_eq!(src.ip(), at(F::NODE, 0).ip());
}

fn a_pod_reaches_any_backend_with_its_own_address<F: TestFamily>() {
    for (frontend, backend) in [
        (at(F::VIP, ports::WEB), at(F::POD, ports::TARGET)),
        (at(F::NODE, ports::WEB_NODE), at(F::POD, ports::TARGET)),
        (at(F::VIP, ports::FAR), at(F::FAR_POD, ports::TARGET)),
        (at(F::NODE, ports::FAR_NODE), at(F::FAR_POD, ports::TARGET)),
        // Contract, rule 33: policy Local never restricts pods.
        (at(F::NODE, ports::LOCAL_NODE), at(F::FAR_POD, ports::TARGET)),
    ] {
        let node = Node::<F>::new();
        let pod = at(F::OTHER_POD, 40000);
        let syn = node.send(Side::PodIn, tcp(pod, frontend, SYN));
        assert_eq!(syn.seen(Verdict::Pass, Reason::Translated).ends(), (pod, backend));
        let reply = node.send(Side::PodOut, tcp(backend, pod, SYN | ACK));
        assert_eq!(reply.seen(Verdict::Pass, Reason::Translated).ends(), (frontend, pod));
        // The entry acts at this edge alone: the same reply on its way through a NIC stays as it is.
        node.send(Side::NicIn, tcp(backend, pod, ACK)).untouched(Verdict::Pass, Reason::NotOurs);
    }
}

fn a_pod_reaches_itself_through_its_service<F: TestFamily>() {
    for frontend in [at(F::VIP, ports::WEB), at(F::NODE, ports::WEB_NODE)] {
        let node = Node::<F>::new();
        let (pod, backend) = (at(F::POD, 40000), at(F::POD, ports::TARGET));
        let syn = node.send(Side::PodIn, tcp(pod, frontend, SYN));
        let (src, dst) = syn.seen(Verdict::SendBack, Reason::Hairpinned).ends();
        assert_eq!((src, dst), (SocketAddr::new(frontend.ip(), 40000), backend));
        assert_eq!((&syn.bytes[..6], &syn.bytes[6..12]), (&SENDER[..], &RECEIVER[..]));

        let reply = node.send(Side::PodIn, tcp(backend, src, SYN | ACK));
        assert_eq!(reply.seen(Verdict::SendBack, Reason::Hairpinned).ends(), (frontend, pod));
        let ack = node.send(Side::PodIn, tcp(pod, frontend, ACK));
        assert_eq!(ack.seen(Verdict::SendBack, Reason::Hairpinned).ends(), (src, backend));
    }
}

fn udp_flows_go_the_same_ways<F: TestFamily>() {
    let node = Node::<F>::new();
    let (client, frontend, backend) =
        (client::<F>(5000), at(F::NODE, ports::DNS_NODE), at(F::POD, ports::TARGET_UDP));
    let query = node.send(Side::NicIn, udp(client, frontend, b"query"));
    assert_eq!(query.seen(Verdict::Pass, Reason::Translated).ends(), (client, backend));
    let answer = node.send(Side::NicOut, udp(backend, client, b"answer"));
    assert_eq!(answer.seen(Verdict::Pass, Reason::Translated).ends(), (frontend, client));

    let frontend = at(F::NODE, ports::FAR_DNS_NODE);
    let query = node.send(Side::NicIn, udp(client, frontend, b"query"));
    let (src, dst) = query.seen(Verdict::Forward, Reason::Forwarded).ends();
    assert_eq!(dst, at(F::FAR_POD, ports::TARGET_UDP));
    let answer = node.send(Side::NicIn, udp(dst, src, b"answer"));
    assert_eq!(answer.seen(Verdict::Forward, Reason::Forwarded).ends(), (frontend, client));
}

fn frontends_without_endpoints_reset_tcp<F: TestFamily>() {
    let node = Node::<F>::new();
    for (side, asker) in [(Side::NicIn, client::<F>(40000)), (Side::PodIn, at(F::OTHER_POD, 40000))] {
        for frontend in [at(F::VIP, ports::EMPTY), at(F::NODE, ports::EMPTY_NODE)] {
            let mut syn = Segment::new(asker, frontend, SYN);
            syn.payload = vec![0; 11];
            let answer = node.send(side, syn.build());
            let seen = answer.seen(Verdict::SendBack, Reason::NoEndpoints);
            let Seen::Tcp { src, dst, flags, seq, ack, payload, .. } = seen else { panic!("{seen:?}") };
            assert_eq!((src, dst, flags), (frontend, asker, RST | ACK));
            // RFC 9293, section 3.10.7.1: without ACK, the answer acknowledges all that the segment took.
            assert_eq!((seq, ack, payload.len()), (0, 1000 + 1 + 11, 0));
            assert_eq!((&answer.bytes[..6], &answer.bytes[6..12]), (&SENDER[..], &RECEIVER[..]));

            let answer = node.send(side, tcp(asker, frontend, ACK));
            let seen = answer.seen(Verdict::SendBack, Reason::NoEndpoints);
            let Seen::Tcp { flags, seq, .. } = seen else { panic!("{seen:?}") };
            assert_eq!((flags, seq), (RST, 2000));
        }
    }
    assert_eq!(node.count(FlowTable::Pending), 0, "nothing was begun");
}

fn frontends_without_endpoints_send_port_unreachable<F: TestFamily>() {
    let node = Node::<F>::new();
    for (side, asker) in [(Side::NicIn, client::<F>(5000)), (Side::PodIn, at(F::OTHER_POD, 5000))] {
        for frontend in [at(F::VIP, ports::EMPTY), at(F::NODE, ports::EMPTY_NODE)] {
            for packet in [
                udp(asker, frontend, &[]),
                udp(asker, frontend, &[7; 1200]),
                sctp(asker, frontend, INIT, &[7; 16]),
                sctp(asker, frontend, DATA, &[7; 1200]),
            ] {
                let answer = node.send(side, packet);
                let seen = answer.seen(Verdict::SendBack, Reason::NoEndpoints);
                let Seen::Icmp { src, dst, kind, code, about } = seen else { panic!("{seen:?}") };
                assert_eq!((src, dst, (kind, code)), (frontend.ip(), asker.ip(), F::PORT_UNREACHABLE));
                assert_eq!(about, (asker, frontend));
            }
        }
    }
}

fn policy_local_without_local_endpoints_drops<F: TestFamily>() {
    let node = Node::<F>::new();
    let syn = node.send(Side::NicIn, tcp(client::<F>(40000), at(F::NODE, ports::LOCAL_NODE), SYN));
    syn.untouched(Verdict::Drop, Reason::NoLocalEndpoints);
}

fn ports_of_a_service_address_that_nobody_owns_are_rejected<F: TestFamily>() {
    let node = Node::<F>::new();
    let pod = at(F::OTHER_POD, 40000);
    // `clusterIP:targetPort` and `clusterIP:nodePort` are what people try.
    for port in [ports::TARGET, ports::WEB_NODE] {
        node.send(Side::PodIn, tcp(pod, at(F::VIP, port), SYN)).seen(Verdict::SendBack, Reason::UnknownPort);
    }
    // Contract, rule 12: a port that exists for TCP alone is none for UDP or SCTP.
    let web = at(F::VIP, ports::WEB);
    node.send(Side::PodIn, udp(pod, web, b"")).seen(Verdict::SendBack, Reason::UnknownPort);
    node.send(Side::PodIn, sctp(pod, web, INIT, &[0; 16])).seen(Verdict::SendBack, Reason::UnknownPort);
}

fn what_is_not_ours_is_left_alone<F: TestFamily>() {
    let node = Node::<F>::new();
    let (pod, outside) = (at(F::POD, 8080), client::<F>(40000));
    // To a pod that is no backend, from a pod directly, and to the node's own services.
    node.send(Side::NicIn, tcp(outside, at(F::OTHER_POD, 8080), SYN))
        .untouched(Verdict::Pass, Reason::NotOurs);
    node.send(Side::PodIn, tcp(pod, outside, SYN | ACK)).untouched(Verdict::Pass, Reason::NotOurs);
    node.send(Side::NicOut, tcp(pod, outside, SYN | ACK)).untouched(Verdict::Pass, Reason::NotOurs);
    node.send(Side::NicIn, tcp(outside, at(F::NODE, 22), SYN)).untouched(Verdict::Pass, Reason::NotOurs);
    assert_eq!(node.count(FlowTable::Pending), 0);
}

fn one_client_port_through_two_frontends_gives_two_flows<F: TestFamily>() {
    // Rule 1. All four lead to the same backend, at the same time, from the same client port.
    let node = Node::<F>::new();
    let (client, backend) = (client::<F>(40000), at(F::POD, ports::TARGET));
    let frontends = [at(F::NODE, ports::WEB_NODE), at(F::VIP, ports::WEB)];
    let sources: Vec<SocketAddr> = frontends
        .iter()
        .map(|frontend| {
            let syn = node.send(Side::NicIn, tcp(client, *frontend, SYN));
            let (src, dst) = syn.seen(Verdict::Pass, Reason::Translated).ends();
            assert_eq!((src.ip(), dst), (client.ip(), backend));
            src
        })
        .collect();
    assert_ne!(sources[0], sources[1]);
    for (frontend, source) in frontends.iter().zip(&sources) {
        let reply = node.send(Side::NicOut, tcp(backend, *source, SYN | ACK));
        assert_eq!(reply.seen(Verdict::Pass, Reason::Translated).ends(), (*frontend, client));
        let ack = node.send(Side::NicIn, tcp(client, *frontend, ACK));
        assert_eq!(ack.seen(Verdict::Pass, Reason::Translated).ends(), (*source, backend));
    }
}

/// What opens a conversation of a protocol, answers it and goes on with it.
struct Talk {
    frontend: u16,
    target: u16,
    open: fn(SocketAddr, SocketAddr) -> Vec<u8>,
    answer: fn(SocketAddr, SocketAddr) -> Vec<u8>,
    go_on: fn(SocketAddr, SocketAddr) -> Vec<u8>,
}

const TALKS: [Talk; 3] = [
    Talk {
        frontend: ports::WEB,
        target: ports::TARGET,
        open: |from, to| tcp(from, to, SYN),
        answer: |from, to| tcp(from, to, SYN | ACK),
        go_on: |from, to| tcp(from, to, ACK),
    },
    Talk {
        frontend: ports::DNS,
        target: ports::TARGET_UDP,
        open: |from, to| udp(from, to, b"query"),
        answer: |from, to| udp(from, to, b"answer"),
        go_on: |from, to| udp(from, to, b"another"),
    },
    Talk {
        frontend: ports::SIGNAL,
        target: ports::TARGET_SCTP,
        open: |from, to| sctp(from, to, INIT, &[1; 16]),
        answer: |from, to| sctp(from, to, INIT_ACK, &[2; 16]),
        go_on: |from, to| sctp(from, to, DATA, &[3; 16]),
    },
];

/// Where clients are: whose they are, and where their packets and the answers are seen.
fn places<F: TestFamily>() -> [(SocketAddr, Side, Side); 2] {
    [(client::<F>(40000), Side::NicIn, Side::NicOut), (at(F::OTHER_POD, 40000), Side::PodIn, Side::PodOut)]
}

fn a_direct_connection_beside_one_through_a_frontend_keeps_its_own_bytes<F: TestFamily>() {
    // Rule 1: the same client port, through a frontend and to its backend itself, whichever is first.
    for (client, into, back) in places::<F>() {
        for talk in &TALKS {
            let (frontend, backend) = (at(F::VIP, talk.frontend), at(F::POD, talk.target));
            for asked in [[frontend, backend], [backend, frontend]] {
                let node = Node::<F>::new();
                let sources = asked.map(|peer| {
                    let opened = node.send(into, (talk.open)(client, peer));
                    assert_eq!(opened.verdict, Verdict::Pass);
                    let (src, dst) = opened.read().ends();
                    assert_eq!((src.ip(), dst), (client.ip(), backend));
                    src
                });
                assert_eq!(sources[0], client, "the first keeps its port");
                assert_ne!(sources[0], sources[1]);
                for _ in 0..2 {
                    for (peer, source) in asked.iter().zip(sources) {
                        let answer = node.send(back, (talk.answer)(backend, source));
                        assert_eq!(answer.read().ends(), (*peer, client));
                        let more = node.send(into, (talk.go_on)(client, *peer));
                        assert_eq!(more.read().ends(), (source, backend));
                    }
                }
                assert_eq!((node.count(FlowTable::Established), node.count(FlowTable::Pending)), (4, 0));
            }
        }
    }
}

fn direct_connections_leave_no_trace_in_their_packets<F: TestFamily>() {
    for (client, into, back) in places::<F>() {
        for talk in &TALKS {
            for pod in [F::POD, F::FAR_POD] {
                let node = Node::<F>::new();
                let backend = at(pod, talk.target);
                for (side, packet) in [
                    (into, (talk.open)(client, backend)),
                    (into, (talk.open)(client, backend)),
                    (back, (talk.answer)(backend, client)),
                    (into, (talk.go_on)(client, backend)),
                ] {
                    node.send(side, packet).untouched(Verdict::Pass, Reason::Direct);
                }
                assert_eq!((node.count(FlowTable::Established), node.count(FlowTable::Pending)), (2, 0));
                assert!(node.tables.usage.borrow().is_empty(), "it is of no Service");
            }
        }
    }
}

fn only_the_first_packet_to_a_backend_begins_a_direct_flow<F: TestFamily>() {
    let mut node = Node::<F>::new();
    let (client, backend) = (client::<F>(40000), at(F::POD, ports::TARGET));
    for flags in [ACK, SYN | ACK, FIN | ACK, RST, 0] {
        node.send(Side::NicIn, tcp(client, backend, flags)).untouched(Verdict::Pass, Reason::NotOurs);
    }
    // What passes on its way out is no client's.
    node.send(Side::NicOut, tcp(client, backend, SYN)).untouched(Verdict::Pass, Reason::NotOurs);
    // A protocol that no backend of the address has.
    let info = node.tables.addresses.get_mut(&F::wire(backend.ip())).expect("its address");
    info.flags = address_flags::BACKEND_TCP;
    node.send(Side::PodIn, udp(client, backend, b"")).untouched(Verdict::Pass, Reason::NotOurs);
    assert_eq!(node.count(FlowTable::Pending), 0);
    // A process of the node that is a backend; frontends at the address come first.
    let host = at(F::NODE, 6443);
    node.tables.addresses.get_mut(&F::wire(host.ip())).expect("its address").flags |=
        address_flags::BACKEND_TCP;
    node.send(Side::NicIn, tcp(client, host, SYN)).untouched(Verdict::Pass, Reason::Direct);
    let node_port = at(F::NODE, ports::WEB_NODE);
    node.send(Side::NicIn, tcp(client, node_port, SYN)).seen(Verdict::Pass, Reason::Translated);
}

fn a_direct_flow_outlives_its_backend<F: TestFamily>() {
    // Whoever names a backend itself is not moved to another.
    for talk in &TALKS {
        let mut node = Node::<F>::new();
        let (client, backend) = (client::<F>(40000), at(F::POD, talk.target));
        node.send(Side::NicIn, (talk.open)(client, backend));
        node.send(Side::NicOut, (talk.answer)(backend, client));
        node.send(Side::NicIn, (talk.go_on)(client, backend));
        for id in [1, 3, 5] {
            node.tables.backends.get_mut(&id).expect("its backend").state = backend_state::UNUSED;
        }
        node.tables.addresses.remove(&F::wire(backend.ip()));
        node.send(Side::NicIn, (talk.go_on)(client, backend)).untouched(Verdict::Pass, Reason::Direct);
    }
}

fn tc_leaves_direct_connections_to_xdp<F: TestFamily>() {
    // What XDP has translated comes to tc as if the client had named the backend.
    let mut node = Node::<F>::new();
    node.tables.edges.get_mut(&NIC).expect("its edge").flags |= edge_flags::XDP_FIRST;
    let xdp = |bytes: Vec<u8>| {
        let mut packet = HostPacket::new(&bytes, NIC).with_hook_behind();
        let (verdict, reason) = process::<F, _, _>(&mut packet, &node.tables, Side::NicIn);
        (verdict, reason, packet.bytes())
    };
    let (client, backend) = (client::<F>(40000), at(F::POD, ports::TARGET));
    let (_, reason, through) = xdp(tcp(client, at(F::VIP, ports::WEB), SYN));
    assert_eq!(reason, Reason::Translated);
    node.send(Side::NicIn, through).untouched(Verdict::Pass, Reason::NotOurs);
    let (_, reason, direct) = xdp(tcp(client, backend, SYN));
    assert_eq!(reason, Reason::Translated, "with another port");
    node.send(Side::NicIn, direct.clone()).untouched(Verdict::Pass, Reason::NotOurs);
    assert_eq!(node.count(FlowTable::Pending), 4);
    // Answers are met by tc alone.
    let Ok((direct, _)) = read(&direct).map(|seen| seen.ends()) else { panic!("{direct:02x?}") };
    let answer = node.send(Side::NicOut, tcp(backend, direct, SYN | ACK));
    assert_eq!(answer.seen(Verdict::Pass, Reason::Translated).ends(), (backend, client));
    // Later, what is of the one flow has the tuple of the other. Neither is begun anew, nor changed twice.
    for flags in [ACK, SYN, FIN | ACK] {
        let (_, reason, through) = xdp(tcp(client, at(F::VIP, ports::WEB), flags));
        assert_eq!(reason, Reason::Translated);
        node.send(Side::NicIn, through).untouched(Verdict::Pass, Reason::Direct);
    }
    let (_, _, through) = xdp(udp(client, at(F::VIP, ports::DNS), b"query"));
    let udp_backend = at(F::POD, ports::TARGET_UDP);
    xdp(udp(client, udp_backend, b"query"));
    node.send(Side::NicIn, through.clone()).untouched(Verdict::Pass, Reason::Direct);
    // Nor is an error about an answer of the one taken for one of the other.
    let answer = udp(udp_backend, client, b"answer");
    let error = icmp_error(
        client.ip(),
        udp_backend.ip(),
        F::PORT_UNREACHABLE,
        answer.get(NETWORK..).expect("a packet"),
    );
    node.send(Side::NicIn, error).untouched(Verdict::Pass, Reason::Direct);
}

fn errors_about_direct_connections_find_their_port<F: TestFamily>() {
    let node = Node::<F>::new();
    let (client, backend) = (client::<F>(40000), at(F::POD, ports::TARGET_UDP));
    node.send(Side::NicIn, udp(client, at(F::VIP, ports::DNS), b"query"));
    let query = node.send(Side::NicIn, udp(client, backend, b"query"));
    let error = |about: &[u8]| {
        icmp_error(backend.ip(), client.ip(), F::PORT_UNREACHABLE, about.get(NETWORK..).expect("a packet"))
    };
    let back = node.send(Side::NicOut, error(&query.bytes)).seen(Verdict::Pass, Reason::Translated);
    let Seen::Icmp { about, .. } = back else { panic!("{back:?}") };
    assert_eq!(about, (client, backend));
    // One whose port did not change.
    let other = SocketAddr::new(client.ip(), 40001);
    let query = node.send(Side::NicIn, udp(other, backend, b"query"));
    node.send(Side::NicOut, error(&query.bytes)).untouched(Verdict::Pass, Reason::Direct);
}

fn forwarded_flows_of_many_clients_never_share_a_port<F: TestFamily>() {
    let node = Node::<F>::new();
    let mut sources = BTreeSet::new();
    for port in 20000..23000 {
        let syn = node.send(Side::NicIn, tcp(client::<F>(port), at(F::NODE, ports::FAR_NODE), SYN));
        let (src, _) = syn.seen(Verdict::Forward, Reason::Forwarded).ends();
        assert!(sources.insert(src), "{src} twice");
    }
}

/// Rule 153: the tuple is the limit, not the port.
fn further_sources_make_room_for_more_connections_than_a_node_has_ports<F: TestFamily>() {
    const FURTHER: u8 = 31;
    let mut node = Node::<F>::new();
    let further = |n: u8| match at(F::NODE, 0).ip() {
        IpAddr::V4(_) => IpAddr::from([192, 0, 2, 100 + n]),
        IpAddr::V6(addr) => (u128::from(addr) + 0x100 + u128::from(n)).to_be_bytes().into(),
    };
    for n in 0..FURTHER {
        let key = EdgeSourceKey { ifindex: NIC, index: n.into() };
        node.tables.edge_sources.insert(key, F::edge(further(n), 0));
        let own = node.tables.addresses[&F::wire(at(F::NODE, 0).ip())];
        node.tables.addresses.insert(F::wire(further(n)), own);
    }
    let edge = node.tables.edges.get_mut(&NIC).expect("the NIC");
    (edge.sources4, edge.sources6) = (FURTHER.into(), FURTHER.into());
    let (frontend, backend) = (at(F::NODE, ports::FAR_NODE), at(F::FAR_POD, ports::TARGET));
    let second = F::CLIENT.strip_suffix('7').expect("a 7").to_owned() + "8";
    let (mut sources, mut per_address) = (BTreeSet::new(), BTreeMap::<IpAddr, u32>::new());
    let clients = (1024..36_024).flat_map(|port| [at(F::CLIENT, port), at(&second, port)]);
    for (n, from) in clients.enumerate() {
        let syn = node.send(Side::NicIn, tcp(from, frontend, SYN));
        let (src, _) = syn.seen(Verdict::Forward, Reason::Forwarded).ends();
        assert!(sources.insert(src), "{src} twice");
        *per_address.entry(src.ip()).or_default() += 1;
        if n % 1000 == 0 {
            let answer = node.send(Side::NicIn, tcp(backend, src, SYN | ACK));
            assert_eq!(answer.seen(Verdict::Forward, Reason::Forwarded).ends(), (frontend, from));
        }
    }
    // An even share is 2187.
    assert_eq!(per_address.len(), usize::from(FURTHER) + 1);
    assert!(per_address.values().all(|n| (1800..2600).contains(n)), "{per_address:?}");
}

/// Opens a forwarded connection from `port` and returns the address it has on the other node.
fn open_forwarded<F: TestFamily>(node: &Node<F>, port: u16) -> Outcome {
    node.send(Side::NicIn, tcp(client::<F>(port), at(F::NODE, ports::FAR_NODE), SYN))
}

fn a_port_is_used_again_when_its_flow_is_over<F: TestFamily>() {
    let node = Node::<F>::new();
    let (frontend, backend) = (at(F::NODE, ports::FAR_NODE), at(F::FAR_POD, ports::TARGET));
    // More connections, one after the other, than there are ports.
    for n in 0..20_000u16 {
        let from = client::<F>(1024 + n);
        let syn = node.send(Side::NicIn, tcp(from, frontend, SYN));
        let (src, _) = syn.seen(Verdict::Forward, Reason::Forwarded).ends();
        for (bytes, ends) in [
            (tcp(backend, src, SYN | ACK), (frontend, from)),
            (tcp(from, frontend, FIN | ACK), (src, backend)),
            (tcp(backend, src, FIN | ACK), (frontend, from)),
            (tcp(from, frontend, ACK), (src, backend)),
        ] {
            assert_eq!(node.send(Side::NicIn, bytes).seen(Verdict::Forward, Reason::Forwarded).ends(), ends);
        }
    }
}

fn ports_can_run_out_and_that_is_said<F: TestFamily>() {
    let node = Node::<F>::new();
    let (mut sources, mut first) = (BTreeSet::new(), None);
    for port in 1024..40_000 {
        let outcome = open_forwarded(&node, port);
        if outcome.reason == Reason::PortsExhausted {
            // Silence would have the client try the same ports again.
            let answer = outcome.seen(Verdict::SendBack, Reason::PortsExhausted);
            assert!(matches!(answer, Seen::Tcp { flags, .. } if flags == RST | ACK), "{answer:?}");
            first = first.or(Some(sources.len()));
        } else {
            let (src, _) = outcome.seen(Verdict::Forward, Reason::Forwarded).ends();
            assert!(sources.insert(src), "{src} twice");
        }
    }
    let range = usize::from(RESERVED_PORTS_COUNT);
    println!("{} of {range} ports in use at the end, {first:?} at the first refusal", sources.len());
    assert!(first.is_some_and(|first| first > range / 3), "the first refusal at {first:?}");
    assert!(sources.len() > range * 9 / 10 && sources.len() <= range, "{} in use", sources.len());
    // Pending flows that nobody answered give their ports back.
    node.wait(State::Opening.default_timeout() + 1);
    open_forwarded(&node, 1023).seen(Verdict::Forward, Reason::Forwarded);
}

fn pending_flows_are_promoted_when_the_client_has_heard_the_answer<F: TestFamily>() {
    let node = Node::<F>::new();
    let (client, frontend, backend) =
        (client::<F>(40000), at(F::NODE, ports::WEB_NODE), at(F::POD, ports::TARGET));
    node.send(Side::NicIn, tcp(client, frontend, SYN)).seen(Verdict::Pass, Reason::Translated);
    assert_eq!((node.count(FlowTable::Pending), node.count(FlowTable::Established)), (2, 0));
    node.send(Side::NicIn, tcp(client, frontend, ACK)).seen(Verdict::Pass, Reason::Translated);
    assert_eq!((node.count(FlowTable::Pending), node.count(FlowTable::Established)), (2, 0));
    let answer = Segment { seq: 5000, ..Segment::new(backend, client, SYN | ACK) }.build();
    node.send(Side::NicOut, answer.clone()).seen(Verdict::Pass, Reason::Translated);
    node.send(Side::NicOut, answer).seen(Verdict::Pass, Reason::Translated);
    // Who has not heard the answer, because it went to somebody else, does not know what to acknowledge.
    let mut segment = Segment { ack: 5001 + (1 << 20), ..Segment::new(client, frontend, ACK) };
    for _ in 0..2 {
        node.send(Side::NicIn, segment.build()).seen(Verdict::Pass, Reason::Translated);
        assert_eq!((node.count(FlowTable::Pending), node.count(FlowTable::Established)), (2, 0));
    }
    segment.ack = 5001;
    node.send(Side::NicIn, Segment { flags: SYN, ..segment.clone() }.build());
    assert_eq!((node.count(FlowTable::Pending), node.count(FlowTable::Established)), (2, 0));
    node.send(Side::NicIn, segment.build()).seen(Verdict::Pass, Reason::Translated);
    assert_eq!((node.count(FlowTable::Pending), node.count(FlowTable::Established)), (0, 2));
    // The two halves say the same of each other.
    let entries = node.tables.entries(FlowTable::Established);
    for (key, flow) in &entries {
        let other = entries.get(&flow::reverse_key(key, flow)).expect("the other half");
        assert_eq!(
            Flow { ack: 0, tick: 0, hop: Hop::default(), fits: 0, ..*other },
            flow::reverse_value(key, flow)
        );
    }
}

fn a_lost_half_is_restored_by_the_half_that_is_left<F: TestFamily>() {
    // Rule 2: under LRU pressure either half may go.
    for lost in [false, true] {
        let node = Node::<F>::new();
        let (client, frontend, backend) = connect(&node);
        let before = node.tables.entries(FlowTable::Established);
        node.tables.flows.borrow_mut().retain(|_, entry| flow::is_reply(&entry.get()) != lost);
        assert_eq!(node.count(FlowTable::Established), 1);
        node.wait(2_000_000_000);
        if lost {
            node.send(Side::NicIn, tcp(client, frontend, ACK)).seen(Verdict::Pass, Reason::Translated);
        } else {
            node.send(Side::NicOut, tcp(backend, client, ACK)).seen(Verdict::Pass, Reason::Translated);
        }
        let after = node.tables.entries(FlowTable::Established);
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    }
}

/// Rule 2, both halves gone: chosen at random, another backend would get what it has never heard of.
fn a_connection_that_lost_its_flow_goes_to_its_backend_or_nowhere<F: TestFamily>() {
    for at_random in [false, true] {
        for (side, from) in [(Side::NicIn, F::CLIENT), (Side::PodIn, F::OTHER_POD)] {
            let mut node = Node::<F>::new();
            for service in node.tables.services.values_mut().filter(|_| at_random) {
                service.flags &= !service_flags::MAGLEV;
            }
            let (client, many) = (at(from, 40000), at(F::VIP, ports::MANY));
            let send = |target, flags| node.send(side, tcp(client, target, flags));
            let first = send(many, SYN).read().ends();
            for flags in [ACK, ACK | FIN, SYN | ACK] {
                node.tables.flows.borrow_mut().clear();
                node.tables.pending.borrow_mut().clear();
                node.tables.random.set(node.tables.random.get() + 1);
                let again = send(many, flags);
                if at_random {
                    let seen = again.seen(Verdict::SendBack, Reason::FlowLost);
                    let Seen::Tcp { flags, .. } = seen else { panic!("{seen:?}") };
                    assert!(flags & RST != 0, "{flags:#x}");
                    assert_eq!(node.count(FlowTable::Pending), 0);
                } else {
                    assert_eq!(again.read().ends(), first);
                }
            }
            // Where there is one backend it is known.
            assert_ne!(send(at(F::VIP, ports::WEB), ACK).reason, Reason::FlowLost);
        }
    }
}

fn a_syn_on_an_old_tuple_is_a_new_connection<F: TestFamily>() {
    // Rule 5. The client comes back with the same port; its backend has been replaced by another meanwhile.
    let mut node = Node::<F>::new();
    let (client, frontend, backend) = connect(&node);
    let other = at(F::OTHER_POD, ports::TARGET);
    let mut entry = node.tables.backends[&1];
    entry.addr = F::wire(other.ip());
    node.tables.backends.insert(9, entry);
    node.tables.slots.insert(1, 9);

    let ack = node.send(Side::NicIn, tcp(client, frontend, ACK));
    assert_eq!(ack.seen(Verdict::Pass, Reason::Translated).ends(), (client, backend));
    let syn = node.send(Side::NicIn, tcp(client, frontend, SYN));
    assert_eq!(syn.seen(Verdict::Pass, Reason::Translated).ends(), (client, other));
    assert_eq!(node.count(FlowTable::Established), 0, "the old flow is gone, both halves");
}

fn a_retransmitted_syn_keeps_its_backend<F: TestFamily>() {
    let mut node = Node::<F>::new();
    let (client, frontend) = (client::<F>(40000), at(F::NODE, ports::WEB_NODE));
    let first = node.send(Side::NicIn, tcp(client, frontend, SYN));
    node.tables.slots.insert(1, 2);
    let again = node.send(Side::NicIn, tcp(client, frontend, SYN));
    assert_eq!(first.bytes, again.bytes);
}

fn udp_leaves_a_dead_backend_with_its_next_packet<F: TestFamily>() {
    // Rule 4.
    for answered in [false, true] {
        let mut node = Node::<F>::new();
        let (client, frontend, backend) =
            (client::<F>(5000), at(F::NODE, ports::DNS_NODE), at(F::POD, ports::TARGET_UDP));
        node.send(Side::NicIn, udp(client, frontend, b"1")).seen(Verdict::Pass, Reason::Translated);
        if answered {
            node.send(Side::NicOut, udp(backend, client, b"2")).seen(Verdict::Pass, Reason::Translated);
        }
        // It is about to go; its window has another one already.
        node.tables.backends.get_mut(&3).expect("backend 3").state = backend_state::TERMINATING;
        node.tables.slots.insert(3, 4);
        let moved = node.send(Side::PodIn, udp(at(F::OTHER_POD, 1), at(F::VIP, ports::DNS), b"x"));
        assert_eq!(moved.seen(Verdict::Pass, Reason::Translated).ends().1, at(F::FAR_POD, ports::TARGET_UDP));
        let moved = node.send(Side::NicIn, udp(client, frontend, b"3"));
        assert_eq!(
            moved.seen(Verdict::Forward, Reason::Forwarded).ends().1,
            at(F::FAR_POD, ports::TARGET_UDP)
        );
        // The id was given to another backend.
        node.tables.backends.get_mut(&4).expect("backend 4").state = backend_state::UNUSED;
        node.tables.backends.get_mut(&3).expect("backend 3").state = backend_state::ACTIVE;
        node.tables.slots.insert(3, 3);
        let other = at(F::OTHER_POD, ports::TARGET_UDP);
        let entry = node.tables.backends.get_mut(&3).expect("backend 3");
        entry.addr = F::wire(other.ip());
        entry.generation += 1;
        let moved = node.send(Side::NicIn, udp(client, frontend, b"3"));
        assert_eq!(moved.seen(Verdict::Pass, Reason::Translated).ends(), (client, other));
        // And the service was scaled to zero.
        node.tables.backends.get_mut(&3).expect("backend 3").state = backend_state::UNUSED;
        for service in node.tables.services.values_mut() {
            service.external.len = 0;
        }
        node.send(Side::NicIn, udp(client, frontend, b"4")).seen(Verdict::SendBack, Reason::NoEndpoints);
    }
}

fn tcp_stays_with_a_backend_that_is_gone<F: TestFamily>() {
    // As kube-proxy: the backend, or whoever has its address now, ends the connection.
    let mut node = Node::<F>::new();
    let (client, frontend, backend) =
        (client::<F>(40000), at(F::NODE, ports::WEB_NODE), at(F::POD, ports::TARGET));
    node.send(Side::NicIn, tcp(client, frontend, SYN));
    node.send(Side::NicOut, tcp(backend, client, SYN | ACK));
    for state in [backend_state::TERMINATING, backend_state::UNUSED] {
        node.tables.backends.get_mut(&1).expect("backend 1").state = state;
        let ack = node.send(Side::NicIn, tcp(client, frontend, ACK));
        assert_eq!(ack.seen(Verdict::Pass, Reason::Translated).ends(), (client, backend));
    }
}

fn tcp_to_a_removed_backend_is_reset_where_that_is_wanted<F: TestFamily>() {
    for established in [true, false] {
        let mut node = Node::<F>::new();
        node.tables.resets_removed = true;
        let (client, frontend, backend) =
            (client::<F>(40000), at(F::NODE, ports::WEB_NODE), at(F::POD, ports::TARGET));
        node.send(Side::NicIn, tcp(client, frontend, SYN));
        if established {
            node.send(Side::NicOut, tcp(backend, client, SYN | ACK));
        }
        let send = |node: &Node<F>| node.send(Side::NicIn, tcp(client, frontend, ACK));
        // Whoever is about to go keeps its connections.
        node.tables.backends.get_mut(&1).expect("backend 1").state = backend_state::TERMINATING;
        assert_eq!(send(&node).seen(Verdict::Pass, Reason::Translated).ends(), (client, backend));
        let known = node.tables.backends[&1];
        for (state, generation) in [
            (backend_state::UNUSED, known.generation),
            // The id was given to another.
            (backend_state::ACTIVE, known.generation + 1),
        ] {
            let entry = node.tables.backends.get_mut(&1).expect("backend 1");
            (entry.state, entry.generation) = (state, generation);
            for _ in 0..2 {
                let seen = send(&node).seen(Verdict::SendBack, Reason::BackendRemoved);
                let Seen::Tcp { src, dst, flags, seq, .. } = seen else { panic!("{seen:?}") };
                assert_eq!((src, dst, flags, seq), (frontend, client, RST, 2000));
            }
            // A RST is not answered by another.
            let reset = node.send(Side::NicIn, tcp(client, frontend, RST));
            reset.untouched(Verdict::Drop, Reason::BackendRemoved);
        }
        let table = if established { FlowTable::Established } else { FlowTable::Pending };
        assert_eq!(states(&node, table), [State::Reset; 2]);
        // A new connection is a new connection.
        node.tables.slots.insert(1, 2);
        let syn = node.send(Side::NicIn, tcp(client, frontend, SYN));
        assert_ne!(syn.reason, Reason::BackendRemoved);
    }
}

/// A connection of a client outside with the pod of this node: it has sent up to 1001, the pod up to 5001.
fn connect<F: TestFamily>(node: &Node<F>) -> (SocketAddr, SocketAddr, SocketAddr) {
    let (client, frontend, backend) =
        (client::<F>(40000), at(F::NODE, ports::WEB_NODE), at(F::POD, ports::TARGET));
    for (side, from, to, flags, seq, ack) in [
        (Side::NicIn, client, frontend, SYN, 1000, 0),
        (Side::NicOut, backend, client, SYN | ACK, 5000, 1001),
        (Side::NicIn, client, frontend, ACK, 1001, 5001),
    ] {
        let segment = Segment { seq, ack, ..Segment::new(from, to, flags) };
        node.send(side, segment.build()).seen(Verdict::Pass, Reason::Translated);
    }
    (client, frontend, backend)
}

/// The states that the entries of a table say their flows are in.
fn states<F: TestFamily>(node: &Node<F>, table: FlowTable) -> Vec<State> {
    let entries = node.tables.entries(table);
    entries.iter().map(|(key, flow)| State::of(table, key.proto, flow)).collect()
}

fn resets_are_believed_from_who_knows_the_connection<F: TestFamily>() {
    // RFC 5961, section 3.2.
    const WINDOW: u32 = 1 << 20;
    for (from_client, flags, seq, ack, believed) in [
        (true, RST, 1001, 0, true),
        (true, RST, 1000, 0, false),
        (true, RST, 1002, 0, false),
        (true, RST, 0, 0, false),
        (true, RST | ACK, 1001, 0, true),
        // Ahead of what the pod has acknowledged, but with the client's own acknowledgement.
        (true, RST | ACK, 1001 + 4000, 5001, true),
        (true, RST | ACK, WINDOW + 1000, 5001, true),
        (true, RST | ACK, WINDOW + 1001, 5001, false),
        (true, RST | ACK, 1001 + 4000, 5002, false),
        (true, RST, 1001 + 4000, 5001, false),
        (false, RST, 5001, 0, true),
        (false, RST, 5002, 0, false),
        (false, RST | ACK, 5001 + 1448, 1001, true),
        (false, RST | ACK, 5001 + 1448, 1000, false),
    ] {
        let node = Node::<F>::new();
        let (client, frontend, backend) = connect(&node);
        let before = node.tables.entries(FlowTable::Established);
        let (side, from, to) =
            if from_client { (Side::NicIn, client, frontend) } else { (Side::NicOut, backend, client) };
        let segment = Segment { seq, ack, ..Segment::new(from, to, flags) };
        // It goes on either way: its receiver judges for itself.
        let what = format!("{segment:?}");
        node.send(side, segment.build()).seen(Verdict::Pass, Reason::Translated);
        if believed {
            assert_eq!(states(&node, FlowTable::Established), [State::Reset; 2], "{what}");
        } else {
            assert_eq!(node.tables.entries(FlowTable::Established), before, "{what}");
        }
    }
    // Who has lost what it knew of the other end believes nothing.
    let node = Node::<F>::new();
    let (client, frontend, _) = connect(&node);
    node.tables.flows.borrow_mut().retain(|_, entry| !flow::is_reply(&entry.get()));
    for seq in [0, 1001] {
        node.send(Side::NicIn, Segment { seq, ..Segment::new(client, frontend, RST) }.build());
        assert_eq!(states(&node, FlowTable::Established), [State::Established]);
    }
}

fn a_reset_is_taken_back_by_what_comes_after_it<F: TestFamily>() {
    for from_client in [true, false] {
        let node = Node::<F>::new();
        let (client, frontend, backend) = connect(&node);
        node.send(Side::NicIn, Segment { seq: 1001, ..Segment::new(client, frontend, RST) }.build());
        assert_eq!(states(&node, FlowTable::Established), [State::Reset; 2]);
        let (side, from, to) =
            if from_client { (Side::NicIn, client, frontend) } else { (Side::NicOut, backend, client) };
        node.send(side, tcp(from, to, ACK)).seen(Verdict::Pass, Reason::Translated);
        assert_eq!(states(&node, FlowTable::Established), [State::Established; 2]);
    }
}

fn a_refused_connection_is_never_established<F: TestFamily>() {
    let node = Node::<F>::new();
    let (client, frontend, backend) =
        (client::<F>(40000), at(F::NODE, ports::WEB_NODE), at(F::POD, ports::TARGET));
    node.send(Side::NicIn, tcp(client, frontend, SYN));
    let refusal = Segment { seq: 0, ack: 1001, ..Segment::new(backend, client, RST | ACK) };
    let seen = node.send(Side::NicOut, refusal.build()).seen(Verdict::Pass, Reason::Translated);
    assert_eq!(seen.ends(), (frontend, client));
    assert_eq!(node.count(FlowTable::Established), 0);
    assert_eq!(states(&node, FlowTable::Pending), [State::Reset; 2]);
    // Its tuple is free at once.
    let syn = node.send(Side::NicIn, tcp(client, at(F::VIP, ports::WEB), SYN));
    assert_eq!(syn.seen(Verdict::Pass, Reason::Translated).ends(), (client, backend));
}

/// Whether another frontend's client of the same port may have the tuple of the first one's flow.
fn is_tuple_free<F: TestFamily>(node: &Node<F>, udp_flow: bool) -> bool {
    let client = client::<F>(40000);
    let packet = if udp_flow {
        udp(client, at(F::VIP, ports::DNS), b"?")
    } else {
        tcp(client, at(F::VIP, ports::WEB), SYN)
    };
    let (src, _) = node.send(Side::NicIn, packet).seen(Verdict::Pass, Reason::Translated).ends();
    src.port() == client.port()
}

fn flows_end_with_their_time<F: TestFamily>() {
    const SECOND: u64 = 1_000_000_000;
    let reach = |node: &Node<F>, state: State| {
        let (client, frontend, pod) = match state {
            State::Unanswered | State::Answered => {
                let (client, frontend) = (client::<F>(40000), at(F::NODE, ports::DNS_NODE));
                node.send(Side::NicIn, udp(client, frontend, b"?"));
                (client, frontend, at(F::POD, ports::TARGET_UDP))
            }
            State::Opening => {
                let (client, frontend) = (client::<F>(40000), at(F::NODE, ports::WEB_NODE));
                node.send(Side::NicIn, tcp(client, frontend, SYN));
                (client, frontend, at(F::POD, ports::TARGET))
            }
            _ => connect(node),
        };
        if state == State::Answered {
            node.send(Side::NicOut, udp(pod, client, b"!"));
            assert_eq!(states(node, FlowTable::Pending), [state; 2]);
            // Whoever goes on has heard it.
            node.send(Side::NicIn, udp(client, frontend, b"?"));
        }
        if matches!(state, State::HalfClosed | State::Closed) {
            node.send(Side::NicOut, tcp(pod, client, FIN | ACK));
        }
        if state == State::Closed {
            node.send(Side::NicIn, tcp(client, frontend, FIN | ACK));
        }
        let table = match state {
            State::Unanswered | State::Opening => FlowTable::Pending,
            _ => FlowTable::Established,
        };
        assert_eq!(states(node, table), [state; 2]);
    };
    for (state, seconds) in [
        (State::Opening, 60),
        (State::Unanswered, 30),
        (State::Answered, 120),
        (State::Established, 24 * 3600),
        (State::HalfClosed, 3600),
        (State::Closed, 120),
    ] {
        for (timeout, configured) in [(seconds * SECOND, None), (7 * SECOND, Some(7 * SECOND))] {
            for over in [false, true] {
                let mut node = Node::<F>::new();
                node.tables.timeouts.extend(configured.map(|timeout| (state, timeout)));
                reach(&node, state);
                node.wait(timeout + u64::from(over));
                let udp_flow = matches!(state, State::Unanswered | State::Answered);
                assert_eq!(is_tuple_free(&node, udp_flow), over, "{state:?}, {timeout} ns");
            }
        }
    }
}

fn a_tuple_that_has_just_closed_rests<F: TestFamily>() {
    let node = Node::<F>::new();
    let (client, frontend, backend) = connect(&node);
    for (side, from, to) in [(Side::NicIn, client, frontend), (Side::NicOut, backend, client)] {
        node.send(side, tcp(from, to, FIN | ACK));
    }
    assert!(!is_tuple_free(&node, false), "another port is to be had");
    // A RST leaves nothing to wait for; neither end has a socket any more.
    let node = Node::<F>::new();
    connect(&node);
    node.send(Side::NicIn, Segment { seq: 1001, ..Segment::new(client, frontend, RST) }.build());
    assert!(is_tuple_free(&node, false));
}

fn halves_of_a_pending_flow_stay_together<F: TestFamily>() {
    // Whoever only sends (logs, metrics) stays pending; both halves live as long as it does.
    let node = Node::<F>::new();
    let (client, frontend) = (client::<F>(40000), at(F::NODE, ports::DNS_NODE));
    for _ in 0..40 {
        node.send(Side::NicIn, udp(client, frontend, b"log")).seen(Verdict::Pass, Reason::Translated);
        node.wait(2_000_000_000);
    }
    assert!(!is_tuple_free(&node, true));
    let node = Node::<F>::new();
    node.send(Side::NicIn, udp(client, frontend, b"log"));
    node.tables.pending.borrow_mut().retain(|_, entry| !flow::is_reply(&entry.get()));
    node.wait(2_000_000_000);
    node.send(Side::NicIn, udp(client, frontend, b"log"));
    assert_eq!(node.count(FlowTable::Pending), 2, "the lost half is back");
}

fn a_backend_may_open_connections_from_its_service_port<F: TestFamily>() {
    let node = Node::<F>::new();
    let (client, frontend, backend) =
        (client::<F>(40000), at(F::NODE, ports::WEB_NODE), at(F::POD, ports::TARGET));
    node.send(Side::NicIn, tcp(client, frontend, SYN));
    node.send(Side::NicOut, tcp(backend, client, SYN | ACK));
    node.send(Side::NicOut, tcp(backend, client, SYN)).untouched(Verdict::Pass, Reason::NotOurs);
}

fn forwarding_respects_the_mtu<F: TestFamily>() {
    let mut node = Node::<F>::new();
    let (client, frontend) = (client::<F>(40000), at(F::NODE, ports::FAR_NODE));
    open_forwarded(&node, 40000).seen(Verdict::Forward, Reason::Forwarded);
    node.route = HostRoute::Out { ifindex: NIC, mtu: 1280 };
    let mut segment = Segment::new(client, frontend, ACK);
    segment.payload = vec![1; 1300];
    let outcome = node.send(Side::NicIn, segment.build());
    if F::ETHER_TYPE == V4::ETHER_TYPE {
        // The builder sets DF, as TCP stacks do.
        let without_df = {
            let mut bytes = segment.build();
            bytes[20] &= !0x40;
            let sum = u16::from_be_bytes([bytes[24], bytes[25]]);
            let diff = lb_common::checksum::Diff::between(0x4000, 0).apply(sum);
            bytes[24..26].copy_from_slice(&diff.to_be_bytes());
            bytes
        };
        node.send(Side::NicIn, without_df).untouched(Verdict::Drop, Reason::PacketTooBig);
    }
    let bytes = outcome.bytes.clone();
    let seen = outcome.seen(Verdict::SendBack, Reason::PacketTooBig);
    let Seen::Icmp { dst, kind, code, about, .. } = seen else { panic!("{seen:?}") };
    assert_eq!((dst, (kind, code), about), (client.ip(), F::TOO_BIG, (client, frontend)));
    let rest = 14 + F::HEADER_LEN + 4;
    assert_eq!(&bytes[rest..rest + 4], &1280u32.to_be_bytes());
}

fn a_way_through_no_edge_leads_to_a_local_pod<F: TestFamily>() {
    // Nothing says that the backend is here, but its route does.
    for route in [HostRoute::Out { ifindex: NIC + 1, mtu: MTU }, HostRoute::Local] {
        let mut node = Node::<F>::new();
        node.route = route;
        let (client, backend) = (client::<F>(40000), at(F::FAR_POD, ports::TARGET));
        let syn = open_forwarded(&node, 40000);
        assert_eq!(syn.seen(Verdict::Pass, Reason::Translated).ends(), (client, backend));
    }
}

fn no_route_drops<F: TestFamily>() {
    let mut node = Node::<F>::new();
    node.route = HostRoute::None;
    open_forwarded(&node, 40000).untouched(Verdict::Drop, Reason::NoRoute);
    node.route = HostRoute::NoNextHop;
    open_forwarded(&node, 40000).untouched(Verdict::Pass, Reason::NoNextHop);
    assert_eq!(node.count(FlowTable::Pending), 0);
}

fn resets_without_a_flow_pass<F: TestFamily>() {
    let node = Node::<F>::new();
    node.send(Side::NicIn, tcp(client::<F>(40000), at(F::NODE, ports::WEB_NODE), RST))
        .untouched(Verdict::Pass, Reason::StrayReset);
}

fn a_reset_is_never_answered<F: TestFamily>() {
    let node = Node::<F>::new();
    node.send(Side::PodIn, tcp(at(F::OTHER_POD, 40000), at(F::VIP, 9), RST))
        .untouched(Verdict::Drop, Reason::UnknownPort);
}

/// Contract, rules 16 to 19.
fn source_ranges_admit_and_drop<F: TestFamily>() {
    let mut node = Node::<F>::new();
    let vip = ServiceKey { addr: F::wire(at(F::VIP, 0).ip()), port: ports::WEB, proto: 6, pad: 0 };
    let service = node.tables.services.get_mut(&vip).expect("web");
    service.flags |= service_flags::SOURCE_RANGES;
    let id = service.id;
    let syn = |node: &Node<F>, side, from: &str, to| node.send(side, tcp(at(from, 40000), to, SYN));
    let frontend = at(F::VIP, ports::WEB);
    syn(&node, Side::NicIn, F::CLIENT, frontend).untouched(Verdict::Drop, Reason::SourceNotAllowed);
    // All but the last 8 bits, of this Service alone.
    let network = |service| PrefixKey {
        prefix_len: Source::<F::Addr>::BITS - 8,
        data: Source { service, addr: F::wire(at(F::CLIENT, 0).ip()) },
    };
    node.tables.sources.push(network(id + 1));
    syn(&node, Side::NicIn, F::CLIENT, frontend).untouched(Verdict::Drop, Reason::SourceNotAllowed);
    node.tables.sources.push(network(id));
    syn(&node, Side::NicIn, F::CLIENT, frontend).seen(Verdict::Pass, Reason::Translated);
    syn(&node, Side::PodIn, F::OTHER_POD, frontend).untouched(Verdict::Drop, Reason::SourceNotAllowed);
    syn(&node, Side::PodIn, F::OTHER_POD, at(F::NODE, ports::WEB_NODE))
        .seen(Verdict::Pass, Reason::Translated);
}

/// A node whose frontends with several backends remember their clients for 10 s.
fn node_with_affinity<F: TestFamily>() -> Node<F> {
    let mut node = Node::<F>::new();
    for service in node.tables.services.values_mut().filter(|service| service.external.len > 1) {
        (service.affinity, service.port) = (10, 77);
        service.flags &= !service_flags::MAGLEV;
    }
    for backend in [1, 2] {
        node.tables.members.insert(MemberKey { window: 100, backend });
    }
    node
}

/// The backend that a new connection from a pod is given while chance says `random`.
fn backend_of<F: TestFamily>(node: &Node<F>, port: u16, frontend: SocketAddr, random: u32) -> SocketAddr {
    node.tables.random.set(random);
    let syn = node.send(Side::PodIn, tcp(at(F::OTHER_POD, port), frontend, SYN));
    syn.seen(Verdict::Pass, Reason::Translated).ends().1
}

fn affinity_keeps_a_client_on_its_backend<F: TestFamily>() {
    let node = node_with_affinity::<F>();
    let vip = at(F::VIP, ports::MANY);
    let first = backend_of(&node, 40000, vip, 0);
    for n in 1..50 {
        // Each new connection begins the time anew.
        node.wait(9_000_000_000);
        assert_eq!(backend_of(&node, 40000 + n, vip, u32::from(n)), first);
    }
    // Another client is not bound by it.
    node.tables.random.set(1);
    let other = node.send(Side::PodIn, tcp(at(F::POD, 40000), vip, SYN));
    assert_ne!(other.seen(Verdict::Pass, Reason::Translated).ends().1, first);
}

fn affinity_ends_with_its_time_or_its_backend<F: TestFamily>() {
    let vip = at(F::VIP, ports::MANY);
    let (near, far) = (at(F::POD, ports::TARGET), at(F::FAR_POD, ports::TARGET));
    let node = node_with_affinity::<F>();
    assert_eq!(backend_of(&node, 40000, vip, 0), near);
    node.wait(10_000_000_001);
    assert_eq!(backend_of(&node, 40001, vip, 1), far);

    // The id was given to another backend.
    let mut node = node_with_affinity::<F>();
    assert_eq!(backend_of(&node, 40000, vip, 0), near);
    node.tables.backends.get_mut(&1).expect("backend 1").generation += 1;
    assert_eq!(backend_of(&node, 40001, vip, 1), far);

    // The backend lives, but is not one of those this frontend may choose from any more.
    let mut node = node_with_affinity::<F>();
    assert_eq!(backend_of(&node, 40000, vip, 0), near);
    node.tables.members.remove(&MemberKey { window: 100, backend: 1 });
    assert_eq!(backend_of(&node, 40001, vip, 1), far);
}

fn affinity_is_shared_by_the_frontends_of_a_port<F: TestFamily>() {
    let node = node_with_affinity::<F>();
    let first = backend_of(&node, 40000, at(F::VIP, ports::MANY), 1);
    assert_eq!(backend_of(&node, 40001, at(F::NODE, ports::MANY_NODE), 0), first);
}

/// Contract, rule 14.
fn unallocated_addresses_of_a_service_cidr_are_dropped<F: TestFamily>() {
    let mut node = Node::<F>::new();
    node.tables.networks.clear();
    let vip = F::wire(at(F::VIP, 0).ip());
    // A network of which only the last bit is free, and which the Service's neighbour is in.
    let neighbour = if F::HEADER_LEN == 20 { "10.96.0.11" } else { "fd00:10:96::b" };
    let mask =
        if F::HEADER_LEN == 20 { "255.255.255.254" } else { "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe" };
    let mask = F::wire(at(mask, 0).ip());
    let syn = |node: &Node<F>, to: &str| node.send(Side::PodIn, tcp(at(F::POD, 1), at(to, 80), SYN));
    syn(&node, neighbour).untouched(Verdict::Pass, Reason::NotOurs);
    node.tables.networks.push(Network { addr: vip, mask, flags: network_flags::SERVICE });
    syn(&node, neighbour).untouched(Verdict::Drop, Reason::NoSuchService);
    syn(&node, F::VIP).seen(Verdict::SendBack, Reason::Hairpinned);
    syn(&node, F::FAR_POD).untouched(Verdict::Pass, Reason::Direct);
}

/// What the filter does not know is not looked for; what it knows goes on when its Service is gone.
fn addresses_without_a_bit_in_the_filter_are_nobodys<F: TestFamily>() {
    let mut node = Node::<F>::new();
    let known: BTreeSet<_> = node.tables.addresses.keys().copied().collect();
    node.tables.filter = Some(known.clone());
    let (client, frontend) = (client::<F>(40000), at(F::NODE, ports::WEB_NODE));
    node.send(Side::NicIn, tcp(client, frontend, SYN));
    node.send(Side::NicOut, tcp(at(F::POD, ports::TARGET), client, SYN | ACK));
    node.send(Side::NicIn, tcp(client, frontend, ACK)).seen(Verdict::Pass, Reason::Translated);
    node.tables.services.clear();
    node.tables.addresses.clear();
    node.send(Side::NicIn, tcp(client, frontend, ACK)).seen(Verdict::Pass, Reason::Translated);
    node.tables.filter = Some(BTreeSet::new());
    for side in [Side::NicIn, Side::PodIn] {
        node.send(side, tcp(client, frontend, ACK)).untouched(Verdict::Pass, Reason::NotOurs);
    }
    let mask = if F::HEADER_LEN == 20 { "255.0.0.0" } else { "ff00::" };
    let (addr, mask) = (F::wire(at(F::VIP, 0).ip()), F::wire(at(mask, 0).ip()));
    node.tables.networks.push(Network { addr, mask, flags: network_flags::SERVICE });
    node.send(Side::PodIn, tcp(client, at(F::VIP, 80), SYN)).untouched(Verdict::Drop, Reason::NoSuchService);
}

/// A pod of another node asks here for a NodePort: traffic policy Local does not restrict it.
fn pods_of_other_nodes_are_inside_of_the_cluster<F: TestFamily>() {
    let mut node = Node::<F>::new();
    let pod = at(F::FAR_POD, 40000);
    let frontend = at(F::NODE, ports::LOCAL_NODE);
    node.send(Side::NicIn, tcp(pod, frontend, SYN)).untouched(Verdict::Drop, Reason::NoLocalEndpoints);
    let mask = if F::HEADER_LEN == 20 { "255.255.0.0" } else { "ffff:ffff:ffff::" };
    let (addr, mask) = (F::wire(pod.ip()), F::wire(at(mask, 0).ip()));
    node.tables.networks.push(Network { addr, mask, flags: network_flags::POD });
    node.send(Side::NicIn, tcp(pod, frontend, SYN)).seen(Verdict::Forward, Reason::Forwarded);
    node.send(Side::NicIn, tcp(client::<F>(1), frontend, SYN))
        .untouched(Verdict::Drop, Reason::NoLocalEndpoints);
}

fn usage_is_counted_for_each_service<F: TestFamily>() {
    let node = Node::<F>::new();
    let (client, frontend) = (client::<F>(40000), at(F::NODE, ports::WEB_NODE));
    let syn = tcp(client, frontend, SYN);
    let bytes = syn.len() as u64 - 14;
    node.send(Side::NicIn, syn);
    node.send(Side::NicOut, tcp(at(F::POD, ports::TARGET), client, SYN | ACK));
    node.send(Side::NicIn, tcp(client, at(F::NODE, ports::EMPTY_NODE), SYN));
    let usage = node.tables.usage.borrow();
    let web = Usage { connections: 1, packets: 2, bytes: 2 * bytes, refused: 0 };
    assert_eq!((usage[&1], usage[&3]), (web, Usage { refused: 1, ..Usage::default() }));
    drop(usage);
    // What is left to the hook behind counts there, once.
    let mut node = Node::<F>::new();
    open_forwarded(&node, 40000).seen(Verdict::Forward, Reason::Forwarded);
    let before = node.tables.usage.borrow().clone();
    node.route = HostRoute::NoNextHop;
    open_forwarded(&node, 40000).untouched(Verdict::Pass, Reason::NoNextHop);
    assert_eq!(*node.tables.usage.borrow(), before);
}

/// Rules 1 and 2, found by fuzzing.
fn a_tuple_that_another_flow_took_is_given_up<F: TestFamily>() {
    for answered in [false, true] {
        let node = Node::<F>::new();
        let (client, backend) = (client::<F>(40000), at(F::POD, ports::TARGET));
        let (first, second) = (at(F::NODE, ports::WEB_NODE), at(F::VIP, ports::WEB));
        node.send(Side::NicIn, tcp(client, first, SYN)).seen(Verdict::Pass, Reason::Translated);
        if answered {
            node.send(Side::NicOut, tcp(backend, client, SYN | ACK));
            node.send(Side::NicIn, tcp(client, first, ACK));
        }
        let table = if answered { &node.tables.flows } else { &node.tables.pending };
        table.borrow_mut().retain(|_, entry| !flow::is_reply(&entry.get()));
        let taken = node.send(Side::NicIn, tcp(client, second, SYN));
        assert_eq!(taken.seen(Verdict::Pass, Reason::Translated).ends(), (client, backend));
        node.wait(2_000_000_000);
        let moved = node.send(Side::NicIn, tcp(client, first, ACK)).seen(Verdict::Pass, Reason::Translated);
        assert_ne!(moved.ends().0, client, "two flows of one name");
        let reply = node.send(Side::NicOut, tcp(backend, client, SYN | ACK));
        assert_eq!(reply.seen(Verdict::Pass, Reason::Translated).ends(), (second, client));
        let reply = node.send(Side::NicOut, tcp(backend, moved.ends().0, RST));
        assert_eq!(reply.seen(Verdict::Pass, Reason::Translated).ends(), (first, client));
    }
}

/// Rule 2: what nobody has answered yet may be evicted, too.
fn a_lost_half_of_a_pending_flow_is_restored<F: TestFamily>() {
    let node = Node::<F>::new();
    let (client, frontend, backend) =
        (client::<F>(40000), at(F::NODE, ports::WEB_NODE), at(F::POD, ports::TARGET));
    node.send(Side::NicIn, tcp(client, frontend, SYN));
    node.tables.pending.borrow_mut().retain(|_, entry| !flow::is_reply(&entry.get()));
    node.wait(1_000_000_000);
    node.send(Side::NicIn, tcp(client, frontend, SYN)).seen(Verdict::Pass, Reason::Translated);
    let reply = node.send(Side::NicOut, tcp(backend, client, SYN | ACK));
    assert_eq!(reply.seen(Verdict::Pass, Reason::Translated).ends(), (frontend, client));
}
