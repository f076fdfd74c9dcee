//! The file: a header with magic, version, checksum and length, then [`Kept`] as postcard has it. It is replaced
//! as a whole, and refused as a whole.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{Identity, Kept};

const MAGIC: [u8; 8] = *b"fairlead";

/// What is in [`Kept`], and in which order; a test tells when it has to be raised.
const VERSION: u32 = 2;

/// Magic, version, checksum of what follows the header, length of that; numbers are little-endian.
const HEADER: usize = 8 + 4 + 4 + 8;

/// More than this is neither written nor read. 10,000 Services with 100,000 endpoints take 4 MiB.
pub const LIMIT: u64 = 64 << 20;

/// A file that is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it is no file")]
    NoFile,
    #[error("it has {0} bytes, more than {LIMIT}")]
    TooLarge(u64),
    #[error("nothing of Fairlead's is in it")]
    NotOurs,
    #[error("it has version {0} of the format, and this Fairlead knows {VERSION}")]
    Version(u32),
    #[error("it is damaged")]
    Damaged,
    #[error("it is of node {0:?}")]
    OtherNode(String),
    #[error("it is of a cluster with another certificate authority")]
    OtherCluster,
}

/// The file as bytes.
pub fn encode(kept: &Kept) -> Result<Vec<u8>, postcard::Error> {
    let mut bytes = postcard::to_extend(kept, vec![0; HEADER])?;
    let (header, payload) = bytes.split_at_mut(HEADER);
    let sum = crc32fast::hash(payload).to_le_bytes();
    let len = (payload.len() as u64).to_le_bytes();
    let fields = [&MAGIC[..], &VERSION.to_le_bytes(), &sum, &len].concat();
    header.copy_from_slice(&fields);
    Ok(bytes)
}

/// What [`encode`] was given.
pub fn decode(bytes: &[u8]) -> Result<Kept, Error> {
    let rest = bytes.strip_prefix(&MAGIC).ok_or(Error::NotOurs)?;
    let (version, rest) = rest.split_first_chunk().ok_or(Error::Damaged)?;
    let version = u32::from_le_bytes(*version);
    if version != VERSION {
        return Err(Error::Version(version));
    }
    let (sum, rest) = rest.split_first_chunk().ok_or(Error::Damaged)?;
    let (len, payload) = rest.split_first_chunk().ok_or(Error::Damaged)?;
    if u64::from_le_bytes(*len) != payload.len() as u64
        || u32::from_le_bytes(*sum) != crc32fast::hash(payload)
    {
        return Err(Error::Damaged);
    }
    match postcard::take_from_bytes(payload) {
        Ok((kept, [])) => Ok(kept),
        Ok(_) | Err(_) => Err(Error::Damaged),
    }
}

/// What was kept for `identity`; none: nothing was.
pub fn read(path: &Path, identity: &Identity) -> Result<Option<Kept>, Error> {
    let Some(kept) = read_any(path)? else { return Ok(None) };
    if kept.identity.node != identity.node {
        return Err(Error::OtherNode(kept.identity.node));
    }
    if kept.identity.cluster != identity.cluster {
        return Err(Error::OtherCluster);
    }
    Ok(Some(kept))
}

/// What was kept, for whomever; none: nothing was.
pub fn read_any(path: &Path) -> Result<Option<Kept>, Error> {
    let meta = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        meta => meta?,
    };
    if !meta.is_file() {
        return Err(Error::NoFile);
    }
    if meta.len() > LIMIT {
        return Err(Error::TooLarge(meta.len()));
    }
    let mut bytes = vec![];
    File::open(path)?.take(LIMIT).read_to_end(&mut bytes)?;
    decode(&bytes).map(Some)
}

/// Replaces the file. Whoever reads it, also after the power has failed, finds the old or the new one.
pub fn write(path: &Path, kept: &Kept) -> io::Result<()> {
    let bytes = encode(kept).map_err(io::Error::other)?;
    if bytes.len() as u64 > LIMIT {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {LIMIT} bytes")));
    }
    let dir = directory(path);
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let new = unfinished(path);
    let replaced = replace(path, &new, &bytes);
    if replaced.is_err() {
        // It may not be there.
        let _ = fs::remove_file(&new);
    }
    replaced
}

fn replace(path: &Path, new: &Path, bytes: &[u8]) -> io::Result<()> {
    remove_file(new)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(new, path)?;
    File::open(directory(path))?.sync_all()
}

/// Removes the file and what was left of writing it, and the directory if it is ours and empty. `true`: it was there.
pub fn remove(path: &Path) -> io::Result<bool> {
    remove_file(&unfinished(path))?;
    let removed = remove_file(path)?;
    if directory(path) == Path::new(super::DIR) {
        // Other agents may have theirs there, and it may be mounted.
        let _ = fs::remove_dir(super::DIR);
    }
    Ok(removed)
}

fn remove_file(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn unfinished(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".new");
    name.into()
}

#[cfg(test)]
mod tests;
