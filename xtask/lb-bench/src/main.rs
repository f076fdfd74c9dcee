//! What `cargo xtask bench` has done outside of itself: packets through loaded programs, and traffic on sockets.
//!
//! Prints samples, one line of JSON for each series, and says on stderr what it does. What they mean, and whether it
//! is good, is `xtask`'s business.
#![deny(unsafe_code)]

mod apiserver;
mod asm;
mod bpf;
mod change;
mod compare;
mod flows;
mod frame;
mod live;
mod maps;
mod node;
mod packet;
mod sender;
mod series;
mod traffic;

use anyhow::Result;
use clap::Parser;

/// Measures for `cargo xtask bench`
#[derive(Parser)]
enum Command {
    /// What one packet costs
    Packet(packet::Args),
    /// How many connections can begin
    Flows(flows::Args),
    /// The same packet through programs like those of others
    Compare(compare::Args),
    /// What the kernel's maps cost by themselves
    Maps(maps::Args),
    /// How long changes of manifests, or at an API server, take
    Change(change::Args),
    /// An API server with the objects of a directory
    Apiserver(apiserver::Args),
    /// Answers traffic
    Serve(traffic::ServeArgs),
    /// Makes traffic
    Load(traffic::LoadArgs),
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Packet(args) => packet::run(&args),
        Command::Flows(args) => flows::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Maps(args) => maps::run(&args),
        Command::Change(args) => change::run(&args),
        Command::Apiserver(args) => apiserver::run(&args),
        Command::Serve(args) => traffic::serve(&args),
        Command::Load(args) => traffic::load(&args),
    }
}
