//! docs/standalone.md: its example serves.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use xtask::host;
use xtask::lab::{Call, Caller, Family, Protocol};

use crate::world::{World, options};

#[test]
fn the_example_of_the_page_is_served() -> Result<()> {
    let page = fs::read_to_string(host::workspace().join("docs/standalone.md"))?;
    let example = page.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next());
    let world = World::new(options())?;
    world.cluster.manifests.write_text("web", example.context("no example")?)?;
    world.cluster.start()?;
    let node = world.node_a();
    // What the page has `python3 -m http.server` do.
    node.serve(Protocol::Tcp, &[node.at(Family::V4, 8080)])?;
    let callers: [(&Caller, &str); 4] = [
        (node, "10.96.0.1:80"),
        (node, "127.0.0.1:30001"),
        (&world.lab().outside, "192.0.2.1:30001"),
        (&world.a1, "10.96.0.1:80"),
    ];
    for (caller, target) in callers {
        let outcome = caller.ask(Call::tcp(target.parse()?))?;
        ensure!(outcome.server() == Some(node.name()), "{} -> {target}: {outcome}", caller.name());
    }
    Ok(())
}
