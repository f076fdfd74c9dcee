//! What kube-proxy leaves on a node when it is gone, and taking that away with the node's own tools; as
//! `kube-proxy --cleanup` does, for all of its modes.

mod iptables;

use std::fs;
use std::io::{self, Write as _};
use std::process::{Command, Stdio};

use nix::net::if_::if_nametoindex;

/// The tables of nftables mode.
const NFTABLES: [&str; 2] = ["table ip kube-proxy", "table ip6 kube-proxy"];

/// The device of IPVS mode, which carries the addresses of all Services.
const IPVS_DEVICE: &str = "kube-ipvs0";

/// Seconds that iptables waits for its lock.
const LOCK_SECONDS: &str = "--wait=30";

/// kube-proxy's rules cannot be removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("kube-proxy is running (process {0}) and would write its rules again; stop it first")]
    Running(u32),
    #[error("cannot run {program}: {source}")]
    Start { program: String, source: io::Error },
    #[error("{program}: {message}")]
    Failed { program: String, message: String },
    #[error("neither iptables nor nft is installed here; run this where one of them is")]
    NoTools,
    #[error("device {IPVS_DEVICE}: {0}")]
    Device(io::Error),
}

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Leftovers {
    /// What was removed, or would be, a line each.
    pub removed: Vec<String>,
    /// What somebody should know besides, a line each.
    pub notes: Vec<String>,
}

/// Removes what kube-proxy has left in the network namespace of the caller, or only says what that is.
pub async fn cleanup(dry_run: bool) -> Result<Leftovers, Error> {
    if let (Some(process), false) = (running(), dry_run) {
        return Err(Error::Running(process));
    }
    let mut found = Leftovers::default();
    let tools: Vec<Tool> = ["iptables", "ip6tables"].into_iter().flat_map(Tool::installed).collect();
    for tool in &tools {
        tool.clean(dry_run, &mut found)?;
    }
    let has_nft = is_installed("nft");
    if has_nft {
        clean_nftables(dry_run, &mut found)?;
    }
    if tools.is_empty() && !has_nft {
        return Err(Error::NoTools);
    }
    for (there, tool) in [(!tools.is_empty(), "iptables"), (has_nft, "nft")] {
        if !there {
            found.notes.push(format!("{tool} is not installed: its rules were not looked for"));
        }
    }
    clean_ipvs(dry_run, &mut found).await?;
    Ok(found)
}

/// A process called kube-proxy in the caller's network namespace.
pub fn running() -> Option<u32> {
    let here = fs::read_link("/proc/thread-self/ns/net").ok()?;
    let processes = fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path());
    processes
        .filter(|path| {
            fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim_end() == "kube-proxy")
        })
        .filter(|path| fs::read_link(path.join("ns/net")).is_ok_and(|there| there == here))
        .find_map(|path| path.file_name()?.to_str()?.parse().ok())
}

/// One of the iptables: for a family and, where the node has both, for a kind of rules.
struct Tool {
    save: String,
    restore: String,
}

impl Tool {
    /// Those for a family. Rules of the two kinds do not see each other.
    fn installed(family: &str) -> Vec<Self> {
        let tool = |kind: &str| Self {
            save: format!("{family}{kind}-save"),
            restore: format!("{family}{kind}-restore"),
        };
        let mut tools: Vec<Self> = ["-legacy", "-nft"].map(tool).into();
        tools.retain(Self::is_installed);
        if tools.is_empty() {
            tools.push(tool(""));
            tools.retain(Self::is_installed);
        }
        tools
    }

    fn is_installed(&self) -> bool {
        is_installed(&self.save) && is_installed(&self.restore)
    }

    fn clean(&self, dry_run: bool, found: &mut Leftovers) -> Result<(), Error> {
        let plan = iptables::plan(&run(&self.save, &[], "")?);
        if !plan.script.is_empty() && !dry_run {
            run(&self.restore, &["--noflush", LOCK_SECONDS], &plan.script)?;
        }
        let with = self.save.trim_end_matches("-save");
        found.removed.extend(plan.removes.iter().map(|line| format!("{line} ({with})")));
        found.notes.extend(plan.leaves.iter().map(|line| format!("left alone: {line} ({with})")));
        Ok(())
    }
}

fn clean_nftables(dry_run: bool, found: &mut Leftovers) -> Result<(), Error> {
    let tables = run("nft", &["list", "tables"], "")?;
    let ours: Vec<&str> = tables.lines().filter(|line| NFTABLES.contains(line)).collect();
    if !ours.is_empty() && !dry_run {
        let script: String = ours.iter().flat_map(|table| ["delete ", table, "\n"]).collect();
        run("nft", &["-f", "-"], &script)?;
    }
    found.removed.extend(ours.iter().map(|table| format!("{table} (nft)")));
    Ok(())
}

/// IPVS itself is not told from other users of it.
async fn clean_ipvs(dry_run: bool, found: &mut Leftovers) -> Result<(), Error> {
    if let Ok(index) = if_nametoindex(IPVS_DEVICE) {
        if !dry_run {
            let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::Device)?;
            let connection = tokio::spawn(connection);
            let deleted = handle.link().del(index).execute().await;
            connection.abort();
            deleted.map_err(|error| Error::Device(io::Error::other(error)))?;
        }
        found.removed.push(format!("device {IPVS_DEVICE}"));
    }
    // Two lines of it are a heading of columns, one is the version.
    let servers = fs::read_to_string("/proc/thread-self/net/ip_vs").unwrap_or_default();
    if servers.lines().count() > 3 {
        found.notes.push(
            "there are IPVS services; if they are kube-proxy's, run `ipvsadm --clear` and destroy the sets KUBE-* \
             (`ipset list -n`)"
                .to_owned(),
        );
    }
    Ok(())
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Runs a tool; what it prints.
fn run(program: &str, args: &[&str], input: &str) -> Result<String, Error> {
    let start = |source| Error::Start { program: program.to_owned(), source };
    let mut child = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(start)?;
    if let Some(mut stdin) = child.stdin.take() {
        // Whoever does not read to the end says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(start)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::Failed { program: program.to_owned(), message })
}
