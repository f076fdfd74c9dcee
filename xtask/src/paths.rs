//! Names of the machine that builds, which are no part of what it builds: where that was makes no difference.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::host;
use crate::process;

/// Where a compiler has its libraries.
pub(crate) fn sysroot(rustc: &Path) -> Result<PathBuf> {
    let printed =
        process::output(Command::new(rustc).current_dir(host::workspace()).args(["--print", "sysroot"]))?;
    Ok(printed.trim_end().into())
}

/// Flags of rustc that give other names to where packages, the toolchain and the workspace are.
pub(crate) fn remapped(sysroot: &Path, workspace: &str) -> Vec<String> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    let known = [
        (home, "/cargo"),
        (Some(sysroot.to_owned()), "/rust"),
        // The last that fits is taken, and any of them may be below another.
        (Some(host::workspace().to_owned()), workspace),
    ];
    let known = known.into_iter().filter_map(|(path, name)| Some((path?, name)));
    known.map(|(path, name)| format!("--remap-path-prefix={}={name}", path.display())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_it_was_built_has_another_name() {
        let flags = remapped(Path::new("/toolchain"), "/fairlead");
        assert!(flags.contains(&"--remap-path-prefix=/toolchain=/rust".to_owned()), "{flags:?}");
        let workspace = format!("--remap-path-prefix={}=/fairlead", host::workspace().display());
        assert_eq!(flags.last(), Some(&workspace));
    }
}
