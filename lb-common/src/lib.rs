//! Fairlead's map ABI and the whole packet pipeline.
//!
//! Everything that decides about a packet lives here, generic over three traits, so that the same
//! code runs in the kernel (`lb-ebpf`), under `cargo test`, and in the agent's simulator:
//!
//! * [`Family`]: IPv4 or IPv6,
//! * [`Packet`]: the bytes of one packet (XDP, tc, or a host buffer),
//! * [`Tables`]: the maps (kernel maps, or host hash maps).
#![cfg_attr(not(any(test, feature = "host")), no_std)]

pub mod abi;
pub mod maps;
pub mod reason;

pub use abi::{Addr4, Addr6};
pub use reason::{Hook, Reason};
