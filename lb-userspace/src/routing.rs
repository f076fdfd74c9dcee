//! Tells the programs for how long they may believe the next hops that flows remember (`ROUTING`).
//!
//! What the kernel says over netlink of links, addresses, routes, rules and neighbours advances a generation: from then
//! on the routing table is asked anew, once for each flow. Between a change and the word of it lie some microseconds, on a
//! busy node milliseconds. An agent that is gone does not vouch any more, and programs ask for each packet, as they
//! do where there never was one.

use std::collections::HashMap;
use std::future::pending;
use std::io;
use std::time::Duration;

use aya::maps::{Array, MapData};
use futures::StreamExt;
use lb_common::abi;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::datapath::{Datapath, MapError, OpenError};
use crate::inspect::monotonic_nanoseconds;

/// How often the agent vouches that it still follows.
const BEAT: Duration = Duration::from_millis(500);
/// For how long it is believed.
const TRUST: Duration = Duration::from_secs(2);
/// After a change, our own maps follow; then hops are asked for once more.
const AFTERTHOUGHT: Duration = Duration::from_secs(1);
/// Neighbours whose state is known; the rest count as changed each time they are heard of.
const NEIGHBOURS: usize = 64 * 1024;

const GROUPS: [MulticastGroup; 9] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
    MulticastGroup::Nexthop,
];

/// The map.
pub struct Routing {
    map: Array<MapData, abi::Routing>,
    now: abi::Routing,
}

impl Routing {
    /// What an earlier agent's programs remember is asked for anew: nobody has followed since.
    pub fn open(datapath: &Datapath) -> Result<Self, OpenError> {
        let map = datapath.routing_map()?;
        let generation = map.get(&0, 0).map_or(0, |before| before.generation);
        Ok(Self { map, now: abi::Routing { generation: next(generation), ..abi::Routing::default() } })
    }

    /// Something has changed.
    pub fn advance(&mut self) -> Result<(), MapError> {
        self.now.generation = next(self.now.generation);
        self.write()
    }

    /// For so long hops are to be believed.
    pub fn vouch(&mut self, how_long: Duration) -> Result<(), MapError> {
        let how_long = u64::try_from(how_long.as_nanos()).unwrap_or(u64::MAX);
        self.now.until = monotonic_nanoseconds().saturating_add(how_long);
        self.write()
    }

    fn write(&mut self) -> Result<(), MapError> {
        self.map
            .set(0, self.now, 0)
            .map_err(|error| MapError::Failed { map: "ROUTING".into(), reason: error.to_string() })
    }
}

impl Drop for Routing {
    fn drop(&mut self) {
        self.now.until = 0;
        // If it fails, nobody is believed soon.
        let _ = self.write();
    }
}

/// The generation after this one; 0 is none.
const fn next(generation: u32) -> u32 {
    match generation.wrapping_add(1) {
        0 => 1,
        next => next,
    }
}

/// Follows what the kernel says, for as long as the agent runs.
pub async fn follow(mut routing: Routing) {
    if let Err(error) = attend(&mut routing).await {
        tracing::warn!(%error, "changes of routes cannot be followed: XDP asks the routing table for each packet");
    }
}

async fn attend(routing: &mut Routing) -> io::Result<()> {
    let (connection, _handle, mut messages) = rtnetlink::new_multicast_connection(&GROUPS)?;
    let connection = tokio::spawn(connection);
    let _ends = AbortOnDrop(connection);
    let mut neighbours = Neighbours::default();
    let mut beat = interval(BEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut again: Option<Instant> = None;
    loop {
        let written = tokio::select! {
            // What was said comes before the word that all was heard.
            biased;
            message = messages.next() => {
                let Some((message, _)) = message else {
                    return Err(io::Error::other("the netlink socket was closed"));
                };
                if !neighbours.is_change(&message) {
                    continue;
                }
                again = Some(Instant::now() + AFTERTHOUGHT);
                routing.advance()
            }
            () = async { match again { Some(at) => sleep_until(at).await, None => pending().await } } => {
                again = None;
                routing.advance()
            }
            _ = beat.tick() => routing.vouch(TRUST),
        };
        written.map_err(io::Error::other)?;
    }
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What is known of neighbours: most messages about them only say that they still live.
#[derive(Debug, Default)]
struct Neighbours(HashMap<(u32, Vec<u8>), Option<Vec<u8>>>);

impl Neighbours {
    /// Whether a message may have changed a next hop.
    fn is_change(&mut self, message: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
        let NetlinkPayload::InnerMessage(inner) = &message.payload else {
            // Among others that messages were lost.
            return true;
        };
        let (neighbour, gone) = match inner {
            RouteNetlinkMessage::NewNeighbour(neighbour) => (neighbour, false),
            RouteNetlinkMessage::DelNeighbour(neighbour) => (neighbour, true),
            _ => return true,
        };
        let Some(key) = key(neighbour) else {
            // Of a bridge's own table.
            return false;
        };
        let known = self.0.remove(&key);
        if gone {
            return true;
        }
        let reached_at = reached_at(neighbour);
        let same = known.as_ref() == Some(&reached_at);
        if self.0.len() < NEIGHBOURS {
            self.0.insert(key, reached_at);
        }
        !same
    }
}

/// Device and address of a neighbour.
fn key(neighbour: &NeighbourMessage) -> Option<(u32, Vec<u8>)> {
    let addr = neighbour.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(addr)) => Some(addr.octets().to_vec()),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(addr)) => Some(addr.octets().to_vec()),
        _ => None,
    })?;
    Some((neighbour.header.ifindex, addr))
}

/// Ethernet address of a neighbour; `None`: it cannot be reached now (`NUD_VALID` in include/net/neighbour.h).
fn reached_at(neighbour: &NeighbourMessage) -> Option<Vec<u8>> {
    let valid = matches!(
        neighbour.header.state,
        NeighbourState::Reachable
            | NeighbourState::Stale
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Noarp
            | NeighbourState::Permanent
    );
    let addr = neighbour.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(addr) => Some(addr.clone()),
        _ => None,
    });
    addr.filter(|_| valid)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use rtnetlink::packet_route::link::LinkMessage;

    use super::*;

    fn message(inner: RouteNetlinkMessage) -> NetlinkMessage<RouteNetlinkMessage> {
        NetlinkMessage::from(inner)
    }

    fn neighbour(last: u8, mac: u8, state: NeighbourState) -> NeighbourMessage {
        let mut neighbour = NeighbourMessage::default();
        neighbour.header.ifindex = 3;
        neighbour.header.state = state;
        let addr = NeighbourAddress::Inet(Ipv4Addr::new(192, 0, 2, last));
        neighbour.attributes = vec![
            NeighbourAttribute::Destination(addr),
            NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, mac]),
        ];
        neighbour
    }

    #[test]
    fn a_neighbour_that_only_lives_on_changes_nothing() {
        let mut known = Neighbours::default();
        let mut heard = |last, mac, state| {
            known.is_change(&message(RouteNetlinkMessage::NewNeighbour(neighbour(last, mac, state))))
        };
        assert!(heard(1, 1, NeighbourState::Reachable), "a new one");
        for state in [NeighbourState::Stale, NeighbourState::Delay, NeighbourState::Probe] {
            assert!(!heard(1, 1, state), "{state:?}");
        }
        assert!(heard(1, 9, NeighbourState::Reachable), "another Ethernet address");
        assert!(heard(1, 9, NeighbourState::Failed), "it is gone");
        assert!(heard(1, 9, NeighbourState::Reachable), "it is back");
        assert!(heard(2, 9, NeighbourState::Reachable), "another neighbour");
        assert!(!heard(1, 9, NeighbourState::Stale));
    }

    #[test]
    fn what_is_forgotten_counts_as_a_change() {
        let mut known = Neighbours::default();
        let reachable = || neighbour(1, 1, NeighbourState::Reachable);
        let new = || message(RouteNetlinkMessage::NewNeighbour(reachable()));
        known.is_change(&new());
        assert!(!known.is_change(&new()));
        assert!(known.is_change(&message(RouteNetlinkMessage::DelNeighbour(reachable()))));
        assert!(known.is_change(&new()));
        assert!(known.is_change(&message(RouteNetlinkMessage::NewLink(LinkMessage::default()))));
        let lost = NetlinkMessage::new(
            rtnetlink::packet_core::NetlinkHeader::default(),
            NetlinkPayload::Overrun(vec![]),
        );
        assert!(known.is_change(&lost), "messages were lost");
    }

    #[test]
    fn no_generation_is_none() {
        assert_eq!((next(0), next(7), next(u32::MAX)), (1, 8, 1));
    }
}
