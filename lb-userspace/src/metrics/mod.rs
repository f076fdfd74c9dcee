//! Prometheus metrics: what the datapath counts, how the agent keeps up, and how full the maps are.
//!
//! [`Metrics`] is a handle that the agent notes things with; nothing is read from the kernel before somebody
//! asks [`serve`] for it. docs/metrics.md lists every metric, and tests compare it with what is exported.

mod accounts;
mod collect;
mod kernel;
mod process;
mod source;
mod work;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

pub use self::kernel::{Counts, KernelCounts};
pub use self::work::{News, Size, Work};
use crate::datapath::Features;
use crate::edges::Reattached;
use crate::entries::{Compiled, ServiceName};
use crate::events::Outcomes;
use crate::flows::Tally;
use crate::health::{self, Health};
use crate::owner::Owner;
use accounts::Accounts;
use collect::Collection;
use source::Source;

/// Services that have metrics of their own; the others share one.
pub const SERVICES: usize = 1000;

/// The format of the answer.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// One label and its value.
type Label = [(&'static str, &'static str); 1];

/// Where everything is noted that becomes a metric.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    work: Work,
    source: Source,
    shared: Arc<Shared>,
    features: Family<Label, Gauge>,
    events: Outcomes,
    flows: Tally,
    reattached: Reattached,
    /// One answer is made at a time.
    turn: tokio::sync::Mutex<()>,
}

/// What the agent writes and the collector reads.
#[derive(Debug)]
struct Shared {
    accounts: Mutex<Accounts>,
    /// Ids that were in the maps when they were read: their counts are of the Service that has them still.
    found: Mutex<BTreeSet<u32>>,
    size: Mutex<Size>,
    counts: OnceLock<Box<dyn Counts>>,
    errors: Counter,
}

impl Metrics {
    pub fn new(health: &Health) -> Self {
        Self::with_limit(health, SERVICES)
    }

    /// At most `limit` Services have metrics of their own.
    fn with_limit(health: &Health, limit: usize) -> Self {
        let mut registry = Registry::default();
        let shared = Arc::new(Shared {
            accounts: Mutex::new(Accounts::new(limit)),
            found: Mutex::default(),
            size: Mutex::default(),
            counts: OnceLock::new(),
            errors: Counter::default(),
        });
        registry.register_collector(Box::new(Collection::new(Arc::clone(&shared))));
        let work = Work::register(&mut registry);
        let source = Source::register(&mut registry);
        let answers = health.answers();
        registry.register(
            "kubeproxy_proxy_healthz",
            "Answers of /healthz by HTTP status",
            answers.healthz.clone(),
        );
        registry.register("kubeproxy_proxy_livez", "Answers of /livez by HTTP status", answers.livez.clone());
        let features = Family::<Label, Gauge>::default();
        registry.register(
            "fairlead_features",
            "Whether the kernel has a feature that Fairlead uses",
            features.clone(),
        );
        let build = Family::<Label, Gauge>::default();
        build.get_or_create(&[("version", env!("CARGO_PKG_VERSION"))]).set(1);
        registry.register("fairlead_build_info", "The running version; always 1", build);
        registry.register(
            "fairlead_metrics_errors",
            "Reads of counting maps that failed while metrics were collected",
            shared.errors.clone(),
        );
        let events = Outcomes::default();
        registry.register(
            "fairlead_events",
            "Events about Services, by what became of them",
            events.family().clone(),
        );
        let flows = Tally::register(&mut registry);
        let reattached = Reattached::default();
        registry.register(
            "fairlead_reattached",
            "Programs that somebody took off their hooks and that were put back",
            reattached.family().clone(),
        );
        process::register(&mut registry);
        let turn = tokio::sync::Mutex::default();
        Self(Arc::new(Inner { registry, work, source, shared, features, events, flows, reattached, turn }))
    }

    /// There is a datapath, with these maps.
    pub fn attach(&self, counts: Box<dyn Counts>, features: &Features) {
        for (name, has) in features.named() {
            self.0.features.get_or_create(&[("feature", name)]).set(has.into());
        }
        // There is one datapath in the life of an agent.
        let _ = self.0.shared.counts.set(counts);
    }

    /// What became of Events.
    pub fn events(&self) -> &Outcomes {
        &self.0.events
    }

    /// What walks over the flow tables find.
    pub fn flows(&self) -> &Tally {
        &self.0.flows
    }

    /// What was put back on its hook.
    pub fn reattached(&self) -> &Reattached {
        &self.0.reattached
    }

    /// How the agent keeps up.
    pub fn work(&self) -> &Work {
        &self.0.work
    }

    /// Whether what is served may be out of date.
    pub fn note_stale(&self, stale: bool) {
        self.0.source.stale.set(stale.into());
    }

    /// The state file was written at this time, seconds since 1970.
    pub fn note_state_written(&self, saved: i64) {
        #[expect(clippy::cast_precision_loss, reason = "exact for 285 million years")]
        self.0.source.written.set(saved as f64);
    }

    /// The state file could not be written.
    pub fn note_state_error(&self) {
        self.0.source.write_errors.inc();
    }

    /// Whether the frontend of the API server keeps endpoints that it has lost.
    pub fn note_held(&self, held: bool) {
        self.0.source.held.set(held.into());
    }

    /// The maps were read; they hold Services with these ids.
    pub fn note_found(&self, ids: BTreeSet<u32>) {
        *lock(&self.0.shared.found) = ids;
    }

    /// The Service means this on this node.
    pub fn note_policies(&self, name: &ServiceName, compiled: &Compiled) {
        self.0.work.note_policies(name, compiled);
    }

    /// The Service or Pod gets this id in the maps.
    pub fn note_service(&self, name: &Owner, id: u32) {
        let shared = &self.0.shared;
        let found = lock(&shared.found).remove(&id);
        let old = lock(&shared.accounts).id(name);
        if old == Some(id) {
            return;
        }
        if let Some(old) = old {
            let usage = shared.usage(old);
            lock(&shared.accounts).credit(name, old, usage);
        }
        // What the id counted for another Service is not this one's.
        if !found && let Some(counts) = shared.counts.get() {
            shared.check(counts.reset_usage(id));
        }
        lock(&shared.accounts).assign(name, id);
    }

    /// The Service or Pod is not in the maps any more.
    pub fn forget_service(&self, name: &Owner) {
        if let Some(service) = name.service() {
            self.0.work.forget_policies(service);
        }
        let shared = &self.0.shared;
        let id = lock(&shared.accounts).id(name);
        if let Some(id) = id {
            let usage = shared.usage(id);
            let mut accounts = lock(&shared.accounts);
            accounts.credit(name, id, usage);
            accounts.close(name);
        }
    }

    /// So much is in the maps; `complete`: everything that should be.
    pub fn note_settled(&self, size: Size, complete: bool) {
        *lock(&self.0.shared.size) = size;
        if complete {
            // What was found and is nobody's has been removed.
            lock(&self.0.shared.found).clear();
            self.0.work.note_settled();
        }
    }

    /// All metrics, as text.
    pub fn render(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.0.registry)?;
        Ok(text)
    }
}

impl Shared {
    fn usage(&self, id: u32) -> lb_common::abi::Usage {
        let usage = self.counts.get().and_then(|counts| self.check(counts.usage(id)));
        usage.unwrap_or_default()
    }

    fn check<T, E: fmt::Display>(&self, result: Result<T, E>) -> Option<T> {
        result
            .inspect_err(|error| {
                tracing::debug!(%error, "metrics");
                self.errors.inc();
            })
            .ok()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every state of what is in them is a valid one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers `GET /metrics` on `addr` for as long as the runtime lives.
pub async fn serve(addr: SocketAddr, metrics: Metrics) -> io::Result<SocketAddr> {
    health::listen(addr, Router::new().route("/metrics", get(answer)).with_state(metrics)).await
}

async fn answer(State(metrics): State<Metrics>) -> Response {
    let inner = Arc::clone(&metrics.0);
    let _turn = inner.turn.lock().await;
    // Thousands of system calls on a large node.
    match tokio::task::spawn_blocking(move || metrics.render()).await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Ok(Err(_)) | Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

#[cfg(test)]
mod tests;
