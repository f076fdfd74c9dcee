//! Whether a node can run the agent: what the kernel has, what the process may, what is mounted, and who else is
//! there. Nothing is changed.

mod hooks;

use std::fmt;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::datapath::node;
use crate::edges::{Role, Rules, Surveyed, survey};
use crate::kube_proxy;
use crate::sys::bpf::{self, Insn, ProgType};
use crate::sys::{capabilities, kernel, mount};

/// What the agent would be told.
#[derive(Clone, Debug)]
pub struct Node {
    pub bpffs: PathBuf,
    pub cgroup_root: Option<PathBuf>,
    pub rules: Rules,
}

/// How bad something is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Ok,
    /// The agent runs; somebody should know.
    Warn,
    /// The agent does not run.
    Fail,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        })
    }
}

/// What was looked at and found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    pub check: &'static str,
    pub state: State,
    pub found: String,
    /// What to do.
    pub fix: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, state: State::Ok, found: found.into(), fix: None }
    }

    fn warn(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, state: State::Warn, found: found.into(), fix: Some(fix.into()) }
    }

    fn fail(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, state: State::Fail, found: found.into(), fix: Some(fix.into()) }
    }
}

/// The oldest kernel that is supported.
const OLDEST: (u32, u32) = (5, 10);

/// Looks at everything.
pub async fn look(node: &Node) -> Vec<Finding> {
    let mut findings = vec![
        kernel_version(kernel::release()),
        btf(),
        capabilities_held(),
        jit(),
        bpffs(&node.bpffs),
        cgroup2(node.cgroup_root.as_deref()),
    ];
    findings.extend(forwarding());
    match survey(&node.rules).await {
        Ok(devices) => {
            findings.extend(edges(&devices));
            findings.extend(hooks::of_devices(&devices));
        }
        Err(error) => findings.push(Finding::fail("devices", error.to_string(), "run it as root")),
    }
    findings.extend(hooks::of_sockets(node.cgroup_root.as_deref()));
    findings.extend(of_kube_proxy().await);
    findings
}

fn kernel_version(release: Option<(u32, u32)>) -> Finding {
    const CHECK: &str = "kernel";
    match release {
        Some((major, minor)) if (major, minor) < OLDEST => Finding::fail(
            CHECK,
            format!("{major}.{minor}"),
            format!("use {}.{} or newer", OLDEST.0, OLDEST.1),
        ),
        Some((major, minor)) => Finding::ok(CHECK, format!("{major}.{minor}")),
        None => Finding::warn(CHECK, "its version cannot be read", "compare `uname -r` with docs/kernels.md"),
    }
}

fn btf() -> Finding {
    const PATH: &str = "/sys/kernel/btf/vmlinux";
    if Path::new(PATH).exists() {
        Finding::ok("btf", PATH)
    } else {
        Finding::fail("btf", format!("no {PATH}"), "use a kernel built with CONFIG_DEBUG_INFO_BTF=y")
    }
}

fn capabilities_held() -> Finding {
    let missing = capabilities::missing();
    if missing.is_empty() {
        return Finding::ok("capabilities", capabilities::names(&capabilities::NEEDED));
    }
    let why: Vec<_> = missing.iter().map(|one| format!("CAP_{} missing ({})", one.name, one.why)).collect();
    Finding::fail("capabilities", why.join(", "), "run as root, or give the process these capabilities")
}

/// By the native code of a program of two instructions: the setting is shown in the first namespace alone.
fn jit() -> Finding {
    let insns = [Insn { code: 0xb7, regs: 0, off: 0, imm: 0 }, Insn { code: 0x95, regs: 0, off: 0, imm: 0 }];
    let loaded = bpf::prog_load(ProgType::SchedCls, None, &insns);
    match loaded.and_then(|program| bpf::prog_info(program.as_fd())) {
        Ok(info) if info.jited_len > 0 => Finding::ok("jit", "programs are native code"),
        Ok(_) => Finding::warn(
            "jit",
            "programs are interpreted: slow",
            "run `sysctl -w net.core.bpf_jit_enable=1`",
        ),
        Err(error) => {
            Finding::fail("jit", format!("no program can be loaded: {error}"), "see `capabilities`")
        }
    }
}

fn bpffs(path: &Path) -> Finding {
    const CHECK: &str = "bpffs";
    const FIX: &str = "run `mount -t bpf bpf /sys/fs/bpf`";
    let existing = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    match mount::is_bpffs(existing) {
        Ok(true) => Finding::ok(CHECK, path.display().to_string()),
        Ok(false) if path.starts_with(mount::BPFFS) && capabilities::may_mount() => {
            Finding::warn(CHECK, format!("none at {}: the agent mounts one", mount::BPFFS), FIX)
        }
        Ok(false) => Finding::fail(CHECK, format!("{} is not on one", path.display()), FIX),
        Err(error) => Finding::fail(CHECK, format!("{}: {error}", existing.display()), FIX),
    }
}

fn cgroup2(given: Option<&Path>) -> Finding {
    const CHECK: &str = "cgroup2";
    const FIX: &str = "mount one, name it with --cgroup-root, or run with --socket-lb=off";
    match (given, mount::cgroup2_root()) {
        (Some(path), _) if mount::is_cgroup2(path).unwrap_or(false) => {
            Finding::ok(CHECK, path.display().to_string())
        }
        (Some(path), _) => Finding::fail(CHECK, format!("{} is not in one", path.display()), FIX),
        (None, Ok(Some(path))) => Finding::ok(CHECK, path.display().to_string()),
        (None, Ok(None)) => Finding::fail(CHECK, "none is mounted", FIX),
        (None, Err(error)) => Finding::fail(CHECK, error.to_string(), FIX),
    }
}

fn forwarding() -> Vec<Finding> {
    let warnings = node::forwarding_warnings();
    if warnings.is_empty() {
        return vec![Finding::ok("forwarding", "IPv4 and IPv6")];
    }
    let warning = |text: String| match text.split_once("; ") {
        Some((found, fix)) => Finding::warn("forwarding", found, fix),
        None => Finding::warn("forwarding", text, "see the agent's log"),
    };
    warnings.into_iter().map(warning).collect()
}

/// Where clients outside come in, and whether XDP runs there.
fn edges(devices: &[Surveyed]) -> Vec<Finding> {
    let external = devices.iter().filter(|surveyed| matches!(surveyed.role, Role::External { .. }));
    let found: Vec<Finding> = external
        .map(|surveyed| {
            let name = &surveyed.device.name;
            Finding::ok(
                "device",
                match surveyed.native_xdp {
                    _ if surveyed.device.kind == "veth" => format!("{name}: by tc, as every veth"),
                    Some(true) => format!("{name}: by XDP in its driver"),
                    Some(false) => format!("{name}: by tc, its driver has no XDP"),
                    None => format!("{name}: by XDP if its driver has it, else by tc"),
                },
            )
        })
        .collect();
    if found.is_empty() {
        let none = "no device with an address that others can reach: clients outside are not served";
        return vec![Finding::warn("device", none, "name one with --device")];
    }
    found
}

async fn of_kube_proxy() -> Vec<Finding> {
    const CHECK: &str = "kube-proxy";
    if let Some(process) = kube_proxy::running() {
        let found = format!("it runs (process {process})");
        let fix = "start the agent with --takeover, then stop it: docs/node.md; it has port 10256";
        return vec![Finding::warn(CHECK, found, fix)];
    }
    match kube_proxy::cleanup(true).await {
        Ok(left) if left.removed.is_empty() => vec![Finding::ok(CHECK, "neither it nor rules of it")],
        Ok(left) => {
            let found = format!("{} rules, chains and tables of it are left", left.removed.len());
            vec![Finding::warn(CHECK, found, "run `fairlead cleanup --kube-proxy`")]
        }
        Err(kube_proxy::Error::NoTools) => {
            vec![Finding::ok(CHECK, "does not run; without iptables and nft its rules cannot be seen")]
        }
        Err(error) => {
            vec![Finding::warn(CHECK, error.to_string(), "look with `iptables-save` and `nft list tables`")]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edges::Device;

    #[test]
    fn old_kernels_are_refused() {
        let state = |release| kernel_version(release).state;
        assert_eq!(state(Some((5, 9))), State::Fail);
        assert_eq!(state(Some((5, 10))), State::Ok);
        assert_eq!(state(Some((6, 1))), State::Ok);
        assert_eq!(state(None), State::Warn);
    }

    #[test]
    fn pins_elsewhere_are_refused() {
        let finding = bpffs(Path::new("/tmp/fairlead"));
        assert_eq!((finding.state, finding.found.as_str()), (State::Fail, "/tmp/fairlead is not on one"));
        assert_eq!(finding.fix.as_deref(), Some("run `mount -t bpf bpf /sys/fs/bpf`"));
        assert_eq!(cgroup2(Some(Path::new("/tmp"))).state, State::Fail);
    }

    #[test]
    fn each_external_edge_is_told() {
        let external = Role::External { addr4: [192, 0, 2, 1].into(), addr6: [0; 16].into() };
        let surveyed = |name: &str, kind: &str, role, native_xdp| Surveyed {
            device: Device { name: name.into(), kind: kind.into(), ..Device::default() },
            role,
            native_xdp,
        };
        let devices = [
            surveyed("eth0", "", external, Some(true)),
            surveyed("eth1", "veth", external, Some(true)),
            surveyed("eth2", "", external, None),
            surveyed("cali1", "veth", Role::Pod, Some(true)),
        ];
        let found: Vec<String> = edges(&devices).into_iter().map(|finding| finding.found).collect();
        assert_eq!(
            found,
            [
                "eth0: by XDP in its driver",
                "eth1: by tc, as every veth",
                "eth2: by XDP if its driver has it, else by tc"
            ]
        );
        assert_eq!(edges(&devices[3..])[0].state, State::Warn);
    }
}
