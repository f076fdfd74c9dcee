//! `cargo xtask docs`: what is in `docs/` and comes from a source: pictures, and pages that say what the code says.

mod picture;
mod reasons;
mod svg;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::host;
use crate::process::{self, say};

/// How sources of pictures end; see [`picture`](self::picture::Picture) for what is in them.
const SOURCE: &str = "picture";

/// Write what is generated in docs/: pictures, the tables of settings, the table of reasons.
///
/// Tests fail as long as one of them is not what its source gives.
#[derive(clap::Args)]
pub struct Args {}

/// The subcommand.
pub fn command(_: &Args) -> Result<()> {
    let root = host::workspace();
    for (path, text) in generated(root)? {
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        say(format!("{} is written", path.display()));
    }
    let mut test = host::cargo()?;
    test.args(["test", "--locked", "--quiet", "--package", "lb-userspace", "--test", "configuration"]);
    test.env("FAIRLEAD_WRITE_DOCS", "1").current_dir(root);
    process::run(&mut test)?;
    say("docs/configuration.md is written");
    Ok(())
}

/// What this crate generates in a repository: where it is, and what it has to be.
///
/// # Errors
///
/// What is wrong with a source.
pub fn generated(root: &Path) -> Result<BTreeMap<PathBuf, String>> {
    let mut all = pictures(&root.join("docs"))?;
    let page = root.join("docs/bpftool.md");
    let text = reasons::written(&read(&page)?, &read(&root.join("lb-common/src/reason.rs"))?)
        .with_context(|| page.display().to_string())?;
    all.insert(page, text);
    Ok(all)
}

/// Every picture below a directory.
fn pictures(dir: &Path) -> Result<BTreeMap<PathBuf, String>> {
    let mut drawn = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == SOURCE) {
                let picture = read(&path)?.parse().with_context(|| path.display().to_string())?;
                drawn.insert(path.with_extension("svg"), svg::draw(&picture));
            }
        }
    }
    if drawn.is_empty() {
        bail!("no picture has a source below {}", dir.display());
    }
    Ok(drawn)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
