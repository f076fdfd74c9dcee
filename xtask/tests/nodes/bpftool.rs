//! docs/bpftool.md, run: each command of the page on a node that serves, with the output that the page shows.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use xtask::host;
use xtask::lab::{Call, Endpoint, Family, Outcome, Port, Protocol, Service};

use crate::world::{PORT, TARGET_PORT, World, at_vip, node_port, options, vip};

/// Stands in the page for output that differs from node to node.
const ANYTHING: &str = "…";

/// A command of the page, and what it shows behind it.
struct Example {
    command: String,
    output: String,
}

/// The commands of the page: lines that begin with `# ` in blocks of the kind `console`.
fn examples() -> Result<Vec<Example>> {
    let page = host::workspace().join("docs/bpftool.md");
    let page = fs::read_to_string(&page).with_context(|| format!("cannot read {}", page.display()))?;
    let mut examples: Vec<Example> = Vec::new();
    for block in page.split("```console\n").skip(1) {
        let block = block.split("```").next().unwrap_or_default();
        for line in block.lines() {
            if let Some(command) = line.strip_prefix("# ") {
                examples.push(Example { command: command.to_owned(), output: String::new() });
            } else {
                let example = examples.last_mut().context("output without a command")?;
                example.output += line;
                example.output.push('\n');
            }
        }
    }
    Ok(examples)
}

/// Versions of bpftool differ in how they break lines.
fn bare(text: &str) -> String {
    text.split_whitespace().collect()
}

/// Whether the output is what the page shows, from beginning to end.
fn is_shown(output: &str, shown: &str) -> bool {
    let (output, shown) = (bare(output), bare(shown));
    let pieces: Vec<_> = shown.split(ANYTHING).collect();
    let [first, middle @ .., last] = pieces.as_slice() else {
        return output == shown;
    };
    let Some(mut rest) = output.strip_prefix(first).and_then(|rest| rest.strip_suffix(last)) else {
        return false;
    };
    middle.iter().all(|piece| rest.split_once(piece).map(|(_, behind)| rest = behind).is_some())
}

/// The world of the page: Service `service-1`, with `10.244.1.10` here and `10.244.2.10` on the other node, and
/// `service-2` without endpoints.
fn world() -> Result<World> {
    World::with_services(options(), |world| {
        let tcp = |n| Port::new(Protocol::Tcp, PORT, TARGET_PORT).node_port(node_port(n));
        let mut web = Service::new("service-1", &vip(1)[..1]).port(tcp(1));
        web.endpoints = [&world.a1, &world.b1]
            .map(|pod| Endpoint::new(pod.name(), &pod.node, &[pod.addrs.v4.into()]))
            .to_vec();
        vec![web, Service::new("service-2", &vip(2)[..1]).port(tcp(2))]
    })
}

#[test]
fn every_command_of_the_page_shows_what_it_says() -> Result<()> {
    let world = world()?;
    let node = world.node_a();
    let web = at_vip(1, Family::V4, PORT);
    let (_open, outcome) = world.a2.open(Call::tcp(web).from_port(41000))?;
    ensure!(outcome.server().is_some(), "{outcome}");
    let outcome = node.ask(Call::tcp(node.at(Family::V4, node_port(1))))?;
    ensure!(outcome.server().is_some(), "{outcome}");
    let outcome = world.a2.ask(Call::tcp(at_vip(2, Family::V4, PORT)))?;
    ensure!(outcome == Outcome::Refused, "{outcome}");

    let here: BTreeMap<&str, String> = [
        ("/sys/fs/bpf/fairlead", world.lab().pins(node).display().to_string()),
        ("/sys/fs/cgroup", node.cgroup.path().display().to_string()),
    ]
    .into();
    let mut wrong = Vec::new();
    let examples = examples()?;
    for Example { command, output: shown } in &examples {
        let line = here.iter().fold(command.clone(), |line, (there, here)| line.replace(there, here));
        let output = node.ns.run(|| Command::new("sh").args(["-c", &line]).output())??;
        let mut text = String::from_utf8(output.stdout)?;
        text = here.iter().fold(text, |text, (there, here)| text.replace(here.as_str(), there));
        if !output.status.success() || !is_shown(&text, shown) {
            let error = String::from_utf8_lossy(&output.stderr);
            wrong.push(format!("# {command}\n{text}{error}\nbut the page shows\n{shown}"));
        }
    }
    if !wrong.is_empty() {
        bail!("{} of {} commands:\n{}", wrong.len(), examples.len(), wrong.join("\n\n"));
    }
    ensure!(examples.len() >= 12, "only {} commands are on the page", examples.len());
    Ok(())
}
