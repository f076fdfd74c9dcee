//! A map that the follower of devices alone writes, and what it knows to stand in it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use aya::Pod;
use aya::maps::{HashMap, MapData, MapError};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

/// Entries that had to be mended, by map.
pub type Repairs = Family<[(&'static str, &'static str); 1], Counter>;

/// The maps that are mirrored.
pub const EDGES: &str = "EDGES";
pub const EDGE_SOURCES: &str = "EDGE_SOURCES";

/// The map, written where it differs.
pub(super) struct Mirror<K, V> {
    name: &'static str,
    map: HashMap<MapData, K, V>,
    /// What stands in the map; `None`: not read yet.
    known: Option<BTreeMap<K, V>>,
    repairs: Counter,
}

impl<K: Pod + Ord + Debug, V: Pod + PartialEq> Mirror<K, V> {
    pub(super) fn new(name: &'static str, map: HashMap<MapData, K, V>, repairs: &Repairs) -> Self {
        let repairs = repairs.get_or_create(&[("map", name)]).clone();
        Self { name, map, known: None, repairs }
    }

    fn known(&mut self) -> &mut BTreeMap<K, V> {
        self.known.get_or_insert_with(|| self.map.iter().filter_map(Result::ok).collect())
    }

    pub(super) fn get(&mut self, key: &K) -> Option<V> {
        self.known().get(key).copied()
    }

    /// Reads the map again. What somebody else has changed is mended by whoever knows what should be there.
    pub(super) fn look(&mut self) {
        let Some(before) = self.known.take() else { return };
        let now = self.known();
        let keys: BTreeSet<&K> = before.keys().chain(now.keys()).collect();
        let changed = keys.into_iter().filter(|key| before.get(key) != now.get(key)).count();
        if changed > 0 {
            self.repairs.inc_by(changed as u64);
            tracing::warn!(map = self.name, changed, "somebody else has changed entries; they are mended");
        }
    }

    pub(super) fn set(&mut self, key: K, value: V) {
        if self.known().get(&key) == Some(&value) {
            return;
        }
        match self.map.insert(key, value, 0) {
            Ok(()) => drop(self.known().insert(key, value)),
            Err(error) => tracing::warn!(map = self.name, ?key, %error, "cannot write"),
        }
    }

    /// Adds and changes, and removes nothing.
    pub(super) fn extend(&mut self, entries: &BTreeMap<K, V>) {
        for (key, value) in entries {
            self.set(*key, *value);
        }
    }

    /// Removes all others.
    pub(super) fn retain(&mut self, entries: &BTreeMap<K, V>) {
        let stale: Vec<K> = self.known().keys().filter(|key| !entries.contains_key(key)).copied().collect();
        for key in stale {
            match self.map.remove(&key) {
                Ok(()) | Err(MapError::KeyNotFound) => drop(self.known().remove(&key)),
                Err(error) => tracing::warn!(map = self.name, ?key, %error, "cannot remove"),
            }
        }
    }
}
