//! How the agent keeps up, in kube-proxy's words where the meaning is the same.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets, linear_buckets};
use prometheus_client::registry::Registry;

use super::process::unix_seconds;
use super::{Label, lock};
use crate::edges::{EDGE_SOURCES, EDGES, Repairs};
use crate::entries::{Compiled, FrontendKind, Op, ServiceName, Target, WhenEmpty};
use crate::model::Change;

/// Changes of one Service that wait to be programmed and whose times are remembered.
const TRIGGERS: usize = 16;

const INTERNAL: Label = [("traffic_policy", "internal")];
const EXTERNAL: Label = [("traffic_policy", "external")];

/// How much is served.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Size {
    pub services: u64,
    pub frontends: u64,
    /// Services, and Pods with host ports, that have no room in the maps, whole or in part.
    pub unfit: u64,
    /// Maps whose entries the agent counts itself: name, entries, capacity.
    pub maps: [(&'static str, u64, u64); 3],
}

/// What a change is about, of what counts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum News {
    Service,
    /// Of the endpoints of a Service.
    Endpoints {
        service: Option<ServiceName>,
        /// Milliseconds since 1970.
        triggered: Option<i64>,
    },
    /// The Node, its Pods, or the networks of Services.
    Cluster,
}

impl From<&Change> for News {
    fn from(change: &Change) -> Self {
        match change {
            Change::Service(_) | Change::ServiceGone(_) => Self::Service,
            Change::Slice(slice) => {
                Self::Endpoints { service: slice.service.clone(), triggered: slice.triggered }
            }
            Change::SliceGone(_) => Self::Endpoints { service: None, triggered: None },
            Change::Pod(_)
            | Change::PodGone(_)
            | Change::Node(_)
            | Change::NodeGone(_)
            | Change::ServiceCidr(..)
            | Change::ServiceCidrGone(_) => Self::Cluster,
        }
    }
}

/// The metrics of the agent's own work.
#[derive(Debug)]
pub struct Work {
    started: f64,
    sync_duration: Histogram,
    last_sync: Gauge<f64, AtomicU64>,
    last_queued: Gauge<f64, AtomicU64>,
    service_changes: Counter,
    service_pending: Gauge,
    endpoint_changes: Counter,
    endpoint_pending: Gauge,
    programming: Histogram,
    no_local_endpoints: Family<Label, Gauge>,
    findings: Gauge,
    repairs: Repairs,
    check_entries: Counter,
    check_seconds: Counter<f64, AtomicU64>,
    check_rounds: Counter,
    check_round: Gauge<f64, AtomicU64>,
    waiting: Mutex<BTreeMap<ServiceName, Vec<f64>>>,
    /// Services without a local endpoint where one is asked for: internal, external.
    no_local: [Mutex<BTreeSet<ServiceName>>; 2],
}

impl Work {
    pub(super) fn register(registry: &mut Registry) -> Self {
        // As kube-proxy has them, so that dashboards need no change.
        let programming = [0.25, 0.5]
            .into_iter()
            .chain(linear_buckets(1.0, 1.0, 59))
            .chain(linear_buckets(60.0, 5.0, 12))
            .chain(linear_buckets(120.0, 30.0, 7));
        let work = Self {
            started: unix_seconds(),
            sync_duration: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            last_sync: Gauge::default(),
            last_queued: Gauge::default(),
            service_changes: Counter::default(),
            service_pending: Gauge::default(),
            endpoint_changes: Counter::default(),
            endpoint_pending: Gauge::default(),
            programming: Histogram::new(programming),
            no_local_endpoints: Family::default(),
            findings: Gauge::default(),
            repairs: Family::default(),
            check_entries: Counter::default(),
            check_seconds: Counter::default(),
            check_rounds: Counter::default(),
            check_round: Gauge::default(),
            waiting: Mutex::default(),
            no_local: Default::default(),
        };
        for policy in [&INTERNAL, &EXTERNAL] {
            work.no_local_endpoints.get_or_create(policy).set(0);
        }
        registry.register(
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "How long it took to bring changes into the maps",
            work.sync_duration.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
            "The last time that everything was in the maps",
            work.last_sync.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
            "The last time that a change came",
            work.last_queued.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_service_changes",
            "Changes of Services",
            work.service_changes.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_service_changes_pending",
            "Changes of Services that are not in the maps yet",
            work.service_pending.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_endpoint_changes",
            "Changes of EndpointSlices",
            work.endpoint_changes.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
            "Changes of EndpointSlices that are not in the maps yet",
            work.endpoint_pending.clone(),
        );
        registry.register(
            "kubeproxy_network_programming_duration_seconds",
            "From the change of a pod or Service to the maps",
            work.programming.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "Services with traffic policy Local and endpoints, but none on this node",
            work.no_local_endpoints.clone(),
        );
        registry.register(
            "fairlead_findings",
            "Things that keep Services from working as written, and objects that cannot be read; the log names them",
            work.findings.clone(),
        );
        work.register_check(registry);
        work
    }

    fn register_check(&self, registry: &mut Registry) {
        for map in Op::MAPS.into_iter().chain([EDGES, EDGE_SOURCES]) {
            drop(self.repairs.get_or_create(&[("map", map)]));
        }
        registry.register(
            "fairlead_map_repairs",
            "Entries of the maps that somebody else had removed, changed or added, and that were mended",
            self.repairs.clone(),
        );
        registry.register(
            "fairlead_map_check_entries",
            "Entries of the maps that were compared with what they should be",
            self.check_entries.clone(),
        );
        registry.register(
            "fairlead_map_check_seconds",
            "Time spent on comparing and mending",
            self.check_seconds.clone(),
        );
        registry.register(
            "fairlead_map_check_rounds",
            "How often all maps were compared from beginning to end",
            self.check_rounds.clone(),
        );
        registry.register(
            "fairlead_map_check_round_seconds",
            "How long the last of these rounds took, pauses included",
            self.check_round.clone(),
        );
    }

    /// So many entries of the maps were compared.
    pub fn note_check(&self, entries: usize, took: Duration) {
        self.check_entries.inc_by(entries as u64);
        self.check_seconds.inc_by(took.as_secs_f64());
    }

    /// All maps were compared.
    pub fn note_check_round(&self, took: Duration) {
        self.check_rounds.inc();
        self.check_round.set(took.as_secs_f64());
    }

    /// Entries that had to be mended, by map.
    pub fn repairs(&self) -> &Repairs {
        &self.repairs
    }

    /// An entry of a map had to be mended.
    pub fn note_repair(&self, map: &'static str) {
        self.repairs.get_or_create(&[("map", map)]).inc();
    }

    /// A change that touches something.
    pub fn note_change(&self, news: News) {
        match news {
            News::Service => {
                self.service_changes.inc();
                self.service_pending.inc();
            }
            News::Endpoints { service, triggered } => {
                self.endpoint_changes.inc();
                self.endpoint_pending.inc();
                if let (Some(service), Some(triggered)) = (service, triggered) {
                    self.note_trigger(service, triggered);
                }
            }
            News::Cluster => return,
        }
        self.last_queued.set(unix_seconds());
    }

    /// What changed before the agent started says nothing about how fast it is.
    fn note_trigger(&self, service: ServiceName, milliseconds: i64) {
        #[expect(clippy::cast_precision_loss, reason = "exact until the year 287396")]
        let triggered = milliseconds as f64 / 1e3;
        if triggered > self.started {
            let mut waiting = lock(&self.waiting);
            let times = waiting.entry(service).or_default();
            if times.len() < TRIGGERS {
                times.push(triggered);
            }
        }
    }

    /// Changes were brought into the maps.
    pub fn note_sync(&self, took: Duration) {
        self.sync_duration.observe(took.as_secs_f64());
    }

    /// The Service is in the maps as it should be.
    pub fn note_programmed(&self, name: &ServiceName) {
        let times = lock(&self.waiting).remove(name).unwrap_or_default();
        for triggered in times {
            self.programming.observe((unix_seconds() - triggered).max(0.0));
        }
    }

    /// Everything is in the maps.
    pub(super) fn note_settled(&self) {
        self.last_sync.set(unix_seconds());
        self.service_pending.set(0);
        self.endpoint_pending.set(0);
    }

    /// So many findings of a Service became so many.
    pub fn note_findings(&self, before: usize, after: usize) {
        self.findings.inc_by(i64::try_from(after).unwrap_or(0) - i64::try_from(before).unwrap_or(0));
    }

    pub(super) fn note_policies(&self, name: &ServiceName, compiled: &Compiled) {
        let empty = |target: &Target| target.when_empty == WhenEmpty::Drop && target.backends.is_empty();
        let mut missing = [false; 2];
        for frontend in compiled.frontends.values() {
            match frontend.kind {
                FrontendKind::ClusterIP => missing[0] |= empty(&frontend.internal),
                _ => missing[1] |= empty(&frontend.external),
            }
        }
        self.set_policies(name, missing);
    }

    pub(super) fn forget_policies(&self, name: &ServiceName) {
        self.set_policies(name, [false; 2]);
        lock(&self.waiting).remove(name);
    }

    fn set_policies(&self, name: &ServiceName, missing: [bool; 2]) {
        for ((missing, services), policy) in
            missing.into_iter().zip(&self.no_local).zip([&INTERNAL, &EXTERNAL])
        {
            let mut services = lock(services);
            let changed = if missing { services.insert(name.clone()) } else { services.remove(name) };
            if changed {
                let count = i64::try_from(services.len()).unwrap_or(i64::MAX);
                self.no_local_endpoints.get_or_create(policy).set(count);
            }
        }
    }
}
