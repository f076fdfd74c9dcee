//! Programs: what the kernel says about them, probes, and runs on packets of ours.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use super::{AttachType, Command, IdAttr, address, bpf, bpf_fd, fd_number, length, object_info};

/// `enum bpf_prog_type`: the kinds we probe and measure with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum ProgType {
    SchedCls = 3,
    Xdp = 6,
    CgroupSockAddr = 18,
    Tracing = 26,
}

/// What the kernel says about a program.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProgInfo {
    pub id: u32,
    /// Hash of its instructions as they were loaded.
    pub tag: [u8; 8],
    pub name: String,
    /// Bytes of native code; 0: the JIT is off.
    pub jited_len: u32,
    /// Instructions the verifier walked; 0 before kernel 5.16 (commit aba64c7da983).
    pub verified_insns: u32,
}

pub fn prog_info(prog: BorrowedFd<'_>) -> io::Result<ProgInfo> {
    /// `struct bpf_prog_info` of kernel 5.16.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Raw {
        kind: u32,
        id: u32,
        tag: [u8; 8],
        jited_prog_len: u32,
        xlated_prog_len: u32,
        jited_prog_insns: u64,
        xlated_prog_insns: u64,
        load_time: u64,
        created_by_uid: u32,
        nr_map_ids: u32,
        map_ids: u64,
        name: [u8; 16],
        ifindex: u32,
        bits: u32,
        netns_dev: u64,
        netns_ino: u64,
        nr_jited_ksyms: u32,
        nr_jited_func_lens: u32,
        jited_ksyms: u64,
        jited_func_lens: u64,
        btf_id: u32,
        func_info_rec_size: u32,
        func_info: u64,
        nr_func_info: u32,
        nr_line_info: u32,
        line_info: u64,
        jited_line_info: u64,
        nr_jited_line_info: u32,
        line_info_rec_size: u32,
        jited_line_info_rec_size: u32,
        nr_prog_tags: u32,
        prog_tags: u64,
        run_time_ns: u64,
        run_cnt: u64,
        recursion_misses: u64,
        verified_insns: u32,
        attach_btf_obj_id: u32,
    }
    // SAFETY: all integers; every bit pattern is valid. All pointers go in as zero with a count of
    // zero, so the kernel writes nothing through them.
    let raw: Raw = unsafe { object_info(prog)? };
    let name = raw.name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(ProgInfo {
        id: raw.id,
        tag: raw.tag,
        name: String::from_utf8_lossy(name).into_owned(),
        jited_len: raw.jited_prog_len,
        verified_insns: raw.verified_insns,
    })
}

/// Opens a loaded program.
pub fn prog_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = IdAttr { id, next_id: 0, open_flags: 0 };
    // SAFETY: the command takes no pointers.
    unsafe { bpf_fd(Command::ProgGetFdById, &mut attr) }
}

/// One instruction of a probe (`struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Insn {
    pub code: u8,
    /// Destination register in the low, source register in the high four bits.
    pub regs: u8,
    pub off: i16,
    pub imm: i32,
}

/// Loads a probe: a few instructions without BTF.
pub fn prog_load(kind: ProgType, attach_type: Option<AttachType>, insns: &[Insn]) -> io::Result<OwnedFd> {
    prog_load_with_log(kind, attach_type, insns, &mut [])
}

/// [`prog_load`], with room for what the verifier says; none: it says nothing.
pub fn prog_load_with_log(
    kind: ProgType,
    attach_type: Option<AttachType>,
    insns: &[Insn],
    log: &mut [u8],
) -> io::Result<OwnedFd> {
    load("fairlead_probe", kind, attach_type, 0, insns, log)
}

/// [`prog_load`] of an iterator, by the number that the kernel's types have for the function of its kind (`bpf_iter_*`).
pub fn prog_load_iterator(function: u32, insns: &[Insn]) -> io::Result<OwnedFd> {
    load("fairlead_probe", ProgType::Tracing, Some(AttachType::TraceIter), function, insns, &mut [])
}

/// [`prog_load`] of a program that people may see by this name, of which the kernel keeps 15 bytes.
pub fn prog_load_named(
    name: &str,
    kind: ProgType,
    attach_type: Option<AttachType>,
    insns: &[Insn],
) -> io::Result<OwnedFd> {
    load(name, kind, attach_type, 0, insns, &mut [])
}

fn load(
    name: &str,
    kind: ProgType,
    attach_type: Option<AttachType>,
    attach_btf_id: u32,
    insns: &[Insn],
    log: &mut [u8],
) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
        prog_name: [u8; 16],
        prog_ifindex: u32,
        expected_attach_type: u32,
        prog_btf_fd: u32,
        func_info_rec_size: u32,
        func_info: u64,
        func_info_cnt: u32,
        line_info_rec_size: u32,
        line_info: u64,
        line_info_cnt: u32,
        attach_btf_id: u32,
    }
    let mut prog_name = [0; 16];
    for (to, from) in prog_name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    let mut attr = Attr {
        prog_type: kind as u32,
        insn_cnt: length(insns),
        insns: insns.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        log_level: u32::from(!log.is_empty()),
        log_size: length(log),
        log_buf: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
        kern_version: 0,
        prog_flags: 0,
        prog_name,
        prog_ifindex: 0,
        expected_attach_type: attach_type.map_or(0, |attach_type| attach_type as u32),
        prog_btf_fd: 0,
        func_info_rec_size: 0,
        func_info: 0,
        func_info_cnt: 0,
        line_info_rec_size: 0,
        line_info: 0,
        line_info_cnt: 0,
        attach_btf_id,
    };
    // SAFETY: `insns`, the licence and the log outlive the call, and their lengths are what is said.
    unsafe { bpf_fd(Command::ProgLoad, &mut attr) }
}

/// What goes into a run of [`prog_test_run`].
#[derive(Clone, Copy, Default, Debug)]
pub struct TestRunInput<'a> {
    pub data: &'a [u8],
    /// `struct xdp_md` or `struct __sk_buff`; empty: the kernel's default.
    pub ctx: &'a [u8],
    /// Room for the packet as the program leaves it.
    pub data_out: usize,
    /// How many times the program runs on the packet; 0 is 1.
    pub repeat: u32,
    /// An XDP program's frames go where it sends them (`BPF_F_TEST_XDP_LIVE_FRAMES`, 5.18), so many at a time; nothing of
    /// them comes back. 0: they go nowhere.
    pub live: u32,
}

/// What came out of [`prog_test_run`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TestRunOutput {
    pub retval: u32,
    pub data: Vec<u8>,
    pub ctx: Vec<u8>,
    /// Mean of one run, in nanoseconds.
    pub duration: u32,
}

/// Runs a loaded program on a packet of ours (`BPF_PROG_TEST_RUN`).
pub fn prog_test_run(prog: BorrowedFd<'_>, input: TestRunInput<'_>) -> io::Result<TestRunOutput> {
    const BPF_F_TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;
    #[repr(C)]
    struct Attr {
        prog_fd: u32,
        retval: u32,
        data_size_in: u32,
        data_size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        ctx_size_in: u32,
        ctx_size_out: u32,
        ctx_in: u64,
        ctx_out: u64,
        flags: u32,
        cpu: u32,
        batch_size: u32,
        pad: u32,
    }
    let mut data = vec![0_u8; input.data_out];
    let mut ctx = vec![0_u8; if input.live == 0 { input.ctx.len() } else { 0 }];
    let mut attr = Attr {
        prog_fd: fd_number(prog),
        retval: 0,
        data_size_in: length(input.data),
        data_size_out: length(&data),
        data_in: address(input.data),
        data_out: if data.is_empty() { 0 } else { data.as_mut_ptr() as u64 },
        repeat: input.repeat,
        duration: 0,
        ctx_size_in: length(input.ctx),
        ctx_size_out: length(&ctx),
        ctx_in: address(input.ctx),
        ctx_out: if ctx.is_empty() { 0 } else { ctx.as_mut_ptr() as u64 },
        flags: if input.live == 0 { 0 } else { BPF_F_TEST_XDP_LIVE_FRAMES },
        cpu: 0,
        batch_size: input.live,
        pad: 0,
    };
    // SAFETY: all four buffers outlive the call and are as long as their lengths say.
    unsafe { bpf(Command::ProgTestRun, &mut attr)? };
    data.truncate(attr.data_size_out as usize);
    ctx.truncate(attr.ctx_size_out as usize);
    Ok(TestRunOutput { retval: attr.retval, data, ctx, duration: attr.duration })
}
