//! Maps of another size than before, while packets go through them.
//!
//! A start with another `--max-…` makes maps beside those that are pinned:
//!
//! 1. The old map is pinned as `NAME-old`, too; the new one is made as `NAME-new` and filled.
//! 2. `NAME-new` becomes `NAME`, in one step.
//! 3. Every link gets its new program, device by device. The old programs write to the old maps until then.
//! 4. Flows that they have begun or used meanwhile are carried after, and `NAME-old` goes.
//!
//! The service maps stand still: nobody writes them while no agent runs. Whoever is killed on the way leaves `NAME-old`
//! behind; the next start carries it after, whatever size it asks for.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use lb_common::abi::{Addr4, Addr6, Flow, Service, ServiceKey};
use lb_common::maps::{MAPS, MapKind, MapSpec};
use nix::time::{ClockId, clock_gettime};

use super::carry::{PASSES, SHORT_PASS, Table};
use super::error::OpenError;
use super::hooks::open_link;
use super::kernel_maps::walk;
use super::load::Programs;
use super::pins::{self, Pins};
use crate::sys::bpf;

/// Flows note that they are in use once a second; the datapath's clock may be coarse.
const USED_SINCE: u64 = 2_000_000_000;

/// Flows begin with the time of their last use.
const _: () = assert!(offset_of!(Flow<Addr4>, last_seen) == 0 && offset_of!(Flow<Addr6>, last_seen) == 0);

/// Maps that are replaced by others of another size.
#[derive(Debug)]
pub struct Resize {
    pins: Pins,
    maps: Vec<Resized>,
    /// Flows that were in use before are carried over.
    carried: u64,
}

#[derive(Debug)]
struct Resized {
    spec: &'static MapSpec,
    /// The oldest first; two if the start before was interrupted.
    old: Vec<Table>,
    /// Has what the old ones had; `None`: not made yet.
    new: Option<Table>,
    /// It is made now, and not by the start before.
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
                    maps.push(Resized { spec, old: vec![left], new: None, fresh: false });
                }
                _ => remove(&path)?,
            }
        }
        Ok(Self { pins: pins.clone(), maps, carried: 0 })
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
            self.maps.push(Resized { spec, old: vec![table], new: None, fresh: true });
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
            MapKind::LruHash | MapKind::PerCpuArray | MapKind::LpmTrie => {}
        }
        Ok(needed)
    }

    /// Where a map is found, or made.
    pub(super) fn path(&self, spec: &MapSpec) -> PathBuf {
        let fresh = self.maps.iter().any(|map| map.spec == spec && map.fresh);
        self.pins.map(&if fresh { new(spec) } else { spec.name.to_owned() })
    }

    /// Fills the new maps, gives them their names, and the links their new programs.
    pub(super) fn run(
        &mut self,
        maps: &BTreeMap<&'static str, OwnedFd>,
        programs: &Programs,
    ) -> Result<(), OpenError> {
        if self.maps.is_empty() {
            return Ok(());
        }
        for map in &mut self.maps {
            let missing = || OpenError::Missing { kind: "map", name: map.spec.name };
            let fd = maps.get(map.spec.name).ok_or_else(missing)?.try_clone();
            map.new = Some(fd.and_then(Table::new).map_err(failed(map.spec.name))?);
        }
        self.carry()?;
        for map in self.maps.iter().filter(|map| map.fresh) {
            let (from, to) = (self.pins.map(&new(map.spec)), self.pins.map(map.spec.name));
            fs::rename(&from, &to).map_err(failed(map.spec.name))?;
        }
        let links = self.links()?;
        // A connection that begins between the last look and the switch is known to nobody until the next.
        for _ in 0..PASSES {
            let begin = Instant::now();
            self.carry()?;
            if begin.elapsed() < SHORT_PASS {
                break;
            }
        }
        for (name, link) in links {
            if let Some(program) = programs.get(program_of(&name).1)
                && let Err(error) = bpf::link_update(link.as_fd(), program)
            {
                // Its device is gone, or it will be attached anew.
                tracing::debug!(link = name, %error, "keeps its program");
            }
        }
        self.carry()
    }

    /// To be called when every hook has its new program: carries after what came until then, and forgets the old maps.
    pub fn finish(&mut self) -> Result<(), OpenError> {
        self.carry()?;
        for map in std::mem::take(&mut self.maps) {
            remove(&self.pins.map(&old(map.spec)))?;
        }
        Ok(())
    }

    /// Copies what the new maps lack; of flows, those in use since the last time.
    fn carry(&mut self) -> Result<(), OpenError> {
        let since = std::mem::replace(&mut self.carried, now());
        for map in &self.maps {
            let Some(new) = &map.new else { continue };
            let carry = || match (map.spec.kind, map.old.last()) {
                (MapKind::LruHash, _) => {
                    let flows =
                        map.old.iter().map(|old| copy_flows(old, new, since.saturating_sub(USED_SINCE)));
                    flows.sum()
                }
                (_, Some(old)) if since == 0 && map.fresh => copy(old, new),
                _ => Ok(0),
            };
            let entries: u64 = carry().map_err(failed(map.spec.name))?;
            tracing::debug!(map = map.spec.name, entries, "carried over");
        }
        Ok(())
    }

    /// The links, which go on from one program to the next without a moment between. A filter gets its program later,
    /// from whoever follows the devices.
    fn links(&self) -> Result<Vec<(String, OwnedFd)>, OpenError> {
        let dir = self.pins.links();
        let read = |source| OpenError::Pin { action: "read", path: dir.clone(), source };
        let mut names = pins::names(&dir).map_err(read)?;
        // Both directions of a device one after the other: a flow has its two entries there.
        names.sort_by_key(|name| program_of(name).0);
        let mut links = vec![];
        for name in names {
            let link = open_link(&dir.join(&name)).map_err(read)?;
            links.extend(link.map(|link| (name, link)));
        }
        Ok(links)
    }
}

/// The device and the program of a link.
fn program_of(link: &str) -> (u32, &str) {
    pins::parse_device_link(link).map_or((0, link), |(program, ifindex)| (ifindex, program))
}

/// Copies everything that has a place in `to`; how many entries.
fn copy(from: &Table, to: &Table) -> io::Result<u64> {
    let is_array = from.info.kind == MapKind::Array as u32;
    let mut copied = 0;
    from.each(|key, value| {
        let empty = || value.iter().all(|byte| *byte == 0);
        if is_array && (index(key) >= to.info.max_entries || empty()) {
            return Ok(());
        }
        copied += 1;
        bpf::map_update_bytes(to.fd(), &to.info, key, value, 0)
    })?;
    Ok(copied)
}

/// Copies flows that were in use at or after `since` (`CLOCK_MONOTONIC`, ns), unless `to` has them as of later. If not
/// all have room, those in use most lately have.
fn copy_flows(from: &Table, to: &Table, since: u64) -> io::Result<u64> {
    let mut copied = 0;
    let mut put = |key: &[u8], value: &[u8]| {
        let flags = match bpf::map_lookup_bytes(to.fd(), &to.info, key)? {
            Some(have) if last_seen(&have) >= last_seen(value) => return Ok(()),
            Some(_) => 0,
            None => bpf::NO_EXIST,
        };
        match bpf::map_update_bytes(to.fd(), &to.info, key, value, flags) {
            // A packet was faster.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            result => result.map(|()| copied += 1),
        }
    };
    if to.info.max_entries < from.info.max_entries {
        for (key, value) in Lately::of(from, since)?.entries(room(to)) {
            put(key, value)?;
        }
    } else {
        from.each(|key, value| if last_seen(value) < since { Ok(()) } else { put(key, value) })?;
    }
    Ok(copied)
}

/// Flows that a table takes without losing any: the kernel's LRU keeps some entries free for each CPU.
fn room(table: &Table) -> usize {
    table.info.max_entries as usize / 4 * 3
}

/// Flows by the time of their last use: what an LRU is given first, it takes first.
struct Lately {
    keys: Vec<u8>,
    values: Vec<u8>,
    /// Time and place of each, the oldest first.
    order: Vec<(u64, usize)>,
    key_size: usize,
    value_size: usize,
}

impl Lately {
    /// Those in use at or after `since`.
    fn of(table: &Table, since: u64) -> io::Result<Self> {
        let (key_size, value_size) = (table.info.key_size as usize, table.info.value_size as usize);
        let mut flows = Self { keys: vec![], values: vec![], order: vec![], key_size, value_size };
        table.each(|key, value| {
            if last_seen(value) >= since {
                flows.order.push((last_seen(value), flows.order.len()));
                flows.keys.extend_from_slice(key);
                flows.values.extend_from_slice(value);
            }
            Ok(())
        })?;
        flows.order.sort_unstable();
        Ok(flows)
    }

    /// The last `room` of them.
    fn entries(&self, room: usize) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.order.iter().skip(self.order.len().saturating_sub(room)).map(|(_, at)| {
            (
                &self.keys[at * self.key_size..][..self.key_size],
                &self.values[at * self.value_size..][..self.value_size],
            )
        })
    }
}

fn last_seen(flow: &[u8]) -> u64 {
    flow.first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

fn index(key: &[u8]) -> u32 {
    key.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

/// `CLOCK_MONOTONIC`, ns.
fn now() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| {
        u64::try_from(now.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap_or(0)
    })
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
