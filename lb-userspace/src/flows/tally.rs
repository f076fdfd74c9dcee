//! What walks over the flow tables find, as metrics.

use std::collections::BTreeMap;
use std::time::Duration;

use lb_common::flow::State;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

type Labels = [(&'static str, &'static str); 2];

/// What one walk has found.
#[derive(Clone, Debug, Default)]
pub struct Pass {
    /// Flows that stay, by family and state.
    pub flows: BTreeMap<(&'static str, State), u64>,
    /// Entries that were removed, two for each flow.
    pub swept: BTreeMap<(&'static str, State), u64>,
    /// Name, entries and capacity of each table.
    pub fill: Vec<(&'static str, u64, u64)>,
    /// CPU time.
    pub busy: Duration,
    /// The most CPU time without a pause.
    pub longest: Duration,
}

impl Pass {
    pub(super) fn note_flows(&mut self, family: &'static str, state: State, flows: u64) {
        *self.flows.entry((family, state)).or_default() += flows;
    }

    pub(super) fn note_swept(&mut self, family: &'static str, state: State, entries: u64) {
        *self.swept.entry((family, state)).or_default() += entries;
    }
}

/// The metrics.
#[derive(Clone, Debug)]
pub struct Tally {
    flows: Family<Labels, Gauge>,
    swept: Family<Labels, Counter>,
    duration: Histogram,
}

impl Tally {
    pub fn register(registry: &mut Registry) -> Self {
        let tally = Self {
            flows: Family::default(),
            swept: Family::default(),
            duration: Histogram::new(exponential_buckets(0.001, 2.0, 12)),
        };
        // There from the start, so that an alert has something to compare with.
        tally.note(&Pass::default());
        registry.register(
            "fairlead_flows",
            "Flows, as the last walk over the tables found them",
            tally.flows.clone(),
        );
        registry.register(
            "fairlead_flow_entries_swept",
            "Entries of flows that were over, removed from the tables",
            tally.swept.clone(),
        );
        registry.register(
            "fairlead_flow_sweep_duration_seconds",
            "CPU time of one walk over the flow tables",
            tally.duration.clone(),
        );
        tally
    }

    /// A walk has ended.
    pub fn note(&self, pass: &Pass) {
        for family in ["ipv4", "ipv6"] {
            for state in State::ALL {
                let labels = [("family", family), ("state", state.name())];
                let of = |counts: &BTreeMap<_, u64>| counts.get(&(family, state)).copied().unwrap_or(0);
                let flows = i64::try_from(of(&pass.flows)).unwrap_or(i64::MAX);
                self.flows.get_or_create(&labels).set(flows);
                self.swept.get_or_create(&labels).inc_by(of(&pass.swept));
            }
        }
        if !pass.fill.is_empty() {
            self.duration.observe(pass.busy.as_secs_f64());
        }
    }
}
