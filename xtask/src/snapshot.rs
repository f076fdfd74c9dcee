//! What tests could leave behind on the machine: everything they create, by name or number, one line each.
//!
//! Taken before and after, the difference is what was left. It has to be looked at as root; who is not root
//! asks sudo to run the hidden subcommand, which prints the lines.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::setup::{self, BPFFS};
use crate::{host, process};

/// Environment variable that marks every process that a test run starts, however far down.
pub const MARK: &str = "FAIRLEAD_TEST_RUN";

/// How the line of a process begins.
pub const PROCESS: &str = "process ";

/// Settings of the node that the agent changes.
const SYSCTLS: [&str; 4] = [
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_reserved_ports",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv6/conf/all/forwarding",
];

/// Print what tests could leave behind on this machine.
#[derive(clap::Args)]
pub struct Args {
    /// The test run whose processes are meant
    run: String,
    /// Send its processes this signal instead
    #[arg(long)]
    signal: Option<Signal>,
}

/// The subcommand: for what only root can see and do.
pub fn command(args: &Args) -> Result<()> {
    match args.signal {
        Some(signal) => send(&args.run, signal),
        None => look(&args.run)?.iter().for_each(|line| println!("{line}")),
    }
    Ok(())
}

/// What is there now.
pub fn take(run: &str) -> Result<BTreeSet<String>> {
    if host::is_root() {
        return look(run);
    }
    let lines = process::output(ourselves_as_root()?.arg(run))?;
    Ok(lines.lines().map(str::to_owned).collect())
}

/// Sends a signal to every process of a test run.
pub fn signal(run: &str, signal: Signal) -> Result<()> {
    if host::is_root() {
        send(run, signal);
        return Ok(());
    }
    process::run(ourselves_as_root()?.args([run, "--signal", signal.as_str()]))
}

fn ourselves_as_root() -> Result<Command> {
    let ourselves = env::current_exe().context("cannot tell which program this is")?;
    let mut command = host::as_root(&ourselves.to_string_lossy())?;
    command.arg("snapshot");
    Ok(command)
}

fn look(run: &str) -> Result<BTreeSet<String>> {
    let mut seen = BTreeSet::new();
    seen.extend(names("/run/netns").into_iter().map(|name| format!("network namespace {name}")));
    seen.extend(names("/sys/class/net").into_iter().map(|name| format!("network interface {name}")));
    seen.extend(names("/run/fairlead-lab").into_iter().map(|name| format!("network lab {name}")));
    for (kind, title) in [("prog", "BPF program"), ("map", "BPF map"), ("link", "BPF link")] {
        let list = process::output(host::as_root("bpftool")?.args([kind, "list"]))?;
        seen.extend(heads(&list).into_iter().map(|head| format!("{title} {head}")));
    }
    below(Path::new(BPFFS), &mut |path| {
        seen.insert(format!("pin {}", path.display()));
    });
    if let Ok(root) = setup::cgroup2() {
        cgroups(&root, &mut |path| {
            seen.insert(format!("cgroup {}", path.display()));
        });
    }
    let qdiscs = process::output(host::as_root("tc")?.args(["qdisc", "show"]))?;
    seen.extend(qdiscs.lines().filter(|line| line.contains("clsact")).map(|line| line.trim().to_owned()));
    for name in SYSCTLS {
        if let Ok(value) = fs::read_to_string(Path::new("/proc/sys").join(name)) {
            seen.insert(format!("sysctl {name} = {}", value.trim()));
        }
    }
    seen.extend(processes(run).into_iter().map(|(pid, name)| format!("{PROCESS}{pid} ({name})")));
    Ok(seen)
}

/// Numbers and names of the processes that carry the run's [`MARK`].
fn processes(run: &str) -> Vec<(i32, String)> {
    let mark = format!("{MARK}={run}");
    let pids = names("/proc").into_iter().filter_map(|name| name.parse::<i32>().ok());
    let marked = pids.filter(|pid| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    });
    marked
        .map(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            (pid, name.trim_end().to_owned())
        })
        .collect()
}

/// The first lines of the paragraphs that bpftool prints, without what changes from call to call.
fn heads(list: &str) -> Vec<String> {
    // systemd has programs of its own, which come and go with its units; bpftool uses one to list them.
    let foreign = ["name sd_", "name pid_iter", "name libbpf_"];
    list.lines()
        .filter(|line| line.starts_with(|c: char| c.is_ascii_digit()))
        .filter(|line| !foreign.iter().any(|name| line.contains(name)))
        .map(|line| line.split("  tag ").next().unwrap_or(line).trim().to_owned())
        .collect()
}

fn names(dir: impl AsRef<Path>) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn below(dir: &Path, found: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        found(&entry.path());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            below(&entry.path(), found);
        }
    }
}

/// Groups that no service manager made: units come and go while tests run.
fn cgroups(dir: &Path, found: &mut dyn FnMut(&Path)) {
    for name in names(dir) {
        let path = dir.join(&name);
        if path.is_dir() && !is_unit(&name) {
            found(&path);
            cgroups(&path, found);
        }
    }
}

fn is_unit(name: &str) -> bool {
    let kind = name.rsplit_once('.').map(|(_, kind)| kind);
    kind.is_some_and(|kind| ["mount", "scope", "service", "slice", "socket", "swap"].contains(&kind))
}

fn send(run: &str, signal: Signal) {
    for (pid, _) in processes(run) {
        // It may have ended on its own meanwhile.
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn bpftools_lists_are_cut_to_what_names_an_object() {
        let list = "37: xdp  name xdp_nic  tag 3b185187f1855c4c  gpl\n\
                    \tloaded_at 2026-11-21T05:51:24+0000  uid 0\n\
                    \txlated 16B  jited 27B  memlock 4096B\n\
                    38: cgroup_device  name sd_devices  tag 3650d9673c54ce30  gpl\n\
                    39: tracing  name pid_iter  tag 1234567890abcdef  gpl\n";
        assert_eq!(heads(list), ["37: xdp  name xdp_nic"]);
        assert_eq!(
            heads("4: hash  name SERVICES4  flags 0x1\n\tkey 8B  value 24B\n"),
            ["4: hash  name SERVICES4  flags 0x1"]
        );
        assert!(heads("").is_empty());
    }

    #[test]
    fn units_of_the_service_manager_are_told_from_our_groups() {
        assert!(is_unit("system.slice") && is_unit("user@1000.service") && is_unit("session-3.scope"));
        assert!(!is_unit("fairlead-demo") && !is_unit("node1"));
    }

    #[test]
    fn processes_of_a_run_are_found_and_ended() {
        let run = format!("unit-test-{}", std::process::id());
        let mut child = Command::new("sleep").arg("60").env(MARK, &run).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        // It carries our environment until it has become `sleep`.
        let found = (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            processes(&run) == [(pid, "sleep".to_owned())]
        });
        send("another run", Signal::SIGTERM);
        let survived = child.try_wait().unwrap().is_none();
        send(&run, Signal::SIGKILL);
        let status = child.wait().unwrap();
        assert!(found && survived && !status.success(), "{found} {survived} {status}");
        assert!(processes(&run).is_empty());
    }
}
