//! Raw `bpf(2)`: the commands that aya keeps to itself or does not have.
//!
//! aya parses the object, creates maps and loads programs. Links are ours, because a restarted agent
//! must take over the links its predecessor pinned, of every kind and in one way: open the pin, ask the
//! kernel what it is, `BPF_LINK_UPDATE`. Batch map commands and `BPF_PROG_TEST_RUN` are not in aya 0.14.
//!
//! Each command has its own `repr(C)` structure with exactly the fields it uses: the kernel takes any
//! size of `union bpf_attr` and reads what is missing as zero.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::ffi::CString;
use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use aya::Pod;

/// `enum bpf_cmd`.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Command {
    MapLookupElem = 1,
    MapUpdateElem = 2,
    MapGetNextKey = 4,
    ProgLoad = 5,
    ObjPin = 6,
    ObjGet = 7,
    ProgTestRun = 10,
    ProgGetFdById = 13,
    ObjGetInfoByFd = 15,
    ProgQuery = 16,
    MapLookupBatch = 24,
    MapUpdateBatch = 26,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkGetFdById = 30,
    LinkDetach = 34,
}

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
    Inet4Getpeername = 29,
    Inet6Getpeername = 30,
    Xdp = 37,
    TcxIngress = 46,
    TcxEgress = 47,
}

/// `enum bpf_prog_type`: the kinds we probe with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum ProgType {
    SchedCls = 3,
    CgroupSockAddr = 18,
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

/// What the kernel says about a map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapInfo {
    pub id: u32,
    pub kind: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub flags: u32,
}

/// Kinds of objects a pin may hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ObjectKind {
    Map,
    Prog,
    Link,
    Other,
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
    let fd = unsafe { bpf(Command::LinkCreate, &mut attr)? };
    Ok(new_fd(fd))
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

/// Makes a map, program or link outlive the process.
pub fn obj_pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = ObjAttr { pathname: path.as_ptr() as u64, bpf_fd: fd_number(object), file_flags: 0 };
    // SAFETY: `path` is NUL-terminated and lives until the call returns.
    unsafe { bpf(Command::ObjPin, &mut attr) }.map(drop)
}

/// Opens a pinned map, program or link.
pub fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = ObjAttr { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: `path` is NUL-terminated and lives until the call returns.
    let fd = unsafe { bpf(Command::ObjGet, &mut attr)? };
    Ok(new_fd(fd))
}

/// What kind of object a file descriptor is: the information commands do not say.
pub fn object_kind(object: BorrowedFd<'_>) -> io::Result<ObjectKind> {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", object.as_raw_fd()))?;
    Ok(match name.as_os_str().as_bytes() {
        b"anon_inode:bpf-map" => ObjectKind::Map,
        b"anon_inode:bpf-prog" => ObjectKind::Prog,
        b"anon_inode:bpf_link" | b"anon_inode:bpf-link" => ObjectKind::Link,
        _ => ObjectKind::Other,
    })
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

pub fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    /// The beginning of `struct bpf_map_info`.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Raw {
        kind: u32,
        id: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        map_flags: u32,
    }
    // SAFETY: all integers; every bit pattern is valid.
    let raw: Raw = unsafe { object_info(map)? };
    Ok(MapInfo {
        id: raw.id,
        kind: raw.kind,
        key_size: raw.key_size,
        value_size: raw.value_size,
        max_entries: raw.max_entries,
        flags: raw.map_flags,
    })
}

/// Opens a loaded program.
pub fn prog_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = IdAttr { id, next_id: 0, open_flags: 0 };
    // SAFETY: the command takes no pointers.
    let fd = unsafe { bpf(Command::ProgGetFdById, &mut attr)? };
    Ok(new_fd(fd))
}

/// Opens a link (`CAP_SYS_ADMIN`).
pub fn link_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = IdAttr { id, next_id: 0, open_flags: 0 };
    // SAFETY: the command takes no pointers.
    let fd = unsafe { bpf(Command::LinkGetFdById, &mut attr)? };
    Ok(new_fd(fd))
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

/// One instruction of a probe (`struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Insn {
    pub code: u8,
    /// Destination register in the low, source register in the high four bits.
    pub regs: u8,
    pub off: i16,
    pub imm: i32,
}

/// Loads a probe: a few instructions without maps or BTF.
pub fn prog_load(kind: ProgType, attach_type: Option<AttachType>, insns: &[Insn]) -> io::Result<OwnedFd> {
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
    }
    let mut attr = Attr {
        prog_type: kind as u32,
        insn_cnt: length(insns),
        insns: insns.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: *b"fairlead_probe\0\0",
        prog_ifindex: 0,
        expected_attach_type: attach_type.map_or(0, |attach_type| attach_type as u32),
    };
    // SAFETY: `insns` and the licence outlive the call, and their lengths are what is said.
    let fd = unsafe { bpf(Command::ProgLoad, &mut attr)? };
    Ok(new_fd(fd))
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
    let mut ctx = vec![0_u8; input.ctx.len()];
    let mut attr = Attr {
        prog_fd: fd_number(prog),
        retval: 0,
        data_size_in: length(input.data),
        data_size_out: length(&data),
        data_in: pointer_or_null(input.data),
        data_out: if data.is_empty() { 0 } else { data.as_mut_ptr() as u64 },
        repeat: input.repeat,
        duration: 0,
        ctx_size_in: length(input.ctx),
        ctx_size_out: length(&ctx),
        ctx_in: pointer_or_null(input.ctx),
        ctx_out: if ctx.is_empty() { 0 } else { ctx.as_mut_ptr() as u64 },
        flags: 0,
        cpu: 0,
        batch_size: 0,
        pad: 0,
    };
    // SAFETY: all four buffers outlive the call and are as long as their lengths say.
    unsafe { bpf(Command::ProgTestRun, &mut attr)? };
    data.truncate(attr.data_size_out as usize);
    ctx.truncate(attr.ctx_size_out as usize);
    Ok(TestRunOutput { retval: attr.retval, data, ctx, duration: attr.duration })
}

/// How far a batch came before it failed.
#[derive(Debug)]
pub struct BatchError {
    /// Entries that were written.
    pub done: usize,
    pub source: io::Error,
}

/// Writes entries in their order (`BPF_MAP_UPDATE_BATCH`, 5.6).
pub fn map_update_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> Result<(), BatchError> {
    assert_eq!(keys.len(), values.len(), "a batch has one value for each key");
    if keys.is_empty() {
        return Ok(());
    }
    let mut attr = BatchAttr {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: length(keys),
        map_fd: fd_number(map),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: both slices outlive the call and hold `count` entries; the callers' types have the sizes
    // of the map, which was checked when it was opened.
    match unsafe { bpf(Command::MapUpdateBatch, &mut attr) } {
        Ok(_) => Ok(()),
        Err(source) => {
            // The kernel leaves `count` alone when it refuses the command as a whole.
            let refused = attr.count as usize >= keys.len();
            Err(BatchError { done: if refused { 0 } else { attr.count as usize }, source })
        }
    }
}

/// Writes one entry.
pub fn map_update<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        map_fd: u32,
        pad: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let mut attr = Attr {
        map_fd: fd_number(map),
        pad: 0,
        key: std::ptr::from_ref(key) as u64,
        value: std::ptr::from_ref(value) as u64,
        flags: 0,
    };
    // SAFETY: key and value outlive the call; the callers' types have the sizes of the map, which was
    // checked when it was opened.
    unsafe { bpf(Command::MapUpdateElem, &mut attr) }.map(drop)
}

/// `BPF_NOEXIST` for [`map_update_bytes`].
pub const NO_EXIST: u64 = 1;

/// Entries of a map whose layout is none of ours: keys and values one behind the other, as the kernel wants them.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct RawEntries {
    pub keys: Vec<u8>,
    pub values: Vec<u8>,
}

/// As [`map_lookup_batch`], for keys and values of any size; not for maps with a value per CPU.
pub fn map_lookup_batch_bytes(
    map: BorrowedFd<'_>,
    info: &MapInfo,
    cursor: Option<Cursor>,
    count: usize,
) -> io::Result<(RawEntries, Option<Cursor>)> {
    let (key_size, value_size) = (info.key_size as usize, info.value_size as usize);
    assert!(key_size <= size_of::<Cursor>(), "keys are at most 64 bytes");
    let mut room = count.max(1);
    loop {
        let mut entries = RawEntries { keys: vec![0; room * key_size], values: vec![0; room * value_size] };
        let mut next = Cursor([0; 64]);
        let mut attr = BatchAttr {
            in_batch: cursor.as_ref().map_or(0, |cursor| cursor.0.as_ptr() as u64),
            out_batch: next.0.as_mut_ptr() as u64,
            keys: entries.keys.as_mut_ptr() as u64,
            values: entries.values.as_mut_ptr() as u64,
            count: u32::try_from(room).unwrap_or(u32::MAX),
            map_fd: fd_number(map),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: both buffers have room for `count` entries of the sizes that the kernel tells of this map, both
        // cursors for a key; all outlive the call.
        let more = match unsafe { bpf(Command::MapLookupBatch, &mut attr) } {
            Ok(_) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                room *= 2;
                continue;
            }
            Err(error) => return Err(error),
        };
        entries.keys.truncate(attr.count as usize * key_size);
        entries.values.truncate(attr.count as usize * value_size);
        return Ok((entries, more.then_some(next)));
    }
}

/// `union bpf_attr` of the commands for one entry.
#[repr(C)]
struct EntryAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    /// Of `BPF_MAP_GET_NEXT_KEY`: room for the next key.
    value: u64,
    flags: u64,
}

/// The key after `key`, in the order of the map; without one, the first.
pub fn map_next_key_bytes(
    map: BorrowedFd<'_>,
    info: &MapInfo,
    key: Option<&[u8]>,
) -> io::Result<Option<Vec<u8>>> {
    assert!(key.is_none_or(|key| key.len() == info.key_size as usize), "a key has the map's size");
    let mut next = vec![0; info.key_size as usize];
    let mut attr = EntryAttr {
        map_fd: fd_number(map),
        pad: 0,
        key: key.map_or(0, |key| key.as_ptr() as u64),
        value: next.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: both are keys of the size that the kernel tells of this map, and outlive the call.
    match unsafe { bpf(Command::MapGetNextKey, &mut attr) } {
        Ok(_) => Ok(Some(next)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The value of a key; not for maps with a value per CPU.
pub fn map_lookup_bytes(map: BorrowedFd<'_>, info: &MapInfo, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
    assert_eq!(key.len(), info.key_size as usize, "a key has the map's size");
    let mut value = vec![0; info.value_size as usize];
    let mut attr = EntryAttr {
        map_fd: fd_number(map),
        pad: 0,
        key: key.as_ptr() as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: key and value have the sizes that the kernel tells of this map, and outlive the call.
    match unsafe { bpf(Command::MapLookupElem, &mut attr) } {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes one entry of a map of any layout; not for maps with a value per CPU.
pub fn map_update_bytes(
    map: BorrowedFd<'_>,
    info: &MapInfo,
    key: &[u8],
    value: &[u8],
    flags: u64,
) -> io::Result<()> {
    let sizes = (info.key_size as usize, info.value_size as usize);
    assert_eq!((key.len(), value.len()), sizes, "an entry has the map's sizes");
    let mut attr = EntryAttr {
        map_fd: fd_number(map),
        pad: 0,
        key: key.as_ptr() as u64,
        value: value.as_ptr() as u64,
        flags,
    };
    // SAFETY: key and value have the sizes that the kernel tells of this map, and outlive the call.
    unsafe { bpf(Command::MapUpdateElem, &mut attr) }.map(drop)
}

/// The key after the one that `cursor` stands at, and a cursor there; `None`: there are no more. If the key at the cursor
/// is gone, the walk begins again.
pub fn map_next_key<K: Pod>(map: BorrowedFd<'_>, cursor: Option<Cursor>) -> io::Result<Option<(K, Cursor)>> {
    assert!(size_of::<K>() <= size_of::<Cursor>(), "keys are at most 64 bytes");
    let mut next = Cursor([0; 64]);
    let mut attr = EntryAttr {
        map_fd: fd_number(map),
        pad: 0,
        key: cursor.as_ref().map_or(0, |cursor| cursor.0.as_ptr() as u64),
        value: next.0.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: both cursors have room for a key (checked above) and outlive the call.
    match unsafe { bpf(Command::MapGetNextKey, &mut attr) } {
        Ok(_) => {
            // SAFETY: the kernel has written a key there; every bit pattern of a `Pod` is valid.
            let key = unsafe { next.0.as_ptr().cast::<K>().read_unaligned() };
            Ok(Some((key, next)))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The value of an array's first entry. Not of arrays per CPU, whose values are larger than they say.
pub fn map_lookup_first(map: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let info = map_info(map)?;
    if info.key_size as usize != size_of::<u32>() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    map_lookup_bytes(map, &info, &0_u32.to_ne_bytes())?.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Where a walk over a map stands; opaque, at most the size of a key.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
pub struct Cursor([u8; 64]);

impl Cursor {
    /// For arrays: the walk goes on after `index`.
    pub fn after(index: u32) -> Self {
        let mut bytes = [0; 64];
        bytes[..4].copy_from_slice(&index.to_ne_bytes());
        Self(bytes)
    }
}

/// Reads up to `count` entries from where `cursor` stands; fewer than that and no cursor at the end
/// (`BPF_MAP_LOOKUP_BATCH`, 5.6).
///
/// For hash maps the kernel answers whole buckets only; this retries with more room.
#[expect(clippy::type_complexity, reason = "entries and where to go on")]
pub fn map_lookup_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    cursor: Option<Cursor>,
    count: usize,
) -> io::Result<(Vec<(K, V)>, Option<Cursor>)> {
    assert!(size_of::<K>() <= size_of::<Cursor>(), "keys are at most 64 bytes");
    let mut room = count.max(1);
    loop {
        let mut keys: Vec<MaybeUninit<K>> = vec![MaybeUninit::zeroed(); room];
        let mut values: Vec<MaybeUninit<V>> = vec![MaybeUninit::zeroed(); room];
        let mut next = Cursor([0; 64]);
        let mut attr = BatchAttr {
            in_batch: cursor.as_ref().map_or(0, |cursor| cursor.0.as_ptr() as u64),
            out_batch: next.0.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: length(&keys),
            map_fd: fd_number(map),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: both vectors have room for `count` entries of the map's sizes (checked when it was
        // opened), both cursors for a key; all outlive the call.
        let result = unsafe { bpf(Command::MapLookupBatch, &mut attr) };
        let more = match result {
            Ok(_) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                room *= 2;
                continue;
            }
            Err(error) => return Err(error),
        };
        let entries = keys
            .into_iter()
            .zip(values)
            .take(attr.count as usize)
            // SAFETY: zeroed above, then written by the kernel; every bit pattern of a `Pod` is valid.
            .map(|(key, value)| unsafe { (key.assume_init(), value.assume_init()) })
            .collect();
        return Ok((entries, more.then_some(next)));
    }
}

/// `union bpf_attr` of `BPF_OBJ_PIN` and `BPF_OBJ_GET`.
#[repr(C)]
struct ObjAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// `union bpf_attr` of `BPF_*_GET_FD_BY_ID`.
#[repr(C)]
struct IdAttr {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

/// `union bpf_attr` of `BPF_MAP_*_BATCH`.
#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// # Safety
/// Every bit pattern of `T` must be valid, and a zeroed `T` must not make the kernel write through
/// pointers in it.
unsafe fn object_info<T: Copy>(object: BorrowedFd<'_>) -> io::Result<T> {
    #[repr(C)]
    struct Attr {
        bpf_fd: u32,
        info_len: u32,
        info: u64,
    }
    let mut info = MaybeUninit::<T>::zeroed();
    let mut attr = Attr {
        bpf_fd: fd_number(object),
        info_len: u32::try_from(size_of::<T>()).expect("information structures are small"),
        info: info.as_mut_ptr() as u64,
    };
    // SAFETY: `info` has `info_len` bytes and outlives the call.
    unsafe { bpf(Command::ObjGetInfoByFd, &mut attr)? };
    // SAFETY: zeroed above and filled by the kernel; the caller vouches for the bit patterns.
    Ok(unsafe { info.assume_init() })
}

/// # Safety
/// `attr` must be what `command` expects, with pointers that are valid for as long as the call takes.
unsafe fn bpf<T>(command: Command, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads and writes `size` bytes of `attr`; the caller vouches for what is in it.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command as u32, std::ptr::from_mut(attr), mem::size_of::<T>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn new_fd(fd: libc::c_long) -> OwnedFd {
    let fd = RawFd::try_from(fd).expect("file descriptors are small numbers");
    // SAFETY: the kernel just made this file descriptor for us; nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn fd_number(fd: BorrowedFd<'_>) -> u32 {
    u32::try_from(fd.as_raw_fd()).expect("a borrowed file descriptor is not negative")
}

fn length<T>(slice: &[T]) -> u32 {
    u32::try_from(slice.len()).expect("buffers for bpf(2) are far below 4 Gi entries")
}

fn pointer_or_null(bytes: &[u8]) -> u64 {
    if bytes.is_empty() { 0 } else { bytes.as_ptr() as u64 }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

fn concat(first: [u8; 4], second: [u8; 4]) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first);
    bytes[4..].copy_from_slice(&second);
    bytes
}
