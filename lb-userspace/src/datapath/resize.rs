//! Maps of another size than before, while packets go through them.
//!
//! A start with another `--max-…` makes maps beside those that are pinned:
//!
//! 1. The old map is pinned as `NAME-old`, too; the new one is made as `NAME-new` and filled (`switch.rs`).
//! 2. `NAME-new` becomes `NAME`, in one step, and every program is replaced.
//! 3. `NAME-old` goes.
//!
//! Whoever is killed on the way leaves `NAME-old`
//! behind; the next start carries it after, whatever size it asks for.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::mem::{self, offset_of};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use lb_common::abi::{Addr4, Addr6, Flow, Service, ServiceKey};
use lb_common::maps::{MAPS, MapKind, MapSpec};

use super::carry::{LastSeen, Table, Way, index};
use super::error::OpenError;
use super::kernel_maps::walk;
use super::load::Programs;
use super::pins::Pins;
use super::switch::{StopAfter, switch};
use crate::sys::bpf;

/// Every map of the kind whose size is a flag's has flows.
const LAST_SEEN: LastSeen = LastSeen::at(offset_of!(Flow<Addr4>, last_seen));
const _: () = assert!(offset_of!(Flow<Addr6>, last_seen) == LAST_SEEN.from);

/// Maps that are replaced by others of another size.
#[derive(Debug)]
pub(super) struct Resize {
    pins: Pins,
    maps: Vec<Resized>,
}

#[derive(Debug)]
struct Resized {
    spec: &'static MapSpec,
    /// The oldest first; two if the start before was interrupted.
    old: Vec<Table>,
    /// The new one is made now, and not by the start before.
    fresh: bool,
}

impl Resize {
    /// What an interrupted start has left.
    pub(super) fn find(pins: &Pins) -> Result<Self, OpenError> {
        let mut maps = vec![];
        for spec in &MAPS {
            remove(&pins.map(&new(spec)))?;
            let path = pins.map(&old(spec));
            let Some(left) = Table::open(&path)? else { continue };
            match Table::open(&pins.map(spec.name))? {
                Some(now) if now.info.id != left.info.id => {
                    maps.push(Resized { spec, old: vec![left], fresh: false });
                }
                _ => remove(&path)?,
            }
        }
        Ok(Self { pins: pins.clone(), maps })
    }

    /// The maps of `flag` get these sizes, if everything in them has room; `false`: they stay.
    pub(super) fn resize(
        &mut self,
        flag: &str,
        sizes: &BTreeMap<&'static str, u32>,
    ) -> Result<bool, OpenError> {
        let mut tables = vec![];
        for spec in MAPS.iter().filter(|spec| sizes.contains_key(spec.name)) {
            let Some(table) = Table::open(&self.pins.map(spec.name))? else { continue };
            let (wanted, pinned) = (sizes[spec.name], table.info.max_entries);
            let needed = if wanted < pinned { self.needed(spec, &table)? } else { 0 };
            if needed > wanted {
                tracing::warn!(
                    "{flag} asks for {wanted} entries in {}, which needs {needed}; all maps of {flag} keep their size",
                    spec.name
                );
                return Ok(false);
            }
            tables.push((spec, table));
        }
        for (spec, table) in tables {
            tracing::info!(map = spec.name, from = table.info.max_entries, to = sizes[spec.name], "resized");
            let path = self.pins.map(&old(spec));
            if let Some(known) = self.maps.iter_mut().find(|known| known.spec == spec) {
                known.old.push(table);
                known.fresh = true;
                continue;
            }
            bpf::obj_pin(table.fd(), &path).map_err(failed(spec.name))?;
            self.maps.push(Resized { spec, old: vec![table], fresh: true });
        }
        Ok(true)
    }

    /// Entries that the map must have room for, so that nothing is lost. Flows may be: their tables forget anyway.
    fn needed(&self, spec: &'static MapSpec, table: &Table) -> Result<u32, OpenError> {
        let mut needed = 0;
        match spec.kind {
            MapKind::Array if spec.name == "SLOTS" => {
                // What is in no window is nobody's.
                let mut note = |service: Service| {
                    for window in [service.internal, service.external] {
                        needed = needed.max(window.base.saturating_add(window.len));
                    }
                };
                for name in ["SERVICES4", "SERVICES6"] {
                    let Some(services) = Table::open(&self.pins.map(name))? else { continue };
                    let fd = services.fd();
                    let walked = if name == "SERVICES4" {
                        walk(name, fd, |_: ServiceKey<Addr4>, service| note(service))
                    } else {
                        walk(name, fd, |_: ServiceKey<Addr6>, service| note(service))
                    };
                    walked.map_err(|error| failed(name)(io::Error::other(error)))?;
                }
            }
            MapKind::Array => table
                .each(|key, value| {
                    if value.iter().any(|byte| *byte != 0) {
                        needed = index(key) + 1;
                    }
                    Ok(())
                })
                .map_err(failed(spec.name))?,
            MapKind::Hash => table
                .each(|_, _| {
                    needed += 1;
                    Ok(())
                })
                .map_err(failed(spec.name))?,
            MapKind::LruHash
            | MapKind::PerCpuArray
            | MapKind::PerCpuHash
            | MapKind::LpmTrie
            | MapKind::RingBuf => {}
        }
        Ok(needed)
    }

    /// Where a map is found, or made.
    pub(super) fn path(&self, spec: &MapSpec) -> PathBuf {
        let fresh = self.maps.iter().any(|map| map.spec == spec && map.fresh);
        self.pins.map(&if fresh { new(spec) } else { spec.name.to_owned() })
    }

    /// Fills the new maps, gives them their names and the hooks their new programs, and forgets the old ones.
    pub(super) fn run(
        &mut self,
        maps: &BTreeMap<&'static str, OwnedFd>,
        programs: &Programs,
        stop: StopAfter,
    ) -> Result<(), OpenError> {
        let resized = mem::take(&mut self.maps);
        if resized.is_empty() {
            return Ok(());
        }
        let specs: Vec<_> = resized.iter().map(|map| (map.spec, map.fresh)).collect();
        let mut ways = vec![];
        for Resized { spec, mut old, fresh } in resized {
            let to = maps.get(spec.name).ok_or(OpenError::Missing { kind: "map", name: spec.name })?;
            let flows = spec.kind == MapKind::LruHash;
            if !flows {
                // The newest has everything.
                old = old.pop().filter(|_| fresh).into_iter().collect();
            }
            for from in old {
                ways.push(Way::new(spec.name, from, to.as_fd(), same, flows.then_some(LAST_SEEN))?);
            }
        }
        let take_place = || {
            specs.iter().filter(|(_, fresh)| *fresh).try_for_each(|(spec, _)| {
                let (from, to) = (self.pins.map(&new(spec)), self.pins.map(spec.name));
                fs::rename(&from, &to).map_err(failed(spec.name))
            })
        };
        switch(ways, programs, &self.pins.links(), take_place, stop)?;
        specs.iter().try_for_each(|(spec, _)| remove(&self.pins.map(&old(spec))))
    }
}

#[expect(clippy::unnecessary_wraps, reason = "it is a `Convert`")]
fn same(key: &[u8], value: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    Some((key.to_vec(), value.to_vec()))
}

fn new(spec: &MapSpec) -> String {
    format!("{}-new", spec.name)
}

fn old(spec: &MapSpec) -> String {
    format!("{}-old", spec.name)
}

fn remove(path: &Path) -> Result<(), OpenError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(OpenError::Pin { action: "remove", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn failed(map: &'static str) -> impl Fn(io::Error) -> OpenError {
    move |source| OpenError::Resize { map, source }
}
