//! Somebody takes entries out of the maps while clients connect.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::lab::{Agent, Call, Family, counters, eventually};

use crate::world::{SILENCE, SOON, World, node_port, options, service};

/// Which keys of a map.
type Matches = fn(&Value) -> bool;

fn bpftool(agent: &Agent, map: &str, args: &[&str], more: &[String]) -> Result<Value> {
    let pin = counters::find(agent.pins(), map)?;
    let output = Command::new("bpftool")
        .args(["-j", "map", args[0], "pinned"])
        .arg(pin)
        .args(&args[1..])
        .args(more)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "bpftool {args:?}: {text}");
    if text.trim().is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_str(&text)?) }
}

/// The keys of entries, as bpftool reads and prints them.
fn keys(agent: &Agent, map: &str, matches: impl Fn(&Value) -> bool) -> Result<Vec<Vec<String>>> {
    let entries = bpftool(agent, map, &["dump"], &[])?;
    let entries = entries.as_array().context("bpftool dumps a list")?.iter();
    let entries = entries.filter(|entry| matches(&entry["formatted"]["key"]));
    let key = |entry: &Value| {
        let bytes = entry["key"].as_array().context("a key")?.iter();
        bytes.map(|byte| Ok(byte.as_str().context("a byte")?.to_owned())).collect()
    };
    entries.map(key).collect()
}

fn delete(agent: &Agent, map: &str, keys: &[Vec<String>]) -> Result<()> {
    for key in keys {
        bpftool(agent, map, &["delete", "key"], key).map(drop)?;
    }
    Ok(())
}

/// What somebody takes out of the maps comes back, whoever connects meanwhile; connections do not notice.
#[test]
fn an_entry_that_is_deleted_comes_back_while_clients_connect() -> Result<()> {
    let mut options = options();
    options.args.extend(["--map-check-period", "1s"].map(str::to_owned));
    let world = World::with_services(options, |world| vec![service(1, [&world.a1])])?;
    let (lab, agent) = (world.lab(), world.cluster.agent(world.node_a())?);
    let call = Call::tcp(lab.node_a.at(Family::V4, node_port(1)));
    let (open, first) = lab.outside.open(call.clone())?;
    ensure!(first.server() == Some("a1"), "before anything happened: {first}");
    let is_nodeport = |key: &Value| key["port"] == node_port(1);
    let any = |_: &Value| true;
    let wounds: [(&str, Matches); 4] =
        [("SERVICES4", is_nodeport), ("ADDRESSES4", any), ("NAMES", any), ("EDGES", any)];
    let done = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let clients = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                // Refused, while the entry is not there.
                lab.outside.ask(call.clone().patience(SILENCE))?;
            }
            Ok(())
        });
        let healed = wounds.iter().try_for_each(|(map, matches)| {
            let before = keys(&agent, map, matches)?;
            ensure!(!before.is_empty(), "{map} has no such entry");
            delete(&agent, map, &before)?;
            eventually(SOON, || {
                let now = keys(&agent, map, matches)?;
                ensure!(now.len() == before.len(), "{map}: {} of {} are back", now.len(), before.len());
                Ok(())
            })?;
            for _ in 0..20 {
                let outcome = lab.outside.ask(call.clone())?;
                ensure!(outcome.server() == Some("a1"), "{map} is mended: {outcome}");
            }
            ensure!(open.again()? == first, "{map}: the connection from before");
            Ok(())
        });
        done.store(true, Ordering::Relaxed);
        clients.join().expect("the clients do not panic")?;
        healed
    })?;
    let (_, page) = lab.node_a.get(([127, 0, 0, 1], 10249).into(), "/metrics")?;
    for (map, _) in wounds {
        let sample = format!("fairlead_map_repairs_total{{map=\"{map}\"}} ");
        let value = page.lines().find_map(|line| line.strip_prefix(&sample)).context(sample)?;
        ensure!(value != "0", "{map}: no repair was counted");
    }
    let log = agent.log();
    let line = format!("any IPv4 node address:{}/TCP: somebody removed or changed it", node_port(1));
    ensure!(log.lines().any(|it| it.contains(&line) && it.contains("service-1")), "{line}: {log}");
    Ok(())
}
