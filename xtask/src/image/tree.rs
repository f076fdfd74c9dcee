//! Files by their path, and the archives that are made of them: the same files make the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use flate2::{Compression, GzBuilder};
use tar::{Builder, EntryType, Header};

const DIRECTORY: u32 = 0o755;

/// Files by their path, without the leading slash. All belong to root.
#[derive(Default, Debug)]
pub struct Tree(BTreeMap<PathBuf, File>);

#[derive(Debug)]
struct File {
    mode: u32,
    bytes: Vec<u8>,
}

impl Tree {
    /// A file that everybody may read.
    pub fn file(&mut self, path: impl AsRef<Path>, bytes: impl Into<Vec<u8>>) {
        self.put(path.as_ref(), 0o644, bytes.into());
    }

    /// A file that everybody may run.
    pub fn program(&mut self, path: impl AsRef<Path>, bytes: impl Into<Vec<u8>>) {
        self.put(path.as_ref(), 0o755, bytes.into());
    }

    /// A file of this machine.
    pub fn copy(&mut self, path: impl AsRef<Path>, from: &Path) -> Result<()> {
        self.file(path, read(from)?);
        Ok(())
    }

    fn put(&mut self, path: &Path, mode: u32, bytes: Vec<u8>) {
        let path = path.strip_prefix("/").unwrap_or(path).to_owned();
        self.0.insert(path, File { mode, bytes });
    }

    /// A tar archive; everything in it was changed at `time` (seconds since 1970).
    pub fn tar(&self, time: u64) -> Result<Vec<u8>> {
        let mut archive = Builder::new(Vec::new());
        let mut append = |path: &Path, kind, mode, bytes: &[u8]| {
            let mut header = Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(mode);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(time);
            header.set_size(bytes.len() as u64);
            archive.append_data(&mut header, path, bytes)
        };
        for path in self.directories() {
            append(&path, EntryType::Directory, DIRECTORY, &[]).context("cannot make an archive")?;
        }
        for (path, File { mode, bytes }) in &self.0 {
            append(path, EntryType::Regular, *mode, bytes).context("cannot make an archive")?;
        }
        archive.into_inner().context("cannot make an archive")
    }

    /// Parents stand before their children.
    fn directories(&self) -> BTreeSet<PathBuf> {
        let parents = self.0.keys().flat_map(|path| path.ancestors().skip(1));
        parents.filter(|path| !path.as_os_str().is_empty()).map(Path::to_owned).collect()
    }

    /// Writes the files below `root`.
    pub fn write_to(&self, root: &Path) -> Result<()> {
        for path in self.directories() {
            let path = root.join(path);
            fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
            set_mode(&path, DIRECTORY)?;
        }
        for (path, File { mode, bytes }) in &self.0 {
            let path = root.join(path);
            fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
            set_mode(&path, *mode)?;
        }
        Ok(())
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("cannot set the mode of {}", path.display()))
}

/// A file of this machine.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Without a time and a name.
pub fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut out = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    out.write_all(bytes).and_then(|()| out.finish()).context("cannot compress")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_files_make_the_same_bytes() {
        let make = |names: [&str; 3]| {
            let mut tree = Tree::default();
            for name in names {
                tree.file(name, name);
            }
            tree.program("/usr/bin/run", *b"#!");
            gzip(&tree.tar(1_700_000_000).unwrap()).unwrap()
        };
        assert_eq!(make(["a", "b/c", "/usr/x"]), make(["/usr/x", "a", "b/c"]));
    }

    #[test]
    fn an_archive_says_nothing_about_the_machine_that_made_it() {
        let mut tree = Tree::default();
        tree.program("/usr/bin/run", *b"#!");
        tree.file("etc/it", *b"text");
        let bytes = tree.tar(1_700_000_000).unwrap();
        let mut seen = Vec::new();
        for entry in tar::Archive::new(bytes.as_slice()).entries().unwrap() {
            let entry = entry.unwrap();
            let header = entry.header();
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
            assert_eq!(header.mtime().unwrap(), 1_700_000_000);
            let path = entry.path().unwrap().to_string_lossy().into_owned();
            seen.push((path.trim_end_matches('/').to_owned(), header.mode().unwrap()));
        }
        let expected =
            [("etc", 0o755), ("usr", 0o755), ("usr/bin", 0o755), ("etc/it", 0o644), ("usr/bin/run", 0o755)];
        assert_eq!(seen, expected.map(|(path, mode)| (path.to_owned(), mode)));
    }
}
