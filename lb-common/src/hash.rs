//! Hashing of tuples: the same on every node, so that any of them sends a flow to the same backend.

use crate::abi::FlowKey;
use crate::checksum;
use crate::family::Family;
use crate::maps::FILTER_WORDS;

/// A hash of a five-tuple, well spread in all bits.
///
/// The address words are mixed one by one (their sum would collide for neighbours), with the multipliers and
/// the finaliser of MurmurHash3's 32-bit variant.
#[inline(never)]
pub fn tuple<F: Family>(key: &FlowKey<F::Addr>) -> u32 {
    let mut hash = u32::from(key.src_port) << 16 | u32::from(key.dst_port);
    hash = mix(u32::from(key.proto), hash);
    hash = words::<F>(&key.src, hash);
    hash = words::<F>(&key.dst, hash);
    finish(hash)
}

/// A hash of a socket and the port it asks for, well spread in all bits.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "both halves of the cookie are mixed in")]
pub const fn socket(cookie: u64, port: u16) -> u32 {
    finish(mix(mix(port as u32, cookie as u32), (cookie >> 32) as u32))
}

/// A second hash of what has been hashed, whose bits have nothing to do with those of the first.
#[inline(always)]
pub const fn again(hash: u32) -> u32 {
    finish(mix(0, hash))
}

/// Where `ADDRESS_FILTER` has the bit of an address: its word, and the bit alone. Multiplicative hashing with 2^64 divided by the
/// golden ratio: a filter may mistake one address for another, and is asked for every packet.
#[inline(always)]
pub fn filter_bit<F: Family>(addr: &F::Addr) -> (u32, u64) {
    bit_of(F::folded(addr))
}

/// The same of the first address of an address' neighbourhood ([`Family::NEIGHBOURHOOD`]).
#[inline(always)]
pub fn neighbourhood_bit<F: Family>(addr: &F::Addr) -> (u32, u64) {
    bit_of(F::neighbourhood(addr))
}

#[inline(always)]
const fn bit_of(number: u64) -> (u32, u64) {
    const BITS: u32 = FILTER_WORDS.trailing_zeros() + u64::BITS.trailing_zeros();
    const _: () = assert!(FILTER_WORDS.is_power_of_two());
    let place = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - BITS);
    ((place >> 6) as u32, 1 << (place & 63))
}

#[inline(always)]
fn words<F: Family>(addr: &F::Addr, mut hash: u32) -> u32 {
    checksum::for_words(addr, |word| hash = mix(hash, u32::from(u16::from_be(word))));
    hash
}

#[inline(always)]
const fn mix(hash: u32, word: u32) -> u32 {
    let word = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
    (hash ^ word).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64)
}

#[inline(always)]
const fn finish(mut hash: u32) -> u32 {
    hash ^= hash >> 16;
    hash = hash.wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(0xc2b2_ae35);
    hash ^ hash >> 16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{Addr4, Addr6};
    use crate::family::{V4, V6};

    #[test]
    fn consecutive_ports_and_addresses_spread_evenly() {
        let (mut low, mut high) = ([0u32; 64], [0u32; 64]);
        for i in 0..64_000u32 {
            let [a, b, c, d] = (0x0a00_0000 + i / 16).to_be_bytes();
            let key = FlowKey {
                src: Addr4 { octets: [a, b, c, d] },
                dst: Addr4 { octets: [10, 96, 0, 1] },
                src_port: 32768 + (i % 16) as u16,
                dst_port: 80,
                proto: 6,
                side: 3,
                pad: 0,
            };
            low[tuple::<V4>(&key) as usize % 64] += 1;
            high[tuple::<V4>(&key) as usize >> 26] += 1;
        }
        // 1000 expected in each; six standard deviations are 190.
        assert!(low.iter().chain(&high).all(|n| (810..1190).contains(n)), "{low:?} {high:?}");
    }

    #[test]
    fn neighbours_rarely_share_a_bit_of_the_filter() {
        let mut bits = [(); 2].map(|()| std::collections::BTreeSet::new());
        for i in 0..50_000u32 {
            let [a, b, c, d] = (0x0a60_0000 + i).to_be_bytes();
            bits[0].insert(filter_bit::<V4>(&Addr4 { octets: [a, b, c, d] }));
            let octets = [0xfd, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, a, b, c, d];
            bits[1].insert(filter_bit::<V6>(&Addr6 { octets }));
        }
        // In 2^20 bits at random, 48,800 of each would differ.
        assert!(bits.iter().all(|bits| bits.len() > 48_800), "{} {}", bits[0].len(), bits[1].len());
        assert!(bits.iter().flatten().all(|(word, bit)| *word < FILTER_WORDS && bit.is_power_of_two()));
    }

    #[test]
    fn a_neighbourhood_has_the_bit_of_its_first_address() {
        let addr4 = |octets| Addr4 { octets };
        for host in [[0, 0], [0, 1], [255, 255]] {
            let addr = addr4([10, 96, host[0], host[1]]);
            assert_eq!(neighbourhood_bit::<V4>(&addr), filter_bit::<V4>(&addr4([10, 96, 0, 0])));
        }
        assert_ne!(neighbourhood_bit::<V4>(&addr4([10, 97, 0, 0])), filter_bit::<V4>(&addr4([10, 96, 0, 0])));
        let addr6 =
            |net: u8, host: u8| Addr6 { octets: [0xfd, 0, 0, 0, 0, 0, 0, net, host, 0, 0, 0, 0, 0, 0, host] };
        assert_eq!(neighbourhood_bit::<V6>(&addr6(1, 9)), filter_bit::<V6>(&addr6(1, 0)));
        assert_ne!(neighbourhood_bit::<V6>(&addr6(2, 9)), filter_bit::<V6>(&addr6(1, 0)));
    }

    #[test]
    fn the_hash_is_part_of_the_contract_between_nodes() {
        // A changed hash sends established flows to other backends while nodes are upgraded one by one.
        let v4 = FlowKey {
            src: Addr4 { octets: [192, 0, 2, 1] },
            dst: Addr4 { octets: [10, 96, 0, 10] },
            src_port: 40000,
            dst_port: 53,
            proto: 17,
            ..FlowKey::default()
        };
        let v6 = FlowKey {
            src: Addr6 { octets: [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1] },
            dst: Addr6 { octets: [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10] },
            src_port: 40000,
            dst_port: 53,
            proto: 17,
            ..FlowKey::default()
        };
        assert_eq!((tuple::<V4>(&v4), tuple::<V6>(&v6)), (6_450_344, 208_319));
    }
}
