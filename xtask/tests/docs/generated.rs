//! What is generated is what its sources give.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use xtask::{docs, host};

#[test]
fn pictures_and_tables_are_what_their_sources_give() -> Result<()> {
    for (path, text) in docs::generated(host::workspace())? {
        let there = fs::read_to_string(&path).with_context(|| format!("no {}", path.display()))?;
        ensure!(there == text, "{} is not what its source gives: run `cargo xtask docs`", path.display());
    }
    Ok(())
}
