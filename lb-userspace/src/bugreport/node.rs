//! What this machine and its files say.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use nix::sys::utsname::uname;
use serde_json::Value;

use crate::datapath::node::StateFile;
use crate::inspect::Inspector;
use crate::sys::sysctl;

/// Settings of the kernel that change what becomes of packets, or of programs.
const SYSCTLS: [&str; 14] = [
    "kernel.unprivileged_bpf_disabled",
    "net.core.bpf_jit_enable",
    "net.core.bpf_jit_harden",
    "net.ipv4.conf.all.forwarding",
    "net.ipv4.conf.all.route_localnet",
    "net.ipv4.conf.all.rp_filter",
    "net.ipv4.conf.default.rp_filter",
    "net.ipv4.ip_forward",
    "net.ipv4.ip_local_port_range",
    sysctl::RESERVED_PORTS,
    "net.ipv4.ip_default_ttl",
    "net.ipv6.conf.all.disable_ipv6",
    "net.ipv6.conf.all.forwarding",
    "net.netfilter.nf_conntrack_max",
];

pub fn version() -> String {
    format!("fairlead {} ({})\n", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH)
}

pub fn kernel() -> Result<String> {
    let names = uname().context("cannot ask for the kernel")?;
    let names = [names.sysname(), names.release(), names.version(), names.machine()];
    let mut text = names.map(|name| name.to_string_lossy().into_owned()).join(" ") + "\n";
    // What this process may.
    let status = fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    for line in status.lines().filter(|line| line.starts_with("Cap") || line.starts_with("NoNewPrivs")) {
        let _ = writeln!(text, "{line}");
    }
    Ok(text)
}

pub fn sysctls() -> String {
    let mut text = String::new();
    for name in SYSCTLS {
        let value = sysctl::read(name).unwrap_or_else(|error| format!("[{error}]"));
        let _ = writeln!(text, "{name} = {value}");
    }
    text
}

/// The agent's process, as `fairlead status -o json` names it.
pub fn agent_of(status: &str) -> Option<u64> {
    serde_json::from_str::<Value>(status).ok()?["agent_pid"].as_u64()
}

/// What a running agent was told: its arguments, one to a line, and its file of settings. Never its environment.
pub fn settings(agent: Option<u64>) -> String {
    let Some(agent) = agent else { return "no agent runs\n".to_owned() };
    let line = match fs::read(format!("/proc/{agent}/cmdline")) {
        Ok(line) => line,
        Err(error) => {
            return format!("not collected: cannot read the arguments of process {agent}: {error}\n");
        }
    };
    let args: Vec<String> =
        line.split(|&byte| byte == 0).skip(1).map(|arg| String::from_utf8_lossy(arg).into_owned()).collect();
    let mut text = paired(&args);
    if let Some(path) = config_of(&args) {
        // As the agent sees it: its working directory and its root.
        let path = match path.strip_prefix('/') {
            Some(path) => format!("/proc/{agent}/root/{path}"),
            None => format!("/proc/{agent}/cwd/{path}"),
        };
        let file = fs::read_to_string(path).unwrap_or_else(|error| format!("not collected: {error}\n"));
        let _ = write!(text, "\n# --config\n{file}");
    }
    text
}

/// A flag and its value in one line.
fn paired(args: &[String]) -> String {
    let mut text = String::new();
    for arg in args.iter().filter(|arg| !arg.is_empty()) {
        let begins = arg.starts_with('-') || text.is_empty();
        text.push_str(match (text.is_empty(), begins) {
            (true, _) => "",
            (_, true) => "\n",
            (_, false) => " ",
        });
        text.push_str(arg);
    }
    text + "\n"
}

fn config_of(args: &[String]) -> Option<&str> {
    let value = || args.windows(2).find_map(|pair| (pair[0] == "--config").then(|| pair[1].as_str()));
    args.iter().find_map(|arg| arg.strip_prefix("--config=")).or_else(value)
}

/// What is pinned, by name.
pub fn pins(bpffs: &Path) -> Result<String> {
    let mut text = String::new();
    list(bpffs, &mut text).with_context(|| format!("cannot read {}", bpffs.display()))?;
    Ok(text)
}

fn list(dir: &Path, text: &mut String) -> std::io::Result<()> {
    let mut paths: Vec<_> =
        fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    paths.sort();
    for path in paths {
        let _ = writeln!(text, "{}", path.display());
        if path.is_dir() {
            list(&path, text)?;
        }
    }
    Ok(())
}

/// What `fairlead cleanup` would take back.
pub fn undo(bpffs: &Path) -> Result<String> {
    let state =
        StateFile::new(bpffs).read().context("nothing is noted, or not for this network namespace")?;
    Ok(serde_json::to_string_pretty(&state)? + "\n")
}

/// How many entries there are of each kind, and no address.
pub fn flows(bpffs: &Path) -> Result<String> {
    let mut tally: BTreeMap<_, u64> = BTreeMap::new();
    Inspector::open(bpffs)?.flows(|flow| {
        let part = if flow.reply { "reply" } else { "request" };
        let family = if flow.source.is_ipv4() { "IPv4" } else { "IPv6" };
        *tally.entry((family, flow.protocol, flow.side, part, flow.state, flow.carry)).or_default() += 1;
    })?;
    let mut text = "family, IP protocol, side, part, state, carry: entries\n".to_owned();
    for ((family, protocol, side, part, state, carry), entries) in tally {
        let _ = writeln!(text, "{family} {protocol} {side} {part} {state} {carry}: {entries}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn settings_have_a_line_each() {
        let args = words("run --device eth0 --xdp=off --takeover");
        assert_eq!(paired(&args), "run\n--device eth0\n--xdp=off\n--takeover\n");
        assert_eq!(config_of(&args), None);
        assert_eq!(config_of(&words("run --config /a.yaml")), Some("/a.yaml"));
        assert_eq!(config_of(&words("run --config=/a.yaml --x y")), Some("/a.yaml"));
    }

    #[test]
    fn the_environment_is_not_among_the_settings() {
        // Ourselves in place of an agent: the environment is full, the settings are arguments.
        let text = settings(Some(std::process::id().into()));
        assert!(!text.contains("PATH=") && !text.contains("CARGO"), "{text}");
        assert_eq!(settings(None), "no agent runs\n");
    }

    #[test]
    fn the_agent_is_who_the_status_names() {
        assert_eq!(agent_of(r#"{"agent_pid": 12}"#), Some(12));
        assert_eq!(agent_of(r#"{"agent_pid": null}"#), None);
        assert_eq!(agent_of("no datapath"), None);
    }
}
