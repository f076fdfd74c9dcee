//! The service maps: what is written is what is read, what does not fit is refused by name.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use aya::maps::{Array, Map, MapData};
use fairlead::datapath::{Datapath, Idle, MapError, Maps, Options, Sizes};
use fairlead::entries::{BackendEntry, Family, FrontendKey, Op, Protocol, ServiceName, Snapshot, Table};
use fairlead::owner::{Owner, PodName};
use ipnet::IpNet;
use lb_common::abi::{
    Addr4, Addr6, Service, Window, address_flags, backend_state, frontend_kind, network_flags,
};
use lb_common::hash::{filter_bit, neighbourhood_bit};
use lb_common::maps::MAPS;
use lb_common::{V4, V6};

use crate::support::{TempBpffs, in_new_netns, small};

pub(crate) fn backend(family: Family, id: u32, addr: &str) -> Op {
    let entry =
        BackendEntry { addr: addr.parse().unwrap(), state: backend_state::ACTIVE, flags: 0, generation: 1 };
    Op::SetBackend { family, id, entry }
}

pub(crate) fn key(addr: &str, protocol: Protocol) -> FrontendKey {
    let addr: SocketAddr = addr.parse().unwrap();
    FrontendKey { addr: addr.ip(), port: addr.port(), protocol }
}

fn network(net: &str, flags: u32) -> (ipnet::IpNet, u32) {
    (net.parse().unwrap(), flags)
}

fn owner() -> Owner {
    ServiceName { namespace: "ns".into(), name: "svc".into() }.into()
}

pub(crate) fn service(id: u32, base: u32, len: u32) -> Service {
    Service {
        id,
        kind: frontend_kind::CLUSTER_IP,
        internal: Window { base, len },
        external: Window { base, len },
        ..Service::default()
    }
}

/// What the maps hold after `ops`, as far as windows are referred to.
fn after(ops: &[Op]) -> Snapshot {
    let mut snapshot = Snapshot::default();
    let mut slots = BTreeMap::new();
    for op in ops {
        match op.clone() {
            Op::SetBackend { family, id, entry } => drop(snapshot.backends.insert((family, id), entry)),
            Op::WriteSlots { base, slots: ids } | Op::MendSlots { base, slots: ids } => {
                drop(slots.insert(base, ids));
            }
            Op::SetFrontend { key, entry } => drop(snapshot.frontends.insert(key, entry)),
            Op::RemoveFrontend { key } => drop(snapshot.frontends.remove(&key)),
            Op::SetNetwork { family, index, network } => {
                let list = &mut snapshot.networks[usize::from(family == Family::V6)];
                list.truncate(index as usize);
                list.extend(network);
            }
            Op::AddMember { window, backend } => {
                snapshot.members.entry(window).or_default().insert(backend);
            }
            Op::RemoveMember { window, backend } => {
                if let Some(ids) = snapshot.members.get_mut(&window) {
                    ids.remove(&backend);
                }
            }
            Op::SetName { service, owner } => drop(snapshot.names.insert(service, (&owner).into())),
            Op::RemoveName { service } => drop(snapshot.names.remove(&service)),
            Op::SetSource { service, net } => drop(snapshot.sources.entry(service).or_default().insert(net)),
            Op::RemoveSource { service, net } => {
                if let Some(nets) = snapshot.sources.get_mut(&service) {
                    nets.remove(&net);
                }
            }
            Op::SetPlace { key, place } => drop(snapshot.places.insert(key, place)),
            Op::RemovePlace { key } => drop(snapshot.places.remove(&key)),
            Op::SetAddress { addr, flags } => drop(snapshot.addresses.insert(addr, flags)),
            Op::RemoveAddress { addr } => drop(snapshot.addresses.remove(&addr)),
        }
    }
    for service in snapshot.frontends.values() {
        for window in [service.internal, service.external] {
            if let Some(ids) = slots.get(&window.base) {
                snapshot.slots.insert(window.base, ids.clone());
            }
        }
    }
    snapshot
}

#[test]
fn what_is_written_is_read_back() {
    in_new_netns(|| {
        let datapath =
            Datapath::isolated(&Options { sizes: small(), idle: Idle::ALL, ..Options::default() }).unwrap();
        let mut maps = datapath.maps().unwrap();
        assert_eq!(maps.read().unwrap(), Snapshot::default());
        let limits = maps.limits();
        assert_eq!((limits.services, limits.backends, limits.slots), (256, 256, 4096));

        let ops = [
            backend(Family::V4, 1, "10.1.0.1:8080"),
            backend(Family::V4, 255, "10.1.0.2:8080"),
            backend(Family::V6, 1, "[2001:db8::1]:8080"),
            backend(Family::V4, 2, "10.1.0.3:9"),
            Op::WriteSlots { base: 1, slots: vec![1, 255, 1] },
            Op::WriteSlots { base: 4, slots: vec![1] },
            Op::WriteSlots { base: 4090, slots: vec![2; 6] },
            Op::SetFrontend { key: key("10.96.0.1:80", Protocol::Tcp), entry: service(1, 1, 3) },
            Op::SetFrontend { key: key("[fd00::1]:80", Protocol::Tcp), entry: service(1, 4, 1) },
            Op::SetFrontend { key: key("0.0.0.0:30000", Protocol::Udp), entry: service(2, 4090, 6) },
            Op::SetFrontend { key: key("10.96.0.1:80", Protocol::Udp), entry: service(3, 0, 0) },
            Op::SetAddress { addr: "192.0.2.1".parse().unwrap(), flags: address_flags::NODE },
            Op::SetAddress { addr: "2001:db8::7".parse().unwrap(), flags: address_flags::SERVICE },
            Op::RemoveFrontend { key: key("10.96.0.1:80", Protocol::Udp) },
            Op::RemoveFrontend { key: key("10.96.0.99:80", Protocol::Udp) },
            Op::RemoveAddress { addr: "192.0.2.1".parse().unwrap() },
            Op::RemoveAddress { addr: "192.0.2.2".parse().unwrap() },
            Op::SetNetwork { family: Family::V4, index: 0, network: Some(network("10.96.0.0/12", 1)) },
            Op::SetNetwork { family: Family::V4, index: 1, network: Some(network("10.244.0.0/16", 2)) },
            Op::SetNetwork { family: Family::V6, index: 0, network: Some(network("fd00:10::/33", 3)) },
            Op::SetNetwork { family: Family::V4, index: 1, network: None },
            Op::AddMember { window: 1, backend: 1 },
            Op::AddMember { window: 1, backend: 255 },
            Op::AddMember { window: 4090, backend: 2 },
            Op::RemoveMember { window: 1, backend: 1 },
            Op::RemoveMember { window: 7, backend: 1 },
            Op::SetName { service: 7, owner: owner() },
            Op::SetName { service: 70_000, owner: owner() },
            Op::SetName { service: 8, owner: owner() },
            Op::RemoveName { service: 8 },
            Op::RemoveName { service: 9 },
            Op::SetSource { service: 1, net: "203.0.113.0/24".parse().unwrap() },
            Op::SetSource { service: 1, net: "203.0.113.0/25".parse().unwrap() },
            Op::SetSource { service: 2, net: "198.51.100.7/32".parse().unwrap() },
            Op::SetSource { service: 2, net: "2001:db8::/33".parse().unwrap() },
            Op::RemoveSource { service: 1, net: "203.0.113.0/24".parse().unwrap() },
            Op::RemoveSource { service: 1, net: "203.0.113.0/26".parse().unwrap() },
        ];
        maps.apply(&ops).unwrap();
        assert_eq!(maps.read().unwrap(), after(&ops));
        // Another handle sees the same kernel maps.
        assert_eq!(datapath.maps().unwrap().read().unwrap(), after(&ops));
    });
}

/// Everything that two frontends of each family need.
pub(crate) fn entries() -> Vec<Op> {
    let mut ops = vec![
        Op::WriteSlots { base: 1, slots: vec![1, 2, 1] },
        Op::WriteSlots { base: 4, slots: vec![1] },
        Op::SetFrontend { key: key("10.96.0.1:80", Protocol::Tcp), entry: service(1, 1, 3) },
        Op::SetFrontend { key: key("10.96.0.2:80", Protocol::Tcp), entry: service(2, 1, 3) },
        Op::SetFrontend { key: key("[fd00::1]:80", Protocol::Tcp), entry: service(1, 4, 1) },
        Op::SetFrontend { key: key("[fd00::2]:80", Protocol::Sctp), entry: service(2, 4, 1) },
        Op::AddMember { window: 1, backend: 1 },
        Op::AddMember { window: 1, backend: 2 },
        Op::SetName { service: 1, owner: owner() },
        Op::SetName { service: 2, owner: owner() },
        Op::SetNetwork { family: Family::V4, index: 0, network: Some(network("10.96.0.0/12", 1)) },
        Op::SetNetwork { family: Family::V6, index: 0, network: Some(network("fd00:10::/33", 3)) },
    ];
    for n in 1..=9_u32 {
        ops.push(backend(Family::V4, n, &format!("10.1.0.{n}:8080")));
        ops.push(backend(Family::V6, n, &format!("[2001:db8::{n}]:8080")));
        let addr = format!("192.0.2.{n}").parse().unwrap();
        ops.push(Op::SetAddress { addr, flags: address_flags::NODE });
        let addr = format!("2001:db8::{n}").parse().unwrap();
        ops.push(Op::SetAddress { addr, flags: address_flags::SERVICE });
        // Each within the one before.
        let net = format!("10.0.0.0/{}", 8 + n).parse().unwrap();
        ops.push(Op::SetSource { service: 1, net });
        let net = format!("fd00::/{}", 32 + n).parse().unwrap();
        ops.push(Op::SetSource { service: n, net });
    }
    ops
}

/// The operation that removes what `op` writes.
fn removal(op: &Op) -> Option<Op> {
    Some(match op.clone() {
        Op::SetBackend { family, id, .. } => {
            Op::SetBackend { family, id, entry: BackendEntry::unused(family) }
        }
        Op::SetFrontend { key, .. } => Op::RemoveFrontend { key },
        Op::SetNetwork { family, index, .. } => Op::SetNetwork { family, index, network: None },
        Op::AddMember { window, backend } => Op::RemoveMember { window, backend },
        Op::SetName { service, .. } => Op::RemoveName { service },
        Op::SetSource { service, net } => Op::RemoveSource { service, net },
        Op::SetAddress { addr, .. } => Op::RemoveAddress { addr },
        _ => return None,
    })
}

/// Every entry that the maps show, a few at a time, as the operation that removes it.
fn shown(maps: &mut impl Maps) -> BTreeSet<String> {
    let tables = [
        Table::Backends,
        Table::Slots,
        Table::Members,
        Table::Sources,
        Table::Names,
        Table::Networks,
        Table::Frontends,
        Table::Addresses,
    ];
    let mut shown = BTreeSet::new();
    for table in tables {
        let mut from = None;
        loop {
            let (ops, next) = maps.entries(table, from, 4).unwrap();
            shown.extend(ops.iter().map(|op| format!("{op:?}")));
            from = next;
            if from.is_none() {
                break;
            }
        }
    }
    shown
}

#[test]
fn what_somebody_else_did_to_the_maps_is_seen_entry_by_entry() {
    in_new_netns(|| {
        let datapath =
            Datapath::isolated(&Options { sizes: small(), idle: Idle::ALL, ..Options::default() }).unwrap();
        let mut maps = datapath.maps().unwrap();
        let ops = entries();
        maps.apply(&ops).unwrap();
        let all = |ops: &[Op]| -> BTreeSet<String> {
            ops.iter().filter_map(removal).map(|op| format!("{op:?}")).collect()
        };
        assert_eq!(maps.differing(ops.clone()).unwrap(), []);
        assert_eq!(shown(&mut maps), all(&ops));
        for op in &ops {
            let gone = match op {
                Op::WriteSlots { base, .. } => Op::MendSlots { base: *base, slots: vec![7] },
                op => removal(op).unwrap(),
            };
            maps.apply(std::slice::from_ref(&gone)).unwrap();
            let seen = maps.differing(ops.clone()).unwrap();
            assert_eq!(seen, std::slice::from_ref(op), "after {gone:?}");
            let mut left = all(&ops);
            if !matches!(op, Op::WriteSlots { .. }) {
                assert!(left.remove(&format!("{gone:?}")));
            }
            assert_eq!(shown(&mut maps), left);
            maps.apply(&seen).unwrap();
            assert_eq!(maps.differing(ops.clone()).unwrap(), []);
        }
        let altered = [
            backend(Family::V4, 3, "10.1.0.99:8080"),
            Op::SetFrontend { key: key("[fd00::1]:80", Protocol::Tcp), entry: service(1, 1, 1) },
            Op::SetName { service: 2, owner: PodName { namespace: "ns".into(), name: "pod".into() }.into() },
            Op::SetNetwork { family: Family::V4, index: 0, network: Some(network("10.96.0.0/13", 1)) },
            Op::SetAddress { addr: "192.0.2.3".parse().unwrap(), flags: address_flags::LOOPBACK },
        ];
        maps.apply(&altered).unwrap();
        assert_eq!(maps.differing(ops).unwrap().len(), altered.len());
    });
}

#[test]
fn large_loads_survive_the_batches() {
    in_new_netns(|| {
        let sizes = Sizes { flows: Some(64), services: Some(20_000), backends: Some(20_000) };
        let datapath = Datapath::isolated(&Options { sizes, idle: Idle::ALL, ..Options::default() }).unwrap();
        let mut maps = datapath.maps().unwrap();
        let mut ops = Vec::new();
        for id in 1..20_000_u32 {
            let [_, _, high, low] = id.to_be_bytes();
            ops.push(backend(Family::V4, id, &format!("10.2.{high}.{low}:80")));
        }
        ops.push(Op::WriteSlots { base: 1, slots: (1..20_000).collect() });
        for id in 1..20_000_u32 {
            let [_, _, high, low] = id.to_be_bytes();
            ops.push(Op::SetFrontend {
                key: key(&format!("10.3.{high}.{low}:80"), Protocol::Tcp),
                entry: service(id, 1, 19_999),
            });
        }
        maps.apply(&ops).unwrap();
        let read = maps.read().unwrap();
        assert_eq!(read, after(&ops));
        assert_eq!(read.slots[&1].len(), 19_999);
    });
}

#[test]
fn a_full_map_says_which_flag_to_raise_and_how_far_it_came() {
    in_new_netns(|| {
        let datapath =
            Datapath::isolated(&Options { sizes: small(), idle: Idle::ALL, ..Options::default() }).unwrap();
        let mut maps = datapath.maps().unwrap();
        let ops: Vec<Op> = (0..300_u32)
            .map(|i| {
                let [.., high, low] = i.to_be_bytes();
                Op::SetFrontend {
                    key: key(&format!("10.96.{high}.{low}:80"), Protocol::Tcp),
                    entry: service(i + 1, 0, 0),
                }
            })
            .collect();
        let error = maps.apply(&ops).unwrap_err();
        assert_eq!(error.source, MapError::Full { map: "SERVICES4".into(), capacity: 256 });
        assert!(error.to_string().contains("raise --max-services"), "{error}");
        assert_eq!(maps.read().unwrap().frontends.len(), error.done);
        assert_eq!(error.done, 256);

        let beyond = [backend(Family::V4, 1, "10.1.0.1:80"), backend(Family::V4, 256, "10.1.0.2:80")];
        let error = maps.apply(&beyond).unwrap_err();
        assert_eq!(error.source, MapError::Full { map: "BACKENDS4".into(), capacity: 256 });
        assert_eq!(error.done, 1);

        let mixed = [backend(Family::V6, 1, "10.1.0.1:80")];
        assert!(matches!(maps.apply(&mixed).unwrap_err().source, MapError::Failed { .. }));
    });
}

#[test]
fn pinned_maps_keep_their_entries() {
    in_new_netns(|| {
        let bpffs = TempBpffs::new();
        let ops = [
            backend(Family::V4, 7, "10.1.0.1:8080"),
            Op::WriteSlots { base: 1, slots: vec![7] },
            Op::SetFrontend { key: key("10.96.0.1:80", Protocol::Tcp), entry: service(1, 1, 1) },
        ];
        let first = Datapath::open(&bpffs.options()).unwrap();
        first.maps().unwrap().apply(&ops).unwrap();
        drop(first);
        let second = Datapath::open(&bpffs.options()).unwrap();
        assert_eq!(second.maps().unwrap().read().unwrap(), after(&ops));
    });
}

#[test]
fn neighbourhoods_of_service_networks_have_their_bits_in_the_filter() {
    in_new_netns(|| {
        let options = Options { sizes: small(), idle: Idle::ALL, ..Options::default() };
        let datapath = Datapath::isolated(&options).unwrap();
        let mut maps = datapath.maps().unwrap();
        let bit = |addr: &str| match addr.parse().unwrap() {
            IpAddr::V4(addr) => neighbourhood_bit::<V4>(&Addr4 { octets: addr.octets() }),
            IpAddr::V6(addr) => neighbourhood_bit::<V6>(&Addr6 { octets: addr.octets() }),
        };
        let filter = || filter(&datapath);
        let has = |addr| filter().get(&bit(addr).0, 0).unwrap() & bit(addr).1 != 0;
        let set = |index, net: &str, flags| {
            let net: IpNet = net.parse().unwrap();
            let family = if net.addr().is_ipv4() { Family::V4 } else { Family::V6 };
            Op::SetNetwork { family, index, network: Some((net, flags)) }
        };
        let (services, pods) = (network_flags::SERVICE, network_flags::POD);

        let cluster = set(0, "10.96.0.0/12", services);
        maps.apply(&[cluster.clone(), set(1, "10.244.0.0/16", pods)]).unwrap();
        maps.apply(&[set(0, "fd00:10:96::/112", services), set(1, "fd00:9::/62", services | pods)]).unwrap();
        for addr in ["10.96.0.1", "10.103.7.7", "10.111.255.255", "fd00:10:96::7", "fd00:9:0:3::1"] {
            assert!(has(addr), "{addr}");
        }
        for addr in ["10.95.0.1", "10.112.0.1", "10.244.0.1", "fd00:10:96:1::", "fd00:9:0:4::"] {
            assert!(!has(addr), "{addr}");
        }

        // Somebody takes one away: the check finds and mends it.
        assert_eq!(maps.differing(vec![cluster.clone()]).unwrap(), []);
        filter().set(bit("10.100.0.0").0, 0, 0).unwrap();
        assert_eq!(maps.differing(vec![cluster.clone()]).unwrap(), std::slice::from_ref(&cluster));
        maps.apply(&[cluster]).unwrap();
        assert!(has("10.100.0.0"));
        // So does the next start, before programs rely on it.
        filter().set(bit("fd00:9:0:2::").0, 0, 0).unwrap();
        drop(datapath.maps().unwrap());
        assert!(has("fd00:9:0:2::"));

        // One that has more than can be told apart gets every bit there is.
        maps.apply(&[set(2, "fd00::/8", services)]).unwrap();
        assert!(has("fdff:1:2:3::") && has("203.0.113.1"));
    });
}

/// `ADDRESS_FILTER`.
fn filter(datapath: &Datapath) -> Array<MapData, u64> {
    let spec = MAPS.iter().find(|spec| spec.name == "ADDRESS_FILTER").unwrap();
    Array::try_from(Map::Array(datapath.map_data(spec).unwrap())).unwrap()
}

#[test]
fn every_address_has_its_bit_in_the_filter_for_good() {
    in_new_netns(|| {
        let options = Options { sizes: small(), idle: Idle::ALL, ..Options::default() };
        let datapath = Datapath::isolated(&options).unwrap();
        let mut maps = datapath.maps().unwrap();
        let addrs: Vec<IpAddr> =
            ["192.0.2.1", "10.96.0.1", "2001:db8::7"].map(|addr| addr.parse().unwrap()).into();
        let set =
            |flags| addrs.iter().map(move |addr| Op::SetAddress { addr: *addr, flags }).collect::<Vec<_>>();
        let bit = |addr: &IpAddr| match addr {
            IpAddr::V4(addr) => filter_bit::<V4>(&Addr4 { octets: addr.octets() }),
            IpAddr::V6(addr) => filter_bit::<V6>(&Addr6 { octets: addr.octets() }),
        };
        let filter = || filter(&datapath);
        let has = |addr| filter().get(&bit(addr).0, 0).unwrap() & bit(addr).1 != 0;
        assert!(!addrs.iter().any(has));

        maps.apply(&set(address_flags::SERVICE)).unwrap();
        assert!(addrs.iter().all(has));
        let removals: Vec<Op> = addrs.iter().map(|addr| Op::RemoveAddress { addr: *addr }).collect();
        maps.apply(&removals[..2]).unwrap();
        assert!(addrs.iter().all(has), "flows outlive their Services");

        // Somebody takes it away: the check finds and mends it.
        let write = set(address_flags::SERVICE).pop().unwrap();
        assert_eq!(maps.differing(vec![write.clone()]).unwrap(), []);
        filter().set(bit(&addrs[2]).0, 0, 0).unwrap();
        assert_eq!(maps.differing(vec![write.clone()]).unwrap(), std::slice::from_ref(&write));
        maps.apply(&[write]).unwrap();
        assert!(has(&addrs[2]));

        // Maps of a build that had no filter: what they know gets its bits before programs rely on it.
        filter().set(bit(&addrs[2]).0, 0, 0).unwrap();
        drop(datapath.maps().unwrap());
        assert!(has(&addrs[2]));
    });
}
