//! What `cargo xtask dist` makes, of the program of this build.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use xtask::process;

use crate::world::{XTASK, agent};

/// Names of the files in a release.
fn release(dir: &Path, program: &Path) -> Result<BTreeSet<String>> {
    let mut dist = Command::new(XTASK);
    dist.args(["dist", "--draft", "--binary"]).arg(program).arg("--output").arg(dir);
    process::output(&mut dist)?;
    process::output(Command::new("sha256sum").current_dir(dir).args(["--check", "--strict", "SHA256SUMS"]))?;
    fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

#[test]
fn a_release_is_complete_and_the_same_bytes_each_time() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    // What it says is the agent's, and its size is nobody's business here.
    let program = scratch.path().join("fairlead");
    fs::write(&program, format!("#!/bin/sh\nexec {} \"$@\"\n", agent().display()))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let (first, second) = (scratch.path().join("first"), scratch.path().join("second"));
    let names = release(&first, &program)?;
    let version = env!("CARGO_PKG_VERSION");
    for name in ["SHA256SUMS", &format!("fairlead-{version}.yaml"), &format!("fairlead-{version}.tgz")] {
        ensure!(names.contains(name), "{name} is not among {names:?}");
    }
    for end in [".tar", ".cdx.json", "linux-amd64.tar.gz", &format!("deploy-{version}.tar.gz")] {
        let end = end.replace("amd64", if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" });
        ensure!(names.iter().any(|name| name.ends_with(&end)), "nothing ends with {end} among {names:?}");
    }
    ensure!(names.len() == 7, "{names:?}");
    let packed =
        process::output(Command::new("sh").arg("-c").arg("tar tzf *-linux-*.tar.gz").current_dir(&first))?;
    for path in
        ["/fairlead\n", "/man/man1/fairlead-run.1\n", "/completions/fairlead.bash\n", "/LICENSE-MIT\n"]
    {
        ensure!(packed.contains(path), "{path} is not among:\n{packed}");
    }
    ensure!(release(&second, &program)? == names, "another time there are other files");
    let sums = |dir: &Path| fs::read_to_string(dir.join("SHA256SUMS"));
    ensure!(sums(&first)? == sums(&second)?, "{}\nand\n{}", sums(&first)?, sums(&second)?);
    Ok(())
}
