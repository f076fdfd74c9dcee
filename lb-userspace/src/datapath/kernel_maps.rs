//! The service maps in the kernel.

mod check;
mod filter;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use aya::Pod;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, IterableMap, Map, MapData, MapError as AyaError};
use ipnet::IpNet;
use lb_common::abi::{self, Addr4, Addr6, AddressInfo, MemberKey, Network, OwnerName, ServiceKey, Source};
use lb_common::maps::{MAPS, MapSpec};

use self::filter::AddressFilter;
use super::error::OpenError;
use super::{ApplyError, MapError, Maps, Position};
use crate::entries::{BackendEntry, Family, FrontendKey, Limits, Op, Place, Protocol, Snapshot, Table};
use crate::sys::bpf::{self, Cursor};

/// Entries read or written with one system call.
const BATCH: usize = 4096;

/// The value where only the key matters.
const PRESENT: u32 = 1;

/// Bits of the Service's number, in front of the network's in the keys of `SOURCES4/6`.
const SERVICE_BITS: u32 = 32;

/// The service maps in the kernel.
pub struct KernelMaps {
    services4: HashMap<MapData, ServiceKey<Addr4>, abi::Service>,
    services6: HashMap<MapData, ServiceKey<Addr6>, abi::Service>,
    backends4: Array<MapData, abi::Backend<Addr4>>,
    backends6: Array<MapData, abi::Backend<Addr6>>,
    slots: Array<MapData, u32>,
    addresses4: HashMap<MapData, Addr4, AddressInfo>,
    addresses6: HashMap<MapData, Addr6, AddressInfo>,
    filter: AddressFilter,
    members: HashMap<MapData, MemberKey, u32>,
    names: HashMap<MapData, u32, OwnerName>,
    networks4: Array<MapData, Network<Addr4>>,
    networks6: Array<MapData, Network<Addr6>>,
    sources4: LpmTrie<MapData, Source<Addr4>, u32>,
    sources6: LpmTrie<MapData, Source<Addr6>, u32>,
    places4: HashMap<MapData, ServiceKey<Addr4>, abi::Place<Addr4>>,
    places6: HashMap<MapData, ServiceKey<Addr6>, abi::Place<Addr6>>,
    limits: Limits,
}

impl KernelMaps {
    /// Takes each map from `open`.
    pub(crate) fn new(
        open: impl Fn(&'static MapSpec) -> Result<MapData, OpenError>,
    ) -> Result<Self, OpenError> {
        let services4 = typed("SERVICES4", &open)?;
        let backends4 = typed("BACKENDS4", &open)?;
        let slots = typed("SLOTS", &open)?;
        let addresses4 = typed("ADDRESSES4", &open)?;
        let members = typed("MEMBERS", &open)?;
        let sources4 = typed("SOURCES4", &open)?;
        let limits = Limits {
            services: entries("SERVICES4", &services4)?,
            backends: entries("BACKENDS4", &backends4)?,
            slots: entries("SLOTS", &slots)?,
            addresses: entries("ADDRESSES4", &addresses4)?,
            sources: entries("SOURCES4", &sources4)?,
            members: entries("MEMBERS", &members)?,
        };
        Ok(Self {
            services4,
            services6: typed("SERVICES6", &open)?,
            backends4,
            backends6: typed("BACKENDS6", &open)?,
            slots,
            addresses4,
            addresses6: typed("ADDRESSES6", &open)?,
            filter: AddressFilter::new(typed(filter::NAME, &open)?)?,
            members,
            names: typed("NAMES", &open)?,
            networks4: typed("NETWORKS4", &open)?,
            networks6: typed("NETWORKS6", &open)?,
            sources4,
            sources6: typed("SOURCES6", &open)?,
            places4: typed("PLACES4", &open)?,
            places6: typed("PLACES6", &open)?,
            limits,
        })
    }

    /// Gives every address that is in the maps already its bit in the filter: before programs ask for it that another build has
    /// no filter for.
    pub(crate) fn complete_filter(&mut self) -> Result<(), MapError> {
        let mut addrs4 = vec![];
        walk("ADDRESSES4", fd(&self.addresses4), |addr: Addr4, _: AddressInfo| addrs4.push(addr))?;
        let mut addrs6 = vec![];
        walk("ADDRESSES6", fd(&self.addresses6), |addr: Addr6, _: AddressInfo| addrs6.push(addr))?;
        self.filter.add4(&addrs4)?;
        self.filter.add6(&addrs6)?;
        let networks = self.read_networks()?;
        self.filter.add_networks(networks.iter().flatten().filter_map(of_services))
    }

    /// Carries out the longest run at the start of `ops` that one system call can do; how many it did.
    #[expect(clippy::too_many_lines, reason = "one arm for each operation")]
    fn apply_run(&mut self, ops: &[Op]) -> Result<usize, ApplyError> {
        let Some(first) = ops.first() else { return Ok(0) };
        match first {
            Op::SetBackend { family: Family::V4, .. } => {
                let run = run(ops, |op| match op {
                    Op::SetBackend { family: Family::V4, id, entry } => {
                        Some((*id, backend(entry, octets4(entry.addr.ip())?)))
                    }
                    _ => None,
                });
                write(&mut self.backends4, "BACKENDS4", run, ops)
            }
            Op::SetBackend { family: Family::V6, .. } => {
                let run = run(ops, |op| match op {
                    Op::SetBackend { family: Family::V6, id, entry } => {
                        Some((*id, backend(entry, octets6(entry.addr.ip())?)))
                    }
                    _ => None,
                });
                write(&mut self.backends6, "BACKENDS6", run, ops)
            }
            Op::SetFrontend { key, .. } if key.addr.is_ipv4() => {
                let run = run(ops, |op| match op {
                    Op::SetFrontend { key, entry } => Some((service_key(*key, octets4(key.addr)?), *entry)),
                    _ => None,
                });
                write(&mut self.services4, "SERVICES4", run, ops)
            }
            Op::SetFrontend { .. } => {
                let run = run(ops, |op| match op {
                    Op::SetFrontend { key, entry } => Some((service_key(*key, octets6(key.addr)?), *entry)),
                    _ => None,
                });
                write(&mut self.services6, "SERVICES6", run, ops)
            }
            Op::SetAddress { addr, .. } if addr.is_ipv4() => {
                let run = run(ops, |op| match op {
                    Op::SetAddress { addr, flags } => Some((octets4(*addr)?, AddressInfo { flags: *flags })),
                    _ => None,
                });
                self.filter.add4(&run.0).map_err(nothing_done)?;
                write(&mut self.addresses4, "ADDRESSES4", run, ops)
            }
            Op::SetAddress { .. } => {
                let run = run(ops, |op| match op {
                    Op::SetAddress { addr, flags } => Some((octets6(*addr)?, AddressInfo { flags: *flags })),
                    _ => None,
                });
                self.filter.add6(&run.0).map_err(nothing_done)?;
                write(&mut self.addresses6, "ADDRESSES6", run, ops)
            }
            Op::SetNetwork { family: Family::V4, .. } => {
                let run = run(ops, |op| match op {
                    Op::SetNetwork { family: Family::V4, index, network } => {
                        Some((*index, network_entry(*network, octets4)?))
                    }
                    _ => None,
                });
                self.filter.add_networks(services_networks(&ops[..run.0.len()])).map_err(nothing_done)?;
                write(&mut self.networks4, "NETWORKS4", run, ops)
            }
            Op::SetNetwork { .. } => {
                let run = run(ops, |op| match op {
                    Op::SetNetwork { family: Family::V6, index, network } => {
                        Some((*index, network_entry(*network, octets6)?))
                    }
                    _ => None,
                });
                self.filter.add_networks(services_networks(&ops[..run.0.len()])).map_err(nothing_done)?;
                write(&mut self.networks6, "NETWORKS6", run, ops)
            }
            Op::AddMember { .. } => {
                let run = run(ops, |op| match *op {
                    Op::AddMember { window, backend } => Some((MemberKey { window, backend }, PRESENT)),
                    _ => None,
                });
                write(&mut self.members, "MEMBERS", run, ops)
            }
            Op::RemoveMember { window, backend } => {
                let key = MemberKey { window: *window, backend: *backend };
                remove(&mut self.members, "MEMBERS", &key, first)
            }
            Op::SetName { .. } => {
                let run = run(ops, |op| match op {
                    Op::SetName { service, owner } => Some((*service, owner.into())),
                    _ => None,
                });
                write(&mut self.names, "NAMES", run, ops)
            }
            Op::RemoveName { service } => remove(&mut self.names, "NAMES", service, first),
            Op::SetSource { net: IpNet::V4(_), .. } => {
                let run = run(ops, |op| match op {
                    Op::SetSource { service, net } => {
                        Some((source_key(*service, *net, octets4(net.addr())?), source_value(*net)))
                    }
                    _ => None,
                });
                write(&mut self.sources4, "SOURCES4", run, ops)
            }
            Op::SetSource { .. } => {
                let run = run(ops, |op| match op {
                    Op::SetSource { service, net } => {
                        Some((source_key(*service, *net, octets6(net.addr())?), source_value(*net)))
                    }
                    _ => None,
                });
                write(&mut self.sources6, "SOURCES6", run, ops)
            }
            Op::RemoveSource { service, net } => {
                let removed = match (octets4(net.addr()), octets6(net.addr())) {
                    (Some(addr), _) => self.sources4.remove(&source_key(*service, *net, addr)),
                    (_, Some(addr)) => self.sources6.remove(&source_key(*service, *net, addr)),
                    (None, None) => Ok(()),
                };
                removal("SOURCES", removed, first)
            }
            Op::SetPlace { key, .. } if key.addr.is_ipv4() => {
                let run = run(ops, |op| match op {
                    Op::SetPlace { key, place } => {
                        Some((service_key(*key, octets4(key.addr)?), place_entry(*place, octets4)?))
                    }
                    _ => None,
                });
                write(&mut self.places4, "PLACES4", run, ops)
            }
            Op::SetPlace { .. } => {
                let run = run(ops, |op| match op {
                    Op::SetPlace { key, place } => {
                        Some((service_key(*key, octets6(key.addr)?), place_entry(*place, octets6)?))
                    }
                    _ => None,
                });
                write(&mut self.places6, "PLACES6", run, ops)
            }
            Op::RemovePlace { key } => match (octets4(key.addr), octets6(key.addr)) {
                (Some(addr), _) => remove(&mut self.places4, "PLACES4", &service_key(*key, addr), first),
                (_, Some(addr)) => remove(&mut self.places6, "PLACES6", &service_key(*key, addr), first),
                (None, None) => Ok(1),
            },
            Op::WriteSlots { .. } | Op::MendSlots { .. } => self.write_slots(ops),
            Op::RemoveFrontend { key } => match (octets4(key.addr), octets6(key.addr)) {
                (Some(addr), _) => remove(&mut self.services4, "SERVICES4", &service_key(*key, addr), first),
                (_, Some(addr)) => remove(&mut self.services6, "SERVICES6", &service_key(*key, addr), first),
                (None, None) => Ok(1),
            },
            Op::RemoveAddress { addr } => match (octets4(*addr), octets6(*addr)) {
                (Some(addr), _) => remove(&mut self.addresses4, "ADDRESSES4", &addr, first),
                (_, Some(addr)) => remove(&mut self.addresses6, "ADDRESSES6", &addr, first),
                (None, None) => Ok(1),
            },
        }
    }

    /// Several small windows go in one system call; a large one takes several.
    fn write_slots(&mut self, ops: &[Op]) -> Result<usize, ApplyError> {
        let mut keys = Vec::new();
        let mut values = Vec::new();
        let mut done = 0;
        for op in ops {
            let (Op::WriteSlots { base, slots } | Op::MendSlots { base, slots }) = op else { break };
            keys.extend((*base..).take(slots.len()));
            values.extend_from_slice(slots);
            done += 1;
            if keys.len() >= BATCH {
                break;
            }
        }
        for (first, (keys, values)) in (0..).step_by(BATCH).zip(keys.chunks(BATCH).zip(values.chunks(BATCH)))
        {
            update(fd(&self.slots), keys, values).map_err(|error| {
                let done = whole(ops, first + error.done);
                ApplyError { done, source: refused("SLOTS", &ops[done], self.limits.slots, &error.source) }
            })?;
        }
        Ok(done)
    }

    fn read_services(&self) -> Result<BTreeMap<FrontendKey, abi::Service>, MapError> {
        let mut frontends = BTreeMap::new();
        walk("SERVICES4", fd(&self.services4), |key: ServiceKey<Addr4>, service| {
            if let Some(key) = frontend_key(&key, IpAddr::V4(Ipv4Addr::from(key.addr.octets))) {
                frontends.insert(key, service);
            }
        })?;
        walk("SERVICES6", fd(&self.services6), |key: ServiceKey<Addr6>, service| {
            if let Some(key) = frontend_key(&key, IpAddr::V6(Ipv6Addr::from(key.addr.octets))) {
                frontends.insert(key, service);
            }
        })?;
        Ok(frontends)
    }

    fn read_places(&self) -> Result<BTreeMap<FrontendKey, Place>, MapError> {
        let mut places = BTreeMap::new();
        let mut note = |key: Option<FrontendKey>, backend, node: IpAddr| {
            if let Some(key) = key {
                places.insert(key, Place { backend, node: Some(node).filter(|node| !node.is_unspecified()) });
            }
        };
        walk("PLACES4", fd(&self.places4), |key: ServiceKey<Addr4>, place: abi::Place<Addr4>| {
            note(frontend_key(&key, key.addr.octets.into()), place.backend, place.node.octets.into());
        })?;
        walk("PLACES6", fd(&self.places6), |key: ServiceKey<Addr6>, place: abi::Place<Addr6>| {
            note(frontend_key(&key, key.addr.octets.into()), place.backend, place.node.octets.into());
        })?;
        Ok(places)
    }

    fn read_networks(&self) -> Result<[Vec<(IpNet, u32)>; 2], MapError> {
        let mut lists = [NetworkList::default(), NetworkList::default()];
        let [list4, list6] = &mut lists;
        walk("NETWORKS4", fd(&self.networks4), |index: u32, network: Network<Addr4>| {
            let [addr, mask] = [network.addr, network.mask].map(|addr| IpAddr::from(addr.octets));
            list4.note(index, addr, mask, network.flags);
        })?;
        walk("NETWORKS6", fd(&self.networks6), |index: u32, network: Network<Addr6>| {
            let [addr, mask] = [network.addr, network.mask].map(|addr| IpAddr::from(addr.octets));
            list6.note(index, addr, mask, network.flags);
        })?;
        Ok(lists.map(|list| list.networks))
    }

    /// Tries are read in batches only since 5.13: one by one.
    fn read_sources(&self) -> Result<BTreeMap<u32, BTreeSet<IpNet>>, MapError> {
        let mut sources: BTreeMap<u32, BTreeSet<IpNet>> = BTreeMap::new();
        let mut note = |service, addr, prefix_len: u32| {
            if let Some(net) = source_net(addr, prefix_len) {
                sources.entry(service).or_default().insert(net);
            }
        };
        for key in self.sources4.keys() {
            let key = key.map_err(|error| read_error("SOURCES4")(io::Error::other(error)))?;
            let source = key.data();
            note(source.service, IpAddr::from(source.addr.octets), key.prefix_len());
        }
        for key in self.sources6.keys() {
            let key = key.map_err(|error| read_error("SOURCES6")(io::Error::other(error)))?;
            let source = key.data();
            note(source.service, IpAddr::from(source.addr.octets), key.prefix_len());
        }
        Ok(sources)
    }

    fn read_backends(&self) -> Result<BTreeMap<(Family, u32), BackendEntry>, MapError> {
        let mut backends = BTreeMap::new();
        walk("BACKENDS4", fd(&self.backends4), |id: u32, backend: abi::Backend<Addr4>| {
            if backend.generation != 0 {
                let addr = IpAddr::V4(Ipv4Addr::from(backend.addr.octets));
                backends.insert((Family::V4, id), backend_entry(&backend, addr));
            }
        })?;
        walk("BACKENDS6", fd(&self.backends6), |id: u32, backend: abi::Backend<Addr6>| {
            if backend.generation != 0 {
                let addr = IpAddr::V6(Ipv6Addr::from(backend.addr.octets));
                backends.insert((Family::V6, id), backend_entry(&backend, addr));
            }
        })?;
        Ok(backends)
    }

    fn read_slots<'a>(
        &self,
        services: impl Iterator<Item = &'a abi::Service>,
    ) -> Result<BTreeMap<u32, Vec<u32>>, MapError> {
        let mut windows: BTreeMap<u32, u32> = BTreeMap::new();
        for window in services.flat_map(|service| [service.internal, service.external]) {
            if window.len > 0 {
                let len = windows.entry(window.base).or_default();
                *len = window.len.max(*len);
            }
        }
        windows.into_iter().map(|(base, len)| Ok((base, self.read_window(base, len)?))).collect()
    }

    /// The slots of a window; fewer if it reaches beyond the map.
    fn read_window(&self, base: u32, len: u32) -> Result<Vec<u32>, MapError> {
        let mut slots = Vec::new();
        let mut cursor = base.checked_sub(1).map(Cursor::after);
        while slots.len() < len as usize {
            let room = BATCH.min(len as usize - slots.len());
            let (entries, next) = bpf::map_lookup_batch::<u32, u32>(fd(&self.slots), cursor, room)
                .map_err(read_error("SLOTS"))?;
            slots.extend(entries.into_iter().map(|(_, slot)| slot));
            let Some(next) = next else { break };
            cursor = Some(next);
        }
        Ok(slots)
    }
}

impl Maps for KernelMaps {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn read(&mut self) -> Result<Snapshot, MapError> {
        let frontends = self.read_services()?;
        let mut addresses = BTreeMap::new();
        walk("ADDRESSES4", fd(&self.addresses4), |addr: Addr4, info: AddressInfo| {
            addresses.insert(IpAddr::from(addr.octets), info.flags);
        })?;
        walk("ADDRESSES6", fd(&self.addresses6), |addr: Addr6, info: AddressInfo| {
            addresses.insert(IpAddr::from(addr.octets), info.flags);
        })?;
        let mut members: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
        walk("MEMBERS", fd(&self.members), |key: MemberKey, _: u32| {
            members.entry(key.window).or_default().insert(key.backend);
        })?;
        let mut names = BTreeMap::new();
        walk("NAMES", fd(&self.names), |service: u32, name: OwnerName| {
            names.insert(service, name);
        })?;
        Ok(Snapshot {
            slots: self.read_slots(frontends.values())?,
            backends: self.read_backends()?,
            frontends,
            addresses,
            sources: self.read_sources()?,
            members,
            names,
            networks: self.read_networks()?,
            places: self.read_places()?,
        })
    }

    fn differing(&mut self, writes: Vec<Op>) -> Result<Vec<Op>, MapError> {
        let mut differing = vec![];
        for write in writes {
            if !self.has(&write)? {
                differing.push(write);
            }
        }
        Ok(differing)
    }

    fn entries(
        &mut self,
        table: Table,
        from: Option<Position>,
        count: usize,
    ) -> Result<(Vec<Op>, Option<Position>), MapError> {
        self.entries_from(table, from, count)
    }

    fn apply(&mut self, ops: &[Op]) -> Result<(), ApplyError> {
        let mut done = 0;
        while let Some(rest) = ops.get(done..).filter(|rest| !rest.is_empty()) {
            match self.apply_run(rest) {
                Ok(count) => done += count,
                Err(error) => return Err(ApplyError { done: done + error.done, ..error }),
            }
        }
        Ok(())
    }
}

fn nothing_done(source: MapError) -> ApplyError {
    ApplyError { done: 0, source }
}

/// The entries that the operations at the start of `ops` write, as far as `entry` takes them.
fn run<K, V>(ops: &[Op], entry: impl Fn(&Op) -> Option<(K, V)>) -> (Vec<K>, Vec<V>) {
    ops.iter().take(BATCH).map_while(entry).unzip()
}

fn write<K: Pod, V: Pod>(
    map: &mut impl IterableMap<K, V>,
    name: &'static str,
    (keys, values): (Vec<K>, Vec<V>),
    ops: &[Op],
) -> Result<usize, ApplyError> {
    if keys.is_empty() {
        let reason = format!("{}: address and family do not agree", ops[0].subject());
        return Err(ApplyError { done: 0, source: MapError::Failed { map: name.into(), reason } });
    }
    update(fd(map), &keys, &values).map_err(|error| {
        let capacity = map.map().info().map_or(0, |info| info.max_entries());
        ApplyError { done: error.done, source: refused(name, &ops[error.done], capacity, &error.source) }
    })?;
    Ok(keys.len())
}

/// How many windows at the start of `ops` so many slots are all of.
fn whole(ops: &[Op], mut slots: usize) -> usize {
    let windows = ops.iter().take_while(|op| match op {
        Op::WriteSlots { slots: window, .. } | Op::MendSlots { slots: window, .. } => {
            let fits = window.len() <= slots;
            slots = slots.saturating_sub(window.len());
            fits
        }
        _ => false,
    });
    windows.count().min(ops.len().saturating_sub(1))
}

/// Writes a batch, one by one where the kernel has no batches for this kind of map.
fn update<K: Pod, V: Pod>(map: BorrowedFd<'_>, keys: &[K], values: &[V]) -> Result<(), bpf::BatchError> {
    /// The kernel's `ENOTSUPP`, which is not the `EOPNOTSUPP` of user space.
    const ENOTSUPP: i32 = 524;
    match bpf::map_update_batch(map, keys, values) {
        Err(error) if error.source.raw_os_error() == Some(ENOTSUPP) => {
            for (done, (key, value)) in keys.iter().zip(values).enumerate() {
                bpf::map_update(map, key, value).map_err(|source| bpf::BatchError { done, source })?;
            }
            Ok(())
        }
        result => result,
    }
}

fn remove<K: Pod, V: Pod>(
    map: &mut HashMap<MapData, K, V>,
    name: &'static str,
    key: &K,
    op: &Op,
) -> Result<usize, ApplyError> {
    removal(name, map.remove(key), op)
}

/// What is not there is removed.
fn removal(name: &'static str, removed: Result<(), AyaError>, op: &Op) -> Result<usize, ApplyError> {
    match removed {
        Ok(()) | Err(AyaError::KeyNotFound) => Ok(1),
        Err(AyaError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(1),
        Err(error) => {
            let reason = format!("{}: {error}", op.subject());
            Err(ApplyError { done: 0, source: MapError::Failed { map: name.into(), reason } })
        }
    }
}

fn refused(map: &str, op: &Op, capacity: u32, error: &io::Error) -> MapError {
    if error.raw_os_error() == Some(libc::E2BIG) {
        return MapError::Full { map: map.into(), capacity };
    }
    let advice = match error.raw_os_error() {
        Some(libc::ENOMEM) => " (the kernel is out of memory for map entries)",
        _ => "",
    };
    MapError::Failed { map: map.into(), reason: format!("{}: {error}{advice}", op.subject()) }
}

/// Shows `visit` every entry of a map. Entries that come or go meanwhile may be missed or seen twice.
pub(crate) fn walk<K: Pod, V: Pod>(
    name: &'static str,
    map: BorrowedFd<'_>,
    mut visit: impl FnMut(K, V),
) -> Result<(), MapError> {
    let mut cursor = None;
    loop {
        let (entries, next) = bpf::map_lookup_batch::<K, V>(map, cursor, BATCH).map_err(read_error(name))?;
        for (key, value) in entries {
            visit(key, value);
        }
        let Some(next) = next else { return Ok(()) };
        cursor = Some(next);
    }
}

fn read_error(map: &'static str) -> impl Fn(io::Error) -> MapError {
    move |error| MapError::Failed { map: map.into(), reason: format!("read: {error}") }
}

/// The map of this name, which `open` opens.
pub(crate) fn typed<T: TryFrom<Map, Error = AyaError>>(
    name: &'static str,
    open: impl Fn(&'static MapSpec) -> Result<MapData, OpenError>,
) -> Result<T, OpenError> {
    let spec = MAPS.iter().find(|spec| spec.name == name).ok_or(OpenError::Missing { kind: "map", name })?;
    Map::from_map_data(open(spec)?)
        .and_then(T::try_from)
        .map_err(|error| OpenError::Map { name, source: Box::new(error) })
}

fn entries<K: Pod, V>(name: &'static str, map: &impl IterableMap<K, V>) -> Result<u32, OpenError> {
    let info = map.map().info().map_err(|error| OpenError::Map { name, source: Box::new(error) })?;
    Ok(info.max_entries())
}

fn fd<K: Pod, V>(map: &impl IterableMap<K, V>) -> BorrowedFd<'_> {
    map.map().fd().as_fd()
}

fn service_key<A>(key: FrontendKey, addr: A) -> ServiceKey<A> {
    ServiceKey { addr, port: key.port, proto: key.protocol.number(), pad: 0 }
}

/// The network, if it is a ServiceCIDR.
fn of_services((net, flags): &(IpNet, u32)) -> Option<&IpNet> {
    (flags & abi::network_flags::SERVICE != 0).then_some(net)
}

/// The ServiceCIDRs that these operations write.
fn services_networks(ops: &[Op]) -> impl Iterator<Item = &IpNet> {
    ops.iter().filter_map(|op| match op {
        Op::SetNetwork { network: Some(network), .. } => of_services(network),
        _ => None,
    })
}

/// One family's networks: those before the first without flags.
#[derive(Default)]
struct NetworkList {
    networks: Vec<(IpNet, u32)>,
}

impl NetworkList {
    fn note(&mut self, index: u32, addr: IpAddr, mask: IpAddr, flags: u32) {
        if flags == 0 || self.networks.len() != index as usize {
            return;
        }
        // A mask with gaps was not written by us: no flags that anybody wants, so that it is replaced.
        let network = IpNet::with_netmask(addr, mask).map(|net| (net, flags));
        self.networks.push(network.unwrap_or((IpNet::from(addr), u32::MAX)));
    }
}

/// What the map has for a network; `None`: it is not of this family.
fn network_entry<A: Default>(
    network: Option<(IpNet, u32)>,
    octets: impl Fn(IpAddr) -> Option<A>,
) -> Option<Network<A>> {
    let Some((net, flags)) = network else { return Some(Network::default()) };
    Some(Network { addr: octets(net.addr())?, mask: octets(net.netmask())?, flags })
}

/// What the map has for a place; `None`: it is not of this family.
fn place_entry<A: Default>(place: Place, octets: impl Fn(IpAddr) -> Option<A>) -> Option<abi::Place<A>> {
    let node = place.node.map_or(Some(A::default()), octets)?;
    Some(abi::Place { backend: place.backend, node })
}

fn source_key<A: Copy>(service: u32, net: IpNet, addr: A) -> Key<Source<A>>
where
    Source<A>: Pod,
{
    Key::new(SERVICE_BITS + u32::from(net.prefix_len()), Source { service, addr })
}

/// The longest prefix answers for a network: its length tells whether it is the network itself.
fn source_value(net: IpNet) -> u32 {
    net.prefix_len().into()
}

/// The network of a key of `SOURCES4/6`; none: it ends in the Service's number and cannot be ours.
fn source_net(addr: IpAddr, prefix_len: u32) -> Option<IpNet> {
    IpNet::new(addr, u8::try_from(prefix_len.checked_sub(SERVICE_BITS)?).ok()?).ok()
}

fn frontend_key<A>(key: &ServiceKey<A>, addr: IpAddr) -> Option<FrontendKey> {
    let protocol = Protocol::from_number(key.proto)?;
    Some(FrontendKey { addr, port: key.port, protocol })
}

fn backend<A>(entry: &BackendEntry, addr: A) -> abi::Backend<A> {
    abi::Backend {
        addr,
        port: entry.addr.port(),
        state: entry.state,
        flags: entry.flags,
        generation: entry.generation,
    }
}

fn backend_entry<A>(backend: &abi::Backend<A>, addr: IpAddr) -> BackendEntry {
    BackendEntry {
        addr: SocketAddr::new(addr, backend.port),
        state: backend.state,
        flags: backend.flags,
        generation: backend.generation,
    }
}

fn octets4(addr: IpAddr) -> Option<Addr4> {
    match addr {
        IpAddr::V4(addr) => Some(Addr4 { octets: addr.octets() }),
        IpAddr::V6(_) => None,
    }
}

fn octets6(addr: IpAddr) -> Option<Addr6> {
    match addr {
        IpAddr::V4(_) => None,
        IpAddr::V6(addr) => Some(Addr6 { octets: addr.octets() }),
    }
}
