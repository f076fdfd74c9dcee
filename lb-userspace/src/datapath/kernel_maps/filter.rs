//! `ADDRESS_FILTER`: which addresses programs have to look for at all.
//!
//! An address gets its bit before anything else is said about it, and keeps it for good: flows outlive the Services and backends
//! that they began with. Addresses that share a bit are looked for, as all would be without a filter.

use std::collections::BTreeSet;
use std::fmt::Display;

use aya::maps::{Array, MapData};
use lb_common::abi::{Addr4, Addr6};
use lb_common::maps::FILTER_WORDS;
use lb_common::{Family, V4, V6, hash};

use super::{fd, update, walk};
use crate::datapath::MapError;

/// The map's name.
pub(super) const NAME: &str = "ADDRESS_FILTER";

/// The map, whose only writer this is.
pub(super) struct AddressFilter {
    map: Array<MapData, u64>,
    /// What the map should hold.
    words: Vec<u64>,
}

impl AddressFilter {
    /// Takes over what the map holds.
    pub(super) fn new(map: Array<MapData, u64>) -> Result<Self, MapError> {
        let mut words = vec![0; FILTER_WORDS as usize];
        walk(NAME, fd(&map), |index: u32, word: u64| {
            if let Some(place) = words.get_mut(index as usize) {
                *place = word;
            }
        })?;
        Ok(Self { map, words })
    }

    /// Gives IPv4 addresses their bits.
    pub(super) fn add4(&mut self, addrs: &[Addr4]) -> Result<(), MapError> {
        self.add(addrs.iter().map(hash::filter_bit::<V4>))
    }

    /// Gives IPv6 addresses their bits.
    pub(super) fn add6(&mut self, addrs: &[Addr6]) -> Result<(), MapError> {
        self.add(addrs.iter().map(hash::filter_bit::<V6>))
    }

    /// Whether the map has the bit of an address.
    pub(super) fn has<F: Family>(&self, addr: &F::Addr) -> Result<bool, MapError> {
        let (word, bit) = hash::filter_bit::<F>(addr);
        match self.map.get(&word, 0) {
            Ok(bits) => Ok(bits & bit != 0),
            Err(error) => Err(failed(&error)),
        }
    }

    /// Writes every word that is concerned, also what should stand there already: somebody else may have changed it.
    fn add(&mut self, bits: impl Iterator<Item = (u32, u64)>) -> Result<(), MapError> {
        let mut indexes = BTreeSet::new();
        for (word, bit) in bits {
            self.words[word as usize] |= bit;
            indexes.insert(word);
        }
        let indexes = Vec::from_iter(indexes);
        let words: Vec<u64> = indexes.iter().map(|index| self.words[*index as usize]).collect();
        if words.is_empty() {
            return Ok(());
        }
        update(fd(&self.map), &indexes, &words).map_err(|error| failed(&error.source))
    }
}

fn failed(error: &dyn Display) -> MapError {
    MapError::Failed { map: NAME.into(), reason: error.to_string() }
}
