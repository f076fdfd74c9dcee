//! The machine we run on: who we are, where things are, what can be installed.

use std::env;
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::process::{self, say};

/// The root of the repository.
pub fn workspace() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}

/// Whether we may change the machine.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// After `sudo cargo xtask`, what was built belongs to the user who called sudo, so that they can go on
/// building without it.
pub fn give_back() {
    let (Ok(user), Ok(group)) = (env::var("SUDO_UID"), env::var("SUDO_GID")) else { return };
    let target = workspace().join("target");
    if is_root() && target.exists() {
        let owner = format!("{user}:{group}");
        let mut chown = Command::new("chown");
        chown.args(["--recursive", "--no-dereference", "--from=0", &owner]).arg(&target);
        if let Err(error) = process::run(&mut chown) {
            say(format!("{} now belongs to root: {error:#}", target.display()));
        }
    }
}

/// A command that runs as root: directly, or through sudo, which may ask for a password.
pub fn as_root(program: &str) -> Result<Command> {
    let found = find(program).with_context(|| format!("there is no `{program}` on this machine"))?;
    if is_root() {
        return Ok(Command::new(found));
    }
    let sudo = find("sudo").context("this needs root, and there is no sudo; run it as root")?;
    let mut command = Command::new(sudo);
    command.arg("--preserve-env").arg(found);
    Ok(command)
}

/// The cargo that started us, or the first one found, in the root of the workspace.
///
/// `cargo xtask` is `cargo run`, which describes our own package in the environment. Build scripts that
/// look at these variables would find them changed each time, and half of the workspace would be built again.
pub fn cargo() -> Result<Command> {
    let mut command = Command::new(cargo_path()?);
    command.current_dir(workspace());
    let ours = ["CARGO_PKG_", "CARGO_MANIFEST_"];
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(|name| ours.iter().any(|prefix| name.starts_with(prefix))) {
            command.env_remove(name);
        }
    }
    // What `cargo run` puts in front of it is for our own libraries.
    command.env_remove("LD_LIBRARY_PATH");
    Ok(command)
}

/// Where cargo is.
pub fn cargo_path() -> Result<PathBuf> {
    env::var_os("CARGO")
        .map(PathBuf::from)
        .or_else(|| find("cargo"))
        .context("cargo is neither on PATH nor in ~/.cargo/bin")
}

/// The first executable of this name on PATH, in cargo's directories, or where Linux keeps
/// administrators' tools.
pub fn find(name: &str) -> Option<PathBuf> {
    find_all(name).into_iter().next()
}

/// Every executable of this name, in the order in which they should be preferred.
pub fn find_all(name: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for path in search_path().into_iter().map(|dir| dir.join(name)) {
        if is_executable(&path) && !found.contains(&path) {
            found.push(path);
        }
    }
    found
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// PATH is not enough: sudo's `secure_path` has no cargo directory, and a user's PATH no `sbin`.
fn search_path() -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect();
    dirs.extend(env::var_os("CARGO_HOME").map(|home| Path::new(&home).join("bin")));
    dirs.extend([env::home_dir(), sudo_home()].into_iter().flatten().map(|home| home.join(".cargo/bin")));
    dirs.extend(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from));
    dirs
}

/// PATH for programs that look for others themselves.
pub fn path_with(first: &Path) -> OsString {
    let dirs = std::iter::once(first.to_path_buf()).chain(search_path());
    // A directory name with a colon cannot stand in PATH at all: then PATH stays as it is.
    env::join_paths(dirs).unwrap_or_else(|_| env::var_os("PATH").unwrap_or_default())
}

/// Home of the user who called sudo: their cargo serves us too.
fn sudo_home() -> Option<PathBuf> {
    let user = env::var("SUDO_USER").ok()?;
    let entry = process::output(Command::new("getent").args(["passwd", &user])).ok()?;
    entry.trim_end().split(':').nth(5).map(PathBuf::from)
}

/// The loader and the libraries of a program, where this machine has them.
pub fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = process::output(Command::new("ldd").arg(program));
    // For a static program ldd fails and says so.
    let listed = match listed {
        Err(error) if format!("{error:#}").contains("not a dynamic executable") => return Ok(Vec::new()),
        other => other?,
    };
    ensure!(!listed.contains("not found"), "{} lacks libraries: {listed}", program.display());
    Ok(listed.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

/// Whether packages come from apt here.
pub fn has_apt() -> bool {
    Path::new("/usr/bin/apt-get").exists()
}

/// The version of `package` that apt would install, if there is one.
pub fn apt_candidate(package: &str) -> Option<String> {
    let policy = process::output(Command::new("apt-cache").args(["policy", package])).ok()?;
    let line = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (line != "(none)").then(|| line.to_owned())
}

/// The command that installs `packages`, as the user would type it.
pub fn apt_line(packages: &[impl AsRef<str>], root: bool) -> String {
    let sudo = if root { "" } else { "sudo " };
    let packages: Vec<&str> = packages.iter().map(AsRef::as_ref).collect();
    format!("{sudo}apt-get install -y --no-install-recommends {}", packages.join(" "))
}

/// Installs `packages`, saying so first. Needs root.
pub fn apt_install(packages: &[String]) -> Result<()> {
    say(format!("installing packages: {}", apt_line(packages, true)));
    process::run(
        Command::new("apt-get")
            .args(["install", "-y", "-q", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}

/// Refreshes apt's lists: a new machine has none.
pub fn apt_update() -> Result<()> {
    say("refreshing the lists of packages: apt-get update");
    process::run(Command::new("apt-get").args(["update", "-q"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_brings_its_loader_along() {
        let libraries = libraries(&std::env::current_exe().unwrap()).unwrap();
        let has = |name: &str| libraries.iter().any(|path| path.to_string_lossy().contains(name));
        assert!(has("ld-linux") && has("libc."), "{libraries:?}");
    }
}
