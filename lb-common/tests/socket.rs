//! The socket edge on the host: what a process asks for, what it is connected to, what it is told.

use std::net::SocketAddr;

use lb_common::abi::{
    AddressInfo, MemberKey, Service, ServiceKey, Side, address_flags, backend_state, frontend_kind,
    service_flags,
};
use lb_common::host::HostTables;
use lb_common::socket::{self, Peer, Socket};
use lb_common::testing::{TestFamily, at, cluster, ports};
use lb_common::{Reason, both_families};

const TCP: Socket = Socket { cookie: 17, proto: 6, owner: 0 };
const UDP: Socket = Socket { cookie: 18, proto: 17, owner: 0 };

fn peer<F: TestFamily>(addr: SocketAddr) -> Peer<F> {
    Peer { addr: F::wire(addr.ip()), port: addr.port() }
}

both_families! {
    connections_go_to_the_backend_and_keep_their_name
    datagrams_stay_with_their_backend_while_it_lives
    frontends_without_endpoints_refuse
    what_is_no_frontend_is_left_alone
    addresses_that_no_service_has_lead_nowhere
    loopback_addresses_serve_node_ports_to_sockets_alone
    host_ports_answer_where_node_ports_may_not
    source_ranges_hold_for_the_node_too
    affinity_tells_the_node_from_its_pods
}

fn connections_go_to_the_backend_and_keep_their_name<F: TestFamily>() {
    let tables = cluster::<F>(1);
    for (frontend, backend) in [
        (at(F::VIP, ports::WEB), at(F::POD, ports::TARGET)),
        (at(F::NODE, ports::WEB_NODE), at(F::POD, ports::TARGET)),
        (at(F::VIP, ports::FAR), at(F::FAR_POD, ports::TARGET)),
        (at(F::NODE, ports::LOCAL_NODE), at(F::FAR_POD, ports::TARGET)),
    ] {
        assert_eq!(socket::connect(&tables, TCP, peer::<F>(frontend)), Ok(peer(backend)));
        assert_eq!(socket::name(&tables, TCP, peer::<F>(backend)), Ok(peer(frontend)));
        // Another socket that talks to the backend directly is told the truth.
        let direct = Socket { cookie: 99, ..TCP };
        assert_eq!(socket::name(&tables, direct, peer::<F>(backend)), Err(Reason::NotOurs));
    }
}

fn datagrams_stay_with_their_backend_while_it_lives<F: TestFamily>() {
    let mut tables = cluster::<F>(1);
    let (frontend, backend) = (at(F::VIP, ports::DNS), at(F::POD, ports::TARGET_UDP));
    assert_eq!(socket::sendmsg(&tables, UDP, peer::<F>(frontend)), Ok(peer(backend)));
    assert_eq!(socket::name(&tables, UDP, peer::<F>(backend)), Ok(peer(frontend)));
    // The service would choose another now; this socket is not moved.
    tables.slots.insert(3, 4);
    assert_eq!(socket::sendmsg(&tables, UDP, peer::<F>(frontend)), Ok(peer(backend)));
    tables.backends.get_mut(&3).expect("backend 3").state = backend_state::UNUSED;
    let other = at(F::FAR_POD, ports::TARGET_UDP);
    assert_eq!(socket::sendmsg(&tables, UDP, peer::<F>(frontend)), Ok(peer(other)));
    assert_eq!(socket::name(&tables, UDP, peer::<F>(other)), Ok(peer(frontend)));
}

fn frontends_without_endpoints_refuse<F: TestFamily>() {
    let tables = cluster::<F>(1);
    let connect = |addr| socket::connect(&tables, TCP, peer::<F>(addr));
    assert_eq!(connect(at(F::VIP, ports::EMPTY)), Err(Reason::NoEndpoints));
    assert_eq!(connect(at(F::NODE, ports::EMPTY_NODE)), Err(Reason::NoEndpoints));
    assert_eq!(connect(at(F::VIP, ports::TARGET)), Err(Reason::UnknownPort));
    let sendmsg = socket::sendmsg(&tables, UDP, peer::<F>(at(F::VIP, ports::EMPTY)));
    assert_eq!(sendmsg, Err(Reason::NoEndpoints));
}

fn what_is_no_frontend_is_left_alone<F: TestFamily>() {
    let tables = cluster::<F>(1);
    for addr in [at(F::POD, ports::TARGET), at(F::NODE, 22), at(F::CLIENT, 80)] {
        assert_eq!(socket::connect(&tables, TCP, peer::<F>(addr)), Err(Reason::NotOurs));
        assert_eq!(socket::sendmsg(&tables, UDP, peer::<F>(addr)), Err(Reason::NotOurs));
    }
    assert!(tables.sockets.borrow().is_empty());
}

/// Rule 14, for processes of the node, too.
fn addresses_that_no_service_has_lead_nowhere<F: TestFamily>() {
    let tables = cluster::<F>(1);
    let addr = at(F::UNALLOCATED, ports::WEB);
    assert_eq!(socket::connect(&tables, TCP, peer::<F>(addr)), Err(Reason::NoSuchService));
    assert_eq!(socket::sendmsg(&tables, UDP, peer::<F>(addr)), Err(Reason::NoSuchService));
}

fn loopback_addresses_serve_node_ports_to_sockets_alone<F: TestFamily>() {
    let mut tables: HostTables<F> = cluster::<F>(1);
    let loopback = at(F::CLIENT, ports::WEB_NODE);
    let flags = address_flags::LOOPBACK | address_flags::NODE_PORT;
    tables.addresses.insert(F::wire(loopback.ip()), AddressInfo { flags });
    let backend = at(F::POD, ports::TARGET);
    assert_eq!(socket::connect(&tables, TCP, peer::<F>(loopback)), Ok(peer(backend)));

    let mut packet = lb_common::host::HostPacket::new(
        &lb_common::testing::tcp(at(F::OTHER_POD, 1), loopback, lb_common::wire::tcp_flags::SYN),
        1,
    );
    let outcome = lb_common::pipeline::process::<F, _, _>(&mut packet, &tables, lb_common::abi::Side::NicIn);
    assert_eq!(outcome, (lb_common::pipeline::Verdict::Pass, Reason::NotOurs));
}

fn host_ports_answer_where_node_ports_may_not<F: TestFamily>() {
    let any = |port| ServiceKey { addr: F::Addr::default(), port, proto: TCP.proto, pad: 0 };
    let (backend, closed) = (Ok(peer(at(F::POD, ports::TARGET))), Err(Reason::NotOurs));
    for (flags, at_host_port, at_node_port) in [
        (address_flags::NODE | address_flags::HOST_PORT, backend, closed),
        (address_flags::LOOPBACK | address_flags::HOST_PORT, backend, closed),
        (address_flags::NODE | address_flags::NODE_PORT, closed, backend),
        (address_flags::LOOPBACK, closed, closed),
    ] {
        let mut tables: HostTables<F> = cluster::<F>(1);
        let node_port = tables.services[&any(ports::WEB_NODE)];
        tables.services.insert(any(443), Service { kind: frontend_kind::HOST_PORT, ..node_port });
        tables.addresses.insert(F::wire(at(F::CLIENT, 0).ip()), AddressInfo { flags });
        for (port, expected) in [(443, at_host_port), (ports::WEB_NODE, at_node_port)] {
            let addr = at(F::CLIENT, port);
            assert_eq!(socket::connect(&tables, TCP, peer::<F>(addr)), expected, "{flags:#x} {port}");
            let syn = lb_common::testing::tcp(at(F::OTHER_POD, 1), addr, lb_common::wire::tcp_flags::SYN);
            let mut packet = lb_common::host::HostPacket::new(&syn, 1);
            let (_, reason) = lb_common::pipeline::process::<F, _, _>(&mut packet, &tables, Side::NicIn);
            let to_packets = expected.is_ok() && flags & address_flags::LOOPBACK == 0;
            assert_eq!(reason == Reason::Translated, to_packets, "{flags:#x} {port}: {reason:?}");
        }
    }
}

fn source_ranges_hold_for_the_node_too<F: TestFamily>() {
    let mut tables = cluster::<F>(1);
    let ask = |tables: &HostTables<F>| socket::connect(tables, TCP, peer::<F>(at(F::VIP, ports::WEB)));
    let set = |tables: &mut HostTables<F>, flags| {
        for service in tables.services.values_mut() {
            service.flags |= flags;
        }
    };
    set(&mut tables, service_flags::SOURCE_RANGES);
    assert_eq!(ask(&tables), Err(Reason::SourceNotAllowed));
    set(&mut tables, service_flags::NODE_ALLOWED);
    assert_eq!(ask(&tables), Ok(peer(at(F::POD, ports::TARGET))));
}

fn affinity_tells_the_node_from_its_pods<F: TestFamily>() {
    let mut tables = cluster::<F>(1);
    for service in tables.services.values_mut().filter(|service| service.external.len > 1) {
        (service.affinity, service.port) = (10, 77);
        service.flags &= !service_flags::MAGLEV;
    }
    for backend in [1, 2] {
        tables.members.insert(MemberKey { window: 100, backend });
    }
    let ask = |owner, random| {
        tables.random.set(random);
        let socket = Socket { owner, cookie: u64::from(random), ..TCP };
        socket::connect(&tables, socket, peer::<F>(at(F::VIP, ports::MANY))).expect("a backend")
    };
    let (near, far) = (peer(at(F::POD, ports::TARGET)), peer(at(F::FAR_POD, ports::TARGET)));
    assert_eq!((ask(0, 0), ask(0, 1), ask(0, 4)), (near, near, near));
    assert_eq!((ask(4026, 1), ask(4026, 0)), (far, far));
}
