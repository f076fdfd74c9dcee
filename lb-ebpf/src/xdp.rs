//! A packet in a driver's buffer.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::bindings::{xdp_action, xdp_md};
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_xdp_adjust_head, bpf_xdp_adjust_tail};
use lb_common::packet::Route;
use lb_common::wire::{EthHdr, Wire};
use lb_common::{Family, Packet, Reason, abi};

use crate::bounds::locate;
use crate::fib::{self, Hop};

/// In the order that has parts of one word of the stack written together, as in [`lb_common::parse::Parsed`].
#[repr(C)]
pub struct Xdp {
    ctx: *mut xdp_md,
    hop: Hop,
    chosen: u32,
}

impl Xdp {
    #[inline(always)]
    pub fn new(ctx: *mut xdp_md) -> Self {
        Self { ctx, hop: Hop::default(), chosen: 0 }
    }

    /// Start and end of the packet.
    ///
    /// Read anew each time and `volatile`: as plain loads LLVM hoists arithmetic on them in front of the check, and
    /// the verifier, which follows registers, no longer sees that they were compared.
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        // SAFETY: the context is valid while the program runs.
        unsafe {
            (
                read_volatile(addr_of!((*self.ctx).data)) as usize,
                read_volatile(addr_of!((*self.ctx).data_end)) as usize,
            )
        }
    }

    /// Has the packet begin so much later, or earlier.
    #[inline(always)]
    fn adjust(&mut self, by: i32) -> Result<(), Reason> {
        // SAFETY: the context is valid; all pointers into the packet are read anew afterwards.
        let result = unsafe { bpf_xdp_adjust_head(self.ctx, by) };
        if result == 0 { Ok(()) } else { Err(Reason::RewriteFailed) }
    }

    /// Sends the packet to the next hop that [`Packet::route`] found.
    #[inline(always)]
    pub fn transmit(&mut self) -> u32 {
        let hop = self.hop;
        let Ok(eth) = self.view_mut::<EthHdr>(0) else { return xdp_action::XDP_DROP };
        eth.src = hop.link.src();
        eth.dst = hop.link.dst();
        if hop.ifindex == self.ifindex() {
            return xdp_action::XDP_TX;
        }
        // SAFETY: a helper that only takes numbers.
        unsafe { bpf_redirect(hop.ifindex, 0) as u32 }
    }
}

impl Packet for Xdp {
    const NEEDS_XDP_TRANSMIT: bool = true;
    const KEEPS_HOP: bool = true;

    #[inline(always)]
    fn size(&self) -> u32 {
        let (start, end) = self.bounds();
        (end - start) as u32
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.ctx).ingress_ifindex }
    }

    #[inline(always)]
    fn has_hook_behind(&self) -> bool {
        true
    }

    #[inline(always)]
    fn view<T: Wire>(&self, at: usize) -> Result<&T, Reason> {
        // SAFETY: inside of the packet as just checked; `Wire` types take any bytes.
        locate::<T>(self.bounds(), at).map(|header| unsafe { &*header })
    }

    #[inline(always)]
    fn view_mut<T: Wire>(&mut self, at: usize) -> Result<&mut T, Reason> {
        // SAFETY: as in `view`, and the packet is this program's alone.
        locate::<T>(self.bounds(), at).map(|header| unsafe { &mut *header })
    }

    #[inline(always)]
    fn resize(&mut self, len: u16) -> Result<(), Reason> {
        let change = i32::from(len) - self.size() as i32;
        // To grow at the head always finds room (XDP_PACKET_HEADROOM); at the tail only with some drivers.
        // SAFETY: the context is valid; all pointers into the packet are read anew afterwards.
        let result = unsafe {
            if change > 0 {
                bpf_xdp_adjust_head(self.ctx, -change)
            } else {
                bpf_xdp_adjust_tail(self.ctx, change)
            }
        };
        if result == 0 { Ok(()) } else { Err(Reason::RewriteFailed) }
    }

    #[inline(always)]
    fn widen<F: Family>(&mut self, len: u16) -> Result<(), Reason> {
        self.adjust(-i32::from(len))?;
        let eth = *self.view::<EthHdr>(usize::from(len))?;
        *self.view_mut::<EthHdr>(0)? = eth;
        Ok(())
    }

    #[inline(always)]
    fn narrow(&mut self, len: u16) -> Result<(), Reason> {
        let eth = *self.view::<EthHdr>(0)?;
        *self.view_mut::<EthHdr>(usize::from(len))? = eth;
        self.adjust(i32::from(len))
    }

    #[inline(always)]
    fn chosen(&self) -> u32 {
        self.chosen
    }

    #[inline(always)]
    fn set_chosen(&mut self, backend: u32) {
        self.chosen = backend;
    }

    #[inline(always)]
    fn route<F: Family>(
        &mut self,
        from: &F::Addr,
        to: &F::Addr,
        ip_len: u32,
        added: u16,
    ) -> Result<Route, Reason> {
        let ifindex = self.ifindex();
        let len = (ip_len as u16, added);
        let route = fib::route::<F>(self.ctx.cast(), ifindex, from, to, len, &mut self.hop)?;
        if route as u32 == Route::Out as u32 && !self.hop.resolved {
            // tc comes next, and has the kernel resolve it.
            return Err(Reason::NoNextHop);
        }
        Ok(route)
    }

    #[inline(always)]
    fn out_ifindex(&self) -> u32 {
        self.hop.ifindex
    }

    #[inline(always)]
    fn link(&self) -> abi::Link {
        self.hop.link
    }

    #[inline(always)]
    fn set_hop(&mut self, hop: &abi::Hop) {
        self.hop.ifindex = hop.ifindex;
        self.hop.link = hop.link();
    }

    #[inline(always)]
    fn mtu(&self) -> u32 {
        self.hop.mtu.into()
    }
}
