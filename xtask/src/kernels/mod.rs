//! `cargo xtask kernels`: the tests of the loaded programs, and the core of those with nodes, on kernels that are not
//! this machine's.
//!
//! Each kernel is Debian's, booted under QEMU with an archive as its file system: what the tests need of this machine,
//! the tests, and nothing else. There is no disk and no network; what comes out is text ([`report`]).

mod initramfs;
mod machine;
mod packages;
mod report;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use self::initramfs::Archive;
use self::machine::End;
use self::packages::Unpacked;
use self::report::Report;
use crate::process::{self, say};
use crate::setup::{self, Tool};
use crate::test::{self, Built};
use crate::{build_ebpf, host};

/// Run the tests of the loaded programs on the kernels that Fairlead supports, under QEMU.
///
/// Kernels are Debian's packages: fetched by apt from sources of their own, unpacked below target/kernels, never
/// installed. Needs no root but to install missing programs, which it says (QEMU, busybox, kmod and others). Writes
/// the tables of docs/kernels.md when every test has run on every kernel, at once or one by one.
#[derive(clap::Args)]
pub struct Args {
    /// Kernels, such as 5.10 or sid; all if none is named
    kernels: Vec<String>,
    /// Only tests whose names contain this
    #[arg(short, long)]
    filter: Option<String>,
    /// Kernels at the same time
    #[arg(short, long, default_value_t = 1)]
    jobs: usize,
    /// Seconds for each kernel
    #[arg(long, default_value_t = TIMEOUT)]
    timeout: u64,
    /// Show what the guests print as it comes
    #[arg(short, long)]
    verbose: bool,
    /// Look for newer packages of the kernels
    #[arg(long)]
    update: bool,
    /// Keep the guests' file systems, beside their logs in target/kernels
    #[arg(short, long)]
    keep: bool,
}

/// What a guest said when it ran all tests, in the directory of its suite.
const LOG: &str = "tests.log";
/// Seconds. Emulated, on a machine that others use.
const TIMEOUT: u64 = 3600;

impl Args {
    /// Every kernel, one after the other.
    pub fn with_filter(filter: Option<String>) -> Self {
        Self {
            kernels: Vec::new(),
            filter,
            jobs: 1,
            timeout: TIMEOUT,
            verbose: false,
            update: false,
            keep: false,
        }
    }
}

/// A kernel that Fairlead supports.
#[derive(Debug)]
pub struct Kernel {
    /// As users name it.
    name: &'static str,
    /// Of Debian.
    suite: &'static str,
}

const KERNELS: [Kernel; 4] = [
    Kernel { name: "5.10", suite: "bullseye" },
    Kernel { name: "6.1", suite: "bookworm" },
    Kernel { name: "6.12", suite: "trixie" },
    Kernel { name: "newest", suite: "sid" },
];

/// What is needed beside [`setup::TOOLS`].
const TOOLS: [Tool; 8] = [
    Tool { program: "qemu-system-x86_64", package: "qemu-system-x86" },
    Tool { program: "busybox", package: "busybox-static" },
    Tool { program: "bash", package: "bash" },
    Tool { program: "modprobe", package: "kmod" },
    Tool { program: "xz", package: "xz-utils" },
    Tool { program: "strip", package: "binutils" },
    Tool { program: "setpriv", package: "util-linux" },
    Tool { program: "ldd", package: "libc-bin" },
];

/// Programs of this machine that tests call; the rest is busybox.
const PROGRAMS: [&str; 5] = ["bash", "ip", "tc", "ethtool", "bpftool"];

/// Modules, and whether there is no test without them.
const MODULES: [(&str, bool); 9] = [
    ("veth", true),
    ("bridge", true),
    ("8021q", true),
    ("bonding", true),
    ("sch_ingress", true),
    ("cls_bpf", true),
    ("cls_u32", true),
    ("dummy", false),
    ("sctp", false),
];

/// A test program, and what to run of it.
struct Suite {
    /// The test target.
    name: &'static str,
    tier: u8,
    /// Names of its tests; all if empty.
    only: &'static [&'static str],
    /// Arguments for the test program.
    harness: &'static str,
}

const SUITES: [Suite; 6] = [
    Suite { name: "datapath", tier: 2, only: &["kernel::"], harness: "--nocapture" },
    Suite { name: "programs", tier: 2, only: &[], harness: "--test-threads=1" },
    Suite { name: "packets", tier: 2, only: &[], harness: "--test-threads=2" },
    // What `fairlead trace` makes of the programs' answers is the same on every kernel.
    Suite {
        name: "datapath",
        tier: 2,
        only: &[],
        harness: "--test-threads=2 --skip kernel:: --skip trace::",
    },
    Suite {
        name: "agent",
        tier: 2,
        only: &["manifests_in_connections_translated_and_nothing_left_behind"],
        harness: "--test-threads=1",
    },
    Suite {
        name: "nodes",
        tier: 3,
        only: &["matrix::", "uplinks::", "agent::a_new_agent_takes_over", "agent::a_restart_breaks_no_call"],
        harness: "--test-threads=1",
    },
];

/// The subcommand.
pub fn command(args: &Args) -> Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "the guests run this machine's programs, and are x86-64 machines");
    let kernels = chosen(&args.kernels)?;
    setup::tools(&[&setup::TOOLS[..], &TOOLS].concat())?;
    ensure!(
        Path::new(packages::KEYRING).exists(),
        "Debian's keys are missing; run: {}",
        host::apt_line(&["debian-archive-keyring"], host::is_root())
    );
    build_ebpf::build()?;
    let built = test::build()?;

    let next = AtomicUsize::new(0);
    let reports = Mutex::new(BTreeMap::new());
    thread::scope(|scope| {
        for _ in 0..args.jobs.clamp(1, kernels.len()) {
            scope.spawn(|| {
                while let Some(kernel) = kernels.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let report = run(kernel, args, &built).with_context(|| format!("kernel {}", kernel.name));
                    if let Err(error) = &report {
                        say(format!("{error:#}"));
                    }
                    let position = KERNELS.iter().position(|other| other.name == kernel.name);
                    reports.lock().unwrap_or_else(PoisonError::into_inner).insert(position, report);
                }
            });
        }
    });
    let reports = reports.into_inner().unwrap_or_else(PoisonError::into_inner);
    let reports: Vec<Report> = reports.into_values().collect::<Result<_>>()?;
    print!("{}", report::table(&reports));
    if args.filter.is_none() {
        write_page()?;
    }
    match reports.iter().filter(|report| !report.passed()).count() {
        0 => Ok(()),
        failed => bail!("failed on {failed} of {} kernels; logs are in {}", reports.len(), cache().display()),
    }
}

fn chosen(names: &[String]) -> Result<Vec<&'static Kernel>> {
    let find = |name: &String| {
        KERNELS.iter().find(|kernel| kernel.name == name || kernel.suite == name).with_context(|| {
            let known: Vec<&str> = KERNELS.iter().map(|kernel| kernel.name).collect();
            format!("no kernel {name}; there are: {}", known.join(" "))
        })
    };
    if names.is_empty() { Ok(KERNELS.iter().collect()) } else { names.iter().map(find).collect() }
}

/// Writes what the last runs of all tests came to into docs/kernels.md, once there was one on each kernel.
fn write_page() -> Result<()> {
    let mut reports = Vec::new();
    for kernel in &KERNELS {
        let text = fs::read(cache().join(kernel.suite).join(LOG)).unwrap_or_default();
        reports.push(Report::read(kernel.name, &String::from_utf8_lossy(&text)));
    }
    if reports.iter().all(Report::is_complete) {
        report::write_page(&host::workspace().join("docs/kernels.md"), &reports)?;
    }
    Ok(())
}

fn cache() -> PathBuf {
    host::workspace().join("target/kernels")
}

/// Boots a kernel and runs the tests on it. An error is of this machine; what fails in the guest is in the report.
fn run(kernel: &'static Kernel, args: &Args, built: &Built) -> Result<Report> {
    let dir = cache().join(kernel.suite);
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let unpacked = packages::fetch(kernel, &dir, args.update)?;
    let initramfs = dir.join("initramfs.cpio");
    let archive = file_system(&unpacked, built, &dir, args.filter.as_deref())?;
    let mut file = BufWriter::new(File::create(&initramfs).context("cannot write the guest's file system")?);
    archive.write(&mut file).context("cannot write the guest's file system")?;
    drop((archive, file));

    say(format!("kernel {}: booting {}", kernel.name, unpacked.release));
    let log = if args.filter.is_some() { "some-tests.log" } else { LOG };
    let (console, said) = (dir.join("console.log"), dir.join(log));
    let begin = Instant::now();
    let limit = Duration::from_secs(args.timeout);
    let echo = if args.verbose { machine::show } else { |_: &str| () };
    let end = machine::boot(&unpacked.image, &initramfs, (&console, &said), limit, echo)?;
    if !args.keep {
        fs::remove_file(&initramfs).context("cannot remove the guest's file system")?;
    }
    let text = fs::read(&said).with_context(|| format!("cannot read {}", said.display()))?;
    let mut report = Report::read(kernel.name, &String::from_utf8_lossy(&text));
    report.took = begin.elapsed();
    report.timed_out = end == End::TimedOut;
    for line in report.findings() {
        say(format!("kernel {}: {line}", kernel.name));
    }
    say(format!("kernel {}: {}", kernel.name, report.verdict()));
    Ok(report)
}

/// Everything that the guest has.
fn file_system(kernel: &Unpacked, built: &Built, scratch: &Path, filter: Option<&str>) -> Result<Archive> {
    let mut archive = Archive::default();
    for dir in ["proc", "sys", "dev", "tmp", "run", "root", "etc", "mnt"] {
        archive.dir(dir);
    }
    archive.link("var/run", "../run");
    let busybox = host::find("busybox").context("busybox is gone")?;
    archive.program(&busybox)?;
    let applets = process::output(Command::new(&busybox).arg("--list"))?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        archive.link(Path::new("bin").join(applet), &busybox);
    }
    for name in PROGRAMS {
        let path = host::find(name).with_context(|| format!("{name} is gone"))?;
        archive.program(&path)?;
        // busybox has its own idea of some.
        archive.link(Path::new("usr/local/bin").join(name), path);
    }
    // Its shell prefers its own commands to those on PATH.
    archive.link("bin/sh", "/usr/local/bin/bash");
    let tests: Result<Vec<&PathBuf>> = SUITES.iter().map(|suite| built.test(suite.name)).collect();
    for program in tests?.into_iter().chain([&built.agent, &built.xtask]) {
        archive.built(program, scratch)?;
    }
    archive.modules(kernel, &MODULES)?;
    archive.file("init", include_bytes!("guest.sh"));
    archive.file("suites", suites(built, filter)?);
    Ok(archive)
}

/// A line for each suite: tier and name, command line.
fn suites(built: &Built, filter: Option<&str>) -> Result<String> {
    let mut lines = String::new();
    for Suite { name, tier, only, harness } in &SUITES {
        let program = built.test(name)?;
        let filters: Vec<&str> = filter.map_or_else(|| only.to_vec(), |filter| vec![filter]);
        let _ = writeln!(lines, "{tier}:{name} {} {harness} {}", program.display(), filters.join(" "));
    }
    Ok(lines)
}
