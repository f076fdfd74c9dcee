//! A packet of a pod, or from outside.

use std::net::SocketAddr;

use aya::Pod;
use lb_common::abi::{AffinityKey, Carry, Flow, FlowKey, Side, network_flags};
use lb_common::flow::{is_direct, is_tunnelled, reverse_key};
use lb_common::reason::Action;
use lb_common::{Reason, Tables as _, service};

use super::bench::{Bench, Kin, hook};
use super::frame::{Part, Tuple, build, read};
use super::route::way_to;
use super::{
    Context, Scope, Step, Trace, TraceError, WayView, addr, ip, is_carried, is_pinned, meaning, step,
};
use crate::datapath::{Place, device_name};
use crate::entries::Protocol;
use crate::inspect::action_name;

/// Live flows that may stand in the way of a new one, each with another source port tried.
const COLLISIONS: usize = 16;

/// Where a packet comes in.
#[derive(Clone, Copy)]
pub(super) struct Arrival {
    ifindex: u32,
    external: bool,
}

impl Arrival {
    pub(super) fn through(context: &Context<'_>, name: &str) -> Result<Self, TraceError> {
        let ifindex = nix::net::if_::if_nametoindex(name).map_err(|_| TraceError::NoDevice(name.into()))?;
        Self::at(context, ifindex)
    }

    pub(super) fn at(context: &Context<'_>, ifindex: u32) -> Result<Self, TraceError> {
        let external = context.live.edges()?.iter().any(|edge| edge.ifindex == ifindex);
        Ok(Self { ifindex, external })
    }

    const fn side(self) -> Side {
        if self.external { Side::NicIn } else { Side::PodIn }
    }

    /// What is worth knowing of its programs.
    fn notes(self, context: &Context<'_>) -> Vec<String> {
        let program = if self.external { Place::NicIn } else { Place::PodIn }.program();
        let links = context.live.links().unwrap_or_default();
        let here = links.iter().any(|link| link.program == program && link.ifindex == Some(self.ifindex));
        // Where tc has no links, its filters are not looked for.
        if here || !links.iter().any(|link| link.kind == "tcx") {
            return vec![];
        }
        let device = device_name(self.ifindex);
        vec![format!(
            "{program} is not on {device}: this is what it would do there; --via names the device that packets of \
             this client come in through"
        )]
    }
}

/// What came of a packet at the hooks of a device.
struct Passage {
    steps: Vec<Step>,
    reason: Reason,
    frame: Vec<u8>,
}

/// Sends a packet past the programs at a device: XDP and, for what that lets pass, tc.
fn pass<A: Copy + PartialEq>(
    context: &Context<'_>,
    bench: &Bench<A>,
    side: Side,
    ifindex: u32,
    mut frame: Vec<u8>,
    notes: &mut Vec<String>,
) -> Result<Passage, TraceError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
    AffinityKey<A>: Pod,
{
    let places: &[Place] = match side {
        Side::NicIn if is_pinned(&context.question.bpffs, Place::Xdp.program(), Some(ifindex)) => {
            &[Place::Xdp, Place::NicIn]
        }
        Side::NicIn => &[Place::NicIn],
        Side::NicOut => &[Place::NicOut],
        Side::PodIn => &[Place::PodIn],
        Side::PodOut => &[Place::PodOut],
    };
    if side == Side::NicIn {
        bench.address(ifindex, &mut frame)?;
    }
    let mut steps = Vec::new();
    let mut last = Reason::NotOurs;
    for place in places {
        let before = read(&frame);
        let (reason, after) = match bench.run(*place, ifindex, &frame) {
            Err(TraceError::Program { source, .. }) if *place == Place::Xdp => {
                notes.push(format!("XDP cannot be tried on this kernel ({source}): tc alone was"));
                continue;
            }
            ran => ran?,
        };
        let rewritten = is_carried(reason);
        steps.push(Step {
            before,
            after: if rewritten { read(&after) } else { None },
            ..step(hook(*place), Some(device_name(ifindex)), reason)
        });
        if reason.action() == Action::Pass {
            // What XDP has rewritten is nothing to tc.
            if !is_carried(last) {
                last = reason;
            }
            continue;
        }
        last = reason;
        frame = after;
        // The next hook sees what is left to the stack.
        if reason != Reason::Translated {
            break;
        }
    }
    Ok(Passage { steps, reason: last, frame })
}

/// What becomes of a packet.
pub(super) fn trace<F: Kin>(
    context: &Context<'_>,
    client: SocketAddr,
    arrival: Arrival,
) -> Result<Trace, TraceError>
where
    FlowKey<F::Addr>: Pod,
    Flow<F::Addr>: Pod,
    AffinityKey<F::Addr>: Pod,
{
    let tables = context.tables::<F>();
    let mut bench = Bench::new::<F>(&context.question.bpffs, &context.live)?;
    let mut notes = arrival.notes(context);
    let key = FlowKey {
        src: addr::<F>(client.ip()),
        dst: addr::<F>(context.to.ip()),
        src_port: client.port(),
        dst_port: context.to.port(),
        proto: context.protocol().number(),
        side: arrival.side() as u8,
        pad: 0,
    };
    let known = bench.adopt(&key)?;
    let frontend = context.frontend(&tables).filter(|_| !context.to.ip().is_loopback());
    let mut view = frontend.map(|service| {
        let mut view = context.frontend_view(&service, scope::<F>(&tables, &key));
        view.source_allowed = service::is_source_allowed::<F, _>(&tables, &service, &key.src);
        view
    });
    if let (Some(service), Some(view)) = (frontend, &mut view) {
        let client = AffinityKey { port: service.port, client: key.src };
        view.remembered = bench.remember(&client)?.map(|known| known.backend);
    }

    // A connection that is there is asked about, not opened anew.
    let part = match known {
        Some((_, true)) => Part::Later,
        _ => Part::Opening,
    };
    let request = Tuple::new(client, context.to);
    let mut attempts = 0;
    let (passage, flow) = loop {
        let frame = build(&request, context.protocol(), part)?;
        let passage = pass(context, &bench, arrival.side(), arrival.ifindex, frame, &mut notes)?;
        let flow = bench.flow(&key);
        attempts += 1;
        match flow {
            Some(flow) if known.is_none() && attempts < COLLISIONS && bench.collides(&key, &flow)? => {}
            flow => break (passage, flow),
        }
    };

    let flow = flow.filter(|flow| !is_direct(flow));
    let carried = is_carried(passage.reason);
    let mut trace = Trace {
        protocol: context.protocol().to_string(),
        source: Some(client),
        destination: context.to,
        edge: if arrival.external { "external" } else { "pod" },
        device: Some(device_name(arrival.ifindex)),
        flow: match known {
            None => "new",
            Some((_, false)) => "pending",
            Some((_, true)) => "established",
        },
        frontend: view,
        backend: flow.filter(|_| carried).and_then(|flow| context.backend_view(flow.backend)),
        request: passage.steps,
        way: None,
        reply: vec![],
        answered: None,
        action: action_name(passage.reason.action()),
        reason: passage.reason.name(),
        meaning: meaning(passage.reason),
        notes,
    };
    if let Some(flow) = flow.filter(|_| carried) {
        answer::<F>(context, &bench, arrival, &key, &flow, &mut trace)?;
    }
    remark(context, &mut trace);
    Ok(trace)
}

/// Who the client is to traffic policies: as the programs decide it (`pipeline::admit`).
fn scope<F: Kin>(tables: &lb_common::host::HostTables<F>, key: &FlowKey<F::Addr>) -> Scope {
    if key.side == Side::PodIn as u8 {
        Scope { internal: true, because: "the packet comes from a pod of this node" }
    } else if tables.networks(&key.src) & network_flags::POD != 0 {
        Scope { internal: true, because: "the client's address is of the cluster's pod network" }
    } else {
        Scope { internal: false, because: "the client is outside of the cluster, or on another node" }
    }
}

/// How the request goes on, and what becomes of the backend's answer.
fn answer<F: Kin>(
    context: &Context<'_>,
    bench: &Bench<F::Addr>,
    arrival: Arrival,
    key: &FlowKey<F::Addr>,
    flow: &Flow<F::Addr>,
    trace: &mut Trace,
) -> Result<(), TraceError>
where
    FlowKey<F::Addr>: Pod,
    Flow<F::Addr>: Pod,
    AffinityKey<F::Addr>: Pod,
{
    let backend = SocketAddr::new(ip::<F>(&flow.dst), flow.dst_port);
    let bounces = flow.carry == Carry::Bounce as u8;
    let to = if is_tunnelled(flow) { ip::<F>(&flow.src) } else { backend.ip() };
    let way = if bounces { None } else { way_to(to)? };
    let out = if bounces { Some(arrival.ifindex) } else { way.map(|way| way.ifindex) };
    trace.way = Some(WayView {
        carry: match flow.carry {
            carry if carry == Carry::Forward as u8 => "forward",
            carry if carry == Carry::Tunnel as u8 => "tunnel",
            _ if bounces => "bounce",
            _ => "stack",
        },
        device: out.map(device_name),
        next_hop: way.and_then(|way| way.gateway),
    });
    if is_tunnelled(flow) {
        // The answer does not come by here.
        return Ok(());
    }
    let side = reverse_key(key, flow).side;
    let all = [Side::NicIn, Side::NicOut, Side::PodIn, Side::PodOut];
    let Some(side) = all.into_iter().find(|known| *known as u8 == side) else { return Ok(()) };
    // What was sent on comes back to where it went out; the rest goes out where it came in.
    let ifindex = if flow.carry == Carry::Forward as u8 { out } else { Some(arrival.ifindex) };
    let Some(ifindex) = ifindex else { return Ok(()) };
    let tuple = Tuple::new(backend, SocketAddr::new(ip::<F>(&flow.src), flow.src_port));
    let frame = build(&tuple, context.protocol(), Part::Answer)?;
    let frame = if trace.flow == "established" && context.protocol() != Protocol::Udp {
        // Nobody answers a connection's later packets with an opening one.
        build(&tuple, context.protocol(), Part::Later)?
    } else {
        frame
    };
    let passage = pass(context, bench, side, ifindex, frame, &mut trace.notes)?;
    trace.answered = Some(is_carried(passage.reason) && is_answer(trace, &passage.frame));
    trace.reply = passage.steps;
    Ok(())
}

/// Whether a frame comes from where the client asked, and goes to it.
fn is_answer(trace: &Trace, frame: &[u8]) -> bool {
    read(frame)
        .is_some_and(|seen| seen.source() == trace.destination && trace.source == Some(seen.destination()))
}

/// What the programs' answer leaves open.
fn remark(context: &Context<'_>, trace: &mut Trace) {
    let new = trace.flow == "new";
    let frontend = trace.frontend.as_ref();
    if new
        && trace.backend.is_some()
        && frontend.is_some_and(|view| {
            view.algorithm == "random" && view.backends.len() > 1 && view.remembered.is_none()
        })
    {
        trace.notes.push("the backend is chosen at random: the next connection may get another".into());
    }
    if new && trace.way.as_ref().is_some_and(|way| way.carry == "forward") {
        trace.notes.push(
            "the source port is taken where two connections would share a name, from those reserved".into(),
        );
    }
    if context.protocol() == Protocol::Udp && trace.flow != "new" {
        trace.notes.push("the datagram is of a flow that the tables have".into());
    }
}
