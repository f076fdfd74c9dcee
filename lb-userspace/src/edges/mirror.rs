//! A map that the follower of devices alone writes, and what it knows to stand in it.

use std::collections::BTreeMap;
use std::fmt::Debug;

use aya::Pod;
use aya::maps::{HashMap, MapData, MapError};

/// The map, written where it differs.
pub(super) struct Mirror<K, V> {
    name: &'static str,
    map: HashMap<MapData, K, V>,
    /// What stands in the map; `None`: not read yet.
    known: Option<BTreeMap<K, V>>,
}

impl<K: Pod + Ord + Debug, V: Pod + PartialEq> Mirror<K, V> {
    pub(super) fn new(name: &'static str, map: HashMap<MapData, K, V>) -> Self {
        Self { name, map, known: None }
    }

    fn known(&mut self) -> &mut BTreeMap<K, V> {
        self.known.get_or_insert_with(|| self.map.iter().filter_map(Result::ok).collect())
    }

    pub(super) fn get(&mut self, key: &K) -> Option<V> {
        self.known().get(key).copied()
    }

    /// Reads the map again. `true`: somebody else has changed it.
    pub(super) fn look(&mut self) -> bool {
        let Some(before) = self.known.take() else { return false };
        let differs = *self.known() != before;
        if differs {
            tracing::warn!(map = self.name, "somebody else has changed entries; they are mended");
        }
        differs
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
