//! `bpf(2)` as measuring needs it: programs of our own instructions with maps, thousands of runs, live frames.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use fairlead::sys::bpf::{
    self, AttachType, BatchAttr, Command, Insn, TestRunInput, address, fd_number, length,
};

/// `enum bpf_map_type`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum MapType {
    Hash = 1,
    Array = 2,
    ProgArray = 3,
    LruHash = 9,
    LruPerCpuHash = 10,
    LpmTrie = 11,
}

/// Programs that packets meet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum ProgType {
    SchedCls,
    Xdp,
}

pub(crate) fn map_create(kind: MapType, key_size: u32, value_size: u32, entries: u32) -> Result<OwnedFd> {
    map_create_with(kind, key_size, value_size, entries, 0)
}

/// The same with flags (`BPF_F_*`).
pub(crate) fn map_create_with(
    kind: MapType,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
) -> Result<OwnedFd> {
    let mut attr = [kind as u32, key_size, value_size, entries, flags];
    // SAFETY: five numbers, as the command begins; no pointers.
    let map = unsafe { bpf::bpf_fd(Command::MapCreate, &mut attr) };
    map.with_context(|| format!("cannot make a map of kind {kind:?}"))
}

pub(crate) fn map_update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> Result<()> {
    let info = bpf::map_info(map)?;
    bpf::map_update_bytes(map, &info, key, value, 0).context("cannot write to a map")
}

/// Loads a program. The error has what the verifier said last.
pub(crate) fn prog_load(kind: ProgType, insns: &[Insn]) -> Result<OwnedFd> {
    // As aya loads ours: programs of one array must agree.
    let (kind, attach_type) = match kind {
        ProgType::SchedCls => (bpf::ProgType::SchedCls, None),
        ProgType::Xdp => (bpf::ProgType::Xdp, Some(AttachType::Xdp)),
    };
    let load = |log: &mut [u8]| bpf::prog_load_with_log(kind, attach_type, insns, log);
    load(&mut []).or_else(|_| {
        let mut log = vec![0; 1 << 16];
        let error = match load(&mut log) {
            Ok(fd) => return Ok(fd),
            Err(error) => error,
        };
        let said = String::from_utf8_lossy(&log);
        let lines: Vec<_> = said.trim_end_matches('\0').lines().rev().take(6).collect();
        Err(error).with_context(|| {
            format!("the verifier: {}", lines.into_iter().rev().collect::<Vec<_>>().join(" | "))
        })
    })
}

/// A packet, and where the program is to believe that it came in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Input<'a> {
    pub(crate) kind: ProgType,
    pub(crate) frame: &'a [u8],
    pub(crate) ifindex: u32,
}

/// What came out of a run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Output {
    pub(crate) verdict: u32,
    pub(crate) frame: Vec<u8>,
    /// Mean of one run, ns.
    pub(crate) nanoseconds: u32,
}

/// Runs a program so many times on one packet, which it finds as the run before has left it.
pub(crate) fn test_run(prog: BorrowedFd<'_>, input: Input<'_>, repeat: u32) -> Result<Output> {
    let data_out = input.frame.len() + 256;
    run(prog, input, TestRunInput { repeat, data_out, ..TestRunInput::default() })
        .context("cannot run a program")
}

/// Has the kernel send so many frames through an XDP program, and do what it says with them. The mean time of one, ns.
pub(crate) fn live_frames(prog: BorrowedFd<'_>, input: Input<'_>, repeat: u32) -> Result<u32> {
    let sent = run(prog, input, TestRunInput { repeat, live: 64, ..TestRunInput::default() });
    Ok(sent.context("cannot send live frames (Linux 5.18)")?.nanoseconds)
}

fn run(prog: BorrowedFd<'_>, input: Input<'_>, how: TestRunInput<'_>) -> io::Result<Output> {
    let context = context(&input);
    let run = bpf::prog_test_run(prog, TestRunInput { data: input.frame, ctx: &context, ..how })?;
    Ok(Output { verdict: run.retval, frame: run.data, nanoseconds: run.duration })
}

/// Takes some entries out of a hash map: keys and values, one behind the other. None: it is empty.
pub(crate) fn take_entries(
    map: BorrowedFd<'_>,
    key_size: usize,
    value_size: usize,
) -> Result<(Vec<u8>, Vec<u8>)> {
    // More than one bucket ever has.
    const COUNT: u32 = 16_384;
    let (mut keys, mut values) = (vec![0; key_size * COUNT as usize], vec![0; value_size * COUNT as usize]);
    let mut next = [0_u8; 64];
    let mut attr = BatchAttr {
        in_batch: 0,
        out_batch: next.as_mut_ptr() as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: COUNT,
        map_fd: fd_number(map),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: both vectors have room for `count` entries of the sizes that the caller says are the map's, and the place to go on for a key.
    match unsafe { bpf::bpf(Command::MapLookupAndDeleteBatch, &mut attr) } {
        Ok(_) => {}
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
        Err(error) => return Err(error).context("cannot empty a map"),
    }
    keys.truncate(key_size * attr.count as usize);
    values.truncate(value_size * attr.count as usize);
    Ok((keys, values))
}

/// Writes entries, as [`take_entries`] gave them.
pub(crate) fn put_entries(map: BorrowedFd<'_>, keys: &[u8], values: &[u8], key_size: usize) -> Result<()> {
    let count = u32::try_from(keys.len() / key_size).context("more entries than a map takes")?;
    if count == 0 {
        return Ok(());
    }
    let mut attr = BatchAttr {
        in_batch: 0,
        out_batch: 0,
        keys: address(keys),
        values: address(values),
        count,
        map_fd: fd_number(map),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: both outlive the call and hold `count` entries of the map's sizes.
    unsafe { bpf::bpf(Command::MapUpdateBatch, &mut attr) }.map(drop).context("cannot fill a map")
}

/// `struct xdp_md` or `struct __sk_buff` with the device that the packet came in through.
fn context(input: &Input<'_>) -> Vec<u8> {
    let words = match input.kind {
        ProgType::Xdp => vec![0, length(input.frame), 0, input.ifindex, 0, 0],
        ProgType::SchedCls => {
            let mut words = vec![0; 48];
            words[10] = input.ifindex;
            words
        }
    };
    words.into_iter().flat_map(u32::to_ne_bytes).collect()
}
