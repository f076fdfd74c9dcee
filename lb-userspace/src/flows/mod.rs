//! Garbage collection: flows that are over leave their tables, so that the LRU need not choose between them and
//! those that live.
//!
//! [`Sweeper`] walks over the tables in slices. Decision and removal are the kernel's own where it takes the programs for
//! that ([`kernel`]), else ours ([`agent`]); either way [`lb_common::flow::State`] says whether a flow is over, and what is
//! found to be over is looked at once more, and its other half too, before both are removed.

mod agent;
mod kernel;
mod tally;

use std::sync::Arc;
use std::time::Duration;

use lb_common::flow::State;
use lb_common::maps::MAPS;
use lb_common::tables::FlowTable;
use lb_common::{Addr4, Addr6};
use nix::time::{ClockId, clock_gettime};

pub use self::tally::{Pass, Tally};
use crate::datapath::{Datapath, MapError, OpenError};

/// Entries looked at without a pause: less than a millisecond (docs/datapath.md).
const SLICE: usize = 2048;
/// Between two slices, so that a walk over a million entries takes at most a tenth of a CPU.
const PAUSE: Duration = Duration::from_millis(5);
/// Between two walks.
const INTERVAL: Duration = Duration::from_secs(10);
/// A table this full (percent) is worth a warning.
pub const PRESSURE: u64 = 85;

/// The flow tables of both families.
pub struct Sweeper([Table; 4]);

/// One flow table.
struct Table {
    name: &'static str,
    family: &'static str,
    capacity: u64,
    walk: Box<dyn Walk + Send>,
}

/// A walk over one table, by whoever decides and removes.
trait Walk {
    /// Looks at about [`SLICE`] entries; whether there are more.
    fn slice(&mut self, found: &mut Found<'_>) -> Result<bool, MapError>;

    /// The next slice is the first of another walk.
    fn restart(&mut self);
}

/// What a walk over one table finds.
struct Found<'a> {
    family: &'static str,
    /// Entries that stay.
    entries: u64,
    pass: &'a mut Pass,
}

impl Found<'_> {
    /// So many entries stay; one of its two entries stands for a flow.
    fn stay(&mut self, state: State, is_reply: bool, entries: u64) {
        self.entries += entries;
        if !is_reply {
            self.pass.note_flows(self.family, state, entries);
        }
    }

    /// So many entries of flows that were over were removed.
    fn swept(&mut self, state: State, removed: u64) {
        self.pass.note_swept(self.family, state, removed);
    }
}

impl Sweeper {
    pub fn new(datapath: &Datapath) -> Result<Self, OpenError> {
        Ok(Self([
            Table::open(datapath, "FLOWS4", FlowTable::Established)?,
            Table::open(datapath, "PENDING4", FlowTable::Pending)?,
            Table::open(datapath, "FLOWS6", FlowTable::Established)?,
            Table::open(datapath, "PENDING6", FlowTable::Pending)?,
        ]))
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
        for table in &mut self.0 {
            table.walk(pause, &mut pass).await?;
        }
        Ok(pass)
    }
}

impl Table {
    fn open(datapath: &Datapath, name: &'static str, kind: FlowTable) -> Result<Self, OpenError> {
        let spec = MAPS.iter().find(|spec| spec.name == name);
        let map = datapath.map_data(spec.ok_or(OpenError::Missing { kind: "map", name })?)?;
        let info = map.info().map_err(|error| OpenError::Map { name, source: Box::new(error) })?;
        let is_v4 = name.ends_with('4');
        let walk: Box<dyn Walk + Send> = match datapath.sweeps() {
            Some(sweeps) => Box::new(kernel::Table::new(Arc::clone(sweeps), name)),
            None if is_v4 => Box::new(agent::Table::<Addr4>::open(datapath, name, kind)?),
            None => Box::new(agent::Table::<Addr6>::open(datapath, name, kind)?),
        };
        let family = if is_v4 { "ipv4" } else { "ipv6" };
        Ok(Self { name, family, capacity: info.max_entries().into(), walk })
    }

    async fn walk(&mut self, pause: Duration, pass: &mut Pass) -> Result<(), MapError> {
        self.walk.restart();
        let mut entries = 0;
        loop {
            let started = cpu_time();
            let mut found = Found { family: self.family, entries: 0, pass };
            let more = self.walk.slice(&mut found)?;
            entries += found.entries;
            let took = cpu_time().saturating_sub(started);
            pass.busy += took;
            pass.longest = pass.longest.max(took);
            if !more {
                break;
            }
            tokio::time::sleep(pause).await;
        }
        pass.fill.push((self.name, entries, self.capacity));
        Ok(())
    }
}

/// What this thread has used of a processor.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
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
