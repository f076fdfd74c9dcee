//! Servers that `lb-bench` is, on nodes and in pods.

use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::lab::Node;
use crate::lab::cgroup::Cgroup;
use crate::lab::netns::Netns;
use crate::process;

/// Where a node finds its API server.
pub(super) const API: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 6443);

/// A process that ends with this.
pub(super) struct Running(pub(super) Child);

impl Running {
    /// How it ended, if it did.
    pub(super) fn has_ended(&mut self) -> Result<Option<ExitStatus>> {
        self.0.try_wait().context("cannot ask for a server")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The double of an API server, on a node, with the objects in a directory.
pub(super) fn api(bench: &Path, node: &Node, objects: &Path) -> Result<Running> {
    let mut command = Command::new(bench);
    command.arg("apiserver").arg(API.port().to_string()).arg(objects);
    start(&mut command, &node.ns, &node.cgroup)
}

/// Starts a server and waits until it serves.
pub(super) fn start(command: &mut Command, ns: &Netns, cgroup: &Cgroup) -> Result<Running> {
    let mut child = Running(ns.spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()))?);
    cgroup.adopt(child.0.id())?;
    let mut line = String::new();
    BufReader::new(child.0.stdout.as_mut().context("no pipe")?).read_line(&mut line).context("no word")?;
    if line.trim() != "serving" {
        bail!("`{}` does not serve", process::show(command));
    }
    Ok(child)
}
