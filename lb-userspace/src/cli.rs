//! The command line.

mod bugreport;
mod completion;
mod drops;
mod examples;
mod flows;
mod man;
mod services;
mod status;
mod top;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use nix::sys::stat::{Mode, umask};

use crate::check::{self, State};
use crate::datapath::{self, DEFAULT_BPFFS};
use crate::edges::Rules;
use crate::entries::{FrontendKind, Protocol};
use crate::explain::load::{self, Source};
use crate::explain::node_ports::{self, NodePorts};
use crate::explain::{Subject, explain, programmed};
use crate::inspect::{InspectError, Inspector};
use crate::nodeports::NodePortAddresses;
use crate::settings::Settings;
use crate::{agent, kept, kube_proxy, logging, show, trace};

/// A Service load balancer for Kubernetes nodes, on eBPF.
#[derive(Parser)]
#[command(name = "fairlead", version, max_term_width = 100, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the agent of this node. SIGTERM stops it; the datapath goes on
    #[command(after_help = examples::RUN)]
    Run(Box<Run>),
    /// How the agent, its source and the hooks are, how full the maps are, what was dropped, and what to do about it
    #[command(after_help = status::EXAMPLES)]
    Status(status::Status),
    /// Frontends, and the backends that clients inside and outside of the cluster get
    #[command(after_help = services::SERVICES_EXAMPLES)]
    Services(services::Services),
    /// Backends, and the Services that may choose them
    #[command(after_help = services::BACKENDS_EXAMPLES)]
    Backends(services::Backends),
    /// Translated connections, both directions
    #[command(after_help = flows::EXAMPLES)]
    Flows(Box<flows::Flows>),
    /// What goes through Services now: packets, bytes, connections and drops per second
    #[command(after_help = top::EXAMPLES)]
    Top(top::Top),
    /// What did not get what it asked for: packets and sockets by reason and Service, and one by one as they come
    #[command(after_help = drops::EXAMPLES)]
    Drops(drops::Drops),
    /// Why a Service, or an address and port, answers or does not, and what to change
    #[command(after_help = EXPLAIN_EXAMPLES)]
    Explain(Box<Explain>),
    /// What becomes of a packet, hook by hook, and why: runs the loaded programs on one that nobody sends
    #[command(after_help = TRACE_EXAMPLES)]
    Trace(Trace),
    /// Looks at whether this node can run the agent, and who else is on its hooks; changes nothing
    #[command(after_help = examples::CHECK)]
    Check(Check),
    /// Removes every program, link, map and setting that the agent made on this node
    #[command(after_help = examples::CLEANUP)]
    Cleanup(Cleanup),
    /// Collects what a bug report needs in one archive, without secrets, with an agent or without
    #[command(after_help = bugreport::EXAMPLES)]
    Bugreport(bugreport::Bugreport),
    /// Prints a script that lets a shell complete this command line
    #[command(after_help = completion::EXAMPLES)]
    Completion(completion::Completion),
    /// Writes manual pages
    #[command(hide = true)]
    Man(man::Man),
}

#[derive(Args)]
struct Run {
    /// The same settings as YAML; the command line goes first
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// Reads the pinned maps; no agent is needed.
#[derive(Args)]
struct Read {
    #[command(flatten)]
    pins: Pins,
    /// Tables for people, json for programs (docs/cli.md says what stays)
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t)]
    output: Output,
}

const EXPLAIN_EXAMPLES: &str = "\
Examples:
  fairlead explain svc/web -n shop                     ask the API server
  fairlead explain 192.0.2.10:30080 -o json            who has this port of a node
  fairlead explain [fd00::1]:53/UDP
  fairlead explain svc/web --manifests /etc/services   no API server
  kubectl get svc,endpointslices,pods,nodes -o yaml | fairlead explain svc/web -f -";

/// Needs no agent.
#[derive(Args)]
struct Explain {
    /// svc/NAME, or ADDRESS:PORT[/PROTO]
    #[arg(value_name = "SUBJECT")]
    subject: Subject,
    /// Namespace of the Service
    #[arg(short, long, value_name = "NAMESPACE", default_value = "default")]
    namespace: String,
    /// Objects as `kubectl get -o yaml` (or json) prints them, `-` for standard input, in place of the API server
    #[arg(short, long = "file", value_name = "FILE", value_delimiter = ',', conflicts_with_all = ["manifests", "master"])]
    files: Vec<PathBuf>,
    /// As of `fairlead run`
    #[arg(long, value_name = "DIR", conflicts_with = "master")]
    manifests: Option<PathBuf>,
    /// As of `fairlead run`
    #[arg(long, env = "KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// As of `fairlead run`
    #[arg(long, value_name = "URL")]
    master: Option<String>,
    /// Whose view it is [default: the node that has ADDRESS, else this one]
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,
    /// What the agent kept, for when the API server cannot be asked [default: as of `fairlead run`]
    #[arg(long, value_name = "FILE")]
    state_file: Option<PathBuf>,
    /// As of `fairlead run` [default: what the maps of this node say, else all]
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    nodeport_addresses: Option<Vec<String>>,
    /// As of the API server: nodePorts that it allows
    #[arg(long, value_name = "FIRST-LAST", default_value_t)]
    service_node_port_range: node_ports::Range,
    #[command(flatten)]
    read: Read,
}

#[derive(Args)]
struct Trace {
    /// Who asks: ADDRESS[:PORT] of a pod or of a client outside, or `node` for a process of this node
    from: trace::From,
    /// What for: ADDRESS:PORT or svc/NAME[:PORT], and behind it /tcp (the default), /udp or /sctp
    to: trace::To,
    /// Where the Service is
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// The device the packet comes in through [default: the one that leads to FROM]
    #[arg(long, value_name = "DEVICE")]
    via: Option<String>,
    #[command(flatten)]
    read: Read,
}

const TRACE_EXAMPLES: &str = "\
Examples:
  fairlead trace 198.51.100.7 192.0.2.10:30080        a client outside asks for a NodePort
  fairlead trace 10.244.1.5 svc/dns:53/udp -n kube-system
                                                      a pod asks for a Service
  fairlead trace node 10.96.0.1:443 -o json           a process of this node
  fairlead trace 10.244.1.5:51234 10.96.0.1:443       the port of a connection: shows its backend
  fairlead trace 10.244.1.5 10.96.0.1:443 --via eth0  through this device";

#[derive(Args)]
struct Check {
    #[command(flatten)]
    read: Read,
    /// As of `fairlead run`
    #[arg(long, value_name = "DIR")]
    cgroup_root: Option<PathBuf>,
    /// As of `fairlead run`
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    device: Vec<String>,
    /// As of `fairlead run`
    #[arg(long, value_name = "GLOB", value_delimiter = ',')]
    pod_device: Vec<String>,
}

#[derive(Args)]
struct Cleanup {
    #[command(flatten)]
    pins: Pins,
    /// Where the agent keeps its state [default: /var/lib/fairlead/ and the path of --bpffs, with - for /]
    #[arg(long, value_name = "FILE", conflicts_with = "kube_proxy")]
    state_file: Option<PathBuf>,
    /// Removes what kube-proxy has left (iptables, nftables, IPVS), and nothing else
    #[arg(long, conflicts_with = "bpffs")]
    kube_proxy: bool,
    /// Only says what would be removed
    #[arg(long, requires = "kube_proxy")]
    dry_run: bool,
}

#[derive(Args)]
struct Pins {
    /// Where the agent pins its maps and programs
    #[arg(long, value_name = "DIR", default_value = DEFAULT_BPFFS)]
    bpffs: PathBuf,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Default)]
enum Output {
    #[default]
    Table,
    /// A table with all columns
    Wide,
    Json,
}

/// What was asked for contradicts itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(String);

impl Usage {
    fn new(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

impl Cli {
    /// Does what the command line says.
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Run(run) => run.run(),
            Command::Status(status) => status.run(),
            Command::Services(services) => services.run(),
            Command::Backends(backends) => backends.run(),
            Command::Flows(flows) => flows.run(),
            Command::Top(top) => top.run(),
            Command::Drops(drops) => drops.run(),
            Command::Explain(explain) => explain.run(),
            Command::Trace(trace) => trace.run(),
            Command::Check(check) => check.run(),
            Command::Cleanup(cleanup) => cleanup.run(),
            Command::Bugreport(bugreport) => bugreport.run(),
            Command::Completion(completion) => completion.run(),
            Command::Man(man) => man.run(),
        }
    }
}

impl Run {
    fn run(self) -> Result<()> {
        let settings = match &self.config {
            Some(path) => self.settings.or(Settings::read(path)?),
            None => self.settings,
        };
        logging::start(settings.log_level(), settings.log_format())?;
        let config = settings.config()?;
        // What the agent leaves on the node is its owner's only.
        umask(Mode::S_IRWXG | Mode::S_IRWXO);
        // Sources and health beside the loop, which does its system calls itself.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.context("cannot start the runtime")?;
        let outcome = runtime.block_on(agent::run(config));
        // Nothing that is left has anything to finish.
        runtime.shutdown_background();
        outcome
    }
}

impl Read {
    fn show(&self, show: impl FnOnce(&mut show::To<'_>) -> Result<()>) -> Result<()> {
        let mut out = io::BufWriter::new(io::stdout().lock());
        let (json, wide) = (self.output == Output::Json, self.output == Output::Wide);
        let outcome = show(&mut show::To { bpffs: &self.pins.bpffs, json, wide, out: &mut out });
        let outcome = outcome.and_then(|()| Ok(io::Write::flush(&mut out)?));
        match outcome {
            // Whoever reads has seen enough.
            Err(error) if is_broken_pipe(&error) => Ok(()),
            outcome => outcome,
        }
    }
}

impl Explain {
    fn run(self) -> Result<()> {
        let bpffs = &self.read.pins.bpffs;
        load::check_name(&self.namespace)?;
        if let Subject::Service(name) = &self.subject {
            load::check_name(name)?;
        }
        let nodeport_addresses =
            self.nodeport_addresses.map(|values| NodePortAddresses::parse(&values)).transpose()?;
        let source = Source {
            files: self.files,
            manifests: self.manifests,
            kubeconfig: self.kubeconfig.filter(|path| !path.as_os_str().is_empty()),
            master: self.master.filter(|url| !url.is_empty()),
            state_file: self.state_file.unwrap_or_else(|| kept::default_path(bpffs)),
            node_name: self.node_name.map(|name| name.trim().to_lowercase()).filter(|name| !name.is_empty()),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("cannot start the runtime")?;
        let mut loaded = runtime.block_on(load::load(&self.subject, &self.namespace, &source))?;
        let read =
            || Inspector::open(bpffs).and_then(|maps| Ok((maps.services()?, maps.node_port_addresses()?)));
        let maps = loaded.is_here.then(read);
        let node = loaded.objects.nodes.iter().find(|node| node.name == loaded.node.name);
        loaded.node.node_ports = NodePorts {
            range: self.service_node_port_range,
            addresses: match (&nodeport_addresses, &maps) {
                (Some(allowed), _) => node_ports::named(allowed, &loaded.node, node),
                (None, Some(Ok((_, addresses)))) => addresses.clone(),
                (None, Some(Err(_)) | None) => None,
            },
        };
        let mut explanation = explain(&self.subject, &self.namespace, &loaded.objects, &loaded.node)?;
        explanation.source = loaded.source;
        explanation.notes.extend(loaded.notes);
        match maps {
            Some(Ok((services, _))) => programmed::compare(&mut explanation, &services),
            Some(Err(InspectError::NoDatapath { .. })) | None => {}
            Some(Err(error)) => {
                explanation.notes.push(format!("what is programmed cannot be read: {error}"));
            }
        }
        self.read.show(|to| show::explain(to, &explanation))
    }
}

impl Trace {
    fn run(self) -> Result<()> {
        let found = trace::trace(&trace::Question {
            bpffs: self.read.pins.bpffs.clone(),
            from: self.from,
            to: self.to,
            namespace: self.namespace,
            via: self.via,
        })?;
        self.read.show(|to| trace::show(to, &found))
    }
}

impl Check {
    fn run(&self) -> Result<()> {
        let node = check::Node {
            bpffs: self.read.pins.bpffs.clone(),
            cgroup_root: self.cgroup_root.clone(),
            rules: Rules::new(&self.device, &self.pod_device)?,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let findings = runtime.context("cannot start the runtime")?.block_on(check::look(&node));
        self.read.show(|to| show::check(to, &findings))?;
        let wrong = findings.iter().filter(|finding| finding.state == State::Fail).count();
        if wrong > 0 {
            bail!("the agent cannot run here: {wrong} of these must be mended before");
        }
        Ok(())
    }
}

impl Cleanup {
    fn run(&self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("cannot start the runtime")?;
        let (removed, notes) = if self.kube_proxy {
            let found = runtime.block_on(kube_proxy::cleanup(self.dry_run))?;
            (found.removed, found.notes)
        } else {
            let mut removed = runtime.block_on(datapath::cleanup(&self.pins.bpffs))?;
            let state = self.state_file.clone().unwrap_or_else(|| kept::default_path(&self.pins.bpffs));
            if kept::file::remove(&state).with_context(|| format!("cannot remove {}", state.display()))? {
                removed.push(format!("state {}", state.display()));
            }
            (removed, vec![])
        };
        let does = if self.dry_run { "would remove" } else { "removed" };
        for line in &removed {
            println!("{does} {line}");
        }
        if removed.is_empty() {
            println!("nothing to remove");
        }
        for line in &notes {
            println!("{line}");
        }
        Ok(())
    }
}

/// `--proto`.
fn protocol(text: &str) -> Result<Protocol, String> {
    let all = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let known = all.into_iter().find(|known| known.to_string().eq_ignore_ascii_case(text));
    known.ok_or_else(|| "is not tcp, udp or sctp".into())
}

/// `--kind`.
fn frontend_kind(text: &str) -> Result<FrontendKind, String> {
    let all = (0..=u8::MAX).filter_map(FrontendKind::from_number);
    let known = all.into_iter().find(|known| known.to_string().eq_ignore_ascii_case(text));
    known.ok_or_else(|| "is not ClusterIP, NodePort, LoadBalancer, ExternalIP or HostPort".into())
}

/// `--interval`.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "is not a number of seconds from 0.1 to 3600".into())
}

/// A value that cannot be understood, in one line; `None`: something else is wrong, and the usage helps.
pub fn wrong_value(error: &clap::Error) -> Option<String> {
    use clap::error::ErrorKind::{InvalidValue, ValueValidation};
    if !matches!(error.kind(), InvalidValue | ValueValidation) {
        return None;
    }
    let text = error.render().to_string();
    // What follows is a tip.
    let lines = text.trim_start_matches("error: ").lines().take_while(|line| !line.is_empty());
    Some(lines.map(str::trim).collect::<Vec<_>>().join(" "))
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kind = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    error.downcast_ref::<io::Error>().is_some_and(kind)
        || error.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind)
            == Some(io::ErrorKind::BrokenPipe)
}

/// An error and its causes in one line. Many errors say their cause themselves.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn wrong_filters_are_one_line() {
        for wrong in [
            &["flows", "--client", "10.0.0"][..],
            &["flows", "--proto", "icmp"],
            &["flows", "--state", "open"],
            &["flows", "--service", "a/b/c"],
            &["flows", "--follow", "--interval", "0"],
            &["services", "--kind", "vip"],
            &["services", "Web"],
            &["backends", "--address", "10.0.0.1:http"],
        ] {
            let parsed = Cli::try_parse_from([&["fairlead"], wrong].concat());
            let error = parsed.err().unwrap();
            let line = wrong_value(&error).unwrap();
            assert_eq!((line.lines().count(), error.exit_code()), (1, 2), "{line}");
            assert!(line.starts_with("invalid value ") && line.contains(wrong[wrong.len() - 1]), "{line}");
        }
        let missing = Cli::try_parse_from(["fairlead", "flows", "--sort", "idle"]).err().unwrap();
        assert_eq!(wrong_value(&missing), None);
        let cli = Cli::try_parse_from(["fairlead", "flows", "--service", "a/b", "-n", "c"]).unwrap();
        assert!(cli.run().unwrap_err().is::<Usage>());
    }

    #[test]
    fn an_error_is_one_line() {
        let error = io::Error::other("deep\n  down");
        let error = anyhow::Error::new(error).context("reading: deep\n  down").context("top");
        assert_eq!(one_line(&error), "top: reading: deep down");
    }
}
