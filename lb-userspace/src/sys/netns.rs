//! The network namespace of the calling thread.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::fs;
use std::io;
use std::mem;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use nix::sched::{CloneFlags, unshare};

/// Inode of the namespace: tells namespaces apart as long as they live.
pub fn inode() -> io::Result<u64> {
    Ok(fs::metadata("/proc/thread-self/ns/net")?.ino())
}

/// `SO_NETNS_COOKIE` (5.14, commit e8b9eab99232): what `bpf_get_netns_cookie` returns for sockets of
/// this namespace. `None`: the kernel does not know the option.
pub fn cookie() -> io::Result<Option<u64>> {
    // From <asm-generic/socket.h>; not in the libc crate for every architecture.
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = UdpSocket::bind(("127.0.0.1", 0)).or_else(|_| UdpSocket::bind(("0.0.0.0", 0)))?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(mem::size_of::<u64>()).expect("8 fits");
    // SAFETY: the kernel writes at most `length` bytes to `cookie`; both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        return Ok(Some(cookie));
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENOPROTOOPT) { Ok(None) } else { Err(error) }
}

/// Moves the calling thread (and what it starts) into a new, empty network namespace, which ends with
/// the thread. For tests.
pub fn enter_new() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    Ok(())
}
