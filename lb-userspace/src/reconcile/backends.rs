//! The backend ids of one family: who has which, and when one may be given to somebody else.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Instant;

use lb_common::abi::{backend_flags, backend_state};

use crate::entries::{Backend, BackendEntry, Family, Keep, Op, Protocol};

/// The backend ids of one family.
#[derive(Debug)]
pub(super) struct Backends {
    family: Family,
    limit: u32,
    /// By id; index 0 and ids never used are `None`.
    ids: Vec<Option<Record>>,
    by_backend: BTreeMap<Backend, u32>,
    /// Ids that were in use before and are free.
    free: BTreeSet<u32>,
    /// Found in the maps, in no window: whose they are shows when somebody asks for the address.
    orphans: BTreeMap<(SocketAddr, bool), Vec<u32>>,
    /// Backends that got an id (`true`) or lost it since somebody asked.
    changes: Vec<(Backend, u32, bool)>,
}

#[derive(Debug)]
struct Record {
    addr: SocketAddr,
    local: bool,
    /// None: free, or an orphan. There are many: address and place stand above already.
    protocol: Option<Protocol>,
    /// As the map has it.
    state: u8,
    generation: u32,
    /// Windows that name it.
    windows: u32,
    /// Services that do not choose it and let its flows go on.
    keep_flows: u32,
    /// Services that do not choose it and let its connections end.
    keep_connections: u32,
    retired: Option<Instant>,
}

impl Record {
    fn is_referenced(&self) -> bool {
        self.windows > 0 || self.keep_flows > 0 || self.keep_connections > 0
    }

    /// Whose it is.
    fn backend(&self) -> Option<Backend> {
        self.protocol.map(|protocol| Backend { addr: self.addr, protocol, local: self.local })
    }

    fn entry(&self) -> BackendEntry {
        BackendEntry {
            addr: self.addr,
            state: self.state,
            flags: if self.local { backend_flags::LOCAL } else { 0 },
            generation: self.generation,
        }
    }
}

/// What [`Backends::settle`] found.
pub(super) enum Settled {
    /// The map is right.
    Nothing,
    /// The map must change; the backend is in use.
    Write(Op),
    /// Nobody wants the backend any more: its id is free after the grace time.
    Retired(Option<Op>),
}

impl Backends {
    pub(super) fn new(family: Family, limit: u32) -> Self {
        Self {
            family,
            limit,
            ids: vec![None],
            by_backend: BTreeMap::new(),
            free: BTreeSet::new(),
            orphans: BTreeMap::new(),
            changes: Vec::new(),
        }
    }

    /// Takes over an entry of the map. `backend` is whose it is, as far as windows tell.
    pub(super) fn adopt(&mut self, id: u32, entry: &BackendEntry, backend: Option<Backend>) {
        if id == 0 || id >= self.limit {
            return;
        }
        let index = id as usize;
        if self.ids.len() <= index {
            self.ids.resize_with(index + 1, || None);
        }
        let local = entry.flags & backend_flags::LOCAL != 0;
        let backend = backend.filter(|b| !self.by_backend.contains_key(b));
        self.ids[index] = Some(Record {
            addr: entry.addr,
            local,
            protocol: backend.map(|backend| backend.protocol),
            state: entry.state,
            generation: entry.generation,
            windows: 0,
            keep_flows: 0,
            keep_connections: 0,
            retired: None,
        });
        if let Some(backend) = backend {
            self.come(backend, id);
        } else if entry.state == backend_state::UNUSED {
            self.free.insert(id);
        } else {
            self.orphans.entry((entry.addr, local)).or_default().push(id);
        }
    }

    /// Every backend with its id.
    pub(super) fn assigned(&self) -> impl Iterator<Item = (Backend, u32)> {
        self.by_backend.iter().map(|(backend, id)| (*backend, *id))
    }

    /// The id of a backend, if it has one.
    pub(super) fn id(&self, backend: &Backend) -> Option<u32> {
        self.by_backend.get(backend).copied()
    }

    /// Ids that can be given out.
    pub(super) fn available(&self) -> u32 {
        let never_used = self.limit.saturating_sub(u32::try_from(self.ids.len()).unwrap_or(u32::MAX));
        never_used + u32::try_from(self.free.len()).unwrap_or(u32::MAX)
    }

    /// Ids that are given out.
    pub(super) fn used(&self) -> u32 {
        // Index 0 is nobody's.
        self.limit.saturating_sub(1).saturating_sub(self.available())
    }

    /// The id of a backend; gives it one if it has none. Callers ask [`Self::available`] first.
    pub(super) fn assign(&mut self, backend: Backend) -> Option<u32> {
        if let Some(id) = self.by_backend.get(&backend) {
            return Some(*id);
        }
        if let Some(id) = self.adopt_orphan(&backend) {
            return Some(id);
        }
        let id = if let Some(id) = self.free.pop_first() {
            id
        } else {
            let id = u32::try_from(self.ids.len()).ok().filter(|id| *id < self.limit)?;
            self.ids.push(None);
            id
        };
        let generation = self.record(id).map_or(1, |old| old.generation.wrapping_add(1).max(1));
        self.ids[id as usize] = Some(Record {
            addr: backend.addr,
            local: backend.local,
            protocol: Some(backend.protocol),
            state: backend_state::UNUSED,
            generation,
            windows: 0,
            keep_flows: 0,
            keep_connections: 0,
            retired: None,
        });
        self.come(backend, id);
        Some(id)
    }

    /// The id that a backend without one has in the maps since before the start.
    pub(super) fn adopt_orphan(&mut self, backend: &Backend) -> Option<u32> {
        if self.by_backend.contains_key(backend) {
            return None;
        }
        let id = self.orphans.get_mut(&(backend.addr, backend.local))?.pop()?;
        self.record(id)?.protocol = Some(backend.protocol);
        self.come(*backend, id);
        Some(id)
    }

    /// One more window names this id.
    pub(super) fn enter_window(&mut self, id: u32) {
        if let Some(record) = self.record(id) {
            record.windows += 1;
        }
    }

    /// One window less names this id.
    pub(super) fn leave_window(&mut self, id: u32) {
        if let Some(record) = self.record(id) {
            record.windows -= 1;
        }
    }

    /// One more Service keeps flows of this id.
    pub(super) fn keep(&mut self, id: u32, keep: Keep) {
        if let Some(record) = self.record(id) {
            match keep {
                Keep::Flows => record.keep_flows += 1,
                Keep::Connections => record.keep_connections += 1,
            }
        }
    }

    /// One Service less keeps flows of this id.
    pub(super) fn let_go(&mut self, id: u32, keep: Keep) {
        if let Some(record) = self.record(id) {
            match keep {
                Keep::Flows => record.keep_flows -= 1,
                Keep::Connections => record.keep_connections -= 1,
            }
        }
    }

    /// Brings the map's state of `id` in line with who refers to it.
    pub(super) fn settle(&mut self, id: u32, now: Instant) -> Settled {
        let family = self.family;
        let Some(record) = self.record(id) else { return Settled::Nothing };
        let referenced = record.is_referenced();
        let want = if record.windows > 0 || record.keep_flows > 0 {
            backend_state::ACTIVE
        } else {
            backend_state::TERMINATING
        };
        let op = (record.state != want).then(|| {
            record.state = want;
            Op::SetBackend { family, id, entry: record.entry() }
        });
        if referenced {
            record.retired = None;
        } else if record.retired.is_none() {
            record.retired = Some(now);
            return Settled::Retired(op);
        }
        op.map_or(Settled::Nothing, Settled::Write)
    }

    /// The grace time of a backend that was retired at `retired` is over: frees its id, unless it came back
    /// to life meanwhile.
    pub(super) fn release(&mut self, id: u32, retired: Instant) -> Option<Op> {
        let family = self.family;
        let record = self.record(id)?;
        if record.retired != Some(retired) {
            return None;
        }
        record.retired = None;
        let backend = record.backend();
        record.protocol = None;
        record.state = backend_state::UNUSED;
        record.addr = SocketAddr::new(family.unspecified(), 0);
        record.local = false;
        let op = Op::SetBackend { family, id, entry: record.entry() };
        if let Some(backend) = backend {
            self.by_backend.remove(&backend);
            self.changes.push((backend, id, false));
        }
        self.free.insert(id);
        Some(op)
    }

    /// Nobody will ask for orphans any more. Answers every id whose state may not be what it should.
    pub(super) fn finish(&mut self) -> Vec<u32> {
        self.orphans.clear();
        let in_use = |record: &Record| record.state != backend_state::UNUSED;
        (0u32..).zip(&self.ids).filter(|(_, r)| r.as_ref().is_some_and(in_use)).map(|(id, _)| id).collect()
    }

    /// Backends that got an id (`true`) or lost it since this was asked last, in that order.
    pub(super) fn take_changes(&mut self) -> Vec<(Backend, u32, bool)> {
        std::mem::take(&mut self.changes)
    }

    /// What the map holds, from this id on.
    pub(super) fn from(&self, id: u32) -> impl Iterator<Item = Op> {
        let family = self.family;
        let known = (0u32..).zip(&self.ids).skip(id as usize);
        known.filter_map(move |(id, r)| Some(Op::SetBackend { family, id, entry: r.as_ref()?.entry() }))
    }

    /// Whether the id has been given out once.
    pub(super) fn has(&self, id: u32) -> bool {
        self.ids.get(id as usize).is_some_and(Option::is_some)
    }

    pub(super) fn limit(&self) -> u32 {
        self.limit
    }

    fn come(&mut self, backend: Backend, id: u32) {
        self.by_backend.insert(backend, id);
        self.changes.push((backend, id, true));
    }

    fn record(&mut self, id: u32) -> Option<&mut Record> {
        self.ids.get_mut(id as usize)?.as_mut()
    }
}
