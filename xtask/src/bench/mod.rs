//! `cargo xtask bench`: how fast, how many, and against what, with one command.
//!
//! Every number is a median over many short rounds in which all variants take turns: what else happens on the machine
//! happens to all of them. Ratios of one run can be compared with those of another; times cannot.

mod control;
mod kube_proxy;
mod plot;
mod report;
pub mod results;
mod rules;
mod server;
mod sockets;
mod targets;

use std::env;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use serde_json::Value;

use self::results::{Machine, Results, Series};
use crate::lab::custody;
use crate::process::{self, say};
use crate::setup::{self, Bpffs};
use crate::{build_ebpf, host};

/// The page that is made of the results, and its pictures.
const PAGE: &str = "docs/benchmarks.md";
const PICTURES: &str = "benchmarks";

/// Measure how fast the datapath and the agent are, and print it beside the targets.
///
/// Needs root. Everything happens in namespaces of its own. With --quick it takes about a quarter of an hour, most of it
/// for sockets; without, several times that. The machine should do nothing else meanwhile.
#[derive(clap::Args)]
pub struct Args {
    /// What to measure; everything if nothing is named
    #[arg(value_enum)]
    groups: Vec<Group>,
    /// Fewer rounds, and no more than 100,000 flows and 10,000 Services
    #[arg(long)]
    quick: bool,
    /// Where bench.json and the pictures go
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    output: PathBuf,
    /// Measure nothing: print what an earlier run has written here
    #[arg(long, value_name = "JSON", conflicts_with_all = ["groups", "quick"])]
    from: Option<PathBuf>,
    /// Measure the `fairlead` and with the `lb-bench` of this directory, instead of building them
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// Measure this kube-proxy, in nftables mode, beside Fairlead in groups sockets and compare
    #[arg(long, value_name = "PATH", conflicts_with = "from")]
    kube_proxy: Option<PathBuf>,
    /// Make docs/benchmarks.md of it
    #[arg(long)]
    write_docs: bool,
}

/// What can be measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Group {
    /// What one packet costs
    Packet,
    /// How many connections can begin, and what those that are over cost
    Flows,
    /// What applications see on sockets, beside kube-proxy's rules
    Sockets,
    /// The agent with many Services
    Control,
    /// The same packet through programs like those of others
    Compare,
    /// What the kernel's maps cost by themselves
    Maps,
}

impl Group {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Whether kube-proxy itself can be measured there.
    const fn has_peers(self) -> bool {
        matches!(self, Self::Sockets | Self::Compare)
    }
}

/// How much is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scale {
    Full,
    Quick,
    /// As little as shows that everything works.
    Smoke,
}

/// The programs that are measured, and that measure.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `fairlead`
    pub agent: PathBuf,
    /// `lb-bench`
    pub bench: PathBuf,
    /// `xtask`, for what the lab runs on nodes.
    pub xtask: PathBuf,
    /// Somebody's `kube-proxy`.
    pub kube_proxy: Option<PathBuf>,
}

/// The subcommand.
pub fn command(args: &Args) -> Result<()> {
    fs::create_dir_all(&args.output).with_context(|| format!("cannot make {}", args.output.display()))?;
    let json = args.output.join("bench.json");
    let results = match &args.from {
        Some(path) => Results::read(path)?,
        None => measure(args, &json)?,
    };
    show(&results);
    results.write(&json)?;
    draw(&results, &args.output)?;
    say(format!("written: {} and pictures beside it", json.display()));
    if args.write_docs {
        write_docs(&results, host::workspace())?;
        say(format!("written: {PAGE}"));
    }
    Ok(())
}

/// What has been measured is written to `json` with each group: a later one may fail, or be broken off.
fn measure(args: &Args, json: &Path) -> Result<Results> {
    if !host::is_root() {
        bail!("this makes network namespaces and loads BPF programs; run as root: cargo xtask bench");
    }
    let groups = if args.groups.is_empty() { Group::value_variants() } else { &args.groups };
    if args.kube_proxy.is_some() && !groups.iter().any(|group| group.has_peers()) {
        bail!("--kube-proxy is measured in groups sockets and compare; name one of them");
    }
    setup::tools(&setup::TOOLS)?;
    setup::cgroup2()?;
    let xtask = env::current_exe().context("cannot tell which program this is")?;
    let mut programs = if let Some(dir) = &args.programs {
        Programs { agent: dir.join("fairlead"), bench: dir.join("lb-bench"), xtask, kube_proxy: None }
    } else {
        build_ebpf::build()?;
        build(xtask)?
    };
    programs.kube_proxy.clone_from(&args.kube_proxy);
    let bpffs = Bpffs::ready()?;
    let ours = bpffs.is_ours();
    custody::undo_on_signals(move || {
        if ours {
            Bpffs::unmount();
        }
    })?;
    let scale = if args.quick { Scale::Quick } else { Scale::Full };
    let mut results = Results { machine: Machine::here()?, command: command_line(args), series: Vec::new() };
    for group in groups {
        say(format!("measuring: {}", group.name()));
        results.series.extend(run(*group, scale, &programs)?);
        results.machine.finish()?;
        results.write(json)?;
    }
    Ok(results)
}

/// Measures one group.
pub fn run(group: Group, scale: Scale, programs: &Programs) -> Result<Vec<Series>> {
    if let (Group::Compare, Some(path)) = (group, &programs.kube_proxy) {
        return compare(scale, programs, path);
    }
    let args: &[&str] = match (group, scale) {
        (Group::Control, _) => return control::run(scale, programs),
        (Group::Sockets, _) => return sockets::run(scale, programs),
        (_, Scale::Full) => &[],
        (Group::Packet, Scale::Quick) => {
            &["--rounds", "15", "--flows", "1,1000,100000", "--services", "1,10000"]
        }
        (Group::Packet, Scale::Smoke) => {
            &["--rounds", "2", "--packets", "100", "--flows", "1,100", "--services", "1,10"]
        }
        (Group::Flows, Scale::Quick) => &["--table", "500000"],
        (Group::Flows, Scale::Smoke) => &["--table", "20000", "--sweeps", "2"],
        (Group::Compare | Group::Maps, Scale::Quick) => &["--rounds", "15"],
        (Group::Maps, Scale::Smoke) => &["--rounds", "2", "--runs", "100", "--entries", "1,100"],
        (Group::Compare, Scale::Smoke) => &["--rounds", "2", "--packets", "100", "--flows", "1,100"],
    };
    samples(Command::new(&programs.bench).arg(group.name()).args(args))
}

/// Group `compare` with a kube-proxy, which comes first as it may not start.
fn compare(scale: Scale, programs: &Programs, kube_proxy: &Path) -> Result<Vec<Series>> {
    let mut series = sockets::beside(scale, programs, kube_proxy)?;
    series.extend(run(Group::Compare, scale, &Programs { kube_proxy: None, ..programs.clone() })?);
    Ok(series)
}

/// Runs a program that prints series.
fn samples(command: &mut Command) -> Result<Vec<Series>> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("cannot start `{}`", process::show(command)))?;
    if !output.status.success() {
        bail!("`{}` failed ({})", process::show(command), output.status);
    }
    let text = String::from_utf8(output.stdout).context("series are UTF-8")?;
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("no series: {line}")))
        .collect()
}

/// The agent as it is shipped, and what measures it.
fn build(xtask: PathBuf) -> Result<Programs> {
    let mut command = host::cargo()?;
    command.args([
        "build",
        "--locked",
        "--release",
        "--package",
        "lb-userspace",
        "--package",
        "lb-bench",
        "--bins",
    ]);
    command.arg("--message-format=json-render-diagnostics").stdout(Stdio::piped());
    let mut cargo = command.spawn().with_context(|| format!("cannot start `{}`", process::show(&command)))?;
    let (mut agent, mut bench) = (None, None);
    for line in BufReader::new(cargo.stdout.take().context("cargo has no stdout")?).lines() {
        let message: Value = serde_json::from_str(&line.context("cannot read what cargo says")?)?;
        let executable = message["executable"].as_str().map(PathBuf::from);
        match message["target"]["name"].as_str() {
            Some("fairlead") if executable.is_some() => agent = executable,
            Some("lb-bench") if executable.is_some() => bench = executable,
            _ => {}
        }
    }
    if !cargo.wait().context("cannot wait for cargo")?.success() {
        bail!("`{}` failed", process::show(&command));
    }
    Ok(Programs {
        agent: agent.context("cargo built no agent (`fairlead`)")?,
        bench: bench.context("cargo built no `lb-bench`")?,
        xtask,
        kube_proxy: None,
    })
}

/// What repeats the run.
fn command_line(args: &Args) -> String {
    let mut words = vec!["cargo xtask bench".to_owned()];
    words.extend(args.groups.iter().map(|group| group.name()));
    words.extend(args.quick.then(|| "--quick".to_owned()));
    words.extend(args.kube_proxy.iter().map(|path| format!("--kube-proxy {}", path.display())));
    words.extend(args.write_docs.then(|| "--write-docs".to_owned()));
    words.join(" ")
}

/// Prints all tables.
fn show(results: &Results) {
    let Machine { kernel, cpu, cpus, load_before, load_after } = &results.machine;
    println!("Linux {kernel}, {cpu}, {cpus} CPUs, load {load_before:.2} before, {load_after:.2} after");
    for group in Group::value_variants() {
        let of_group: Vec<_> = results.series.iter().filter(|series| series.group == group.name()).collect();
        if !of_group.is_empty() {
            println!("\n{}\n{}", group.name(), report::table(results, &of_group));
        }
    }
    println!("{}", report::targets(results));
}

/// Draws every group. Group and file name of each picture.
fn draw(results: &Results, dir: &Path) -> Result<Vec<(String, String)>> {
    let mut drawn = Vec::new();
    for group in Group::value_variants() {
        let name = group.name();
        let of_group: Vec<_> = results.series.iter().filter(|series| series.group == name).collect();
        let mut units: Vec<&str> = of_group.iter().map(|series| series.unit.as_str()).collect();
        units.sort_unstable();
        units.dedup();
        for (index, unit) in units.iter().enumerate() {
            let of_unit: Vec<_> = of_group.iter().copied().filter(|series| series.unit == *unit).collect();
            let Some(picture) = plot::bars(&name, &of_unit) else { continue };
            let file = if index == 0 { format!("{name}.svg") } else { format!("{name}-{index}.svg") };
            let path = dir.join(&file);
            fs::write(&path, picture).with_context(|| format!("cannot write {}", path.display()))?;
            drawn.push((name.clone(), file));
        }
    }
    Ok(drawn)
}

/// Writes the page and its pictures below `root`.
pub fn write_docs(results: &Results, root: &Path) -> Result<()> {
    let page = root.join(PAGE);
    let pictures = page.with_file_name(PICTURES);
    fs::create_dir_all(&pictures).with_context(|| format!("cannot make {}", pictures.display()))?;
    let drawn: Vec<_> = draw(results, &pictures)?
        .into_iter()
        .map(|(group, file)| (group, format!("{PICTURES}/{file}")))
        .collect();
    fs::write(&page, report::page(results, &drawn))
        .with_context(|| format!("cannot write {}", page.display()))
}
