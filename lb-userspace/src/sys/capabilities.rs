//! What the kernel lets the agent do: the one list of capabilities it needs, and which of them this process
//! has. `deploy/` and docs/security.md say the same; tests compare them.

use std::fs;

/// A capability (capabilities(7)).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capability {
    /// As container runtimes write it, without `CAP_`.
    pub name: &'static str,
    /// What the agent does with it.
    pub why: &'static str,
    number: u32,
}

/// Everything `fairlead run` needs, whatever its settings; found by running it so
/// (`xtask/tests/nodes/confined.rs`).
pub const NEEDED: [Capability; 3] = [
    Capability { name: "BPF", why: "makes maps and loads programs", number: 39 },
    Capability {
        name: "NET_ADMIN",
        why: "attaches programs to devices and cgroups, and reserves source ports",
        number: 12,
    },
    Capability {
        name: "PERFMON",
        why: "its programs subtract packet pointers, which the verifier allows nobody else",
        number: 38,
    },
];

/// Needed in addition before 5.11 where locked memory is limited: maps count against that.
pub const BEFORE_5_11: &str = "SYS_RESOURCE";

/// Stands for `BPF` and `PERFMON` as before 5.8.
const SYS_ADMIN: u32 = 21;

/// Those of [`NEEDED`] that the calling thread does not have.
pub fn missing() -> Vec<Capability> {
    // Where it cannot be read, the first system call says it.
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    effective(&status).map(missing_of).unwrap_or_default()
}

/// Whether the calling thread may mount file systems.
pub fn may_mount() -> bool {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    effective(&status).is_some_and(|effective| effective & (1 << SYS_ADMIN) != 0)
}

/// `CAP_A, CAP_B`.
pub fn names(capabilities: &[Capability]) -> String {
    capabilities.iter().map(|capability| format!("CAP_{}", capability.name)).collect::<Vec<_>>().join(", ")
}

fn missing_of(effective: u64) -> Vec<Capability> {
    let has = |number: u32| effective & (1 << number) != 0;
    let admin = has(SYS_ADMIN);
    NEEDED
        .into_iter()
        .filter(|capability| !has(capability.number) && (!admin || capability.name == "NET_ADMIN"))
        .collect()
}

/// Of proc_pid_status(5).
fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let missing = |held: &[u32]| names(&missing_of(held.iter().map(|number| 1 << number).sum()));
        assert_eq!(missing(&[]), "CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON");
        assert_eq!(missing(&[12, 38, 39]), "");
        assert_eq!(missing(&[12, 39]), "CAP_PERFMON");
        assert_eq!(missing(&[12, 21]), "");
        assert_eq!(missing(&[21]), "CAP_NET_ADMIN");
    }

    #[test]
    fn the_kernel_tells_what_a_thread_has() {
        assert_eq!(effective("Name:\tx\nCapInh:\t0000000000000001\nCapEff:\t00000000000000ff\n"), Some(0xff));
        assert_eq!(effective("no such line"), None);
    }
}
