//! The command line.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::{bench, build_ebpf, demo, dist, docs, host, image, kernels, lab, snapshot, test};

/// Builds, tests and shows Fairlead.
///
/// On a bare machine each command first sets up what it needs and says what it installs.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    BuildEbpf(build_ebpf::Args),
    Test(test::Args),
    #[command(hide = true)]
    Snapshot(snapshot::Args),
    Demo(demo::Args),
    Bench(bench::Args),
    Kernels(kernels::Args),
    Docs(docs::Args),
    Image(image::Args),
    Dist(dist::Args),
    #[command(hide = true)]
    LabSites(lab::server::SitesArgs),
    #[command(hide = true)]
    LabDesk(lab::client::DeskArgs),
}

impl Command {
    fn run(self) -> Result<()> {
        match self {
            Self::BuildEbpf(args) => build_ebpf::command(&args),
            Self::Test(args) => test::command(&args),
            Self::Snapshot(args) => snapshot::command(&args),
            Self::Demo(args) => demo::command(&args),
            Self::Bench(args) => bench::command(&args),
            Self::Kernels(args) => kernels::command(&args),
            Self::Docs(args) => docs::command(&args),
            Self::Image(args) => image::command(&args),
            Self::Dist(args) => dist::command(&args),
            Self::LabSites(args) => lab::server::run_sites(&args),
            Self::LabDesk(args) => lab::client::run_desk(&args),
        }
    }
}

/// Parses the arguments and runs the command; a failure is one line on stderr.
pub fn main() -> ExitCode {
    let outcome = Cli::parse().command.run();
    host::give_back();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
