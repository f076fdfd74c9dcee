//! Programs of others on the hooks that the agent uses.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;

use lb_common::maps::programs;

use super::Finding;
use crate::edges::{Role, Surveyed};
use crate::sys::bpf::{self, AttachType, Target};
use crate::sys::mount;

const CHECK: &str = "hooks";

/// Those on devices that would be edges.
pub(super) fn of_devices(devices: &[Surveyed]) -> Vec<Finding> {
    let mut findings = vec![];
    for Surveyed { device, role, .. } in devices {
        if !matches!(role, Role::External { .. } | Role::Pod) {
            continue;
        }
        let name = &device.name;
        for hook in [AttachType::TcxIngress, AttachType::TcxEgress] {
            // Kernels before 6.6 do not know it; others' filters of clsact come before or after ours as they like.
            for id in bpf::prog_query(Target::Device(device.ifindex), hook).unwrap_or_default() {
                if let Some(other) = other(id) {
                    let found = format!("{other} at {hook:?} of {name}");
                    findings.push(Finding::warn(CHECK, found, "it sees real addresses; see docs/node.md"));
                }
            }
        }
        if let Some(other) = device.xdp.as_ref().and_then(|observed| other(observed.prog_id))
            && matches!(role, Role::External { .. })
        {
            let found = format!("{other} at the XDP hook of {name}");
            findings.push(Finding::warn(
                CHECK,
                found,
                "the agent uses tc there; `ip link set DEVICE xdp off` frees it",
            ));
        }
    }
    findings
}

/// Those of sockets in the cgroup.
pub(super) fn of_sockets(root: Option<&Path>) -> Vec<Finding> {
    let Some(root) = root.map(Path::to_owned).or_else(|| mount::cgroup2_root().ok().flatten()) else {
        return vec![];
    };
    let Ok(cgroup) = File::open(&root) else { return vec![] };
    let ids = bpf::prog_query(Target::Cgroup(cgroup.as_fd()), AttachType::Inet4Connect).unwrap_or_default();
    let others = ids.into_iter().filter_map(other);
    others
        .map(|other| {
            let found = format!("{other} at connect() of {}", root.display());
            Finding::warn(CHECK, found, "if it translates Services, too, only one of both should")
        })
        .collect()
}

/// How to call a program that is not ours.
fn other(id: u32) -> Option<String> {
    let name = bpf::prog_by_id(id).and_then(|program| bpf::prog_info(program.as_fd())).map(|info| info.name);
    match name {
        Ok(name) if is_ours(&name) => None,
        Ok(name) => Some(format!("program {name:?} ({id})")),
        Err(_) => Some(format!("program {id}")),
    }
}

fn is_ours(name: &str) -> bool {
    use programs::{SOCKETS, TC_NIC_IN, TC_NIC_OUT, TC_POD_IN, TC_POD_OUT, XDP_NIC};
    [XDP_NIC, TC_NIC_IN, TC_NIC_OUT, TC_POD_IN, TC_POD_OUT].contains(&name) || SOCKETS.contains(&name)
}
