//! `fairlead trace`: what becomes of a packet, and why, without a packet.
//!
//! The programs are loaded once more as the agent has loaded them, over its maps but with tables of their own for what
//! they write ([`Datapath::twin`](crate::datapath::Datapath)), and run on a packet that goes nowhere
//! (`BPF_PROG_TEST_RUN`). Sockets cannot be tried so: for processes of the node the same decisions are made here, on what
//! the maps hold.
//!
//! The names of all fields are part of the public interface (`-o json`).

mod ask;
mod bench;
mod frame;
mod packet;
mod route;
mod show;
mod socket;
mod words;

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use lb_common::abi::{self, Addr6, Network, PrefixKey, ServiceKey, Source};
use lb_common::host::HostTables;
use lb_common::reason::Action;
use lb_common::service;
use lb_common::{Reason, V4, V6};
use serde::Serialize;

pub use self::ask::{From, Target, To};
pub use self::frame::Tuple;
use self::route::way_to;
pub use self::show::show;
pub use self::words::meaning;
use crate::datapath::{OpenError, Options, settings};
use crate::entries::{Family, FrontendKey, FrontendKind, Protocol, Snapshot};
use crate::inspect::{
    self, BackendView, InspectError, Inspector, ShareView, monotonic_nanoseconds, owner_name,
};
use crate::owner;

/// It cannot be said what becomes of the packet.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error(transparent)]
    Inspect(#[from] InspectError),
    #[error(transparent)]
    Datapath(#[from] OpenError),
    #[error("netlink: {0}")]
    Netlink(io::Error),
    #[error("FROM and TO are not of one IP family")]
    TwoFamilies,
    #[error("--via {0}: there is no such device here; see `ip link`")]
    NoDevice(String),
    #[error(
        "no route leads to {0}, so that its packets have no device to come in through; name it with --via"
    )]
    NoWay(IpAddr),
    #[error("no frontend of {what}; see `fairlead services`")]
    NoFrontend { what: String },
    #[error("{what} is one of {choice}; name the port, or the address")]
    Ambiguous { what: String, choice: String },
    #[error("the packet cannot be built: {0}")]
    Packet(String),
    #[error("program {program}: {source}")]
    Program { program: &'static str, source: io::Error },
    #[error("the programs cannot be tried: {0}")]
    Run(String),
}

/// What is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Question {
    pub bpffs: PathBuf,
    pub from: From,
    pub to: To,
    /// Where a Service is looked for.
    pub namespace: String,
    /// The device the packet comes in through; `None`: the one that leads to where it comes from.
    pub via: Option<String>,
}

/// What becomes of a packet.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Trace {
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// `null`: a process, whose socket has none yet.
    pub source: Option<SocketAddr>,
    pub destination: SocketAddr,
    /// Where the client is attached: `external`, `pod` or `socket`.
    pub edge: &'static str,
    /// `null` for a socket.
    pub device: Option<String>,
    /// `new`, or how far the connection is that has this tuple: `pending` or `established`.
    pub flow: &'static str,
    /// `null`: nothing answers there.
    pub frontend: Option<FrontendView>,
    /// The backend that was chosen, or that the connection has; `null`: none.
    pub backend: Option<BackendView>,
    /// The client's packet, hook by hook.
    pub request: Vec<Step>,
    /// How the request goes on; `null`: not rewritten.
    pub way: Option<WayView>,
    /// The backend's answer, hook by hook.
    pub reply: Vec<Step>,
    /// The client sees the answer come from where it asked; `null`: there is none.
    pub answered: Option<bool>,
    /// `pass`, `carry`, `drop`, `reject`, `expire` or `shrink`: what happens to the request.
    pub action: &'static str,
    pub reason: &'static str,
    pub meaning: &'static str,
    /// What else is worth knowing.
    pub notes: Vec<String>,
}

/// What one program did.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Step {
    pub hook: &'static str,
    /// `null` for a socket.
    pub device: Option<String>,
    pub action: &'static str,
    pub reason: &'static str,
    pub meaning: &'static str,
    /// `null` for a socket.
    pub before: Option<Tuple>,
    /// `null`: not rewritten.
    pub after: Option<Tuple>,
}

/// The frontend that answers, and what of it counts for this client.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct FrontendView {
    pub kind: String,
    /// `null`: every address of the node.
    pub address: Option<IpAddr>,
    pub port: u16,
    /// `Service` or `Pod`; `null`: it has no name in the map.
    pub owner: Option<&'static str>,
    pub namespace: Option<String>,
    pub name: Option<String>,
    /// `internal` or `external`.
    pub scope: &'static str,
    pub scope_because: &'static str,
    /// Networks that may ask; `null`: everybody may.
    pub source_ranges: Option<Vec<String>>,
    pub source_allowed: bool,
    /// How long a client is remembered, seconds; 0: it is not.
    pub affinity_seconds: u32,
    /// The backend that the client is remembered with.
    pub remembered: Option<u32>,
    /// `maglev` or `random`.
    pub algorithm: &'static str,
    /// Slots of the window.
    pub slots: u32,
    pub backends: Vec<ShareView>,
}

/// How a rewritten request goes on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct WayView {
    /// `stack`, `forward` or `bounce`.
    pub carry: &'static str,
    /// `null`: no route leads there.
    pub device: Option<String>,
    /// `null`: it is on the link.
    pub next_hop: Option<IpAddr>,
}

/// Answers a question.
pub fn trace(question: &Question) -> Result<Trace, TraceError> {
    let live = Inspector::open(&question.bpffs)?;
    let snapshot = live.snapshot()?;
    let client = match question.from {
        From::Node => None,
        From::Client(client) => Some(client),
    };
    let family = client.map(|client| Family::of(client.ip()));
    let to = resolve(question, &snapshot, family)?;
    if family.is_some_and(|family| family != Family::of(to.ip())) {
        return Err(TraceError::TwoFamilies);
    }
    let context = Context { question, live, snapshot, to, options: settings(&question.bpffs)? };
    let Some(client) = client else { return socket::trace(&context) };
    let arrival = match &question.via {
        Some(name) => packet::Arrival::through(&context, name)?,
        None => match way_to(client.ip())?.ok_or(TraceError::NoWay(client.ip()))? {
            way if way.local => return socket::trace(&context),
            way => packet::Arrival::at(&context, way.ifindex)?,
        },
    };
    match client.ip() {
        IpAddr::V4(_) => packet::trace::<V4>(&context, client, arrival),
        IpAddr::V6(_) => packet::trace::<V6>(&context, client, arrival),
    }
}

/// What everybody needs to answer.
struct Context<'a> {
    question: &'a Question,
    live: Inspector,
    snapshot: Snapshot,
    to: SocketAddr,
    /// What the programs were told.
    options: Options,
}

impl Context<'_> {
    fn protocol(&self) -> Protocol {
        self.question.to.protocol
    }

    /// The family's service maps on the host. (Flows and what else programs write are left out.)
    fn tables<F: bench::Kin>(&self) -> HostTables<F> {
        let family = Family::of(self.to.ip());
        let snapshot = &self.snapshot;
        let services = snapshot.frontends.iter().filter(|(key, _)| Family::of(key.addr) == family);
        let key = |key: &FrontendKey| ServiceKey {
            addr: addr::<F>(key.addr),
            port: key.port,
            proto: key.protocol.number(),
            pad: 0,
        };
        let addresses = snapshot.addresses.iter().filter(|(addr, _)| Family::of(**addr) == family);
        let sources =
            snapshot.sources.iter().flat_map(|(service, nets)| nets.iter().map(|net| (*service, *net)));
        let sources = sources.filter(|(_, net)| Family::of(net.addr()) == family);
        let backends = snapshot.backends.iter().filter(|((known, _), _)| *known == family);
        let slots = snapshot.slots.iter().flat_map(|(base, slots)| (*base..).zip(slots.iter().copied()));
        let [networks4, networks6] = &snapshot.networks;
        let networks = if family == Family::V4 { networks4 } else { networks6 };
        HostTables {
            services: services.map(|(frontend, service)| (key(frontend), *service)).collect(),
            addresses: addresses
                .map(|(known, flags)| (addr::<F>(*known), abi::AddressInfo { flags: *flags }))
                .collect(),
            sources: sources
                .map(|(service, net)| PrefixKey {
                    prefix_len: 32 + u32::from(net.prefix_len()),
                    data: Source { service, addr: addr::<F>(net.addr()) },
                })
                .collect(),
            networks: networks
                .iter()
                .map(|(net, flags)| Network {
                    addr: addr::<F>(net.addr()),
                    mask: addr::<F>(net.netmask()),
                    flags: *flags,
                })
                .collect(),
            slots: slots.collect(),
            backends: backends
                .map(|((_, id), entry)| {
                    let backend = abi::Backend {
                        addr: addr::<F>(entry.addr.ip()),
                        port: entry.addr.port(),
                        state: entry.state,
                        flags: entry.flags,
                        generation: entry.generation,
                    };
                    (*id, backend)
                })
                .collect(),
            admission: self.options.admission,
            masquerades_all: self.options.masquerade_all,
            now: monotonic_nanoseconds().into(),
            ..HostTables::default()
        }
    }

    /// The frontend that answers, as the programs find it.
    fn frontend<F: bench::Kin>(&self, tables: &HostTables<F>) -> Option<abi::Service> {
        let dst = addr::<F>(self.to.ip());
        let info = service::address::<F, _>(tables, &dst).ok()?;
        let key = ServiceKey { addr: dst, port: self.to.port(), proto: self.protocol().number(), pad: 0 };
        let mut found = abi::Service::default();
        service::find::<F, _>(tables, &key, info, &mut found).ok()?;
        Some(found)
    }

    /// How the frontend looks to a client of this scope.
    fn frontend_view(&self, service: &abi::Service, scope: Scope) -> FrontendView {
        let family = Family::of(self.to.ip());
        let window = if scope.internal { service.internal } else { service.external };
        let name = self.snapshot.names.get(&service.id);
        let restricted = service.flags & abi::service_flags::SOURCE_RANGES != 0;
        let ranges = self.snapshot.sources.get(&service.id).into_iter().flatten();
        let exact = FrontendKey { addr: self.to.ip(), port: self.to.port(), protocol: self.protocol() };
        FrontendView {
            kind: FrontendKind::from_number(service.kind)
                .map_or_else(|| format!("unknown ({})", service.kind), |kind| kind.to_string()),
            address: self.snapshot.frontends.contains_key(&exact).then_some(exact.addr),
            port: exact.port,
            owner: name.map(|name| owner_name(name.kind)),
            namespace: name.map(|name| owner::text(&name.namespace)),
            name: name.map(|name| owner::text(&name.name)),
            scope: if scope.internal { "internal" } else { "external" },
            scope_because: scope.because,
            source_ranges: restricted.then(|| {
                ranges.filter(|net| Family::of(net.addr()) == family).map(ToString::to_string).collect()
            }),
            source_allowed: true,
            affinity_seconds: service.affinity,
            remembered: None,
            algorithm: if service.flags & abi::service_flags::MAGLEV == 0 { "random" } else { "maglev" },
            slots: window.len,
            backends: inspect::shares(&self.snapshot, family, window),
        }
    }

    fn backend_view(&self, id: u32) -> Option<BackendView> {
        let family = Family::of(self.to.ip());
        let entry = self.snapshot.backends.get(&(family, id))?;
        Some(inspect::backend_view(family, id, entry))
    }
}

/// Who the client is to traffic policies, and why.
#[derive(Clone, Copy)]
struct Scope {
    internal: bool,
    because: &'static str,
}

/// A step without packets.
fn step(hook: lb_common::Hook, device: Option<String>, reason: Reason) -> Step {
    Step {
        hook: hook.name(),
        device,
        action: inspect::action_name(reason.action()),
        reason: reason.name(),
        meaning: meaning(reason),
        before: None,
        after: None,
    }
}

/// The address as the maps have it. One of the other family comes out as nobody's.
fn addr<F: lb_common::Family>(addr: IpAddr) -> F::Addr {
    let octets = match addr {
        IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
        IpAddr::V6(addr) => addr.octets(),
    };
    F::from_mapped(&Addr6 { octets })
}

/// The address as people have it.
fn ip<F: lb_common::Family>(addr: &F::Addr) -> IpAddr {
    let mapped = Ipv6Addr::from(F::to_mapped(addr).octets);
    if F::ETHER_TYPE == <V4 as lb_common::Family>::ETHER_TYPE { mapped.to_canonical() } else { mapped.into() }
}

/// The address and port that a question is about.
fn resolve(
    question: &Question,
    snapshot: &Snapshot,
    family: Option<Family>,
) -> Result<SocketAddr, TraceError> {
    let To { target, port, protocol } = &question.to;
    if let (Target::Address(addr), Some(port)) = (target, port) {
        return Ok(SocketAddr::new(*addr, *port));
    }
    let what = match target {
        Target::Address(addr) => format!("{addr} with {protocol}"),
        Target::Service(name) => format!("Service {}/{name} with {protocol}", question.namespace),
    };
    let is_meant = |key: &FrontendKey, service: &abi::Service| match target {
        Target::Address(addr) => key.addr == *addr,
        Target::Service(name) => {
            let owner = snapshot.names.get(&service.id);
            service.kind == FrontendKind::ClusterIP.number()
                && owner.is_some_and(|owner| {
                    owner.kind == abi::owner_kind::SERVICE
                        && owner::text(&owner.namespace) == question.namespace
                        && owner::text(&owner.name) == *name
                })
        }
    };
    let mut found: Vec<SocketAddr> = snapshot
        .frontends
        .iter()
        .filter(|(key, service)| {
            key.protocol == *protocol
                && port.is_none_or(|port| key.port == port)
                && family.is_none_or(|family| Family::of(key.addr) == family)
                && is_meant(key, service)
        })
        .map(|(key, _)| SocketAddr::new(key.addr, key.port))
        .collect();
    if family.is_none() && found.iter().any(SocketAddr::is_ipv4) {
        // A process has both.
        found.retain(SocketAddr::is_ipv4);
    }
    match found.as_slice() {
        [] => Err(TraceError::NoFrontend { what }),
        [only] => Ok(*only),
        several => {
            let choice = several.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            Err(TraceError::Ambiguous { what, choice })
        }
    }
}

/// Whether a packet goes on after a hook as it was rewritten there.
fn is_carried(reason: Reason) -> bool {
    reason.action() == Action::Carry
}

/// Whether a program is on its hook through a link that is pinned.
fn is_pinned(bpffs: &Path, program: &str, ifindex: Option<u32>) -> bool {
    let pins = crate::datapath::pins::Pins::new(bpffs);
    ifindex.map_or_else(|| pins.socket_link(program), |ifindex| pins.device_link(program, ifindex)).exists()
}
