//! An agent on a node: `fairlead run`, with its own pins and cgroup.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::custody::making;
use super::netns::Netns;
use super::{Counters, Jail, Lab, Manifests, Node};
use crate::process;

/// How long an agent may take to be ready or to end. Machines are shared and slow.
pub(super) const PATIENCE: Duration = Duration::from_mins(3);
/// Between two looks at what is waited for.
pub(super) const POLL: Duration = Duration::from_millis(20);
/// Where `/readyz` is, by default.
pub(super) const HEALTH_PORT: u16 = 10256;

/// `--xdp`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Xdp {
    #[default]
    Native,
    Off,
}

/// How an agent is started.
#[derive(Clone, Debug, Default)]
pub struct AgentOptions {
    pub xdp: Xdp,
    /// Attach by clsact also where the kernel has tcx.
    pub clsact: bool,
    /// In a container; otherwise with everything that this process has.
    pub jail: Option<Jail>,
    /// `FAIRLEAD_LAYOUT`: another layout of the maps, to rehearse upgrades.
    pub layout: Option<&'static str>,
    /// Follow this API server instead of manifests.
    pub server: Option<SocketAddr>,
    /// More arguments.
    pub args: Vec<String>,
}

/// A running agent. It is killed when it is dropped, unless it was left running; its programs stay.
pub struct Agent {
    node: String,
    program: PathBuf,
    ns: Netns,
    pins: PathBuf,
    log: PathBuf,
    child: Option<Child>,
}

impl Agent {
    /// Starts an agent on a node and waits until it is ready. `program` is the path of `fairlead`.
    pub fn start(
        lab: &Lab,
        node: &Node,
        program: &Path,
        manifests: &Manifests,
        options: &AgentOptions,
    ) -> Result<Self> {
        let mut agent = Self::spawn(lab, node, program, manifests, options)?;
        agent.wait_until_ready()?;
        Ok(agent)
    }

    /// Starts an agent on a node.
    pub fn spawn(
        lab: &Lab,
        node: &Node,
        program: &Path,
        manifests: &Manifests,
        options: &AgentOptions,
    ) -> Result<Self> {
        let log = lab.dir().join(format!("{}.log", node.name));
        let output = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        let pins = lab.pins(node);
        let mut command = match &options.jail {
            Some(jail) => {
                let root = lab.dir().join(format!("{}-root", node.name));
                fs::create_dir_all(&root).with_context(|| format!("cannot make {}", root.display()))?;
                jail.command(&root, manifests.dir(), program)
            }
            None => Command::new(program),
        };
        command.arg("run").args(["--node-name", &node.name]);
        match options.server {
            Some(server) => {
                command.arg("--master").arg(format!("http://{server}"));
                command.arg("--state-file").arg(Self::state_file(lab, node))
            }
            None => command.arg("--manifests").arg(manifests.dir()),
        };
        command
            .arg("--bpffs")
            .arg(&pins)
            .arg("--cgroup-root")
            .arg(node.cgroup.path())
            .args(["--xdp", if options.xdp == Xdp::Native { "native" } else { "off" }])
            .args(&options.args)
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("cannot share the log")?)
            .stderr(output);
        if options.clsact {
            command.env("FAIRLEAD_TC", "clsact");
        }
        if let Some(layout) = options.layout {
            command.env("FAIRLEAD_LAYOUT", layout);
        }
        let child = {
            let _making = making();
            let child = node.ns.spawn(&mut command)?;
            lab.processes.adopt(child.id())?;
            child
        };
        Ok(Self {
            node: node.name.clone(),
            program: program.to_owned(),
            ns: node.ns.clone(),
            pins,
            log,
            child: Some(child),
        })
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.ns.run(|| http_status(HEALTH_PORT, "/readyz"))?;
            if status == Some(200) {
                return Ok(());
            }
            if let Some(child) = &mut self.child
                && let Some(ended) = child.try_wait().context("cannot ask for the agent")?
            {
                bail!("the agent of {} ended ({ended}):\n{}", self.node, self.log());
            }
            if Instant::now() > deadline {
                bail!("the agent of {} is not ready ({status:?}):\n{}", self.node, self.log());
            }
            thread::sleep(POLL);
        }
    }

    /// SIGTERM, and waits for its end.
    pub fn stop(mut self) -> Result<ExitStatus> {
        self.end(Signal::SIGTERM)
    }

    /// SIGKILL, and waits for its end.
    pub fn kill(mut self) -> Result<ExitStatus> {
        self.end(Signal::SIGKILL)
    }

    /// Leaves it to itself, for a lab that is kept.
    pub fn leave(mut self) {
        self.child = None;
    }

    fn end(&mut self, signal: Signal) -> Result<ExitStatus> {
        let mut child = self.child.take().context("the agent has ended before")?;
        kill(Pid::from_raw(child.id().cast_signed()), signal).context("cannot signal the agent")?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait().context("cannot wait for the agent")? {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(5));
        }
        child.kill().context("cannot kill the agent")?;
        bail!("the agent of {} did not end on {signal}:\n{}", self.node, self.log())
    }

    /// What it has logged, and agents before it on that node.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn log_path(&self) -> &Path {
        &self.log
    }

    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// Its process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    pub fn counters(&self) -> Result<Counters> {
        Counters::read(&self.pins)
    }

    /// Where the agent of a node keeps what an API server says.
    pub fn state_file(lab: &Lab, node: &Node) -> PathBuf {
        lab.dir().join(format!("{}.state", node.name))
    }

    /// Runs `fairlead SUBCOMMAND … --bpffs PINS` on the node; its standard output.
    pub fn fairlead(&self, args: &[&str]) -> Result<String> {
        fairlead(&self.program, &self.ns, &self.pins, args)
    }
}

/// Runs `fairlead SUBCOMMAND … --bpffs PINS` in a namespace; its standard output. A command that goes on is killed.
pub fn fairlead(program: &Path, ns: &Netns, pins: &Path, args: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args).arg("--bpffs").arg(pins);
    let output = ns.run(|| process::output_within(&mut command, PATIENCE))??;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).context("fairlead prints UTF-8")
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
        if thread::panicking() {
            eprintln!("--- log of the agent of {}\n{}---", self.node, self.log());
        }
    }
}

/// The status of a GET, if anybody answers.
pub(super) fn http_status(port: u16, path: &str) -> Option<u16> {
    use std::io::{Read, Write};
    let limit = Duration::from_secs(2);
    let addr = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let mut stream = std::net::TcpStream::connect_timeout(&addr, limit).ok()?;
    stream.set_read_timeout(Some(limit)).ok()?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {addr}\r\n\r\n").as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.split_whitespace().nth(1)?.parse().ok()
}
