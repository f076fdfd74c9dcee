//! Packets that are tried on programs, and what came of them.

use std::net::{IpAddr, SocketAddr};

use etherparse::{IpNumber, NetHeaders, PacketBuilder, PacketHeaders};
use lb_common::crc32c;
use serde::Serialize;

use super::TraceError;
use crate::entries::Protocol;

/// Who talks to whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Tuple {
    pub source: IpAddr,
    pub source_port: u16,
    pub destination: IpAddr,
    pub destination_port: u16,
}

impl Tuple {
    pub(super) fn new(source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            source: source.ip(),
            source_port: source.port(),
            destination: destination.ip(),
            destination_port: destination.port(),
        }
    }

    pub fn source(&self) -> SocketAddr {
        SocketAddr::new(self.source, self.source_port)
    }

    pub fn destination(&self) -> SocketAddr {
        SocketAddr::new(self.destination, self.destination_port)
    }
}

/// What a packet is to its connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    /// The first.
    Opening,
    /// The answer to it.
    Answer,
    /// Any later one of the client.
    Later,
}

const TTL: u8 = 64;
/// Locally administered addresses; an edge that looks at the second is told its own instead.
const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
const WINDOW: u16 = 64240;
const PAYLOAD: &[u8] = b"fairlead trace";
/// Types of SCTP chunks: DATA, INIT, INIT ACK (RFC 9260, section 3.2).
const DATA: u8 = 0;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;

/// A frame with an Ethernet header.
pub(super) fn build(tuple: &Tuple, protocol: Protocol, part: Part) -> Result<Vec<u8>, TraceError> {
    let ethernet = PacketBuilder::ethernet2(MACS[0], MACS[1]);
    let network = match (tuple.source, tuple.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            ethernet.ipv4(source.octets(), destination.octets(), TTL)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            ethernet.ipv6(source.octets(), destination.octets(), TTL)
        }
        _ => return Err(TraceError::TwoFamilies),
    };
    let (from, to) = (tuple.source_port, tuple.destination_port);
    let mut frame = Vec::new();
    let written = match protocol {
        Protocol::Tcp => {
            let tcp = network.tcp(from, to, 1, WINDOW);
            let tcp = match part {
                Part::Opening => tcp.syn(),
                Part::Answer => tcp.syn().ack(2),
                Part::Later => tcp.ack(2),
            };
            tcp.write(&mut frame, &[])
        }
        Protocol::Udp => network.udp(from, to).write(&mut frame, PAYLOAD),
        Protocol::Sctp => network.write(&mut frame, IpNumber::SCTP, &sctp(from, to, part)),
    };
    written.map_err(|error| TraceError::Packet(error.to_string()))?;
    Ok(frame)
}

/// Header and one chunk with the fields of an INIT, which DATA of some bytes looks like.
fn sctp(from: u16, to: u16, part: Part) -> Vec<u8> {
    const CHUNK: u8 = 20;
    const CHECKSUM: std::ops::Range<usize> = 8..12;
    let kind = match part {
        Part::Opening => INIT,
        Part::Answer => INIT_ACK,
        Part::Later => DATA,
    };
    let mut packet = [from.to_be_bytes(), to.to_be_bytes()].concat();
    packet.extend([0; 8]);
    packet.extend([kind, 0, 0, CHUNK]);
    packet.resize(packet.len() + usize::from(CHUNK) - 4, 0);
    let checksum = crc32c::compute(&packet).to_le_bytes();
    packet[CHECKSUM].copy_from_slice(&checksum);
    packet
}

/// Who talks to whom in a frame; `None`: not with ports.
pub(super) fn read(frame: &[u8]) -> Option<Tuple> {
    let headers = PacketHeaders::from_ethernet_slice(frame).ok()?;
    let (source, destination): (IpAddr, IpAddr) = match headers.net? {
        NetHeaders::Ipv4(ip, _) => (ip.source.into(), ip.destination.into()),
        NetHeaders::Ipv6(ip, _) => (ip.source.into(), ip.destination.into()),
        NetHeaders::Arp(_) => return None,
    };
    let (source_port, destination_port) = match headers.transport {
        Some(etherparse::TransportHeader::Tcp(tcp)) => (tcp.source_port, tcp.destination_port),
        Some(etherparse::TransportHeader::Udp(udp)) => (udp.source_port, udp.destination_port),
        Some(_) => return None,
        None => {
            let ports = headers.payload.slice().first_chunk::<4>()?;
            (u16::from_be_bytes([ports[0], ports[1]]), u16::from_be_bytes([ports[2], ports[3]]))
        }
    };
    Some(Tuple { source, source_port, destination, destination_port })
}

#[cfg(test)]
mod tests {
    use lb_common::testing;

    use super::*;

    #[test]
    fn packets_are_what_they_were_built_as() {
        for (from, to) in [("192.0.2.1:40000", "10.96.0.1:80"), ("[2001:db8::1]:7", "[fd00::1]:80")] {
            let tuple = Tuple::new(from.parse().unwrap(), to.parse().unwrap());
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                for part in [Part::Opening, Part::Answer, Part::Later] {
                    let frame = build(&tuple, protocol, part).unwrap();
                    assert_eq!(read(&frame), Some(tuple), "{protocol} {part:?}");
                    // Checks every checksum, too.
                    let seen = testing::read(&frame).unwrap_or_else(|error| panic!("{protocol}: {error}"));
                    assert_eq!(seen.ends(), (tuple.source(), tuple.destination()));
                }
            }
        }
    }

    #[test]
    fn two_families_do_not_talk() {
        let tuple = Tuple::new("192.0.2.1:1".parse().unwrap(), "[fd00::1]:80".parse().unwrap());
        assert!(matches!(build(&tuple, Protocol::Tcp, Part::Opening), Err(TraceError::TwoFamilies)));
    }
}
