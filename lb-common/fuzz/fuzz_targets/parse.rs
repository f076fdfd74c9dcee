//! Any bytes, at any side.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lb_common::testing::conversation::any_packet(data));
