//! From the address a client asked for to the backend that answers.

use crate::abi::{
    AddressInfo, Backend, Service, ServiceKey, Window, address_flags, backend_state, service_flags,
};
use crate::family::Family;
use crate::reason::Reason;
use crate::tables::Tables;

/// Who asks: traffic policies select endpoints for each separately.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// A pod of this node or a process on it.
    Internal,
    /// Everybody else.
    External,
}

/// A backend that was chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Choice<A> {
    pub id: u32,
    pub service: u32,
    pub backend: Backend<A>,
}

/// Finds the frontend that answers on `key`: the exact one, else a NodePort if `info` says that they answer there.
///
/// # Errors
///
/// [`Reason::UnknownPort`] for a Service's address without that port, else [`Reason::NotOurs`].
#[inline(always)]
pub fn find<F: Family, T: Tables<F>>(
    tables: &T,
    key: &ServiceKey<F::Addr>,
    info: AddressInfo,
) -> Result<Service, Reason> {
    if let Some(service) = tables.service(key) {
        return Ok(service);
    }
    if info.flags & address_flags::NODE_PORT != 0 {
        let node_port = ServiceKey { addr: F::Addr::default(), ..*key };
        if let Some(service) = tables.service(&node_port) {
            return Ok(service);
        }
    }
    if info.flags & (address_flags::SERVICE | address_flags::NODE) == address_flags::SERVICE {
        return Err(Reason::UnknownPort);
    }
    Err(Reason::NotOurs)
}

/// Chooses a backend: one array read for the slot, one for the backend.
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
) -> Result<Choice<F::Addr>, Reason> {
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
    let backend = tables.backend(id).ok_or(Reason::BrokenWindow)?;
    if backend.state == backend_state::UNUSED {
        return Err(Reason::BrokenWindow);
    }
    Ok(Choice { id, service: service.id, backend })
}

/// Whether the backend a flow was given is still there and takes more: one that is about to go keeps its TCP
/// connections, but UDP, which nobody opens, is better off elsewhere.
#[inline(always)]
pub fn is_alive<F: Family, T: Tables<F>>(tables: &T, id: u32, generation: u32) -> bool {
    match tables.backend(id) {
        Some(backend) => backend.state == backend_state::ACTIVE && backend.generation == generation,
        None => false,
    }
}
