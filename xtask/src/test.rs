//! `cargo xtask test`: every test, on the real kernel of this machine, and nothing left behind.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::process::{self, say};
use crate::setup::{self, Bpffs};
use crate::{build_ebpf, host, kernels, snapshot};

/// Environment variable that tells tests where the agent is.
pub const AGENT: &str = "FAIRLEAD_BIN";
/// How long processes get to clean up after themselves when they are asked to end.
const GRACE: Duration = Duration::from_secs(20);
/// How long the kernel gets to free what nobody holds any more.
const SETTLE: Duration = Duration::from_secs(10);

/// Run every test: host pipeline, loaded programs, and nodes made of network namespaces.
///
/// Needs root for the last two: run as root, or as a user who may use sudo. Fails if a test fails, and if
/// anything is left behind (namespaces, programs, maps, links, pins, cgroups, processes, sysctls).
#[derive(clap::Args)]
pub struct Args {
    /// Only tests whose names contain this
    filter: Option<String>,
    /// Only tests of this package (may be repeated)
    #[arg(short, long)]
    package: Vec<String>,
    /// Only this integration test (may be repeated)
    #[arg(long)]
    test: Vec<String>,
    /// Afterwards also on other kernels: see `cargo xtask kernels`
    #[arg(long, conflicts_with_all = ["package", "test", "harness"])]
    all: bool,
    /// Arguments for the test programs, such as --nocapture
    #[arg(last = true)]
    harness: Vec<String>,
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The subcommand.
pub fn command(args: &Args) -> Result<()> {
    // Before a long build, not after it.
    host::as_root("true").context("the tests make namespaces and load programs")?;
    setup::tools(&setup::TOOLS)?;
    setup::cgroup2()?;
    build_ebpf::build()?;
    let built = build()?;

    // From here on there is something to clean up.
    ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::SeqCst)).context("cannot handle signals")?;
    let bpffs = Bpffs::ready()?;
    let mark = std::process::id().to_string();
    let before = snapshot::take(&mark)?;
    let outcome = run(cargo_test(args)?.env(AGENT, &built.agent).env(snapshot::MARK, &mark), &mark);
    let left = left_behind(&mark, &before)?;
    drop(bpffs);

    for line in &left {
        say(format!("left behind: {line}"));
    }
    if left.iter().any(|line| line.starts_with(snapshot::PROCESS)) {
        snapshot::signal(&mark, Signal::SIGKILL)?;
    }
    let status = outcome?;
    if INTERRUPTED.load(Ordering::SeqCst) {
        bail!("interrupted");
    }
    match (status.success(), left.len()) {
        (true, 0) if args.all => kernels::command(&kernels::Args::with_filter(args.filter.clone())),
        (true, 0) => Ok(()),
        (true, count) => bail!("all tests passed, but {count} things were left behind"),
        (false, _) => bail!("tests failed"),
    }
}

/// Programs that the tests need, and the tests.
#[derive(Debug)]
pub struct Built {
    /// `fairlead`
    pub agent: PathBuf,
    /// `xtask`
    pub xtask: PathBuf,
    /// Integration tests by their names, which differ.
    tests: BTreeMap<String, PathBuf>,
}

impl Built {
    pub fn test(&self, name: &str) -> Result<&PathBuf> {
        self.tests.get(name).with_context(|| format!("there is no test target {name}"))
    }
}

/// Everything the tests need, built at once: cargo unites the features of all packages, and what is built
/// here is what `cargo test` uses.
pub fn build() -> Result<Built> {
    let mut command = host::cargo()?;
    command.arg("build").args(["--lib", "--bins", "--tests"]).args(WORKSPACE);
    command.arg("--message-format=json-render-diagnostics").stdout(Stdio::piped());
    let mut cargo = command.spawn().with_context(|| format!("cannot start `{}`", process::show(&command)))?;
    let mut found = BTreeMap::new();
    for line in BufReader::new(cargo.stdout.take().context("cargo has no stdout")?).lines() {
        found.extend(executable(&line.context("cannot read what cargo says")?));
    }
    if !cargo.wait().context("cannot wait for cargo")?.success() {
        bail!("`{}` failed", process::show(&command));
    }
    let mut program = |name: &str| found.remove(&(false, name.to_owned()));
    let agent = program("fairlead").context("cargo built no agent (`fairlead`)")?;
    let xtask = program("xtask").context("cargo built no `xtask`")?;
    let tests = found.into_iter().filter(|((test, _), _)| *test).map(|((_, name), path)| (name, path));
    Ok(Built { agent, xtask, tests: tests.collect() })
}

const WORKSPACE: [&str; 4] = ["--locked", "--workspace", "--exclude", "lb-ebpf"];

/// What this message of cargo's says is built: a program (`false`) or an integration test (`true`), its name and path.
fn executable(message: &str) -> Option<((bool, String), PathBuf)> {
    let message: Value = serde_json::from_str(message).ok()?;
    let name = message["target"]["name"].as_str()?.to_owned();
    let is_test = match (message["target"]["kind"][0].as_str()?, message["profile"]["test"].as_bool()?) {
        ("bin", false) => false,
        ("test", true) => true,
        _ => return None,
    };
    Some(((is_test, name), message["executable"].as_str()?.into()))
}

fn cargo_test(args: &Args) -> Result<Command> {
    let mut command = host::cargo()?;
    command.arg("test").arg("--no-fail-fast");
    if args.package.is_empty() {
        command.args(WORKSPACE);
    } else {
        command.arg("--locked").args(args.package.iter().flat_map(|name| ["--package", name]));
    }
    command.args(args.test.iter().flat_map(|name| ["--test", name]));
    command.args(&args.filter);
    if args.all {
        command.env("FAIRLEAD_PODS", "5000");
    }
    if !host::is_root() {
        // Cargo stays the user's, so that nothing in target/ becomes root's; only test programs are root.
        command.args(["--config", "target.'cfg(all())'.runner = ['sudo', '--preserve-env']"]);
    }
    if !args.harness.is_empty() {
        command.arg("--").args(&args.harness);
    }
    Ok(command)
}

/// Like [`process::run`], but a signal to us ends the tests, and they get time to clean up.
fn run(command: &mut Command, mark: &str) -> Result<ExitStatus> {
    let mut child = command.spawn().with_context(|| format!("cannot start `{}`", process::show(command)))?;
    let mut asked: Option<Instant> = None;
    loop {
        let status = child.try_wait().context("cannot wait for cargo")?;
        if let (Some(status), None, false) = (status, asked, INTERRUPTED.load(Ordering::SeqCst)) {
            return Ok(status);
        }
        if let Some(asked) = asked {
            let alive = snapshot::take(mark)?.iter().any(|line| line.starts_with(snapshot::PROCESS));
            match status {
                Some(status) if !alive => return Ok(status),
                _ if asked.elapsed() > GRACE => snapshot::signal(mark, Signal::SIGKILL)?,
                _ => {}
            }
        } else if INTERRUPTED.load(Ordering::SeqCst) {
            // After Ctrl-C in a terminal they have had a signal already; otherwise this is the first.
            snapshot::signal(mark, Signal::SIGTERM)?;
            asked = Some(Instant::now());
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// What is there now and was not there before.
fn left_behind(mark: &str, before: &BTreeSet<String>) -> Result<BTreeSet<String>> {
    let start = Instant::now();
    loop {
        let left: BTreeSet<String> = snapshot::take(mark)?.difference(before).cloned().collect();
        if left.is_empty() || start.elapsed() > SETTLE {
            return Ok(left);
        }
        thread::sleep(Duration::from_millis(200));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_tests_are_found_among_cargos_messages() {
        let message = |kind: &str, test: bool, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","target":{{"kind":["{kind}"],"name":"fairlead"}},
                "profile":{{"test":{test}}},"executable":{executable}}}"#
            )
        };
        let path = r#""/t/debug/fairlead""#;
        let found = |test: bool| Some(((test, "fairlead".to_owned()), "/t/debug/fairlead".into()));
        assert_eq!(executable(&message("bin", false, path)), found(false));
        assert_eq!(executable(&message("test", true, path)), found(true));
        assert_eq!(executable(&message("bin", true, path)), None);
        assert_eq!(executable(&message("lib", false, "null")), None);
        assert_eq!(executable(r#"{"reason":"build-finished","success":true}"#), None);
        assert_eq!(executable("not JSON"), None);
    }
}
