//! `fairlead status`, for people.

use std::io::Write;
use std::net::IpAddr;

use anyhow::Result;

use super::To;
use crate::inspect::MapView;
use crate::report::SourceReport;
use crate::status::{AgentStatus, DropsStatus, EdgeStatus, Status};
use crate::table::Table;

/// Findings that are listed.
const LISTED: usize = 20;

/// Prints it; with `-o wide` also every link, program and counter.
pub fn status(to: &mut To<'_>, status: &Status) -> Result<()> {
    if to.json {
        return to.json(status);
    }
    summary(to.out, status)?;
    print(to.out, &edges(&status.edges))?;
    print(to.out, &maps(&status.maps, to.wide))?;
    drops(to.out, &status.drops)?;
    findings(to.out, status)?;
    if to.wide {
        print(to.out, &links(status))?;
        print(to.out, &programs(status))?;
        print(to.out, &counters(status))?;
    }
    writeln!(to.out)?;
    if status.warnings.is_empty() {
        writeln!(to.out, "all is well")?;
    }
    for warning in &status.warnings {
        writeln!(to.out, "warning  {}\n         {}", warning.what, warning.fix)?;
    }
    Ok(())
}

fn summary(out: &mut dyn Write, status: &Status) -> Result<()> {
    writeln!(
        out,
        "version   {} on Linux {}",
        status.version,
        status.kernel.as_deref().unwrap_or("(not known)")
    )?;
    writeln!(out, "pins      {} (layout {})", status.bpffs, status.layout_version)?;
    match (status.agent_pid, &status.agent) {
        (Some(pid), Some(agent)) => {
            writeln!(out, "agent     running, process {pid}, {}", of_agent(agent, status.version))?;
        }
        (Some(pid), None) => writeln!(out, "agent     running, process {pid}; it has not reported yet")?,
        (None, Some(agent)) => {
            writeln!(out, "agent     not running; the last one was {}", of_agent(agent, status.version))?;
        }
        (None, None) => writeln!(out, "agent     not running; connections go on, changes wait for it")?,
    }
    if let Some(source) = &status.source {
        writeln!(out, "source    {}", of_source(source))?;
    }
    writeln!(out, "features  {}", features(status))?;
    let attached = status.links.iter().filter(|link| link.alive).count();
    let gone = status.links.len() - attached;
    let gone = if gone > 0 { format!(", {gone} gone with their devices") } else { String::new() };
    let missing = match status.missing.len() {
        0 => "none missing".to_owned(),
        missing => format!("{missing} missing"),
    };
    writeln!(
        out,
        "hooks     {attached} links attached{gone}, {missing}; {} pod devices, {}",
        status.pod_devices,
        if status.features.cgroup_links { "sockets by cgroup links" } else { "no sockets" }
    )?;
    Ok(writeln!(out)?)
}

fn of_agent(agent: &AgentStatus, version: &str) -> String {
    let build = match (agent.version == version, agent.same_programs) {
        (true, true) => "this build",
        (true, false) => "another build",
        (false, _) => "another version",
    };
    let synced = if agent.synced { "" } else { "; not everything has been in the maps yet" };
    format!(
        "version {} ({build}), of node {}, since {}; reported {} s ago{synced}",
        agent.version, agent.node, agent.started, agent.reported_seconds_ago
    )
}

fn of_source(source: &SourceReport) -> String {
    let at = source.at.as_ref().map(|at| format!(" {at}")).unwrap_or_default();
    let fresh = match (source.freshness.as_str(), &source.stale_since) {
        ("unanswered", Some(since)) => format!("no answer since {since}"),
        ("kept", Some(since)) => format!("kept at {since}, not told since"),
        _ if source.complete => "current".into(),
        _ => "not told everything yet".into(),
    };
    let change = source.last_change.as_deref().unwrap_or("none");
    format!("{}{at}: {fresh}; last change {change}", source.kind)
}

fn features(status: &Status) -> String {
    let features = &status.features;
    let known = [("btf", features.btf), ("jit", features.jit)].into_iter().chain(features.kernel.named());
    let xdp = match (features.xdp_native, features.xdp_generic) {
        (true, true) => "xdp native and generic",
        (true, false) => "xdp native",
        (false, true) => "xdp generic",
        (false, false) => "no xdp",
    };
    let words = known.map(|(name, has)| if has { name.to_owned() } else { format!("no {name}") });
    words.chain([xdp.to_owned()]).collect::<Vec<_>>().join(", ")
}

fn print(out: &mut dyn Write, table: &Table) -> Result<()> {
    let mut out = out;
    table.print(&mut out)?;
    Ok(writeln!(out)?)
}

fn edges(edges: &[EdgeStatus]) -> Table {
    let mut table =
        Table::new(["EXTERNAL EDGE", "XDP", "TC", "IPV4 SOURCE", "IPV6 SOURCE", "XDP REDIRECT", "NOTE"]);
    for status in edges {
        let edge = &status.edge;
        let xdp = status.xdp.map_or("-", |kind| match kind {
            crate::datapath::XdpKind::Native => "native",
            crate::datapath::XdpKind::Generic => "generic",
        });
        table.row([
            edge.device.clone(),
            xdp.into(),
            status.tc.unwrap_or("missing").into(),
            edge_sources(edge.source4, edge.more_sources4),
            edge_sources(edge.source6, edge.more_sources6),
            if edge.xdp_transmit { "yes" } else { "no" }.into(),
            status.note.clone().unwrap_or_else(|| "-".into()),
        ]);
    }
    table
}

fn edge_sources(first: IpAddr, more: u16) -> String {
    match (first.is_unspecified(), more) {
        (true, _) => "-".into(),
        (false, 0) => first.to_string(),
        (false, more) => format!("{first} and {more} more"),
    }
}

/// Empty ones only with `-o wide`.
fn maps(maps: &[MapView], is_wide: bool) -> Table {
    let mut table = Table::new(["MAP", "ENTRIES", "OF", "FULL"]);
    for map in maps.iter().filter(|map| is_wide || map.entries > 0) {
        let percent = u64::from(map.entries) * 100 / u64::from(map.max_entries.max(1));
        table.row([
            map.map.into(),
            map.entries.to_string(),
            map.max_entries.to_string(),
            format!("{percent} %"),
        ]);
    }
    table
}

fn drops(out: &mut dyn Write, drops: &DropsStatus) -> Result<()> {
    let sampled = if drops.from == "sample" { " (nobody keeps count: sampled)" } else { "" };
    let seconds = drops.seconds;
    if drops.reasons.is_empty() {
        return Ok(writeln!(out, "no packet was dropped or rejected in the last {seconds} s{sampled}")?);
    }
    writeln!(out, "dropped or rejected in the last {seconds} s{sampled}:")?;
    let mut table = Table::new(["REASON", "PACKETS", "MEANING"]);
    for drop in &drops.reasons {
        table.row([drop.reason.clone(), drop.packets.to_string(), drop.meaning.into()]);
    }
    let mut out = out;
    Ok(table.print(&mut out)?)
}

fn findings(out: &mut dyn Write, status: &Status) -> Result<()> {
    if status.findings_total == 0 {
        return Ok(());
    }
    writeln!(out, "\ndo not work as written:")?;
    let mut table = Table::new(["OWNER", "NAME", "FINDING"]);
    for finding in status.findings.iter().take(LISTED) {
        let name = format!("{}/{}", finding.namespace, finding.name);
        table.row([finding.owner.clone(), name, finding.text.clone()]);
    }
    let mut out = out;
    table.print(&mut out)?;
    let more = status.findings_total.saturating_sub(status.findings.len().min(LISTED));
    if more > 0 {
        writeln!(out, "and {more} more")?;
    }
    Ok(())
}

fn links(status: &Status) -> Table {
    let mut table = Table::new(["PROGRAM", "HOOK", "DEVICE", "STATE"]);
    for link in &status.links {
        let device = link.device.clone().unwrap_or_else(|| "-".into());
        let state = if link.alive { "attached" } else { "gone with its device" };
        table.row([link.program.clone(), link.kind.into(), device, state.into()]);
    }
    for missing in &status.missing {
        let device = missing.device.clone().unwrap_or_else(|| "-".into());
        table.row([missing.program.into(), "-".into(), device, "missing".into()]);
    }
    table
}

fn programs(status: &Status) -> Table {
    let mut table = Table::new(["PROGRAM", "ID", "VERIFIED INSTRUCTIONS", "NATIVE BYTES"]);
    for program in &status.programs {
        table.row([
            program.program.clone(),
            program.id.to_string(),
            program.verified_instructions.to_string(),
            program.jited_bytes.to_string(),
        ]);
    }
    table
}

fn counters(status: &Status) -> Table {
    let mut table = Table::new(["HOOK", "WHAT HAPPENED", "ACTION", "PACKETS", "BYTES"]);
    for counter in &status.counters {
        let (packets, bytes) = (counter.packets.to_string(), counter.bytes.to_string());
        let reason = counter.reason.replace('_', " ");
        table.row([counter.hook.into(), reason, counter.action.into(), packets, bytes]);
    }
    table
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::inspect::ProgramView;
    use crate::report::FindingReport;
    use crate::status::tests::well;
    use crate::status::{DropView, MissingView, Warning};

    fn printed(status: &Status, wide: bool) -> String {
        let mut out = vec![];
        let mut to = To { bpffs: Path::new(""), json: false, wide, out: &mut out };
        super::status(&mut to, status).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_node_on_which_all_is_well() {
        assert_eq!(
            printed(&well(), false),
            "\
version   0.1.0 on Linux 6.18.0
pins      /sys/fs/bpf/fairlead (layout 1)
agent     running, process 17, version 0.1.0 (this build), of node node-a, since 2026-01-01T00:00:00Z; reported 4 s ago
source    manifests /etc/services: current; last change 2026-01-01T00:30:00Z
features  btf, jit, set_retval, coarse_clock, no csum_ipv6, checks_mtu, tcx, kernel_sweep, xdp native
hooks     2 links attached, none missing; 2 pod devices, sockets by cgroup links

EXTERNAL EDGE  XDP     TC   IPV4 SOURCE           IPV6 SOURCE  XDP REDIRECT  NOTE
eth0           native  tcx  192.0.2.1 and 1 more  -            yes           -

MAP        ENTRIES  OF   FULL
SERVICES4  10       100  10 %

no packet was dropped or rejected in the last 60.2 s

all is well
"
        );
        let wide = printed(&well(), true);
        for part in ["sock_connect4  cgroup  -       attached", "xdp   not ours       pass    5        300"] {
            assert!(wide.contains(part), "{wide}");
        }
    }

    #[test]
    fn what_is_wrong_is_listed() {
        let mut status = well();
        status.agent_pid = None;
        let reason = DropView { reason: "no_route".into(), packets: 3, meaning: "nowhere to go" };
        status.drops = DropsStatus { seconds: 1.0, from: "sample", reasons: vec![reason] };
        status.findings_total = 30;
        status.findings = (0..25)
            .map(|n| FindingReport {
                owner: "Service".into(),
                namespace: "shop".into(),
                name: format!("web-{n}"),
                kind: "DoesNotFit".into(),
                text: "does not fit".into(),
            })
            .collect();
        let text = printed(&status, false);
        for part in [
            "agent     not running; the last one was version 0.1.0 (this build)",
            "dropped or rejected in the last 1 s (nobody keeps count: sampled):\nREASON    PACKETS  MEANING\nno_route  3        nowhere to go\n",
            "Service  shop/web-19  does not fit\nand 10 more\n",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }

    #[test]
    fn the_json_has_these_fields() {
        let mut full = well();
        full.missing.push(MissingView { program: "xdp_nic", device: None });
        full.drops.reasons.push(DropView { reason: "no_route".into(), packets: 1, meaning: "" });
        full.findings.push(FindingReport::default());
        full.warnings.push(Warning { code: "findings", what: String::new(), fix: String::new() });
        let program =
            ProgramView { program: "xdp_nic".into(), id: 1, verified_instructions: 2, jited_bytes: 3 };
        full.programs.push(program);
        let json = serde_json::to_value(full).unwrap();
        crate::show::tests::assert_documented(&json);
        let fields: Vec<&String> = json.as_object().unwrap().keys().collect();
        let expected = [
            "agent",
            "agent_pid",
            "bpffs",
            "counters",
            "drops",
            "edges",
            "features",
            "findings",
            "findings_total",
            "kernel",
            "layout_version",
            "links",
            "maps",
            "missing",
            "pod_devices",
            "programs",
            "source",
            "version",
            "warnings",
        ];
        assert_eq!(fields, expected);
        let features = json["features"].as_object().unwrap().keys().map(String::as_str).collect::<Vec<_>>();
        let expected = [
            "btf",
            "cgroup_links",
            "checks_mtu",
            "coarse_clock",
            "csum_ipv6",
            "jit",
            "kernel_sweep",
            "set_retval",
            "tcx",
            "xdp_generic",
            "xdp_native",
        ];
        assert_eq!(features, expected);
    }
}
