//! Read-outs of the pinned maps: `status`, `services`, `backends`, `flows`. Tables for people; JSON with the
//! names of [`crate::inspect`], which stay as they are.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::check::Finding;
use crate::entries::Protocol;
use crate::explain::{Explanation, render};
use crate::flows;
use crate::inspect::{
    BackendView, CounterView, EdgeView, FlowView, Inspector, LinkView, MapView, ProgramView, ScopeView,
    ServiceView, UsageView,
};
use crate::table::Table;

/// What is read, and how it is written where.
pub struct To<'a> {
    pub bpffs: &'a Path,
    pub json: bool,
    pub out: &'a mut dyn Write,
}

impl To<'_> {
    pub(crate) fn json(&mut self, value: &impl Serialize) -> Result<()> {
        serde_json::to_writer_pretty(&mut self.out, value)?;
        Ok(writeln!(self.out)?)
    }
}

/// `fairlead check`.
pub fn check(to: &mut To<'_>, findings: &[Finding]) -> Result<()> {
    if to.json {
        return to.json(&findings);
    }
    let mut table = Table::new(["STATE", "CHECK", "FOUND"]);
    for finding in findings {
        let fix = finding.fix.as_ref().map(|fix| format!("; {fix}")).unwrap_or_default();
        table.row([finding.state.to_string(), finding.check.to_owned(), format!("{}{fix}", finding.found)]);
    }
    Ok(table.print(&mut to.out)?)
}

/// `fairlead explain`.
pub fn explain(to: &mut To<'_>, explanation: &Explanation) -> Result<()> {
    if to.json {
        return to.json(explanation);
    }
    Ok(render::text(explanation, to.out)?)
}

/// `fairlead status`.
#[derive(Serialize)]
struct Status {
    bpffs: String,
    layout_version: u32,
    /// Process id of the running agent; `null`: none runs.
    agent_pid: Option<u32>,
    edges: Vec<EdgeView>,
    links: Vec<LinkView>,
    programs: Vec<ProgramView>,
    maps: Vec<MapView>,
    /// What somebody should do something about.
    warnings: Vec<String>,
    counters: Vec<CounterView>,
}

pub fn status(to: &mut To<'_>) -> Result<()> {
    let inspector = Inspector::open(to.bpffs)?;
    let maps = inspector.fill()?;
    let status = Status {
        bpffs: to.bpffs.display().to_string(),
        layout_version: inspector.layout_version(),
        agent_pid: agent_pid(to.bpffs),
        edges: inspector.edges()?,
        links: inspector.links()?,
        programs: inspector.programs()?,
        warnings: warnings(&maps),
        maps,
        counters: inspector.counters()?,
    };
    if to.json {
        return to.json(&status);
    }
    writeln!(to.out, "pins   {} (layout {})", status.bpffs, status.layout_version)?;
    match status.agent_pid {
        Some(pid) => writeln!(to.out, "agent  running, process {pid}")?,
        None => writeln!(to.out, "agent  not running; connections go on, changes wait for it")?,
    }
    writeln!(to.out)?;
    let mut links = Table::new(["PROGRAM", "HOOK", "DEVICE", "STATE"]);
    for link in &status.links {
        let device = link.device.clone().unwrap_or_else(|| "-".into());
        let state = if link.alive { "attached" } else { "gone with its device" };
        links.row([link.program.clone(), link.kind.into(), device, state.into()]);
    }
    links.print(&mut to.out)?;
    writeln!(to.out)?;
    let mut edges = Table::new(["EXTERNAL EDGE", "IPV4 SOURCE", "IPV6 SOURCE", "XDP REDIRECT"]);
    for edge in &status.edges {
        let transmit = if edge.xdp_transmit { "yes" } else { "no" };
        let sources4 = edge_sources(edge.source4, edge.more_sources4);
        let sources6 = edge_sources(edge.source6, edge.more_sources6);
        edges.row([edge.device.clone(), sources4, sources6, transmit.into()]);
    }
    edges.print(&mut to.out)?;
    writeln!(to.out)?;
    let mut maps = Table::new(["MAP", "ENTRIES", "OF", "FULL"]);
    for map in &status.maps {
        let percent = u64::from(map.entries) * 100 / u64::from(map.max_entries.max(1));
        maps.row([
            map.map.into(),
            map.entries.to_string(),
            map.max_entries.to_string(),
            format!("{percent} %"),
        ]);
    }
    maps.print(&mut to.out)?;
    for warning in &status.warnings {
        writeln!(to.out, "{warning}")?;
    }
    writeln!(to.out)?;
    let mut counters = Table::new(["HOOK", "WHAT HAPPENED", "ACTION", "PACKETS", "BYTES"]);
    for counter in &status.counters {
        let (packets, bytes) = (counter.packets.to_string(), counter.bytes.to_string());
        let reason = counter.reason.replace('_', " ");
        counters.row([counter.hook.into(), reason, counter.action.into(), packets, bytes]);
    }
    if counters.is_empty() {
        writeln!(to.out, "no packet was seen yet")?;
        return Ok(());
    }
    Ok(counters.print(&mut to.out)?)
}

/// Flow tables that are nearly full, and what to do.
fn warnings(maps: &[MapView]) -> Vec<String> {
    let pressed = maps.iter().filter(|view| flows::is_pressed(view.entries.into(), view.max_entries.into()));
    pressed
        .map(|view| (view.map, flows::advice(view.map)))
        .filter(|(_, advice)| !advice.is_empty())
        .map(|(map, advice)| format!("{map}: {advice}"))
        .collect()
}

fn edge_sources(first: IpAddr, more: u16) -> String {
    match (first.is_unspecified(), more) {
        (true, _) => "-".into(),
        (false, 0) => first.to_string(),
        (false, more) => format!("{first} and {more} more"),
    }
}

/// Who holds the lock on the pin directory, as the kernel lists locks: asking by locking would turn away an
/// agent that starts in this moment.
fn agent_pid(bpffs: &Path) -> Option<u32> {
    let inode = fs::metadata(bpffs).ok()?.ino();
    lock_holder(&fs::read_to_string("/proc/locks").ok()?, inode)
}

fn lock_holder(locks: &str, inode: u64) -> Option<u32> {
    locks.lines().find_map(|line| {
        // `1: FLOCK  ADVISORY  WRITE 2035 00:1c:25 0 EOF`; waiting ones have `->` after the number.
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, "FLOCK", _, "WRITE", pid, file, ..] = words[..] else { return None };
        let of_file = file.rsplit(':').next()?.parse::<u64>().ok()?;
        (of_file == inode).then(|| pid.parse().ok()).flatten()
    })
}

pub fn services(to: &mut To<'_>) -> Result<()> {
    let services = Inspector::open(to.bpffs)?.services()?;
    if to.json {
        return to.json(&services);
    }
    let mut table = Table::new([
        "KIND",
        "FRONTEND",
        "PROTOCOL",
        "NAME",
        "ALGORITHM",
        "AFFINITY",
        "SOURCES",
        "FROM INSIDE",
        "FROM OUTSIDE",
        "CONNECTIONS",
        "PACKETS",
        "BYTES",
        "REFUSED",
    ]);
    for service in &services {
        let usage = |count: fn(&UsageView) -> u64| {
            service.usage.as_ref().map_or_else(|| "-".into(), |usage| count(usage).to_string())
        };
        table.row([
            service.kind.clone(),
            frontend(service),
            service.protocol.clone(),
            name(service),
            service.algorithm.into(),
            if service.affinity_seconds == 0 {
                "-".into()
            } else {
                format!("{} s", service.affinity_seconds)
            },
            sources(service),
            scope(&service.internal),
            if service.internal == service.external { "the same".into() } else { scope(&service.external) },
            usage(|usage| usage.connections),
            usage(|usage| usage.packets),
            usage(|usage| usage.bytes),
            usage(|usage| usage.refused),
        ]);
    }
    Ok(table.print(&mut to.out)?)
}

/// Namespace and name; where the map has none, the number.
fn name(service: &ServiceView) -> String {
    match (&service.namespace, &service.name) {
        (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
        _ => format!("number {}", service.service),
    }
}

/// Who may ask.
fn sources(service: &ServiceView) -> String {
    match service.source_ranges.as_deref() {
        None => "all".into(),
        Some([]) => "nobody".into(),
        Some(nets) => some_of(nets.iter().cloned()),
    }
}

fn frontend(service: &ServiceView) -> String {
    match service.address {
        Some(addr) => SocketAddr::new(addr, service.port).to_string(),
        None => format!("node ({}):{}", service.family, service.port),
    }
}

fn scope(scope: &ScopeView) -> String {
    if scope.backends.is_empty() {
        return format!("none: {}", scope.when_empty);
    }
    some_of(scope.backends.iter().map(|backend| match backend.address {
        Some(addr) => SocketAddr::new(addr, backend.port).to_string(),
        None => format!("missing backend {}", backend.id),
    }))
}

/// The first few; of more the number is given.
fn some_of(items: impl ExactSizeIterator<Item = String>) -> String {
    const NAMED: usize = 4;

    let more = items.len().saturating_sub(NAMED);
    let text = items.take(NAMED).collect::<Vec<_>>().join(" ");
    match more {
        0 => text,
        more => format!("{text} and {more} more"),
    }
}

pub fn backends(to: &mut To<'_>, all: bool) -> Result<()> {
    let mut backends = Inspector::open(to.bpffs)?.backends()?;
    backends.retain(|backend| all || backend.state != "unused");
    if to.json {
        return to.json(&backends);
    }
    let mut table = Table::new(["FAMILY", "ID", "BACKEND", "STATE", "WHERE", "GENERATION"]);
    for backend in &backends {
        table.row([
            backend.family.into(),
            backend.id.to_string(),
            address(backend),
            backend.state.into(),
            if backend.local { "this node".into() } else { "elsewhere".into() },
            backend.generation.to_string(),
        ]);
    }
    Ok(table.print(&mut to.out)?)
}

fn address(backend: &BackendView) -> String {
    if backend.state == "unused" {
        return "-".into();
    }
    SocketAddr::new(backend.address, backend.port).to_string()
}

/// Written as they are read: there may be a million.
pub fn flows(to: &mut To<'_>) -> Result<()> {
    let inspector = Inspector::open(to.bpffs)?;
    let mut failed = None;
    let mut first = true;
    let json = to.json;
    if json {
        write!(to.out, "[")?;
    } else {
        writeln!(
            to.out,
            "{:7}  {:5}  {:8}  {:44}  {:44}  {:11}  {:7}  IDLE",
            "EDGE", "PROTO", "PART", "SEEN AS", "GOES ON AS", "STATE", "CARRY"
        )?;
    }
    inspector.flows(|flow| {
        if failed.is_none() {
            let written = if json { flow_json(to.out, &flow, first) } else { flow_line(to.out, &flow) };
            failed = written.err();
            first = false;
        }
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    if json {
        writeln!(to.out, "{}]", if first { "" } else { "\n" })?;
    }
    Ok(())
}

fn flow_json(out: &mut dyn Write, flow: &FlowView, first: bool) -> Result<()> {
    write!(out, "{}\n  ", if first { "" } else { "," })?;
    Ok(serde_json::to_writer(out, flow)?)
}

fn flow_line(out: &mut dyn Write, flow: &FlowView) -> Result<()> {
    let pair = |from: IpAddr, from_port, to: IpAddr, to_port| {
        format!("{} > {}", SocketAddr::new(from, from_port), SocketAddr::new(to, to_port))
    };
    let protocol = Protocol::from_number(flow.protocol)
        .map_or_else(|| flow.protocol.to_string(), |known| known.to_string());
    writeln!(
        out,
        "{:7}  {:5}  {:8}  {:44}  {:44}  {:11}  {:7}  {} s",
        flow.side,
        protocol,
        if flow.reply { "reply" } else { "request" },
        pair(flow.source, flow.source_port, flow.destination, flow.destination_port),
        pair(flow.new_source, flow.new_source_port, flow.new_destination, flow.new_destination_port),
        flow.state,
        flow.carry,
        flow.idle_seconds
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::ShareView;

    #[test]
    fn the_holder_of_a_lock_is_found() {
        let locks = "1: POSIX  ADVISORY  WRITE 17 00:1c:25 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 2035 00:1c:25 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 2036 00:1c:26 0 EOF\n";
        assert_eq!(lock_holder(locks, 25), Some(2035));
        assert_eq!(lock_holder(locks, 26), None);
        assert_eq!(lock_holder(locks, 5), None);
    }

    #[test]
    fn nearly_full_flow_tables_are_warned_of() {
        let view = |map, entries| MapView { map, entries, max_entries: 100 };
        let warnings = warnings(&[view("FLOWS4", 84), view("FLOWS6", 85), view("SERVICES4", 100)]);
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].starts_with("FLOWS6: ") && warnings[0].contains("--max-flows"), "{warnings:?}");
    }

    #[test]
    fn a_scope_in_a_few_words() {
        let share = |id: u32, addr: Option<&str>| ShareView {
            id,
            address: addr.map(|addr| addr.parse().unwrap()),
            port: 80,
            slots: 1,
        };
        let show = |backends| scope(&ScopeView { when_empty: "drop", backends });
        assert_eq!(show(vec![]), "none: drop");
        assert_eq!(show(vec![share(1, Some("10.0.0.1")), share(2, None)]), "10.0.0.1:80 missing backend 2");
        let many = (1..=6).map(|id| share(id, Some("fd00::1"))).collect();
        assert_eq!(show(many), "[fd00::1]:80 [fd00::1]:80 [fd00::1]:80 [fd00::1]:80 and 2 more");
    }
}
