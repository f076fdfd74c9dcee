//! The socket edge: processes that ask for a frontend are connected to its backend from the start.
//!
//! No packet of theirs is translated afterwards. What a socket knows of its peers (`SOCKETS`) keeps the names
//! straight: `getpeername` and `recvmsg` tell the address that the process asked for.

use crate::abi::{Addr6, Service, ServiceKey, SocketKey, SocketPeer, SocketSide, service_flags};
use crate::family::Family;
use crate::hash;
use crate::reason::Reason;
use crate::service::{self, Scope};
use crate::tables::{Admission, Event, Tables};

/// A remote address of a socket: what it asks for, or what it is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer<F: Family> {
    pub addr: F::Addr,
    /// Host byte order.
    pub port: u16,
}

/// Which socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Socket {
    /// `bpf_get_socket_cookie()`.
    pub cookie: u64,
    /// IP protocol number.
    pub proto: u8,
    /// Whose socket it is, for session affinity: 0 for the node's own processes; for a pod (`--socket-lb=all`), whose
    /// address is not known before it connects, the lower 24 bits of its namespace's cookie.
    pub owner: u32,
}

/// `connect()`: the backend to connect to instead of `peer`.
///
/// # Errors
///
/// [`Reason::NotOurs`], or why there is no backend.
#[inline(always)]
pub fn connect<F: Family, T: Tables<F>>(
    tables: &T,
    socket: Socket,
    peer: Peer<F>,
) -> Result<Peer<F>, Reason> {
    let (backend, _) = choose(tables, socket, peer)?;
    Ok(backend)
}

/// `sendto()` and `sendmsg()` of an unconnected socket: the backend to send to instead of `peer`; the same for
/// all datagrams to one frontend, as long as it is there.
///
/// # Errors
///
/// [`Reason::NotOurs`], or why there is no backend.
#[inline(always)]
pub fn sendmsg<F: Family, T: Tables<F>>(
    tables: &T,
    socket: Socket,
    peer: Peer<F>,
) -> Result<Peer<F>, Reason> {
    let key = key(socket, peer, SocketSide::Forward);
    if let Some(known) = tables.socket(&key)
        && service::is_alive::<F, T>(tables, known.backend, known.generation)
    {
        return Ok(Peer { addr: F::from_mapped(&known.addr), port: known.port });
    }
    let (backend, known) = choose(tables, socket, peer)?;
    tables.put_socket(&key, &known);
    Ok(backend)
}

/// `recvmsg()` and `getpeername()`: the frontend that the process knows `peer` by.
///
/// # Errors
///
/// [`Reason::NotOurs`].
#[inline(always)]
pub fn name<F: Family, T: Tables<F>>(tables: &T, socket: Socket, peer: Peer<F>) -> Result<Peer<F>, Reason> {
    let known = tables.socket(&key(socket, peer, SocketSide::Reply)).ok_or(Reason::NotOurs)?;
    Ok(Peer { addr: F::from_mapped(&known.addr), port: known.port })
}

/// Chooses a backend and remembers which frontend it stands for.
#[inline(always)]
fn choose<F: Family, T: Tables<F>>(
    tables: &T,
    socket: Socket,
    peer: Peer<F>,
) -> Result<(Peer<F>, SocketPeer), Reason> {
    if tables.admission() as u8 == Admission::None as u8 {
        return Err(Reason::LeftToOthers);
    }
    let info = service::address::<F, T>(tables, &peer.addr)?;
    let frontend = ServiceKey { addr: peer.addr, port: peer.port, proto: socket.proto, pad: 0 };
    let mut service = Service::default();
    service::find::<F, T>(tables, &frontend, info, &mut service)?;
    let chosen = admit::<F, T>(tables, socket, peer, &service)
        .and_then(|id| service::backend::<F, T>(tables, id).map(|backend| (id, backend)));
    // Each by itself: of an event that is chosen first, old kernels see the part that is not there read.
    match chosen {
        Ok(_) => tables.count(service.id, Event::Connection),
        Err(reason) => tables.count(service.id, Event::Refused(reason)),
    }
    let (id, chosen) = chosen?;
    let backend = Peer::<F> { addr: chosen.addr, port: chosen.port };
    let mut known = SocketPeer {
        addr: F::to_mapped(&peer.addr),
        port: peer.port,
        pad: 0,
        backend: id,
        generation: chosen.generation,
    };
    tables.put_socket(&key(socket, backend, SocketSide::Reply), &known);
    known.addr = F::to_mapped(&backend.addr);
    known.port = backend.port;
    Ok((backend, known))
}

/// Chooses a backend for a process that may ask for the frontend.
#[inline(always)]
fn admit<F: Family, T: Tables<F>>(
    tables: &T,
    socket: Socket,
    peer: Peer<F>,
    service: &Service,
) -> Result<u32, Reason> {
    if service.flags & (service_flags::SOURCE_RANGES | service_flags::NODE_ALLOWED)
        == service_flags::SOURCE_RANGES
    {
        return Err(Reason::SourceNotAllowed);
    }
    // 0.0.0.0/8 and ::/104 are nobody's addresses: a client of this kind is no client of another.
    let [_, a, b, c] = socket.owner.to_be_bytes();
    let client = F::from_mapped(&Addr6 { octets: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c] });
    service::choose::<F, T>(tables, service, Scope::Internal, hash::socket(socket.cookie, peer.port), &client)
}

#[inline(always)]
fn key<F: Family>(socket: Socket, peer: Peer<F>, side: SocketSide) -> SocketKey {
    SocketKey {
        cookie: socket.cookie,
        addr: F::to_mapped(&peer.addr),
        port: peer.port,
        side: side as u8,
        proto: socket.proto,
        pad: 0,
    }
}
