//! `fairlead bugreport`: everything is in it with an agent, most of it without, and no secret ever.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use flate2::read::GzDecoder;
use serde_json::Value;
use tempfile::NamedTempFile;
use xtask::lab::{AgentOptions, Node};

use crate::agent::{open_calls, two_services};
use crate::world::{World, agent, options};

const SECRET: &str = "a-secret-that-nobody-may-see";

/// The files of a report that is made on a node, by name.
fn report(world: &World, node: &Node, bpffs: &Path, more: &[&str]) -> Result<BTreeMap<String, String>> {
    let output = world.lab().dir().join("report.tar.gz");
    let kubeconfig = world.lab().dir().join("kubeconfig");
    fs::write(&kubeconfig, format!("users: [{{ name: me, user: {{ token: {SECRET} }} }}]\n"))?;
    let mut command = Command::new(agent());
    command.arg("bugreport").arg("--bpffs").arg(bpffs).arg("-o").arg(&output).args(more);
    command.env("KUBECONFIG", &kubeconfig).env("FAIRLEAD_TOKEN", SECRET);
    let made = node.ns.run(|| command.output())??;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(GzDecoder::new(fs::File::open(&output)?)).entries()? {
        let mut entry = entry?;
        let name = entry.path()?.file_name().context("a name")?.to_string_lossy().into_owned();
        let mut text = String::new();
        entry.read_to_string(&mut text).with_context(|| name.clone())?;
        ensure!(!text.contains(SECRET), "a secret is in {name}:\n{text}");
        files.insert(name, text);
    }
    fs::remove_file(&output)?;
    Ok(files)
}

/// What is wrong with a report: (file, what must be in it).
fn check(files: &BTreeMap<String, String>, expected: &[(&str, &str)]) -> Result<()> {
    for (name, word) in expected {
        let text = files.get(*name).with_context(|| format!("no {name}"))?;
        ensure!(text.contains(word), "{word} is not in {name}:\n{text}");
    }
    Ok(())
}

/// With and without an agent.
const ALWAYS: [(&str, &str); 14] = [
    ("version.txt", "fairlead "),
    ("kernel.txt", "Linux "),
    ("sysctls.txt", "net.ipv4.ip_forward = 1\n"),
    ("check.txt", "kernel"),
    ("status.txt", "SERVICES4"),
    ("services.json", "service-1"),
    ("backends.json", "10.244.1."),
    ("flows-summary.txt", "established"),
    ("pins.txt", "SERVICES4"),
    ("undo.json", "reserved_ports"),
    ("netlink-links.txt", "eth0"),
    ("netlink-addresses.txt", "192.0.2.1"),
    ("netlink-routes.txt", "10.244.1."),
    ("netlink-qdiscs.txt", "noqueue"),
];

#[test]
fn a_bug_report_has_what_is_needed_and_no_secrets() -> Result<()> {
    let config = NamedTempFile::new()?;
    fs::write(&config, format!("# client_secret: {SECRET}\nmap-check-period: 30s\n"))?;
    let mut args = options().args;
    args.extend(["--config".to_owned(), config.path().display().to_string()]);
    let world = World::with_services(AgentOptions { args, ..options() }, two_services)?;
    let open = open_calls(&world)?;

    let node = world.node_a();
    let pins = world.lab().pins(node);
    let client = world.lab().outside.addrs.v4.to_string();
    let files = report(&world, node, &pins, &[])?;
    check(&files, &ALWAYS)?;
    let alive = [
        ("settings.txt", "--manifests "),
        ("settings.txt", "map-check-period: 30s"),
        ("settings.txt", "[removed]"),
        ("healthz.txt", "200 OK"),
        ("readyz.txt", "200 OK"),
        ("metrics.txt", "fairlead_"),
    ];
    check(&files, &alive)?;
    let status: Value = serde_json::from_str(&files["status.json"])?;
    ensure!(status["agent_pid"].is_u64() && status["maps"].is_array(), "{status}");
    for (name, text) in &files {
        ensure!(!text.contains(&client), "a client's address is in {name}:\n{text}");
    }
    check(&report(&world, node, &pins, &["--flows"])?, &[("flows.json", &client)])?;

    for agent in world.cluster.take_agents() {
        agent.kill()?;
    }
    let files = report(&world, node, &pins, &[])?;
    check(&files, &ALWAYS)?;
    let dead = [
        ("settings.txt", "no agent runs"),
        ("healthz.txt", "not collected: nobody answers at 127.0.0.1:10256"),
        ("metrics.txt", "not collected: nobody answers at 127.0.0.1:10249"),
    ];
    check(&files, &dead)?;
    drop(open);

    let nowhere = pins.join("nowhere");
    let files = report(&world, node, &nowhere, &[])?;
    let gone = [
        ("status.json", "no datapath under"),
        ("flows-summary.txt", "not collected: no datapath under"),
        ("pins.txt", "not collected: cannot read"),
        ("undo.json", "not collected: "),
        ("netlink-links.txt", "eth0"),
    ];
    check(&files, &gone)
}
