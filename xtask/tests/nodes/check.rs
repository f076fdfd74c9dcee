//! `fairlead check`: what it says of a node that is well, and of one that is not.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use xtask::lab::{Jail, Lab, Node};

use crate::takeover::nft;
use crate::world::{XTASK, agent};

/// What was said.
struct Said {
    all: Value,
    status: Option<i32>,
}

impl Said {
    fn by(node: &Node, mut command: Command) -> Result<Self> {
        command.args(["check", "-o", "json", "--cgroup-root"]).arg(node.cgroup.path());
        let output = node.ns.run(|| command.output())??;
        let all = serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        Ok(Self { all, status: output.status.code() })
    }

    /// The checks with this outcome.
    fn with(&self, state: &str) -> Vec<&str> {
        let all = self.all.as_array().into_iter().flatten().filter(|finding| finding["state"] == state);
        all.filter_map(|finding| finding["check"].as_str()).collect()
    }
}

#[test]
fn a_node_that_can_run_the_agent_passes() -> Result<()> {
    let lab = Lab::new(XTASK.as_ref())?;
    let said = Said::by(&lab.node_a, Command::new(agent()))?;
    let expected =
        ["kernel", "btf", "capabilities", "jit", "bpffs", "cgroup2", "forwarding", "device", "kube-proxy"];
    ensure!(said.status == Some(0) && said.with("ok") == expected, "{:#}", said.all);
    ensure!(said.with("warn").is_empty(), "{:#}", said.all);

    // Nothing of this keeps the agent from running.
    nft(&lab.node_a, "table ip kube-proxy { chain services {\n}\n}\n")?;
    lab.node_a.ns.sysctl(&[("ipv4/ip_forward", "0")])?;
    let said = Said::by(&lab.node_a, Command::new(agent()))?;
    ensure!(said.status == Some(0) && said.with("warn") == ["forwarding", "kube-proxy"], "{:#}", said.all);
    Ok(())
}

#[test]
fn what_must_be_mended_fails() -> Result<()> {
    let lab = Lab::new(XTASK.as_ref())?;
    let jail = Jail { capabilities: vec!["BPF".to_owned(), "PERFMON".to_owned()], hides_bpffs: true };
    let root = lab.dir().join("root");
    std::fs::create_dir(&root)?;
    let command = jail.command(&root, lab.dir(), &agent());
    let said = Said::by(&lab.node_a, command)?;
    ensure!(said.status == Some(1), "{:#}", said.all);
    ensure!(said.with("fail") == ["capabilities", "jit", "bpffs"], "{:#}", said.all);
    let text = said.all.to_string();
    ensure!(text.contains("CAP_NET_ADMIN missing (attaches programs"), "{text}");
    ensure!(text.contains("run `mount -t bpf bpf /sys/fs/bpf`"), "{text}");
    Ok(())
}
