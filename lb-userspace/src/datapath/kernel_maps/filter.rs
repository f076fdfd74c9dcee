//! `ADDRESS_FILTER`: which addresses programs have to look for at all.
//!
//! An address gets its bit before anything else is said about it, and keeps it for good: flows outlive the Services and backends
//! that they began with. Addresses that share a bit are looked for, as all would be without a filter. The same goes for the
//! neighbourhoods of ServiceCIDRs, each of which has the bit of its first address.

use std::collections::BTreeSet;
use std::fmt::Display;

use aya::maps::{Array, MapData};
use ipnet::IpNet;
use lb_common::abi::{Addr4, Addr6};
use lb_common::maps::FILTER_WORDS;
use lb_common::{Family, V4, V6, hash};

use super::{fd, update, walk};
use crate::datapath::MapError;

/// Neighbourhoods that a network may have, as a power of two: a /0 of IPv4, a /48 of IPv6.
const MOST: u8 = 16;
/// So many neighbourhoods a /12 has, kubeadm's ServiceCIDR: of wider networks the check does not look at every one.
const CHECKED: usize = 16;

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

    /// Gives every neighbourhood of networks its bit; to one that has too many, all bits that there are.
    pub(super) fn add_networks<'a>(&mut self, nets: impl Iterator<Item = &'a IpNet>) -> Result<(), MapError> {
        let all = || (0..FILTER_WORDS).map(|word| (word, u64::MAX));
        for net in nets {
            match neighbourhoods(*net) {
                Some(bits) => self.add(bits)?,
                None => self.add(all())?,
            }
        }
        Ok(())
    }

    /// Whether the map has the bit of an address.
    pub(super) fn has<F: Family>(&self, addr: &F::Addr) -> Result<bool, MapError> {
        self.has_bit(hash::filter_bit::<F>(addr))
    }

    /// Whether the map has the bits of a network, of which the first [`CHECKED`] are looked at.
    pub(super) fn has_network(&self, net: IpNet) -> Result<bool, MapError> {
        for bit in neighbourhoods(net).into_iter().flatten().take(CHECKED) {
            if !self.has_bit(bit)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn has_bit(&self, (word, bit): (u32, u64)) -> Result<bool, MapError> {
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

/// The bits of a network's neighbourhoods; `None`: there are too many.
fn neighbourhoods(net: IpNet) -> Option<Box<dyn Iterator<Item = (u32, u64)>>> {
    let wider = |len: u8| len.saturating_sub(net.prefix_len());
    match net.trunc() {
        IpNet::V4(net) => {
            let first = net.addr().to_bits();
            let addrs = (0..1u32 << wider(V4::NEIGHBOURHOOD)).map(move |index| first + (index << 16));
            let addrs = addrs.map(|addr| Addr4 { octets: addr.to_be_bytes() });
            Some(Box::new(addrs.map(|addr| hash::neighbourhood_bit::<V4>(&addr))))
        }
        IpNet::V6(_) if wider(V6::NEIGHBOURHOOD) > MOST => None,
        IpNet::V6(net) => {
            let first = net.addr().to_bits();
            let addrs = (0..1u128 << wider(V6::NEIGHBOURHOOD)).map(move |index| first + (index << 64));
            let addrs = addrs.map(|addr| Addr6 { octets: addr.to_be_bytes() });
            Some(Box::new(addrs.map(|addr| hash::neighbourhood_bit::<V6>(&addr))))
        }
    }
}

fn failed(error: &dyn Display) -> MapError {
    MapError::Failed { map: NAME.into(), reason: error.to_string() }
}
