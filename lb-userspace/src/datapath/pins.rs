//! Where maps, programs and links live while no agent runs.
//!
//! ```text
//! /sys/fs/bpf/fairlead/          --bpffs
//!   v1/                          layout version
//!     SERVICES4 SERVICES6 …      maps
//!     progs/xdp_nic …            programs as last loaded
//!     links/tc_pod_in-17 …       program and interface index
//!     links/sock_connect4 …
//! ```
//!
//! bpffs refuses dots in names.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use lb_common::maps::LAYOUT_VERSION;

use super::error::OpenError;
use crate::sys::mount;

/// Begins the names of directories of layouts that are no more.
const RETIRED: &str = "old-";
/// Begins the names of directories of layouts that are not yet.
const STAGED: &str = "new-";

/// The pin directory of one agent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pins {
    root: PathBuf,
    version: PathBuf,
}

impl Pins {
    pub fn new(bpffs: &Path) -> Self {
        Self::of_version(bpffs, LAYOUT_VERSION)
    }

    /// The pins of another layout.
    pub fn of_version(bpffs: &Path, version: u32) -> Self {
        Self { root: bpffs.to_owned(), version: bpffs.join(format!("v{version}")) }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of this layout version.
    pub fn dir(&self) -> &Path {
        &self.version
    }

    /// Where this layout goes when another has taken its place.
    pub fn retired(&self) -> PathBuf {
        self.beside(RETIRED)
    }

    /// Where this layout is made ready to take the place of another.
    #[must_use]
    pub fn staged(&self) -> Self {
        Self { root: self.root.clone(), version: self.beside(STAGED) }
    }

    fn beside(&self, prefix: &str) -> PathBuf {
        let name = self.version.file_name().unwrap_or_default();
        self.root.join(format!("{prefix}{}", name.to_string_lossy()))
    }

    pub fn map(&self, name: &str) -> PathBuf {
        self.version.join(name)
    }

    pub fn programs(&self) -> PathBuf {
        self.version.join("progs")
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.programs().join(name)
    }

    pub fn links(&self) -> PathBuf {
        self.version.join("links")
    }

    pub fn device_link(&self, program: &str, ifindex: u32) -> PathBuf {
        self.links().join(format!("{program}-{ifindex}"))
    }

    pub fn socket_link(&self, program: &str) -> PathBuf {
        self.links().join(program)
    }

    /// Makes the directory that all layouts are in, for its owner only.
    pub fn create_root(&self) -> Result<(), OpenError> {
        create(&self.root)
    }

    /// Makes the directories of this layout.
    pub fn create(&self) -> Result<(), OpenError> {
        [self.dir(), &self.programs(), &self.links()].into_iter().try_for_each(create)
    }

    /// Keeps other agents off the directory for as long as the lock lives. `None`: one is there.
    pub fn lock(&self) -> io::Result<Option<Lock>> {
        let dir = File::open(&self.root)?;
        match dir.try_lock() {
            Ok(()) => Ok(Some(Lock(dir))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

fn create(path: &Path) -> Result<(), OpenError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| OpenError::Pin { action: "create directory", path: path.to_owned(), source })
}

/// Holds a pin directory.
#[derive(Debug)]
pub struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough: a child that is just being made may hold a duplicate for a moment.
        if let Err(error) = self.0.unlock() {
            tracing::debug!(%error, "unlock");
        }
    }
}

/// The program and interface index that a pin in `links` is named after.
pub fn parse_device_link(name: &str) -> Option<(&str, u32)> {
    let (program, ifindex) = name.rsplit_once('-')?;
    Some((program, ifindex.parse().ok()?))
}

/// The layout version that a directory is named after.
pub fn parse_version(name: &str) -> Option<u32> {
    name.strip_prefix('v')?.parse().ok()
}

/// Whether a directory is what is left of a layout that is no more, or was never to be.
pub fn is_leftover(name: &str) -> bool {
    let name = name.strip_prefix(RETIRED).or_else(|| name.strip_prefix(STAGED));
    name.is_some_and(|name| parse_version(name).is_some())
}

/// Makes sure that `path` is, or can be made, on a BPF file system; mounts one at its usual place if
/// there is none.
pub fn ensure_bpffs(path: &Path) -> Result<(), OpenError> {
    if on_bpffs(path)? {
        return Ok(());
    }
    let usual = Path::new(mount::BPFFS);
    if !path.starts_with(usual) || !usual.is_dir() {
        return Err(OpenError::NotBpffs { path: path.to_owned() });
    }
    mount::mount_bpffs(usual).map_err(|source| OpenError::MountBpffs { path: usual.to_owned(), source })?;
    tracing::info!(path = %usual.display(), "mounted a BPF file system");
    Ok(())
}

fn on_bpffs(path: &Path) -> Result<bool, OpenError> {
    let existing = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    mount::is_bpffs(existing).map_err(|source| OpenError::Pin {
        action: "examine",
        path: existing.to_owned(),
        source,
    })
}

/// Names in a directory, sorted; none if it does not exist.
pub fn names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names: Vec<String> = entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<_>>()?;
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_names_are_read_back() {
        let pins = Pins::new(Path::new("/x"));
        let path = pins.device_link("tc_pod_in", 17);
        assert_eq!(path, Path::new("/x/v1/links/tc_pod_in-17"));
        assert_eq!(parse_device_link("tc_pod_in-17"), Some(("tc_pod_in", 17)));
        assert_eq!(parse_device_link("sock_connect4"), None);
    }

    #[test]
    fn directories_of_layouts_are_told_apart() {
        assert_eq!(
            ["v1", "v12", "v", "w1", "old-v1"].map(parse_version),
            [Some(1), Some(12), None, None, None]
        );
        let retired = Pins::of_version(Path::new("/x"), 7).retired();
        assert_eq!(retired, Path::new("/x/old-v7"));
        let staged = Pins::of_version(Path::new("/x"), 7).staged();
        assert_eq!(staged.map("FLOWS4"), Path::new("/x/new-v7/FLOWS4"));
        assert_eq!(
            ["old-v7", "new-v7", "v7", "old-x", "new"].map(is_leftover),
            [true, true, false, false, false]
        );
    }

    #[test]
    fn a_directory_elsewhere_is_refused_in_one_line() {
        let error = ensure_bpffs(Path::new("/tmp/fairlead")).unwrap_err().to_string();
        assert!(error.starts_with("--bpffs /tmp/fairlead: not on a BPF file system"), "{error}");
        assert!(!error.contains('\n'));
    }
}
