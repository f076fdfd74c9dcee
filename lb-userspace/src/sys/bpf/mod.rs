//! Raw `bpf(2)`: the commands that aya keeps to itself or does not have.
//!
//! aya parses the object, creates maps and loads programs. Links are ours, because a restarted agent
//! must take over the links its predecessor pinned, of every kind and in one way: open the pin, ask the
//! kernel what it is, `BPF_LINK_UPDATE`. Batch map commands and `BPF_PROG_TEST_RUN` are not in aya 0.14.
//!
//! Each command has its own `repr(C)` structure with exactly the fields it uses: the kernel takes any
//! size of `union bpf_attr` and reads what is missing as zero.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

mod links;
mod maps;
mod progs;

use std::ffi::CString;
use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

pub use self::links::*;
pub use self::maps::*;
pub use self::progs::*;

/// `enum bpf_cmd`.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum Command {
    MapCreate = 0,
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
    MapLookupAndDeleteBatch = 25,
    MapUpdateBatch = 26,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkGetFdById = 30,
    IterCreate = 33,
    LinkDetach = 34,
}

/// Kinds of objects a pin may hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ObjectKind {
    Map,
    Prog,
    Link,
    Other,
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
    unsafe { bpf_fd(Command::ObjGet, &mut attr) }
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

/// The system call.
///
/// # Safety
/// `attr` must be what `command` expects, with pointers that are valid for as long as the call takes.
pub unsafe fn bpf<T>(command: Command, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads and writes `size` bytes of `attr`; the caller vouches for what is in it.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command as u32, std::ptr::from_mut(attr), mem::size_of::<T>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// [`bpf`] with a command that makes a file descriptor.
///
/// # Safety
/// As of [`bpf`]; and the command makes one.
pub unsafe fn bpf_fd<T>(command: Command, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller vouches for it.
    let fd = unsafe { bpf(command, attr)? };
    let fd = RawFd::try_from(fd).expect("file descriptors are small numbers");
    // SAFETY: the kernel just made this file descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A file descriptor as structures have it.
pub fn fd_number(fd: BorrowedFd<'_>) -> u32 {
    u32::try_from(fd.as_raw_fd()).expect("a borrowed file descriptor is not negative")
}

/// How many there are, as structures have it.
pub fn length<T>(slice: &[T]) -> u32 {
    u32::try_from(slice.len()).expect("buffers for bpf(2) are far below 4 Gi entries")
}

/// Where bytes stand, as structures have it; 0: there are none.
pub fn address(bytes: &[u8]) -> u64 {
    if bytes.is_empty() { 0 } else { bytes.as_ptr() as u64 }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}
