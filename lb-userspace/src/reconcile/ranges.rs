//! Free space of `SLOTS`: a best-fit allocator of index ranges.

use std::collections::{BTreeMap, BTreeSet};

/// Free ranges of an index space; index 0 is never given out.
#[derive(Clone, Debug)]
pub(super) struct Ranges {
    /// First index -> length; never adjacent to each other.
    free: BTreeMap<u32, u32>,
    /// The same by length.
    by_len: BTreeSet<(u32, u32)>,
    /// Free indices in all.
    available: u64,
}

impl Ranges {
    /// Indices 1 to `limit` less 1, all free.
    pub(super) fn new(limit: u32) -> Self {
        let mut ranges = Self { free: BTreeMap::new(), by_len: BTreeSet::new(), available: 0 };
        if limit > 1 {
            ranges.insert(1, limit - 1);
        }
        ranges
    }

    /// Takes `len` indices from the smallest range that has them.
    pub(super) fn take(&mut self, len: u32) -> Option<u32> {
        let (have, base) = self.by_len.range((len, 0)..).next().copied()?;
        self.remove(base, have);
        if have > len {
            self.insert(base + len, have - len);
        }
        Some(base)
    }

    /// Takes exactly these indices; `false`, and nothing is changed, if one of them is not free.
    pub(super) fn take_at(&mut self, base: u32, len: u32) -> bool {
        let Some((start, have)) = self.free.range(..=base).next_back().map(|(s, h)| (*s, *h)) else {
            return false;
        };
        let (end, want) = (u64::from(start) + u64::from(have), u64::from(base) + u64::from(len));
        if end < want {
            return false;
        }
        self.remove(start, have);
        if base > start {
            self.insert(start, base - start);
        }
        if end > want {
            self.insert(base + len, start + have - base - len);
        }
        true
    }

    /// Gives a range back.
    pub(super) fn give(&mut self, mut base: u32, mut len: u32) {
        if let Some((start, have)) = self.free.range(..base).next_back().map(|(s, h)| (*s, *h))
            && start + have == base
        {
            self.remove(start, have);
            (base, len) = (start, have + len);
        }
        if let Some(have) = self.free.get(&(base + len)).copied() {
            self.remove(base + len, have);
            len += have;
        }
        self.insert(base, len);
    }

    /// Free indices in all.
    pub(super) fn available(&self) -> u64 {
        self.available
    }

    fn insert(&mut self, base: u32, len: u32) {
        self.free.insert(base, len);
        self.by_len.insert((len, base));
        self.available += u64::from(len);
    }

    fn remove(&mut self, base: u32, len: u32) {
        self.free.remove(&base);
        self.by_len.remove(&(len, base));
        self.available -= u64::from(len);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn takes_the_best_fit_and_joins_what_comes_back() {
        let mut ranges = Ranges::new(101);
        let (a, b, c) = (ranges.take(10).unwrap(), ranges.take(5).unwrap(), ranges.take(10).unwrap());
        assert_eq!((a, b, c), (1, 11, 16));
        ranges.give(b, 5);
        assert_eq!(ranges.take(5), Some(11));
        ranges.give(b, 5);
        ranges.give(a, 10);
        assert_eq!(ranges.take(15), Some(1));
        assert_eq!(ranges.take(76), None);
        ranges.give(1, 15);
        ranges.give(c, 10);
        assert_eq!(ranges.free, BTreeMap::from([(1, 100)]));
        assert_eq!(ranges.take(101), None);
        assert!(!ranges.take_at(0, 1) && !ranges.take_at(100, 2));
        assert!(ranges.take_at(50, 10) && !ranges.take_at(55, 1) && !ranges.take_at(49, 2));
        assert_eq!(ranges.available(), 90);
        assert_eq!(Ranges::new(1).take(1), None);
    }

    proptest! {
        #[test]
        fn never_gives_the_same_index_twice(steps in prop::collection::vec((1u32..20, 0usize..10), 1..200)) {
            let mut ranges = Ranges::new(200);
            let mut held: Vec<(u32, u32)> = vec![];
            for (len, index) in steps {
                if index < held.len() && len % 2 == 0 {
                    let (base, len) = held.swap_remove(index);
                    ranges.give(base, len);
                } else if let Some(base) = ranges.take(len) {
                    prop_assert!(base >= 1 && base + len <= 200);
                    prop_assert!(held.iter().all(|(b, l)| base + len <= *b || b + l <= base));
                    held.push((base, len));
                } else {
                    prop_assert!(ranges.free.values().all(|have| *have < len));
                }
                let used: u64 = held.iter().map(|(_, len)| u64::from(*len)).sum();
                prop_assert_eq!(used + ranges.available(), 199);
                prop_assert_eq!(ranges.by_len.len(), ranges.free.len());
            }
        }
    }
}
