//! kube-proxy itself, as a peer: a program that somebody has, in nftables mode, on a node of a lab, with the double of an
//! API server.

use std::fs::{self, File};
use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::Programs;
use super::server::{self, Running};
use crate::lab::Cluster;
use crate::process;

/// How long it may take to write its rules. Machines are shared and slow.
const PATIENCE: Duration = Duration::from_mins(1);
const POLL: Duration = Duration::from_millis(50);

/// Starts it on node-a with the Services of the cluster's manifests, and waits for rules for these addresses.
pub(super) fn start(
    path: &Path,
    programs: &Programs,
    cluster: &Cluster,
    cluster_cidrs: &str,
    addrs: &[IpAddr],
) -> Result<[Running; 2]> {
    let node = &cluster.lab.node_a;
    let api = server::api(&programs.bench, node, cluster.manifests.dir())?;
    let log = cluster.lab.dir().join("kube-proxy.log");
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut command = Command::new(path);
    command
        .args(arguments(&node.name, cluster_cidrs))
        .stdin(Stdio::null())
        .stdout(output.try_clone().context("cannot share the log")?)
        .stderr(output);
    let fails = |why: &str| {
        let said = fs::read_to_string(&log).unwrap_or_default();
        let last = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("nothing");
        format!("--kube-proxy {} does not serve: {why}; it said last: {last}", path.display())
    };
    let child = node.ns.spawn(&mut command).with_context(|| fails("it cannot be started"))?;
    let mut running = Running(child);
    node.cgroup.adopt(running.0.id())?;
    let deadline = Instant::now() + PATIENCE;
    while !has_rules(cluster, addrs)? {
        if let Some(status) = running.has_ended()? {
            bail!(fails(&format!("it has ended ({status})")));
        }
        if Instant::now() > deadline {
            bail!(fails(&format!("it has written no rules in {} seconds", PATIENCE.as_secs())));
        }
        thread::sleep(POLL);
    }
    Ok([running, api])
}

/// Nothing of the machine is changed beyond the node's namespace, and what is asked of the API server is JSON.
fn arguments(node: &str, cluster_cidrs: &str) -> Vec<String> {
    vec![
        format!("--master=http://{}", server::API),
        "--kube-api-content-type=application/json".to_owned(),
        "--proxy-mode=nftables".to_owned(),
        format!("--hostname-override={node}"),
        format!("--cluster-cidr={cluster_cidrs}"),
        "--conntrack-max-per-core=0".to_owned(),
        "--conntrack-min=0".to_owned(),
        "--conntrack-tcp-timeout-established=0".to_owned(),
        "--conntrack-tcp-timeout-close-wait=0".to_owned(),
    ]
}

fn has_rules(cluster: &Cluster, addrs: &[IpAddr]) -> Result<bool> {
    let list = || process::output(Command::new("nft").args(["list", "ruleset"]));
    let rules = cluster.lab.node_a.ns.run(list)??;
    let words: Vec<_> = rules.split_whitespace().collect();
    Ok(addrs.iter().all(|addr| words.contains(&addr.to_string().as_str())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_asked_for_nftables_and_json() {
        let arguments = arguments("node-a", "10.244.0.0/16,fd00:10:244::/48");
        for argument in [
            "--master=http://127.0.0.1:6443",
            "--kube-api-content-type=application/json",
            "--proxy-mode=nftables",
            "--hostname-override=node-a",
            "--cluster-cidr=10.244.0.0/16,fd00:10:244::/48",
        ] {
            assert!(arguments.iter().any(|other| other == argument), "{argument}: {arguments:?}");
        }
    }
}
