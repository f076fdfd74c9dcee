//! Entries of maps, one by one and in batches, of types that are known and of any others.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;

use aya::Pod;

use super::{Command, bpf, fd_number, length, object_info};

/// What the kernel says about a map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapInfo {
    pub id: u32,
    pub kind: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub flags: u32,
}

pub fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    /// The beginning of `struct bpf_map_info`.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Raw {
        kind: u32,
        id: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        map_flags: u32,
    }
    // SAFETY: all integers; every bit pattern is valid.
    let raw: Raw = unsafe { object_info(map)? };
    Ok(MapInfo {
        id: raw.id,
        kind: raw.kind,
        key_size: raw.key_size,
        value_size: raw.value_size,
        max_entries: raw.max_entries,
        flags: raw.map_flags,
    })
}

/// How far a batch came before it failed.
#[derive(Debug)]
pub struct BatchError {
    /// Entries that were written.
    pub done: usize,
    pub source: io::Error,
}

/// Writes entries in their order (`BPF_MAP_UPDATE_BATCH`, 5.6).
pub fn map_update_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> Result<(), BatchError> {
    assert_eq!(keys.len(), values.len(), "a batch has one value for each key");
    if keys.is_empty() {
        return Ok(());
    }
    let mut attr = BatchAttr {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: length(keys),
        map_fd: fd_number(map),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: both slices outlive the call and hold `count` entries; the callers' types have the sizes
    // of the map, which was checked when it was opened.
    match unsafe { bpf(Command::MapUpdateBatch, &mut attr) } {
        Ok(_) => Ok(()),
        Err(source) => {
            // The kernel leaves `count` alone when it refuses the command as a whole.
            let refused = attr.count as usize >= keys.len();
            Err(BatchError { done: if refused { 0 } else { attr.count as usize }, source })
        }
    }
}

/// Writes one entry.
pub fn map_update<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attr = EntryAttr::new(map, std::ptr::from_ref(key) as u64, std::ptr::from_ref(value) as u64, 0);
    // SAFETY: key and value outlive the call; the callers' types have the sizes of the map, which was
    // checked when it was opened.
    unsafe { bpf(Command::MapUpdateElem, &mut attr) }.map(drop)
}

/// `BPF_NOEXIST` for [`map_update_bytes`].
pub const NO_EXIST: u64 = 1;

/// Entries of a map whose layout is none of ours: keys and values one behind the other, as the kernel wants them.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct RawEntries {
    pub keys: Vec<u8>,
    pub values: Vec<u8>,
}

/// As [`map_lookup_batch`], for keys and values of any size; not for maps with a value per CPU.
pub fn map_lookup_batch_bytes(
    map: BorrowedFd<'_>,
    info: &MapInfo,
    cursor: Option<Cursor>,
    count: usize,
) -> io::Result<(RawEntries, Option<Cursor>)> {
    let (key_size, value_size) = (info.key_size as usize, info.value_size as usize);
    assert!(key_size <= size_of::<Cursor>(), "keys are at most 64 bytes");
    let mut room = count.max(1);
    loop {
        let mut entries = RawEntries { keys: vec![0; room * key_size], values: vec![0; room * value_size] };
        let mut next = Cursor([0; 64]);
        let mut attr = BatchAttr {
            in_batch: cursor.as_ref().map_or(0, |cursor| cursor.0.as_ptr() as u64),
            out_batch: next.0.as_mut_ptr() as u64,
            keys: entries.keys.as_mut_ptr() as u64,
            values: entries.values.as_mut_ptr() as u64,
            count: u32::try_from(room).unwrap_or(u32::MAX),
            map_fd: fd_number(map),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: both buffers have room for `count` entries of the sizes that the kernel tells of this map, both
        // cursors for a key; all outlive the call.
        let more = match unsafe { bpf(Command::MapLookupBatch, &mut attr) } {
            Ok(_) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                room *= 2;
                continue;
            }
            Err(error) => return Err(error),
        };
        entries.keys.truncate(attr.count as usize * key_size);
        entries.values.truncate(attr.count as usize * value_size);
        return Ok((entries, more.then_some(next)));
    }
}

/// `union bpf_attr` of the commands for one entry.
#[repr(C)]
struct EntryAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    /// Of `BPF_MAP_GET_NEXT_KEY`: room for the next key.
    value: u64,
    flags: u64,
}

impl EntryAttr {
    fn new(map: BorrowedFd<'_>, key: u64, value: u64, flags: u64) -> Self {
        Self { map_fd: fd_number(map), pad: 0, key, value, flags }
    }
}

/// The key after `key`, in the order of the map; without one, the first.
pub fn map_next_key_bytes(
    map: BorrowedFd<'_>,
    info: &MapInfo,
    key: Option<&[u8]>,
) -> io::Result<Option<Vec<u8>>> {
    assert!(key.is_none_or(|key| key.len() == info.key_size as usize), "a key has the map's size");
    let mut next = vec![0; info.key_size as usize];
    let mut attr = EntryAttr::new(map, key.map_or(0, |key| key.as_ptr() as u64), next.as_mut_ptr() as u64, 0);
    // SAFETY: both are keys of the size that the kernel tells of this map, and outlive the call.
    match unsafe { bpf(Command::MapGetNextKey, &mut attr) } {
        Ok(_) => Ok(Some(next)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The value of a key; not for maps with a value per CPU.
pub fn map_lookup_bytes(map: BorrowedFd<'_>, info: &MapInfo, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
    assert_eq!(key.len(), info.key_size as usize, "a key has the map's size");
    let mut value = vec![0; info.value_size as usize];
    let mut attr = EntryAttr::new(map, key.as_ptr() as u64, value.as_mut_ptr() as u64, 0);
    // SAFETY: key and value have the sizes that the kernel tells of this map, and outlive the call.
    match unsafe { bpf(Command::MapLookupElem, &mut attr) } {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes one entry of a map of any layout; not for maps with a value per CPU.
pub fn map_update_bytes(
    map: BorrowedFd<'_>,
    info: &MapInfo,
    key: &[u8],
    value: &[u8],
    flags: u64,
) -> io::Result<()> {
    let sizes = (info.key_size as usize, info.value_size as usize);
    assert_eq!((key.len(), value.len()), sizes, "an entry has the map's sizes");
    let mut attr = EntryAttr::new(map, key.as_ptr() as u64, value.as_ptr() as u64, flags);
    // SAFETY: key and value have the sizes that the kernel tells of this map, and outlive the call.
    unsafe { bpf(Command::MapUpdateElem, &mut attr) }.map(drop)
}

/// The key after the one that `cursor` stands at, and a cursor there; `None`: there are no more. If the key at the cursor
/// is gone, the walk begins again.
pub fn map_next_key<K: Pod>(map: BorrowedFd<'_>, cursor: Option<Cursor>) -> io::Result<Option<(K, Cursor)>> {
    assert!(size_of::<K>() <= size_of::<Cursor>(), "keys are at most 64 bytes");
    let mut next = Cursor([0; 64]);
    let mut attr = EntryAttr::new(
        map,
        cursor.as_ref().map_or(0, |cursor| cursor.0.as_ptr() as u64),
        next.0.as_mut_ptr() as u64,
        0,
    );
    // SAFETY: both cursors have room for a key (checked above) and outlive the call.
    match unsafe { bpf(Command::MapGetNextKey, &mut attr) } {
        Ok(_) => {
            // SAFETY: the kernel has written a key there; every bit pattern of a `Pod` is valid.
            let key = unsafe { next.0.as_ptr().cast::<K>().read_unaligned() };
            Ok(Some((key, next)))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The value of an array's first entry. Not of arrays per CPU, whose values are larger than they say.
pub fn map_lookup_first(map: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let info = map_info(map)?;
    if info.key_size as usize != size_of::<u32>() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    map_lookup_bytes(map, &info, &0_u32.to_ne_bytes())?.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Where a walk over a map stands; opaque, at most the size of a key.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
pub struct Cursor([u8; 64]);

impl Cursor {
    /// For arrays: the walk goes on after `index`.
    pub fn after(index: u32) -> Self {
        let mut bytes = [0; 64];
        bytes[..4].copy_from_slice(&index.to_ne_bytes());
        Self(bytes)
    }
}

/// Reads up to `count` entries from where `cursor` stands; fewer than that and no cursor at the end
/// (`BPF_MAP_LOOKUP_BATCH`, 5.6).
///
/// For hash maps the kernel answers whole buckets only; this retries with more room.
#[expect(clippy::type_complexity, reason = "entries and where to go on")]
pub fn map_lookup_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    cursor: Option<Cursor>,
    count: usize,
) -> io::Result<(Vec<(K, V)>, Option<Cursor>)> {
    assert!(size_of::<K>() <= size_of::<Cursor>(), "keys are at most 64 bytes");
    let mut room = count.max(1);
    loop {
        let mut keys: Vec<MaybeUninit<K>> = vec![MaybeUninit::zeroed(); room];
        let mut values: Vec<MaybeUninit<V>> = vec![MaybeUninit::zeroed(); room];
        let mut next = Cursor([0; 64]);
        let mut attr = BatchAttr {
            in_batch: cursor.as_ref().map_or(0, |cursor| cursor.0.as_ptr() as u64),
            out_batch: next.0.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: length(&keys),
            map_fd: fd_number(map),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: both vectors have room for `count` entries of the map's sizes (checked when it was
        // opened), both cursors for a key; all outlive the call.
        let result = unsafe { bpf(Command::MapLookupBatch, &mut attr) };
        let more = match result {
            Ok(_) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                room *= 2;
                continue;
            }
            Err(error) => return Err(error),
        };
        let entries = keys
            .into_iter()
            .zip(values)
            .take(attr.count as usize)
            // SAFETY: zeroed above, then written by the kernel; every bit pattern of a `Pod` is valid.
            .map(|(key, value)| unsafe { (key.assume_init(), value.assume_init()) })
            .collect();
        return Ok((entries, more.then_some(next)));
    }
}

/// `union bpf_attr` of `BPF_MAP_*_BATCH`.
#[repr(C)]
#[derive(Debug)]
pub struct BatchAttr {
    pub in_batch: u64,
    pub out_batch: u64,
    pub keys: u64,
    pub values: u64,
    pub count: u32,
    pub map_fd: u32,
    pub elem_flags: u64,
    pub flags: u64,
}
