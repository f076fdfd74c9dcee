//! `fairlead`: exit status 0 well, 1 failed with one line on standard error, 2 usage.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use fairlead::cli::{Cli, Usage, one_line, wrong_value};

fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        let Some(line) = wrong_value(&error) else { error.exit() };
        eprintln!("fairlead: {line}");
        std::process::exit(error.exit_code());
    });
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fairlead: {}", one_line(&error));
            if error.is::<Usage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}
