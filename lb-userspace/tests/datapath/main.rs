//! The datapath against the kernel: loading, pinning, attaching, following devices, cleaning up.
//!
//! Needs root. Every test has a network namespace and a BPF file system of its own.

mod edges;
mod maps;
mod support;
mod takeover;
