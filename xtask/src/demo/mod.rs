//! `cargo xtask demo`: two nodes with agents on one machine, and who reaches whom in which way.

mod calls;
mod frontend;
mod scene;
mod story;
mod table;

use std::env;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use self::calls::Stage;
use self::scene::Scene;
use self::table::Table;
use crate::lab::custody;
use crate::process::{self, say};
use crate::setup::{self, Bpffs};
use crate::{build_ebpf, host};

/// Everything that the demo makes is called this, or this and more.
const PREFIX: &str = "fairlead-demo";

const INTRODUCTION: &str = "
Made of network namespaces, with an agent on each node and Services from manifests:

  outside        outside, behind a router
     |                   |
  ---+---------+---------+-------+---
               |                 |
            node-a            node-b
            192.0.2.1         192.0.2.2
            pods routed       pods on a bridge";

/// Show two nodes, pods and clients on this machine, and which way each call goes.
///
/// Sets up what is missing, builds, makes network namespaces, starts an agent on each node and prints who
/// calls whom and what came back. Leaves nothing behind. Exits with 1 if a call does not go as it should.
#[derive(clap::Args)]
pub struct Args {
    /// Leave everything up and say how to play with it
    #[arg(long)]
    keep: bool,
    /// Remove what an earlier --keep left
    #[arg(long, conflicts_with = "keep")]
    down: bool,
}

/// The subcommand.
pub fn command(args: &Args) -> Result<()> {
    if !host::is_root() {
        bail!("the demo makes network namespaces and loads BPF programs; run as root: cargo xtask demo");
    }
    if args.down {
        custody::tear_down(PREFIX)?;
        say("the demo is gone");
        return Ok(());
    }
    if custody::is_kept(PREFIX) {
        bail!("the demo is still up; to remove it: cargo xtask demo --down");
    }
    setup::tools(&setup::TOOLS)?;
    setup::cgroup2()?;
    build_ebpf::build()?;
    let agent = build_agent()?;
    let begin = Instant::now();
    let bpffs = Bpffs::ready()?;
    let ours = bpffs.is_ours();
    custody::undo_on_signals(move || {
        if ours {
            Bpffs::unmount();
        }
    })?;
    let xtask = env::current_exe().context("cannot tell which program this is")?;
    let scene = Scene::build(&xtask, &agent)?;
    println!("{INTRODUCTION}");
    let mut table = Table::begin();
    Stage { scene: &scene, table: &mut table }.play()?;
    frontend::show(&scene)?;
    let verdict = table.end(begin.elapsed());
    if args.keep {
        scene.keep(&agent)?;
        std::mem::forget(bpffs);
    }
    verdict
}

/// The agent, built as any user would build it.
fn build_agent() -> Result<PathBuf> {
    let mut command = host::cargo()?;
    command.args(["build", "--locked", "--package", "lb-userspace", "--bin", "fairlead"]);
    command.arg("--message-format=json-render-diagnostics").stdout(Stdio::piped());
    let mut cargo = command.spawn().with_context(|| format!("cannot start `{}`", process::show(&command)))?;
    let mut agent = None;
    for line in BufReader::new(cargo.stdout.take().context("cargo has no stdout")?).lines() {
        let message: Value = serde_json::from_str(&line.context("cannot read what cargo says")?)?;
        if message["target"]["name"] == "fairlead" && message["target"]["kind"][0] == "bin" {
            agent = message["executable"].as_str().map(PathBuf::from).or(agent);
        }
    }
    if !cargo.wait().context("cannot wait for cargo")?.success() {
        bail!("`{}` failed", process::show(&command));
    }
    agent.context("cargo built no agent (`fairlead`)")
}
