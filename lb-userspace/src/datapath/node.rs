//! Settings of the node that the datapath depends on, and what is remembered to undo them.
//!
//! The reserved source ports are added to `net.ipv4.ip_local_reserved_ports`, so that no process of the
//! node gets one of them. What was added, and where clsact qdiscs were made, stands in
//! `/run/fairlead/<path of --bpffs, with - for />.json` until `fairlead cleanup`: bpffs takes no files.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use lb_common::abi::{RESERVED_PORTS_COUNT, RESERVED_PORTS_FIRST};
use serde::{Deserialize, Serialize};

use crate::sys::netns;
use crate::sys::sysctl::{self, Ports};

const STATE_DIR: &str = "/run/fairlead";

/// What the agent changed on the node outside of its pin directory.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// Inode of the network namespace that was changed.
    pub netns: u64,
    /// Ports added to `net.ipv4.ip_local_reserved_ports`, in the kernel's notation.
    pub reserved_ports: String,
    /// Interface indices whose clsact qdisc was made by us.
    pub clsact: BTreeSet<u32>,
}

/// [`State`] and its file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StateFile {
    path: PathBuf,
}

impl StateFile {
    pub fn new(bpffs: &Path) -> Self {
        Self { path: Path::new(STATE_DIR).join(format!("{}.json", name_of(bpffs))) }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `None`: nothing was changed, or it is not known any more, or it was in another network namespace.
    pub fn read(&self) -> Option<State> {
        let state: State = serde_json::from_slice(&fs::read(&self.path).ok()?).ok()?;
        (netns::inode().ok() == Some(state.netns)).then_some(state)
    }

    /// Writes the file; a reader sees the old or the new state.
    pub fn write(&self, state: &State) -> io::Result<()> {
        fs::create_dir_all(STATE_DIR)?;
        let new = self.path.with_extension("new");
        fs::write(&new, serde_json::to_vec_pretty(state)?)?;
        fs::rename(&new, &self.path)
    }

    /// Removes the file, and its directory if it is empty.
    pub fn remove(&self) -> io::Result<bool> {
        let removed = match fs::remove_file(&self.path) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        // Other agents may have theirs there.
        let _ = fs::remove_dir(STATE_DIR);
        Ok(removed)
    }

    /// Changes what is remembered.
    pub fn update(&self, change: impl FnOnce(&mut State)) -> io::Result<()> {
        let mut state = self.read().unwrap_or_default();
        state.netns = netns::inode()?;
        change(&mut state);
        self.write(&state)
    }
}

/// What files are called that belong to this `--bpffs`. Two directories never share a name: `-` in the path is doubled.
pub fn name_of(bpffs: &Path) -> String {
    let path = bpffs.to_string_lossy();
    path.trim_matches('/').replace('-', "--").replace('/', "-")
}

/// Adds the datapath's source ports to those that the kernel does not give to processes.
pub fn reserve_ports(state: &StateFile) -> io::Result<()> {
    let last = RESERVED_PORTS_FIRST + (RESERVED_PORTS_COUNT - 1);
    let ours = Ports::range(RESERVED_PORTS_FIRST..=last);
    let text = sysctl::read(sysctl::RESERVED_PORTS)?;
    let before = Ports::parse(&text)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("cannot read {text:?}")))?;
    let added = ours.without(&before);
    if added.is_empty() {
        return Ok(());
    }
    // Remembered before it is done: undoing what was not done is harmless.
    state.update(|state| {
        let known = Ports::parse(&state.reserved_ports).unwrap_or_default();
        state.reserved_ports = known.union(&added).to_string();
    })?;
    sysctl::write(sysctl::RESERVED_PORTS, &before.union(&ours).to_string())?;
    tracing::info!(ports = %added, "reserved the datapath's source ports ({})", sysctl::RESERVED_PORTS);
    Ok(())
}

/// Takes back what [`reserve_ports`] added. `true`: something changed.
pub(super) fn release_ports(state: &State) -> io::Result<bool> {
    let added = Ports::parse(&state.reserved_ports).unwrap_or_default();
    if added.is_empty() {
        return Ok(false);
    }
    let text = sysctl::read(sysctl::RESERVED_PORTS)?;
    let now = Ports::parse(&text).unwrap_or_default();
    sysctl::write(sysctl::RESERVED_PORTS, &now.without(&added).to_string())?;
    Ok(true)
}

/// What keeps packets from being forwarded on this node; one line each.
pub fn forwarding_warnings() -> Vec<String> {
    let settings = [
        ("net.ipv4.ip_forward", "IPv4 packets for pods are dropped"),
        ("net.ipv6.conf.all.forwarding", "IPv6 packets for pods are dropped"),
    ];
    settings
        .into_iter()
        .filter(|(name, _)| sysctl::read(name).is_ok_and(|value| value == "0"))
        .map(|(name, effect)| format!("{name} is 0: {effect}; run `sysctl -w {name}=1`"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_directory_has_its_own_file() {
        assert_eq!(name_of(Path::new("/sys/fs/bpf/fairlead")), "sys-fs-bpf-fairlead");
        assert_ne!(name_of(Path::new("/a/b-c")), name_of(Path::new("/a-b/c")));
        assert_ne!(name_of(Path::new("/a/b-c")), name_of(Path::new("/a/b/c")));
    }
}
