//! Histories of packets, evictions, waiting and changes.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lb_common::testing::conversation::history(data));
