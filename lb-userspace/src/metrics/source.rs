//! Whether what is served is what the source says now, and what is kept of it.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The metrics of the source and the state file.
#[derive(Debug, Default)]
pub(super) struct Source {
    pub stale: Gauge,
    pub written: Gauge<f64, AtomicU64>,
    pub write_errors: Counter,
    pub held: Gauge,
}

impl Source {
    pub fn register(registry: &mut Registry) -> Self {
        let source = Self::default();
        // Nothing has been listed yet.
        source.stale.set(1);
        registry.register(
            "fairlead_source_stale",
            "1: the source does not answer or has not told everything, and what is served may be out of date",
            source.stale.clone(),
        );
        registry.register(
            "fairlead_state_last_write_timestamp_seconds",
            "When the state file was written",
            source.written.clone(),
        );
        registry.register(
            "fairlead_state_write_errors",
            "Times that the state file could not be written",
            source.write_errors.clone(),
        );
        registry.register(
            "fairlead_apiserver_frontend_held",
            "1: the frontend that the agent reaches the API server by has lost its endpoints, and keeps the last ones",
            source.held.clone(),
        );
        source
    }
}
