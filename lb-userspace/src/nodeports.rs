//! `--nodeport-addresses`: on which of the node's addresses NodePorts answer. Host ports, which nobody restricts,
//! answer on all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use lb_common::abi::address_flags;

use crate::edges::LocalAddress;
use crate::entries::Family;
use crate::model::Node;
use crate::source::convert::parse_network;

/// `--nodeport-addresses`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum NodePortAddresses {
    /// Every address of the node, loopback included.
    #[default]
    All,
    /// The first address of each family that the Node object names.
    Primary,
    /// Addresses in one of these networks.
    In(Vec<IpNet>),
}

/// Not `primary`, and not a list of networks.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("--nodeport-addresses: {0:?} is not a network like 192.0.2.0/24; `primary` stands alone")]
pub struct BadNetwork(String);

impl NodePortAddresses {
    /// What the values of the flag mean.
    pub fn parse(values: &[String]) -> Result<Self, BadNetwork> {
        match values {
            [] => Ok(Self::All),
            [primary] if primary == "primary" => Ok(Self::Primary),
            networks => {
                let parse = |text: &String| parse_network(text).ok_or_else(|| BadNetwork(text.clone()));
                networks.iter().map(parse).collect::<Result<_, _>>().map(Self::In)
            }
        }
    }

    /// Where a server has to listen that answers on the same addresses.
    pub fn servers(&self, flags: &BTreeMap<IpAddr, u32>) -> BTreeSet<IpAddr> {
        let flagged = flags.iter().filter(|(_, flags)| **flags & address_flags::NODE_PORT != 0);
        let listed = flagged.map(|(addr, _)| *addr);
        let all = |family| match self {
            Self::All => true,
            Self::Primary => false,
            Self::In(nets) => {
                nets.iter().any(|net| net.prefix_len() == 0 && Family::of(net.addr()) == family)
            }
        };
        let families = [Family::V4, Family::V6].into_iter().filter(|family| all(*family));
        let any: BTreeSet<IpAddr> = families.map(Family::unspecified).collect();
        listed.filter(|addr| !all(Family::of(*addr))).chain(any.iter().copied()).collect()
    }

    fn allow(&self, addr: IpAddr, node: Option<&Node>) -> bool {
        match self {
            Self::All => true,
            Self::Primary => {
                let of_family = |other: &&IpAddr| Family::of(**other) == Family::of(addr);
                node.and_then(|node| node.addresses.iter().find(of_family)) == Some(&addr)
            }
            Self::In(networks) => networks.iter().any(|network| network.contains(&addr)),
        }
    }
}

/// What `ADDRESSES4/6` should say of the node's own addresses.
pub fn flags(
    addresses: &[LocalAddress],
    allowed: &NodePortAddresses,
    node: Option<&Node>,
) -> BTreeMap<IpAddr, u32> {
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let mut flags = BTreeMap::new();
    for address in addresses {
        let kind = if address.loopback { address_flags::LOOPBACK } else { address_flags::NODE };
        flags.insert(address.addr, kind);
    }
    // Known before loopback is up, and whatever else is on it: of 127.0.0.0/8 ports answer on one.
    flags.extend(loopback.map(|addr| (addr, address_flags::LOOPBACK)));
    for (addr, flags) in &mut flags {
        let candidate = *flags & address_flags::LOOPBACK == 0 || loopback.contains(addr);
        if candidate {
            *flags |= address_flags::HOST_PORT;
        }
        if candidate && allowed.allow(*addr, node) {
            *flags |= address_flags::NODE_PORT;
        }
    }
    flags
}

#[cfg(test)]
mod tests {
    use address_flags::{HOST_PORT, LOOPBACK, NODE, NODE_PORT};

    use super::*;

    fn local(addr: &str, loopback: bool) -> LocalAddress {
        LocalAddress { addr: addr.parse().unwrap(), device: "eth0".into(), loopback, global: !loopback }
    }

    fn show(values: &[&str], node: Option<&Node>) -> Vec<(String, u32)> {
        let addresses = [
            local("192.0.2.2", false),
            local("198.51.100.2", false),
            local("fd00::2", false),
            local("127.0.0.1", true),
            local("127.0.0.53", true),
        ];
        let values: Vec<String> = values.iter().map(|value| (*value).into()).collect();
        let allowed = NodePortAddresses::parse(&values).unwrap();
        flags(&addresses, &allowed, node).into_iter().map(|(addr, flags)| (addr.to_string(), flags)).collect()
    }

    fn expect(rows: [(&str, u32); 6]) -> Vec<(String, u32)> {
        rows.map(|(addr, flags)| (addr.into(), flags)).to_vec()
    }

    /// Rules 26 to 31, with NodePorts on every address by default.
    #[test]
    fn every_address_is_the_default() {
        let expected = expect([
            ("127.0.0.1", LOOPBACK | HOST_PORT | NODE_PORT),
            ("127.0.0.53", LOOPBACK),
            ("192.0.2.2", NODE | HOST_PORT | NODE_PORT),
            ("198.51.100.2", NODE | HOST_PORT | NODE_PORT),
            ("::1", LOOPBACK | HOST_PORT | NODE_PORT),
            ("fd00::2", NODE | HOST_PORT | NODE_PORT),
        ]);
        assert_eq!(show(&[], None), expected);
        assert_eq!(show(&["0.0.0.0/0", "::/0"], None), expected);
    }

    #[test]
    fn networks_restrict() {
        let expected = expect([
            ("127.0.0.1", LOOPBACK | HOST_PORT),
            ("127.0.0.53", LOOPBACK),
            ("192.0.2.2", NODE | HOST_PORT | NODE_PORT),
            ("198.51.100.2", NODE | HOST_PORT),
            ("::1", LOOPBACK | HOST_PORT),
            ("fd00::2", NODE | HOST_PORT | NODE_PORT),
        ]);
        assert_eq!(show(&["192.0.2.0/24", "fd00::/8"], None), expected);
        assert_eq!(show(&["192.000.002.000/024", "fd00::/8"], None), expected);
    }

    #[test]
    fn primary_is_what_the_node_object_names_first() {
        let mut node = Node::named("node-a");
        node.addresses = ["198.51.100.2", "192.0.2.2"].map(|addr| addr.parse().unwrap()).to_vec();
        let expected = expect([
            ("127.0.0.1", LOOPBACK | HOST_PORT),
            ("127.0.0.53", LOOPBACK),
            ("192.0.2.2", NODE | HOST_PORT),
            ("198.51.100.2", NODE | HOST_PORT | NODE_PORT),
            ("::1", LOOPBACK | HOST_PORT),
            ("fd00::2", NODE | HOST_PORT),
        ]);
        assert_eq!(show(&["primary"], Some(&node)), expected);
        assert!(show(&["primary"], None).iter().all(|(_, flags)| flags & NODE_PORT == 0));
    }

    /// Rule 101.
    #[test]
    fn servers_listen_where_node_ports_answer() {
        let servers = |values: &[&str]| {
            let addresses =
                [local("192.0.2.2", false), local("198.51.100.2", false), local("fd00::2", false)];
            let values: Vec<String> = values.iter().map(|value| (*value).into()).collect();
            let allowed = NodePortAddresses::parse(&values).unwrap();
            let servers = allowed.servers(&flags(&addresses, &allowed, None));
            servers.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(servers(&[]), ["0.0.0.0", "::"]);
        assert_eq!(servers(&["0.0.0.0/0", "::/0"]), ["0.0.0.0", "::"]);
        assert_eq!(servers(&["192.0.2.0/24", "fd00::/8"]), ["192.0.2.2", "fd00::2"]);
        assert_eq!(servers(&["192.0.2.0/24", "127.0.0.0/8", "::/0"]), ["127.0.0.1", "192.0.2.2", "::"]);
        assert_eq!(servers(&["primary"]), [""; 0]);
    }

    #[test]
    fn what_is_no_network_is_refused() {
        let error = |values: &[&str]| {
            let values: Vec<String> = values.iter().map(|value| (*value).into()).collect();
            NodePortAddresses::parse(&values).unwrap_err().to_string()
        };
        assert!(error(&["192.0.2.0/33"]).contains("\"192.0.2.0/33\" is not a network"));
        assert!(error(&["primary", "192.0.2.0/24"]).contains("\"primary\" is not a network"));
    }
}
