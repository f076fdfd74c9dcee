//! A trace as a short story.

use std::net::SocketAddr;

use anyhow::Result;

use super::{FrontendView, Step, Trace, Tuple};
use crate::show::To;

/// Prints a trace.
pub fn show(to: &mut To<'_>, trace: &Trace) -> Result<()> {
    if to.json {
        return to.json(trace);
    }
    for (subject, line) in story(trace) {
        writeln!(to.out, "{}", format!("{subject:<9} {line}").trim_end())?;
    }
    Ok(())
}

/// Lines, each with what it is about.
fn story(trace: &Trace) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    let source = trace.source.map_or_else(|| "a process of this node".into(), |source| source.to_string());
    let what = match trace.flow {
        "new" => "a new connection",
        "pending" => "of a connection that is being opened",
        _ => "of a connection that is established",
    };
    lines.push(("packet", format!("{source} to {}/{}, {what}", trace.destination, trace.protocol)));
    let device = trace.device.as_ref().map(|device| format!(", device {device}")).unwrap_or_default();
    lines.push(("edge", format!("{}{device}", trace.edge)));
    match &trace.frontend {
        None => lines.push(("frontend", "none".into())),
        Some(view) => frontend(view, &mut lines),
    }
    lines.extend(trace.request.iter().map(|ran| ("request", step(ran))));
    if let Some(backend) = &trace.backend {
        let place = if backend.local { "on this node" } else { "on another node" };
        let addr = SocketAddr::new(backend.address, backend.port);
        lines.push(("backend", format!("{addr}, {}, {place}", backend.state)));
    }
    if let Some(way) = &trace.way {
        let device = way.device.as_deref().unwrap_or("no device: there is no route");
        let next_hop = way.next_hop.map(|addr| format!(", next hop {addr}")).unwrap_or_default();
        let how = match way.carry {
            "forward" => "sent on without the node's stack",
            "bounce" => "sent back",
            _ => "the node's stack takes it",
        };
        lines.push(("way", format!("{how}, out of {device}{next_hop}")));
    }
    lines.extend(trace.reply.iter().map(|ran| ("answer", step(ran))));
    match trace.answered {
        Some(true) => lines.push(("answer", format!("the client sees it come from {}", trace.destination))),
        Some(false) => lines.push((
            "answer",
            format!("the client does not see it come from {}: a fault of ours; report it", trace.destination),
        )),
        None => {}
    }
    lines.push(("result", format!("{}: {}", trace.reason.replace('_', " "), trace.meaning)));
    lines.extend(trace.notes.iter().map(|note| ("note", note.clone())));
    lines
}

fn frontend(view: &FrontendView, lines: &mut Vec<(&'static str, String)>) {
    let owner = match (view.owner, &view.namespace, &view.name) {
        (Some(owner), Some(namespace), Some(name)) => format!("{owner} {namespace}/{name}"),
        _ => "of nobody with a name".into(),
    };
    let address = match view.address {
        Some(addr) => SocketAddr::new(addr, view.port).to_string(),
        None => format!("port {} of every node address", view.port),
    };
    lines.push(("frontend", format!("{} of {owner}, {address}", view.kind)));
    lines.push(("scope", format!("{}: {}", view.scope, view.scope_because)));
    if let Some(ranges) = &view.source_ranges {
        let verdict = if view.source_allowed { "the client may ask" } else { "the client may not ask" };
        lines.push(("sources", format!("{verdict}: {}", ranges.join(", "))));
    }
    if view.affinity_seconds > 0 {
        let known = match view.remembered {
            Some(id) => format!("backend {id} is remembered"),
            None => "the client is new".into(),
        };
        lines.push(("affinity", format!("{} s, {known}", view.affinity_seconds)));
    }
    let backends = view.backends.len();
    let noun = if backends == 1 { "backend" } else { "backends" };
    lines.push(("choice", format!("{backends} {noun} in {} slots, {}", view.slots, view.algorithm)));
}

fn step(ran: &Step) -> String {
    let place =
        ran.device.as_ref().map_or_else(|| ran.hook.to_owned(), |device| format!("{} {device}", ran.hook));
    let told = |tuple: &Tuple| format!("{} to {}", tuple.source(), tuple.destination());
    let reason = ran.reason.replace('_', " ");
    match (&ran.before, &ran.after) {
        (Some(before), Some(after)) => {
            format!("{place}: {reason}, {} becomes {}", told(before), told(after))
        }
        _ => format!("{place}: {reason} ({})", ran.action),
    }
}

#[cfg(test)]
mod tests {
    use lb_common::{Hook, Reason};

    use super::*;
    use crate::inspect::{BackendView, ShareView};
    use crate::trace::{WayView, meaning, step};

    #[test]
    fn a_trace_reads_as_a_story() {
        let (client, vip) = ("10.1.0.9:40000".parse().unwrap(), "10.96.0.1:80".parse().unwrap());
        let backend: SocketAddr = "10.1.0.3:8080".parse().unwrap();
        let ran = |hook, before, after| Step {
            before: Some(before),
            after: Some(after),
            ..step(hook, Some("veth1".into()), Reason::Translated)
        };
        let trace = Trace {
            protocol: "TCP".into(),
            source: Some(client),
            destination: vip,
            edge: "pod",
            device: Some("veth1".into()),
            flow: "new",
            frontend: Some(FrontendView {
                kind: "ClusterIP".into(),
                address: Some(vip.ip()),
                port: 80,
                owner: Some("Service"),
                namespace: Some("shop".into()),
                name: Some("web".into()),
                scope: "internal",
                scope_because: "because",
                source_ranges: Some(vec!["10.0.0.0/8".into()]),
                source_allowed: true,
                affinity_seconds: 60,
                remembered: None,
                algorithm: "maglev",
                slots: 7,
                backends: vec![ShareView { id: 3, address: Some(backend.ip()), port: 8080, slots: 7 }],
            }),
            backend: Some(BackendView {
                id: 3,
                family: "IPv4",
                address: backend.ip(),
                port: 8080,
                state: "active",
                local: true,
                generation: 1,
            }),
            request: vec![ran(Hook::PodIn, Tuple::new(client, vip), Tuple::new(client, backend))],
            way: Some(WayView { carry: "stack", device: Some("veth2".into()), next_hop: None }),
            reply: vec![ran(Hook::PodOut, Tuple::new(backend, client), Tuple::new(vip, client))],
            answered: Some(true),
            action: "carry",
            reason: "translated",
            meaning: meaning(Reason::Translated),
            notes: vec!["a note".into()],
        };
        let story: Vec<String> =
            story(&trace).into_iter().map(|(subject, line)| format!("{subject}: {line}")).collect();
        assert_eq!(
            story,
            [
                "packet: 10.1.0.9:40000 to 10.96.0.1:80/TCP, a new connection",
                "edge: pod, device veth1",
                "frontend: ClusterIP of Service shop/web, 10.96.0.1:80",
                "scope: internal: because",
                "sources: the client may ask: 10.0.0.0/8",
                "affinity: 60 s, the client is new",
                "choice: 1 backend in 7 slots, maglev",
                "request: pod_in veth1: translated, 10.1.0.9:40000 to 10.96.0.1:80 becomes 10.1.0.9:40000 to \
                 10.1.0.3:8080",
                "backend: 10.1.0.3:8080, active, on this node",
                "way: the node's stack takes it, out of veth2",
                "answer: pod_out veth1: translated, 10.1.0.3:8080 to 10.1.0.9:40000 becomes 10.96.0.1:80 to \
                 10.1.0.9:40000",
                "answer: the client sees it come from 10.96.0.1:80",
                "result: translated: rewritten; the node's stack, the pod or the client takes it from here",
                "note: a note",
            ]
        );
    }
}
