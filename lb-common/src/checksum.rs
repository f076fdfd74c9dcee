//! Internet checksums, updated instead of computed.
//!
//! The checksum of a header is the complement of the one's complement sum of its 16-bit words (RFC 1071).
//! When a word changes from `m` to `m'`, the new checksum is `~(~HC + ~m + m')` (RFC 1624, equation 3); the
//! older `HC + m + ~m'` of RFC 1141 can give 0xffff where 0x0000 is right, and is not used. A [`Diff`]
//! collects `~m + m'` over all changed words, so that one packet needs one update for each checksum.
//!
//! One corner is UDP's alone: a checksum of 0 means "none" (RFC 768), so a computed 0 is sent as 0xffff, its
//! equal in one's complement, and a 0 in an IPv4 packet stays 0.
//!
//! All words are taken as they lie in memory: one's complement addition gives the same bytes in either
//! byte order, and the kernel's checksum helpers expect it so.

use crate::wire::Wire;

/// What a set of changes adds to a one's complement sum.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Diff(u32);

impl Diff {
    /// Nothing changed.
    pub const NONE: Self = Self(0);

    /// From sums of the old and of the new words.
    #[inline(always)]
    pub const fn between(old: u32, new: u32) -> Self {
        Self((!fold(old)) as u32 + fold(new) as u32)
    }

    /// The same in 16 bits, as a flow remembers it.
    #[inline(always)]
    pub const fn folded(self) -> u16 {
        fold(self.0)
    }

    /// The change that was [`Self::folded`].
    #[inline(always)]
    pub const fn unfolded(change: u16) -> Self {
        Self(change as u32)
    }

    /// What takes a change back, both [`Self::folded`].
    #[inline(always)]
    pub const fn back(change: u16) -> u16 {
        !change
    }

    /// Both changes.
    #[inline(always)]
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0.wrapping_add(other.0))
    }

    /// The sum, for the kernel's checksum helpers (`__wsum`).
    #[inline(always)]
    pub const fn sum(self) -> u32 {
        self.0
    }

    /// The checksum after the changes.
    #[inline(always)]
    pub const fn apply(self, check: u16) -> u16 {
        !fold((!check) as u32 + self.0)
    }

    /// The UDP checksum after the changes: 0 stays 0 on IPv4, a computed 0 becomes 0xffff.
    #[inline(always)]
    pub const fn apply_udp(self, check: u16) -> u16 {
        if check == 0 {
            return 0;
        }
        match self.apply(check) {
            0 => 0xffff,
            check => check,
        }
    }
}

/// Folds a sum of 16-bit words into 16 bits.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "two end-around carries leave 16 bits")]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The sum of the 16-bit words of a header, as they lie in memory.
#[inline(always)]
pub fn sum_of<T: Wire>(header: &T) -> u32 {
    let mut sum = 0u32;
    for_words(header, |word| sum += u32::from(word));
    sum
}

/// Visits the 16-bit words of a header, as they lie in memory.
///
/// `volatile`, because LLVM otherwise gathers the words into vectors, which the BPF target does not have: they end
/// up on the stack, of which a program has 512 bytes, or as arguments of calls, of which it has five.
#[inline(always)]
pub fn for_words<T: Wire>(header: &T, mut visit: impl FnMut(u16)) {
    let words = core::ptr::from_ref(header).cast::<u16>();
    for i in 0..size_of::<T>() / 2 {
        // SAFETY: inside of the header, which has the alignment of a word and no padding.
        visit(unsafe { words.add(i).read_volatile() });
    }
}

/// Copies a header word by word; `volatile` as in [`for_words`], against a register (and a spill) for each word.
#[inline(always)]
pub fn copy<T: Wire>(from: &T, to: &mut T) {
    let to = core::ptr::from_mut(to).cast::<u16>();
    let mut i = 0;
    for_words(from, |word| {
        // SAFETY: `for_words` visits as many words as the header has, and both have the same type.
        unsafe { to.add(i).write_volatile(word) };
        i += 1;
    });
}

/// The checksum of a message: the complement of the folded sum of its words and its pseudo-header.
#[inline(always)]
pub const fn finish(sum: u32) -> u16 {
    !fold(sum)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn full(words: &[u16]) -> u16 {
        // The textbook way: 64-bit sum, folded until nothing is left to fold.
        let mut sum: u64 = words.iter().map(|w| u64::from(*w)).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    proptest! {
        #[test]
        fn an_update_equals_a_computation(
            words in proptest::collection::vec(any::<u16>(), 2..40),
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u16>()), 1..16),
        ) {
            let before = full(&words);
            let mut after = words.clone();
            let mut diff = Diff::NONE;
            for (index, value) in changes {
                let slot = index.get_mut(&mut after);
                diff = diff.and(Diff::between(u32::from(*slot), u32::from(value)));
                *slot = value;
            }
            let (got, want) = (diff.apply(before), full(&after));
            // All-zero words are the one sum with two representations.
            prop_assert!(got == want || after.iter().all(|w| *w == 0));
        }

        #[test]
        fn udp_never_sends_a_computed_zero(check in 1u16.., old in any::<u16>(), new in any::<u16>()) {
            let diff = Diff::between(u32::from(old), u32::from(new));
            prop_assert_ne!(diff.apply_udp(check), 0);
            prop_assert_eq!(diff.apply_udp(0), 0);
        }
    }

    #[test]
    fn the_example_of_rfc_1624() {
        // Section 4: HC = 0xDD2F, m = 0x5555, m' = 0x3285 gives 0x0000, not 0xFFFF.
        assert_eq!(Diff::between(0x5555, 0x3285).apply(0xdd2f), 0x0000);
        assert_eq!(Diff::between(0x5555, 0x3285).apply_udp(0xdd2f), 0xffff);
    }
}
