//! Copying what one map holds into another, whatever the layouts of both.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use lb_common::maps::MapKind;

use super::error::OpenError;
use crate::sys::bpf::{self, MapInfo};

/// Entries read with one system call.
const BATCH: usize = 4096;

/// Passes over the flows before the switch, at most; and how short one is that leaves little to the next.
pub(super) const PASSES: usize = 4;
pub(super) const SHORT_PASS: Duration = Duration::from_millis(5);

/// Makes an entry of the map it goes to from the key and the value of one it comes from; `None`: it is left out.
pub type Convert = fn(&[u8], &[u8]) -> Option<(Vec<u8>, Vec<u8>)>;

/// A map of any layout.
#[derive(Debug)]
pub(super) struct Table {
    fd: OwnedFd,
    pub(super) info: MapInfo,
}

impl Table {
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let info = bpf::map_info(fd.as_fd())?;
        Ok(Self { fd, info })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The map that is pinned at a path, if any is.
    pub(super) fn open(path: &Path) -> Result<Option<Self>, OpenError> {
        let opened = match bpf::obj_get(path) {
            Ok(fd) => Self::new(fd).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        opened.map_err(|source| OpenError::Pin { action: "open pinned map", path: path.to_owned(), source })
    }

    fn is(&self, kind: MapKind) -> bool {
        self.info.kind == kind as u32
    }

    /// Shows `visit` every entry, in the order of the map.
    pub(super) fn each(&self, mut visit: impl FnMut(&[u8], &[u8]) -> io::Result<()>) -> io::Result<()> {
        let info = &self.info;
        // Tries are read in batches only since 5.13.
        if self.is(MapKind::LpmTrie) {
            let mut key = bpf::map_next_key_bytes(self.fd(), info, None)?;
            while let Some(at) = key {
                if let Some(value) = bpf::map_lookup_bytes(self.fd(), info, &at)? {
                    visit(&at, &value)?;
                }
                key = bpf::map_next_key_bytes(self.fd(), info, Some(&at))?;
            }
            return Ok(());
        }
        if self.is(MapKind::PerCpuArray) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "a map with values for each CPU"));
        }
        let mut cursor = None;
        loop {
            let (entries, next) = bpf::map_lookup_batch_bytes(self.fd(), info, cursor, BATCH)?;
            let keys = entries.keys.chunks_exact(info.key_size as usize);
            for (key, value) in keys.zip(entries.values.chunks_exact(info.value_size as usize)) {
                visit(key, value)?;
            }
            if next.is_none() {
                return Ok(());
            }
            cursor = next;
        }
    }
}

/// Whose value counts where both maps have a key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Clash {
    Source,
    Target,
    /// The one with the larger `u64` at this offset of the target's values.
    Newer(usize),
}

/// The way from one map to another. Both may be in use: what changes meanwhile is for the next [`Carrier::pass`].
#[derive(Debug)]
pub(super) struct Carrier<'a> {
    from: &'a Table,
    to: Table,
    convert: Convert,
    /// Hashes of the entries that have been looked at.
    seen: HashSet<u64>,
}

impl<'a> Carrier<'a> {
    pub(super) fn new(from: &'a Table, to: Table, convert: Convert) -> Self {
        Self { from, to, convert, seen: HashSet::new() }
    }

    /// Copies what is new since the last pass, as far as the target lacks it or has it with a value that counts less.
    /// Answers how many entries it wrote. Values of 0 in arrays are nobody's.
    pub(super) fn pass(&mut self, clash: Clash) -> io::Result<u64> {
        let Self { from, to, convert, seen } = self;
        let mut written = 0;
        from.each(|key, value| {
            let mut hasher = DefaultHasher::new();
            (key, value).hash(&mut hasher);
            let nobodys = from.is(MapKind::Array) && value.iter().all(|byte| *byte == 0);
            if nobodys || !seen.insert(hasher.finish()) {
                return Ok(());
            }
            written += u64::from(write(to, convert(key, value), clash)?);
            Ok(())
        })?;
        Ok(written)
    }
}

/// Writes an entry, if there is one and it counts.
fn write(to: &Table, entry: Option<(Vec<u8>, Vec<u8>)>, clash: Clash) -> io::Result<bool> {
    let Some((key, value)) = entry else { return Ok(false) };
    let sizes = (to.info.key_size as usize, to.info.value_size as usize);
    if (key.len(), value.len()) != sizes {
        let what = format!("an entry of {} and {} bytes does not fit", key.len(), value.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let have = bpf::map_lookup_bytes(to.fd(), &to.info, &key)?;
    // Of an array every key is there.
    let have = have.filter(|have| !to.is(MapKind::Array) || have.iter().any(|byte| *byte != 0));
    let flags = match have {
        None if to.is(MapKind::Array) => 0,
        None => bpf::NO_EXIST,
        Some(have) if counts(&value, &have, clash) => 0,
        Some(_) => return Ok(false),
    };
    match bpf::map_update_bytes(to.fd(), &to.info, &key, &value, flags) {
        // Somebody was faster.
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        result => result.map(|()| true),
    }
}

/// Whether `value` takes the place of `have`.
fn counts(value: &[u8], have: &[u8], clash: Clash) -> bool {
    match clash {
        Clash::Source => value != have,
        Clash::Target => false,
        Clash::Newer(at) => {
            let time = |value: &[u8]| {
                let bytes = value.get(at..).and_then(|rest| rest.first_chunk());
                bytes.map(|bytes| u64::from_ne_bytes(*bytes))
            };
            time(value) > time(have)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_value_counts() {
        let entry = |time: u64, rest: u8| [&[9, 9][..], &time.to_ne_bytes(), &[rest]].concat();
        let (old, same, new) = (entry(1, 1), entry(1, 2), entry(2, 3));
        assert!(counts(&new, &old, Clash::Newer(2)));
        assert!(!counts(&old, &new, Clash::Newer(2)) && !counts(&same, &old, Clash::Newer(2)));
        assert!(counts(&old, &new, Clash::Source) && !counts(&old, &old, Clash::Source));
        assert!(!counts(&new, &old, Clash::Target));
    }
}
