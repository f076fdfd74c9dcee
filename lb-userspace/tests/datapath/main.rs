//! The datapath against the kernel: loading, pinning, attaching, following devices, cleaning up.
//!
//! Needs root. Every test has a network namespace and a BPF file system of its own.
#![expect(clippy::unwrap_used, reason = "in tests, helpers included, a panic is the report")]

mod check;
mod edges;
mod inspect;
mod kernel;
mod maps;
mod migrate;
mod resize;
mod sharing;
mod support;
mod sweep;
mod takeover;
mod trace;
