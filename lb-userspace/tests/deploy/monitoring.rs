//! Alerts and dashboard ask for what the agent exports, and every alert has its page in the runbook.
//! docs/metrics.md is what they are compared with: a unit test of the metrics compares that with an actual answer.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use lb_common::maps::MAPS;
use lb_common::reason::Reason;
use serde_json::Value;

use super::kinds::{Alert, PrometheusRule, typed};
use super::promql::{Query, Selector};
use super::{deploy, docs, with_monitoring};

/// What Prometheus and `relabelings` add to every sample.
const TARGET_LABELS: [&str; 4] = ["instance", "job", "le", "node"];

/// Metrics with their labels, as docs/metrics.md has them; histograms by the names of their samples.
fn documented() -> BTreeMap<String, BTreeSet<String>> {
    let quoted = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    let mut metrics = BTreeMap::from([("up".to_owned(), BTreeSet::new())]);
    for line in docs("metrics.md").lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let (name, labels) = (quoted(cells[1]).remove(0), quoted(cells[3]).into_iter().collect());
        let name = if cells[2] == "histogram" { format!("{name}_bucket") } else { name };
        metrics.insert(name, labels);
    }
    metrics
}

/// Every metric, label and value that the query names is there.
fn verify(text: &str) -> Result<(), String> {
    let known = documented();
    let query = Query::parse(text)?;
    let mut labels: BTreeSet<&str> = TARGET_LABELS.into();
    for Selector { metric, matchers } in &query.selectors {
        let own = known.get(metric).ok_or_else(|| format!("nobody exports {metric}"))?;
        for (label, value) in matchers {
            if !own.contains(label) && !TARGET_LABELS.contains(&&**label) {
                return Err(format!("{metric} has no label {label}"));
            }
            for value in value.split(['|', '(', ')', '.']).filter(|value| !value.is_empty()) {
                check_value(label, value)?;
            }
        }
        labels.extend(own.iter().map(String::as_str));
    }
    match query.grouped.iter().find(|label| !labels.contains(&***label)) {
        Some(label) => Err(format!("nothing in it has the label {label}")),
        None => Ok(()),
    }
}

/// The value of a matcher, or one of them, is one that the label can have. Of maps it is how their names begin.
fn check_value(label: &str, value: &str) -> Result<(), String> {
    let there = match label {
        "reason" => Reason::ALL.iter().any(|reason| reason.name() == value),
        "state" => docs("agent.md").contains(&format!("(`{value}`)")),
        "map" => MAPS.iter().any(|map| map.name.starts_with(value)),
        "job" => value == "fairlead",
        // The dashboard's.
        "node" => value == "$node",
        _ => false,
    };
    if there { Ok(()) } else { Err(format!("no {label} is {value}")) }
}

fn alerts() -> Vec<Alert> {
    let objects = with_monitoring();
    let rule = objects.iter().find(|object| object["kind"] == "PrometheusRule").expect("a PrometheusRule");
    typed::<PrometheusRule>(rule).spec.groups.into_iter().flat_map(|group| group.rules).collect()
}

#[test]
fn an_expression_is_refused_that_asks_for_what_is_not_there() {
    for (wrong, why) in [
        ("fairlead_drop_total", "nobody exports fairlead_drop_total"),
        ("rate(fairlead_drops_total{hook=\"xdp\"}[5m])", "fairlead_drops_total has no label hook"),
        ("fairlead_drops_total{reason=~\"no_route|bored\"}", "no reason is bored"),
        ("sum by (hook) (fairlead_drops_total)", "nothing in it has the label hook"),
        ("up{job=\"kube-proxy\"}", "no job is kube-proxy"),
        ("fairlead_map_entries{map=~\"(FLOWS|FLEWS).\"}", "no map is FLEWS"),
        ("fairlead_flows{state=\"dead\"}", "no state is dead"),
        ("speed(fairlead_drops_total[5m])", "speed is no function that is known here"),
        ("rate(fairlead_drops_total[5m]", "a bracket that nothing closes"),
    ] {
        assert_eq!(verify(wrong), Err(why.to_owned()), "{wrong}");
    }
}

#[test]
fn alerts_ask_for_what_the_agent_exports() {
    for alert in alerts() {
        verify(&alert.expr).unwrap_or_else(|e| panic!("{}: {e}", alert.name));
        assert!(alert.annotations.contains_key("summary"), "{} says nothing", alert.name);
        assert!(["critical", "warning"].contains(&&*alert.labels["severity"]), "{}", alert.name);
        let time = alert.lasting.unwrap_or("0m".into());
        assert!(time.strip_suffix(['m', 'h']).is_some_and(|n| n.parse::<u8>().is_ok()), "{time}");
    }
}

#[test]
fn the_runbook_has_every_alert_and_no_other() {
    let explained: BTreeSet<String> = docs("operations.md")
        .lines()
        .filter_map(|line| Some(line.strip_prefix("### ")?.to_owned()))
        .filter(|heading| heading.starts_with("Fairlead"))
        .collect();
    let all = alerts();
    let names: BTreeSet<String> = all.iter().map(|alert| alert.name.clone()).collect();
    assert_eq!(names.len(), all.len(), "two alerts of one name");
    assert_eq!(explained, names);
}

#[test]
fn the_dashboard_asks_for_what_the_agent_exports() {
    let text =
        fs::read_to_string(deploy().join("components/monitoring/dashboard.json")).expect("a dashboard");
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        let targets = panel["targets"].as_array().expect("targets");
        assert!(!targets.is_empty(), "{} asks for nothing", panel["title"]);
        for target in targets {
            let query = target["expr"].as_str().expect("a query");
            verify(query).unwrap_or_else(|e| panic!("{}: {query}: {e}", panel["title"]));
        }
        let place = |side: &str| panel["gridPos"][side].as_u64().expect("a place");
        assert!(place("x") + place("w") <= 24, "{} hangs over", panel["title"]);
    }
    let ids: BTreeSet<u64> = panels.iter().map(|panel| panel["id"].as_u64().expect("an id")).collect();
    assert_eq!(ids.len(), panels.len());
}

#[test]
fn the_documentation_names_no_metric_that_is_not_there() {
    let known = documented();
    let all = ["operations.md", "install.md", "agent.md", "node.md", "metrics.md"].map(docs).join("\n");
    let words = all.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    for word in words.filter(|word| word.starts_with("fairlead_") || word.starts_with("kubeproxy_")) {
        let there = known.contains_key(word) || known.contains_key(&format!("{word}_bucket"));
        assert!(there, "nobody exports {word}");
    }
}
