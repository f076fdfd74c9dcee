//! The node that packets meet: a namespace with one device, and loaded programs whose maps know Services.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use fairlead::datapath::{Datapath, Maps, Options, Place, Sizes};
use fairlead::entries::{self, BackendEntry, FrontendKey, Op, Protocol};
use fairlead::routing::Routing;
use fairlead::sys::bpf::{self as kernel, AttachType, Target};
use fairlead::sys::netns;
use lb_common::abi::{
    Addr4, Addr6, Edge, Service, Window, address_flags, backend_flags, backend_state, edge_flags,
    frontend_kind, service_flags,
};
use lb_common::maps::{MAPS, max_pending};
use lb_common::tunnel;

use crate::asm::Code;
use crate::bpf::{self, ProgType};
use crate::frame::{DEVICE_MAC, Family, ROUTER_MAC};

const XDP_DROP: i32 = 1;
const DEVICE: &str = "up0";
/// The other end of its wire.
const PEER: &str = "up1";

/// NodePorts, by where their backends are.
pub(crate) const PORT_HERE: u16 = 30080;
pub(crate) const PORT_THERE: u16 = 30081;
pub(crate) const PORT_NOWHERE: u16 = 30082;
/// The port of Services at their ClusterIPs.
pub(crate) const PORT: u16 = 80;

/// Backends on the other node: enough that a million flows find source ports.
const BACKENDS_THERE: u8 = 250;
/// Backend 1 is here, the others are there.
const FIRST_THERE: u32 = 2;
/// Slots of a Maglev table.
const SLOTS: u32 = 1021;
const HERE: Window = Window { base: 1, len: SLOTS };
const THERE: Window = Window { base: 1 + SLOTS, len: SLOTS };
const NOWHERE: Window = Window { base: 0, len: 0 };
/// The numbers of Services at ClusterIPs follow those of the NodePorts.
const FIRST_SERVICE: u32 = 10;
/// Operations that are carried out at once.
const BATCH: usize = 4096;

/// A namespace with a device that has a node's addresses.
pub(crate) struct Link {
    pub(crate) ifindex: u32,
    /// Drops what arrives at the other end of the wire.
    _sink: OwnedFd,
}

impl Link {
    /// Takes the calling thread, and those that it will start, into a namespace of its own.
    pub(crate) fn new() -> Result<Self> {
        netns::enter_new().context("cannot make a network namespace; this needs root")?;
        ip("link set lo up")?;
        ip(&format!("link add {DEVICE} address {} type veth peer name {PEER}", mac(DEVICE_MAC)))?;
        ip(&format!("link set {PEER} up"))?;
        ip(&format!("link set {DEVICE} up"))?;
        for sysctl in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/{sysctl}"), "1")
                .with_context(|| format!("cannot set {sysctl}"))?;
        }
        for family in Family::ALL {
            let (router, host) = (family.router(), 8 * family.address_len());
            let nodad = if family == Family::V6 { "nodad" } else { "" };
            ip(&format!("addr add {}/{host} dev {DEVICE} {nodad}", family.node()))?;
            ip(&format!("neigh add {router} lladdr {} nud permanent dev {DEVICE}", mac(ROUTER_MAC)))?;
            ip(&format!("route add {router}/{host} dev {DEVICE}"))?;
            ip(&format!("route add default via {router} dev {DEVICE}"))?;
        }
        let index =
            |name: &str| nix::net::if_::if_nametoindex(name).with_context(|| format!("no device {name}"));
        let mut drop = Code::default();
        drop.exit(XDP_DROP);
        let drop = bpf::prog_load(ProgType::Xdp, drop.insns())?;
        let target = Target::Device(index(PEER)?);
        let sink = kernel::link_create(drop.as_fd(), target, AttachType::Xdp, kernel::XDP_DRV_MODE)
            .context("cannot put a program on the end of the wire")?;
        Ok(Self { ifindex: index(DEVICE)?, _sink: sink })
    }
}

/// Loaded programs, and maps with Services.
pub(crate) struct Node {
    datapath: Datapath,
    flows: u32,
    /// Vouches for next hops as long as it is there.
    _routing: Routing,
}

impl Node {
    /// Programs with room for `flows` entries of each family, and so many Services.
    pub(crate) fn new(link: &Link, flows: u32, services: u32) -> Result<Self> {
        Self::with_ops(link, flows, services, 0, &operations(services))
    }

    /// The same with one Service, where backends that are not here answer clients themselves.
    pub(crate) fn tunnelling(link: &Link, flows: u32) -> Result<Self> {
        let mut ops = operations(1);
        for op in &mut ops {
            if let Op::SetFrontend { entry, .. } = op {
                entry.flags |= service_flags::DSR;
            }
        }
        for family in Family::ALL {
            let places = backends_there(family).map(|(id, addr)| Op::SetPlace {
                key: FrontendKey { addr: addr.ip(), port: addr.port(), protocol: Protocol::Tcp },
                place: entries::Place { backend: id, node: Some(family.router()) },
            });
            ops.extend(places);
        }
        Self::with_ops(link, flows, 1, tunnel::DEFAULT_PORT, &ops)
    }

    fn with_ops(link: &Link, flows: u32, services: u32, tunnel_port: u16, ops: &[Op]) -> Result<Self> {
        let sizes =
            Sizes { flows: Some(flows), services: Some(services + 64), backends: Some(services.max(1024)) };
        let datapath = Datapath::isolated(&Options { sizes, tunnel_port, ..Options::default() })?;
        let mut edges = datapath.edges_map()?;
        edges.insert(link.ifindex, edge()?, 0).context("cannot write EDGES")?;
        // As with an agent that lives and follows a node where nothing changes.
        let mut routing = Routing::open(&datapath)?;
        routing.vouch(Duration::from_hours(24))?;
        let mut maps = datapath.maps()?;
        ops.chunks(BATCH).try_for_each(|batch| maps.apply(batch))?;
        Ok(Self { datapath, flows, _routing: routing })
    }

    /// The program of a place.
    pub(crate) fn program(&self, place: Place) -> Result<BorrowedFd<'_>> {
        self.datapath.programs().get(place.program()).with_context(|| format!("no program {place:?}"))
    }

    pub(crate) fn datapath(&self) -> &Datapath {
        &self.datapath
    }

    /// Pending flows that fit, with room to spare.
    pub(crate) fn pending(&self) -> u32 {
        max_pending(self.flows) / 4
    }

    /// Forgets all pending flows of a family. How many entries that were.
    pub(crate) fn forget_pending(&self, family: Family) -> Result<usize> {
        let pending = self.flow_map("PENDING", family)?;
        let mut gone = 0;
        while let Some((keys, _)) = pending.take()? {
            gone += keys.len() / pending.key_size;
        }
        Ok(gone)
    }

    /// Makes established flows of all pending ones of a family, as if their clients had gone on. How many entries that
    /// were.
    pub(crate) fn establish_pending(&self, family: Family) -> Result<usize> {
        let (pending, flows) = (self.flow_map("PENDING", family)?, self.flow_map("FLOWS", family)?);
        let mut moved = 0;
        while let Some((keys, values)) = pending.take()? {
            bpf::put_entries(flows.fd.as_fd(), &keys, &values, flows.key_size)?;
            moved += keys.len() / flows.key_size;
        }
        Ok(moved)
    }

    fn flow_map(&self, name: &str, family: Family) -> Result<FlowMap> {
        let name = format!("{name}{}", if family == Family::V4 { 4 } else { 6 });
        let spec = MAPS.iter().find(|spec| spec.name == name).with_context(|| format!("no map {name}"))?;
        let map = self.datapath.map_data(spec)?;
        let fd = map.fd().as_fd().try_clone_to_owned().context("cannot keep a map")?;
        Ok(FlowMap { fd, key_size: spec.key_size as usize, value_size: spec.value_size as usize })
    }
}

struct FlowMap {
    fd: OwnedFd,
    key_size: usize,
    value_size: usize,
}

impl FlowMap {
    /// Some entries, which are in the map no longer; `None`: it is empty.
    fn take(&self) -> Result<Option<(Vec<u8>, Vec<u8>)>> {
        let (keys, values) = bpf::take_entries(self.fd.as_fd(), self.key_size, self.value_size)?;
        Ok((!keys.is_empty()).then_some((keys, values)))
    }
}

/// The node's device.
fn edge() -> Result<Edge> {
    let (IpAddr::V4(v4), IpAddr::V6(v6)) = (Family::V4.node(), Family::V6.node()) else {
        bail!("a node has an address of each family");
    };
    Ok(Edge {
        addr4: Addr4 { octets: v4.octets() },
        addr6: Addr6 { octets: v6.octets() },
        flags: edge_flags::XDP_TRANSMIT,
        ..Edge::default()
    })
}

/// What the agent would write.
fn operations(services: u32) -> Vec<Op> {
    let there = |slot: u32| FIRST_THERE + slot % u32::from(BACKENDS_THERE);
    let mut ops = vec![
        Op::WriteSlots { base: HERE.base, slots: vec![1; SLOTS as usize] },
        Op::WriteSlots { base: THERE.base, slots: (0..SLOTS).map(there).collect() },
    ];
    for family in Family::ALL {
        let node = address_flags::NODE | address_flags::NODE_PORT | address_flags::HOST_PORT;
        ops.push(Op::SetAddress { addr: family.node(), flags: node });
        ops.extend(backend(family, 1, family.backend(true, 1), backend_flags::LOCAL));
        ops.extend(backends_there(family).flat_map(|(id, addr)| backend(family, id, addr, 0)));
        let any = match family {
            Family::V4 => entries::Family::V4.unspecified(),
            Family::V6 => entries::Family::V6.unspecified(),
        };
        for (id, port, window) in [(1, PORT_HERE, HERE), (2, PORT_THERE, THERE), (3, PORT_NOWHERE, NOWHERE)] {
            ops.push(frontend(any, port, service(id, frontend_kind::NODE_PORT, window)));
        }
        for number in 0..services {
            let addr = family.cluster_ip(number);
            ops.push(Op::SetAddress { addr, flags: address_flags::SERVICE });
            ops.push(frontend(addr, PORT, service(FIRST_SERVICE + number, frontend_kind::CLUSTER_IP, THERE)));
        }
    }
    ops
}

/// Backends on the other node, with their ids.
fn backends_there(family: Family) -> impl Iterator<Item = (u32, SocketAddr)> {
    (0..BACKENDS_THERE)
        .map(move |number| (FIRST_THERE + u32::from(number), family.backend(false, number + 1)))
}

fn backend(family: Family, id: u32, addr: SocketAddr, flags: u8) -> [Op; 2] {
    let family = match family {
        Family::V4 => entries::Family::V4,
        Family::V6 => entries::Family::V6,
    };
    let entry = BackendEntry { addr, state: backend_state::ACTIVE, flags, generation: 1 };
    [
        Op::SetBackend { family, id, entry },
        Op::SetAddress { addr: addr.ip(), flags: address_flags::BACKEND_TCP },
    ]
}

fn frontend(addr: IpAddr, port: u16, entry: Service) -> Op {
    Op::SetFrontend { key: FrontendKey { addr, port, protocol: Protocol::Tcp }, entry }
}

fn service(id: u32, kind: u8, window: Window) -> Service {
    Service {
        id,
        flags: service_flags::MAGLEV,
        kind,
        pad: 0,
        internal: window,
        external: window,
        affinity: 0,
        port: id,
    }
}

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().context("cannot run ip")?;
    if !output.status.success() {
        bail!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn mac(octets: [u8; 6]) -> String {
    octets.map(|octet| format!("{octet:02x}")).join(":")
}
