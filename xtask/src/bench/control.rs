//! Group `control`: the agent with many Services, from manifests and from an API server.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use super::results::Series;
use super::server::{self, Running};
use super::{Programs, Scale};
use crate::lab::{Agent, AgentOptions, Lab, Manifests, Xdp, counters};
use crate::process;

const ENDPOINTS: u32 = 10;
const PORT: u16 = 80;
/// Services of one file; the first few have one each, and are changed.
const PER_FILE: u32 = 500;
/// The version that Services are left in after many changes; 0 and 1 take turns before.
const LAST: u32 = 2;
/// Services that are changed.
const CHANGED: u32 = 50;
/// Endpoints of the Service that is rolled over, and how many go at a time.
const ROLLED: u32 = 1000;
const ROLL: u32 = 10;
/// Ticks of `/proc/PID/stat` in a second (`USER_HZ`).
const TICKS: f64 = 100.0;

/// The group.
pub fn run(scale: Scale, programs: &Programs) -> Result<Vec<Series>> {
    let (sizes, starts, changes): (&[u32], _, _) = match scale {
        Scale::Full => (&[1_000, 10_000, 50_000], 5, 500),
        Scale::Quick => (&[1_000, 10_000], 3, 200),
        Scale::Smoke => (&[60], 2, 10),
    };
    let mut all = Vec::new();
    let sites = sizes.iter().flat_map(|services| Source::ALL.map(|source| (*services, source)));
    for (services, source) in sites {
        let mut site = Site::new(services, source, programs)?;
        let measured = site.measure(starts, changes)?;
        all.extend(measured.into_iter().map(|((what, unit), samples)| {
            Series {
                group: "control".to_owned(),
                what: what.to_owned(),
                variant: "fairlead".to_owned(),
                unit: unit.to_owned(),
                axes: [("services", services.to_string()), ("source", source.name().to_owned())]
                    .map(|(axis, value)| (axis.to_owned(), value))
                    .into(),
                samples,
            }
        }));
    }
    Ok(all)
}

/// Where the agent reads Services.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    Manifests,
    ApiServer,
}

impl Source {
    const ALL: [Self; 2] = [Self::Manifests, Self::ApiServer];

    const fn name(self) -> &'static str {
        match self {
            Self::Manifests => "manifests",
            Self::ApiServer => "API",
        }
    }
}

/// Samples by what they are of, and their unit.
type Samples = BTreeMap<(&'static str, &'static str), Vec<f64>>;

/// A node whose agent follows many Services, and the directory that they are in.
struct Site<'a> {
    programs: &'a Programs,
    services: u32,
    manifests: Manifests,
    options: AgentOptions,
    /// The API server, if there is one.
    _server: Option<Running>,
    // Last, as everything is in it.
    lab: Lab,
}

impl<'a> Site<'a> {
    fn new(services: u32, source: Source, programs: &'a Programs) -> Result<Self> {
        let lab = Lab::new(&programs.xtask)?;
        let manifests = Manifests::create(lab.dir().join("manifests"))?;
        manifests.apply_node(&lab.node_a)?;
        let changed = CHANGED.min(services);
        let versions = lab.dir().join("versions");
        fs::create_dir(&versions).context("cannot make a directory")?;
        for number in 0..changed {
            for version in 0..=LAST {
                let text = list(&service(number, ENDPOINTS, version));
                fs::write(versions.join(format!("{number}.{version}.json")), text)
                    .context("cannot write a manifest")?;
            }
            fs::copy(
                versions.join(format!("{number}.0.json")),
                file(&manifests, &format!("change-{number}")),
            )
            .context("cannot write a manifest")?;
        }
        let mut first = changed;
        while first < services {
            let next = services.min(first + PER_FILE);
            let items: Vec<_> = (first..next).map(|number| service(number, ENDPOINTS, 0)).collect();
            fs::write(file(&manifests, &format!("services-{first}")), list(&items.join(",")))
                .context("cannot write a manifest")?;
            first = next;
        }
        let backends = (services * (ENDPOINTS + 2) + 4 * ROLLED).max(262_144).to_string();
        let frontends = (services + 1024).max(65_536).to_string();
        let args = ["--max-backends", &backends, "--max-services", &frontends, "--socket-lb", "off"];
        let args = args.map(str::to_owned).to_vec();
        let mut options = AgentOptions { xdp: Xdp::Off, args, ..AgentOptions::default() };
        let mut server = None;
        if source == Source::ApiServer {
            server = Some(server::api(&programs.bench, &lab.node_a, manifests.dir())?);
            options.server = Some(server::API);
        }
        Ok(Self { programs, services, manifests, options, _server: server, lab })
    }

    fn measure(&mut self, starts: u32, changes: u32) -> Result<Samples> {
        let mut samples = Samples::new();
        let mut note = |what, unit, sample| samples.entry((what, unit)).or_default().push(sample);
        for _ in 0..starts {
            let (agent, cold) = self.start()?;
            note("cold start", "ms", cold);
            note("cold start, CPU", "ms", cpu(&agent)? * 1e3);
            note("memory of the agent, peak", "MiB", peak_memory(&agent)?);
            note("memory of the maps", "MiB", map_memory(&agent)?);
            agent.stop()?;
            let (agent, adopted) = self.start()?;
            note("start with full maps", "ms", adopted);
            agent.stop()?;
            let node = &self.lab.node_a;
            crate::lab::agent::fairlead(&self.programs.agent, &node.ns, &self.lab.pins(node), &["cleanup"])?;
            let state = Agent::state_file(&self.lab, node);
            if state.exists() {
                fs::remove_file(&state).with_context(|| format!("cannot remove {}", state.display()))?;
            }
        }
        let (agent, _) = self.start()?;
        let times = self.change(&agent, changes, 0)?;
        note("one endpoint changed, p99", "ms", percentile(&times, 99)?);
        for time in times {
            note("one endpoint changed", "ms", time);
        }
        let before = cpu(&agent)?;
        let begin = Instant::now();
        for time in self.change(&agent, 3 * changes, 1000)? {
            note("1,000 changes a second, last of them", "ms", time);
        }
        let share = (cpu(&agent)? - before) / begin.elapsed().as_secs_f64();
        note("1,000 changes a second, CPU", "%", share * 100.0);
        let before = cpu(&agent)?;
        for time in self.roll(&agent)? {
            note("1,000 endpoints rolled over, a step of 10", "ms", time);
        }
        note("1,000 endpoints rolled over, CPU", "ms", (cpu(&agent)? - before) * 1e3);
        note("memory of the agent after all changes, peak", "MiB", peak_memory(&agent)?);
        agent.stop()?;
        Ok(samples)
    }

    /// Starts the agent; how long it took to be ready, ms.
    fn start(&self) -> Result<(Agent, f64)> {
        let begin = Instant::now();
        let agent =
            Agent::start(&self.lab, &self.lab.node_a, &self.programs.agent, &self.manifests, &self.options)?;
        Ok((agent, begin.elapsed().as_secs_f64() * 1e3))
    }

    /// Changes one endpoint of one Service after the other; how long each took to be in the map, ms.
    fn change(&self, agent: &Agent, count: u32, rate: u32) -> Result<Vec<f64>> {
        let changed = CHANGED.min(self.services);
        // Whole turns, so that the files say the same afterwards as before.
        let count = count.div_ceil(2 * changed) * 2 * changed;
        self.watch(agent, cluster_ip(0), &self.lab.dir().join("versions"), "change", [changed, count, rate])
    }

    /// Replaces all endpoints of a large Service, some at a time; how long each step took, ms.
    fn roll(&self, agent: &Agent) -> Result<Vec<f64>> {
        let number = self.services;
        let versions = self.lab.dir().join("rolled");
        fs::create_dir_all(&versions).context("cannot make a directory")?;
        let mut times = Vec::new();
        for step in 0..=ROLLED / ROLL {
            // Services with numbers of their own would be none that is rolled over.
            let text = list(&large_service(number, step * ROLL));
            fs::write(versions.join("0.1.json"), text).context("cannot write a manifest")?;
            let took = self.watch(agent, cluster_ip(number), &versions, "rolled", [1, 1, 0])?;
            // The first makes it.
            times.extend(took.into_iter().filter(|_| step > 0));
        }
        Ok(times)
    }

    /// Has the files in `versions` take the place of those called `name`: of so many Services, so many times, so many a
    /// second.
    fn watch(
        &self,
        agent: &Agent,
        addr: Ipv4Addr,
        versions: &Path,
        name: &str,
        numbers: [u32; 3],
    ) -> Result<Vec<f64>> {
        let [services, count, rate] = numbers.map(|number| number.to_string());
        let mut command = Command::new(&self.programs.bench);
        command
            .arg("change")
            .arg(counters::find(agent.pins(), "SERVICES4")?)
            .args([addr.to_string(), PORT.to_string()])
            .arg(versions)
            .arg(self.manifests.dir())
            .args([name, &services, &count, "--rate", &rate]);
        if let Some(server) = self.options.server {
            command.arg("--server").arg(server.to_string());
        }
        let text = self.lab.node_a.ns.run(|| process::output(&mut command))??;
        text.lines().map(|line| line.parse().context("it prints numbers")).collect()
    }
}

fn cluster_ip(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 0, 1).to_bits() + number)
}

fn file(manifests: &Manifests, name: &str) -> PathBuf {
    manifests.dir().join(format!("{name}.json"))
}

fn list(items: &str) -> String {
    format!(r#"{{"apiVersion":"v1","kind":"List","items":[{items}]}}"#)
}

/// A Service and its slice. In another version the first endpoint is another one.
fn service(number: u32, endpoints: u32, version: u32) -> String {
    let first = Ipv4Addr::new(10, 128, 0, 0).to_bits() + number * endpoints;
    let other = Ipv4Addr::new(10, 120, 0, 0).to_bits() + number * LAST + version;
    let ips = (0..endpoints).map(|index| if index == 0 && version > 0 { other } else { first + index });
    objects(number, ips)
}

/// One with [`ROLLED`] endpoints, so many of which are others.
fn large_service(number: u32, others: u32) -> String {
    let first = Ipv4Addr::new(10, 112, 0, 0).to_bits() + others;
    objects(number, first..first + ROLLED)
}

fn objects(number: u32, ips: impl Iterator<Item = u32>) -> String {
    let ip = cluster_ip(number);
    let mut endpoints = String::new();
    for (index, addr) in ips.map(Ipv4Addr::from_bits).enumerate() {
        let comma = if index == 0 { "" } else { "," };
        let node = if index % 2 == 0 { "node-a" } else { "node-b" };
        // Writing to a String cannot fail.
        let _ = write!(
            endpoints,
            r#"{comma}{{"addresses":["{addr}"],"conditions":{{"ready":true,"serving":true,"terminating":false}},"nodeName":"{node}","targetRef":{{"kind":"Pod","name":"pod-{number}-{index}","namespace":"default"}}}}"#
        );
    }
    format!(
        r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"service-{number}","namespace":"default"}},"spec":{{"type":"ClusterIP","clusterIP":"{ip}","clusterIPs":["{ip}"],"ipFamilies":["IPv4"],"ipFamilyPolicy":"SingleStack","internalTrafficPolicy":"Cluster","sessionAffinity":"None","ports":[{{"name":"http","protocol":"TCP","port":{PORT},"targetPort":8080}}]}}}},{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"service-{number}-1","namespace":"default","labels":{{"kubernetes.io/service-name":"service-{number}"}}}},"addressType":"IPv4","endpoints":[{endpoints}],"ports":[{{"name":"http","protocol":"TCP","port":8080}}]}}"#
    )
}

/// CPU time that the agent has taken, seconds.
fn cpu(agent: &Agent) -> Result<f64> {
    let stat = of_process(agent, "stat")?;
    // The second field is the name in brackets.
    let (_, fields) = stat.rsplit_once(')').context("no name in /proc/PID/stat")?;
    let ticks = |field: usize| fields.split_whitespace().nth(field).and_then(|text| text.parse::<f64>().ok());
    Ok((ticks(11).context("no utime")? + ticks(12).context("no stime")?) / TICKS)
}

/// The most memory that the agent has had, MiB.
fn peak_memory(agent: &Agent) -> Result<f64> {
    let status = of_process(agent, "status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().context("VmHWM is a number")?;
    Ok(kib / 1024.0)
}

/// What the kernel says that the agent's maps take, MiB.
fn map_memory(agent: &Agent) -> Result<f64> {
    let pid = agent.pid().context("the agent has ended")?;
    let mut maps = BTreeMap::new();
    let dir = format!("/proc/{pid}/fdinfo");
    for entry in fs::read_dir(&dir).with_context(|| format!("cannot list {dir}"))? {
        // Some are closed meanwhile.
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        let field =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        if let (Some(id), Some(bytes)) = (field("map_id:"), field("memlock:")) {
            maps.insert(id, bytes);
        }
    }
    let bytes: u64 = maps.values().sum();
    if bytes == 0 {
        bail!("the agent has no maps");
    }
    Ok(f64::from(u32::try_from(bytes >> 10).context("too much memory")?) / 1024.0)
}

fn of_process(agent: &Agent, file: &str) -> Result<String> {
    let path = format!("/proc/{}/{file}", agent.pid().context("the agent has ended")?);
    fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
}

fn percentile(samples: &[f64], percent: usize) -> Result<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(index).copied().context("no samples")
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn manifests_are_json_and_versions_differ_in_one_endpoint() {
        let read = |version| serde_json::from_str::<Value>(&list(&service(3, ENDPOINTS, version))).unwrap();
        let addrs = |value: &Value| -> Vec<String> {
            let endpoints = value["items"][1]["endpoints"].as_array().unwrap();
            endpoints.iter().map(|endpoint| endpoint["addresses"][0].to_string()).collect()
        };
        let [one, other, last] = [0, 1, LAST].map(|version| addrs(&read(version)));
        assert_eq!((one.len(), read(0)["items"][0]["kind"].as_str()), (10, Some("Service")));
        for [a, b] in [[&one, &other], [&one, &last], [&other, &last]] {
            assert_eq!(a.iter().zip(b).filter(|(a, b)| a != b).count(), 1);
        }
    }

    #[test]
    fn a_percentile_is_a_sample() {
        let samples: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(percentile(&samples, 99).ok(), Some(198.0));
        assert_eq!(percentile(&[5.0], 99).ok(), Some(5.0));
        assert_eq!(percentile(&[], 99).ok(), None);
    }
}
