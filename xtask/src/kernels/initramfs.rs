//! The guest's file system: an archive that the kernel unpacks into memory (Documentation/driver-api/early-userspace).

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::packages::Unpacked;
use crate::host;
use crate::process;

/// Files, directories and links by their path, without the leading slash. Parents stand before their children.
#[derive(Default, Debug)]
pub struct Archive(BTreeMap<PathBuf, Entry>);

#[derive(Debug)]
enum Entry {
    Dir,
    File(Vec<u8>),
    Link(PathBuf),
}

impl Archive {
    pub fn dir(&mut self, path: impl AsRef<Path>) {
        let path = inside(path.as_ref());
        for dir in path.ancestors().filter(|dir| !dir.as_os_str().is_empty()) {
            self.0.entry(dir.to_owned()).or_insert(Entry::Dir);
        }
    }

    /// An executable file; so is everything here.
    pub fn file(&mut self, path: impl AsRef<Path>, bytes: impl Into<Vec<u8>>) {
        self.put(path.as_ref(), Entry::File(bytes.into()));
    }

    pub fn link(&mut self, path: impl AsRef<Path>, target: impl Into<PathBuf>) {
        self.put(path.as_ref(), Entry::Link(target.into()));
    }

    fn put(&mut self, path: &Path, entry: Entry) {
        if let Some(dir) = path.parent() {
            self.dir(dir);
        }
        self.0.insert(inside(path), entry);
    }

    /// A program of this machine, with its loader and libraries, at the path it has here.
    pub fn program(&mut self, path: &Path) -> Result<()> {
        self.file(path, read(path)?);
        for library in host::libraries(path)? {
            self.file(&library, read(&library)?);
        }
        Ok(())
    }

    /// A program that we have built: as [`Self::program`], without what only a debugger needs.
    pub fn built(&mut self, path: &Path, scratch: &Path) -> Result<()> {
        let stripped = scratch.join("stripped");
        process::run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&stripped).arg(path))?;
        self.program(path)?;
        self.file(path, read(&stripped)?);
        fs::remove_file(&stripped).context("cannot remove a scratch file")
    }

    /// Modules and those they need, in the order in which they have to be loaded, listed in `/modules/list`.
    /// `true` with a name: the kernel is of no use without it.
    pub fn modules(&mut self, kernel: &Unpacked, names: &[(&str, bool)]) -> Result<()> {
        let mut files: Vec<PathBuf> = Vec::new();
        for (name, needed) in names {
            let mut modprobe = Command::new(host::find("modprobe").context("modprobe is gone")?);
            modprobe.arg("-d").arg(&kernel.base).args(["-S", &kernel.release, "--show-depends", name]);
            match process::output(&mut modprobe) {
                Ok(steps) => files.extend(insmods(&steps)),
                Err(error) if *needed => return Err(error),
                Err(_) => {}
            }
        }
        let mut list = String::new();
        for (i, file) in files.iter().enumerate().filter(|(i, file)| !files[..*i].contains(file)) {
            let bytes = match file.extension().and_then(|kind| kind.to_str()) {
                Some("xz") => unpacked(file)?,
                _ => read(file)?,
            };
            let name = format!("/modules/{i}.ko");
            list += &name;
            list.push('\n');
            self.file(name, bytes);
        }
        self.file("/modules/list", list);
        Ok(())
    }

    /// In the "newc" format, uncompressed: unpacking takes a guest longer than reading.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for (number, (path, entry)) in (1..).zip(&self.0) {
            let (mode, bytes) = match entry {
                Entry::Dir => (0o040_755, &[][..]),
                Entry::File(bytes) => (0o100_755, bytes.as_slice()),
                Entry::Link(target) => (0o120_777, target.as_os_str().as_bytes()),
            };
            write_entry(out, number, mode, path.as_os_str().as_bytes(), bytes)?;
        }
        write_entry(out, 0, 0, b"TRAILER!!!", &[])
    }
}

fn inside(path: &Path) -> PathBuf {
    path.strip_prefix("/").unwrap_or(path).to_owned()
}

/// Header: magic, inode, mode, uid, gid, links, mtime, size, device (2), device of a node (2), length of the name, check.
fn write_entry(out: &mut impl Write, inode: usize, mode: u32, name: &[u8], bytes: &[u8]) -> io::Result<()> {
    const PAD: [u8; 4] = [0; 4];
    let len = name.len() + 1;
    let size = bytes.len();
    write!(out, "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}", 0, 1)?;
    write!(out, "{0:08x}{0:08x}{0:08x}{0:08x}{len:08x}{0:08x}", 0)?;
    out.write_all(name)?;
    // A zero ends the name; name and contents are padded to four bytes, the former behind 110 of header.
    out.write_all(&PAD[..1])?;
    out.write_all(&PAD[..(4 - (110 + len) % 4) % 4])?;
    out.write_all(bytes)?;
    out.write_all(&PAD[..(4 - size % 4) % 4])
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn unpacked(file: &Path) -> Result<Vec<u8>> {
    let mut command = Command::new("xz");
    let output = command.arg("-dc").arg(file).output().context("cannot run xz")?;
    ensure!(output.status.success(), "`{}` failed", process::show(&command));
    Ok(output.stdout)
}

/// The files of modprobe's `insmod FILE` lines, without the options that may follow.
fn insmods(steps: &str) -> impl Iterator<Item = PathBuf> {
    let files = steps.lines().filter_map(|line| line.trim().strip_prefix("insmod "));
    files.map(|rest| {
        let end = [".ko.xz ", ".ko "].iter().find_map(|end| Some(rest.rfind(end)? + end.len()));
        PathBuf::from(rest[..end.unwrap_or(rest.len())].trim_end())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_parents_before_children_and_is_aligned() {
        let mut archive = Archive::default();
        archive.file("/a/b/c", *b"12345");
        archive.link("/a/link", "b/c");
        let names: Vec<&str> = archive.0.keys().filter_map(|path| path.to_str()).collect();
        assert_eq!(names, ["a", "a/b", "a/b/c", "a/link"]);
        let mut out = Vec::new();
        archive.write(&mut out).unwrap();
        let text = String::from_utf8(out.clone()).unwrap();
        let headers: Vec<usize> = text.match_indices("070701").map(|(at, _)| at).collect();
        assert_eq!(headers.len(), 5);
        assert!(headers.iter().all(|at| at % 4 == 0), "{headers:?}");
        let file = &text[headers[2]..headers[3]];
        assert_eq!(&file[14..22], "000081ed");
        assert_eq!(&file[54..62], "00000005");
        assert_eq!(&file[110..], "a/b/c\x0012345\0\0\0");
    }

    #[test]
    fn modules_are_loaded_in_modprobes_order() {
        let steps = "insmod /m/llc.ko \ninsmod /m/a b/stp.ko.xz n=0\nbuiltin x\ninsmod /m/bridge.ko\n";
        let files: Vec<PathBuf> = insmods(steps).collect();
        assert_eq!(files, ["/m/llc.ko", "/m/a b/stp.ko.xz", "/m/bridge.ko"].map(PathBuf::from));
    }
}
