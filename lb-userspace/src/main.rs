//! `fairlead`: exit status 0 well, 1 failed with one line on standard error, 2 usage.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use fairlead::cli::{Cli, one_line};

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fairlead: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}
