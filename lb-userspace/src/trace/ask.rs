//! What is asked on the command line: `FROM` and `TO`.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use crate::entries::Protocol;

/// Port of a client that does not name one.
const CLIENT_PORT: u16 = 40000;

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum From {
    /// A process of this node.
    Node,
    /// A pod, or a client outside.
    Client(SocketAddr),
}

/// What for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct To {
    pub target: Target,
    /// `None`: the only one there is.
    pub port: Option<u16>,
    pub protocol: Protocol,
}

/// An address, or a Service that has one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    Address(IpAddr),
    Service(String),
}

impl FromStr for From {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "node" {
            return Ok(Self::Node);
        }
        let (addr, port) = address(text).ok_or("expected ADDRESS, ADDRESS:PORT, [IPV6]:PORT or `node`")?;
        Ok(Self::Client(SocketAddr::new(addr, port.unwrap_or(CLIENT_PORT))))
    }
}

impl FromStr for To {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str =
            "expected ADDRESS:PORT, [IPV6]:PORT or svc/NAME[:PORT], and behind it /tcp, /udp or /sctp";
        let (prefix, rest) = match text.strip_prefix("svc/") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let (place, protocol) = match rest.split_once('/') {
            Some((place, name)) => (place, protocol(name).ok_or(EXPECTED)?),
            None => (rest, Protocol::Tcp),
        };
        if !prefix {
            let (addr, port) = address(place).ok_or(EXPECTED)?;
            return Ok(Self { target: Target::Address(addr), port, protocol });
        }
        let (name, port) = match place.split_once(':') {
            Some((name, port)) => (name, Some(port.parse().map_err(|_| EXPECTED)?)),
            None => (place, None),
        };
        if name.is_empty() {
            return Err(EXPECTED.into());
        }
        Ok(Self { target: Target::Service(name.into()), port, protocol })
    }
}

fn protocol(name: &str) -> Option<Protocol> {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
        .into_iter()
        .find(|protocol| protocol.to_string().eq_ignore_ascii_case(name))
}

fn address(text: &str) -> Option<(IpAddr, Option<u16>)> {
    if let Ok(addr) = text.parse::<SocketAddr>() {
        return Some((addr.ip(), Some(addr.port())));
    }
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    bare.parse().ok().map(|addr| (addr, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_told_by_address() {
        let client = |addr: &str| Ok(From::Client(addr.parse().unwrap()));
        assert_eq!("node".parse(), Ok(From::Node));
        assert_eq!("192.0.2.1".parse(), client("192.0.2.1:40000"));
        assert_eq!("192.0.2.1:7".parse(), client("192.0.2.1:7"));
        assert_eq!("2001:db8::1".parse(), client("[2001:db8::1]:40000"));
        assert_eq!("[2001:db8::1]".parse(), client("[2001:db8::1]:40000"));
        assert_eq!("[2001:db8::1]:7".parse(), client("[2001:db8::1]:7"));
        for bad in ["", "pod", "192.0.2.1:", "192.0.2.1:70000", "192.0.2.1/tcp"] {
            assert!(bad.parse::<From>().is_err(), "{bad}");
        }
    }

    #[test]
    fn targets_are_addresses_or_services() {
        let to = |target, port, protocol| Ok(To { target, port, protocol });
        let address = |addr: &str| Target::Address(addr.parse().unwrap());
        assert_eq!("10.96.0.1:80".parse(), to(address("10.96.0.1"), Some(80), Protocol::Tcp));
        assert_eq!("10.96.0.1:53/udp".parse(), to(address("10.96.0.1"), Some(53), Protocol::Udp));
        assert_eq!("[fd00::1]:80/SCTP".parse(), to(address("fd00::1"), Some(80), Protocol::Sctp));
        assert_eq!("fd00::1".parse(), to(address("fd00::1"), None, Protocol::Tcp));
        let service = || Target::Service("web".into());
        assert_eq!("svc/web".parse(), to(service(), None, Protocol::Tcp));
        assert_eq!("svc/web:80/udp".parse(), to(service(), Some(80), Protocol::Udp));
        for bad in ["", "web", "svc/", "svc/web:http", "10.96.0.1:80/icmp", "10.96.0.1:x"] {
            assert!(bad.parse::<To>().is_err(), "{bad}");
        }
    }
}
