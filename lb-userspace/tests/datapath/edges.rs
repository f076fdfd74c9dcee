//! Devices come, change and go; programs and the map `EDGES` follow.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use aya::maps::{HashMap, MapData};
use fairlead::datapath::node::StateFile;
use fairlead::datapath::{Datapath, Options, TcMode, XdpKind, cleanup};
use fairlead::edges::{Config, EDGES, Edges, Reattached, Repairs, Rules, View, XdpMode};
use fairlead::sys::bpf::{self, LinkTarget};
use lb_common::abi::{Addr4, Edge, edge_flags};

use crate::support::{OtherNetns, TempBpffs, eventually, has_tcx, in_new_netns, ip, run};

pub(crate) struct Agent {
    edges: Edges,
    reattached: Reattached,
    repairs: Repairs,
    map: HashMap<MapData, u32, Edge>,
    _datapath: Datapath,
}

pub(crate) fn start(bpffs: &TempBpffs, tc: TcMode, devices: &[&str], xdp: XdpMode) -> Agent {
    let datapath = Datapath::open(&Options { tc, ..bpffs.options() }).unwrap();
    start_on(bpffs, datapath, devices, xdp, None)
}

pub(crate) fn start_on(
    bpffs: &TempBpffs,
    datapath: Datapath,
    devices: &[&str],
    xdp: XdpMode,
    cgroup: Option<&Path>,
) -> Agent {
    let (reattached, repairs) = (Reattached::default(), Repairs::default());
    let sockets = cgroup.map(|path| datapath.hooks().unwrap().attach_sockets(Some(path)).unwrap());
    let devices: Vec<String> = devices.iter().map(|name| (*name).to_owned()).collect();
    let edges = Edges::spawn(Config {
        masquerade_all: false,
        hooks: datapath.hooks().unwrap(),
        map: datapath.edges_map().unwrap(),
        sources: datapath.edge_sources_map().unwrap(),
        macs: datapath.macs_map().unwrap(),
        source_networks: vec![],
        rules: Rules::new(&devices, &[]).unwrap(),
        xdp,
        sockets,
        state: StateFile::new(&bpffs.pins()),
        reattached: reattached.clone(),
        repairs: repairs.clone(),
    })
    .unwrap();
    Agent { edges, reattached, repairs, map: datapath.edges_map().unwrap(), _datapath: datapath }
}

impl Agent {
    pub(crate) fn view(&self) -> View {
        let view = self.edges.view();
        eventually("the first look at all devices", || view.borrow().is_some());
        let view = view.borrow();
        View::clone(view.as_ref().unwrap())
    }

    /// Edges as `NAME ROLE`.
    fn roles(&self) -> Vec<String> {
        self.view().edges.iter().map(|edge| format!("{} {}", edge.device, edge.role)).collect()
    }

    pub(crate) fn settle_on(&self, roles: &[&str]) {
        eventually(&format!("{roles:?}, last {:?}", self.roles()), || self.roles() == roles);
    }

    /// How often a program was put back.
    pub(crate) fn reattached(&self, program: &'static str) -> u64 {
        self.reattached.family().get_or_create(&[("program", program)]).get()
    }

    /// Entries of `EDGES` that were mended.
    fn repairs(&self) -> u64 {
        self.repairs.get_or_create(&[("map", EDGES)]).get()
    }

    pub(crate) fn entries(&self) -> BTreeMap<u32, Edge> {
        self.map.iter().map(Result::unwrap).collect()
    }
}

/// Names of the links that are pinned.
pub(crate) fn links(bpffs: &TempBpffs) -> Vec<String> {
    let prefix = "agent/v1/links/";
    bpffs.files().iter().filter_map(|file| file.strip_prefix(prefix)).map(str::to_owned).collect()
}

/// Those of `names` that are links on this kernel: tc programs are not without tcx.
fn expected(names: &[&str]) -> Vec<String> {
    let tcx = has_tcx("links of tc programs");
    names.iter().filter(|name| tcx || !name.starts_with("tc_")).map(|name| (*name).to_owned()).collect()
}

pub(crate) fn run_cleanup(path: &Path) -> Vec<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(cleanup(path)).unwrap()
}

pub(crate) fn uplink() {
    ip("link add eth0 index 100 type veth peer name far0");
    ip("link set far0 up");
    ip("link set eth0 up");
    ip("addr add 192.0.2.7/24 dev eth0");
}

#[test]
fn pods_are_followed_through_their_lives() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        uplink();
        let agent = start(&bpffs, TcMode::Auto, &[], XdpMode::Auto);
        agent.settle_on(&["eth0 external"]);
        assert_eq!(links(&bpffs), expected(&["tc_nic_in-100", "tc_nic_out-100"]));
        assert_eq!(agent.entries()[&100].addr4, Addr4 { octets: [192, 0, 2, 7] });
        assert_eq!(agent.entries()[&100].flags, 0);

        ip("link add vethpod index 200 type veth peer name eth0p");
        ip("link set eth0p up");
        assert_eq!(agent.roles(), ["eth0 external"], "a device that is down is no edge yet");
        ip("link set vethpod up");
        agent.settle_on(&["eth0 external", "vethpod pod"]);
        assert!(expected(&["tc_pod_in-200"]).iter().all(|link| links(&bpffs).contains(link)));
        assert!(!agent.entries().contains_key(&200));

        let rename = ["link", "set", "vethpod", "name", "cali1"];
        if !Command::new("ip").args(rename).status().unwrap().success() {
            // Before 6.2 (commit bd039b5ea2a9) only a device that is down has its name changed.
            ip("link set vethpod down");
            ip(&rename.join(" "));
            ip("link set cali1 up");
        }
        agent.settle_on(&["eth0 external", "cali1 pod"]);
        ip("link del cali1");
        agent.settle_on(&["eth0 external"]);
        assert_eq!(links(&bpffs), expected(&["tc_nic_in-100", "tc_nic_out-100"]));
    });
}

#[test]
fn addresses_are_followed() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        uplink();
        let agent = start(&bpffs, TcMode::Auto, &[], XdpMode::Auto);
        agent.settle_on(&["eth0 external"]);
        let has = |agent: &Agent, addr: &str| {
            agent.view().addresses.iter().any(|address| address.addr.to_string() == addr)
        };
        assert!(has(&agent, "127.0.0.1") && has(&agent, "::1") && has(&agent, "192.0.2.7"));
        ip("addr add 2001:db8::7/64 dev eth0 nodad");
        eventually("the new address", || has(&agent, "2001:db8::7"));
        eventually("the source for IPv6", || agent.entries()[&100].addr6.octets[..4] == [0x20, 1, 0xd, 0xb8]);
        ip("addr add 192.0.2.8/24 dev eth0");
        eventually("the secondary address", || has(&agent, "192.0.2.8"));
        assert_eq!(agent.entries()[&100].addr4, Addr4 { octets: [192, 0, 2, 7] });
        ip("addr del 192.0.2.7/24 dev eth0");
        eventually("the address is gone", || !has(&agent, "192.0.2.7"));

        ip("addr flush dev eth0");
        agent.settle_on(&[]);
        eventually("the entry is gone", || agent.entries().is_empty());
        assert_eq!(links(&bpffs), Vec::<String>::new());
    });
}

#[test]
fn an_edge_that_somebody_deletes_comes_back() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        uplink();
        let mut agent = start(&bpffs, TcMode::Auto, &["eth0"], XdpMode::Off);
        agent.settle_on(&["eth0 external"]);
        let before = agent.entries();
        agent.map.remove(&100).unwrap();
        agent.map.insert(999, before[&100], 0).unwrap();
        eventually("the edge comes back, and the strange one goes", || agent.entries() == before);
        assert_eq!(agent.repairs(), 2);
    });
}

#[test]
fn a_device_that_moves_away_takes_no_program_along() {
    if !has_tcx("devices that move away") {
        return;
    }
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        uplink();
        let agent = start(&bpffs, TcMode::Auto, &[], XdpMode::Auto);
        ip("link add vethpod index 200 type veth peer name vethin index 201");
        ip("link set vethpod up");
        ip("link set vethin up");
        agent.settle_on(&["eth0 external", "vethpod pod", "vethin pod"]);
        // A pod's end is moved into its namespace after it was taken for a pod's device.
        let link = bpf::obj_get(&bpffs.pins().join("v1/links/tc_pod_in-201")).unwrap();
        let target = || bpf::link_info(link.as_fd()).unwrap().target;
        assert!(matches!(target(), LinkTarget::Tcx { ifindex: 201, .. }));
        let pod = OtherNetns::new();
        pod.take("vethin");
        agent.settle_on(&["eth0 external", "vethpod pod"]);
        eventually("its links are gone", || !links(&bpffs).contains(&"tc_pod_in-201".to_owned()));
        assert!(matches!(target(), LinkTarget::Tcx { ifindex: 0, .. }), "{:?}", target());
    });
}

#[test]
fn what_goes_while_no_agent_looks_is_cleaned_by_the_next() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        uplink();
        ip("link add vethpod index 200 type veth peer name eth0p");
        ip("link set vethpod up");
        let agent = start(&bpffs, TcMode::Auto, &[], XdpMode::Native);
        agent.settle_on(&["eth0 external", "vethpod pod"]);
        drop(agent);
        let pod_and_nic =
            ["tc_nic_in-100", "tc_nic_out-100", "tc_pod_in-200", "tc_pod_out-200", "xdp_nic-100"];
        assert_eq!(links(&bpffs), expected(&pod_and_nic));
        ip("link del vethpod");
        let agent = start(&bpffs, TcMode::Auto, &[], XdpMode::Off);
        agent.settle_on(&["eth0 external"]);
        let nic = expected(&["tc_nic_in-100", "tc_nic_out-100"]);
        eventually("old links are gone", || links(&bpffs) == nic);
        eventually("XDP is off", || !ip("-d link show eth0").contains("xdp"));
    });
}

#[test]
fn xdp_goes_where_it_is_asked_to_and_falls_back_with_a_reason() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        uplink();
        ip("link add br7 index 101 type bridge");
        ip("link set br7 up");
        let xdp = |mode, devices: &[&str]| {
            let agent = start(&bpffs, TcMode::Auto, devices, mode);
            let view = agent.view();
            view.edges
                .iter()
                .map(|edge| (edge.device.clone(), edge.xdp, edge.note.clone()))
                .collect::<Vec<_>>()
        };
        let auto = xdp(XdpMode::Auto, &["eth0", "br7"]);
        assert_eq!((auto[0].0.as_str(), auto[0].1), ("eth0", None));
        assert!(auto[0].2.as_ref().unwrap().contains("peer"), "{auto:?}");
        assert_eq!((auto[1].0.as_str(), auto[1].1), ("br7", None));
        // Drivers tell their XDP features since 6.3 (commit d3d854fd6a1d); before, it is found out by trying.
        let told = ["driver has no XDP", "driver does not support"];
        assert!(told.iter().any(|text| auto[1].2.as_ref().unwrap().contains(text)), "{auto:?}");
        let forced = xdp(XdpMode::Native, &["eth0", "br7"]);
        assert_eq!((forced[0].1, forced[1].1), (Some(XdpKind::Native), None));
        assert!(forced[1].2.as_ref().unwrap().contains("driver does not support"), "{forced:?}");

        assert_eq!(xdp(XdpMode::Native, &[])[0].1, Some(XdpKind::Native));
        assert!(ip("-d link show eth0").contains("prog/xdp"), "{}", ip("-d link show eth0"));
        assert_eq!(xdp(XdpMode::Generic, &[])[0].1, Some(XdpKind::Generic));
        assert!(ip("-d link show eth0").contains("xdpgeneric"), "{}", ip("-d link show eth0"));
        assert_eq!(xdp(XdpMode::Off, &[])[0].1, None);
    });
}

#[test]
fn a_veth_has_xdp_only_where_it_is_asked_for() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        uplink();
        // Its peer receives what XDP sends, but nothing wakes it.
        run("ethtool", "-K far0 gro on");
        let agent = start(&bpffs, TcMode::Auto, &[], XdpMode::Auto);
        assert_eq!(agent.view().edges[0].xdp, None, "{:?}", agent.view());
        drop(agent);
        let agent = start(&bpffs, TcMode::Auto, &[], XdpMode::Native);
        assert_eq!(agent.view().edges[0].xdp, Some(XdpKind::Native), "{:?}", agent.view());
        assert_eq!(agent.entries()[&100].flags & edge_flags::XDP_TRANSMIT, 0);
        drop(agent);
        let path = bpffs.pins().join("v1/links/xdp_nic-100");
        let link = |path: &Path| bpf::link_info(bpf::obj_get(path).unwrap().as_fd()).unwrap();
        let before = link(&path);

        let agent = start(&bpffs, TcMode::Auto, &[], XdpMode::Native);
        assert_eq!(agent.view().edges[0].xdp, Some(XdpKind::Native));
        let after = link(&path);
        assert_eq!(before.id, after.id, "a restart replaces the program in its link");
        assert_ne!(before.prog_id, after.prog_id);
    });
}

#[test]
fn clsact_serves_where_tcx_does_not() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        uplink();
        // Somebody else is there already and stays.
        ip("link add vethpod index 200 type veth peer name eth0p");
        ip("link set vethpod up");
        run("tc", "qdisc add dev vethpod clsact");
        run("tc", "filter add dev vethpod ingress prio 7 u32 match u32 0 0 flowid 1:1");
        // Fairlead's priority is taken by another classifier: one device fails, the other is served.
        let agent = start(&bpffs, TcMode::Clsact, &[], XdpMode::Auto);
        agent.settle_on(&["eth0 external", "vethpod pod"]);
        let notes: Vec<_> = agent.view().edges.iter().map(|edge| edge.note.is_some()).collect();
        assert!(notes[1], "{:?}", agent.view());
        run("tc", "filter del dev vethpod ingress prio 7");
        run("tc", "filter add dev vethpod ingress prio 3 u32 match u32 0 0 flowid 1:1");
        drop(agent);
        let agent = start(&bpffs, TcMode::Clsact, &[], XdpMode::Auto);
        agent.settle_on(&["eth0 external", "vethpod pod"]);
        let filters =
            |device: &str, direction: &str| run("tc", &format!("filter show dev {device} {direction}"));
        for (device, direction, name) in [
            ("eth0", "ingress", "fairlead/tc_nic_in"),
            ("eth0", "egress", "fairlead/tc_nic_out"),
            ("vethpod", "ingress", "fairlead/tc_pod_in"),
            ("vethpod", "egress", "fairlead/tc_pod_out"),
        ] {
            let text = filters(device, direction);
            assert_eq!(text.matches(name).count(), 1, "{text}");
            assert!(text.contains("direct-action"), "{text}");
        }
        assert_eq!(links(&bpffs), Vec::<String>::new());
        drop(agent);

        if has_tcx("the change from clsact to tcx and back") {
            // A kernel upgrade brings tcx: the filters must not stay beside it.
            let agent = start(&bpffs, TcMode::Auto, &[], XdpMode::Auto);
            agent.settle_on(&["eth0 external", "vethpod pod"]);
            eventually("filters are gone", || !filters("eth0", "ingress").contains("fairlead"));
            drop(agent);
            let agent = start(&bpffs, TcMode::Clsact, &[], XdpMode::Auto);
            agent.settle_on(&["eth0 external", "vethpod pod"]);
            eventually("links are gone", || links(&bpffs).is_empty());
            drop(agent);
        }

        let done = run_cleanup(&bpffs.pins());
        assert!(done.contains(&"clsact qdisc on eth0".to_owned()), "{done:?}");
        assert!(!run("tc", "qdisc show dev eth0").contains("clsact"));
        let kept = filters("vethpod", "ingress");
        assert!(kept.contains("u32") && !kept.contains("fairlead"), "{kept}");
        assert_eq!(filters("vethpod", "egress"), "");
        assert!(!bpffs.pins().exists());
    });
}

#[test]
fn a_burst_of_devices_is_followed() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        uplink();
        let agent = start(&bpffs, TcMode::Auto, &[], XdpMode::Auto);
        agent.settle_on(&["eth0 external"]);
        let mut batch = String::new();
        for i in 0..60 {
            writeln!(batch, "link add veth{i} type veth peer name p{i}\nlink set veth{i} up").unwrap();
        }
        let path = std::env::temp_dir().join(format!("fairlead-test-batch-{}", std::process::id()));
        std::fs::write(&path, batch).unwrap();
        ip(&format!("-batch {}", path.display()));
        std::fs::remove_file(&path).unwrap();
        eventually("60 pods", || agent.roles().iter().filter(|role| role.ends_with(" pod")).count() == 60);
        if has_tcx("links of 60 pods") {
            eventually("links of 60 pods", || links(&bpffs).len() == 2 + 2 * 60);
        }
    });
}
