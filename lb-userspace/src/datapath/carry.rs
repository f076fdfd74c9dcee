//! Copying what maps hold into others, whatever the layouts and sizes of both, while packets go through them.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lb_common::maps::MapKind;
use nix::time::{ClockId, clock_gettime};

use super::error::OpenError;
use crate::sys::bpf::{self, MapInfo};

/// Entries read with one system call.
const BATCH: usize = 4096;

/// Passes over the flows before the switch, at most; and how short one is that leaves little to the next.
const PASSES: usize = 4;
const SHORT_PASS: Duration = Duration::from_millis(5);

/// Between two looks at how far the carrying is.
const GLANCE: Duration = Duration::from_micros(100);
/// Passes of one who makes no more.
const ENDED: u64 = u64::MAX / 2;

/// An entry may come so long after the time that it bears, ns: the datapath's clock may be coarse.
const LATE: u64 = 100_000_000;

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

    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()?, info: self.info })
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

/// The way from one map to another. Both may be in use: what changes meanwhile is for the next [`Way::pass`].
#[derive(Debug)]
pub(super) struct Way {
    map: &'static str,
    from: Table,
    to: Table,
    convert: Convert,
    last_seen: Option<LastSeen>,
    /// What has no time is known by its hash.
    seen: HashSet<u64>,
    /// What was last used before has been carried (`CLOCK_MONOTONIC`, ns).
    since: u64,
}

/// Where the values of both maps have the time of their last use: `u64`, `CLOCK_MONOTONIC`, ns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LastSeen {
    pub from: usize,
    pub to: usize,
}

impl LastSeen {
    /// It is at the same place in both.
    pub const fn at(offset: usize) -> Self {
        Self { from: offset, to: offset }
    }
}

/// Whose value counts where both maps have a key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Clash {
    Source,
    Target,
    /// The one with the larger `u64` at this offset of the target's values, by so much at least.
    Newer(usize, u64),
}

impl Way {
    pub(super) fn new(
        map: &'static str,
        from: Table,
        to: BorrowedFd<'_>,
        convert: Convert,
        last_seen: Option<LastSeen>,
    ) -> Result<Self, OpenError> {
        let to = to.try_clone_to_owned().and_then(Table::new);
        let to = to.map_err(|source| OpenError::Carry { map, source })?;
        Ok(Self { map, from, to, convert, last_seen, seen: HashSet::new(), since: 0 })
    }

    /// Programs write to it; all other maps stand still while no agent runs.
    fn is_by_programs(&self) -> bool {
        self.from.is(MapKind::LruHash)
    }

    /// Copies what is new since the last pass, as far as the target lacks it or has it with a value that counts less.
    /// Answers how many entries it wrote. `in_use`: programs write to the target, too.
    fn pass(&mut self, in_use: bool) -> io::Result<u64> {
        let since = mem::replace(&mut self.since, now().saturating_sub(LATE));
        let Self { from, to, convert, last_seen, seen, .. } = self;
        let clash = match last_seen {
            // Where the new programs have translated a first packet, old ones behind them take it for the first of another
            // flow. What both have noted at one time is what the new ones know.
            Some(at) => Clash::Newer(at.to, if in_use { LATE } else { 1 }),
            None if in_use => Clash::Target,
            None => Clash::Source,
        };
        // Values of 0 in arrays are nobody's, and so is what has no place any more.
        let nobodys = |key: &[u8], value: &[u8]| {
            let beyond = index(key) >= to.info.max_entries;
            from.is(MapKind::Array) && (beyond || value.iter().all(|byte| *byte == 0))
        };
        let mut written = 0;
        let mut put = |key: &[u8], value: &[u8]| {
            written += u64::from(write(to, convert(key, value), clash)?);
            Ok(())
        };
        match last_seen {
            Some(at) if to.info.max_entries < from.info.max_entries => {
                let lately = Lately::of(from, at.from, since)?;
                lately.entries(room(to)).try_for_each(|(key, value)| put(key, value))?;
            }
            Some(at) => from.each(|key, value| {
                if time(value, at.from).is_none_or(|time| time >= since) { put(key, value) } else { Ok(()) }
            })?,
            None => from.each(|key, value| {
                let mut hasher = DefaultHasher::new();
                (key, value).hash(&mut hasher);
                if nobodys(key, value) || !seen.insert(hasher.finish()) { Ok(()) } else { put(key, value) }
            })?,
        }
        Ok(written)
    }
}

/// Every way from old maps to new ones.
#[derive(Debug, Default)]
pub(super) struct Carrier {
    /// Where connections begin comes first: whoever moves on meanwhile is met there, or later in the other table.
    pending: Vec<Way>,
    others: Vec<Way>,
}

impl Carrier {
    pub(super) fn new(ways: Vec<Way>) -> Self {
        let (pending, others) = ways.into_iter().partition(|way| way.map.starts_with("PENDING"));
        Self { pending, others }
    }

    /// Fills maps that are not in use yet, again and again as long as programs write much to the old ones. Answers how
    /// many entries it wrote.
    pub(super) fn fill(&mut self) -> Result<u64, OpenError> {
        let mut written = carry(self.pending.iter_mut().chain(&mut self.others), false)?;
        self.others.retain(Way::is_by_programs);
        for _ in 1..PASSES {
            let begun = Instant::now();
            written += carry(self.pending.iter_mut().chain(&mut self.others), false)?;
            if begun.elapsed() < SHORT_PASS {
                break;
            }
        }
        Ok(written)
    }

    /// Goes on carrying while `switch` brings the new maps into use. What it is given waits until all that was in the old
    /// maps is in the new ones.
    pub(super) fn during(
        &mut self,
        switch: impl FnOnce(&dyn Fn()) -> Result<(), OpenError>,
    ) -> Result<u64, OpenError> {
        let switched = &AtomicBool::new(false);
        let keep_on = |ways: &mut [Way], passes: &AtomicU64| {
            let mut written = Ok(0);
            while written.is_ok() && !switched.load(Ordering::Relaxed) {
                let more = carry(ways.iter_mut(), true);
                written = written.and_then(|written: u64| Ok(written + more?));
                passes.fetch_add(1, Ordering::Relaxed);
            }
            passes.store(ENDED, Ordering::Relaxed);
            written
        };
        let passes = &[AtomicU64::new(0), AtomicU64::new(0)];
        let wait = || {
            for passes in passes {
                // The pass that is on has seen a part already.
                let enough = passes.load(Ordering::Relaxed) + 2;
                while passes.load(Ordering::Relaxed) < enough.min(ENDED) {
                    thread::sleep(GLANCE);
                }
            }
        };
        thread::scope(|scope| {
            // A connection begins in a small table, which is read many times while a large one is read once.
            let mut threads = vec![];
            for (ways, passes) in [&mut self.pending, &mut self.others].into_iter().zip(passes) {
                threads.push(scope.spawn(move || keep_on(ways, passes)));
            }
            let result = switch(&wait);
            switched.store(true, Ordering::Relaxed);
            let carried = threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            let carried: Vec<_> = carried.collect();
            result?;
            carried.into_iter().sum()
        })
    }

    /// Carries what programs wrote to the old maps until none of them did any more.
    pub(super) fn settle(&mut self) -> Result<u64, OpenError> {
        carry(self.pending.iter_mut().chain(&mut self.others), true)
    }
}

fn carry<'a>(ways: impl Iterator<Item = &'a mut Way>, in_use: bool) -> Result<u64, OpenError> {
    let passes = ways.map(|way| way.pass(in_use).map_err(|source| OpenError::Carry { map: way.map, source }));
    passes.sum()
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
        Clash::Newer(at, by) => time(value, at) >= time(have, at).map(|time| time.saturating_add(by)),
    }
}

/// Flows that a table takes without losing any: the kernel's LRU keeps some entries free for each CPU.
fn room(table: &Table) -> usize {
    table.info.max_entries as usize / 4 * 3
}

/// Flows by the time of their last use: what an LRU is given first, it takes first.
struct Lately<'a> {
    table: &'a Table,
    keys: Vec<u8>,
    values: Vec<u8>,
    /// Time and place of each, the oldest first.
    order: Vec<(u64, usize)>,
}

impl<'a> Lately<'a> {
    /// Those in use at or after `since`; their values have the time at this offset.
    fn of(table: &'a Table, at: usize, since: u64) -> io::Result<Self> {
        let mut flows = Self { table, keys: vec![], values: vec![], order: vec![] };
        table.each(|key, value| {
            let time = time(value, at).unwrap_or(u64::MAX);
            if time >= since {
                flows.order.push((time, flows.order.len()));
                flows.keys.extend_from_slice(key);
                flows.values.extend_from_slice(value);
            }
            Ok(())
        })?;
        flows.order.sort_unstable();
        Ok(flows)
    }

    /// The last `room` of them.
    fn entries(&self, room: usize) -> impl Iterator<Item = (&[u8], &[u8])> {
        let (key, value) = (self.table.info.key_size as usize, self.table.info.value_size as usize);
        self.order
            .iter()
            .skip(self.order.len().saturating_sub(room))
            .map(move |(_, at)| (&self.keys[at * key..][..key], &self.values[at * value..][..value]))
    }
}

/// A time; `None`: the value ends before.
fn time(value: &[u8], at: usize) -> Option<u64> {
    value.get(at..)?.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes))
}

/// The index that is an array's key.
pub(super) fn index(key: &[u8]) -> u32 {
    key.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

/// `CLOCK_MONOTONIC`, ns.
fn now() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| {
        u64::try_from(now.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap_or(0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_value_counts() {
        let entry = |time: u64, rest: u8| [&[9, 9][..], &time.to_ne_bytes(), &[rest]].concat();
        let (old, same, new) = (entry(1, 1), entry(1, 2), entry(2, 3));
        assert!(counts(&new, &old, Clash::Newer(2, 1)) && !counts(&new, &old, Clash::Newer(2, 2)));
        assert!(!counts(&old, &new, Clash::Newer(2, 1)) && !counts(&same, &old, Clash::Newer(2, 1)));
        assert!(counts(&old, &new, Clash::Source) && !counts(&old, &old, Clash::Source));
        assert!(!counts(&new, &old, Clash::Target));
    }
}
