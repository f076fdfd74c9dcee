//! A start with other sizes: what the maps hold stays.

use std::collections::BTreeMap;

use aya::maps::{HashMap, Map, MapData};
use fairlead::datapath::pins::Pins;
use fairlead::datapath::{Datapath, Layout, Maps, OpenError, Options, Sizes, Step};
use lb_common::abi::{Addr4, Flow, FlowKey};
use lb_common::maps::{MAPS, MapSpec};

use crate::maps::{backend, entries, key, service};
use crate::support::{TempBpffs, in_new_netns, small};

type Flows = HashMap<MapData, FlowKey<Addr4>, Flow<Addr4>>;

fn spec(name: &str) -> &'static MapSpec {
    MAPS.iter().find(|spec| spec.name == name).unwrap()
}

fn flows(datapath: &Datapath, name: &str) -> Flows {
    Map::from_map_data(datapath.map_data(spec(name)).unwrap()).and_then(Flows::try_from).unwrap()
}

fn flow_key(port: u16) -> FlowKey<Addr4> {
    FlowKey { src_port: port, ..FlowKey::default() }
}

/// A flow that was in use at this time, of this backend.
fn flow(last_seen: u64, backend: u32) -> Flow<Addr4> {
    Flow { last_seen, backend, ..Flow::default() }
}

/// Backends of the flows, by client port.
fn content(flows: &Flows) -> BTreeMap<u16, u32> {
    flows.iter().map(|entry| entry.unwrap()).map(|(key, flow)| (key.src_port, flow.backend)).collect()
}

fn open(bpffs: &TempBpffs, sizes: Sizes) -> Datapath {
    Datapath::open(&Options { sizes, ..bpffs.options() }).unwrap()
}

/// As if the start were killed there.
fn open_until(bpffs: &TempBpffs, sizes: Sizes, step: Step) {
    let layout = Layout { stop_after: Some(step), ..Layout::OURS };
    let stopped = Datapath::open(&Options { sizes, layout, ..bpffs.options() }).err();
    assert!(matches!(stopped, Some(OpenError::Stopped(at)) if at == step), "{step:?}: {stopped:?}");
}

/// Flows of IPv4 as they are pinned.
fn pinned_flows(bpffs: &TempBpffs) -> Flows {
    let path = Pins::new(&bpffs.pins()).map("FLOWS4");
    Map::from_map_data(MapData::from_pin(path).unwrap()).and_then(Flows::try_from).unwrap()
}

fn left_over(bpffs: &TempBpffs) -> Vec<String> {
    bpffs.files().into_iter().filter(|file| file.ends_with("-old") || file.ends_with("-new")).collect()
}

const NONE: Sizes = Sizes { flows: None, services: None, backends: None };
const LARGE: Sizes = Sizes { flows: Some(8192), services: Some(1000), backends: Some(2000) };

#[test]
fn larger_maps_have_what_the_smaller_had_and_what_came_meanwhile() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        let first = open(&bpffs, small());
        first.maps().unwrap().apply(&entries()).unwrap();
        let before = first.maps().unwrap().read().unwrap();
        let mut old = flows(&first, "FLOWS4");
        for port in 1..=500 {
            old.insert(flow_key(port), flow(port.into(), 1), 0).unwrap();
        }
        flows(&first, "PENDING4").insert(flow_key(7), flow(7, 1), 0).unwrap();
        drop(first);

        open_until(&bpffs, LARGE, Step::Switched);
        let mut new = pinned_flows(&bpffs);
        assert_eq!(content(&new), (1..=500).map(|port| (port, 1)).collect());
        assert!(left_over(&bpffs).contains(&"agent/v1/FLOWS4-old".to_owned()), "{:?}", left_over(&bpffs));

        // Programs that are still on a hook write to the old maps, and others to the new.
        let now = u64::MAX / 2;
        old.insert(flow_key(1000), flow(now, 2), 0).unwrap();
        old.insert(flow_key(1), flow(now, 3), 0).unwrap();
        old.insert(flow_key(2), flow(now, 3), 0).unwrap();
        new.insert(flow_key(2), flow(now + 1, 4), 0).unwrap();
        let second = open(&bpffs, NONE);
        let mut maps = second.maps().unwrap();
        let limits = maps.limits();
        assert_eq!((limits.services, limits.backends, limits.slots), (1000, 2000, 32_000));
        assert_eq!(maps.read().unwrap(), before);
        assert_eq!(content(&flows(&second, "PENDING4")), BTreeMap::from([(7, 1)]));
        let now = content(&new);
        // Whoever starts anew cannot know which flows have ended.
        assert_eq!((now.len(), now[&1000], now[&1], now[&2]), (501, 2, 3, 4));
        assert_eq!(left_over(&bpffs), [""; 0]);
        drop(second);
        // Without flags everything stays.
        let third = open(&bpffs, NONE);
        assert_eq!(third.maps().unwrap().limits(), limits);
        assert_eq!(content(&flows(&third, "FLOWS4")), now);
    });
}

#[test]
fn a_start_that_was_interrupted_is_made_good_by_the_next() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        let first = open(&bpffs, small());
        let mut old = flows(&first, "FLOWS4");
        drop(first);
        for step in [Step::Carried, Step::Moved, Step::Settled] {
            open_until(&bpffs, LARGE, step);
            assert_ne!(left_over(&bpffs), [""; 0]);
        }
        old.insert(flow_key(1), flow(1, 1), 0).unwrap();
        let third = open(&bpffs, NONE);
        assert_eq!(third.maps().unwrap().limits().services, 1000);
        assert_eq!(content(&flows(&third, "FLOWS4")), BTreeMap::from([(1, 1)]));
        assert_eq!(left_over(&bpffs), [""; 0]);
    });
}

#[test]
fn smaller_maps_are_made_if_everything_has_room_and_keep_the_newest_flows() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        let first = open(&bpffs, LARGE);
        first.maps().unwrap().apply(&entries()).unwrap();
        let before = first.maps().unwrap().read().unwrap();
        let mut old = flows(&first, "FLOWS4");
        for port in 1..=4000 {
            old.insert(flow_key(port), flow(port.into(), 1), 0).unwrap();
        }
        drop(first);
        let second = open(&bpffs, small());
        let limits = second.maps().unwrap().limits();
        assert_eq!((limits.services, limits.backends, limits.slots), (256, 256, 4096));
        assert_eq!(second.maps().unwrap().read().unwrap(), before);
        let kept = content(&flows(&second, "FLOWS4"));
        // Three in four: the kernel's LRU gives up others before the last place is taken.
        assert!(kept.keys().copied().eq(4000 - 767..=4000), "{:?}", kept.keys());

        // One backend beyond the new limit, and all maps of the flag stay as they are.
        let beyond = backend(fairlead::entries::Family::V6, 200, "[2001:db8::77]:80");
        second.maps().unwrap().apply(&[beyond]).unwrap();
        drop(second);
        let sizes = Sizes { backends: Some(100), services: Some(100), flows: None };
        let third = open(&bpffs, sizes);
        let limits = third.maps().unwrap().limits();
        assert_eq!((limits.services, limits.backends, limits.slots), (100, 256, 4096));
        let frontend = key("10.96.0.1:80", fairlead::entries::Protocol::Tcp);
        assert_eq!(third.maps().unwrap().read().unwrap().frontends[&frontend], service(1, 1, 3));
    });
}
