//! What tests and demo need of the machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::host;
use crate::process::{self, say};

/// A program, and the package that has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tool {
    pub program: &'static str,
    pub package: &'static str,
}

/// What the network lab and the tests call.
pub const TOOLS: [Tool; 7] = [
    Tool { program: "ip", package: "iproute2" },
    Tool { program: "bpftool", package: "bpftool" },
    Tool { program: "ethtool", package: "ethtool" },
    Tool { program: "tcpdump", package: "tcpdump" },
    Tool { program: "nft", package: "nftables" },
    Tool { program: "iptables", package: "iptables" },
    Tool { program: "crun", package: "crun" },
];

/// Where bpffs belongs.
pub const BPFFS: &str = "/sys/fs/bpf";

/// Installs those of `tools` that are missing.
pub fn tools(tools: &[Tool]) -> Result<()> {
    let missing = missing(tools, |program| host::find(program).is_some());
    if missing.is_empty() {
        return Ok(());
    }
    if !host::has_apt() {
        bail!("missing here; install the packages that have them: {}", missing.join(" "));
    }
    if !host::is_root() {
        bail!("missing here; run: {}", host::apt_line(&missing, false));
    }
    if missing.iter().any(|package| host::apt_candidate(package).is_none()) {
        host::apt_update()?;
    }
    host::apt_install(&missing)
}

fn missing(tools: &[Tool], is_there: impl Fn(&str) -> bool) -> Vec<String> {
    let missing = tools.iter().filter(|tool| !is_there(tool.program));
    missing.map(|tool| tool.package.to_owned()).collect()
}

/// bpffs at [`BPFFS`]: mounted where it was not, and unmounted again when this is dropped.
#[derive(Debug)]
pub struct Bpffs {
    ours: bool,
}

impl Bpffs {
    pub fn ready() -> Result<Self> {
        if is_mounted(&mounts()?, "bpf", Path::new(BPFFS)) {
            return Ok(Self { ours: false });
        }
        say(format!("mounting bpffs at {BPFFS} until the end"));
        process::run(host::as_root("mount")?.args(["-t", "bpf", "bpf", BPFFS]))?;
        Ok(Self { ours: true })
    }
}

impl Bpffs {
    /// Whether it was not mounted before.
    pub fn is_ours(&self) -> bool {
        self.ours
    }

    /// What dropping it does if it is ours.
    pub fn unmount() {
        if let Err(error) = host::as_root("umount").and_then(|mut umount| process::run(umount.arg(BPFFS))) {
            say(format!("{BPFFS} stays mounted: {error:#}"));
        }
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        if self.ours {
            Self::unmount();
        }
    }
}

/// Where the cgroup2 hierarchy is mounted.
pub fn cgroup2() -> Result<PathBuf> {
    cgroup2_in(&mounts()?).context(
        "no cgroup2 hierarchy is mounted; run: mount -t cgroup2 cgroup2 /sys/fs/cgroup (or boot with systemd's \
         unified hierarchy)",
    )
}

fn mounts() -> Result<String> {
    fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")
}

/// (directory, type) of each line of /proc/self/mounts.
fn parse(mounts: &str) -> impl Iterator<Item = (&Path, &str)> {
    mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        Some((Path::new(fields.next()?), fields.next()?))
    })
}

fn is_mounted(mounts: &str, kind: &str, dir: &Path) -> bool {
    parse(mounts).any(|mount| mount == (dir, kind))
}

fn cgroup2_in(mounts: &str) -> Option<PathBuf> {
    parse(mounts).find(|(_, kind)| *kind == "cgroup2").map(|(dir, _)| dir.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "proc /proc proc rw,relatime 0 0\n\
                          tmpfs /sys/fs/cgroup tmpfs rw,relatime,mode=755 0 0\n\
                          cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu 0 0\n\
                          cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
    const UNIFIED: &str = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,nodev,noexec,relatime 0 0\n\
                           none /sys/fs/bpf bpf rw,nosuid,nodev,noexec,relatime,mode=700 0 0\n";

    #[test]
    fn the_cgroup2_hierarchy_is_found_wherever_it_is() {
        assert_eq!(cgroup2_in(HYBRID), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(cgroup2_in(UNIFIED), Some("/sys/fs/cgroup".into()));
        assert_eq!(cgroup2_in(""), None);
    }

    #[test]
    fn a_mounted_bpffs_is_seen() {
        assert!(is_mounted(UNIFIED, "bpf", Path::new(BPFFS)));
        assert!(!is_mounted(HYBRID, "bpf", Path::new(BPFFS)));
        assert!(!is_mounted(UNIFIED, "bpf", Path::new("/sys/fs/bpf/deeper")));
    }

    #[test]
    fn only_what_is_missing_is_installed() {
        assert_eq!(
            missing(&TOOLS, |program| program != "ip" && program != "tcpdump"),
            ["iproute2", "tcpdump"]
        );
        assert!(missing(&TOOLS, |_| true).is_empty());
    }
}
