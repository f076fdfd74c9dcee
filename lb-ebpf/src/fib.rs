//! The node's routing table, through `bpf_fib_lookup` (kernel commit 87f5fc7e48dd).

use core::ffi::c_void;
use core::mem::{offset_of, size_of, zeroed};
use core::ptr::addr_of_mut;

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED,
    BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup,
};
use aya_ebpf::helpers::generated::bpf_fib_lookup as fib_lookup;
use lb_common::abi::Link;
use lb_common::packet::Route;
use lb_common::{Family, Reason};

/// MTU that senders are told where the kernel does not tell it: before 5.12 (commit e1850ea9bd9e) it leaves the length
/// that it was asked about, which is none that fits. Every link for IPv6 carries so much (RFC 8200, section 5).
const UNTOLD_MTU: u16 = 1280;

/// The way out that was found.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Hop {
    pub ifindex: u32,
    /// Ethernet addresses of the device and of the next hop.
    pub link: Link,
    /// MTU of a way that was too narrow, bytes.
    pub mtu: u16,
    /// The next hop's address is known.
    pub resolved: bool,
}

/// Asks where a packet from `from` to `to` goes that came in through `ifindex`.
///
/// `ip_len` and `added` are compared with the MTU; 0: the kernel looks at the socket buffer, which knows of segments.
#[inline(always)]
pub fn route<F: Family>(
    ctx: *mut c_void,
    ifindex: u32,
    from: &F::Addr,
    to: &F::Addr,
    (ip_len, added): (u16, u16),
    hop: &mut Hop,
) -> Result<Route, Reason> {
    let len = ip_len.saturating_add(added);
    // SAFETY: all zeroes are a valid `bpf_fib_lookup`.
    let mut params: bpf_fib_lookup = unsafe { zeroed() };
    params.family = F::ADDRESS_FAMILY;
    params.ifindex = ifindex;
    params.__bindgen_anon_1.tot_len = len;
    // SAFETY: both unions hold an address of either family at their start, and are as large as the larger one.
    unsafe {
        addr_of_mut!(params.__bindgen_anon_3).cast::<F::Addr>().write_unaligned(*from);
        addr_of_mut!(params.__bindgen_anon_4).cast::<F::Addr>().write_unaligned(*to);
    }
    // SAFETY: a context of XDP or tc, and parameters of the size told.
    let result = unsafe { fib_lookup(ctx, &raw mut params, size_of::<bpf_fib_lookup>() as i32, 0) };
    hop.ifindex = params.ifindex;
    match u32::try_from(result) {
        Ok(BPF_FIB_LKUP_RET_SUCCESS) => {
            const AT: usize = offset_of!(bpf_fib_lookup, smac) / size_of::<u32>();
            // SAFETY: both stand one behind the other, and are as many bytes.
            let [first, both, last] =
                unsafe { (&raw const params).cast::<u32>().add(AT).cast::<[u32; 3]>().read() };
            hop.link = Link(first, both, last);
            hop.resolved = true;
            Ok(Route::Out)
        }
        Ok(BPF_FIB_LKUP_RET_NO_NEIGH) => {
            hop.resolved = false;
            Ok(Route::Out)
        }
        Ok(BPF_FIB_LKUP_RET_NOT_FWDED) => Ok(Route::Local),
        Ok(BPF_FIB_LKUP_RET_FRAG_NEEDED) => {
            // SAFETY: a field of a union of two u16.
            let told = unsafe { params.__bindgen_anon_1.mtu_result };
            let mtu = if told == len { UNTOLD_MTU } else { told };
            hop.mtu = mtu.saturating_sub(added);
            Err(Reason::PacketTooBig)
        }
        _ => Err(Reason::NoRoute),
    }
}
