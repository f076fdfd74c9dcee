//! Control groups (v2): socket programs attach to them, and a lab ends its processes by them.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A control group below the mount point.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    pub fn create(path: PathBuf) -> Result<Self> {
        fs::create_dir_all(&path).with_context(|| format!("cannot make the cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves a process here. A socket belongs to the cgroup its process was in when it was made.
    pub fn adopt(&self, pid: u32) -> Result<()> {
        fs::write(self.path.join("cgroup.procs"), pid.to_string())
            .with_context(|| format!("cannot move process {pid} to {}", self.path.display()))
    }
}

/// Ends every process in the tree at `path` and removes the tree; fine if there is none.
pub fn remove_tree(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        kill_tree(path);
        match remove_dirs(path) {
            Ok(()) => return Ok(()),
            Err(err) if err.kind() == ErrorKind::NotFound => return Ok(()),
            Err(err) if Instant::now() > deadline => {
                bail!("cannot remove the cgroup {}: {err}", path.display())
            }
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Sends SIGKILL to every process in the tree.
fn kill_tree(path: &Path) {
    // cgroup.kill exists since 5.14 (commit 661ee6280931); before that, one by one.
    if fs::write(path.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    for dir in children(path) {
        kill_tree(&dir);
    }
    let procs = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    for pid in procs.lines().filter_map(|line| line.parse().ok()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

fn remove_dirs(path: &Path) -> std::io::Result<()> {
    for dir in children(path) {
        remove_dirs(&dir)?;
    }
    fs::remove_dir(path)
}

fn children(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    entries.flatten().filter(|entry| entry.path().is_dir()).map(|entry| entry.path()).collect()
}
