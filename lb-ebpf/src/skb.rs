//! A packet in a socket buffer.

use core::ptr::{addr_of, null_mut, read_volatile};

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_ENCAP_L4_UDP,
    BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, bpf_adj_room_mode,
};
use aya_ebpf::helpers::generated::{
    bpf_csum_update, bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh, bpf_skb_adjust_room,
    bpf_skb_change_tail, bpf_skb_pull_data,
};
use lb_common::checksum::Diff;
use lb_common::family::MAX_TRANSPORT;
use lb_common::packet::{ChecksumField, NETWORK, Route};
use lb_common::wire::{EthHdr, Ipv6FragHdr, TcpHdr, Wire};
use lb_common::{Family, Packet, Reason, abi};

use crate::bounds::locate;
use crate::fib::{self, Hop};
use crate::globals::HAVE_CSUM_IPV6;

/// `TC_ACT_UNSPEC` / `TCX_NEXT`: whatever other programs stand behind this one have their say, then the stack.
pub const NEXT: i32 = -1;
/// `TC_ACT_SHOT`.
pub const SHOT: i32 = 2;

/// `BPF_F_IPV6` of `bpf_l4_csum_replace` (kernel commit ead7f9b8de65): an IPv6 address is part of what
/// `CHECKSUM_COMPLETE` covers, so that its change and the checksum's cancel out.
const BPF_F_IPV6: u64 = 1 << 7;

/// `PACKET_OTHERHOST` (include/uapi/linux/if_packet.h).
const PACKET_OTHERHOST: u32 = 3;

/// `gso_size` of a packet that consists of a list of packets (`GSO_BY_FRAGS`): SCTP's.
const BY_FRAGS: u32 = 0xffff;

/// Headers we look at without extension headers: Ethernet, IPv6, TCP.
const HEADERS: usize = NETWORK + 40 + 20;

/// More than stands before a transport header that was parsed; a multiple of 4, as headers are aligned.
const HEAD: u32 = (MAX_TRANSPORT + Ipv6FragHdr::LEN + 4) as u32;

#[expect(clippy::struct_field_names, reason = "the kernel's name of it")]
pub struct Skb {
    skb: *mut __sk_buff,
    /// Device of the last way that was found.
    out_ifindex: u32,
    /// MTU of the last that was too narrow.
    mtu: u16,
    chosen: u32,
}

impl Skb {
    /// Takes a socket buffer, with its headers in the linear part.
    ///
    /// Not that of a local SCTP sender with GSO: the linear part has the headers of all its packets, which end with
    /// SCTP's common header, and to pull the first of the packets in would change where the kernel divides them.
    #[inline(always)]
    pub fn new(skb: *mut __sk_buff) -> Self {
        let mut packet = Self { skb, out_ifindex: 0, mtu: 0, chosen: 0 };
        // SAFETY: the context is valid while the program runs.
        if unsafe { (*skb).gso_size } != BY_FRAGS {
            packet.pull(HEADERS);
        }
        packet
    }

    /// Ethertype in host byte order; 0 for a frame of a VLAN.
    ///
    /// By the time tc sees it, the kernel has moved the tag out of the frame: what is left looks like a packet of the
    /// parent device, but belongs to the VLAN's own device, where it is seen next.
    #[inline(always)]
    pub fn ether_type(&self) -> u16 {
        // SAFETY: the context is valid while the program runs.
        let tagged = unsafe { (*self.skb).vlan_present } != 0;
        if tagged { 0 } else { self.view::<EthHdr>(0).map_or(0, |eth| eth.ether_type.get()) }
    }

    /// See `Xdp::bounds` for why this is `volatile`.
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        // SAFETY: the context is valid while the program runs.
        unsafe {
            (
                read_volatile(addr_of!((*self.skb).data)) as usize,
                read_volatile(addr_of!((*self.skb).data_end)) as usize,
            )
        }
    }

    /// Makes room behind the Ethernet header, or takes it away.
    #[inline(always)]
    fn adjust(&mut self, by: i32, flags: u32) -> Result<(), Reason> {
        let flags = u64::from(flags | BPF_F_ADJ_ROOM_FIXED_GSO);
        // SAFETY: the context is valid; all pointers into the packet are read anew afterwards.
        let result = unsafe { bpf_skb_adjust_room(self.skb, by, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, flags) };
        if result == 0 { Ok(()) } else { Err(Reason::RewriteFailed) }
    }

    /// Sends the packet to the device that [`Packet::route`] found; the kernel resolves the next hop.
    #[inline(always)]
    pub fn forward(&self) -> i32 {
        // SAFETY: a helper that only takes numbers here.
        unsafe { bpf_redirect_neigh(self.out_ifindex, null_mut(), 0, 0) as i32 }
    }

    /// Sends the packet back out of the device it came in through.
    #[inline(always)]
    pub fn send_back(&self) -> i32 {
        // SAFETY: a helper that only takes numbers.
        unsafe { bpf_redirect(self.ifindex(), 0) as i32 }
    }
}

impl Packet for Skb {
    const NEEDS_XDP_TRANSMIT: bool = false;
    const KEEPS_HOP: bool = false;

    #[inline(always)]
    fn size(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.skb).len }
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.skb).ifindex }
    }

    #[inline(always)]
    fn may_be_for_others(&self) -> bool {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.skb).pkt_type == PACKET_OTHERHOST }
    }

    #[inline(always)]
    fn has_hook_behind(&self) -> bool {
        false
    }

    #[inline(always)]
    fn view<T: Wire>(&self, at: usize) -> Result<&T, Reason> {
        // SAFETY: inside of the packet as just checked; `Wire` types take any bytes.
        locate::<T>(self.bounds(), at).map(|header| unsafe { &*header })
    }

    #[inline(always)]
    fn view_mut<T: Wire>(&mut self, at: usize) -> Result<&mut T, Reason> {
        // SAFETY: as in `view`; the verifier has the kernel unshare the headers of programs that write.
        locate::<T>(self.bounds(), at).map(|header| unsafe { &mut *header })
    }

    #[inline(always)]
    fn pull(&mut self, len: usize) {
        let (start, end) = self.bounds();
        let size = self.size();
        if end - start < len && ((end - start) as u32) < size {
            let len = if size < len as u32 { size } else { len as u32 };
            // SAFETY: the context is valid; pointers are read anew afterwards. A failure shows as a truncated packet.
            unsafe { bpf_skb_pull_data(self.skb, len) };
        }
    }

    /// Frees the packet from what is noted of its checksum, too. Only one thing ends `CHECKSUM_PARTIAL`: to take away, at
    /// the packet's head, the place from which the device would sum up (`skb_postpull_rcsum`, as of kernel commit
    /// 54c3f1a81421 of 6.2, which 5.10 and later were given, too). So the packet is made longer by that much before; in
    /// two steps, as any change of its length, but only a change, ends `CHECKSUM_COMPLETE`.
    #[inline(always)]
    fn resize(&mut self, len: u16) -> Result<(), Reason> {
        let longer = u32::from(len) + HEAD;
        // SAFETY: the context is valid; all pointers into the packet are read anew afterwards.
        let changed = unsafe {
            bpf_skb_change_tail(self.skb, longer + 4, 0) == 0
                && bpf_skb_change_tail(self.skb, longer, 0) == 0
                && bpf_skb_adjust_room(self.skb, -(HEAD as i32), bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, 0) == 0
        };
        if changed { Ok(()) } else { Err(Reason::RewriteFailed) }
    }

    /// The sizes of segments stay as they are: that they fit has been asked.
    #[inline(always)]
    fn widen<F: Family>(&mut self, len: u16) -> Result<(), Reason> {
        let family =
            if F::HEADER_LEN == 40 { BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 } else { BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 };
        self.adjust(i32::from(len), family | BPF_F_ADJ_ROOM_ENCAP_L4_UDP)
    }

    #[inline(always)]
    fn narrow(&mut self, len: u16) -> Result<(), Reason> {
        self.adjust(-i32::from(len), 0)
    }

    #[inline(always)]
    fn chosen(&self) -> u32 {
        self.chosen
    }

    #[inline(always)]
    fn set_chosen(&mut self, backend: u32) {
        self.chosen = backend;
    }

    /// With nothing added the kernel compares lengths itself; else it is told that of a segment, with headers of the usual
    /// size before it.
    #[inline(always)]
    fn route<F: Family>(
        &mut self,
        from: &F::Addr,
        to: &F::Addr,
        ip_len: u32,
        added: u16,
    ) -> Result<Route, Reason> {
        let ifindex = self.ifindex();
        // SAFETY: the context is valid while the program runs.
        let segment = unsafe { (*self.skb).gso_size };
        let len = match (added, segment) {
            (0, _) => 0,
            (_, 0 | BY_FRAGS) => ip_len,
            (_, segment) => segment + (F::HEADER_LEN + TcpHdr::LEN) as u32,
        };
        let mut hop = Hop::default();
        let route = fib::route::<F>(self.skb.cast(), ifindex, from, to, (len as u16, added), &mut hop);
        (self.out_ifindex, self.mtu) = (hop.ifindex, hop.mtu);
        route
    }

    #[inline(always)]
    fn out_ifindex(&self) -> u32 {
        self.out_ifindex
    }

    #[inline(always)]
    fn link(&self) -> abi::Link {
        abi::Link::default()
    }

    #[inline(always)]
    fn set_hop(&mut self, _hop: &abi::Hop) {}

    #[inline(always)]
    fn mtu(&self) -> u32 {
        self.mtu.into()
    }

    /// The kernel's helper knows whether the field holds a checksum or, with `CHECKSUM_PARTIAL`, the sum of the
    /// pseudo-header, and keeps `CHECKSUM_COMPLETE` right.
    #[inline(always)]
    fn update_checksum<F: Family>(
        &mut self,
        field: ChecksumField,
        pseudo: Diff,
        body: Diff,
    ) -> Result<(), Reason> {
        let at = field.at() as u32;
        let zero = match field {
            ChecksumField::Tcp { .. } | ChecksumField::Icmp { .. } => 0,
            ChecksumField::Udp { .. } => u64::from(BPF_F_MARK_MANGLED_0),
        };
        let is_v6 = F::HEADER_LEN == 40;
        let know_v6 = HAVE_CSUM_IPV6.load() != 0;
        let mut flags = zero | u64::from(BPF_F_PSEUDO_HDR);
        if is_v6 && know_v6 {
            flags |= BPF_F_IPV6;
        }
        // SAFETY: the context is valid; all pointers into the packet are read anew afterwards.
        unsafe {
            if bpf_l4_csum_replace(self.skb, at, 0, u64::from(pseudo.sum()), flags) != 0 {
                return Err(Reason::RewriteFailed);
            }
            if is_v6 && !know_v6 {
                // Takes back what the older helper does to CHECKSUM_COMPLETE; without it, this does nothing.
                bpf_csum_update(self.skb, pseudo.sum());
            }
            if bpf_l4_csum_replace(self.skb, at, 0, u64::from(body.sum()), zero) != 0 {
                return Err(Reason::RewriteFailed);
            }
        }
        Ok(())
    }

    /// IPv4 makes up for it in its own header's checksum, IPv6 has none.
    #[inline(always)]
    fn readdressed<F: Family>(&mut self, addresses: Diff) -> Result<(), Reason> {
        if F::HEADER_LEN == 40 {
            // SAFETY: the context is valid. Without CHECKSUM_COMPLETE it does nothing.
            unsafe { bpf_csum_update(self.skb, addresses.sum()) };
        }
        Ok(())
    }
}
