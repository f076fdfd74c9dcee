//! Finds the kernel programs that the agent embeds, and gives their path to the code as
//! `env!("FAIRLEAD_BPF_OBJECT")`.
#![forbid(unsafe_code)]

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const OBJECT: &str = "FAIRLEAD_BPF_OBJECT";

fn main() {
    println!("cargo::rerun-if-env-changed={OBJECT}");
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("..")).to_owned();
    let given = env::var_os(OBJECT).filter(|path| !path.is_empty()).map(PathBuf::from);
    let object = given.clone().unwrap_or_else(|| workspace.join("target/bpf/fairlead.bpf.o"));
    println!("cargo::rerun-if-changed={}", object.display());
    let Ok(object) = object.canonicalize() else {
        println!("cargo::error={}", missing(given.as_deref()));
        return;
    };
    println!("cargo::rustc-env={OBJECT}={}", object.display());
    if given.is_none() {
        warn_if_stale(&workspace, &object);
    }
}

fn missing(given: Option<&Path>) -> String {
    match given {
        Some(path) => {
            format!("{OBJECT} names {}, which is not there; build it or unset {OBJECT}", path.display())
        }
        None => "the kernel programs are not built; run: cargo xtask build-ebpf".to_owned(),
    }
}

/// Kernel programs of yesterday in an agent of today would be hard to understand.
fn warn_if_stale(workspace: &Path, object: &Path) {
    let built = object.metadata().and_then(|meta| meta.modified());
    for source in ["lb-ebpf/src", "lb-common/src"].map(|dir| workspace.join(dir)) {
        println!("cargo::rerun-if-changed={}", source.display());
        if let (Ok(built), Ok(changed)) = (&built, last_change(&source))
            && changed > *built
        {
            println!(
                "cargo::warning=the kernel programs are older than {}; run: cargo xtask build-ebpf",
                source.display()
            );
        }
    }
}

fn last_change(dir: &Path) -> io::Result<SystemTime> {
    let mut newest = SystemTime::UNIX_EPOCH;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let changed = if entry.file_type()?.is_dir() {
            last_change(&entry.path())?
        } else {
            entry.metadata()?.modified()?
        };
        newest = newest.max(changed);
    }
    Ok(newest)
}
