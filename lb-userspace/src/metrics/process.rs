//! What every Prometheus client tells of its process, with the usual names.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

#[derive(Debug)]
struct Process {
    started: f64,
}

pub(super) fn register(registry: &mut Registry) {
    registry.register_collector(Box::new(Process { started: unix_seconds() }));
}

/// Seconds since 1970.
pub(super) fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let mut gauge = |name, help, value: f64| {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
        };
        gauge("process_start_time_seconds", "When the process started, seconds since 1970.", self.started)?;
        if let Some(bytes) = resident_bytes() {
            gauge("process_resident_memory_bytes", "Resident memory of the process.", bytes)?;
        }
        if let Ok(files) = fs::read_dir("/proc/self/fd") {
            let count = u32::try_from(files.count()).unwrap_or(u32::MAX);
            gauge("process_open_fds", "Open file descriptors.", count.into())?;
        }
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let counter = ConstCounter::new(seconds(usage.user_time()) + seconds(usage.system_time()));
            let (name, help) = ("process_cpu_seconds", "CPU time spent, user and system.");
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        Ok(())
    }
}

#[expect(clippy::cast_precision_loss, reason = "a node is not up for 2^52 seconds")]
fn seconds(time: TimeVal) -> f64 {
    time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6
}

fn resident_bytes() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u32 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(f64::from(kibibytes) * 1024.0)
}
