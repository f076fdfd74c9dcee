//! Words of 4 and 8 bytes of a header, of which no more is known than that they begin at an even address.
//!
//! The kernel runs BPF on machines where such a word is read and written at once, and the verifier lets it pass where the kernel is built
//! so (`CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS`: x86-64, arm64). LLVM takes it to pieces for this target. Its feature
//! `allows-misaligned-mem-access` would leave it whole, but puts such words on the stack, too, where no verifier lets
//! them pass. So the instruction is written down.

use core::mem::size_of;

use crate::wire::Wire;

macro_rules! words {
    ($load:ident, $store:ident, $word:ty, $size:literal) => {
        #[doc = concat!("The `", $size, "` of a header from byte `AT` on, as it lies in memory.")]
        #[inline(always)]
        pub fn $load<T: Wire, const AT: usize>(header: &T) -> $word {
            const { assert!(AT + size_of::<$word>() <= size_of::<T>()) };
            let from = core::ptr::from_ref(header);
            #[cfg(target_arch = "bpf")]
            {
                let word: u64;
                // SAFETY: reads inside of the header.
                unsafe {
                    core::arch::asm!(
                        concat!("{word} = *(", $size, " *)({from} + {at})"),
                        word = out(reg) word, from = in(reg) from, at = const AT,
                        options(pure, readonly, nostack, preserves_flags)
                    );
                }
                word as $word
            }
            #[cfg(not(target_arch = "bpf"))]
            // SAFETY: reads inside of the header, which has no padding.
            unsafe {
                from.byte_add(AT).cast::<$word>().read_unaligned()
            }
        }

        #[doc = concat!("Writes the `", $size, "` of a header from byte `AT` on, as it is to lie in memory.")]
        #[inline(always)]
        pub fn $store<T: Wire, const AT: usize>(header: &mut T, word: $word) {
            const { assert!(AT + size_of::<$word>() <= size_of::<T>()) };
            let to = core::ptr::from_mut(header);
            #[cfg(target_arch = "bpf")]
            // SAFETY: writes inside of the header, which takes any bytes.
            unsafe {
                core::arch::asm!(
                    concat!("*(", $size, " *)({to} + {at}) = {word}"),
                    word = in(reg) u64::from(word), to = in(reg) to, at = const AT,
                    options(nostack, preserves_flags)
                );
            }
            #[cfg(not(target_arch = "bpf"))]
            // SAFETY: writes inside of the header, which takes any bytes.
            unsafe {
                to.byte_add(AT).cast::<$word>().write_unaligned(word);
            }
        }
    };
}

words!(load32, store32, u32, "u32");
words!(load64, store64, u64, "u64");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::Addr6;

    #[test]
    fn words_are_the_bytes_that_stand_there_and_no_others() {
        let mut addr = Addr6 { octets: core::array::from_fn(|i| i as u8) };
        assert_eq!(load32::<_, 2>(&addr).to_ne_bytes(), [2, 3, 4, 5]);
        assert_eq!(load64::<_, 6>(&addr).to_ne_bytes(), [6, 7, 8, 9, 10, 11, 12, 13]);
        store32::<_, 12>(&mut addr, u32::from_ne_bytes([0xa0, 0xa1, 0xa2, 0xa3]));
        store64::<_, 2>(&mut addr, u64::from_ne_bytes([0xb0, 0xb1, 0xb2, 0xb3, 0xb4, 0xb5, 0xb6, 0xb7]));
        let now = [0, 1, 0xb0, 0xb1, 0xb2, 0xb3, 0xb4, 0xb5, 0xb6, 0xb7, 10, 11, 0xa0, 0xa1, 0xa2, 0xa3];
        assert_eq!(addr.octets, now);
    }
}
