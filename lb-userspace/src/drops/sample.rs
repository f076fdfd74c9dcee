//! One packet, or one call of a socket, that did not get what it asked for.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use lb_common::abi::Sample;
use lb_common::wire::tcp_flags;
use lb_common::{Addr6, Hook, Reason};
use serde::Serialize;

use crate::entries::{FrontendKey, Protocol, Snapshot};
use crate::inspect::{action_name, monotonic_nanoseconds};
use crate::owner;

/// A line of `fairlead drops --follow -o json`. The names of the fields are part of the public interface.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct SampleView {
    /// RFC 3339, UTC.
    pub time: String,
    pub hook: &'static str,
    pub reason: &'static str,
    /// `drop`, `reject`, `expire` or `shrink`.
    pub action: &'static str,
    /// The device the packet came in through or goes out of; `null` for sockets.
    pub device: Option<String>,
    /// `TCP`, `UDP`, `SCTP`, or the number of another.
    pub protocol: String,
    /// As the packet came; `null` for sockets.
    pub source: Option<SocketAddr>,
    pub destination: SocketAddr,
    /// `SYN`, `ACK`, ...; empty if it is not TCP.
    pub tcp_flags: Vec<&'static str>,
    /// Bytes of the IP packet; 0 for sockets.
    pub bytes: u32,
    /// Whose frontend the destination is; `null`: nobody's.
    pub namespace: Option<String>,
    /// `null`: nobody's.
    pub name: Option<String>,
}

impl SampleView {
    /// `None`: not of this build's programs.
    pub fn new(sample: &Sample, snapshot: &Snapshot, device: impl Fn(u32) -> String) -> Option<Self> {
        let reason = *Reason::ALL.get(usize::from(sample.reason))?;
        let hook = *Hook::ALL.get(usize::from(sample.hook))?;
        let of_socket = sample.ifindex == 0;
        let destination = SocketAddr::new(address(sample.dst), sample.dst_port);
        let protocol = Protocol::from_number(sample.proto);
        let name = protocol.and_then(|protocol| whose(snapshot, destination, protocol));
        Some(Self {
            time: wall_clock(sample.time),
            hook: hook.name(),
            reason: reason.name(),
            action: action_name(reason.action()),
            device: (!of_socket).then(|| device(sample.ifindex)),
            protocol: protocol.map_or_else(|| sample.proto.to_string(), |protocol| protocol.to_string()),
            source: (!of_socket).then(|| SocketAddr::new(address(sample.src), sample.src_port)),
            destination,
            tcp_flags: flag_names(sample.tcp_flags),
            bytes: sample.bytes,
            namespace: name.as_ref().map(|(namespace, _)| namespace.clone()),
            name: name.map(|(_, name)| name),
        })
    }
}

impl fmt::Display for SampleView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { time, hook, reason, action, protocol, destination, .. } = self;
        write!(f, "{time}  {hook:7}  {action:6}  {reason:18}  {protocol} ")?;
        match self.source {
            Some(source) => write!(f, "{source} > {destination}")?,
            None => write!(f, "socket > {destination}")?,
        }
        if !self.tcp_flags.is_empty() {
            write!(f, "  {}", self.tcp_flags.join(","))?;
        }
        if let Some(device) = &self.device {
            write!(f, "  {} bytes on {device}", self.bytes)?;
        }
        match (&self.namespace, &self.name) {
            (Some(namespace), Some(name)) => write!(f, "  {namespace}/{name}"),
            _ => Ok(()),
        }
    }
}

/// From what the programs write.
pub fn decode(bytes: &[u8]) -> Option<Sample> {
    let mut rest = bytes;
    let sample = Sample {
        time: u64::from_ne_bytes(take(&mut rest)?),
        ifindex: u32::from_ne_bytes(take(&mut rest)?),
        bytes: u32::from_ne_bytes(take(&mut rest)?),
        src: Addr6 { octets: take(&mut rest)? },
        dst: Addr6 { octets: take(&mut rest)? },
        src_port: u16::from_ne_bytes(take(&mut rest)?),
        dst_port: u16::from_ne_bytes(take(&mut rest)?),
        proto: u8::from_ne_bytes(take(&mut rest)?),
        tcp_flags: u8::from_ne_bytes(take(&mut rest)?),
        hook: u8::from_ne_bytes(take(&mut rest)?),
        reason: u8::from_ne_bytes(take(&mut rest)?),
    };
    rest.is_empty().then_some(sample)
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*head)
}

fn address(addr: Addr6) -> IpAddr {
    Ipv6Addr::from(addr.octets).to_canonical()
}

/// Whose frontend an address and port are: a NodePort answers on addresses of the node.
fn whose(snapshot: &Snapshot, at: SocketAddr, protocol: Protocol) -> Option<(String, String)> {
    let any = match at.ip() {
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    };
    let frontend = [at.ip(), any]
        .into_iter()
        .find_map(|addr| snapshot.frontends.get(&FrontendKey { addr, port: at.port(), protocol }))?;
    let name = snapshot.names.get(&frontend.id)?;
    Some((owner::text(&name.namespace), owner::text(&name.name)))
}

fn flag_names(flags: u8) -> Vec<&'static str> {
    let known =
        [(tcp_flags::SYN, "SYN"), (tcp_flags::FIN, "FIN"), (tcp_flags::RST, "RST"), (tcp_flags::ACK, "ACK")];
    known.into_iter().filter(|(flag, _)| flags & flag != 0).map(|(_, name)| name).collect()
}

/// What the clock on the wall showed when the kernel's showed this (ns).
fn wall_clock(monotonic: u64) -> String {
    let ago = Duration::from_nanos(monotonic_nanoseconds().saturating_sub(monotonic));
    let time = SystemTime::now().checked_sub(ago).and_then(|time| Timestamp::try_from(time).ok());
    time.map_or_else(String::new, |time| format!("{time:.3}"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use lb_common::abi::{OwnerName, Service};

    use super::*;
    use crate::entries::ServiceName;
    use crate::owner::Owner;

    fn mapped(octets: [u8; 4]) -> Addr6 {
        Addr6 { octets: std::net::Ipv4Addr::from(octets).to_ipv6_mapped().octets() }
    }

    fn sample() -> Sample {
        Sample {
            time: monotonic_nanoseconds(),
            ifindex: 3,
            bytes: 60,
            src: mapped([192, 0, 2, 7]),
            dst: mapped([192, 0, 2, 10]),
            src_port: 40000,
            dst_port: 30080,
            proto: 6,
            tcp_flags: tcp_flags::SYN,
            hook: Hook::Xdp as u8,
            reason: Reason::NoLocalEndpoints as u8,
        }
    }

    /// With a NodePort of `shop/web`.
    fn snapshot() -> Snapshot {
        let mut snapshot = Snapshot::default();
        let key = FrontendKey { addr: [0, 0, 0, 0].into(), port: 30080, protocol: Protocol::Tcp };
        snapshot.frontends.insert(key, Service { id: 7, ..Service::default() });
        let name = ServiceName { namespace: Arc::from("shop"), name: Arc::from("web") };
        snapshot.names.insert(7, OwnerName::from(&Owner::Service(name)));
        snapshot
    }

    #[test]
    fn a_packet_is_one_line() {
        let view = SampleView::new(&sample(), &snapshot(), |ifindex| format!("eth{ifindex}")).unwrap();
        let line = view.to_string();
        assert!(
            line.ends_with(
                "Z  xdp      drop    no_local_endpoints  TCP 192.0.2.7:40000 > 192.0.2.10:30080  SYN  60 bytes on eth3  shop/web"
            ),
            "{line}"
        );
    }

    #[test]
    fn a_socket_has_neither_device_nor_source() {
        let call = Sample {
            ifindex: 0,
            bytes: 0,
            src: Addr6::default(),
            src_port: 0,
            tcp_flags: 0,
            hook: Hook::Connect as u8,
            reason: Reason::NoEndpoints as u8,
            ..sample()
        };
        let view = SampleView::new(&call, &Snapshot::default(), |_| unreachable!()).unwrap();
        assert_eq!((view.device.as_ref(), view.source, view.name.as_ref()), (None, None, None));
        let line = view.to_string();
        assert!(
            line.ends_with("connect  reject  no_endpoints        TCP socket > 192.0.2.10:30080"),
            "{line}"
        );
    }

    #[test]
    fn what_programs_write_is_what_is_read() {
        let want = sample();
        let mut bytes = vec![];
        bytes.extend(want.time.to_ne_bytes());
        bytes.extend([want.ifindex, want.bytes].map(u32::to_ne_bytes).concat());
        bytes.extend([want.src.octets, want.dst.octets].concat());
        bytes.extend([want.src_port, want.dst_port].map(u16::to_ne_bytes).concat());
        bytes.extend([want.proto, want.tcp_flags, want.hook, want.reason]);
        assert_eq!(bytes.len(), size_of::<Sample>());
        assert_eq!(decode(&bytes), Some(want));
        assert_eq!(decode(&bytes[1..]), None);
        bytes.push(0);
        assert_eq!(decode(&bytes), None);
    }

    #[test]
    fn a_number_of_another_build_is_left_out() {
        let strange = Sample { reason: 200, ..sample() };
        assert_eq!(SampleView::new(&strange, &snapshot(), |_| String::new()), None);
    }
}
