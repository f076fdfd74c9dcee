//! Typed read-outs of the pinned maps: what `fairlead status`, `services`, `backends` and `flows` print,
//! with and without an agent, and what the agent's metrics count.
//!
//! The names of all fields are part of the public interface (`-o json`).

mod labels;
mod select;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use aya::Pod;
use aya::maps::{LpmTrie, Map, MapData, MapError as AyaError, PerCpuArray};
use lb_common::abi::{
    self, Addr4, Addr6, Affinity, AffinityKey, Carry, Edge, Flow, FlowKey, MemberKey, Side, SocketKey,
    SocketPeer, SocketSide, Source, Window, address_flags, backend_flags, backend_state, edge_flags,
    flow_flags, frontend_kind, owner_kind, service_flags,
};
use lb_common::maps::{LAYOUT_VERSION, MAPS, MAX_USAGES, MapSpec};
use lb_common::reason::{Action, Hook, Reason, counter_index};
use serde::Serialize;

pub use self::labels::{Label, Labels};
pub use self::select::{EndpointFilter, NameFilter, SelectError};
use crate::datapath::pins::{self, Pins};
use crate::datapath::{Datapath, KernelMaps, MapError, Maps, OpenError, device_name, links, walk};
use crate::entries::{BackendEntry, Family, FrontendKey, FrontendKind, Protocol, Snapshot};
use crate::owner;
use crate::sys::bpf::{self, Cursor, LinkTarget};

/// The maps cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    #[error(
        "no datapath under {path}; is the agent started, and with the same --bpffs?",
        path = path.display()
    )]
    NoDatapath { path: PathBuf },
    #[error("{path}: {source}; run as root", path = path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Map(#[from] MapError),
    #[error(transparent)]
    Datapath(#[from] OpenError),
}

/// Entries of a flow table that are read at a time: a millisecond, and half a megabyte.
const FLOW_SLICE: usize = 4096;

/// Where a walk over the flow tables stands.
#[derive(Clone, Copy, Debug, Default)]
pub struct FlowPosition {
    table: usize,
    cursor: Option<Cursor>,
}

/// A datapath to look at.
pub struct Inspector {
    maps: BTreeMap<&'static str, MapData>,
    pins: Option<Pins>,
}

/// What became of packets at one hook for one reason; only what was seen.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct CounterView {
    pub hook: &'static str,
    pub reason: &'static str,
    /// `pass`, `carry`, `drop`, `reject`, `expire` or `shrink`.
    pub action: &'static str,
    pub packets: u64,
    pub bytes: u64,
}

/// A frontend and where it leads.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ServiceView {
    /// The address; `null`: every address of the node that NodePorts, or host ports, answer on.
    pub address: Option<IpAddr>,
    /// `IPv4` or `IPv6`.
    pub family: &'static str,
    pub port: u16,
    pub protocol: String,
    /// `ClusterIP`, `NodePort`, `LoadBalancer`, `ExternalIP` or `HostPort`.
    pub kind: String,
    /// Number of the Service or Pod; its frontends share it.
    pub service: u32,
    /// `Service`, or `Pod` of a host port; `null`: it has no name in the map.
    pub owner: Option<&'static str>,
    /// `null`: it has no name in the map.
    pub namespace: Option<String>,
    /// `null`: it has no name in the map. Beyond 63 bytes without its middle.
    pub name: Option<String>,
    /// The `port` of the Service, also of a nodePort; `null`: no other frontend tells it.
    pub service_port: Option<u16>,
    /// `maglev` or `random`.
    pub algorithm: &'static str,
    /// `dsr`: nodes of backends answer clients from outside themselves; else `snat`.
    pub mode: &'static str,
    /// How long a client is remembered, seconds; 0: it is not.
    pub affinity_seconds: u32,
    /// Networks that may ask; `null`: everybody may.
    pub source_ranges: Option<Vec<String>>,
    pub internal: ScopeView,
    pub external: ScopeView,
    /// What went through all frontends of this number; `null`: they are not counted by themselves.
    pub usage: Option<UsageView>,
}

/// What went through a Service or a Pod's host ports.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct UsageView {
    /// Flows begun, and sockets connected.
    pub connections: u64,
    /// Packets translated, both directions.
    pub packets: u64,
    /// Bytes of these IP packets.
    pub bytes: u64,
    /// Packets and sockets that were rejected or dropped.
    pub refused: u64,
}

/// The backends that clients of one scope may get.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ScopeView {
    /// The traffic policy, `Cluster` or `Local`, as far as the maps tell: without any endpoint in the cluster a `Local`
    /// for clients inside reads `Cluster`.
    pub policy: &'static str,
    /// What happens when there is none: `reject` or `drop`.
    pub when_empty: &'static str,
    /// First slot of its window.
    pub window: u32,
    /// Slots of its window.
    pub slots: u32,
    pub backends: Vec<ShareView>,
}

/// A port of a Service that has a backend.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct UserView {
    /// Number of the Service or Pod.
    pub service: u32,
    pub owner: Option<&'static str>,
    pub namespace: Option<String>,
    pub name: Option<String>,
    pub service_port: Option<u16>,
    pub protocol: String,
}

impl UserView {
    /// `namespace/name:port` as far as it is known.
    pub fn text(&self) -> String {
        let port = self.service_port.map(|port| format!(":{port}")).unwrap_or_default();
        match (&self.namespace, &self.name) {
            (Some(namespace), Some(name)) => format!("{namespace}/{name}{port}"),
            _ => format!("number {}{port}", self.service),
        }
    }
}

impl From<&ServiceView> for UserView {
    fn from(view: &ServiceView) -> Self {
        Self {
            service: view.service,
            owner: view.owner,
            namespace: view.namespace.clone(),
            name: view.name.clone(),
            service_port: view.service_port,
            protocol: view.protocol.clone(),
        }
    }
}

/// A backend and who has it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct UsedBackendView {
    #[serde(flatten)]
    pub backend: BackendView,
    /// Ports of Services, and host ports, that may choose it now; none: it only keeps connections, or nothing.
    pub services: Vec<UserView>,
}

/// A backend in a window.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ShareView {
    pub id: u32,
    /// `null`: the slot names a backend that is not there.
    pub address: Option<IpAddr>,
    pub port: u16,
    /// Slots of the window that name it: its share of new connections.
    pub slots: u32,
}

/// A backend.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct BackendView {
    pub id: u32,
    /// `IPv4` or `IPv6`.
    pub family: &'static str,
    pub address: IpAddr,
    pub port: u16,
    /// `unused`, `active` or `terminating`.
    pub state: &'static str,
    /// It runs on this node.
    pub local: bool,
    pub generation: u32,
}

/// One direction of a flow: the packet as it is seen, and as it goes on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct FlowView {
    /// `nic_in`, `nic_out`, `pod_in` or `pod_out`.
    pub side: &'static str,
    /// IP protocol number.
    pub protocol: u8,
    pub source: IpAddr,
    pub source_port: u16,
    pub destination: IpAddr,
    pub destination_port: u16,
    pub new_source: IpAddr,
    pub new_source_port: u16,
    pub new_destination: IpAddr,
    pub new_destination_port: u16,
    /// From the backend to the client.
    pub reply: bool,
    /// `pending` until the client has heard an answer, `established`, `closing` after a FIN, `closed` after a RST.
    pub state: &'static str,
    /// How a rewritten packet goes on: `stack`, `forward` or `bounce`; `direct`: the client asks for the backend itself,
    /// and the stack has the packet, as a rule as it came.
    pub carry: &'static str,
    pub service: u32,
    pub backend: u32,
    /// Since the last packet, to the second.
    pub idle_seconds: u64,
}

/// What a socket was told about one address.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct SocketView {
    pub cookie: u64,
    /// IP protocol number.
    pub protocol: u8,
    /// `forward` (frontend to backend) or `reply` (backend to frontend).
    pub side: &'static str,
    pub address: IpAddr,
    pub port: u16,
    pub new_address: IpAddr,
    pub new_port: u16,
    pub backend: u32,
}

/// An external edge.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct EdgeView {
    pub ifindex: u32,
    pub device: String,
    /// Source of IPv4 packets sent on through it; `0.0.0.0`: none.
    pub source4: IpAddr,
    /// Source of IPv6 packets sent on through it; `::`: none.
    pub source6: IpAddr,
    /// Further IPv4 sources (`--source-addresses`).
    pub more_sources4: u16,
    /// Further IPv6 sources.
    pub more_sources6: u16,
    /// XDP may redirect packets to it.
    pub xdp_transmit: bool,
    /// XDP sees what comes in before tc does.
    pub xdp_first: bool,
}

/// A program on a hook.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct LinkView {
    pub program: String,
    /// `xdp`, `tcx` or `cgroup`.
    pub kind: &'static str,
    /// The device; `null` for socket programs.
    pub device: Option<String>,
    pub ifindex: Option<u32>,
    /// `false`: the device or cgroup is gone.
    pub alive: bool,
    pub program_id: u32,
}

/// A loaded program.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ProgramView {
    pub program: String,
    pub id: u32,
    /// Instructions the verifier walked; 0: the kernel does not say.
    pub verified_instructions: u32,
    /// Bytes of native code; 0: the JIT is off.
    pub jited_bytes: u32,
}

/// How full a map is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct MapView {
    pub map: &'static str,
    pub entries: u32,
    pub max_entries: u32,
}

impl Inspector {
    /// Looks at the pins of an agent, which need not run.
    pub fn open(bpffs: &Path) -> Result<Self, InspectError> {
        let pins = Pins::new(bpffs);
        let mut maps = BTreeMap::new();
        for spec in &MAPS {
            let path = pins.map(spec.name);
            let data = MapData::from_pin(&path).map_err(|error| pin_error(bpffs, path, error))?;
            maps.insert(spec.name, data);
        }
        Ok(Self { maps, pins: Some(pins) })
    }

    /// Looks at a datapath of this process.
    pub fn of(datapath: &Datapath) -> Result<Self, InspectError> {
        let mut maps = BTreeMap::new();
        for spec in &MAPS {
            maps.insert(spec.name, datapath.map_data(spec)?);
        }
        Ok(Self { maps, pins: datapath.pins().cloned() })
    }

    /// Version of the pinned layout.
    pub fn layout_version(&self) -> u32 {
        LAYOUT_VERSION
    }

    /// Counters that are not zero, summed over all CPUs.
    pub fn counters(&self) -> Result<Vec<CounterView>, InspectError> {
        let map = Map::PerCpuArray(duplicate(self.data("COUNTERS")?).map_err(fail("COUNTERS"))?);
        let counters: PerCpuArray<MapData, abi::Counter> = map.try_into().map_err(fail("COUNTERS"))?;
        let mut views = Vec::new();
        for hook in Hook::ALL {
            for reason in Reason::ALL {
                let values = counters.get(&counter_index(hook, reason), 0).map_err(fail("COUNTERS"))?;
                let packets = values.iter().map(|counter| counter.packets).sum();
                let bytes = values.iter().map(|counter| counter.bytes).sum();
                if packets > 0 {
                    let action = action_name(reason.action());
                    views.push(CounterView {
                        hook: hook.name(),
                        reason: reason.name(),
                        action,
                        packets,
                        bytes,
                    });
                }
            }
        }
        Ok(views)
    }

    /// Every frontend with its backends, in the order of addresses.
    pub fn services(&self) -> Result<Vec<ServiceView>, InspectError> {
        let snapshot = self.snapshot()?;
        let usages = self.usages(snapshot.frontends.values().map(|service| service.id))?;
        let mut views = service_views(&snapshot);
        for view in &mut views {
            view.usage = usages.get(&view.service).copied();
        }
        Ok(views)
    }

    /// What the numbers of Services stand for. Reads the frontends and the names, and no backends.
    pub fn labels(&self) -> Result<Labels, InspectError> {
        let mut names = Vec::new();
        self.walk("NAMES", |service: u32, name: abi::OwnerName| names.push((service, name)))?;
        Ok(Labels::new(names, &self.frontends()?))
    }

    /// Every frontend as the map has it.
    pub fn frontends(&self) -> Result<BTreeMap<FrontendKey, abi::Service>, InspectError> {
        let mut frontends = BTreeMap::new();
        self.walk("SERVICES4", |key: abi::ServiceKey<Addr4>, service: abi::Service| {
            frontends.extend(frontend_key(&key).map(|key| (key, service)));
        })?;
        self.walk("SERVICES6", |key: abi::ServiceKey<Addr6>, service: abi::Service| {
            frontends.extend(frontend_key(&key).map(|key| (key, service)));
        })?;
        Ok(frontends)
    }

    /// Addresses of the node that NodePorts answer on; `None`: on all that host ports answer on.
    pub fn node_port_addresses(&self) -> Result<Option<BTreeSet<IpAddr>>, InspectError> {
        let (mut answering, mut is_restricted) = (BTreeSet::new(), false);
        let mut see = |addr: IpAddr, info: abi::AddressInfo| {
            let has = |flag| info.flags & flag != 0;
            if has(address_flags::NODE_PORT) {
                answering.insert(addr);
            }
            is_restricted |= has(address_flags::HOST_PORT) && !has(address_flags::NODE_PORT);
        };
        self.walk("ADDRESSES4", |addr: Addr4, info: abi::AddressInfo| see(addr.octets.into(), info))?;
        self.walk("ADDRESSES6", |addr: Addr6, info: abi::AddressInfo| see(addr.octets.into(), info))?;
        Ok(is_restricted.then_some(answering))
    }

    /// What went through the Services with these numbers, of those that are counted one by one.
    ///
    /// Sums wrap: a counter that is written by nobody else overflows in no lifetime, and a map may be damaged.
    pub fn usages(&self, ids: impl Iterator<Item = u32>) -> Result<BTreeMap<u32, UsageView>, InspectError> {
        let map = Map::PerCpuArray(duplicate(self.data("USAGE")?).map_err(fail("USAGE"))?);
        let usages: PerCpuArray<MapData, abi::Usage> = map.try_into().map_err(fail("USAGE"))?;
        let ids: BTreeSet<u32> = ids.filter(|id| (1..MAX_USAGES).contains(id)).collect();
        let mut views = BTreeMap::new();
        for id in ids {
            let values = usages.get(&id, 0).map_err(fail("USAGE"))?;
            let sum = |count: fn(&abi::Usage) -> u64| values.iter().map(count).fold(0, u64::wrapping_add);
            let view = UsageView {
                connections: sum(|usage| usage.connections),
                packets: sum(|usage| usage.packets),
                bytes: sum(|usage| usage.bytes),
                refused: sum(|usage| usage.refused),
            };
            views.insert(id, view);
        }
        Ok(views)
    }

    /// Every backend that is or was in use, with the Services that have it.
    pub fn used_backends(&self) -> Result<Vec<UsedBackendView>, InspectError> {
        let snapshot = self.snapshot()?;
        let mut users: BTreeMap<(&str, u32), BTreeSet<UserView>> = BTreeMap::new();
        for service in &service_views(&snapshot) {
            for share in service.internal.backends.iter().chain(&service.external.backends) {
                users.entry((service.family, share.id)).or_default().insert(service.into());
            }
        }
        let views = snapshot.backends.iter().map(|((family, id), entry)| {
            let backend = backend_view(*family, *id, entry);
            let services = users.remove(&(backend.family, *id)).unwrap_or_default();
            UsedBackendView { backend, services: services.into_iter().collect() }
        });
        Ok(views.collect())
    }

    /// Shows `visit` every direction of every flow; of half a million, so not as a list.
    pub fn flows(&self, mut visit: impl FnMut(FlowView)) -> Result<(), InspectError> {
        let mut at = FlowPosition::default();
        while let Some(next) = self.flow_slice(at, &mut visit)? {
            at = next;
        }
        Ok(())
    }

    /// Shows `visit` some flows from a place on; the next place, `None` at the end. Pending ones come first, so that one
    /// that is promoted meanwhile is seen, once or twice.
    pub fn flow_slice(
        &self,
        at: FlowPosition,
        visit: &mut impl FnMut(FlowView),
    ) -> Result<Option<FlowPosition>, InspectError> {
        const TABLES: [&str; 4] = ["PENDING4", "PENDING6", "FLOWS4", "FLOWS6"];
        let Some(name) = TABLES.get(at.table).copied() else { return Ok(None) };
        let pending = name.starts_with("PENDING");
        let next = if name.ends_with('4') {
            self.slice_of::<Addr4>(name, pending, at.cursor, visit)
        } else {
            self.slice_of::<Addr6>(name, pending, at.cursor, visit)
        }?;
        Ok(match next {
            Some(cursor) => Some(FlowPosition { cursor: Some(cursor), ..at }),
            None => Some(FlowPosition { table: at.table + 1, cursor: None }),
        })
    }

    fn slice_of<A: Address>(
        &self,
        name: &'static str,
        pending: bool,
        cursor: Option<Cursor>,
        visit: &mut impl FnMut(FlowView),
    ) -> Result<Option<Cursor>, InspectError>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        let map = self.data(name)?.fd().as_fd();
        let (entries, next) = bpf::map_lookup_batch::<FlowKey<A>, Flow<A>>(map, cursor, FLOW_SLICE)
            .map_err(|error| MapError::Failed { map: name.into(), reason: format!("read: {error}") })?;
        let now = monotonic_nanoseconds();
        for (key, flow) in entries {
            visit(flow_view(&key, &flow, pending, now));
        }
        Ok(next)
    }

    /// What sockets were told.
    pub fn sockets(&self) -> Result<Vec<SocketView>, InspectError> {
        let mut views = Vec::new();
        self.walk("SOCKETS", |key: SocketKey, peer: SocketPeer| views.push(socket_view(&key, &peer)))?;
        views.sort_by_key(|view| (view.cookie, view.address, view.port));
        Ok(views)
    }

    /// The external edges. Device names are those of the caller's network namespace.
    pub fn edges(&self) -> Result<Vec<EdgeView>, InspectError> {
        let mut views = Vec::new();
        self.walk("EDGES", |ifindex: u32, edge: Edge| {
            if edge.flags & edge_flags::POD != 0 {
                return;
            }
            views.push(EdgeView {
                ifindex,
                device: device_name(ifindex),
                source4: edge.addr4.octets.into(),
                source6: edge.addr6.octets.into(),
                more_sources4: edge.sources4,
                more_sources6: edge.sources6,
                xdp_transmit: edge.flags & edge_flags::XDP_TRANSMIT != 0,
                xdp_first: edge.flags & edge_flags::XDP_FIRST != 0,
            });
        })?;
        views.sort_by_key(|view| view.ifindex);
        Ok(views)
    }

    /// Programs that are attached through links. (Without tcx, tc programs are filters of their devices.)
    pub fn links(&self) -> Result<Vec<LinkView>, InspectError> {
        let Some(pins) = &self.pins else { return Ok(Vec::new()) };
        let found = links(pins).map_err(|source| InspectError::Open { path: pins.links(), source })?;
        Ok(found.iter().map(|(name, info)| link_view(name, info)).collect())
    }

    /// The programs as last loaded.
    pub fn programs(&self) -> Result<Vec<ProgramView>, InspectError> {
        let Some(pins) = &self.pins else { return Ok(Vec::new()) };
        let dir = pins.programs();
        let open = |path: &Path| {
            let path = path.to_owned();
            move |source| InspectError::Open { path, source }
        };
        let mut views = Vec::new();
        for program in pins::names(&dir).map_err(open(&dir))? {
            let path = dir.join(&program);
            let fd = bpf::obj_get(&path).map_err(open(&path))?;
            let info = bpf::prog_info(fd.as_fd()).map_err(open(&path))?;
            views.push(ProgramView {
                program,
                id: info.id,
                verified_instructions: info.verified_insns,
                jited_bytes: info.jited_len,
            });
        }
        Ok(views)
    }

    /// How full the hash maps are. Counts entries one by one: about 50 ns each.
    pub fn fill(&self) -> Result<Vec<MapView>, InspectError> {
        let mut views = Vec::new();
        for spec in &MAPS {
            let data = self.data(spec.name)?;
            let max_entries = data.info().map_err(fail(spec.name))?.max_entries();
            let entries = match spec.name {
                "SERVICES4" => self.count::<abi::ServiceKey<Addr4>, abi::Service>(spec)?,
                "SERVICES6" => self.count::<abi::ServiceKey<Addr6>, abi::Service>(spec)?,
                "ADDRESSES4" => self.count::<Addr4, abi::AddressInfo>(spec)?,
                "ADDRESSES6" => self.count::<Addr6, abi::AddressInfo>(spec)?,
                "EDGES" => self.count::<u32, Edge>(spec)?,
                "EDGE_SOURCES" => self.count::<abi::EdgeSourceKey, Edge>(spec)?,
                "FLOWS4" | "PENDING4" => self.count::<FlowKey<Addr4>, Flow<Addr4>>(spec)?,
                "FLOWS6" | "PENDING6" => self.count::<FlowKey<Addr6>, Flow<Addr6>>(spec)?,
                "SOCKETS" => self.count::<SocketKey, SocketPeer>(spec)?,
                "SOURCES4" => self.count_trie::<Source<Addr4>>(spec)?,
                "SOURCES6" => self.count_trie::<Source<Addr6>>(spec)?,
                "AFFINITY4" => self.count::<AffinityKey<Addr4>, Affinity>(spec)?,
                "AFFINITY6" => self.count::<AffinityKey<Addr6>, Affinity>(spec)?,
                "NAMES" => self.count::<u32, abi::OwnerName>(spec)?,
                "PLACES4" => self.count::<abi::ServiceKey<Addr4>, abi::Place<Addr4>>(spec)?,
                "PLACES6" => self.count::<abi::ServiceKey<Addr6>, abi::Place<Addr6>>(spec)?,
                "MEMBERS" => self.count::<MemberKey, u32>(spec)?,
                _ => continue,
            };
            views.push(MapView { map: spec.name, entries, max_entries });
        }
        Ok(views)
    }

    /// What the service maps hold, as the agent reads them back.
    pub fn snapshot(&self) -> Result<Snapshot, InspectError> {
        Ok(KernelMaps::new(|spec| self.map_data(spec))?.read()?)
    }

    /// A handle of its own on a map.
    pub(crate) fn map_data(&self, spec: &'static MapSpec) -> Result<MapData, OpenError> {
        let missing = || OpenError::Missing { kind: "map", name: spec.name };
        let data = self.maps.get(spec.name).ok_or_else(missing)?;
        duplicate(data).map_err(|error| OpenError::Map { name: spec.name, source: Box::new(error) })
    }

    fn count<K: Pod, V: Pod>(&self, spec: &MapSpec) -> Result<u32, InspectError> {
        let mut count = 0_u32;
        self.walk(spec.name, |_: K, _: V| count += 1)?;
        Ok(count)
    }

    /// How much of the arrays is in use that have a limit. Looks at every entry of them.
    pub fn fill_of_arrays(&self) -> Result<Vec<MapView>, InspectError> {
        let mut views = Vec::new();
        for spec in &MAPS {
            let entries = match spec.name {
                "BACKENDS4" => self.count_backends::<Addr4>(spec)?,
                "BACKENDS6" => self.count_backends::<Addr6>(spec)?,
                "SLOTS" => self.count_slots()?,
                _ => continue,
            };
            let max_entries = self.data(spec.name)?.info().map_err(fail(spec.name))?.max_entries();
            views.push(MapView { map: spec.name, entries, max_entries });
        }
        Ok(views)
    }

    /// Those that are in use.
    fn count_backends<A>(&self, spec: &MapSpec) -> Result<u32, InspectError>
    where
        abi::Backend<A>: Pod,
    {
        let mut count = 0_u32;
        self.walk(spec.name, |_: u32, backend: abi::Backend<A>| {
            count += u32::from(backend.state != backend_state::UNUSED);
        })?;
        Ok(count)
    }

    /// Those of windows that frontends refer to.
    fn count_slots(&self) -> Result<u32, InspectError> {
        let frontends = self.frontends()?;
        let windows = frontends.values().flat_map(|service| [service.internal, service.external]);
        let windows: BTreeMap<u32, u32> = windows.map(|window| (window.base, window.len)).collect();
        Ok(windows.values().sum())
    }

    /// Tries are read in batches only since 5.13.
    fn count_trie<K: Pod>(&self, spec: &MapSpec) -> Result<u32, InspectError> {
        let data = duplicate(self.data(spec.name)?).map_err(fail(spec.name))?;
        let trie: LpmTrie<MapData, K, u32> = Map::LpmTrie(data).try_into().map_err(fail(spec.name))?;
        let mut count = 0_u32;
        for key in trie.keys() {
            key.map_err(fail(spec.name))?;
            count += 1;
        }
        Ok(count)
    }

    fn walk<K: Pod, V: Pod>(&self, name: &'static str, visit: impl FnMut(K, V)) -> Result<(), InspectError> {
        Ok(walk(name, self.data(name)?.fd().as_fd(), visit)?)
    }

    fn data(&self, name: &'static str) -> Result<&MapData, InspectError> {
        Ok(self.maps.get(name).ok_or(OpenError::Missing { kind: "map", name })?)
    }
}

fn duplicate(data: &MapData) -> Result<MapData, AyaError> {
    MapData::from_fd(data.fd().as_fd().try_clone_to_owned()?)
}

fn pin_error(bpffs: &Path, path: PathBuf, error: AyaError) -> InspectError {
    match error {
        AyaError::SyscallError(error) if error.io_error.kind() == io::ErrorKind::NotFound => {
            InspectError::NoDatapath { path: bpffs.to_owned() }
        }
        AyaError::SyscallError(error) => InspectError::Open { path, source: error.io_error },
        error => InspectError::Open { path, source: io::Error::other(error) },
    }
}

fn fail(map: &'static str) -> impl Fn(AyaError) -> InspectError {
    move |error| MapError::Failed { map: map.into(), reason: error.to_string() }.into()
}

/// Every frontend, without its usage.
fn service_views(snapshot: &Snapshot) -> Vec<ServiceView> {
    let labels = Labels::of(snapshot);
    snapshot
        .frontends
        .iter()
        .map(|(key, service)| ServiceView {
            service_port: labels.port(service.id, key.protocol, key.port),
            ..service_view(snapshot, *key, service)
        })
        .collect()
}

fn service_view(snapshot: &Snapshot, key: FrontendKey, service: &abi::Service) -> ServiceView {
    let family = Family::of(key.addr);
    let is_local = |flag: u16| if service.flags & flag == 0 { "Cluster" } else { "Local" };
    let scope = |window: Window, drop: u16, policy: &'static str| ScopeView {
        policy,
        when_empty: if service.flags & drop == 0 { "reject" } else { "drop" },
        window: window.base,
        slots: window.len,
        backends: shares(snapshot, family, window),
    };
    let external = match service.kind {
        // The internal policy is theirs, whoever asks.
        frontend_kind::CLUSTER_IP => is_local(service_flags::INTERNAL_DROP),
        frontend_kind::HOST_PORT => "Local",
        _ => is_local(service_flags::SOURCE_KEPT),
    };
    let internal = match service.kind {
        frontend_kind::HOST_PORT => "Local",
        _ => is_local(service_flags::INTERNAL_DROP),
    };
    let name = snapshot.names.get(&service.id);
    let restricted = service.flags & service_flags::SOURCE_RANGES != 0;
    let ranges = snapshot.sources.get(&service.id).into_iter().flatten();
    let ranges = ranges.filter(|net| Family::of(net.addr()) == family).map(ToString::to_string).collect();
    ServiceView {
        address: (!key.addr.is_unspecified()).then_some(key.addr),
        family: family_name(family),
        port: key.port,
        protocol: key.protocol.to_string(),
        kind: FrontendKind::from_number(service.kind)
            .map_or_else(|| format!("unknown ({})", service.kind), |kind| kind.to_string()),
        service: service.id,
        owner: name.map(|name| owner_name(name.kind)),
        namespace: name.map(|name| owner::text(&name.namespace)),
        name: name.map(|name| owner::text(&name.name)),
        service_port: None,
        algorithm: if service.flags & service_flags::MAGLEV == 0 { "random" } else { "maglev" },
        mode: if service.flags & service_flags::DSR == 0 { "snat" } else { "dsr" },
        affinity_seconds: service.affinity,
        source_ranges: restricted.then_some(ranges),
        internal: scope(service.internal, service_flags::INTERNAL_DROP, internal),
        external: scope(service.external, service_flags::EXTERNAL_DROP, external),
        usage: None,
    }
}

/// The backends of a window with their shares, in the order of ids.
pub(crate) fn shares(snapshot: &Snapshot, family: Family, window: Window) -> Vec<ShareView> {
    let mut slots: BTreeMap<u32, u32> = BTreeMap::new();
    for id in snapshot.slots.get(&window.base).into_iter().flatten().take(window.len as usize) {
        *slots.entry(*id).or_default() += 1;
    }
    slots
        .into_iter()
        .map(|(id, slots)| {
            let backend =
                snapshot.backends.get(&(family, id)).filter(|backend| backend.state != backend_state::UNUSED);
            ShareView {
                id,
                address: backend.map(|backend| backend.addr.ip()),
                port: backend.map_or(0, |backend| backend.addr.port()),
                slots,
            }
        })
        .collect()
}

pub(crate) fn backend_view(family: Family, id: u32, entry: &BackendEntry) -> BackendView {
    BackendView {
        id,
        family: family_name(family),
        address: entry.addr.ip(),
        port: entry.addr.port(),
        state: match entry.state {
            backend_state::UNUSED => "unused",
            backend_state::ACTIVE => "active",
            backend_state::TERMINATING => "terminating",
            _ => "unknown",
        },
        local: entry.flags & backend_flags::LOCAL != 0,
        generation: entry.generation,
    }
}

/// An address of either family.
trait Address: Copy {
    fn ip(self) -> IpAddr;
}

impl Address for Addr4 {
    fn ip(self) -> IpAddr {
        self.octets.into()
    }
}

impl Address for Addr6 {
    fn ip(self) -> IpAddr {
        self.octets.into()
    }
}

/// `None`: nothing of ours has this protocol.
fn frontend_key<A: Address>(key: &abi::ServiceKey<A>) -> Option<FrontendKey> {
    let protocol = Protocol::from_number(key.proto)?;
    Some(FrontendKey { addr: key.addr.ip(), port: key.port, protocol })
}

fn flow_view<A: Address>(key: &FlowKey<A>, flow: &Flow<A>, pending: bool, now: u64) -> FlowView {
    FlowView {
        side: side_name(key.side),
        protocol: key.proto,
        source: key.src.ip(),
        source_port: key.src_port,
        destination: key.dst.ip(),
        destination_port: key.dst_port,
        new_source: flow.src.ip(),
        new_source_port: flow.src_port,
        new_destination: flow.dst.ip(),
        new_destination_port: flow.dst_port,
        reply: flow.flags & flow_flags::REPLY != 0,
        state: if flow.flags & flow_flags::RST != 0 {
            "closed"
        } else if flow.flags & (flow_flags::FIN | flow_flags::PEER_FIN) != 0 {
            "closing"
        } else if pending {
            "pending"
        } else {
            "established"
        },
        carry: match flow.carry {
            _ if lb_common::flow::is_direct(flow) => "direct",
            carry if carry == Carry::Stack as u8 => "stack",
            carry if carry == Carry::Forward as u8 => "forward",
            carry if carry == Carry::Bounce as u8 => "bounce",
            carry if carry == Carry::Tunnel as u8 => "tunnel",
            _ => "unknown",
        },
        service: flow.service,
        backend: flow.backend,
        idle_seconds: now.saturating_sub(flow.last_seen) / 1_000_000_000,
    }
}

fn socket_view(key: &SocketKey, peer: &SocketPeer) -> SocketView {
    SocketView {
        cookie: key.cookie,
        protocol: key.proto,
        side: match key.side {
            side if side == SocketSide::Forward as u8 => "forward",
            side if side == SocketSide::Reply as u8 => "reply",
            _ => "unknown",
        },
        address: Ipv6Addr::from(key.addr.octets).to_canonical(),
        port: key.port,
        new_address: Ipv6Addr::from(peer.addr.octets).to_canonical(),
        new_port: peer.port,
        backend: peer.backend,
    }
}

fn link_view(name: &str, info: &bpf::LinkInfo) -> LinkView {
    let (kind, ifindex, alive) = match info.target {
        LinkTarget::Xdp { ifindex } => ("xdp", Some(ifindex), ifindex != 0),
        LinkTarget::Tcx { ifindex, .. } => ("tcx", Some(ifindex), ifindex != 0),
        LinkTarget::Cgroup { id, .. } => ("cgroup", None, id != 0),
        LinkTarget::Other { .. } => ("unknown", None, true),
    };
    LinkView {
        program: pins::parse_device_link(name).map_or(name, |(program, _)| program).to_owned(),
        kind,
        device: ifindex.filter(|ifindex| *ifindex != 0).map(device_name),
        ifindex,
        alive,
        program_id: info.prog_id,
    }
}

fn side_name(side: u8) -> &'static str {
    [(Side::NicIn, "nic_in"), (Side::NicOut, "nic_out"), (Side::PodIn, "pod_in"), (Side::PodOut, "pod_out")]
        .into_iter()
        .find_map(|(known, name)| (known as u8 == side).then_some(name))
        .unwrap_or("unknown")
}

pub(crate) fn action_name(action: Action) -> &'static str {
    match action {
        Action::Pass => "pass",
        Action::Carry => "carry",
        Action::Drop => "drop",
        Action::Reject => "reject",
        Action::Expire => "expire",
        Action::Shrink => "shrink",
    }
}

pub(crate) fn owner_name(kind: u32) -> &'static str {
    match kind {
        owner_kind::SERVICE => "Service",
        owner_kind::POD => "Pod",
        _ => "unknown",
    }
}

fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// What the programs call now.
pub(crate) fn monotonic_nanoseconds() -> u64 {
    let clock = nix::time::ClockId::CLOCK_MONOTONIC;
    nix::time::clock_gettime(clock).map_or(0, |time| {
        let nanoseconds = i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec());
        u64::try_from(nanoseconds).unwrap_or_default()
    })
}
