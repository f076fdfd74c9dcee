//! The maps that count, in the kernel.

use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use aya::maps::{Map, MapError as AyaError, PerCpuArray, PerCpuValues};
use lb_common::abi::{Counter, Usage};
use lb_common::maps::{MAPS, MAX_USAGES};
use lb_common::reason::{Hook, Reason, counter_index};

use super::lock;
use crate::datapath::{Datapath, MapError, OpenError};
use crate::inspect::{InspectError, Inspector, MapView};

/// How long a count of map entries is good for: counting half a million flows takes tens of milliseconds.
const FILL_AGE: Duration = Duration::from_secs(15);

/// The maps that count: the kernel's, or a test's.
pub trait Counts: fmt::Debug + Send + Sync {
    /// What became of packets at `hook` for `reason`, of all CPUs.
    fn counter(&self, hook: Hook, reason: Reason) -> Result<Counter, MapError>;

    /// What went through the Service with this id, of all CPUs; 0: through those that have no index.
    fn usage(&self, id: u32) -> Result<Usage, MapError>;

    /// The id is given to another Service.
    fn reset_usage(&self, id: u32) -> Result<(), MapError>;

    /// Entries of the hash maps; may be some seconds old.
    fn fill(&self) -> Result<Vec<MapView>, InspectError>;
}

/// The kernel's.
pub struct KernelCounts {
    counters: PerCpuArray<aya::maps::MapData, Counter>,
    usage: PerCpuArray<aya::maps::MapData, Usage>,
    /// A handle of its own, so that a reset does not wait for reads.
    reset: Mutex<PerCpuArray<aya::maps::MapData, Usage>>,
    inspector: Inspector,
    fill: Mutex<Option<(Instant, Vec<MapView>)>>,
}

impl fmt::Debug for KernelCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelCounts").finish_non_exhaustive()
    }
}

impl KernelCounts {
    pub fn new(datapath: &Datapath) -> Result<Self, InspectError> {
        let open = |name: &'static str| {
            let spec = MAPS.iter().find(|spec| spec.name == name);
            let data = datapath.map_data(spec.ok_or(OpenError::Missing { kind: "map", name })?)?;
            Ok::<_, InspectError>(Map::PerCpuArray(data))
        };
        Ok(Self {
            counters: open("COUNTERS")?.try_into().map_err(failed("COUNTERS"))?,
            usage: open("USAGE")?.try_into().map_err(failed("USAGE"))?,
            reset: Mutex::new(open("USAGE")?.try_into().map_err(failed("USAGE"))?),
            inspector: Inspector::of(datapath)?,
            fill: Mutex::default(),
        })
    }
}

impl Counts for KernelCounts {
    fn counter(&self, hook: Hook, reason: Reason) -> Result<Counter, MapError> {
        let values = self.counters.get(&counter_index(hook, reason), 0).map_err(failed("COUNTERS"))?;
        Ok(values.iter().fold(Counter::default(), |sum, counter| Counter {
            packets: sum.packets + counter.packets,
            bytes: sum.bytes + counter.bytes,
        }))
    }

    fn usage(&self, id: u32) -> Result<Usage, MapError> {
        if id >= MAX_USAGES {
            return Ok(Usage::default());
        }
        let values = self.usage.get(&id, 0).map_err(failed("USAGE"))?;
        Ok(values.iter().fold(Usage::default(), |sum, usage| Usage {
            connections: sum.connections + usage.connections,
            packets: sum.packets + usage.packets,
            bytes: sum.bytes + usage.bytes,
            refused: sum.refused + usage.refused,
        }))
    }

    fn reset_usage(&self, id: u32) -> Result<(), MapError> {
        // Index 0 is nobody's alone.
        if id == 0 || id >= MAX_USAGES {
            return Ok(());
        }
        let failed = |reason: String| MapError::Failed { map: "USAGE".into(), reason };
        let cpus = aya::util::nr_cpus().map_err(|(what, error)| failed(format!("{what}: {error}")))?;
        let zero = PerCpuValues::try_from(vec![Usage::default(); cpus])
            .map_err(|error| failed(error.to_string()))?;
        lock(&self.reset).set(id, zero, 0).map_err(|error| failed(error.to_string()))
    }

    fn fill(&self) -> Result<Vec<MapView>, InspectError> {
        let mut known = lock(&self.fill);
        if let Some((when, fill)) = &*known
            && when.elapsed() < FILL_AGE
        {
            return Ok(fill.clone());
        }
        let fill = self.inspector.fill()?;
        *known = Some((Instant::now(), fill.clone()));
        Ok(fill)
    }
}

fn failed(map: &'static str) -> impl Fn(AyaError) -> MapError {
    move |error| MapError::Failed { map: map.into(), reason: error.to_string() }
}
