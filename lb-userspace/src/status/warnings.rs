//! What somebody should do something about, and what.

use lb_common::maps::{Capacity, MAPS};
use serde::Serialize;

use super::Status;
use crate::flows;
use crate::inspect::MapView;

/// A report that is older (seconds) is none of an agent that goes on.
const SILENT: u64 = 60;
/// Programs that are named.
const NAMED: usize = 5;

/// Something that is not as it should be.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Warning {
    /// It stays.
    pub code: &'static str,
    pub what: String,
    /// What to do about it.
    pub fix: String,
}

impl Warning {
    fn new(code: &'static str, what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { code, what: what.into(), fix: fix.into() }
    }
}

/// Everything, the worst first. `forwarding`: what keeps packets from being forwarded, each with what to do behind a
/// semicolon.
pub(super) fn of(status: &Status, forwarding: &[String]) -> Vec<Warning> {
    let mut warnings = vec![];
    warnings.extend(of_agent(status));
    warnings.extend(of_source(status));
    warnings.extend(of_hooks(status));
    warnings.extend(forwarding.iter().map(|text| {
        let (what, fix) = text.split_once("; ").unwrap_or((text, "see docs/node.md"));
        Warning::new("no-forwarding", what, fix)
    }));
    warnings.extend(status.maps.iter().filter_map(of_map));
    if status.findings_total > 0 {
        let what = match status.findings_total {
            1 => "1 Service or Pod does not work as written".to_owned(),
            total => format!("{total} findings: Services or Pods that do not work as written"),
        };
        let fix = "each is listed; `fairlead explain svc/NAME -n NAMESPACE` says more";
        warnings.push(Warning::new("findings", what, fix));
    }
    warnings.extend(of_drops(status));
    if !status.features.jit {
        let fix = "run `sysctl -w net.core.bpf_jit_enable=1`, and restart the agent";
        warnings.push(Warning::new("jit-off", "the programs are interpreted: slow", fix));
    }
    warnings
}

fn of_agent(status: &Status) -> Option<Warning> {
    let Some(pid) = status.agent_pid else {
        let since =
            status.agent.as_ref().map(|agent| format!("; the last one reported at {}", agent.reported));
        return Some(Warning::new(
            "agent-not-running",
            format!("no agent runs: connections go on, changes wait{}", since.unwrap_or_default()),
            "start it, and look at the end of its log; to be rid of the datapath, run `fairlead cleanup`",
        ));
    };
    let agent = status.agent.as_ref()?;
    if agent.reported_seconds_ago > SILENT {
        return Some(Warning::new(
            "agent-silent",
            format!("the agent (process {pid}) has not reported for {} s", agent.reported_seconds_ago),
            "look at its log, and at /livez on its health port; what follows of it may be out of date",
        ));
    }
    if agent.version != status.version || !agent.same_programs {
        return Some(Warning::new(
            "other-build",
            format!(
                "the agent and its programs are {}, of another build than this {}",
                agent.version, status.version
            ),
            "use the command of the agent's image, or restart the agent to finish the upgrade",
        ));
    }
    None
}

fn of_source(status: &Status) -> Option<Warning> {
    let source = status.source.as_ref()?;
    let since = source.stale_since.as_deref().unwrap_or("its start");
    let what = match source.freshness.as_str() {
        "unanswered" => {
            format!("the API server has not answered since {since}: what is served may be out of date")
        }
        "kept" => format!("the API server has not told everything: what was kept at {since} is served"),
        _ if !source.complete && status.agent_pid.is_some() => {
            "the agent has not been told everything yet".to_owned()
        }
        _ => return None,
    };
    let fix = "see that this node reaches the API server, and the agent's log for the rights that it lacks";
    Some(Warning::new("source-stale", what, fix))
}

fn of_hooks(status: &Status) -> Option<Warning> {
    let missing = status.missing.iter().map(|missing| match &missing.device {
        Some(device) => format!("{} on {device}", missing.program),
        None => format!("{} on the cgroup", missing.program),
    });
    let missing: Vec<String> = missing.collect();
    if missing.is_empty() {
        return None;
    }
    let more = missing.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let named = missing.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    let fix = if status.agent_pid.is_some() {
        "the agent puts them back within 10 s; if not, its log says why, and `fairlead check` who else is there"
    } else {
        "start the agent: it puts them back"
    };
    Some(Warning::new("not-attached", format!("not on its hook: {named}{more}"), fix))
}

fn of_map(view: &MapView) -> Option<Warning> {
    if !flows::is_pressed(view.entries.into(), view.max_entries.into()) {
        return None;
    }
    let what = |text: &str| format!("{}: {} of {} entries{text}", view.map, view.entries, view.max_entries);
    if view.map.starts_with("FLOWS") || view.map.starts_with("PENDING") {
        return Some(Warning::new("map-full", what(""), flows::advice(view.map)));
    }
    let flag = match MAPS.iter().find(|spec| spec.name == view.map)?.capacity {
        Capacity::Services => "raise --max-services",
        Capacity::Backends | Capacity::Slots | Capacity::Addresses => "raise --max-backends",
        // They forget what is the oldest, or are as large as they get.
        Capacity::Flows | Capacity::PendingFlows | Capacity::Fixed(_) => {
            "its size is fixed: use fewer Services that need it"
        }
    };
    let forgets = ["AFFINITY", "SOCKETS"].iter().any(|name| view.map.starts_with(name));
    (!forgets).then(|| Warning::new("map-full", what("; what does not fit is refused"), flag))
}

/// Of reasons that are nobody's wish.
fn of_drops(status: &Status) -> impl Iterator<Item = Warning> {
    const BAD: [&str; 4] = ["broken_window", "rewrite_failed", "flow_table_full", "ports_exhausted"];
    let bad = status.drops.reasons.iter().filter(|drop| BAD.contains(&drop.reason.as_str()));
    bad.map(|drop| {
        let reason = drop.reason.replace('_', " ");
        Warning::new("drops", format!("{} packets dropped lately: {reason}", drop.packets), drop.meaning)
    })
}

#[cfg(test)]
mod tests {
    use super::super::{DropView, MissingView, tests::well};
    use super::*;

    fn codes(status: &Status) -> Vec<&'static str> {
        of(status, &[]).iter().map(|warning| warning.code).collect()
    }

    #[test]
    fn a_node_on_which_all_is_well_is_left_alone() {
        assert_eq!(codes(&well()), Vec::<&str>::new());
    }

    #[test]
    fn each_thing_that_is_wrong_is_said_with_what_to_do() {
        let with = |change: fn(&mut Status)| {
            let mut status = well();
            change(&mut status);
            let warnings = of(&status, &[]);
            assert!(warnings.iter().all(|warning| !warning.fix.is_empty()), "{warnings:?}");
            let texts: Vec<String> = warnings.iter().map(|it| format!("{}: {}", it.code, it.what)).collect();
            texts.join("; ")
        };
        for (change, text) in [
            (
                (|status| status.agent_pid = None) as fn(&mut Status),
                "agent-not-running: no agent runs: connections go on, changes wait; the last one reported at 2026-01-01T01:00:00Z",
            ),
            (
                |status| status.agent.as_mut().unwrap().reported_seconds_ago = 61,
                "agent-silent: the agent (process 17) has not reported for 61 s",
            ),
            (
                |status| status.agent.as_mut().unwrap().same_programs = false,
                "other-build: the agent and its programs are 0.1.0, of another build than this 0.1.0",
            ),
            (
                |status| {
                    let source = status.source.as_mut().unwrap();
                    source.freshness = "unanswered".into();
                    source.stale_since = Some("2026-01-01T00:40:00Z".into());
                },
                "source-stale: the API server has not answered since 2026-01-01T00:40:00Z: what is served may be out of date",
            ),
            (
                |status| {
                    status.missing.push(MissingView { program: "xdp_nic", device: Some("eth0".into()) });
                    status.missing.push(MissingView { program: "sock_connect4", device: None });
                },
                "not-attached: not on its hook: xdp_nic on eth0, sock_connect4 on the cgroup",
            ),
            (
                |status| status.maps[0].entries = 85,
                "map-full: SERVICES4: 85 of 100 entries; what does not fit is refused",
            ),
            (
                |status| status.findings_total = 3,
                "findings: 3 findings: Services or Pods that do not work as written",
            ),
            (
                |status| {
                    let meaning = "a fault of ours";
                    status.drops.reasons.push(DropView {
                        reason: "broken_window".into(),
                        packets: 4,
                        meaning,
                    });
                    status.drops.reasons.push(DropView {
                        reason: "no_endpoints".into(),
                        packets: 9,
                        meaning,
                    });
                },
                "drops: 4 packets dropped lately: broken window",
            ),
            (|status| status.features.jit = false, "jit-off: the programs are interpreted: slow"),
        ] {
            assert_eq!(with(change), text);
        }
        let forwarding = of(&well(), &["net.ipv4.ip_forward is 0: no; run `x`".into()]);
        assert_eq!(forwarding, [Warning::new("no-forwarding", "net.ipv4.ip_forward is 0: no", "run `x`")]);
    }

    #[test]
    fn nearly_full_flow_tables_are_warned_of() {
        let view = |map, entries| MapView { map, entries, max_entries: 100 };
        assert_eq!(of_map(&view("FLOWS4", 84)), None);
        let warning = of_map(&view("FLOWS6", 85)).unwrap();
        assert!(warning.what.starts_with("FLOWS6: ") && warning.fix.contains("--max-flows"), "{warning:?}");
        // It forgets the oldest by itself.
        assert_eq!(of_map(&view("SOCKETS", 100)), None);
        assert!(of_map(&view("BACKENDS4", 100)).unwrap().fix.contains("--max-backends"));
    }
}
