//! `cargo xtask`: see [`xtask::cli`].
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    xtask::cli::main()
}
