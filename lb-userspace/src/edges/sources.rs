//! `--source-addresses`: which further addresses of a device are sources of connections that are sent on through it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use lb_common::abi::{self, EdgeSourceKey};

use super::classify::Device;
use super::edge_entry;

/// Further sources of one device at most, per family.
const MOST: usize = 255;

/// Beside its first ones; in the order of the addresses, so that a restart finds each where it was.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Further {
    addr4: Vec<Ipv4Addr>,
    addr6: Vec<Ipv6Addr>,
}

/// The further sources of a device whose first ones are `addr4` and `addr6`.
pub(super) fn further_sources(
    device: &Device,
    addr4: Ipv4Addr,
    addr6: Ipv6Addr,
    networks: &[IpNet],
) -> Further {
    let mut further = Further::default();
    let mut addresses: Vec<IpAddr> = device
        .addresses
        .iter()
        .filter(|address| address.global && !address.unsettled)
        .map(|address| address.addr)
        .filter(|addr| networks.iter().any(|network| network.contains(addr)))
        .filter(|addr| *addr != IpAddr::V4(addr4) && *addr != IpAddr::V6(addr6))
        .collect();
    addresses.sort();
    addresses.dedup();
    for addr in addresses {
        match addr {
            IpAddr::V4(addr) => further.addr4.push(addr),
            IpAddr::V6(addr) => further.addr6.push(addr),
        }
    }
    further.addr4.truncate(MOST);
    further.addr6.truncate(MOST);
    further
}

impl Further {
    /// How many there are of IPv4 and of IPv6.
    #[expect(clippy::cast_possible_truncation, reason = "at most 255")]
    pub(super) fn counts(&self) -> (u16, u16) {
        (self.addr4.len() as u16, self.addr6.len() as u16)
    }

    /// Entries of `EDGE_SOURCES`.
    pub(super) fn entries(&self, ifindex: u32) -> impl Iterator<Item = (EdgeSourceKey, abi::Edge)> {
        (0..self.addr4.len().max(self.addr6.len())).zip(0..).map(move |(n, index)| {
            let addr4 = self.addr4.get(n).copied().unwrap_or(Ipv4Addr::UNSPECIFIED);
            let addr6 = self.addr6.get(n).copied().unwrap_or(Ipv6Addr::UNSPECIFIED);
            (EdgeSourceKey { ifindex, index }, edge_entry(addr4, addr6, 0))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::classify::Address;
    use super::*;

    #[test]
    fn settled_addresses_of_the_networks_but_for_the_first_are_further_sources() {
        let address = |addr: &str, global, unsettled| Address {
            addr: addr.parse().unwrap(),
            prefix_len: 24,
            global,
            secondary: true,
            unsettled,
            permanent: true,
        };
        let device = Device {
            addresses: vec![
                address("192.0.2.1", true, false),
                address("192.0.2.9", true, false),
                address("192.0.2.4", true, false),
                address("192.0.2.5", false, false),
                address("198.51.100.1", true, false),
                address("2001:db8::1", true, false),
                address("2001:db8::2", true, true),
                address("2001:db8::3", true, false),
            ],
            ..Device::default()
        };
        let (first4, first6) = ("192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap());
        let networks =
            |texts: &[&str]| -> Vec<IpNet> { texts.iter().map(|text| text.parse().unwrap()).collect() };
        let further = further_sources(&device, first4, first6, &networks(&["192.0.2.0/24", "2001:db8::/64"]));
        assert_eq!(further.counts(), (2, 1));
        let entries: Vec<_> = further.entries(7).collect();
        assert_eq!(entries.len(), 2);
        let of = |n: usize| {
            let (key, entry) = entries[n];
            (key.index, Ipv4Addr::from(entry.addr4.octets), Ipv6Addr::from(entry.addr6.octets))
        };
        assert_eq!(of(0), (0, "192.0.2.4".parse().unwrap(), "2001:db8::3".parse().unwrap()));
        assert_eq!(of(1), (1, "192.0.2.9".parse().unwrap(), Ipv6Addr::UNSPECIFIED));
        assert_eq!(further_sources(&device, first4, first6, &[]), Further::default());
    }
}
