//! `fairlead man`: its manual pages, for packages.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Args, CommandFactory as _};

use super::Cli;

#[derive(Args)]
pub struct Man {
    /// Where the pages go
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

impl Man {
    pub fn run(&self) -> Result<()> {
        write(&self.dir)
    }
}

/// A page for the program, and one for each subcommand that is no secret.
fn write(dir: &Path) -> Result<()> {
    let cannot = || format!("cannot write to {}", dir.display());
    fs::create_dir_all(dir).with_context(cannot)?;
    clap_mangen::generate_to(Cli::command(), dir).with_context(cannot)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_subcommand_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path()).unwrap();
        let names =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let written: BTreeSet<String> = names.collect();
        let command = Cli::command();
        let shown = command.get_subcommands().filter(|command| !command.is_hide_set());
        let mut expected: BTreeSet<String> =
            shown.map(|command| format!("fairlead-{}.1", command.get_name())).collect();
        expected.insert("fairlead.1".into());
        assert_eq!(written, expected);
        for name in expected.iter().filter(|name| *name != "fairlead.1") {
            let page = fs::read_to_string(dir.path().join(name)).unwrap();
            let subcommand = name.trim_start_matches("fairlead-").trim_end_matches(".1");
            assert!(page.contains(".SH SYNOPSIS") && page.contains(subcommand), "{name}: {page}");
        }
        let page = fs::read_to_string(dir.path().join("fairlead-explain.1")).unwrap();
        assert!(page.contains(".SH EXTRA") && page.contains("Examples:"), "{page}");
    }
}
