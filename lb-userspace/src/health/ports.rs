//! healthCheckNodePort: load balancers ask each node whether it has endpoints of a Service with
//! `externalTrafficPolicy: Local`. Every such Service has a server of its own, with kube-proxy's answers.
//!
//! The servers are sockets of the agent: nothing translates a packet to them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use serde::Serialize;
use socket2::{Domain, SockRef, Socket, Type};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use super::{CONNECTIONS, Health, NOSNIFF, accept};
use crate::entries::{HealthCheck, ServiceName};
use crate::finding::Finding;

/// Connections at a time, to all of these servers; more are closed.
const CONNECTIONS_OF_ALL: usize = 8 * CONNECTIONS;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// How long a port is left alone that cannot be had, the first time and at most.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_AT_MOST: Duration = Duration::from_mins(1);

/// The servers that there are, and those that there should be.
#[derive(Debug)]
pub struct HealthPorts {
    health: Health,
    /// Where they listen.
    addresses: BTreeSet<IpAddr>,
    wanted: BTreeMap<ServiceName, HealthCheck>,
    servers: BTreeMap<ServiceName, Server>,
    failures: BTreeMap<ServiceName, Failure>,
    /// Services to look at.
    changed: BTreeSet<ServiceName>,
    places: Arc<Semaphore>,
}

/// The servers of one Service.
#[derive(Debug)]
struct Server {
    port: u16,
    asked: Arc<Asked>,
    listeners: BTreeMap<IpAddr, Listener>,
}

/// A socket that listens, until it is dropped.
#[derive(Debug)]
struct Listener {
    socket: Arc<TcpListener>,
    task: AbortHandle,
}

impl Drop for Listener {
    fn drop(&mut self) {
        // The task ends when the runtime comes to it; the port is free at once.
        let _ = SockRef::from(&*self.socket).shutdown(Shutdown::Both);
        self.task.abort();
    }
}

/// Somebody else has the port.
#[derive(Debug)]
struct Failure {
    finding: Finding,
    again: Instant,
    pause: Duration,
}

/// What a server has to know.
#[derive(Debug)]
struct Asked {
    name: ServiceName,
    endpoints: AtomicUsize,
    health: Health,
}

impl HealthPorts {
    /// `health`: how the agent is, which is a part of every answer.
    pub fn new(health: Health) -> Self {
        Self {
            health,
            addresses: BTreeSet::new(),
            wanted: BTreeMap::new(),
            servers: BTreeMap::new(),
            failures: BTreeMap::new(),
            changed: BTreeSet::new(),
            places: Arc::new(Semaphore::new(CONNECTIONS_OF_ALL)),
        }
    }

    /// Listens on these addresses.
    pub fn listen_on(&mut self, addresses: BTreeSet<IpAddr>) {
        if self.addresses != addresses {
            self.addresses = addresses;
            self.changed.extend(self.wanted.keys().cloned());
        }
    }

    /// What load balancers ask about a Service; `None`: nothing.
    pub fn want(&mut self, name: &ServiceName, check: Option<HealthCheck>) {
        if self.wanted.get(name) == check.as_ref() {
            return;
        }
        match check {
            Some(check) => self.wanted.insert(name.clone(), check),
            None => self.wanted.remove(name),
        };
        self.changed.insert(name.clone());
    }

    /// What is wrong with the port of a Service.
    pub fn finding(&self, name: &ServiceName) -> Option<&Finding> {
        self.failures.get(name).map(|failure| &failure.finding)
    }

    /// When [`HealthPorts::settle`] has something to do without a change.
    pub fn next_retry(&self) -> Option<Instant> {
        self.failures.values().map(|failure| failure.again).min()
    }

    /// Opens and closes servers. Returns the Services whose finding is another now. Needs a runtime around it if
    /// there is anything to open.
    pub fn settle(&mut self, now: Instant) -> Vec<ServiceName> {
        let mut work = std::mem::take(&mut self.changed);
        let before: Vec<_> =
            work.iter().filter_map(|name| Some((name.clone(), self.failures.remove(name)?))).collect();
        // All that goes makes room first.
        let mut closed = false;
        for name in &work {
            closed |= self.close(name);
        }
        let due = self.failures.iter().filter(|(_, failure)| closed || failure.again <= now);
        let due: Vec<ServiceName> = due.map(|(name, _)| name.clone()).collect();
        let before = before.into_iter().chain(due.iter().filter_map(|name| self.failures.remove_entry(name)));
        let before: BTreeMap<ServiceName, Failure> = before.collect();
        work.extend(due);
        for name in &work {
            if let Err(finding) = self.open(name) {
                let pause = before.get(name).map_or(RETRY, |failure| (failure.pause * 2).min(RETRY_AT_MOST));
                self.failures.insert(name.clone(), Failure { finding, again: now + pause, pause });
            }
        }
        work.retain(|name| self.finding(name) != before.get(name).map(|failure| &failure.finding));
        work.into_iter().collect()
    }

    /// Closes what is not wanted any more of a Service's servers. `true`: there was something.
    fn close(&mut self, name: &ServiceName) -> bool {
        let Some(server) = self.servers.get_mut(name) else { return false };
        if self.wanted.get(name).is_none_or(|check| check.port != server.port) {
            self.servers.remove(name);
            return true;
        }
        let before = server.listeners.len();
        server.listeners.retain(|addr, _| self.addresses.contains(addr));
        server.listeners.len() < before
    }

    /// Opens what is missing of a Service's servers.
    fn open(&mut self, name: &ServiceName) -> Result<(), Finding> {
        let Some(check) = self.wanted.get(name) else { return Ok(()) };
        let server = self.servers.entry(name.clone()).or_insert_with(|| {
            let asked =
                Asked { name: name.clone(), endpoints: AtomicUsize::new(0), health: self.health.clone() };
            Server { port: check.port, asked: Arc::new(asked), listeners: BTreeMap::new() }
        });
        server.asked.endpoints.store(check.endpoints, Ordering::Relaxed);
        let mut outcome = Ok(());
        for addr in &self.addresses {
            if server.listeners.contains_key(addr) {
                continue;
            }
            let at = SocketAddr::new(*addr, server.port);
            match listen(at) {
                Ok(Some(socket)) => {
                    let listener = Listener::start(socket, &server.asked, &self.places);
                    server.listeners.insert(*addr, listener);
                }
                // Nobody asks a node by a family that it does not have.
                Ok(None) => {}
                Err(error) => {
                    outcome = outcome.and(Err(Finding::HealthPort { at, reason: error.to_string() }));
                }
            }
        }
        outcome
    }
}

impl Listener {
    fn start(socket: TcpListener, asked: &Arc<Asked>, all: &Arc<Semaphore>) -> Self {
        // Whatever they ask for, as kube-proxy.
        let router = Router::new().fallback(answer).with_state(Arc::clone(asked));
        let socket = Arc::new(socket);
        let task = tokio::spawn(accept(Arc::clone(&socket), router, Arc::clone(all))).abort_handle();
        Self { socket, task }
    }
}

/// `None`: the kernel does not have the family.
fn listen(at: SocketAddr) -> io::Result<Option<TcpListener>> {
    let socket = match Socket::new(Domain::for_address(at), Type::STREAM, None) {
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => return Ok(None),
        socket => socket?,
    };
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    // An IPv6 address may be tentative still.
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?;
    } else {
        socket.set_freebind_v4(true)?;
    }
    socket.bind(&at.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into()).map(Some)
}

/// kube-proxy's answer.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer<'a> {
    service: Service<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Serialize)]
struct Service<'a> {
    namespace: &'a str,
    name: &'a str,
}

async fn answer(State(asked): State<Arc<Asked>>) -> Response {
    let local_endpoints = asked.endpoints.load(Ordering::Relaxed);
    let service_proxy_healthy = asked.health.is_live();
    let ServiceName { namespace, name } = &asked.name;
    let answer = Answer { service: Service { namespace, name }, local_endpoints, service_proxy_healthy };
    let well = local_endpoints > 0 && service_proxy_healthy;
    let status = if well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let weight = [("x-load-balancing-endpoint-weight", local_endpoints.to_string())];
    (status, NOSNIFF, weight, Json(answer)).into_response()
}

#[cfg(test)]
mod tests;
