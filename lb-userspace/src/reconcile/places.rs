//! What `PLACES4/6` should hold: where the backends are, by address, port and protocol, for nodes that tunnel packets to each
//! other.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;

use crate::entries::{Backend, Family, FrontendKey, Op, Place};

/// Addresses of the other nodes of the cluster, by name.
pub type Peers = BTreeMap<String, Vec<IpAddr>>;

/// Where a backend is.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Home {
    Here,
    /// On the node of this name.
    There(Arc<str>),
}

/// The places and what the maps have of them.
#[derive(Debug)]
pub(super) struct Places {
    /// There are tunnels; otherwise the maps are to be empty, and nothing is remembered.
    wanted: bool,
    /// Ids of backends.
    ids: BTreeMap<FrontendKey, u32>,
    homes: BTreeMap<FrontendKey, Home>,
    /// Those on each node.
    residents: BTreeMap<Arc<str>, BTreeSet<FrontendKey>>,
    peers: Peers,
    held: BTreeMap<FrontendKey, Place>,
    /// Everything has been said once: what nobody has said by now is stale.
    complete: bool,
    /// Not carried out yet.
    ops: Vec<Op>,
}

impl Places {
    /// `held`: what the maps hold already.
    pub(super) fn new(held: BTreeMap<FrontendKey, Place>) -> Self {
        Self {
            wanted: false,
            ids: BTreeMap::new(),
            homes: BTreeMap::new(),
            residents: BTreeMap::new(),
            peers: Peers::new(),
            held,
            complete: false,
            ops: vec![],
        }
    }

    /// There are tunnels, and these backends so far.
    pub(super) fn begin(&mut self, backends: impl IntoIterator<Item = (Backend, u32)>) {
        self.wanted = true;
        for (backend, id) in backends {
            self.note(&backend, id, true);
        }
    }

    pub(super) fn has_begun(&self) -> bool {
        self.wanted
    }

    /// These are the other nodes.
    pub(super) fn set_peers(&mut self, peers: Peers) {
        let old = std::mem::replace(&mut self.peers, peers);
        let names: BTreeSet<&String> = old.keys().chain(self.peers.keys()).collect();
        let changed = names.into_iter().filter(|name| old.get(*name) != self.peers.get(*name));
        let moved = changed.filter_map(|name| self.residents.get(name.as_str())).flatten();
        for key in moved.copied().collect::<Vec<_>>() {
            self.settle(key);
        }
    }

    /// These backends, which are elsewhere, are on the nodes of these names.
    pub(super) fn note_homes(&mut self, homes: impl IntoIterator<Item = (Backend, Arc<str>)>) {
        for (backend, node) in homes {
            self.set_home(key(&backend), Home::There(node));
        }
    }

    /// A backend has this id from now on, or has it no more.
    pub(super) fn note(&mut self, backend: &Backend, id: u32, came: bool) {
        if !self.wanted {
            return;
        }
        let key = key(backend);
        if came {
            self.ids.insert(key, id);
            if backend.local {
                self.set_home(key, Home::Here);
            }
        } else if self.ids.get(&key) == Some(&id) {
            self.ids.remove(&key);
            if let Some(Home::There(node)) = self.homes.remove(&key) {
                self.leave(&node, key);
            }
        }
        self.settle(key);
    }

    /// Everything has been said: what the maps hold beyond that goes.
    pub(super) fn finish(&mut self) {
        self.complete = true;
        for key in self.held.keys().copied().collect::<Vec<_>>() {
            self.settle(key);
        }
    }

    /// What has to be written since this was asked last.
    pub(super) fn take_ops(&mut self) -> Vec<Op> {
        std::mem::take(&mut self.ops)
    }

    /// What the maps hold, after this key or from the beginning.
    pub(super) fn after(&self, key: Option<FrontendKey>) -> impl Iterator<Item = Op> {
        let from = key.map_or(Bound::Unbounded, Bound::Excluded);
        let held = self.held.range((from, Bound::Unbounded));
        held.map(|(key, place)| Op::SetPlace { key: *key, place: *place })
    }

    /// Whether the maps hold the place of a backend.
    pub(super) fn has(&self, key: &FrontendKey) -> bool {
        self.held.contains_key(key)
    }

    fn set_home(&mut self, key: FrontendKey, home: Home) {
        if self.homes.get(&key) == Some(&home) {
            return;
        }
        if let Home::There(node) = &home {
            self.residents.entry(node.clone()).or_default().insert(key);
        }
        if let Some(Home::There(node)) = self.homes.insert(key, home) {
            self.leave(&node, key);
        }
        self.settle(key);
    }

    fn leave(&mut self, node: &str, key: FrontendKey) {
        if let Some(residents) = self.residents.get_mut(node) {
            residents.remove(&key);
            if residents.is_empty() {
                self.residents.remove(node);
            }
        }
    }

    fn place(&self, key: &FrontendKey) -> Option<Place> {
        let backend = *self.ids.get(key)?;
        match self.homes.get(key)? {
            Home::Here => Some(Place { backend, node: None }),
            Home::There(node) => {
                let addrs = self.peers.get(&**node)?;
                let family = Family::of(key.addr);
                let node = addrs.iter().find(|addr| Family::of(**addr) == family)?;
                Some(Place { backend, node: Some(*node) })
            }
        }
    }

    fn settle(&mut self, key: FrontendKey) {
        let place = self.place(&key);
        match place {
            Some(place) if self.held.get(&key) != Some(&place) => {
                self.held.insert(key, place);
                self.ops.push(Op::SetPlace { key, place });
            }
            None if self.complete && self.held.remove(&key).is_some() => {
                self.ops.push(Op::RemovePlace { key });
            }
            _ => {}
        }
    }
}

fn key(backend: &Backend) -> FrontendKey {
    FrontendKey { addr: backend.addr.ip(), port: backend.addr.port(), protocol: backend.protocol }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::entries::Protocol;

    fn backend(addr: &str, local: bool) -> Backend {
        Backend { addr: addr.parse::<SocketAddr>().unwrap(), protocol: Protocol::Tcp, local }
    }

    fn peers(addr: &str) -> Peers {
        Peers::from([("b".to_owned(), vec!["fd00::b".parse().unwrap(), addr.parse().unwrap()])])
    }

    fn set(backend: &Backend, id: u32, node: Option<&str>) -> Op {
        Op::SetPlace {
            key: key(backend),
            place: Place { backend: id, node: node.map(|n| n.parse().unwrap()) },
        }
    }

    #[test]
    fn a_backend_has_a_place_once_its_node_is_known_and_as_long_as_it_has_an_id() {
        let (here, there) = (backend("10.244.1.2:80", true), backend("10.244.2.2:80", false));
        let mut places = Places::new(BTreeMap::new());
        places.note(&here, 1, true);
        assert_eq!(places.take_ops(), [], "nobody has asked for tunnels");
        assert!(places.ids.is_empty(), "what nobody asks for takes no memory");
        places.begin([(here, 2)]);
        places.set_peers(Peers::new());
        places.note_homes([(there, "b".into())]);
        places.note(&there, 3, true);
        assert_eq!(places.take_ops(), [set(&here, 2, None)]);
        places.set_peers(peers("192.0.2.2"));
        assert_eq!(places.take_ops(), [set(&there, 3, Some("192.0.2.2"))]);
        places.set_peers(peers("192.0.2.3"));
        assert_eq!(places.take_ops(), [set(&there, 3, Some("192.0.2.3"))]);
        places.finish();
        places.note(&there, 4, true);
        places.note(&there, 3, false);
        assert_eq!(places.take_ops(), [set(&there, 4, Some("192.0.2.3"))], "another has the place by now");
        places.note(&there, 4, false);
        assert_eq!(places.take_ops(), [Op::RemovePlace { key: key(&there) }]);
        assert!(places.residents.is_empty());
    }

    #[test]
    fn what_was_found_goes_when_everything_is_known() {
        let there = backend("10.244.2.2:80", false);
        let stale = Place { backend: 9, node: None };
        let mut places = Places::new(BTreeMap::from([(key(&there), stale)]));
        places.note(&there, 9, true);
        assert_eq!(places.take_ops(), []);
        places.finish();
        assert_eq!(places.take_ops(), [Op::RemovePlace { key: key(&there) }]);
    }
}
