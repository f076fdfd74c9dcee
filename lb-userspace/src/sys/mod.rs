//! System calls that no library we use offers: raw `bpf(2)`, namespaces, mounts, sysctls.
//!
//! The only room of this crate where `unsafe` is allowed; everything it exports is safe to call.

pub mod bpf;
pub mod capabilities;
pub mod kernel;
pub mod mount;
pub mod netns;
pub mod poll;
pub mod sysctl;
