//! A process of this node: its socket is told the backend when it connects, or sends.

use lb_common::abi::service_flags;
use lb_common::reason::Hook;
use lb_common::socket::{Peer, Socket, connect};
use lb_common::{Reason, V4, V6};

use super::bench::Kin;
use super::route::way_to;
use super::{Context, Scope, Step, Trace, TraceError, WayView, addr, ip, is_pinned, meaning, step};
use crate::datapath::{SOCKET_PROGRAMS, device_name};
use crate::inspect::action_name;

/// What becomes of a `connect()`.
pub(super) fn trace(context: &Context<'_>) -> Result<Trace, TraceError> {
    if context.to.is_ipv4() { trace_as::<V4>(context) } else { trace_as::<V6>(context) }
}

fn trace_as<F: Kin>(context: &Context<'_>) -> Result<Trace, TraceError> {
    let tables = context.tables::<F>();
    let peer = Peer::<F> { addr: addr::<F>(context.to.ip()), port: context.to.port() };
    // Which socket it will be, nobody knows.
    let socket = Socket { cookie: 0, proto: context.protocol().number(), owner: 0 };
    let said = connect(&tables, socket, peer);
    let reason = said.as_ref().map_or_else(|reason| *reason, |_| Reason::Translated);
    let scope = Scope { internal: true, because: "processes of this node are inside of the cluster" };
    let frontend = context.frontend(&tables).map(|service| {
        let mut view = context.frontend_view(&service, scope);
        let flags = service.flags & (service_flags::SOURCE_RANGES | service_flags::NODE_ALLOWED);
        view.source_allowed = flags != service_flags::SOURCE_RANGES;
        view
    });
    let only = frontend.as_ref().and_then(|view| match view.backends.as_slice() {
        [only] => Some(only.id),
        _ => None,
    });
    let mut notes = Vec::new();
    if !SOCKET_PROGRAMS.iter().any(|program| is_pinned(&context.question.bpffs, program.0, None)) {
        notes.push(
            "the socket programs are not attached (--socket-lb=off): processes of this node are not served"
                .into(),
        );
    }
    let mut way = None;
    if let Ok(backend) = &said {
        if only.is_none() {
            notes.push("which of the backends a process gets depends on its socket".into());
        } else {
            let found = way_to(ip::<F>(&backend.addr))?;
            way = Some(WayView {
                carry: "stack",
                device: found.map(|way| device_name(way.ifindex)),
                next_hop: found.and_then(|way| way.gateway),
            });
        }
    }
    Ok(Trace {
        protocol: context.protocol().to_string(),
        source: None,
        destination: context.to,
        edge: "socket",
        device: None,
        flow: "new",
        backend: only.filter(|_| said.is_ok()).and_then(|id| context.backend_view(id)),
        frontend,
        request: vec![Step { ..step(Hook::Connect, None, reason) }],
        way,
        reply: vec![],
        answered: None,
        action: action_name(reason.action()),
        reason: reason.name(),
        meaning: meaning(reason),
        notes,
    })
}
