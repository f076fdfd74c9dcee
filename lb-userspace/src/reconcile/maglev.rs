//! Maglev tables (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
//! section 3.4): every node builds the same table from the same backends, each backend has its even share,
//! and a backend that comes or goes moves little more than its own share.

use std::net::{IpAddr, SocketAddr};

/// Lengths of tables: the largest prime below each power of two from 2^8 to 2^20. The permutations need a
/// prime.
const LENGTHS: [u32; 13] =
    [251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749, 65_521, 131_071, 262_139, 524_287, 1_048_573];

/// Slots for each backend: no two shares then differ by more than 5 %.
const SLOTS_PER_BACKEND: u32 = 20;

/// Beyond this length a table grows only when it must.
const LONG: u32 = 65_521;

/// Slots for each backend of a table that is long already.
const SLOTS_PER_BACKEND_LONG: u32 = 4;

/// Length of the table for this many backends. It depends on nothing else, so that all nodes agree.
pub(super) fn table_len(backends: usize) -> u32 {
    let backends = u32::try_from(backends).unwrap_or(u32::MAX);
    if backends <= 1 {
        return backends;
    }
    let want = backends
        .saturating_mul(SLOTS_PER_BACKEND)
        .min(LONG.max(backends.saturating_mul(SLOTS_PER_BACKEND_LONG)));
    LENGTHS.into_iter().find(|len| *len >= want).unwrap_or(LENGTHS[LENGTHS.len() - 1])
}

/// For each slot, which of `backends` has it. The order of `backends` decides who picks first: sort it.
pub(super) fn table(backends: &[SocketAddr]) -> Vec<u32> {
    let len = table_len(backends.len());
    if len <= 1 {
        return vec![0; len as usize];
    }
    let mut permutations: Vec<Permutation> =
        backends.iter().map(|addr| Permutation::of(*addr, len)).collect();
    let mut table = vec![u32::MAX; len as usize];
    let mut left = len;
    loop {
        for (index, permutation) in (0u32..).zip(&mut permutations) {
            let slot = loop {
                let slot = permutation.next(len) as usize;
                if table[slot] == u32::MAX {
                    break slot;
                }
            };
            table[slot] = index;
            left -= 1;
            if left == 0 {
                return table;
            }
        }
    }
}

/// The order in which one backend wants the slots.
struct Permutation {
    slot: u32,
    skip: u32,
}

impl Permutation {
    fn of(addr: SocketAddr, len: u32) -> Self {
        let hash = hash(addr);
        #[expect(clippy::cast_possible_truncation, reason = "each half of the hash is a number of its own")]
        let (high, low) = ((hash >> 32) as u32, hash as u32);
        Self { slot: high % len, skip: low % (len - 1) + 1 }
    }

    fn next(&mut self, len: u32) -> u32 {
        let slot = self.slot;
        self.slot += self.skip;
        if self.slot >= len {
            self.slot -= len;
        }
        slot
    }
}

/// FNV-1a over address and port, and the finaliser of SplitMix64. Nodes of different versions must agree on
/// it: it never changes.
fn hash(addr: SocketAddr) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut eat = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    match addr.ip() {
        IpAddr::V4(ip) => eat(&ip.octets()),
        IpAddr::V6(ip) => eat(&ip.octets()),
    }
    eat(&addr.port().to_be_bytes());
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(n: u16) -> Vec<SocketAddr> {
        (0..n).map(|i| format!("10.{}.{}.{}:8080", i % 7, i / 250, i % 250).parse().unwrap()).collect()
    }

    #[test]
    fn lengths_are_prime_and_grow_with_the_backends() {
        for len in LENGTHS {
            assert!((2..=len.isqrt()).all(|divisor| len % divisor != 0), "{len}");
        }
        let of = [(0, 0), (1, 1), (2, 251), (12, 251), (13, 509), (100, 2039), (3276, 65_521)];
        for (n, len) in of {
            assert_eq!(table_len(n), len, "{n}");
        }
        assert_eq!(table_len(20_000), 131_071);
        assert_eq!(table_len(usize::MAX), 1_048_573);
        // The default of --max-backends still has a slot for everybody.
        assert!(table_len(256 * 1024) >= 256 * 1024);
    }

    #[test]
    fn shares_are_even() {
        for n in [2u16, 3, 5, 12, 13, 100, 1000] {
            let table = table(&backends(n));
            let mut shares = vec![0u32; n.into()];
            for index in &table {
                shares[*index as usize] += 1;
            }
            let (low, high) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
            assert!(high - low <= 1, "{n}: {low} to {high}");
            assert!(f64::from(high - low) <= 0.1 * f64::from(*high), "{n}: {low} to {high}");
        }
    }

    /// Slots that lead elsewhere although their backend stays, in parts of the whole.
    fn disruption(before: &[SocketAddr], after: &[SocketAddr]) -> f64 {
        let (old, new) = (table(before), table(after));
        assert_eq!(old.len(), new.len());
        let moved = old
            .iter()
            .zip(&new)
            .filter(|(o, n)| {
                let (o, n) = (before[**o as usize], after[**n as usize]);
                o != n && after.contains(&o) && before.contains(&n)
            })
            .count();
        f64::from(u32::try_from(moved).unwrap()) / f64::from(u32::try_from(old.len()).unwrap())
    }

    #[test]
    fn little_moves_beyond_the_share_of_who_comes_or_goes() {
        for n in [3u16, 10, 80, 900] {
            let all = backends(n);
            for gone in [0, n / 2, n - 1] {
                let mut rest = all.clone();
                rest.remove(gone.into());
                let (goes, comes) = (disruption(&all, &rest), disruption(&rest, &all));
                assert!(goes < 0.16 && comes < 0.16, "{n} without {gone}: {goes} {comes}");
            }
        }
    }

    #[test]
    fn the_same_backends_make_the_same_table_everywhere() {
        // Frozen: nodes of different versions must agree.
        let table = table(&backends(3));
        assert_eq!(table[..16], FROZEN);
    }

    const FROZEN: [u32; 16] = [0, 0, 0, 0, 1, 0, 2, 1, 1, 2, 0, 1, 2, 0, 2, 2];
}
