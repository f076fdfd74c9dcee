//! Network namespaces: made with `ip netns`, so that a person can enter them, and entered by threads.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

/// Where `ip netns` keeps its handles.
const HANDLES: &str = "/run/netns";

/// A network namespace that exists; it is deleted with its lab, not with this handle.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes namespaces, all with one call of `ip`.
    pub fn create(names: &[String]) -> Result<Vec<Self>> {
        ip(&["-batch", "-"], &lines("netns add", names))?;
        Ok(names.iter().map(|name| Self { name: name.clone() }).collect())
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> PathBuf {
        Path::new(HANDLES).join(&self.name)
    }

    /// Runs `work` in a thread of its own inside the namespace and waits for it. Sockets, threads and
    /// processes made there stay in the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| self.enter().map(|()| work()));
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Takes the calling thread into the namespace, for good.
    pub fn enter(&self) -> Result<()> {
        let handle = File::open(self.path())
            .with_context(|| format!("cannot open the network namespace {}", self.name))?;
        setns(handle, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter the network namespace {}", self.name))
    }

    /// Starts a process inside the namespace. It belongs to a process group of its own: Ctrl-C reaches the
    /// lab, and the lab ends it.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        use std::os::unix::process::CommandExt;
        command.process_group(0);
        self.run(|| command.spawn())?.with_context(|| format!("cannot start {command:?} in {}", self.name))
    }

    /// Runs lines of `ip` commands inside the namespace.
    pub fn ip(&self, script: &str) -> Result<()> {
        // `ip -n` would hide what is mounted below /sys, such as bpffs.
        self.run(|| ip(&["-batch", "-"], script))?.with_context(|| format!("in {}", self.name))
    }

    /// Sets sysctls of the namespace, given by their path below `/proc/sys/net`.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.run(|| {
            for (key, value) in settings {
                // The kernel shows each thread the tree of its own namespace.
                let path = Path::new("/proc/sys/net").join(key);
                std::fs::write(&path, value)
                    .with_context(|| format!("cannot write {value} to {}", path.display()))?;
            }
            Ok(())
        })?
    }
}

/// The names of all namespaces on this machine that begin with `prefix`.
pub fn list(prefix: &str) -> Vec<String> {
    let Ok(handles) = std::fs::read_dir(HANDLES) else { return Vec::new() };
    let names = handles.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with(prefix)).collect()
}

/// Deletes namespaces. The kernel takes their devices down in its own time, once the last socket is closed.
pub fn delete(names: &[String]) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    ip(&["-force", "-batch", "-"], &lines("netns del", names))
}

/// The same command for each name.
fn lines(command: &str, names: &[String]) -> String {
    names.iter().fold(String::new(), |script, name| script + command + " " + name + "\n")
}

/// Runs `ip` with `script` on its standard input.
fn ip(args: &[&str], script: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run `ip`; install iproute2")?;
    if let Some(mut stdin) = child.stdin.take() {
        // A broken pipe means that `ip` gave up; its own message says more.
        let _ = stdin.write_all(script.as_bytes());
    }
    let output = child.wait_with_output().context("cannot wait for `ip`")?;
    if !output.status.success() {
        bail!(
            "`ip {}` failed: {}\nits input was:\n{script}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
