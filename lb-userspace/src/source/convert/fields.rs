//! Texts and numbers of Kubernetes' objects, and what is wrong with them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

use super::ITEMS;
use crate::entries::{Family, Protocol};
use crate::finding::Finding;
use crate::model::Service;

/// Bytes of somebody's text in a message.
const QUOTED: usize = 100;

pub(super) fn protocol(name: Option<&str>) -> Option<Protocol> {
    match name {
        None | Some("TCP" | "") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(_) => None,
    }
}

/// As Kubernetes reads addresses: leading zeros are decimal, an IPv4-mapped address is IPv4.
pub(super) fn parse_ip(text: &str) -> Option<IpAddr> {
    let addr = text.parse().ok().or_else(|| {
        let mut octets = [0u8; 4];
        let mut parts = text.split('.');
        for octet in &mut octets {
            let part = parts.next()?;
            let digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
            *octet = if digits { part.parse().ok()? } else { return None };
        }
        parts.next().is_none().then(|| IpAddr::V4(Ipv4Addr::from(octets)))
    });
    addr.map(|addr: IpAddr| addr.to_canonical())
}

/// As Kubernetes reads networks: white space around them does not matter, nor do bits behind the prefix.
pub fn parse_network(text: &str) -> Option<IpNet> {
    let (addr, prefix) = text.trim().split_once('/')?;
    let mapped = addr.contains(':');
    let addr = parse_ip(addr)?;
    let digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
    let prefix: u8 = if digits { prefix.parse().ok()? } else { return None };
    let prefix = if mapped && addr.is_ipv4() { prefix.checked_sub(96)? } else { prefix };
    Some(IpNet::new(addr, prefix).ok()?.trunc())
}

/// What somebody wrote, as far as a message has room for it.
fn shortened(mut text: String) -> String {
    if text.len() > QUOTED {
        text.truncate(text.floor_char_boundary(QUOTED));
        text.push('…');
    }
    text
}

/// An address that no Service and no endpoint can have.
fn is_unusable(addr: IpAddr) -> bool {
    let link_local = match addr {
        IpAddr::V4(addr) => addr.is_link_local() || addr.is_broadcast(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    };
    addr.is_unspecified() || addr.is_loopback() || addr.is_multicast() || link_local
}

/// What is wrong with the fields of one object.
pub(super) struct Findings {
    /// Begins the names of fields.
    pub(super) prefix: String,
    pub(super) found: Vec<Finding>,
}

impl Findings {
    fn field(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    /// So many items at most; the surplus is left out.
    pub(super) fn at_most<T>(&mut self, most: usize, field: &str, mut items: Vec<T>) -> Vec<T> {
        if items.len() > most {
            let field = self.field(field);
            self.found.push(Finding::TooMany { field, count: items.len(), most });
            items.truncate(most);
            items.shrink_to_fit();
        }
        items
    }

    pub(super) fn unusable(&mut self, field: &str, value: String) {
        let field = self.field(field);
        self.found.push(Finding::UnusableAddress { field, value: shortened(value) });
    }

    pub(super) fn address(&mut self, field: &str, text: String) -> Option<IpAddr> {
        let Some(addr) = parse_ip(&text) else {
            let field = self.field(field);
            self.found.push(Finding::BadAddress { field, value: shortened(text) });
            return None;
        };
        if is_unusable(addr) {
            self.unusable(field, text);
            return None;
        }
        Some(addr)
    }

    /// An address of the node, whichever it has.
    pub(super) fn host_ip(&mut self, field: &str, text: String) -> Option<IpAddr> {
        let addr = parse_ip(&text);
        if addr.is_none() {
            let field = self.field(field);
            self.found.push(Finding::BadAddress { field, value: text });
        }
        addr
    }

    pub(super) fn addresses(&mut self, field: &str, texts: Vec<String>) -> Vec<IpAddr> {
        let texts = self.at_most(ITEMS, field, texts);
        texts.into_iter().filter_map(|text| self.address(field, text)).collect()
    }

    /// By family; one that has no range, or one for everybody, is open to everybody. A range that cannot be read
    /// admits nobody, but it does not open what somebody meant to close.
    pub(super) fn source_ranges(
        &mut self,
        field: &str,
        texts: Vec<String>,
    ) -> BTreeMap<Family, BTreeSet<IpNet>> {
        let mut ranges: BTreeMap<Family, BTreeSet<IpNet>> = BTreeMap::new();
        for text in texts {
            if let Some(net) = parse_network(&text) {
                ranges.entry(Family::of(net.addr())).or_default().insert(net);
            } else {
                ranges.entry(if text.contains(':') { Family::V6 } else { Family::V4 }).or_default();
                let field = self.field(field);
                self.found.push(Finding::BadNetwork { field, value: shortened(text) });
            }
        }
        ranges.retain(|_, nets| nets.iter().all(|net| net.prefix_len() > 0));
        ranges
    }

    pub(super) fn port(&mut self, field: &str, value: i32) -> Option<u16> {
        let port = u16::try_from(value).ok().filter(|port| *port != 0);
        if port.is_none() {
            let field = self.field(field);
            self.found.push(Finding::BadPort { field, value: value.into() });
        }
        port
    }

    pub(super) fn timeout(&mut self, seconds: Option<i32>) -> u32 {
        let taken = Service::AFFINITY_SECONDS;
        let Some(value) = seconds else { return taken };
        u32::try_from(value).ok().filter(|seconds| *seconds > 0).unwrap_or_else(|| {
            let field = self.field("spec.sessionAffinityConfig.clientIP.timeoutSeconds");
            self.found.push(Finding::BadTimeout { field, value: value.into(), taken });
            taken
        })
    }

    pub(super) fn protocol(&mut self, port: String, name: Option<String>) -> Option<Protocol> {
        let converted = protocol(name.as_deref());
        if converted.is_none() {
            let protocol = shortened(name.unwrap_or_default());
            self.found.push(Finding::UnsupportedProtocol { port, protocol });
        }
        converted
    }

    /// The first of `values` is the default.
    pub(super) fn one_of<T: Copy, const N: usize>(
        &mut self,
        field: &str,
        value: Option<&str>,
        values: &[(&'static str, T); N],
    ) -> T {
        const { assert!(N > 0) };
        let (default, fallback) = values[0];
        let Some(value) = value.filter(|value| !value.is_empty()) else { return fallback };
        if let Some((_, known)) = values.iter().find(|(name, _)| *name == value) {
            return *known;
        }
        let field = self.field(field);
        self.found.push(Finding::UnknownValue { field, value: shortened(value.to_owned()), taken: default });
        fallback
    }
}
