//! Tunnels between nodes, in the kernel: what goes in, what comes out, and whose are not believed.

use aya::Pod;
use lb_common::abi::{
    AddressInfo, AffinityKey, Backend, Flow, FlowKey, FragmentKey, Network, Place as Home, ServiceKey, Side,
    Source, address_flags, service_flags,
};
use lb_common::host::{HostPacket, HostRoute, HostTables};
use lb_common::packet::NETWORK;
use lb_common::pipeline::{Verdict, process};
use lb_common::testing::{at, cluster, fragments, icmp_error, ports, sctp, tcp, udp};
use lb_common::tunnel::{self, DEFAULT_PORT};
use lb_common::wire::IpProto;
use lb_common::wire::tcp_flags::{ACK, FIN, RST, SYN};
use lb_common::{Reason, V4, V6};

use super::{KernelFamily, MTU, Pair, Place, on_node, program};

/// The other node.
fn peer<F: KernelFamily>() -> F::Addr {
    F::wire(at(if F::HOST == 32 { "192.0.2.2" } else { "2001:db8::2" }, 0).ip())
}

/// Backends of odd numbers are on the node `here`, the others on `there`; unspecified: this one.
fn settle<F: KernelFamily>(tables: &mut HostTables<F>, here: F::Addr, there: F::Addr) {
    for (id, backend) in tables.backends.clone() {
        let proto = [IpProto::Tcp, IpProto::Udp, IpProto::Sctp][(id as usize - 1) / 2] as u8;
        let key = ServiceKey { addr: backend.addr, port: backend.port, proto, pad: 0 };
        let node = if id % 2 == 1 { here } else { there };
        tables.places.insert(key, Home { backend: id, node });
    }
    tables.tunnel_port = DEFAULT_PORT;
    for service in tables.services.values_mut() {
        service.flags |= service_flags::DSR;
    }
}

/// What the other node makes of a packet for a backend of this one.
fn wrapped<F: KernelFamily>(device: u32, node: &str, frame: &[u8]) -> Vec<u8> {
    let mut other = cluster::<F>(device);
    settle(&mut other, F::wire(at(node, 0).ip()), F::Addr::default());
    for backend in other.backends.values_mut() {
        backend.flags = 0;
    }
    let own = other.edges.get_mut(&device).expect("the edge");
    (own.addr4, own.addr6) = Default::default();
    *own = F::edge(at(if F::HOST == 32 { "192.0.2.2" } else { "2001:db8::2" }, 0).ip(), 0);
    let mut packet = HostPacket::new(frame, device).with_route(HostRoute::Out { ifindex: device, mtu: MTU });
    let result = process::<F, _, _>(&mut packet, &other, Side::NicIn);
    assert_eq!(result, (Verdict::Forward, Reason::Tunnelled));
    packet.bytes()
}

fn the_kernel_tunnels_as_the_host_does<F: KernelFamily>(device: u32)
where
    ServiceKey<F::Addr>: Pod,
    Backend<F::Addr>: Pod,
    AffinityKey<F::Addr>: Pod,
    FragmentKey<F::Addr>: Pod,
    Home<F::Addr>: Pod,
    Network<F::Addr>: Pod,
    Source<F::Addr>: Pod,
    FlowKey<F::Addr>: Pod,
    Flow<F::Addr>: Pod,
{
    let mut pair = Pair::<F>::with(device, None, |tables| {
        settle(tables, F::Addr::default(), peer::<F>());
        tables.addresses.insert(peer::<F>(), AddressInfo { flags: address_flags::PEER });
    });
    let places: Vec<_> = [Place::Xdp, Place::NicIn]
        .map(program)
        .into_iter()
        .filter(|place| pair.places().contains(place))
        .collect();
    for (n, place) in (0..).zip(places) {
        let client = |port: u16| at(F::CLIENT, port + 100 * n);
        let front = |port| at(F::NODE, port);
        // Into a tunnel, where the kernel can tell whether it fits.
        let into = if pair.host.sends_tunnelled { Reason::Tunnelled } else { Reason::Forwarded };
        let (far, dns) = (front(ports::FAR_NODE), front(ports::FAR_DNS_NODE));
        for flags in [SYN, SYN, ACK, ACK, RST, ACK, FIN | ACK, SYN] {
            assert_eq!(pair.send(place, &tcp(client(4000), far, flags)).1, into);
        }
        for _ in 0..3 {
            assert_eq!(pair.send(place, &udp(client(4001), dns, b"query")).1, into);
        }
        let init = sctp(client(4002), front(ports::FAR_SIGNAL_NODE), 1, &[0; 16]);
        assert_eq!(pair.send(place, &init).1, into);
        let answer = tcp(far, client(4000), SYN | ACK);
        let error = icmp_error(at(F::CLIENT, 0).ip(), far.ip(), F::TOO_BIG, &answer[NETWORK..]);
        assert_eq!(pair.send(place, &error).1, into);
        for piece in fragments(&udp(client(4003), dns, &[7; 900]), 9, 400) {
            assert_eq!(pair.send(place, &piece).1, into);
        }
        let fits = MTU as usize - F::HEADER_LEN - 8 - usize::from(tunnel::overhead::<F>());
        assert_eq!(pair.send(place, &udp(client(4001), dns, &vec![1; fits])).1, into);
        let large = udp(client(4001), dns, &vec![1; fits + 1]);
        if pair.host.sends_tunnelled {
            assert_eq!(pair.send(place, &large).1, Reason::TunnelTooBig);
        }
        // Out of one.
        let inside = |port, flags| tcp(client(port), front(ports::WEB_NODE), flags);
        let frame = |port, flags| wrapped::<F>(device, F::NODE, &inside(port, flags));
        let whole = frame(5000, SYN);
        for (flags, reason) in [(SYN, Reason::Translated), (ACK, Reason::Translated)] {
            assert_eq!(pair.send(place, &frame(5000, flags)).1, reason);
        }
        let query = wrapped::<F>(device, F::NODE, &udp(client(5001), front(ports::DNS_NODE), b"query"));
        assert_eq!(pair.send(place, &query).1, Reason::Translated);
        // What is wrong with each byte of the headers, and at each length.
        for at in NETWORK..NETWORK + usize::from(tunnel::overhead::<F>()) + F::HEADER_LEN {
            let mut wrong = whole.clone();
            wrong[at] ^= 0x21;
            pair.send(place, &wrong);
        }
        for len in NETWORK + F::HEADER_LEN..whole.len() {
            pair.send(place, &whole[..len]);
        }
    }
    pair.settle();
}

#[test]
fn the_kernel_tunnels_as_the_host_does_v4() {
    on_node(the_kernel_tunnels_as_the_host_does::<V4>);
}

#[test]
fn the_kernel_tunnels_as_the_host_does_v6() {
    on_node(the_kernel_tunnels_as_the_host_does::<V6>);
}
