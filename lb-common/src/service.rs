//! From the address a client asked for to the backend that answers.

use crate::abi::{
    AddressInfo, Affinity, AffinityKey, Backend, MemberKey, Network, Service, ServiceKey, Source, Window,
    address_flags, backend_state, frontend_kind, network_flags, service_flags,
};
use crate::family::Family;
use crate::maps::MAX_NETWORKS;
use crate::reason::Reason;
use crate::tables::Tables;

/// ns.
const SECOND: u64 = 1_000_000_000;

/// Who asks: traffic policies select endpoints for each separately.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// A pod of this node or a process on it.
    Internal,
    /// Everybody else.
    External,
}

/// What this node knows of the address that somebody asks for.
///
/// # Errors
///
/// [`Reason::NoSuchService`] for an address of a ServiceCIDR that no Service has, else [`Reason::NotOurs`].
#[inline(always)]
pub fn address<F: Family, T: Tables<F>>(tables: &T, addr: &F::Addr) -> Result<AddressInfo, Reason> {
    tables.address(addr).ok_or_else(|| unknown::<F, T>(tables, addr))
}

/// What to say of an address that this node does not know.
#[inline(always)]
pub fn unknown<F: Family, T: Tables<F>>(tables: &T, addr: &F::Addr) -> Reason {
    let unallocated = tables.may_be_service(addr) && tables.networks(addr) & network_flags::SERVICE != 0;
    if unallocated { Reason::NoSuchService } else { Reason::NotOurs }
}

/// Finds the frontend that answers on `key`: the exact one, else the NodePort or host port for any address, if `info`
/// says that such answer there.
///
/// # Errors
///
/// [`Reason::UnknownPort`] for a Service's address without that port, else [`Reason::NotOurs`].
#[inline(never)]
pub fn find<F: Family, T: Tables<F>>(
    tables: &T,
    key: &ServiceKey<F::Addr>,
    info: AddressInfo,
    found: &mut Service,
) -> Result<(), Reason> {
    if let Some(service) = tables.service(key) {
        *found = service;
        return Ok(());
    }
    if info.flags & (address_flags::NODE_PORT | address_flags::HOST_PORT) != 0 {
        let any = ServiceKey { addr: F::Addr::default(), ..*key };
        if let Some(service) = tables.service(&any) {
            let host_port = service.kind == frontend_kind::HOST_PORT;
            let needed = if host_port { address_flags::HOST_PORT } else { address_flags::NODE_PORT };
            if info.flags & needed != 0 {
                *found = service;
                return Ok(());
            }
        }
    }
    if is_service_alone(info) {
        return Err(Reason::UnknownPort);
    }
    Err(Reason::NotOurs)
}

/// What to say of a packet to `dst` that no frontend can take: `served` if the address is only a Service's,
/// [`Reason::NoSuchService`] if it could be one's, else `reason`.
#[inline(never)]
pub fn refuse<F: Family, T: Tables<F>>(tables: &T, dst: &F::Addr, reason: Reason, served: Reason) -> Reason {
    match address::<F, T>(tables, dst) {
        Ok(info) if is_service_alone(info) => served,
        Err(Reason::NoSuchService) => Reason::NoSuchService,
        _ => reason,
    }
}

/// Whether an address is a Service's and not the node's.
#[inline(always)]
const fn is_service_alone(info: AddressInfo) -> bool {
    info.flags & (address_flags::SERVICE | address_flags::NODE) == address_flags::SERVICE
}

/// Whether the same packet may get another backend when [`choose`] is asked again; in one of the scopes is enough, as the
/// verifier pays for each difference.
#[inline(always)]
pub const fn is_chosen_at_random(service: &Service) -> bool {
    service.flags & service_flags::MAGLEV == 0
        && service.affinity == 0
        && (service.internal.len > 1 || service.external.len > 1)
}

/// Chooses a backend: one array read. With session affinity, one hash lookup for the client and, if it is known, one
/// for the window it asks now.
///
/// `spread` decides where the algorithm is Maglev, so that all packets of a client's connection, on every
/// node, come to the same backend.
///
/// # Errors
///
/// [`Reason::NoEndpoints`] or [`Reason::NoLocalEndpoints`] for an empty window; [`Reason::BrokenWindow`] if the maps
/// contradict each other.
#[inline(always)]
pub fn choose<F: Family, T: Tables<F>>(
    tables: &T,
    service: &Service,
    scope: Scope,
    spread: u32,
    client: &F::Addr,
) -> Result<u32, Reason> {
    let (window, drop) = match scope {
        Scope::Internal => (service.internal, service_flags::INTERNAL_DROP),
        Scope::External => (service.external, service_flags::EXTERNAL_DROP),
    };
    let Window { base, len } = window;
    if len == 0 {
        return Err(if service.flags & drop != 0 { Reason::NoLocalEndpoints } else { Reason::NoEndpoints });
    }
    let pick = if service.flags & service_flags::MAGLEV != 0 { spread } else { tables.random() };
    let id = tables.slot(base.wrapping_add(pick % len)).ok_or(Reason::BrokenWindow)?;
    if service.affinity == 0 {
        return Ok(id);
    }
    Ok(keep_affinity::<F, T>(tables, service, base, client, id))
}

/// The backend this client had before, if it still may have it, else `fresh`; remembered from now on either way.
#[inline(never)]
fn keep_affinity<F: Family, T: Tables<F>>(
    tables: &T,
    service: &Service,
    window: u32,
    client: &F::Addr,
    fresh: u32,
) -> u32 {
    let key = AffinityKey { port: service.port, client: *client };
    let now = tables.now();
    let mut id = fresh;
    if let Some(known) = tables.affinity(&key) {
        let age = now.saturating_sub(known.last_seen);
        if age <= u64::from(service.affinity).wrapping_mul(SECOND)
            && is_alive::<F, T>(tables, known.backend, known.generation)
            && tables.is_member(&MemberKey { window, backend: known.backend })
        {
            id = known.backend;
        }
    }
    let generation = tables.backend(id).map_or(0, |backend| backend.generation);
    tables.put_affinity(&key, &Affinity { last_seen: now, backend: id, generation });
    id
}

/// The backend with this id, which a window has named.
///
/// # Errors
///
/// [`Reason::BrokenWindow`] if there is none.
#[inline(always)]
pub fn backend<F: Family, T: Tables<F>>(tables: &T, id: u32) -> Result<Backend<F::Addr>, Reason> {
    match tables.backend(id) {
        Some(backend) if backend.state != backend_state::UNUSED => Ok(backend),
        _ => Err(Reason::BrokenWindow),
    }
}

/// Whether a source may ask for the frontends of a Service with source ranges.
#[inline(never)]
pub fn is_source_allowed<F: Family, T: Tables<F>>(tables: &T, service: &Service, addr: &F::Addr) -> bool {
    service.flags & service_flags::SOURCE_RANGES == 0
        || tables.is_source(&Source { service: service.id, addr: *addr })
}

/// Whether the backends of a frontend see this node in place of its clients, wherever they are (`--masquerade-all`).
#[inline(always)]
pub fn masquerades<F: Family, T: Tables<F>>(tables: &T, service: &Service) -> bool {
    tables.masquerades_all() && service.flags & service_flags::SOURCE_KEPT == 0
}

/// Flags of those networks that have this address ([`network_flags`]), of the list that `at` reads.
#[inline(always)]
pub fn networks<'a, F: Family>(addr: &F::Addr, at: impl Fn(u32) -> Option<&'a Network<F::Addr>>) -> u32 {
    let mut flags = 0;
    for index in 0..MAX_NETWORKS {
        match at(index) {
            Some(network) if network.flags != 0 => {
                if F::is_within(addr, &network.addr, &network.mask) {
                    flags |= network.flags;
                }
            }
            _ => break,
        }
    }
    flags
}

/// Whether the backend a flow was given is still there and takes more: one that is about to go keeps its TCP
/// connections and SCTP associations, but UDP, which nobody opens, is better off elsewhere.
#[inline(always)]
pub fn is_alive<F: Family, T: Tables<F>>(tables: &T, id: u32, generation: u32) -> bool {
    match tables.backend(id) {
        Some(backend) => backend.state == backend_state::ACTIVE && backend.generation == generation,
        None => false,
    }
}

/// Whether the backend a flow was given is no endpoint any more; one that is about to go still is.
#[inline(always)]
pub fn is_removed<F: Family, T: Tables<F>>(tables: &T, id: u32, generation: u32) -> bool {
    match tables.backend(id) {
        Some(backend) => backend.state == backend_state::UNUSED || backend.generation != generation,
        None => true,
    }
}
