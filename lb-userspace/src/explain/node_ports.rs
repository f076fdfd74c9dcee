//! What is settled about NodePorts beside the objects: which numbers the API server allows, and on which of the node's
//! addresses they answer.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;

use lb_common::abi::address_flags;

use super::NodeFacts;
use crate::edges::LocalAddress;
use crate::model::Node;
use crate::nodeports::{self, NodePortAddresses};

/// What is settled.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NodePorts {
    pub range: Range,
    /// Addresses of the node that they answer on; `None`: on all of them.
    pub addresses: Option<BTreeSet<IpAddr>>,
}

impl NodePorts {
    /// Whether they answer at an address, if it is one of the node.
    pub fn answer_at(&self, addr: IpAddr) -> bool {
        self.addresses.as_ref().is_none_or(|addresses| addresses.contains(&addr))
    }

    /// Where they answer, for people.
    pub fn places(&self) -> String {
        match &self.addresses {
            None => "every address".into(),
            Some(none) if none.is_empty() => "no address".into(),
            Some(some) => some.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        }
    }
}

/// The addresses of a node that `--nodeport-addresses` names; `None`: all of them. `node` is its object, if there is one.
pub fn named(
    allowed: &NodePortAddresses,
    facts: &NodeFacts,
    node: Option<&Node>,
) -> Option<BTreeSet<IpAddr>> {
    if *allowed == NodePortAddresses::All {
        return None;
    }
    let local = |addr: &IpAddr| LocalAddress {
        addr: *addr,
        device: String::new(),
        loopback: addr.is_loopback(),
        global: !addr.is_loopback(),
    };
    let addresses: Vec<LocalAddress> = facts.addresses.iter().map(local).collect();
    let flags = nodeports::flags(&addresses, allowed, node).into_iter();
    Some(flags.filter(|(_, flags)| flags & address_flags::NODE_PORT != 0).map(|(addr, _)| addr).collect())
}

/// `--service-node-port-range` of the API server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Range(RangeInclusive<u16>);

impl Range {
    pub fn contains(&self, number: i32) -> bool {
        u16::try_from(number).is_ok_and(|number| self.0.contains(&number))
    }
}

/// What API servers allow unless they are told.
impl Default for Range {
    fn default() -> Self {
        Self(30_000..=32_767)
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0.start(), self.0.end())
    }
}

/// `30000-32767`, `30000+2767` and `30000` are what the API server takes.
impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.trim().parse::<u16>().ok();
        let ends = if let Some((first, last)) = text.split_once('-') {
            number(first).zip(number(last))
        } else if let Some((first, more)) = text.split_once('+') {
            number(first).zip(number(more)).and_then(|(first, more)| Some((first, first.checked_add(more)?)))
        } else {
            number(text).map(|only| (only, only))
        };
        let range =
            ends.filter(|(first, last)| (1..=*last).contains(first)).map(|(first, last)| first..=last);
        range.map(Self).ok_or_else(|| format!("{text:?} is no range of ports like 30000-32767"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_written_as_for_the_api_server() {
        let range = |text: &str| text.parse::<Range>().map(|range| range.to_string());
        assert_eq!(range("20000-22767"), Ok("20000-22767".into()));
        assert_eq!(range("20000+2767"), Ok("20000-22767".into()));
        assert_eq!(range("20000"), Ok("20000-20000".into()));
        for wrong in ["", "0-10", "20-10", "1-65536", "65535+1", "a-b", "1-2-3"] {
            assert!(range(wrong).unwrap_err().contains("is no range of ports"), "{wrong}");
        }
        let range = Range::default();
        assert!(range.contains(30_000) && range.contains(32_767));
        assert!(!range.contains(29_999) && !range.contains(-1) && !range.contains(1 << 17));
    }

    #[test]
    fn the_flag_means_what_it_means_to_the_agent() {
        let mut node = Node::named("node-a");
        node.addresses = ["198.51.100.2", "192.0.2.2"].map(|addr| addr.parse().unwrap()).to_vec();
        let facts = NodeFacts::of(&node);
        let places = |values: &[&str]| {
            let values: Vec<String> = values.iter().map(|&value| value.into()).collect();
            let addresses = named(&NodePortAddresses::parse(&values).unwrap(), &facts, Some(&node));
            NodePorts { addresses, ..NodePorts::default() }.places()
        };
        assert_eq!(places(&[]), "every address");
        assert_eq!(places(&["192.0.2.0/24", "127.0.0.0/8"]), "127.0.0.1, 192.0.2.2");
        assert_eq!(places(&["primary"]), "198.51.100.2");
        assert_eq!(places(&["203.0.113.0/24"]), "no address");
    }
}
