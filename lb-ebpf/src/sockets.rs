//! Socket programs: the context of `connect`, `sendmsg`, `recvmsg` and `getpeername` in a cgroup.

use core::mem::transmute;
use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::reason::Action;
use lb_common::socket::{self, Peer, Socket};
use lb_common::wire::IpProto;
use lb_common::{Addr4, Addr6, Family, Hook, Reason, Tables, V4, V6, sample};

use crate::globals::{HAVE_SET_RETVAL, NODE_NETNS, SERVES_PODS};
use crate::maps::{Kernel, count};

/// The system call goes on.
const PROCEED: i32 = 1;
/// The system call fails: with the value of `bpf_set_retval`, else `EPERM`.
const FAIL: i32 = 0;

const ECONNREFUSED: i32 = 111;
const EHOSTUNREACH: i32 = 113;

/// Sockets of Multipath TCP connect through TCP.
const IPPROTO_MPTCP: u32 = 262;

/// What the hook asks of the socket.
#[derive(Clone, Copy)]
enum Call {
    Connect,
    Sendmsg,
    /// `recvmsg` and `getpeername`.
    Name,
}

macro_rules! hooks {
    ($($name:ident, $attach:ident, $call:ident, $hook:ident, $family:ident;)*) => {
        $(
            #[cgroup_sock_addr($attach)]
            pub fn $name(ctx: SockAddrContext) -> i32 {
                $family(ctx.sock_addr, Call::$call, Hook::$hook)
            }
        )*
    };
}

hooks! {
    sock_connect4, connect4, Connect, Connect, inet4;
    sock_connect6, connect6, Connect, Connect, inet6;
    sock_sendmsg4, sendmsg4, Sendmsg, Sendmsg, inet4;
    sock_sendmsg6, sendmsg6, Sendmsg, Sendmsg, inet6;
    sock_recvmsg4, recvmsg4, Name, Recvmsg, inet4;
    sock_recvmsg6, recvmsg6, Name, Recvmsg, inet6;
    sock_getpeer4, getpeername4, Name, Getpeername, inet4;
    sock_getpeer6, getpeername6, Name, Getpeername, inet6;
}

/// A hook of an IPv4 address.
#[inline(always)]
fn inet4(ctx: *mut bpf_sock_addr, call: Call, hook: Hook) -> i32 {
    // SAFETY: the context is valid while the program runs; the verifier wants each field read by itself.
    let addr = unsafe { read_volatile(addr_of!((*ctx).user_ip4)) };
    let addr = Addr4 { octets: addr.to_ne_bytes() };
    match run::<V4>(ctx, call, hook, addr) {
        Ok(peer) => {
            // SAFETY: as above.
            unsafe { write_volatile(addr_of_mut!((*ctx).user_ip4), u32::from_ne_bytes(peer.addr.octets)) };
            PROCEED
        }
        Err(code) => code,
    }
}

/// A hook of an IPv6 address, which may be an IPv4 address in disguise.
#[inline(always)]
fn inet6(ctx: *mut bpf_sock_addr, call: Call, hook: Hook) -> i32 {
    const MAPPED: u32 = 0xffff_u32.to_be();
    // SAFETY: the context is valid while the program runs; the verifier wants each word read by itself.
    let words = unsafe {
        [
            read_volatile(addr_of!((*ctx).user_ip6[0])),
            read_volatile(addr_of!((*ctx).user_ip6[1])),
            read_volatile(addr_of!((*ctx).user_ip6[2])),
            read_volatile(addr_of!((*ctx).user_ip6[3])),
        ]
    };
    if let [0, 0, MAPPED, word] = words {
        return match run::<V4>(ctx, call, hook, Addr4 { octets: word.to_ne_bytes() }) {
            Ok(peer) => {
                // SAFETY: as above.
                unsafe {
                    write_volatile(addr_of_mut!((*ctx).user_ip6[3]), u32::from_ne_bytes(peer.addr.octets));
                }
                PROCEED
            }
            Err(code) => code,
        };
    }
    // SAFETY: four words and sixteen octets in the same order.
    let octets = unsafe { transmute::<[u32; 4], [u8; 16]>(words) };
    match run::<V6>(ctx, call, hook, Addr6 { octets }) {
        Ok(peer) => {
            // SAFETY: as above, and the other way round.
            unsafe {
                let [first, second, third, fourth] = transmute::<[u8; 16], [u32; 4]>(peer.addr.octets);
                write_volatile(addr_of_mut!((*ctx).user_ip6[0]), first);
                write_volatile(addr_of_mut!((*ctx).user_ip6[1]), second);
                write_volatile(addr_of_mut!((*ctx).user_ip6[2]), third);
                write_volatile(addr_of_mut!((*ctx).user_ip6[3]), fourth);
            }
            PROCEED
        }
        Err(code) => code,
    }
}

/// Runs the socket's part of the pipeline, counts, and writes the port. `Err`: nothing to write, and what to return.
#[inline(always)]
fn run<F: Family>(ctx: *mut bpf_sock_addr, call: Call, hook: Hook, addr: F::Addr) -> Result<Peer<F>, i32>
where
    Kernel: Tables<F>,
{
    let result = translate::<F>(ctx, call, addr);
    let reason = match result {
        Ok(_) => Reason::Translated,
        Err(reason) => reason,
    };
    count(hook, reason, 0);
    match result {
        Ok(peer) => {
            // SAFETY: the context is valid while the program runs.
            unsafe { write_volatile(addr_of_mut!((*ctx).user_port), u32::from(peer.port.to_be())) };
            Ok(peer)
        }
        Err(reason) => {
            let errno = match (call, reason.action()) {
                (Call::Connect | Call::Sendmsg, Action::Reject) => ECONNREFUSED,
                (Call::Connect | Call::Sendmsg, Action::Drop) => EHOSTUNREACH,
                _ => return Err(PROCEED),
            };
            let (proto, port) = asked(ctx);
            sample::call::<F, Kernel>(&Kernel, hook, proto as u8, &addr, port, reason);
            Err(fail(errno))
        }
    }
}

/// Protocol and port that the process has named.
#[inline(always)]
fn asked(ctx: *mut bpf_sock_addr) -> (u32, u16) {
    // SAFETY: fields of a context that is valid while the program runs.
    let (protocol, port) =
        unsafe { (read_volatile(addr_of!((*ctx).protocol)), read_volatile(addr_of!((*ctx).user_port))) };
    (protocol, u16::from_be(port as u16))
}

#[inline(always)]
fn translate<F: Family>(ctx: *mut bpf_sock_addr, call: Call, addr: F::Addr) -> Result<Peer<F>, Reason>
where
    Kernel: Tables<F>,
{
    const TCP: u32 = IpProto::Tcp as u32;
    const UDP: u32 = IpProto::Udp as u32;
    let netns = NODE_NETNS.load();
    // SAFETY: helpers on a context that is valid while the program runs.
    let (owner, cookie) = unsafe { (bpf_get_netns_cookie(ctx.cast()), bpf_get_socket_cookie(ctx.cast())) };
    let (protocol, port) = asked(ctx);
    if SERVES_PODS.load() == 0 && owner != netns {
        return Err(Reason::OtherNamespace);
    }
    let proto = match protocol {
        TCP | IPPROTO_MPTCP => IpProto::Tcp as u8,
        UDP => IpProto::Udp as u8,
        _ => return Err(Reason::UnknownProtocol),
    };
    // Namespaces are numbered from 1 on; 24 bits of it fit into an address that nobody has.
    let owner = if owner == netns { 0 } else { owner as u32 & 0x00ff_ffff };
    let socket = Socket { cookie, proto, owner };
    let peer = Peer::<F> { addr, port };
    match call {
        Call::Connect => socket::connect(&Kernel, socket, peer),
        Call::Sendmsg => socket::sendmsg(&Kernel, socket, peer),
        Call::Name => socket::name(&Kernel, socket, peer),
    }
}

/// Fails the system call with an errno.
#[inline(always)]
fn fail(errno: i32) -> i32 {
    if HAVE_SET_RETVAL.load() != 0 {
        set_retval(-errno);
    }
    FAIL
}

/// `bpf_set_retval` (kernel commit b44123b4a3dc, 5.18), which the bindings lack.
#[inline(always)]
fn set_retval(value: i32) {
    const NUMBER: usize = 187;
    // SAFETY: the kernel calls helpers by number; this one takes one number and returns one.
    unsafe {
        let helper: unsafe extern "C" fn(i32) -> i32 = transmute(NUMBER);
        helper(value);
    }
}
