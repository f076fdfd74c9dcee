//! Garbage collection: what a look at one entry of a flow table comes to.
//!
//! The kernel walks over the table and runs the program once for each entry; the program tells the agent in one byte what it
//! found.

use core::cell::Cell;

use crate::abi::{Flow, FlowKey};
use crate::family::Family;
use crate::flow::{self, End, State, is_reply, reverse_key};
use crate::tables::{FlowTable, Tables};

/// What became of one entry.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It lives. One of its two entries stands for a flow: this one.
    Request = 0,
    /// It lives, and is the other.
    Reply = 1,
    /// It was over, and is gone already.
    Gone = 2,
    /// It was over and alone.
    Removed = 3,
    /// It was over and went with its other half.
    BothRemoved = 4,
}

impl Fate {
    const ALL: [Self; 5] = [Self::Request, Self::Reply, Self::Gone, Self::Removed, Self::BothRemoved];
}

/// What a walk finds at one entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Finding {
    pub state: State,
    pub fate: Fate,
}

impl Finding {
    /// What the program has written; `None`: it never writes that.
    pub fn from_byte(byte: u8) -> Option<Self> {
        let fate = *Fate::ALL.get(usize::from(byte >> STATE_BITS))?;
        Some(Self { state: *State::ALL.get(usize::from(byte & STATE_MASK))?, fate })
    }
}

const STATE_BITS: u8 = 3;
const STATE_MASK: u8 = (1 << STATE_BITS) - 1;
const _: () = assert!(State::ALL.len() == 1 << STATE_BITS);

/// Looks at one entry of a flow table, as the walk has met it, and removes both halves of a flow that is over; the
/// [`Finding`], as a byte. `now` (`CLOCK_MONOTONIC`, ns) is told: iterators do not have the clock of other programs.
///
/// What seems to be over is looked at once more, as is its other half: a packet may have come to either. What is left is a
/// packet on another CPU between this second look and the removal, some hundred nanoseconds: it goes where its flow says, and
/// the next one begins a flow as after a restart. Its flow had been silent for its whole time before.
///
/// Nothing is looked up that lives: to the kernel's LRU that would be a use of it, and a walk makes no use of anything.
#[inline(always)]
pub fn sweep<F: Family, T: Tables<F>>(
    tables: &T,
    table: FlowTable,
    key: &FlowKey<F::Addr>,
    seen: &Cell<Flow<F::Addr>>,
    now: u64,
) -> u8 {
    let fate = fate::<F, T>(tables, table, key, seen, now);
    State::number(table, key.proto, seen.get().flags) | (fate as u8) << STATE_BITS
}

#[inline(always)]
fn fate<F: Family, T: Tables<F>>(
    tables: &T,
    table: FlowTable,
    key: &FlowKey<F::Addr>,
    seen: &Cell<Flow<F::Addr>>,
    now: u64,
) -> Fate {
    let is_over = |entry: &Cell<Flow<F::Addr>>| {
        let flow = entry.get();
        let state = State::number(table, key.proto, flow.flags);
        flow::is_over(state, now.saturating_sub(flow.last_seen), tables.timeout(state), End::Sweep)
    };
    let lives = if is_reply(&seen.get()) { Fate::Reply } else { Fate::Request };
    if !is_over(seen) {
        return lives;
    }
    let Some(entry) = tables.flow(table, key) else { return Fate::Gone };
    let other_key = reverse_key(key, &entry.get());
    let other = tables.flow(table, &other_key);
    if !is_over(&entry) || other.as_ref().is_some_and(|other| !is_over(other)) {
        return lives;
    }
    tables.remove_flow(table, key);
    if other.is_none() {
        return Fate::Removed;
    }
    tables.remove_flow(table, &other_key);
    Fate::BothRemoved
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Addr4;
    use crate::abi::{Carry, Side};
    use crate::family::V4;
    use crate::flow::reverse_value;
    use crate::host::HostTables;

    const TABLE: FlowTable = FlowTable::Established;
    const UDP: u8 = 17;

    /// Sweeps the first half of a flow: when it was seen, as the walk met it; when each half was seen by now, if it is there
    /// still. What became of it, and how many entries are left.
    fn swept(met: u64, halves: [Option<u64>; 2]) -> (Fate, usize) {
        const NOW: u64 = 1_000_000_000_000;
        let addr = |last| Addr4 { octets: [10, 0, 0, last] };
        let side = Side::NicIn as u8;
        let key = FlowKey { src: addr(1), dst: addr(2), src_port: 9, dst_port: 80, proto: UDP, side, pad: 0 };
        let flow = Flow { src: addr(1), dst: addr(3), carry: Carry::Stack as u8, ..Flow::default() };
        let tables = HostTables::<V4>::default();
        let entries = [(key, flow), (reverse_key(&key, &flow), reverse_value(&key, &flow))];
        for ((key, flow), idle) in entries.into_iter().zip(halves) {
            if let Some(idle) = idle {
                let entry = Cell::new(Flow { last_seen: NOW - idle, ..flow });
                tables.put_flow(TABLE, &key, &entry).unwrap();
            }
        }
        let seen = Cell::new(Flow { last_seen: NOW - met, ..flow });
        let finding = Finding::from_byte(sweep::<V4, _>(&tables, TABLE, &key, &seen, NOW)).unwrap();
        assert_eq!(finding.state, State::Answered);
        (finding.fate, tables.entries(TABLE).len())
    }

    #[test]
    fn both_halves_go_or_none_does() {
        let timeout = State::Answered.default_timeout();
        let over = timeout + 1;
        assert_eq!(swept(over, [Some(over), Some(over)]), (Fate::BothRemoved, 0));
        assert_eq!(swept(over, [Some(over), None]), (Fate::Removed, 0));
        assert_eq!(swept(over, [None, Some(over)]), (Fate::Gone, 1));
        assert_eq!(swept(timeout, [Some(timeout), Some(over)]), (Fate::Request, 2));
        // A packet came after the walk had met the entry, or the other way.
        assert_eq!(swept(over, [Some(0), Some(over)]), (Fate::Request, 2));
        assert_eq!(swept(over, [Some(over), Some(0)]), (Fate::Request, 2));
    }

    #[test]
    fn findings_survive_their_byte() {
        let mut known = 0;
        for byte in 0..=u8::MAX {
            let Some(finding) = Finding::from_byte(byte) else { continue };
            assert_eq!(finding.state as u8 | (finding.fate as u8) << STATE_BITS, byte);
            known += 1;
        }
        assert_eq!(known, State::ALL.len() * Fate::ALL.len());
    }
}
