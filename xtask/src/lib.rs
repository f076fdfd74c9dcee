//! Builds, tests and shows Fairlead. Everything here runs on the developer's machine; nothing of it is
//! part of the agent; of the packages it builds it uses only the names in lb-common.
#![forbid(unsafe_code)]

pub mod bench;
mod btf;
pub mod build_ebpf;
pub mod cli;
pub mod demo;
pub mod dist;
pub mod docs;
pub mod host;
pub mod image;
pub mod kernels;
pub mod lab;
mod paths;
pub mod process;
pub mod setup;
pub mod snapshot;
pub mod test;
pub mod toolchain;
