//! `fairlead trace` on the pinned maps of an agent that does not run.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use aya::Pod;
use fairlead::datapath::test_run::{Input, test_run};
use fairlead::datapath::{Datapath, Maps, Options, Place, XdpKind};
use fairlead::entries::{BackendEntry, Family, FrontendKey, Op, Protocol, ServiceName};
use fairlead::inspect::Inspector;
use fairlead::sys::bpf;
use fairlead::trace::{Question, Trace, TraceError, trace};
use lb_common::abi::{
    Addr4, Addr6, Affinity, Backend, Edge, Flow, FlowKey, Service, SocketKey, SocketPeer, Window,
    address_flags, backend_flags, backend_state, edge_flags, frontend_kind, service_flags,
};
use lb_common::maps::LAYOUT_VERSION;
use lb_common::testing;
use lb_common::wire::tcp_flags;

use crate::support::{TempBpffs, in_new_netns, ip};

const NIC: u32 = 210;
const VETH: u32 = 211;
const POD: &str = "10.1.0.9";
const CLIENT: &str = "198.51.100.7";
const NODE: &str = "192.0.2.10";

/// A node with an uplink, a pod, and Services whose one backend is here (1), there (2), nowhere (3), and 1 for some (4).
fn node(options: &Options, test: impl FnOnce(&Datapath)) {
    ip(&format!("link add nic0 index {NIC} address 02:00:00:00:0a:01 type veth peer name far0"));
    ip(&format!("link add vethpod index {VETH} type veth peer name pod0"));
    for line in [
        "link set nic0 up",
        "link set far0 up",
        "link set vethpod up",
        "link set pod0 up",
        "addr add 192.0.2.10/24 dev nic0",
        "-6 addr add 2001:db8::10/64 dev nic0 nodad",
        "neigh add 192.0.2.1 lladdr 02:00:00:00:0a:02 dev nic0",
        "route add default via 192.0.2.1",
        "route add 10.1.0.9 dev vethpod",
        "route add 10.1.0.3 dev vethpod",
        "-6 route add fd00:1::3 dev vethpod",
        "-6 route add fd00:1::9 dev vethpod",
    ] {
        ip(line);
    }
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    let datapath = Datapath::open(options).unwrap();
    datapath.maps().unwrap().apply(&services()).unwrap();
    let edge = Edge {
        addr4: Addr4 { octets: [192, 0, 2, 10] },
        addr6: Addr6 { octets: "2001:db8::10".parse::<std::net::Ipv6Addr>().unwrap().octets() },
        flags: edge_flags::XDP_TRANSMIT,
        ..Edge::default()
    };
    datapath.edges_map().unwrap().insert(NIC, edge, 0).unwrap();
    test(&datapath);
}

fn services() -> Vec<Op> {
    let backend = |family, id, addr: &str, flags| Op::SetBackend {
        family,
        id,
        entry: BackendEntry {
            addr: addr.parse().unwrap(),
            state: backend_state::ACTIVE,
            flags,
            generation: 1,
        },
    };
    let here = Window { base: 1, len: 1 };
    let there = Window { base: 2, len: 1 };
    let none = Window::default();
    let frontend = |addr: &str, port, kind, entry: Service| Op::SetFrontend {
        key: FrontendKey { addr: addr.parse().unwrap(), port, protocol: Protocol::Tcp },
        entry: Service { kind, flags: entry.flags | service_flags::MAGLEV, ..entry },
    };
    let of = |id, window| Service { id, port: id, internal: window, external: window, ..Service::default() };
    let restricted = Service { flags: service_flags::SOURCE_RANGES, ..of(4, here) };
    let mut ops = vec![
        backend(Family::V4, 3, "10.1.0.3:8080", backend_flags::LOCAL),
        backend(Family::V4, 4, "192.0.2.99:8080", 0),
        backend(Family::V6, 3, "[fd00:1::3]:8080", backend_flags::LOCAL),
        Op::WriteSlots { base: 1, slots: vec![3, 4] },
        frontend("10.96.0.1", 80, frontend_kind::CLUSTER_IP, of(1, here)),
        frontend("10.96.0.2", 80, frontend_kind::CLUSTER_IP, of(2, there)),
        frontend("10.96.0.3", 80, frontend_kind::CLUSTER_IP, of(3, none)),
        frontend("fd00:96::1", 80, frontend_kind::CLUSTER_IP, of(1, here)),
        frontend("0.0.0.0", 30001, frontend_kind::NODE_PORT, of(1, here)),
        frontend("0.0.0.0", 30002, frontend_kind::NODE_PORT, of(2, there)),
        frontend("0.0.0.0", 30004, frontend_kind::NODE_PORT, restricted),
        Op::SetSource { service: 4, net: "203.0.113.0/24".parse().unwrap() },
        Op::SetAddress { addr: NODE.parse().unwrap(), flags: address_flags::NODE | address_flags::NODE_PORT },
    ];
    for addr in ["10.96.0.1", "10.96.0.2", "10.96.0.3", "fd00:96::1"] {
        ops.push(Op::SetAddress { addr: addr.parse().unwrap(), flags: address_flags::SERVICE });
    }
    for (service, name) in [(1, "here"), (2, "there"), (3, "nowhere"), (4, "some")] {
        let owner = ServiceName { namespace: "shop".into(), name: name.into() }.into();
        ops.push(Op::SetName { service, owner });
    }
    ops
}

fn ask(bpffs: &Path, from: &str, to: &str) -> Result<Trace, TraceError> {
    trace(&Question {
        bpffs: bpffs.to_owned(),
        from: from.parse().unwrap(),
        to: to.parse().unwrap(),
        namespace: "shop".into(),
        via: None,
    })
}

/// Hooks, reasons and whether the packet was rewritten.
fn steps(trace: &Trace) -> Vec<(&str, &str, bool)> {
    trace.request.iter().map(|step| (step.hook, step.reason, step.after.is_some())).collect()
}

fn backend(trace: &Trace) -> Option<String> {
    trace.backend.as_ref().map(|backend| format!("{}:{}", backend.address, backend.port))
}

/// Bytes of a map's entries.
type Entries = Vec<(Vec<u8>, Vec<u8>)>;

/// What is behind the pins of the maps that programs write, and of the most that they read, byte for byte.
fn contents(bpffs: &TempBpffs) -> Vec<(&'static str, Entries)> {
    const KEY: [usize; 2] = [size_of::<FlowKey<Addr4>>(), size_of::<FlowKey<Addr6>>()];
    const FLOW: [usize; 2] = [size_of::<Flow<Addr4>>(), size_of::<Flow<Addr6>>()];
    const AFFINITY: usize = size_of::<Affinity>();
    type Read = fn(&Path) -> Entries;

    let dir = bpffs.pins().join(format!("v{LAYOUT_VERSION}"));
    let maps: [(_, Read); 12] = [
        ("FLOWS4", entries::<{ KEY[0] }, { FLOW[0] }>),
        ("FLOWS6", entries::<{ KEY[1] }, { FLOW[1] }>),
        ("PENDING4", entries::<{ KEY[0] }, { FLOW[0] }>),
        ("PENDING6", entries::<{ KEY[1] }, { FLOW[1] }>),
        ("AFFINITY4", entries::<8, AFFINITY>),
        ("AFFINITY6", entries::<20, AFFINITY>),
        ("SOCKETS", entries::<{ size_of::<SocketKey>() }, { size_of::<SocketPeer>() }>),
        ("SERVICES4", entries::<8, { size_of::<Service>() }>),
        ("BACKENDS4", entries::<4, { size_of::<Backend<Addr4>>() }>),
        ("SLOTS", entries::<4, 4>),
        ("ADDRESSES4", entries::<4, 4>),
        ("EDGES", entries::<4, { size_of::<Edge>() }>),
    ];
    let mut all: Vec<_> = maps.into_iter().map(|(name, read)| (name, read(&dir.join(name)))).collect();
    let inspector = Inspector::open(&bpffs.pins()).unwrap();
    let counted = format!("{:?} {:?}", inspector.counters().unwrap(), inspector.services().unwrap());
    all.push(("COUNTERS and USAGE", vec![(counted.into_bytes(), vec![])]));
    all
}

fn assert_unchanged(bpffs: &TempBpffs, before: &[(&'static str, Entries)]) {
    for (now, then) in contents(bpffs).iter().zip(before) {
        assert!(now == then, "{} changed", now.0);
    }
}

fn entries<const K: usize, const V: usize>(map: &Path) -> Entries {
    #[derive(Clone, Copy)]
    #[repr(transparent)]
    struct Bytes<const N: usize>([u8; N]);
    // SAFETY: bytes.
    unsafe impl<const N: usize> Pod for Bytes<N> {}
    let fd = bpf::obj_get(map).unwrap();
    let mut all = Vec::new();
    let mut cursor = None;
    loop {
        let (found, next) = bpf::map_lookup_batch::<Bytes<K>, Bytes<V>>(fd.as_fd(), cursor, 4096).unwrap();
        all.extend(found.into_iter().map(|(key, value)| (key.0.to_vec(), value.0.to_vec())));
        let Some(next) = next else { break };
        cursor = Some(next);
    }
    all.sort();
    all
}

#[test]
fn a_client_outside_is_led_to_a_pod_here_and_back() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        node(&bpffs.serving(), |_| ());
        let found = ask(&bpffs.pins(), CLIENT, "192.0.2.10:30001").unwrap();
        assert_eq!((found.edge, found.device.as_deref()), ("external", Some("nic0")));
        assert_eq!(steps(&found), [("nic_in", "translated", true)]);
        assert_eq!(backend(&found).as_deref(), Some("10.1.0.3:8080"));
        let after = found.request[0].after.unwrap();
        assert_eq!(after.source().to_string(), "198.51.100.7:40000", "the client is kept");
        assert_eq!(after.destination().to_string(), "10.1.0.3:8080");
        let frontend = found.frontend.unwrap();
        assert_eq!((frontend.kind.as_str(), frontend.address), ("NodePort", None));
        assert_eq!((frontend.name.as_deref(), frontend.scope), (Some("here"), "external"));
        let way = found.way.unwrap();
        assert_eq!((way.carry, way.device.as_deref()), ("stack", Some("vethpod")));
        assert_eq!((found.reply.len(), found.reply[0].hook, found.answered), (1, "nic_out", Some(true)));
        assert_eq!(found.action, "carry");
    });
}

#[test]
fn a_client_outside_is_sent_on_to_another_node() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        node(&bpffs.serving(), |_| ());
        let found = ask(&bpffs.pins(), CLIENT, "192.0.2.10:30002").unwrap();
        assert_eq!(steps(&found), [("nic_in", "forwarded", true)], "{found:?}");
        let after = found.request[0].after.unwrap();
        assert_eq!(
            (after.source.to_string(), after.destination.to_string()),
            (NODE.into(), "192.0.2.99".into())
        );
        let way = found.way.unwrap();
        assert_eq!((way.carry, way.device.as_deref()), ("forward", Some("nic0")));
        assert_eq!((found.reply[0].hook, found.answered), ("nic_in", Some(true)));
    });
}

#[test]
fn xdp_is_asked_before_tc() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        node(&bpffs.serving(), |datapath| {
            datapath.hooks().unwrap().attach_xdp(NIC, XdpKind::Native, None).map(drop).unwrap();
        });
        let here = ask(&bpffs.pins(), CLIENT, "192.0.2.10:30001").unwrap();
        let first = steps(&here)[0];
        if first.0 != "xdp" {
            assert!(here.notes.iter().any(|note| note.contains("XDP cannot be tried")), "{here:?}");
            return;
        }
        assert_eq!(first, ("xdp", "translated", true));
        assert_eq!((here.request.len(), here.reason, here.answered), (2, "translated", Some(true)));
        // The neighbour 192.0.2.99 is not known: XDP leaves the packet to tc.
        let there = ask(&bpffs.pins(), CLIENT, "192.0.2.10:30002").unwrap();
        assert_eq!(there.request.last().unwrap().reason, "forwarded", "{there:?}");
        assert_eq!(there.answered, Some(true));
    });
}

#[test]
fn a_pod_gets_its_backend_by_address_or_by_name() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        node(&bpffs.serving(), |_| ());
        for to in ["10.96.0.1:80", "svc/here", "svc/here:80/tcp"] {
            let found = ask(&bpffs.pins(), POD, to).unwrap();
            assert_eq!((found.edge, found.device.as_deref()), ("pod", Some("vethpod")), "{to}");
            assert_eq!(steps(&found), [("pod_in", "translated", true)], "{to}");
            assert_eq!(backend(&found).as_deref(), Some("10.1.0.3:8080"), "{to}");
            assert_eq!(found.frontend.as_ref().unwrap().scope, "internal", "{to}");
            assert_eq!((found.reply[0].hook, found.answered), ("pod_out", Some(true)), "{to}");
        }
        let six = ask(&bpffs.pins(), "fd00:1::9", "[fd00:96::1]:80").unwrap();
        assert_eq!(six.request[0].after.unwrap().destination().to_string(), "[fd00:1::3]:8080");
        assert_eq!(six.answered, Some(true));
        let itself = ask(&bpffs.pins(), "10.1.0.3", "10.96.0.1:80").unwrap();
        assert_eq!((steps(&itself)[0], itself.answered), (("pod_in", "hairpinned", true), Some(true)));
        let process = ask(&bpffs.pins(), "node", "svc/here").unwrap();
        assert_eq!((process.edge, steps(&process)[0].0), ("socket", "connect"));
        assert_eq!(backend(&process).as_deref(), Some("10.1.0.3:8080"));
    });
}

#[test]
fn what_is_not_carried_is_told_with_its_reason() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        node(&bpffs.serving(), |_| ());
        for (from, to, action, reason) in [
            (POD, "10.96.0.3:80", "reject", "no_endpoints"),
            ("node", "10.96.0.3:80", "reject", "no_endpoints"),
            (POD, "10.96.0.1:81", "reject", "unknown_port"),
            (POD, "10.96.0.1:80/sctp", "reject", "unknown_port"),
            (POD, "10.96.0.1:80/udp", "reject", "unknown_port"),
            (CLIENT, "192.0.2.10:22", "pass", "not_ours"),
            (CLIENT, "192.0.2.10:30004", "drop", "source_not_allowed"),
        ] {
            let found = ask(&bpffs.pins(), from, to).unwrap();
            assert_eq!((found.action, found.reason), (action, reason), "{from} {to}");
            assert_eq!((found.backend, found.answered), (None, None), "{from} {to}");
        }
        let allowed = ask(&bpffs.pins(), "203.0.113.5", "192.0.2.10:30004").unwrap();
        assert_eq!(allowed.reason, "translated");
        let error = |from, to| ask(&bpffs.pins(), from, to).unwrap_err().to_string();
        assert_eq!(
            error(POD, "svc/other"),
            "no frontend of Service shop/other with TCP; see `fairlead services`"
        );
        assert!(error(POD, "[fd00:96::1]:80").contains("not of one IP family"));
    });
}

#[test]
fn a_live_flow_speaks_for_its_packets_and_nothing_live_changes() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        let (pod, vip) = (testing::at(POD, 40000), testing::at("10.96.0.1", 80));
        node(&bpffs.serving(), |datapath| {
            let backend = testing::at("10.1.0.3", 8080);
            for (place, from, to, flags) in [
                (Place::PodIn, pod, vip, tcp_flags::SYN),
                (Place::PodOut, backend, pod, tcp_flags::SYN | tcp_flags::ACK),
                (Place::PodIn, pod, vip, tcp_flags::ACK),
            ] {
                let frame = testing::tcp(from, to, flags);
                let input = Input { ifindex: VETH, ..Input::new(&frame) };
                test_run(datapath.programs(), place, input).unwrap();
            }
            // The backend is no endpoint any more, but the connection goes on to it.
            let window = Window { base: 2, len: 1 };
            let key = FrontendKey { addr: vip.ip(), port: 80, protocol: Protocol::Tcp };
            let service = Service {
                id: 1,
                port: 1,
                kind: frontend_kind::CLUSTER_IP,
                flags: service_flags::MAGLEV,
                internal: window,
                external: window,
                affinity: 600,
                ..Service::default()
            };
            datapath.maps().unwrap().apply(&[Op::SetFrontend { key, entry: service }]).unwrap();
        });
        let before = contents(&bpffs);
        assert!(before.iter().any(|(name, entries)| *name == "FLOWS4" && entries.len() == 2));

        let live = ask(&bpffs.pins(), POD, "10.96.0.1:80").unwrap();
        assert_eq!((live.flow, live.answered), ("established", Some(true)));
        assert_eq!(backend(&live).as_deref(), Some("10.1.0.3:8080"));
        let new = ask(&bpffs.pins(), "10.1.0.9:40001", "10.96.0.1:80").unwrap();
        assert_eq!((new.flow, backend(&new).as_deref()), ("new", Some("192.0.2.99:8080")));
        assert_unchanged(&bpffs, &before);
    });
}

#[test]
fn a_new_flow_makes_way_for_a_live_one() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        node(&bpffs.serving(), |datapath| {
            let from = testing::at("203.0.113.5", 40000);
            let frame = testing::tcp(from, testing::at(NODE, 30001), tcp_flags::SYN);
            let input = Input { ifindex: NIC, ..Input::new(&frame) };
            test_run(datapath.programs(), Place::NicIn, input).unwrap();
        });
        let before = contents(&bpffs);
        // Another frontend of the same backend: its answers would look the same.
        let found = ask(&bpffs.pins(), "203.0.113.5:40000", "192.0.2.10:30004").unwrap();
        assert_eq!((found.flow, found.answered), ("new", Some(true)));
        assert_ne!(found.request[0].after.unwrap().source_port, 40000);
        let pending = ask(&bpffs.pins(), "203.0.113.5:40000", "192.0.2.10:30001").unwrap();
        assert_eq!((pending.flow, pending.answered), ("pending", Some(true)));
        let free = ask(&bpffs.pins(), "203.0.113.5:40001", "192.0.2.10:30004").unwrap();
        assert_eq!(free.request[0].after.unwrap().source_port, 40001);
        assert_unchanged(&bpffs, &before);
    });
}

#[test]
fn the_programs_settings_are_theirs() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        node(&Options { masquerade_all: true, ..bpffs.serving() }, |datapath| {
            let pods =
                Edge { flags: edge_flags::POD, addr4: Addr4 { octets: [10, 1, 0, 1] }, ..Edge::default() };
            datapath.edges_map().unwrap().insert(VETH, pods, 0).unwrap();
        });
        let found = ask(&bpffs.pins(), POD, "10.96.0.2:80").unwrap();
        assert_eq!(found.request[0].after.unwrap().source.to_string(), NODE, "{found:?}");
        assert_eq!(found.answered, Some(true));
    });
}
