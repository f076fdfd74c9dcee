//! Programs that are on no hook: two instructions stand in for each of them, because the verifier takes most of a start, and what
//! it reads serves nobody.

use std::io;
use std::os::fd::OwnedFd;

use lb_common::maps::programs;

use super::hooks::SOCKET_PROGRAMS;
use crate::sys::bpf::{self, AttachType, Insn, ProgType};

/// `XDP_PASS`
const XDP_PASS: i32 = 2;
/// `TC_ACT_UNSPEC`, which is also tcx's `TCX_NEXT`.
const TC_NEXT: i32 = -1;
/// The system call goes on.
const PROCEED: i32 = 1;

/// Kinds of programs that will be on no hook. They can be put on one all the same, and let everything pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Idle {
    /// `--xdp=off`
    pub xdp: bool,
    /// No agent does without them.
    pub tc: bool,
    /// `--socket-lb=off`
    pub sockets: bool,
}

impl Idle {
    /// For tests of what is around the programs.
    pub const ALL: Self = Self { xdp: true, tc: true, sockets: true };

    /// What stands in for a program; `None`: it has to serve.
    pub(super) fn stand_in(self, name: &str) -> Option<io::Result<OwnedFd>> {
        let socket = SOCKET_PROGRAMS.into_iter().find(|(program, _)| *program == name);
        let (is_idle, kind, attach_type, passes) = match (name, socket) {
            (_, Some((_, attach_type))) => {
                (self.sockets, ProgType::CgroupSockAddr, Some(attach_type), PROCEED)
            }
            (programs::XDP_NIC, _) => (self.xdp, ProgType::Xdp, Some(AttachType::Xdp), XDP_PASS),
            _ => (self.tc, ProgType::SchedCls, None, TC_NEXT),
        };
        is_idle.then(|| bpf::prog_load_named(name, kind, attach_type, &answer(passes)))
    }
}

/// A program with one result.
const fn answer(result: i32) -> [Insn; 2] {
    [
        // r0 = result
        Insn { code: 0xb7, regs: 0, off: 0, imm: result },
        // exit
        Insn { code: 0x95, regs: 0, off: 0, imm: 0 },
    ]
}
