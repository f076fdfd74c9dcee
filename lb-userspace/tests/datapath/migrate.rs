//! From one layout of the maps to another and back, whole and interrupted.

use std::collections::BTreeMap;
use std::fs;
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::path::Path;

use aya::maps::{HashMap, Map, MapData};
use fairlead::datapath::pins::Pins;
use fairlead::datapath::{
    Change, Datapath, Known, Layout, Maps, OpenError, Options, Place, Step, TcMode, XdpKind,
};
use fairlead::entries::{BackendEntry, Family, Op};
use fairlead::sys::bpf;
use lb_common::abi::{Addr4, Flow, FlowKey, Side, backend_state};
use lb_common::maps::{LAYOUT_VERSION, MAPS};

use crate::support::{TempBpffs, TempCgroup, has_tcx, in_new_netns, ip, run};

const OURS: u32 = LAYOUT_VERSION;
const NEXT: u32 = LAYOUT_VERSION + 1;
const FLOWS: u16 = 500;

fn options(bpffs: &TempBpffs, layout: Layout) -> Options {
    Options { layout, ..bpffs.options() }
}

fn flows(map: &MapData) -> HashMap<MapData, FlowKey<Addr4>, Flow<Addr4>> {
    let fd = map.fd().as_fd().try_clone_to_owned().unwrap();
    Map::from_map_data(MapData::from_fd(fd).unwrap()).unwrap().try_into().unwrap()
}

fn key(port: u16) -> FlowKey<Addr4> {
    let [src, dst] = [1, 2].map(|low| Addr4 { octets: [10, 0, 0, low] });
    FlowKey { src, dst, src_port: port, dst_port: 80, proto: 6, side: Side::NicIn as u8, pad: 0 }
}

fn flow(port: u16, generation: u32, last_seen: u64) -> Flow<Addr4> {
    Flow { last_seen, backend: 1, generation, dst_port: port, ..Flow::default() }
}

fn map(datapath: &Datapath, name: &str) -> MapData {
    datapath.map_data(MAPS.iter().find(|spec| spec.name == name).unwrap()).unwrap()
}

fn map_id(pins: &Pins, name: &str) -> u32 {
    bpf::map_info(bpf::obj_get(&pins.map(name)).unwrap().as_fd()).unwrap().id
}

/// What is on the hooks, by the names of the links.
fn links(pins: &Pins) -> BTreeMap<String, u32> {
    let entries = fs::read_dir(pins.links()).unwrap().map(|entry| entry.unwrap().path());
    let info = |path: &Path| bpf::link_info(bpf::obj_get(path).unwrap().as_fd()).unwrap();
    entries
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), info(&path).prog_id))
        .collect()
}

/// Directories of layouts, and what is left of them.
fn layouts(bpffs: &TempBpffs) -> Vec<String> {
    let entries = fs::read_dir(bpffs.pins()).unwrap().map(|entry| entry.unwrap().path());
    let dirs = entries.filter(|path| path.is_dir());
    let mut names: Vec<_> = dirs.map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

/// A node with programs on two devices and a cgroup, a backend, and flows to it.
fn begin(bpffs: &TempBpffs, cgroup: &TempCgroup) {
    for (name, peer, index) in [("nic0", "far0", 77), ("pod0", "far1", 78)] {
        ip(&format!("link add {name} index {index} type veth peer name {peer}"));
        ip(&format!("link set {name} up"));
    }
    let datapath = Datapath::open(&options(bpffs, Layout::OURS)).unwrap();
    let hooks = datapath.hooks().unwrap();
    if has_tcx("the switch of tcx links") {
        for (ifindex, places) in [(77, [Place::NicIn, Place::NicOut]), (78, [Place::PodIn, Place::PodOut])] {
            for place in places {
                hooks.attach_tcx(ifindex, place).unwrap();
            }
        }
    }
    hooks.attach_xdp(77, XdpKind::Native, None).unwrap();
    hooks.attach_sockets(Some(&cgroup.path)).unwrap();
    let addr = "10.1.0.1:8080".parse().unwrap();
    let entry = BackendEntry { addr, state: backend_state::ACTIVE, flags: 0, generation: 7 };
    datapath.maps().unwrap().apply(&[Op::SetBackend { family: Family::V4, id: 1, entry }]).unwrap();
    let mut table = flows(&map(&datapath, "FLOWS4"));
    for port in 1..=FLOWS {
        table.insert(key(port), flow(port, 7, port.into()), 0).unwrap();
    }
}

/// Everything is in the directory of `datapath`, works together, and was carried over.
fn check(bpffs: &TempBpffs, datapath: &Datapath, before: &BTreeMap<String, u32>, what: &str) {
    let pins = datapath.pins().unwrap();
    assert_eq!(layouts(bpffs), [pins.dir().file_name().unwrap().to_str().unwrap()], "{what}");
    let now = links(pins);
    assert!(now.keys().eq(before.keys()), "{what}: {now:?}, not {before:?}");
    let generation = datapath.maps().unwrap().read().unwrap().backends[&(Family::V4, 1)].generation;
    let table = flows(&map(datapath, "FLOWS4"));
    for port in 1..=FLOWS {
        let have = table.get(&key(port), 0).unwrap();
        assert_eq!(have, flow(port, generation, port.into()), "{what}");
    }
    assert_eq!(table.keys().count(), usize::from(FLOWS), "{what}");
}

/// The links have the programs of `datapath`.
fn check_programs(datapath: &Datapath) {
    for (name, program) in links(datapath.pins().unwrap()) {
        let expected = datapath.programs().get(name.rsplit_once('-').map_or(&name, |(name, _)| name));
        assert_eq!(program, bpf::prog_info(expected.unwrap()).unwrap().id, "{name}");
    }
}

#[test]
fn a_layout_that_is_not_known_is_refused_and_nothing_is_touched() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        let cgroup = TempCgroup::new();
        begin(&bpffs, &cgroup);
        let newer = bpffs.pins().join("v4000000000");
        fs::rename(bpffs.pins().join(format!("v{OURS}")), &newer).unwrap();
        let before = (bpffs.files(), links(&Pins::of_version(&bpffs.pins(), 4_000_000_000)));
        for layout in [Layout::OURS, Layout::REHEARSAL] {
            let error = Datapath::open(&options(&bpffs, layout)).err().unwrap().to_string();
            let told = format!("{} has maps of a layout that this version does not know", newer.display());
            assert!(error.starts_with(&told) && !error.contains('\n'), "{error}");
            assert_eq!(before, (bpffs.files(), links(&Pins::of_version(&bpffs.pins(), 4_000_000_000))));
            assert_eq!(layouts(&bpffs), ["v4000000000"]);
        }
    });
}

#[test]
fn an_upgrade_goes_on_after_any_step() {
    interrupt(&[Step::Loaded, Step::Moved, Step::Begun, Step::Settled, Step::Retired], true);
}

#[test]
fn an_upgrade_is_taken_back_after_any_step() {
    interrupt(&[Step::Carried, Step::Begun, Step::Switched], false);
}

/// Ends migrations after these steps, now in one direction and then in the other. The next start goes the same way
/// on, or the other way back.
fn interrupt(steps: &'static [Step], onward: bool) {
    in_new_netns(move || {
        let bpffs = TempBpffs::new();
        let cgroup = TempCgroup::new();
        begin(&bpffs, &cgroup);
        let ours = Pins::of_version(&bpffs.pins(), OURS);
        let before = links(&ours);
        assert!(before.len() >= 9, "{before:?}");
        let shared = map_id(&ours, "SERVICES4");
        let mut at = OURS;
        for step in steps {
            let [there, here] = if at == OURS {
                [Layout::REHEARSAL, Layout::RETURN]
            } else {
                [Layout::RETURN, Layout::REHEARSAL]
            };
            let stopped = Datapath::open(&options(&bpffs, Layout { stop_after: Some(*step), ..there })).err();
            assert!(matches!(stopped, Some(OpenError::Stopped(at)) if at == *step), "{step:?}: {stopped:?}");
            // Every hook has its program, and the pin of its link is in one of both directories.
            let of = |version| {
                let pins = Pins::of_version(&bpffs.pins(), version);
                if pins.links().exists() { links(&pins) } else { BTreeMap::new() }
            };
            let on_hooks: Vec<String> = of(OURS).into_keys().chain(of(NEXT).into_keys()).collect();
            assert_eq!(on_hooks.len(), before.len(), "{step:?}: {on_hooks:?}");
            let layout = if onward { there } else { here };
            let datapath = Datapath::open(&options(&bpffs, layout)).unwrap();
            at = layout.version;
            check(&bpffs, &datapath, &before, &format!("{step:?}, then v{at}"));
            // With nothing left to do, the links are for the agent to give new programs to, as always.
            let idle = if onward { Step::Retired } else { Step::Carried };
            if *step != idle {
                check_programs(&datapath);
            }
            assert_eq!(map_id(datapath.pins().unwrap(), "SERVICES4"), shared, "{step:?}");
        }
    });
}

#[test]
fn clsact_filters_are_given_to_the_new_programs() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        ip("link add pod0 index 78 type veth peer name far1");
        let clsact = |layout| Options { tc: TcMode::Clsact, ..options(&bpffs, layout) };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let datapath = Datapath::open(&clsact(Layout::OURS)).unwrap();
            let (connection, netlink, _) = rtnetlink::new_connection().unwrap();
            tokio::spawn(connection);
            for place in [Place::PodIn, Place::PodOut] {
                datapath.hooks().unwrap().attach_clsact(&netlink, 78, place).await.unwrap();
            }
        });
        // As it is for the agent: inside of a runtime.
        let datapath = runtime.block_on(async { Datapath::open(&clsact(Layout::REHEARSAL)).unwrap() });
        for (place, direction) in [(Place::PodIn, "ingress"), (Place::PodOut, "egress")] {
            let program = datapath.programs().get(place.program()).unwrap();
            let id = format!(" id {} ", bpf::prog_info(program).unwrap().id);
            let shown = run("tc", &format!("filter show dev pod0 {direction}"));
            assert!(shown.contains(&id) && shown.matches(" id ").count() == 1, "{id}: {shown}");
        }
        assert_eq!(layouts(&bpffs), [format!("v{NEXT}")]);
    });
}

/// Flows of an imagined layout before ours: the protocol and the ports first, a value of 12 bytes, and keys that
/// are longer.
const FORMER: Known = Known {
    version: OURS - 1,
    changes: &[Change {
        map: "FLOWS4",
        key_size: 20,
        value_size: 12,
        convert: Some(from_former),
        last_seen: None,
    }],
};

fn former_key(port: u16) -> [u8; 20] {
    let mut key = [0; 20];
    key[0] = 6;
    key[2..4].copy_from_slice(&port.to_ne_bytes());
    key
}

fn from_former(former: &[u8], value: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let port = u16::from_ne_bytes([former[2], former[3]]);
    // Odd ports are of no use any more.
    if port % 2 == 1 {
        return None;
    }
    let key = key(port);
    let generation = u32::from_ne_bytes(*value.first_chunk()?);
    let mut bytes = vec![0; size_of::<Flow<Addr4>>()];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(offset_of!(Flow<Addr4>, backend), &1_u32.to_ne_bytes());
    put(offset_of!(Flow<Addr4>, generation), &generation.to_ne_bytes());
    put(offset_of!(Flow<Addr4>, dst_port), &port.to_ne_bytes());
    let ports = [key.src_port, key.dst_port].map(u16::to_ne_bytes).concat();
    Some(([&key.src.octets[..], &key.dst.octets, &ports, &[key.proto, key.side, 0, 0]].concat(), bytes))
}

#[test]
fn entries_of_other_sizes_are_converted_and_those_of_unknown_ones_refused() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        let former = bpffs.pins().join(format!("v{}", OURS - 1));
        fs::create_dir_all(&former).unwrap();
        let mut table = HashMap::<_, [u8; 20], [u8; 12]>::create(100, 0).unwrap();
        for port in 1..=40 {
            let mut value = [0; 12];
            value[0] = 9;
            table.insert(former_key(port), value, 0).unwrap();
        }
        table.pin(former.join("FLOWS4")).unwrap();
        // One that is the same must be the same.
        let wrong = HashMap::<_, u32, u32>::create(256, 1).unwrap();
        wrong.pin(former.join("SERVICES4")).unwrap();
        let layout = Layout { version: OURS, known: &[FORMER], stop_after: None };
        let error = Datapath::open(&options(&bpffs, layout)).err().unwrap().to_string();
        assert!(error.contains("SERVICES4") && error.contains("key size 4 instead of 8"), "{error}");
        assert_eq!(layouts(&bpffs), [format!("v{}", OURS - 1)]);
        fs::remove_file(former.join("SERVICES4")).unwrap();

        let datapath = Datapath::open(&options(&bpffs, layout)).unwrap();
        assert_eq!(layouts(&bpffs), [format!("v{OURS}")]);
        let table = flows(&map(&datapath, "FLOWS4"));
        for port in (2..=40).step_by(2) {
            assert_eq!(table.get(&key(port), 0).unwrap(), flow(port, 9, 0));
        }
        assert_eq!(table.keys().count(), 20);
    });
}
