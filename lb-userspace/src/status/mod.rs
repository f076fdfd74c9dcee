//! How the datapath of a node is, and its agent: `fairlead status`. The maps, links and programs are looked at; what only
//! an agent knows comes from the last report of one ([`crate::report`]).
//!
//! The names of all fields are part of the public interface (`-o json`).

mod warnings;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use lb_common::maps::programs;
use lb_common::reason::Reason;
use serde::Serialize;

pub use self::warnings::Warning;
use crate::datapath::{self, Features, Place, SOCKET_PROGRAMS, XdpKind};
use crate::edges::{Rules, survey};
use crate::inspect::{
    CounterView, EdgeView, InspectError, Inspector, LinkView, MapView, ProgramView, monotonic_nanoseconds,
};
use crate::report::{self, DropsReport, FindingReport, Report, SourceReport};
use crate::sys::kernel;
use crate::trace::meaning;

/// `fairlead status`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Status {
    /// Of this command.
    pub version: &'static str,
    /// As `uname -r` has it; `null`: it cannot be read.
    pub kernel: Option<String>,
    pub bpffs: String,
    pub layout_version: u32,
    /// Process id of the running agent; `null`: none runs.
    pub agent_pid: Option<u32>,
    /// What the last agent has said of itself, also if it is gone; `null`: nothing.
    pub agent: Option<AgentStatus>,
    /// Where Services come from, as the last agent has said.
    pub source: Option<SourceReport>,
    pub features: FeatureStatus,
    /// The external edges.
    pub edges: Vec<EdgeStatus>,
    /// Devices with the programs of pod edges.
    pub pod_devices: usize,
    pub links: Vec<LinkView>,
    /// Programs that should be on a hook, and are not.
    pub missing: Vec<MissingView>,
    pub programs: Vec<ProgramView>,
    /// Entries against limits.
    pub maps: Vec<MapView>,
    pub drops: DropsStatus,
    /// What keeps Services from working as written: how many of these the last agent has found.
    pub findings_total: usize,
    /// The first hundred of them.
    pub findings: Vec<FindingReport>,
    /// What somebody should do something about.
    pub warnings: Vec<Warning>,
    pub counters: Vec<CounterView>,
}

/// What an agent has said of itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct AgentStatus {
    pub pid: u32,
    /// An agent runs: this one, unless one that came after it has not reported yet.
    pub runs: bool,
    pub version: String,
    /// Its kernel programs are those that this command has, too.
    pub same_programs: bool,
    pub node: String,
    /// RFC 3339.
    pub started: String,
    /// When it last said so, RFC 3339.
    pub reported: String,
    pub reported_seconds_ago: u64,
    /// Everything has been in the maps once.
    pub synced: bool,
}

/// What the kernel has, and what of it is used.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts about the kernel")]
pub struct FeatureStatus {
    pub btf: bool,
    /// The programs are native code.
    pub jit: bool,
    #[serde(flatten)]
    pub kernel: Features,
    /// XDP runs in the driver of an edge.
    pub xdp_native: bool,
    /// XDP runs in the stack, at an edge.
    pub xdp_generic: bool,
    /// Socket programs are on a cgroup.
    pub cgroup_links: bool,
}

/// An external edge and the programs on its hooks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct EdgeStatus {
    #[serde(flatten)]
    pub edge: EdgeView,
    /// How XDP runs there; `null`: it does not.
    pub xdp: Option<XdpKind>,
    /// `tcx` or `clsact`; `null`: no tc program is there.
    pub tc: Option<&'static str>,
    /// Why XDP does not run there, or what failed, as the last agent has said.
    pub note: Option<String>,
}

/// A program that should be on a hook.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct MissingView {
    pub program: &'static str,
    /// `null`: the cgroup.
    pub device: Option<String>,
}

/// What was dropped or rejected lately.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct DropsStatus {
    /// The time that was looked at, seconds.
    pub seconds: f64,
    /// `agent`: it keeps count; `sample`: nobody did, and the counters were read twice.
    pub from: &'static str,
    pub reasons: Vec<DropView>,
}

/// Packets, and calls of sockets, that were dropped or rejected for one reason.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct DropView {
    pub reason: String,
    pub packets: u64,
    /// What it means, and what to do.
    pub meaning: &'static str,
}

/// Looks at everything. If no agent keeps count of drops, that takes `interval`.
pub async fn look(bpffs: &Path, interval: Duration) -> Result<Status, InspectError> {
    let inspector = Inspector::open(bpffs)?;
    let told = report::read(bpffs);
    let drops = drops(&inspector, told.as_ref(), interval).await?;
    let links = inspector.links()?;
    let programs = inspector.programs()?;
    let hooks = Hooks::look(&links).await;
    let edges = inspector.edges()?;
    let missing = missing(&hooks, &edges);
    let edges = edges.into_iter().map(|edge| edge_status(edge, &hooks, told.as_ref())).collect::<Vec<_>>();
    let has_xdp = |kind| edges.iter().any(|edge: &EdgeStatus| edge.xdp == Some(kind));
    let features = FeatureStatus {
        btf: Path::new(datapath::KERNEL_BTF).exists(),
        jit: programs.iter().all(|program| program.jited_bytes > 0),
        kernel: Features::probe(),
        xdp_native: has_xdp(XdpKind::Native),
        xdp_generic: has_xdp(XdpKind::Generic),
        cgroup_links: links.iter().any(|link| link.kind == "cgroup" && link.alive),
    };
    let agent_pid = agent_pid(bpffs);
    let mut status = Status {
        version: env!("CARGO_PKG_VERSION"),
        kernel: kernel::release_text(),
        bpffs: bpffs.display().to_string(),
        layout_version: inspector.layout_version(),
        agent_pid,
        agent: told.as_ref().map(|told| agent_status(told, agent_pid)),
        source: told.as_ref().map(|told| told.source.clone()),
        features,
        edges,
        pod_devices: hooks.pods().len(),
        links,
        missing,
        programs,
        maps: [inspector.fill()?, inspector.fill_of_arrays()?].concat(),
        drops,
        findings_total: told.as_ref().map_or(0, |told| told.findings_total),
        findings: told.map(|told| told.findings).unwrap_or_default(),
        warnings: vec![],
        counters: inspector.counters()?,
    };
    status.warnings = warnings::of(&status, &datapath::node::forwarding_warnings());
    Ok(status)
}

fn agent_status(told: &Report, running: Option<u32>) -> AgentStatus {
    AgentStatus {
        pid: told.pid,
        // In a container its own number is another than the one that the kernel tells here.
        runs: running.is_some(),
        version: told.version.clone(),
        same_programs: told.programs == datapath::object_checksum(),
        node: told.node.clone(),
        started: told.started.clone(),
        reported: told.written.clone(),
        reported_seconds_ago: told.age(monotonic_nanoseconds()).as_secs(),
        synced: told.synced,
    }
}

async fn drops(
    inspector: &Inspector,
    told: Option<&Report>,
    interval: Duration,
) -> Result<DropsStatus, InspectError> {
    let now = DropsReport::now(&inspector.counters()?);
    if let Some(before) = told.and_then(|told| told.drops_before(now.at)) {
        return Ok(drops_status("agent", before, &now));
    }
    tokio::time::sleep(interval).await;
    Ok(drops_status("sample", &now, &DropsReport::now(&inspector.counters()?)))
}

fn drops_status(from: &'static str, before: &DropsReport, now: &DropsReport) -> DropsStatus {
    let reason = |name: &str| Reason::ALL.into_iter().find(|reason| reason.name() == name);
    let mut reasons: Vec<DropView> = now
        .since(before)
        .into_iter()
        .map(|(name, packets)| DropView { meaning: reason(&name).map_or("", meaning), reason: name, packets })
        .collect();
    reasons.sort_by_key(|drop| std::cmp::Reverse(drop.packets));
    let nanoseconds = Duration::from_nanos(now.at.saturating_sub(before.at));
    let seconds = (nanoseconds.as_secs_f64() * 10.0).round() / 10.0;
    DropsStatus { seconds, from, reasons }
}

/// Which programs are where.
#[derive(Debug, Default)]
struct Hooks {
    /// By links, of those that are alive, and by filters.
    on_devices: BTreeMap<(u32, &'static str), &'static str>,
    on_cgroup: BTreeSet<String>,
    /// How XDP programs run, whosever they are.
    xdp: BTreeMap<u32, XdpKind>,
}

impl Hooks {
    async fn look(links: &[LinkView]) -> Self {
        let mut hooks = Self::default();
        for link in links.iter().filter(|link| link.alive) {
            let place = Place::of_program(&link.program);
            match (link.ifindex, place) {
                (Some(ifindex), Some(place)) => {
                    hooks.on_devices.insert((ifindex, place.program()), link.kind);
                }
                _ => {
                    hooks.on_cgroup.insert(link.program.clone());
                }
            }
        }
        // Without netlink there are the links.
        for (place, ifindex) in datapath::filters().await.unwrap_or_default() {
            hooks.on_devices.entry((ifindex, place.program())).or_insert("clsact");
        }
        if let Ok(rules) = Rules::new(&[], &[]) {
            let devices = survey(&rules).await.unwrap_or_default();
            let xdp = devices.iter().filter_map(|it| Some((it.device.ifindex, it.device.xdp?.kind)));
            hooks.xdp = xdp.collect();
        }
        hooks
    }

    fn has(&self, ifindex: u32, program: &'static str) -> bool {
        self.on_devices.contains_key(&(ifindex, program))
    }

    /// Devices with a program of pod edges.
    fn pods(&self) -> BTreeSet<u32> {
        let of_pods = [programs::TC_POD_IN, programs::TC_POD_OUT];
        let pods = self.on_devices.keys().filter(|(_, program)| of_pods.contains(program));
        pods.map(|(ifindex, _)| *ifindex).collect()
    }
}

fn edge_status(edge: EdgeView, hooks: &Hooks, told: Option<&Report>) -> EdgeStatus {
    let tc = [programs::TC_NIC_IN, programs::TC_NIC_OUT];
    let tc = tc.into_iter().find_map(|program| hooks.on_devices.get(&(edge.ifindex, program)).copied());
    let is_ours = hooks.has(edge.ifindex, programs::XDP_NIC);
    let known = told.into_iter().flat_map(|told| &told.edges).find(|known| known.device == edge.device);
    EdgeStatus {
        xdp: hooks.xdp.get(&edge.ifindex).copied().filter(|_| is_ours),
        tc,
        note: known.and_then(|known| known.note.clone()),
        edge,
    }
}

/// What an edge has not that it should have.
fn missing(hooks: &Hooks, edges: &[EdgeView]) -> Vec<MissingView> {
    let mut missing = BTreeSet::new();
    let mut want = |ifindex: u32, program: &'static str| {
        if !hooks.has(ifindex, program) && datapath::device_exists(ifindex) {
            missing.insert(MissingView { program, device: Some(datapath::device_name(ifindex)) });
        }
    };
    for edge in edges {
        want(edge.ifindex, programs::TC_NIC_IN);
        want(edge.ifindex, programs::TC_NIC_OUT);
        if edge.xdp_first {
            want(edge.ifindex, programs::XDP_NIC);
        }
    }
    for ifindex in hooks.pods() {
        want(ifindex, programs::TC_POD_IN);
        want(ifindex, programs::TC_POD_OUT);
    }
    // None of them is `--socket-lb=off`.
    if !hooks.on_cgroup.is_empty() {
        for (program, _) in SOCKET_PROGRAMS {
            if !hooks.on_cgroup.contains(program) {
                missing.insert(MissingView { program, device: None });
            }
        }
    }
    missing.into_iter().collect()
}

/// Who holds the lock on the pin directory, as the kernel lists locks: asking by locking would turn away an
/// agent that starts in this moment.
pub fn agent_pid(bpffs: &Path) -> Option<u32> {
    let inode = fs::metadata(bpffs).ok()?.ino();
    lock_holder(&fs::read_to_string("/proc/locks").ok()?, inode)
}

fn lock_holder(locks: &str, inode: u64) -> Option<u32> {
    locks.lines().find_map(|line| {
        // `1: FLOCK  ADVISORY  WRITE 2035 00:1c:25 0 EOF`; waiting ones have `->` after the number.
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, "FLOCK", _, "WRITE", pid, file, ..] = words[..] else { return None };
        let of_file = file.rsplit(':').next()?.parse::<u64>().ok()?;
        (of_file == inode).then(|| pid.parse().ok()).flatten()
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A node on which all is well.
    pub(crate) fn well() -> Status {
        let edge = EdgeView {
            ifindex: 2,
            device: "eth0".into(),
            source4: "192.0.2.1".parse().unwrap(),
            source6: "::".parse().unwrap(),
            more_sources4: 1,
            more_sources6: 0,
            xdp_transmit: true,
            xdp_first: true,
        };
        let link = |program: &str, kind, device: Option<&str>| LinkView {
            program: program.into(),
            kind,
            device: device.map(str::to_owned),
            ifindex: device.map(|_| 2),
            alive: true,
            program_id: 7,
        };
        Status {
            version: "0.1.0",
            kernel: Some("6.18.0".into()),
            bpffs: "/sys/fs/bpf/fairlead".into(),
            layout_version: 1,
            agent_pid: Some(17),
            agent: Some(AgentStatus {
                pid: 17,
                runs: true,
                version: "0.1.0".into(),
                same_programs: true,
                node: "node-a".into(),
                started: "2026-01-01T00:00:00Z".into(),
                reported: "2026-01-01T01:00:00Z".into(),
                reported_seconds_ago: 4,
                synced: true,
            }),
            source: Some(SourceReport {
                kind: "manifests".into(),
                at: Some("/etc/services".into()),
                complete: true,
                freshness: "current".into(),
                stale_since: None,
                last_change: Some("2026-01-01T00:30:00Z".into()),
            }),
            features: FeatureStatus {
                btf: true,
                jit: true,
                kernel: Features {
                    set_retval: true,
                    coarse_clock: true,
                    csum_ipv6: false,
                    checks_mtu: true,
                    tcx: true,
                    kernel_sweep: true,
                },
                xdp_native: true,
                xdp_generic: false,
                cgroup_links: true,
            },
            edges: vec![EdgeStatus { edge, xdp: Some(XdpKind::Native), tc: Some("tcx"), note: None }],
            pod_devices: 2,
            links: vec![link("tc_nic_in", "tcx", Some("eth0")), link("sock_connect4", "cgroup", None)],
            missing: vec![],
            programs: vec![],
            maps: vec![MapView { map: "SERVICES4", entries: 10, max_entries: 100 }],
            drops: DropsStatus { seconds: 60.2, from: "agent", reasons: vec![] },
            findings_total: 0,
            findings: vec![],
            warnings: vec![],
            counters: vec![CounterView {
                hook: "xdp",
                reason: "not_ours",
                action: "pass",
                packets: 5,
                bytes: 300,
            }],
        }
    }

    #[test]
    fn the_holder_of_a_lock_is_found() {
        let locks = "1: POSIX  ADVISORY  WRITE 17 00:1c:25 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 2035 00:1c:25 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 2036 00:1c:26 0 EOF\n";
        assert_eq!(lock_holder(locks, 25), Some(2035));
        assert_eq!(lock_holder(locks, 26), None);
        assert_eq!(lock_holder(locks, 5), None);
    }

    #[test]
    fn what_is_not_on_its_hook_is_missing() {
        let well = well();
        // The loopback device exists everywhere.
        let edge = EdgeView { ifindex: 1, ..well.edges[0].edge.clone() };
        let mut hooks = Hooks::default();
        hooks.on_devices.insert((1, programs::TC_NIC_IN), "tcx");
        hooks.on_devices.insert((1, programs::TC_POD_IN), "tcx");
        hooks.on_cgroup.extend(SOCKET_PROGRAMS.iter().skip(1).map(|(name, _)| (*name).to_owned()));
        let missing = missing(&hooks, std::slice::from_ref(&edge));
        let found: Vec<_> = missing.iter().map(|it| (it.program, it.device.as_deref())).collect();
        let expected = [
            (SOCKET_PROGRAMS[0].0, None),
            ("tc_nic_out", Some("lo")),
            ("tc_pod_out", Some("lo")),
            ("xdp_nic", Some("lo")),
        ];
        assert_eq!(found, expected);
        let gone = EdgeView { ifindex: u32::MAX, ..edge };
        assert_eq!(super::missing(&Hooks::default(), &[gone]), []);
    }

    #[test]
    fn drops_have_a_meaning_and_the_most_come_first() {
        let counted = |at, packets: &[(&str, u64)]| DropsReport {
            at,
            packets: packets.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect(),
        };
        let before = counted(0, &[("no_route", 5)]);
        let now = counted(1_520_000_000, &[("no_endpoints", 2), ("no_route", 9)]);
        let drops = drops_status("sample", &before, &now);
        assert_eq!((drops.seconds, drops.from), (1.5, "sample"));
        let told: Vec<_> = drops.reasons.iter().map(|it| (it.reason.as_str(), it.packets)).collect();
        assert_eq!(told, [("no_route", 4), ("no_endpoints", 2)]);
        assert!(drops.reasons.iter().all(|drop| !drop.meaning.is_empty()));
    }
}
