//! Links, which hold programs on their hooks, and iterators over maps.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use super::{Command, IdAttr, bpf, bpf_fd, fd_number, object_info};

/// `enum bpf_attach_type`: the hooks we attach to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum AttachType {
    Inet4Connect = 10,
    Inet6Connect = 11,
    Udp4Sendmsg = 14,
    Udp6Sendmsg = 15,
    Udp4Recvmsg = 19,
    Udp6Recvmsg = 20,
    TraceIter = 28,
    Inet4Getpeername = 29,
    Inet6Getpeername = 30,
    Xdp = 37,
    TcxIngress = 46,
    TcxEgress = 47,
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    Device(u32),
    Cgroup(BorrowedFd<'a>),
}

impl Target<'_> {
    fn number(self) -> u32 {
        match self {
            Self::Device(ifindex) => ifindex,
            Self::Cgroup(fd) => fd_number(fd),
        }
    }
}

/// `XDP_FLAGS_SKB_MODE` for [`link_create`].
pub const XDP_SKB_MODE: u32 = 1 << 1;
/// `XDP_FLAGS_DRV_MODE` for [`link_create`].
pub const XDP_DRV_MODE: u32 = 1 << 2;
/// `BPF_F_BEFORE` for [`link_create`] on tcx: without a relative program, before all others.
pub const TCX_FIRST: u32 = 1 << 3;
/// `BPF_F_AFTER` for [`link_create`] on tcx: without a relative program, after all others.
pub const TCX_LAST: u32 = 1 << 4;

/// What the kernel says about a link. The target is 0 once the device or cgroup is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinkInfo {
    pub id: u32,
    pub prog_id: u32,
    pub target: LinkTarget,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkTarget {
    Xdp { ifindex: u32 },
    Tcx { ifindex: u32, attach_type: u32 },
    Cgroup { id: u64, attach_type: u32 },
    Other { kind: u32 },
}

/// Attaches a program (`BPF_LINK_CREATE`, 5.7; XDP since 5.9, tcx since 6.6).
pub fn link_create(
    prog: BorrowedFd<'_>,
    target: Target<'_>,
    attach_type: AttachType,
    flags: u32,
) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        prog_fd: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
    }
    let mut attr =
        Attr { prog_fd: fd_number(prog), target: target.number(), attach_type: attach_type as u32, flags };
    // SAFETY: the command takes no pointers.
    unsafe { bpf_fd(Command::LinkCreate, &mut attr) }
}

/// Has a program look at the entries of a map (`BPF_TRACE_ITER` on `bpf_map_elem`, 5.9).
pub fn map_iter_link_create(prog: BorrowedFd<'_>, map: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const BPF_TRACE_ITER: u32 = 28;
    #[repr(C)]
    struct Attr {
        prog_fd: u32,
        target_fd: u32,
        attach_type: u32,
        flags: u32,
        iter_info: u64,
        iter_info_len: u32,
        pad: u32,
    }
    // `union bpf_iter_link_info`, as far as it is about maps.
    let info = fd_number(map);
    let mut attr = Attr {
        prog_fd: fd_number(prog),
        target_fd: 0,
        attach_type: BPF_TRACE_ITER,
        flags: 0,
        iter_info: std::ptr::from_ref(&info) as u64,
        iter_info_len: 4,
        pad: 0,
    };
    // SAFETY: `info` outlives the call and is as long as is said.
    unsafe { bpf_fd(Command::LinkCreate, &mut attr) }
}

/// Begins a walk of an iterator: whoever reads has the program run, and gets what it writes.
pub fn iter_create(link: BorrowedFd<'_>) -> io::Result<File> {
    #[repr(C)]
    struct Attr {
        link_fd: u32,
        flags: u32,
    }
    let mut attr = Attr { link_fd: fd_number(link), flags: 0 };
    // SAFETY: the command takes no pointers.
    unsafe { bpf_fd(Command::IterCreate, &mut attr) }.map(File::from)
}

/// Replaces the program of a link atomically: no packet sees neither of both.
pub fn link_update(link: BorrowedFd<'_>, prog: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link_fd: u32,
        new_prog_fd: u32,
        flags: u32,
        old_prog_fd: u32,
    }
    let mut attr = Attr { link_fd: fd_number(link), new_prog_fd: fd_number(prog), flags: 0, old_prog_fd: 0 };
    // SAFETY: the command takes no pointers.
    unsafe { bpf(Command::LinkUpdate, &mut attr) }.map(drop)
}

/// Takes a program off its hook, whoever else still holds the link (5.9).
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = fd_number(link);
    // SAFETY: the command takes one file descriptor and no pointers.
    unsafe { bpf(Command::LinkDetach, &mut attr) }.map(drop)
}

pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    /// `struct bpf_link_info` as far as our kinds of links use it.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Raw {
        kind: u32,
        id: u32,
        prog_id: u32,
        pad: u32,
        /// XDP: ifindex. tcx: ifindex, attach type. cgroup: id (64 bits), attach type.
        words: [u32; 6],
    }
    // SAFETY: all integers; every bit pattern is valid.
    let raw: Raw = unsafe { object_info(link)? };
    let [first, second, third, ..] = raw.words;
    let target = match raw.kind {
        3 => LinkTarget::Cgroup {
            id: u64::from_ne_bytes(concat(first.to_ne_bytes(), second.to_ne_bytes())),
            attach_type: third,
        },
        6 => LinkTarget::Xdp { ifindex: first },
        11 => LinkTarget::Tcx { ifindex: first, attach_type: second },
        kind => LinkTarget::Other { kind },
    };
    Ok(LinkInfo { id: raw.id, prog_id: raw.prog_id, target })
}

/// Opens a link (`CAP_SYS_ADMIN`).
pub fn link_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = IdAttr { id, next_id: 0, open_flags: 0 };
    // SAFETY: the command takes no pointers.
    unsafe { bpf_fd(Command::LinkGetFdById, &mut attr) }
}

/// Ids of the programs on a hook, in the order they run. `EINVAL`: the kernel does not know the hook.
pub fn prog_query(target: Target<'_>, attach_type: AttachType) -> io::Result<Vec<u32>> {
    /// Complete up to `revision`: for tcx the kernel writes that field whatever size it is told.
    #[repr(C)]
    struct Attr {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        prog_ids: u64,
        prog_cnt: u32,
        pad: u32,
        prog_attach_flags: u64,
        link_ids: u64,
        link_attach_flags: u64,
        revision: u64,
    }
    // The kernel allows 64 programs on a hook (BPF_MPROG_MAX, BPF_CGROUP_MAX_PROGS).
    let mut ids = [0_u32; 64];
    let mut attr = Attr {
        target: target.number(),
        attach_type: attach_type as u32,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: 64,
        pad: 0,
        prog_attach_flags: 0,
        link_ids: 0,
        link_attach_flags: 0,
        revision: 0,
    };
    // SAFETY: `ids` has room for `prog_cnt` numbers and outlives the call.
    unsafe { bpf(Command::ProgQuery, &mut attr)? };
    Ok(ids.into_iter().take(attr.prog_cnt as usize).collect())
}

fn concat(first: [u8; 4], second: [u8; 4]) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first);
    bytes[4..].copy_from_slice(&second);
    bytes
}
