//! Direct server return: packets that one node sends on to the node of their backend, as they came.
//!
//! The node that a client has reached chooses the backend and wraps the client's packets, whole and unchanged but for the
//! TTL, into Geneve (RFC 8926) to the backend's node, with an option that names the backend. That node takes them out and
//! translates them as it does those of clients of its own, with the choice made already: it answers the client itself, and
//! what it answers does not come by here.
//!
//! A tunnel is of the family of what is inside. Its packets are believed only if they come from a node of the cluster.

use core::cell::Cell;
use core::mem::size_of;

use crate::abi::{Edge, Flow, ServiceKey, Side, address_flags, backend_flags, backend_state};
use crate::checksum::Diff;
use crate::family::Family;
use crate::flow::tunnel_to;
use crate::hash;
use crate::packet::{NETWORK, Packet};
use crate::parse::{Parsed, parse};
use crate::reason::Reason;
use crate::tables::Tables;
use crate::wire::{Be16, Be32, GeneveHdr, GeneveOptHdr, IpProto, Ports, UdpHdr, Wire};

/// Default of `--tunnel-port` (IANA's for Geneve).
pub const DEFAULT_PORT: u16 = 6081;
/// The virtual network that is ours: whatever else comes to the port is somebody else's.
pub const VNI: u32 = 0x00fa_1ead;
/// Class of our option: of those for experiments (RFC 8926, section 7).
pub const OPTION_CLASS: u16 = 0xfff5;
/// Kind of our option: it must be understood.
pub const OPTION_KIND: u8 = 0x81;

/// [`Packet::chosen`] of a packet whose backend is not here: it goes on only if its flow is known.
pub const GONE: u32 = u32::MAX;

/// What stands between the tunnel's IP header and the packet.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TunnelHdr<A> {
    /// Its checksum is 0: what is inside has one (RFC 6935, section 5).
    pub udp: UdpHdr,
    pub geneve: GeneveHdr,
    pub option: GeneveOptHdr,
    /// The backend.
    pub target: Target<A>,
}

/// What our option says.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Target<A> {
    pub addr: A,
    pub port: Be16,
    /// IP protocol number of what is inside.
    pub proto: u8,
    pub pad: u8,
}

// SAFETY: `repr(C)` of such types, of even sizes, without gaps.
unsafe impl<A: Wire> Wire for TunnelHdr<A> {}

/// Bytes that a tunnel adds to a packet.
#[inline(always)]
pub const fn overhead<F: Family>() -> u16 {
    (F::HEADER_LEN + size_of::<TunnelHdr<F::Addr>>()) as u16
}

/// The Geneve header and the option's as we write them.
#[inline(always)]
pub const fn headers<F: Family>() -> (GeneveHdr, GeneveOptHdr) {
    let target = size_of::<Target<F::Addr>>() / 4;
    let geneve = GeneveHdr {
        version_len: (target + 1) as u8,
        flags: GeneveHdr::CRITICAL,
        protocol: Be16::new(F::ETHER_TYPE),
        vni: Be32::new(VNI << 8),
    };
    (geneve, GeneveOptHdr { class: Be16::new(OPTION_CLASS), kind: OPTION_KIND, len: target as u8 })
}

/// Wraps a packet, which is to leave through the device that it has found, for the node of its flow's backend.
#[inline(never)]
pub fn wrap<F: Family, P: Packet, T: Tables<F>>(
    packet: &mut P,
    tables: &T,
    parsed: &Parsed<F>,
    flow: &Flow<F::Addr>,
) -> Result<(), Reason> {
    let unspecified = F::Addr::default();
    let src = tables.edge(packet.out_ifindex()).map_or(unspecified, |edge: Edge| F::edge_addr(&edge));
    if src == unspecified {
        return Err(Reason::NoRoute);
    }
    // We are a router of it.
    F::readdress(packet, &parsed.key.src, &parsed.key.dst, Diff::NONE, true)?;
    packet.widen::<F>(overhead::<F>())?;
    let len = size_of::<TunnelHdr<F::Addr>>() as u16 + parsed.ip_len as u16;
    F::write_header(packet, &src, &flow.src, IpProto::Udp as u8, len)?;
    let (geneve, option) = headers::<F>();
    let port = hash::tuple::<F>(&parsed.key) as u16 | 0xc000;
    *packet.view_mut::<TunnelHdr<F::Addr>>(NETWORK + F::HEADER_LEN)? = TunnelHdr {
        udp: UdpHdr {
            ports: Ports { src: Be16::new(port), dst: Be16::new(tables.tunnel_port()) },
            len: Be16::new(len),
            check: Be16::new(0),
        },
        geneve,
        option,
        target: Target { addr: flow.dst, port: Be16::new(flow.dst_port), proto: parsed.key.proto, pad: 0 },
    };
    Ok(())
}

/// Takes a packet out of the tunnel that it came in by, if it did: `true`.
///
/// # Errors
///
/// Why the packet is not believed: it is dropped.
#[inline(always)]
pub fn unwrap<F: Family, P: Packet, T: Tables<F>>(packet: &mut P, tables: &T) -> Result<bool, Reason> {
    let port = tables.tunnel_port();
    if port == 0 || F::protocol(packet) != IpProto::Udp as u8 {
        return Ok(false);
    }
    match packet.view::<Ports>(NETWORK + F::HEADER_LEN) {
        Ok(ports) if ports.dst.get() == port => take_out::<F, P, T>(packet, tables),
        _ => Ok(false),
    }
}

/// [`unwrap`] of a packet to the tunnels' port.
#[inline(never)]
fn take_out<F: Family, P: Packet, T: Tables<F>>(packet: &mut P, tables: &T) -> Result<bool, Reason> {
    packet.pull(NETWORK + 2 * F::HEADER_LEN + size_of::<TunnelHdr<F::Addr>>() + 20);
    let mut parsed = Parsed::<F>::default();
    let header = NETWORK + F::HEADER_LEN;
    if parse(packet, Side::NicIn, &mut parsed).is_err() || parsed.fragment != 0 {
        return Ok(false);
    }
    // Others have tunnels, too.
    let ours =
        packet.view::<GeneveHdr>(header + UdpHdr::LEN).is_ok_and(|geneve| geneve.vni.get() == VNI << 8);
    if !ours || !is_known::<F, T>(tables, &parsed.key.dst, address_flags::NODE) {
        return Ok(false);
    }
    if !is_known::<F, T>(tables, &parsed.key.src, address_flags::PEER) {
        return Err(Reason::TunnelStranger);
    }
    let outside = overhead::<F>();
    if parsed.ip_len < u32::from(outside) + F::HEADER_LEN as u32 {
        return Err(Reason::TunnelBroken);
    }
    let tunnel = *packet.view::<TunnelHdr<F::Addr>>(header).map_err(|_| Reason::TunnelBroken)?;
    let (geneve, option) = headers::<F>();
    if tunnel.geneve != geneve || tunnel.option != option {
        return Err(Reason::TunnelBroken);
    }
    let backend = local::<F, T>(tables, &tunnel.target);
    packet.narrow(outside)?;
    packet.set_chosen(backend);
    Ok(true)
}

/// Whether the node knows this of an address.
#[inline(always)]
fn is_known<F: Family, T: Tables<F>>(tables: &T, addr: &F::Addr, flag: u32) -> bool {
    tables.address(addr).is_some_and(|info| info.flags & flag != 0)
}

/// The id of a backend of this node, or [`GONE`].
#[inline(never)]
fn local<F: Family, T: Tables<F>>(tables: &T, target: &Target<F::Addr>) -> u32 {
    let port = target.port.get();
    let key = ServiceKey { addr: target.addr, port, proto: target.proto, pad: 0 };
    let Some(place) = tables.place(&key) else { return GONE };
    match tables.backend(place.backend) {
        Some(backend)
            if backend.flags & backend_flags::LOCAL != 0
                && backend.state != backend_state::UNUSED
                && backend.addr == target.addr
                && backend.port == port =>
        {
            place.backend
        }
        _ => GONE,
    }
}

/// Has the packets of a connection that is in no table yet go to their backend's node in a tunnel, if that is known;
/// `false`: it is not.
#[inline(never)]
pub fn begin<F: Family, T: Tables<F>>(tables: &T, proto: u8, entry: &Cell<Flow<F::Addr>>) -> bool {
    let Flow { dst, dst_port, .. } = entry.get();
    match tables.place(&ServiceKey { addr: dst, port: dst_port, proto, pad: 0 }) {
        Some(place) if place.node != F::Addr::default() => {
            tunnel_to(entry, place.node);
            true
        }
        _ => false,
    }
}
