//! Garbage collection: flows that are over leave their tables, so that the LRU need not choose between them and
//! those that live.
//!
//! [`Sweeper`] walks over the tables in slices. Whether a flow is over is decided by [`lb_common::flow::State`], as in
//! the kernel; what is found to be over is looked at once more, and its other half too, before both are removed.

mod tally;

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use aya::Pod;
use aya::maps::{HashMap, IterableMap, MapData, MapError as AyaError};
use lb_common::Addr4;
use lb_common::Addr6;
use lb_common::abi::{Flow, FlowKey};
use lb_common::flow::{End, State, is_reply, reverse_key};
use lb_common::tables::FlowTable;

pub use self::tally::{Pass, Tally};
use crate::datapath::{Datapath, MapError, OpenError, Timeouts, typed};
use crate::inspect::monotonic_nanoseconds;
use crate::sys::bpf::{self, Cursor};

/// Entries looked at without a pause: half a millisecond.
const SLICE: usize = 2048;
/// Between two slices, so that a walk over a million entries takes at most a tenth of a CPU.
const PAUSE: Duration = Duration::from_millis(5);
/// Between two walks.
const INTERVAL: Duration = Duration::from_secs(10);
/// A table this full (percent) is worth a warning.
pub const PRESSURE: u64 = 85;

/// The flow tables of both families.
pub struct Sweeper {
    v4: [Table<Addr4>; 2],
    v6: [Table<Addr6>; 2],
    timeouts: Timeouts,
}

/// One flow table.
struct Table<A> {
    name: &'static str,
    family: &'static str,
    kind: FlowTable,
    map: HashMap<MapData, FlowKey<A>, Flow<A>>,
    capacity: u64,
}

impl Sweeper {
    pub fn new(datapath: &Datapath) -> Result<Self, OpenError> {
        Ok(Self {
            v4: [
                Table::open(datapath, "FLOWS4", "ipv4", FlowTable::Established)?,
                Table::open(datapath, "PENDING4", "ipv4", FlowTable::Pending)?,
            ],
            v6: [
                Table::open(datapath, "FLOWS6", "ipv6", FlowTable::Established)?,
                Table::open(datapath, "PENDING6", "ipv6", FlowTable::Pending)?,
            ],
            timeouts: datapath.options().timeouts,
        })
    }

    /// Sweeps again and again, and tells `tally`.
    pub async fn run(mut self, tally: Tally) {
        let mut warned = Vec::new();
        loop {
            match self.pass(PAUSE).await {
                Ok(pass) => {
                    warn(&pass, &mut warned);
                    tally.note(&pass);
                }
                Err(error) => tracing::warn!(%error, "the flow tables cannot be swept; trying again"),
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Walks over every table once, with a pause between slices.
    pub async fn pass(&mut self, pause: Duration) -> Result<Pass, MapError> {
        let mut pass = Pass::default();
        for table in &mut self.v4 {
            table.walk(&self.timeouts, pause, &mut pass).await?;
        }
        for table in &mut self.v6 {
            table.walk(&self.timeouts, pause, &mut pass).await?;
        }
        Ok(pass)
    }
}

impl<A: Copy> Table<A>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    fn open(
        datapath: &Datapath,
        name: &'static str,
        family: &'static str,
        kind: FlowTable,
    ) -> Result<Self, OpenError> {
        let map: HashMap<MapData, FlowKey<A>, Flow<A>> = typed(name, |spec| datapath.map_data(spec))?;
        let info = map.map().info().map_err(|error| OpenError::Map { name, source: Box::new(error) })?;
        Ok(Self { name, family, kind, capacity: info.max_entries().into(), map })
    }

    async fn walk(&mut self, timeouts: &Timeouts, pause: Duration, pass: &mut Pass) -> Result<(), MapError> {
        let mut entries = 0;
        let mut cursor = None;
        loop {
            let started = Instant::now();
            cursor = self.slice(cursor, timeouts, pass, &mut entries)?;
            pass.busy += started.elapsed();
            if cursor.is_none() {
                break;
            }
            tokio::time::sleep(pause).await;
        }
        pass.fill.push((self.name, entries, self.capacity));
        Ok(())
    }

    /// Looks at some entries; where to go on.
    fn slice(
        &mut self,
        cursor: Option<Cursor>,
        timeouts: &Timeouts,
        pass: &mut Pass,
        entries: &mut u64,
    ) -> Result<Option<Cursor>, MapError> {
        let fd = self.map.map().fd().as_fd();
        let (slice, next) = bpf::map_lookup_batch::<FlowKey<A>, Flow<A>>(fd, cursor, SLICE)
            .map_err(|error| failed(self.name, &error))?;
        let now = monotonic_nanoseconds();
        for (key, flow) in slice {
            let state = State::of(self.kind, key.proto, &flow);
            if self.is_over(timeouts, now, &key, &flow)
                && let Some(removed) = self.remove(timeouts, &key)?
            {
                pass.note_swept(self.family, state, removed);
                continue;
            }
            *entries += 1;
            // One of its two entries stands for a flow.
            if !is_reply(&flow) {
                pass.note_flow(self.family, state);
            }
        }
        Ok(next)
    }

    fn is_over(&self, timeouts: &Timeouts, now: u64, key: &FlowKey<A>, flow: &Flow<A>) -> bool {
        let state = State::of(self.kind, key.proto, flow);
        state.is_over(now.saturating_sub(flow.last_seen), timeouts.of(state), End::Sweep)
    }

    /// Removes both halves of a flow, unless one of them lives: a packet may have come since they were read. How many
    /// entries that were; `None`: it lives.
    fn remove(&mut self, timeouts: &Timeouts, key: &FlowKey<A>) -> Result<Option<u64>, MapError> {
        let now = monotonic_nanoseconds();
        let Some(flow) = self.get(key)? else { return Ok(Some(0)) };
        let other_key = reverse_key(key, &flow);
        let other = self.get(&other_key)?;
        let lives = |key: &FlowKey<A>, flow: &Flow<A>| !self.is_over(timeouts, now, key, flow);
        if lives(key, &flow) || other.is_some_and(|other| lives(&other_key, &other)) {
            return Ok(None);
        }
        let mut removed = 0;
        for key in [key, &other_key] {
            match self.map.remove(key) {
                Ok(()) => removed += 1,
                Err(error) if is_absence(&error) => {}
                Err(error) => return Err(failed(self.name, &error)),
            }
        }
        Ok(Some(removed))
    }

    fn get(&self, key: &FlowKey<A>) -> Result<Option<Flow<A>>, MapError> {
        match self.map.get(key, 0) {
            Ok(flow) => Ok(Some(flow)),
            Err(error) if is_absence(&error) => Ok(None),
            Err(error) => Err(failed(self.name, &error)),
        }
    }
}

/// Somebody else has removed it: the programs, or the LRU.
fn is_absence(error: &AyaError) -> bool {
    match error {
        AyaError::KeyNotFound | AyaError::ElementNotFound => true,
        AyaError::SyscallError(error) => error.io_error.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}

fn failed(map: &str, error: &dyn std::error::Error) -> MapError {
    MapError::Failed { map: map.into(), reason: error.to_string() }
}

/// Says when a table is nearly full, and when it is not any more.
fn warn(pass: &Pass, warned: &mut Vec<&'static str>) {
    for (map, entries, capacity) in &pass.fill {
        let known = warned.contains(map);
        if is_pressed(*entries, *capacity) && !known {
            tracing::warn!(map, entries, capacity, "{}", advice(map));
            warned.push(map);
        } else if known && !is_pressed(*entries, capacity.saturating_sub(capacity / 10)) {
            tracing::info!(map, entries, capacity, "there is room in the flow table again");
            warned.retain(|name| name != map);
        }
    }
}

/// Whether a table is so full that somebody should know.
pub fn is_pressed(entries: u64, capacity: u64) -> bool {
    entries * 100 >= capacity * PRESSURE
}

/// What to do about a flow table that is nearly full; empty for other maps.
pub fn advice(map: &str) -> &'static str {
    match map {
        "FLOWS4" | "FLOWS6" => {
            "the flow table is nearly full: new connections push out those that are silent the longest; \
             raise --max-flows (after `fairlead cleanup`), or shorten --conntrack-tcp-timeout-established"
        }
        "PENDING4" | "PENDING6" => {
            "the table of unanswered flows is nearly full, as under a flood of first packets; established \
             connections are not affected"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_said_once_and_so_is_its_end() {
        let fill = |entries| Pass { fill: vec![("FLOWS4", entries, 1000)], ..Pass::default() };
        let mut warned = Vec::new();
        for (entries, expected) in [(849, false), (850, true), (800, true), (764, false), (900, true)] {
            warn(&fill(entries), &mut warned);
            assert_eq!(!warned.is_empty(), expected, "{entries}");
        }
    }

    #[test]
    fn every_flow_table_has_its_advice() {
        for map in ["FLOWS4", "FLOWS6", "PENDING4", "PENDING6"] {
            assert!(!advice(map).is_empty(), "{map}");
        }
        assert!(advice("SERVICES4").is_empty());
    }
}
