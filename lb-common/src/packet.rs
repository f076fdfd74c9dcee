//! The bytes of one packet, wherever they are: in a driver's buffer (XDP), in a socket buffer (tc), or in a
//! `Vec` of a test.

use core::mem::offset_of;

use crate::abi::{Hop, Link};
use crate::checksum::Diff;
use crate::family::Family;
use crate::reason::Reason;
use crate::wire::{Be16, EthHdr, IcmpHdr, TcpHdr, UdpHdr, Wire};

/// Where the network header starts: programs run on devices with an Ethernet header.
pub const NETWORK: usize = EthHdr::LEN;

/// Where a route leads.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Route {
    /// Out of a device, to a next hop; the packet remembers both.
    Out = 1,
    /// To this node itself.
    Local = 2,
}

/// One packet with an Ethernet header.
pub trait Packet {
    /// A packet can only be sent to devices that `EDGES` marks [`crate::abi::edge_flags::XDP_TRANSMIT`], or back
    /// where it came from.
    const NEEDS_XDP_TRANSMIT: bool;

    /// The hook writes the link header itself, and need not ask the routing table for each packet where it leads.
    const KEEPS_HOP: bool;

    /// Length in bytes, the Ethernet header included.
    fn size(&self) -> u32;

    /// The device it came in through, or goes out of.
    fn ifindex(&self) -> u32;

    /// Whether the frame may be addressed to another host; `false` where the kernel has said that it is not.
    #[inline(always)]
    fn may_be_for_others(&self) -> bool {
        true
    }

    /// Whether another hook of ours sees the packet after this one, on its way into the stack.
    fn has_hook_behind(&self) -> bool;

    /// Looks at a header at a byte offset; [`Reason::Truncated`] if the packet ends before it does.
    fn view<T: Wire>(&self, at: usize) -> Result<&T, Reason>;

    /// As [`Packet::view`], to change it in place.
    fn view_mut<T: Wire>(&mut self, at: usize) -> Result<&mut T, Reason>;

    /// Makes the first `len` bytes, or all that there are, ready to be looked at. The usual headers always are.
    #[inline(always)]
    fn pull(&mut self, _len: usize) {}

    /// Makes the packet this long. What was in it is lost; offloads (GSO) are given up.
    fn resize(&mut self, len: u16) -> Result<(), Reason>;

    /// Makes room for headers behind the Ethernet header: a tunnel of family `F` over UDP, around a packet of the same
    /// family. Offloads (GSO) know of it.
    fn widen<F: Family>(&mut self, len: u16) -> Result<(), Reason>;

    /// Takes so much away behind the Ethernet header, with all that stands there.
    fn narrow(&mut self, len: u16) -> Result<(), Reason>;

    /// Id of the backend that another node has chosen for the packet, which has come out of a tunnel; 0: nobody has.
    fn chosen(&self) -> u32;

    /// Has [`Packet::chosen`] answer this.
    fn set_chosen(&mut self, backend: u32);

    /// Finds the way to `to` in the node's routing table and remembers next hop and MTU for the verdict. The packet will
    /// be longer by `added` then, each segment of it.
    ///
    /// [`Reason::NoNextHop`]: this hook cannot send it there, a later one can. [`Reason::PacketTooBig`]: longer
    /// than the MTU of the way, which [`Packet::mtu`] then tells.
    fn route<F: Family>(
        &mut self,
        from: &F::Addr,
        to: &F::Addr,
        ip_len: u32,
        added: u16,
    ) -> Result<Route, Reason>;

    /// The device of the last [`Route::Out`].
    fn out_ifindex(&self) -> u32;

    /// The Ethernet addresses of the last [`Route::Out`], as far as [`Packet::KEEPS_HOP`] needs them.
    fn link(&self) -> Link;

    /// Has the packet go this way without asking the routing table.
    fn set_hop(&mut self, hop: &Hop);

    /// MTU of the last way that was too narrow, less what would have been added, bytes.
    fn mtu(&self) -> u32;

    /// Updates a transport checksum: `pseudo` for the addresses, which it covers through the pseudo-header,
    /// `body` for the header itself.
    ///
    /// A socket buffer overrides this: with `CHECKSUM_PARTIAL` its field holds the pseudo-header's sum alone.
    #[inline(always)]
    fn update_checksum<F: Family>(
        &mut self,
        field: ChecksumField,
        pseudo: Diff,
        body: Diff,
    ) -> Result<(), Reason> {
        let check = self.view_mut::<Be16>(field.at())?;
        *check = Be16::from_raw(field.apply(pseudo.and(body), check.raw()));
        Ok(())
    }

    /// The addresses of a packet were changed whose checksum over them is in another fragment.
    ///
    /// A socket buffer overrides this: its `CHECKSUM_COMPLETE` is a sum over this packet alone.
    #[inline(always)]
    fn readdressed<F: Family>(&mut self, _addresses: Diff) -> Result<(), Reason> {
        Ok(())
    }

    /// Exchanges the Ethernet addresses, so that the packet goes back where it came from.
    #[inline(always)]
    fn turn_around(&mut self) -> Result<(), Reason> {
        let eth = self.view_mut::<EthHdr>(0)?;
        core::mem::swap(&mut eth.src, &mut eth.dst);
        Ok(())
    }
}

/// Where a transport checksum is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChecksumField {
    Tcp {
        /// Offset of the TCP header.
        header: usize,
    },
    Udp {
        /// Offset of the UDP header.
        header: usize,
    },
    Icmp {
        /// Offset of the ICMP or ICMPv6 header.
        header: usize,
    },
}

impl ChecksumField {
    /// The checksum after the changes.
    #[inline(always)]
    pub const fn apply(self, changes: Diff, check: u16) -> u16 {
        match self {
            Self::Tcp { .. } | Self::Icmp { .. } => changes.apply(check),
            Self::Udp { .. } => changes.apply_udp(check),
        }
    }

    /// Offset of the field.
    #[inline(always)]
    pub const fn at(self) -> usize {
        match self {
            Self::Tcp { header } => header + offset_of!(TcpHdr, check),
            Self::Udp { header } => header + offset_of!(UdpHdr, check),
            Self::Icmp { header } => header + offset_of!(IcmpHdr, check),
        }
    }
}
