//! What this kernel can do, found out by trying, once.

use std::io;
use std::os::fd::AsFd;

use aya::Btf;
use aya_obj::btf::BtfKind;

use crate::sys::bpf::{self, AttachType, Insn, ProgType, Target, TestRunInput};

/// What this kernel can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts about the kernel")]
pub struct Features {
    /// `bpf_set_retval` for socket hooks (5.18): `connect()` fails with `ECONNREFUSED`, not `EPERM`.
    pub set_retval: bool,
    /// `bpf_ktime_get_coarse_ns` (5.11): a cheaper clock.
    pub coarse_clock: bool,
    /// `BPF_F_IPV6` of `bpf_l4_csum_replace` (6.16): partial IPv6 checksums stay right.
    pub csum_ipv6: bool,
    /// `bpf_check_mtu` (5.12): it came with a `bpf_fib_lookup` that compares lengths at tc, too, before packets are
    /// tunnelled.
    pub checks_mtu: bool,
    /// tcx links (6.6); otherwise clsact.
    pub tcx: bool,
    /// Programs that walk over the flow tables (5.9), where no policy keeps them out: flows that are over are removed inside the
    /// kernel.
    pub kernel_sweep: bool,
}

impl Features {
    /// Tries each feature. A probe that fails for another reason than absence counts as absent.
    pub fn probe() -> Self {
        Self {
            set_retval: has("set_retval", set_retval()),
            coarse_clock: has("coarse_clock", coarse_clock()),
            csum_ipv6: has("csum_ipv6", csum_ipv6()),
            checks_mtu: has("checks_mtu", checks_mtu()),
            tcx: has("tcx", tcx()),
            kernel_sweep: has("kernel_sweep", kernel_sweep()),
        }
    }

    /// Every feature with its name, for logs and metrics.
    pub fn named(&self) -> [(&'static str, bool); 6] {
        [
            ("set_retval", self.set_retval),
            ("coarse_clock", self.coarse_clock),
            ("csum_ipv6", self.csum_ipv6),
            ("checks_mtu", self.checks_mtu),
            ("tcx", self.tcx),
            ("kernel_sweep", self.kernel_sweep),
        ]
    }
}

fn has(name: &str, probe: io::Result<bool>) -> bool {
    probe.unwrap_or_else(|error| {
        tracing::warn!(feature = name, %error, "cannot tell whether the kernel has it; doing without");
        false
    })
}

fn set_retval() -> io::Result<bool> {
    const BPF_SET_RETVAL: i32 = 187;
    let insns = [mov(R1, 0), call(BPF_SET_RETVAL), mov(R0, 1), EXIT];
    loads(bpf::prog_load(ProgType::CgroupSockAddr, Some(AttachType::Inet4Connect), &insns))
}

/// Iterators are programs that trace: a security module may refuse all of these (`EPERM`).
fn kernel_sweep() -> io::Result<bool> {
    let btf = Btf::from_sys_fs().map_err(io::Error::other)?;
    let Ok(function) = btf.id_by_type_name_kind("bpf_iter_bpf_map_elem", BtfKind::Func) else {
        return Ok(false);
    };
    match bpf::prog_load_iterator(function, &[mov(R0, 0), EXIT]) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            tracing::info!(%error, "the kernel lets no iterator in");
            Ok(false)
        }
        result => loads(result),
    }
}

fn coarse_clock() -> io::Result<bool> {
    const BPF_KTIME_GET_COARSE_NS: i32 = 160;
    let insns = [call(BPF_KTIME_GET_COARSE_NS), mov(R0, 0), EXIT];
    loads(bpf::prog_load(ProgType::SchedCls, None, &insns))
}

fn checks_mtu() -> io::Result<bool> {
    const BPF_CHECK_MTU: i32 = 163;
    // On the stack, for the MTU.
    let word = Insn { code: 0x62, regs: 10, off: -4, imm: 0 };
    let frame = Insn { code: 0xbf, regs: R3 | 10 << 4, off: 0, imm: 0 };
    let place = Insn { code: 0x07, regs: R3, off: 0, imm: -4 };
    // The context is in R1 already.
    let call =
        [mov(R2, 1), word, frame, place, mov(R4, 0), mov(R5, 0), call(BPF_CHECK_MTU), mov(R0, 0), EXIT];
    loads(bpf::prog_load(ProgType::SchedCls, None, &call))
}

/// Flags are checked when the helper runs, not when it is verified, and before its other arguments: an
/// odd offset gives `EFAULT` where the flag is known and `EINVAL` where it is not.
fn csum_ipv6() -> io::Result<bool> {
    const BPF_L4_CSUM_REPLACE: i32 = 11;
    const BPF_F_IPV6: i32 = 1 << 7;
    // The context is in R1 already.
    let insns = [mov(R2, 1), mov(R3, 0), mov(R4, 0), mov(R5, BPF_F_IPV6), call(BPF_L4_CSUM_REPLACE), EXIT];
    let prog = bpf::prog_load(ProgType::SchedCls, None, &insns)?;
    let run = bpf::prog_test_run(prog.as_fd(), TestRunInput { data: &[0; 64], ..TestRunInput::default() })?;
    Ok(run.retval == (-libc::EFAULT).cast_unsigned())
}

fn tcx() -> io::Result<bool> {
    // Every namespace has its loopback device at 1.
    match bpf::prog_query(Target::Device(1), AttachType::TcxIngress) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        // Nothing is attached there.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(true),
        Err(error) => Err(error),
    }
}

fn loads<T>(result: io::Result<T>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(error) => Err(error),
    }
}

const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const R4: u8 = 4;
const R5: u8 = 5;
const EXIT: Insn = Insn { code: 0x95, regs: 0, off: 0, imm: 0 };

/// `BPF_ALU64 | BPF_MOV | BPF_K`
fn mov(register: u8, value: i32) -> Insn {
    Insn { code: 0xb7, regs: register, off: 0, imm: value }
}

/// `BPF_JMP | BPF_CALL`
fn call(helper: i32) -> Insn {
    Insn { code: 0x85, regs: 0, off: 0, imm: helper }
}
