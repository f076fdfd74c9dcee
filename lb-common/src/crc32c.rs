//! The checksum of SCTP, updated instead of computed.
//!
//! SCTP is protected by CRC32c over the whole packet, from the ports to the last byte (RFC 9260, appendix A; RFC 3309
//! replaced the first SCTP's Adler-32 by it). Unlike the internet checksum it does not cover the addresses, so that
//! only new ports change it; and no part of it can be taken out and put back by addition. But a CRC is linear: bits
//! are coefficients of a polynomial over GF(2), the message is multiplied and divided by the generator
//! x^32 + x^28 + x^27 + x^26 + x^25 + x^23 + x^22 + x^20 + x^19 + x^18 + x^14 + x^13 + x^11 + x^10 + x^9 + x^8 + x^6 + 1
//! (`GENERATOR`), and the remainder is the CRC. So
//!
//! ```text
//! crc(old xor change) = crc(old) xor remainder(change)
//! ```
//!
//! where the initial value and the final complement, the same in both, cancel out. The ports are the first four bytes of
//! a packet of `len`: as a polynomial, `change` is their difference times x to the number of bits behind them, and the
//! CRC multiplies by x^32 more. That makes `remainder(change) = ports * x^(8 * len) mod generator`: two multiplications
//! with powers of x from a table, whatever the length, and not one look at the payload.
//!
//! The CRC is "reflected": the least significant bit of each byte goes first. In a `u32` of little-endian bytes the most
//! significant bit is therefore the coefficient of x^0, and to multiply by x is to shift right.
//!
//! A field of 0 stays 0. That is how Linux hands a packet to a device with `NETIF_F_SCTP_CRC`, which a veth has:
//! `CHECKSUM_PARTIAL` with `csum_not_inet`, and the field 0 until the device, or the stack in its place
//! (`skb_crc32c_csum_help`), fills it in; GSO packets are always so (`net/sctp/output.c`). No program can tell it from
//! a CRC that happens to be 0: one packet in 2^32 on the wire, which its receiver discards and its sender repeats.

use crate::wire::Ports;

/// The generator without x^32, reflected.
const GENERATOR: u32 = 0x82f6_3b78;
/// x^0, reflected.
const ONE: u32 = 1 << 31;
/// x^8: one byte further.
const BYTE: u32 = ONE >> 8;

/// x^(8 * n), for the lower byte of a length.
static BYTES: [u32; 256] = powers(BYTE);
/// x^(8 * 256 * n), for the upper byte of a length.
static PAGES: [u32; 256] = powers(times(powers(BYTE)[255], BYTE));

/// The checksum of an SCTP packet of `len` bytes after its ports changed.
#[inline(always)]
pub fn update(check: u32, old: Ports, new: Ports, len: u16) -> u32 {
    let change = word(old) ^ word(new);
    if check == 0 || change == 0 {
        return check;
    }
    check ^ crc32c_remainder(change, u32::from(len))
}

/// What a change of the first four bytes of a packet of `len` bytes, at most 65,535, changes in its CRC.
///
/// In the kernel it keeps its name and linkage, which makes it a "global" function: the verifier follows its loops once,
/// for any arguments, instead of on each of the hundreds of ways that lead to it (kernel commit 51c39bb1d5d1, 5.6).
#[inline(never)]
#[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
pub extern "C" fn crc32c_remainder(change: u32, len: u32) -> u32 {
    let [_, _, upper, lower] = len.to_be_bytes();
    times(times(change, BYTES[lower as usize]), PAGES[upper as usize])
}

/// The ports as the CRC takes them: the first bit of the packet is the least significant.
#[inline(always)]
const fn word(ports: Ports) -> u32 {
    ports.src.get().swap_bytes() as u32 | (ports.dst.get().swap_bytes() as u32) << 16
}

/// The product of two polynomials, modulo the generator.
#[inline(always)]
const fn times(mut a: u32, b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 32;
    while bit > 0 {
        bit -= 1;
        // All ones or all zeros instead of a branch, which the verifier would follow both ways.
        product ^= a & 0u32.wrapping_sub(b >> bit & 1);
        a = a >> 1 ^ GENERATOR & 0u32.wrapping_sub(a & 1);
    }
    product
}

/// The powers of `base`, from 0 on.
const fn powers(base: u32) -> [u32; 256] {
    let mut powers = [ONE; 256];
    let mut n = 1;
    while n < powers.len() {
        powers[n] = times(powers[n - 1], base);
        n += 1;
    }
    powers
}

/// The whole checksum, the textbook's way: of a packet with a checksum field of 0.
#[cfg(any(test, feature = "host"))]
pub fn compute(packet: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in packet {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ GENERATOR } else { crc >> 1 };
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::Be16;

    #[test]
    fn the_published_values() {
        // The check value of the catalogues, and RFC 3720, appendix B.4: 32 bytes of zeros, of ones.
        assert_eq!(compute(b"123456789"), 0xe306_9283);
        assert_eq!(compute(&[0; 32]), 0x8a91_36aa);
        assert_eq!(compute(&[0xff; 32]), 0x62a8_ab43);
    }

    fn ports([a, b, c, d]: [u8; 4]) -> Ports {
        Ports { src: Be16::new(u16::from_be_bytes([a, b])), dst: Be16::new(u16::from_be_bytes([c, d])) }
    }

    fn updated(message: &[u8], new: [u8; 4]) -> u32 {
        let old = [message[0], message[1], message[2], message[3]];
        update(compute(message), ports(old), ports(new), message.len() as u16)
    }

    proptest! {
        #[test]
        fn an_update_equals_a_computation(
            mut message in proptest::collection::vec(any::<u8>(), 12..3000),
            new in any::<[u8; 4]>(),
        ) {
            let updated = updated(&message, new);
            message[..4].copy_from_slice(&new);
            prop_assert_eq!(updated, compute(&message));
        }
    }

    #[test]
    fn every_length_has_its_power() {
        let message = noise(usize::from(u16::MAX));
        let new = [0x8e, 0x9c, 0x75, 0x30];
        for len in (12..600).chain((600..=65535).step_by(509)).chain([65535]) {
            let updated = updated(&message[..len], new);
            let mut after = message[..len].to_vec();
            after[..4].copy_from_slice(&new);
            assert_eq!(updated, compute(&after), "{len} bytes");
        }
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1u32;
        let next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    #[test]
    fn nothing_changes_without_new_ports_and_an_open_field_stays_open() {
        let (old, new) = (ports([1, 2, 3, 4]), ports([1, 2, 3, 5]));
        assert_eq!(update(0x1234_5678, old, old, 100), 0x1234_5678);
        assert_eq!(update(0, old, new, 100), 0);
        assert_ne!(update(0x1234_5678, old, new, 100), 0x1234_5678);
    }
}
