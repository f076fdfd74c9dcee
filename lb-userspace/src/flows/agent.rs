//! The agent decides and removes, for kernels that do not take the programs.

use std::io;
use std::os::fd::AsFd;

use aya::Pod;
use aya::maps::{HashMap, IterableMap, MapData, MapError as AyaError};
use lb_common::abi::{Flow, FlowKey};
use lb_common::flow::{End, State, is_reply, reverse_key};
use lb_common::tables::FlowTable;

use super::{Found, SLICE, Walk, failed};
use crate::datapath::{Datapath, MapError, OpenError, Timeouts, typed};
use crate::inspect::monotonic_nanoseconds;
use crate::sys::bpf::{self, Cursor};

/// One table.
pub(super) struct Table<A> {
    name: &'static str,
    kind: FlowTable,
    map: HashMap<MapData, FlowKey<A>, Flow<A>>,
    timeouts: Timeouts,
    cursor: Option<Cursor>,
}

impl<A: Copy> Walk for Table<A>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    fn slice(&mut self, found: &mut Found<'_>) -> Result<bool, MapError> {
        let fd = self.map.map().fd().as_fd();
        let (slice, next) = bpf::map_lookup_batch::<FlowKey<A>, Flow<A>>(fd, self.cursor, SLICE)
            .map_err(|error| failed(self.name, &error))?;
        self.cursor = next;
        let now = monotonic_nanoseconds();
        for (key, flow) in slice {
            let state = State::of(self.kind, key.proto, &flow);
            if self.is_over(now, &key, &flow)
                && let Some(removed) = self.remove(&key)?
            {
                found.swept(state, removed);
            } else {
                found.stay(state, is_reply(&flow), 1);
            }
        }
        Ok(next.is_some())
    }

    fn restart(&mut self) {
        self.cursor = None;
    }
}

impl<A: Copy> Table<A>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    pub(super) fn open(datapath: &Datapath, name: &'static str, kind: FlowTable) -> Result<Self, OpenError> {
        let map = typed(name, |spec| datapath.map_data(spec))?;
        Ok(Self { name, kind, map, timeouts: datapath.options().timeouts, cursor: None })
    }

    fn is_over(&self, now: u64, key: &FlowKey<A>, flow: &Flow<A>) -> bool {
        let state = State::of(self.kind, key.proto, flow);
        state.is_over(now.saturating_sub(flow.last_seen), self.timeouts.of(state), End::Sweep)
    }

    /// Removes both halves of a flow, unless one of them lives: a packet may have come since they were read. How many
    /// entries that were; `None`: it lives.
    fn remove(&mut self, key: &FlowKey<A>) -> Result<Option<u64>, MapError> {
        let now = monotonic_nanoseconds();
        let Some(flow) = self.get(key)? else { return Ok(Some(0)) };
        let other_key = reverse_key(key, &flow);
        let other = self.get(&other_key)?;
        let lives = |key: &FlowKey<A>, flow: &Flow<A>| !self.is_over(now, key, flow);
        if lives(key, &flow) || other.is_some_and(|other| lives(&other_key, &other)) {
            return Ok(None);
        }
        let mut removed = 0;
        for key in [key, &other_key] {
            match self.map.remove(key) {
                Ok(()) => removed += 1,
                Err(error) if is_absence(&error) => {}
                Err(error) => return Err(failed(self.name, &error)),
            }
        }
        Ok(Some(removed))
    }

    fn get(&self, key: &FlowKey<A>) -> Result<Option<Flow<A>>, MapError> {
        match self.map.get(key, 0) {
            Ok(flow) => Ok(Some(flow)),
            Err(error) if is_absence(&error) => Ok(None),
            Err(error) => Err(failed(self.name, &error)),
        }
    }
}

/// Somebody else has removed it: the programs, or the LRU.
fn is_absence(error: &AyaError) -> bool {
    match error {
        AyaError::KeyNotFound | AyaError::ElementNotFound => true,
        AyaError::SyscallError(error) => error.io_error.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}
