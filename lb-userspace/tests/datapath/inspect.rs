//! What the command line reads from pinned maps, with no agent running.

use std::path::Path;

use fairlead::datapath::test_run::{Input, test_run};
use fairlead::datapath::{Datapath, Maps, Place, XdpKind};
use fairlead::entries::{BackendEntry, Family, FrontendKey, Op, Protocol, ServiceName};
use fairlead::inspect::{InspectError, Inspector};
use lb_common::abi::{
    Service, Window, address_flags, backend_flags, backend_state, frontend_kind, service_flags,
};

use crate::support::{TempBpffs, has_tcx, in_new_netns, ip};

/// Ethernet, IPv4 10.1.0.9 to 10.96.0.1, UDP 4000 to 53 with four bytes.
fn query() -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    frame.extend([0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, 10, 1, 0, 9, 10, 96, 0, 1]);
    frame.extend([0x0f, 0xa0, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4]);
    let sum: u32 = frame[14..34].chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from(folded).unwrap();
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    frame
}

fn dns() -> [Op; 6] {
    let backend = |id, addr: &str, flags, state| Op::SetBackend {
        family: Family::V4,
        id,
        entry: BackendEntry { addr: addr.parse().unwrap(), state, flags, generation: 1 },
    };
    [
        backend(3, "10.1.0.3:5353", backend_flags::LOCAL, backend_state::ACTIVE),
        backend(4, "10.1.0.4:5353", 0, backend_state::TERMINATING),
        Op::WriteSlots { base: 1, slots: vec![3, 3, 3] },
        Op::SetFrontend {
            key: FrontendKey { addr: "10.96.0.1".parse().unwrap(), port: 53, protocol: Protocol::Udp },
            entry: Service {
                id: 9,
                kind: frontend_kind::CLUSTER_IP,
                flags: service_flags::EXTERNAL_DROP,
                internal: Window { base: 1, len: 3 },
                ..Service::default()
            },
        },
        Op::SetName {
            service: 9,
            owner: ServiceName { namespace: "kube-system".into(), name: "dns".into() }.into(),
        },
        Op::SetAddress { addr: "10.96.0.1".parse().unwrap(), flags: address_flags::SERVICE },
    ]
}

#[test]
fn everything_is_read_from_pins_alone() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        ip("link add vethpod index 200 type veth peer name eth0p");
        let tcx = has_tcx("what is read of tcx links");
        {
            let datapath = Datapath::open(&bpffs.serving()).unwrap();
            datapath.maps().unwrap().apply(&dns()).unwrap();
            let hooks = datapath.hooks().unwrap();
            if tcx {
                hooks.attach_tcx(200, Place::PodIn).unwrap();
            } else {
                hooks.attach_xdp(200, XdpKind::Native, None).unwrap();
            }
            let frame = query();
            let input = Input { ifindex: 200, ..Input::new(&frame) };
            let output = test_run(datapath.programs(), Place::PodIn, input).unwrap();
            // Destination 10.1.0.3:5353.
            assert_eq!(output.frame[30..34], [10, 1, 0, 3]);
            assert_eq!(output.frame[36..38], 5353_u16.to_be_bytes());
        }
        let inspector = Inspector::open(&bpffs.pins()).unwrap();

        let services = serde_json::to_value(inspector.services().unwrap()).unwrap();
        assert_eq!(
            services,
            serde_json::json!([{
                "address": "10.96.0.1",
                "family": "IPv4",
                "port": 53,
                "protocol": "UDP",
                "kind": "ClusterIP",
                "service": 9,
                "owner": "Service",
                "namespace": "kube-system",
                "name": "dns",
                "service_port": 53,
                "algorithm": "random",
                "mode": "snat",
                "affinity_seconds": 0,
                "source_ranges": null,
                "internal": {
                    "policy": "Cluster",
                    "when_empty": "reject",
                    "window": 1,
                    "slots": 3,
                    "backends": [{ "id": 3, "address": "10.1.0.3", "port": 5353, "slots": 3 }],
                },
                "external": {
                    "policy": "Cluster", "when_empty": "drop", "window": 0, "slots": 0, "backends": [],
                },
                "usage": { "connections": 1, "packets": 1, "bytes": 32, "refused": 0 },
            }])
        );
        let arrays = inspector.fill_of_arrays().unwrap();
        let used: Vec<_> = arrays.iter().map(|view| (view.map, view.entries)).collect();
        assert_eq!(used, [("BACKENDS4", 2), ("BACKENDS6", 0), ("SLOTS", 3)]);
        let backends = serde_json::to_value(inspector.used_backends().unwrap()).unwrap();
        assert_eq!(backends[0]["services"][0]["name"], "dns");
        assert_eq!(backends[1]["services"], serde_json::json!([]));
        assert_eq!(backends[0]["local"], true);
        assert_eq!(backends[1]["state"], "terminating");

        let mut flows = Vec::new();
        inspector.flows(|flow| flows.push(flow)).unwrap();
        let forward = flows.iter().find(|flow| !flow.reply).unwrap();
        assert_eq!((forward.side, forward.state), ("pod_in", "pending"));
        assert_eq!(forward.destination.to_string(), "10.96.0.1");
        assert_eq!(
            (forward.new_destination.to_string().as_str(), forward.new_destination_port),
            ("10.1.0.3", 5353)
        );
        assert_eq!((forward.backend, forward.service), (3, 9));
        assert!(forward.idle_seconds < 60, "{forward:?}");
        let reply = flows.iter().find(|flow| flow.reply).unwrap();
        assert_eq!((reply.side, reply.new_source.to_string().as_str()), ("pod_out", "10.96.0.1"));

        let counters = inspector.counters().unwrap();
        let counter = counters.iter().find(|counter| counter.reason == "translated").unwrap();
        assert_eq!(
            (counter.hook, counter.action, counter.packets, counter.bytes),
            ("pod_in", "carry", 1, 32)
        );

        let links = inspector.links().unwrap();
        assert_eq!(links.len(), 1);
        let expected = if tcx { ("tc_pod_in", "tcx", true) } else { ("xdp_nic", "xdp", true) };
        assert_eq!((links[0].program.as_str(), links[0].kind, links[0].alive), expected);
        assert_eq!(links[0].device.as_deref(), Some("vethpod"));
        assert_eq!(inspector.programs().unwrap().len(), 13);
        let fill = inspector.fill().unwrap();
        let pending = fill.iter().find(|map| map.map == "PENDING4").unwrap();
        assert_eq!((pending.entries, pending.max_entries), (2, 4096));
        assert_eq!(inspector.edges().unwrap(), []);
        assert_eq!(inspector.sockets().unwrap(), []);
    });
}

#[test]
fn where_nothing_is_pinned_one_line_says_so() {
    let error = Inspector::open(Path::new("/sys/fs/bpf/fairlead-nobody")).err().unwrap();
    assert!(matches!(error, InspectError::NoDatapath { .. }), "{error}");
    assert!(!error.to_string().contains('\n'));
}
