//! What an agent says of itself for `fairlead status`, which may ask when it is gone: `/run/fairlead/NAME.report`, written
//! every few seconds and replaced as a whole. Nothing depends on it, and the kernel forgets it with the reboot.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use lb_common::reason::{Action, Reason};
use serde::{Deserialize, Serialize};

use crate::datapath::XdpKind;
use crate::datapath::node::StateFile;
use crate::edges::{EdgeView, View};
use crate::finding::Finding;
use crate::health::Freshness;
use crate::inspect::{CounterView, Inspector, monotonic_nanoseconds};
use crate::owner::Owner;

/// Between two reports.
pub const PERIOD: Duration = Duration::from_secs(10);
/// How far back counts of drops go.
pub const HISTORY: Duration = Duration::from_mins(1);
/// Findings that are named; all are counted.
const NAMED: usize = 100;
/// A report is not larger.
const LIMIT: u64 = 1 << 20;

/// What an agent says of itself. What an older or newer one does not say has its default.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// When it was written, RFC 3339.
    pub written: String,
    /// The same by the clock of the kernel programs, ns.
    pub written_monotonic: u64,
    /// When the agent was started, RFC 3339.
    pub started: String,
    pub pid: u32,
    pub version: String,
    /// CRC-32 of the object that has its kernel programs.
    pub programs: u32,
    pub node: String,
    pub source: SourceReport,
    /// Everything has been in the maps once.
    pub synced: bool,
    /// External edges, and pod devices that have a note.
    pub edges: Vec<EdgeReport>,
    pub pod_devices: usize,
    /// How many findings there are.
    pub findings_total: usize,
    /// The first of them.
    pub findings: Vec<FindingReport>,
    /// Drops and rejects since the maps were made, the oldest first.
    pub drops: VecDeque<DropsReport>,
}

/// Where Services come from.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SourceReport {
    /// `kubernetes` or `manifests`.
    pub kind: String,
    /// The directory, or the address of the API server, if it is known.
    pub at: Option<String>,
    /// It has told everything.
    pub complete: bool,
    /// `current`; `unanswered`: it told everything, and does not answer since `stale_since`; `kept`: what an earlier agent
    /// kept then is served.
    pub freshness: String,
    /// RFC 3339.
    pub stale_since: Option<String>,
    /// When it last told anything new, RFC 3339.
    pub last_change: Option<String>,
}

/// An edge and how it is served.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct EdgeReport {
    pub device: String,
    /// `external` or `pod`.
    pub role: String,
    /// Why XDP does not run here, or what failed.
    pub note: Option<String>,
    /// `native` or `generic`.
    pub xdp: Option<String>,
}

impl From<&EdgeView> for EdgeReport {
    fn from(view: &EdgeView) -> Self {
        let xdp = view.xdp.map(|kind| match kind {
            XdpKind::Native => "native".into(),
            XdpKind::Generic => "generic".into(),
        });
        Self { device: view.device.clone(), role: view.role.into(), note: view.note.clone(), xdp }
    }
}

/// Something that is wrong with a Service or Pod.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct FindingReport {
    /// `Service` or `Pod`.
    pub owner: String,
    pub namespace: String,
    pub name: String,
    /// As in events.
    pub kind: String,
    pub text: String,
}

impl FindingReport {
    fn new(owner: &Owner, finding: &Finding) -> Self {
        let (kind, namespace, name) = match owner {
            Owner::Service(name) => ("Service", &name.namespace, &name.name),
            Owner::Pod(name) => ("Pod", &name.namespace, &name.name),
        };
        Self {
            owner: kind.into(),
            namespace: namespace.to_string(),
            name: name.to_string(),
            kind: finding.kind(),
            text: finding.to_string(),
        }
    }
}

/// Packets, and calls of sockets, that were dropped or rejected until then.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DropsReport {
    /// By the clock of the kernel programs, ns.
    pub at: u64,
    /// By reason; those that were never seen are left out.
    pub packets: BTreeMap<String, u64>,
}

impl DropsReport {
    /// What the counters say now.
    pub fn now(counters: &[CounterView]) -> Self {
        let drops = Reason::ALL.into_iter().filter(|r| matches!(r.action(), Action::Drop | Action::Reject));
        let sum = |reason: Reason| {
            let same = counters.iter().filter(|counter| counter.reason == reason.name());
            same.fold(0_u64, |sum, counter| sum.wrapping_add(counter.packets))
        };
        let packets = drops.map(|reason| (reason.name().to_owned(), sum(reason))).filter(|(_, n)| *n > 0);
        Self { at: monotonic_nanoseconds(), packets: packets.collect() }
    }

    /// What came since an earlier count. Where there is less now than then, the maps are new.
    pub fn since(&self, earlier: &Self) -> BTreeMap<String, u64> {
        let before = |reason: &String| earlier.packets.get(reason).copied().unwrap_or_default();
        let news = self.packets.iter().map(|(reason, packets)| {
            (reason.clone(), packets.checked_sub(before(reason)).unwrap_or(*packets))
        });
        news.filter(|(_, packets)| *packets > 0).collect()
    }
}

impl Report {
    /// The oldest count of drops that `now` is about a minute after; `None`: nobody has counted lately.
    pub fn drops_before(&self, now: u64) -> Option<&DropsReport> {
        let age = |drops: &DropsReport| now.saturating_sub(drops.at);
        let newest = self.drops.back().map(age)?;
        if newest > nanoseconds(2 * PERIOD) {
            return None;
        }
        self.drops.iter().find(|drops| age(drops) <= nanoseconds(HISTORY + PERIOD))
    }

    /// Time since it was written.
    pub fn age(&self, now: u64) -> Duration {
        Duration::from_nanos(now.saturating_sub(self.written_monotonic))
    }

    fn note_drops(&mut self, drops: DropsReport) {
        let oldest = drops.at.saturating_sub(nanoseconds(HISTORY + PERIOD / 2));
        self.drops.retain(|known| known.at >= oldest);
        self.drops.push_back(drops);
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Where the agent with this `--bpffs` reports.
pub fn path(bpffs: &Path) -> PathBuf {
    StateFile::new(bpffs).path().with_extension("report")
}

/// What the last agent has said; `None`: nothing, or nothing of use.
pub fn read(bpffs: &Path) -> Option<Report> {
    let path = path(bpffs);
    fs::metadata(&path).ok().filter(|meta| meta.is_file() && meta.len() <= LIMIT)?;
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Removes it; fine if it is not there.
pub fn remove(bpffs: &Path) -> io::Result<()> {
    match fs::remove_file(path(bpffs)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What an agent knows of itself when it reports.
pub struct Facts<'a> {
    pub findings: Box<dyn Iterator<Item = (&'a Owner, &'a Finding)> + 'a>,
    pub view: Option<&'a View>,
    pub freshness: Freshness,
    pub synced: bool,
    pub complete: bool,
}

/// Writes the report of a running agent.
pub struct Reporter {
    path: PathBuf,
    inspector: Inspector,
    report: Report,
    revision: u64,
    next: Instant,
    /// The last write failed, and that was said.
    failing: bool,
}

impl Reporter {
    /// `source`: its kind, and where it is.
    pub fn new(bpffs: &Path, inspector: Inspector, node: &str, source: (&str, Option<String>)) -> Self {
        let report = Report {
            started: now(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            programs: crate::datapath::object_checksum(),
            node: node.into(),
            source: SourceReport { kind: source.0.into(), at: source.1, ..SourceReport::default() },
            // What an agent before it has counted stays of use.
            drops: read(bpffs).map(|report| report.drops).unwrap_or_default(),
            ..Report::default()
        };
        Self { path: path(bpffs), inspector, report, revision: 0, next: Instant::now(), failing: false }
    }

    /// The model has this number now.
    pub fn note_revision(&mut self, revision: u64) {
        if std::mem::replace(&mut self.revision, revision) != revision {
            self.report.source.last_change = Some(now());
        }
    }

    /// When [`Reporter::write`] should be called.
    pub fn next_wake(&self) -> Instant {
        self.next
    }

    /// Writes it, if it is time, or the agent is as far as it was not before.
    pub fn write(&mut self, facts: Facts<'_>, at: Instant) {
        let before = (self.report.synced, self.report.source.complete);
        if at < self.next && (facts.synced, facts.complete) == before {
            return;
        }
        self.next = at + PERIOD;
        match self.inspector.counters() {
            Ok(counters) => self.report.note_drops(DropsReport::now(&counters)),
            Err(error) => tracing::debug!(%error, "the counters cannot be read"),
        }
        self.fill(facts);
        let written = replace(&self.path, &self.report);
        let is_failing = written.is_err();
        if let Err(error) = written
            && !self.failing
        {
            let path = self.path.display();
            tracing::warn!(%path, "what `fairlead status` shows of the agent cannot be written: {error}");
        }
        self.failing = is_failing;
    }

    fn fill(&mut self, facts: Facts<'_>) {
        let report = &mut self.report;
        report.written = now();
        report.written_monotonic = monotonic_nanoseconds();
        report.synced = facts.synced;
        report.source.complete = facts.complete;
        let (freshness, since) = match facts.freshness {
            Freshness::Current => ("current", None),
            Freshness::Unanswered(since) => ("unanswered", Some(since)),
            Freshness::Kept(since) => ("kept", Some(since)),
        };
        report.source.freshness = freshness.into();
        report.source.stale_since = since.map(|since| since.to_string());
        let edges = facts.view.map(|view| view.edges.as_slice()).unwrap_or_default();
        let (pods, external): (Vec<&EdgeView>, Vec<_>) = edges.iter().partition(|edge| edge.role == "pod");
        report.pod_devices = pods.len();
        let noted = pods.into_iter().filter(|edge| edge.note.is_some()).take(NAMED);
        report.edges = external.into_iter().chain(noted).map(EdgeReport::from).collect();
        report.findings.clear();
        report.findings_total = 0;
        for (owner, finding) in facts.findings {
            report.findings_total += 1;
            if report.findings.len() < NAMED {
                report.findings.push(FindingReport::new(owner, finding));
            }
        }
    }
}

/// To the second.
fn now() -> String {
    Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default().to_string()
}

fn replace(path: &Path, report: &Report) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let new = path.with_extension("report-new");
    fs::write(&new, serde_json::to_vec(report)?)?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(at: u64, packets: &[(&str, u64)]) -> DropsReport {
        let packets = packets.iter().map(|(reason, n)| ((*reason).to_owned(), *n)).collect();
        DropsReport { at: at * 1_000_000_000, packets }
    }

    #[test]
    fn drops_of_the_last_minute_are_what_came_since_the_oldest_count() {
        let mut report = Report::default();
        for at in (0..200).step_by(10) {
            report.note_drops(counted(at, &[("no_route", at)]));
        }
        assert!(report.drops.len() <= 8, "{}", report.drops.len());
        let now = counted(195, &[("no_route", 195), ("no_endpoints", 3)]);
        let before = report.drops_before(now.at).unwrap();
        assert_eq!(before.at, 130_000_000_000);
        let news = now.since(before);
        assert_eq!(news, [("no_endpoints".to_owned(), 3), ("no_route".to_owned(), 65)].into());
        // The agent is gone: nobody has counted since.
        assert_eq!(report.drops_before(counted(211, &[]).at), None);
        // New maps count from nothing.
        assert_eq!(counted(9, &[("no_route", 4)]).since(before), [("no_route".to_owned(), 4)].into());
    }

    #[test]
    fn what_drops_and_rejects_is_counted_and_nothing_else() {
        let counter = |reason, packets| CounterView { hook: "xdp", reason, action: "", packets, bytes: 0 };
        let counters = [counter("no_route", 2), counter("translated", 9), counter("no_endpoints", 1)];
        let packets = DropsReport::now(&counters).packets;
        assert_eq!(packets, [("no_endpoints".to_owned(), 1), ("no_route".to_owned(), 2)].into());
    }

    #[test]
    fn a_report_of_another_version_is_read_as_far_as_it_goes() {
        let report: Report = serde_json::from_str(r#"{"pid": 7, "of_tomorrow": 1}"#).unwrap();
        assert_eq!((report.pid, report.version.as_str(), report.findings.len()), (7, "", 0));
    }

    #[test]
    fn reports_are_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/x.report");
        for pid in [1, 2] {
            replace(&path, &Report { pid, ..Report::default() }).unwrap();
        }
        let read: Report = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(read.pid, 2);
        assert_eq!(fs::read_dir(dir.path().join("sub")).unwrap().count(), 1);
    }
}
