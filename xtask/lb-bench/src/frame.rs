//! Who is who on the node, and the packets that they send.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use etherparse::PacketBuilder;

use crate::sender::{Client, FIRST_PORT};

pub(crate) const DEVICE_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
pub(crate) const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 1, 2];
/// Sequence numbers of the client and of the server.
const QUESTION: u32 = 1_000;
const ANSWER: u32 = 2_000;
const ETHERNET: usize = 14;
const TCP: usize = 20;

/// IP family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) const ALL: [Self; 2] = [Self::V4, Self::V6];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    const fn ip_header(self) -> usize {
        match self {
            Self::V4 => 20,
            Self::V6 => 40,
        }
    }

    /// Bytes of an address.
    pub(crate) const fn address_len(self) -> i16 {
        match self {
            Self::V4 => 4,
            Self::V6 => 16,
        }
    }

    /// Bytes of all headers of a TCP packet.
    pub(crate) const fn headers(self) -> usize {
        ETHERNET + self.ip_header() + TCP
    }

    /// Where an end's address and port stand in a frame.
    pub(crate) const fn end(self, end: Client) -> (i16, i16) {
        let (src, ports) = match self {
            Self::V4 => (26, 34),
            Self::V6 => (22, 54),
        };
        match end {
            Client::Source => (src, ports),
            Client::Destination => (src + self.address_len(), ports + 2),
        }
    }

    pub(crate) const fn node(self) -> IpAddr {
        match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
            Self::V6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
        }
    }

    pub(crate) const fn router(self) -> IpAddr {
        match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::new(192, 0, 2, 254)),
            Self::V6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0xfe)),
        }
    }

    /// The first client outside (RFC 2544 has set the network aside for this).
    pub(crate) const fn outside(self) -> SocketAddr {
        let ip = match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::new(198, 18, 0, 1)),
            Self::V6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0x2, 0, 0, 0, 0, 0, 1)),
        };
        SocketAddr::new(ip, FIRST_PORT)
    }

    /// The first pod that is a client.
    pub(crate) const fn pod(self) -> SocketAddr {
        let ip = match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::new(10, 244, 0, 1)),
            Self::V6 => IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 1)),
        };
        SocketAddr::new(ip, FIRST_PORT)
    }

    /// The backend with this number, which is on this node or on another.
    pub(crate) const fn backend(self, here: bool, number: u8) -> SocketAddr {
        let node = if here { 1 } else { 2 };
        let ip = match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::new(10, 245, node, number)),
            Self::V6 => IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x245, node as u16, 0, 0, 0, number as u16)),
        };
        SocketAddr::new(ip, 8080)
    }

    /// The ClusterIP of the Service with this number.
    pub(crate) fn cluster_ip(self, number: u32) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 0, 1).to_bits() + number).into(),
            Self::V6 => {
                let first = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 1).to_bits();
                Ipv6Addr::from_bits(first + u128::from(number)).into()
            }
        }
    }

    /// Somebody who is none of ours.
    pub(crate) const fn stranger(self) -> SocketAddr {
        let ip = match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9)),
            Self::V6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 9)),
        };
        SocketAddr::new(ip, 443)
    }
}

/// The TCP packet of a connection that is wanted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Segment {
    Syn,
    SynAck,
    /// With ten bytes, and the number that acknowledges the answer to its SYN.
    Data,
}

/// A frame of the link that the node is on.
pub(crate) fn tcp(segment: Segment, from: SocketAddr, to: SocketAddr) -> Result<Vec<u8>> {
    let ethernet = PacketBuilder::ethernet2(ROUTER_MAC, DEVICE_MAC);
    let ip = match (from.ip(), to.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => ethernet.ipv4(src.octets(), dst.octets(), 64),
        (src, dst) => ethernet.ipv6(octets(src), octets(dst), 64),
    };
    let sequence = if segment == Segment::SynAck { ANSWER } else { QUESTION };
    let tcp = ip.tcp(from.port(), to.port(), sequence, 64_000);
    let (tcp, payload): (_, &[u8]) = match segment {
        Segment::Syn => (tcp.syn(), &[]),
        Segment::SynAck => (tcp.syn().ack(QUESTION + 1), &[]),
        Segment::Data => (tcp.ack(ANSWER + 1), b"ten bytes!"),
    };
    let mut frame = Vec::with_capacity(tcp.size(payload.len()));
    tcp.write(&mut frame, payload).context("cannot make a packet")?;
    Ok(frame)
}

fn octets(addr: IpAddr) -> [u8; 16] {
    match addr {
        IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
        IpAddr::V6(addr) => addr.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_a_frame_are_where_they_are_said_to_be() {
        for family in Family::ALL {
            let (from, to) = (family.outside(), family.backend(false, 7));
            let frame = tcp(Segment::Syn, from, to).unwrap();
            assert_eq!(frame.len(), family.headers());
            for (end, addr) in [(Client::Source, from), (Client::Destination, to)] {
                let (address, port) = family.end(end);
                let read = |at: i16, len: i16| {
                    let at = usize::try_from(at).unwrap();
                    &frame[at..at + usize::try_from(len).unwrap()]
                };
                assert_eq!(read(port, 2), addr.port().to_be_bytes());
                let last = &octets(addr.ip())[16 - usize::try_from(family.address_len()).unwrap()..];
                assert_eq!(read(address, family.address_len()), last, "{family:?} {end:?}");
            }
        }
    }
}
