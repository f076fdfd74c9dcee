//! Fairlead's map ABI and the whole packet pipeline.
//!
//! Everything that decides about a packet lives here, generic over three traits, so that the same
//! code runs in the kernel (`lb-ebpf`), under `cargo test`, and in the agent's simulator:
//!
//! * [`Family`]: IPv4 or IPv6,
//! * [`Packet`]: the bytes of one packet (XDP, tc, or a host buffer),
//! * [`Tables`]: the maps (kernel maps, or host hash maps).
#![cfg_attr(not(any(test, feature = "host")), no_std)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![expect(
    clippy::inline_always,
    reason = "in the kernel a call costs 8 ns, takes five arguments at most, and hides from the verifier what was checked"
)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "lengths and offsets of headers; the kernel has no panicking conversion to fall back on"
)]

pub mod abi;
pub mod checksum;
pub mod crc32c;
pub mod family;
pub mod flow;
pub mod fragment;
pub mod hash;
#[cfg(any(test, feature = "host"))]
pub mod host;
pub mod icmp;
pub mod maps;
pub mod packet;
pub mod parse;
pub mod pipeline;
pub mod reason;
pub mod respond;
pub mod rewrite;
pub mod sample;
pub mod service;
pub mod socket;
pub mod sweep;
pub mod tables;
#[cfg(feature = "testing")]
pub mod testing;
pub mod tunnel;
pub mod wire;
pub mod word;

pub use abi::{Addr4, Addr6};
pub use family::{Family, V4, V6};
pub use packet::Packet;
pub use reason::{Hook, Reason};
pub use tables::Tables;
