//! The datapath's counters, as anybody with bpftool can read them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use lb_common::reason::{Action, Hook, REASONS, Reason};
use serde_json::Value;

use crate::process;

/// Packets (or socket calls) by hook and reason.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Counters(BTreeMap<(Hook, Reason), u64>);

impl Counters {
    /// Reads the pinned map below `pins`.
    pub fn read(pins: &Path) -> Result<Self> {
        let mut counters = BTreeMap::new();
        for entry in dump(pins, "COUNTERS")?.as_array().context("bpftool printed no list")? {
            let entry = &entry["formatted"];
            let index = entry["key"].as_u64().context("a counter without an index")?;
            let cpus = entry["values"].as_array().context("a counter without values")?;
            let packets = cpus.iter().filter_map(|cpu| cpu["value"]["packets"].as_u64()).sum();
            let hook = Hook::ALL.into_iter().find(|hook| *hook as u64 == index / u64::from(REASONS));
            let reason = Reason::ALL.into_iter().find(|reason| *reason as u64 == index % u64::from(REASONS));
            counters
                .insert((hook.context("a hook too many")?, reason.context("a reason too many")?), packets);
        }
        Ok(Self(counters))
    }

    pub fn get(&self, hook: Hook, reason: Reason) -> u64 {
        self.0.get(&(hook, reason)).copied().unwrap_or(0)
    }

    /// What has been counted since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let more = self.0.iter().map(|(key, count)| (*key, count - earlier.get(key.0, key.1)));
        Self(more.filter(|(_, count)| *count > 0).collect())
    }

    /// What the datapath did, without what it let pass.
    pub fn deeds(&self) -> impl Iterator<Item = (Hook, Reason, u64)> {
        let all = self.0.iter().map(|((hook, reason), count)| (*hook, *reason, *count));
        all.filter(|(_, reason, count)| reason.action() != Action::Pass && *count > 0)
    }
}

/// Where on a node a client is translated.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Edge {
    Nic,
    Pod,
    Socket,
}

impl Edge {
    pub fn of(hook: Hook) -> Self {
        match hook {
            Hook::Xdp | Hook::NicIn | Hook::NicOut => Self::Nic,
            Hook::PodIn | Hook::PodOut => Self::Pod,
            Hook::Connect | Hook::Sendmsg | Hook::Recvmsg | Hook::Getpeername => Self::Socket,
        }
    }
}

impl fmt::Display for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nic => "NIC",
            Self::Pod => "pod",
            Self::Socket => "socket",
        })
    }
}

/// `bpftool map dump` of a map that is pinned below `pins`.
pub fn dump(pins: &Path, map: &str) -> Result<Value> {
    bpftool("dump", pins, map, &[])
}

/// `bpftool map lookup` of an entry of an array; its `formatted` part.
pub fn lookup(pins: &Path, map: &str, index: u32) -> Result<Value> {
    let key = index.to_ne_bytes().map(|byte| byte.to_string());
    let entry = bpftool("lookup", pins, map, &[&["key".to_owned()][..], &key].concat())?;
    Ok(entry["formatted"].clone())
}

fn bpftool(what: &str, pins: &Path, map: &str, rest: &[String]) -> Result<Value> {
    let mut command = Command::new("bpftool");
    command.args(["-j", "map", what, "pinned"]).arg(find(pins, map)?).args(rest);
    let text = process::output(&mut command)?;
    serde_json::from_str(&text).with_context(|| format!("`{}` prints no JSON", process::show(&command)))
}

/// The pin of a map: in a directory below `pins` that is named after the layout's version.
pub fn find(pins: &Path, map: &str) -> Result<PathBuf> {
    let mut dirs = vec![pins.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.file_name().is_some_and(|name| name == map) {
                return Ok(path);
            }
        }
    }
    bail!("no map {map} is pinned below {}", pins.display())
}
