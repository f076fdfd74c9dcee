//! The maps that count, in the kernel.

use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use aya::maps::{MapData, MapError as AyaError, PerCpuArray, PerCpuHashMap, PerCpuValues};
use lb_common::abi::{Counter, RefusalKey, Usage};
use lb_common::maps::MAX_USAGES;
use lb_common::reason::{Hook, REASONS, Reason, counter_index};

use super::lock;
use crate::datapath::{Datapath, MapError, typed};
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
    counters: PerCpuArray<MapData, Counter>,
    usage: PerCpuArray<MapData, Usage>,
    /// A handle of its own, so that a reset does not wait for reads.
    reset: Mutex<PerCpuArray<MapData, Usage>>,
    refusals: Mutex<PerCpuHashMap<MapData, RefusalKey, u64>>,
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
        let open = |spec| datapath.map_data(spec);
        Ok(Self {
            counters: typed("COUNTERS", open)?,
            usage: typed("USAGE", open)?,
            reset: Mutex::new(typed("USAGE", open)?),
            refusals: Mutex::new(typed("REFUSALS", open)?),
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
        lock(&self.reset).set(id, zero, 0).map_err(|error| failed(error.to_string()))?;
        let mut refusals = lock(&self.refusals);
        // As a rule there are none at all: one call instead of one for each reason.
        if refusals.keys().next().is_some() {
            for reason in 0..REASONS {
                // Most are not there.
                let _ = refusals.remove(&RefusalKey { service: id, reason });
            }
        }
        Ok(())
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
