//! Looks in turn at every entry of the maps that Services are kept in, a little at a time, for what somebody else
//! changed there: what is missing or altered is written again, what is nobody's is removed.
//!
//! The order of a round is that of every update: no entry is written before what it refers to has been looked at.

use std::time::{Duration, Instant};

use crate::datapath::{MapError, Maps, Position};
use crate::entries::{Op, Table};
use crate::reconcile::{Reconciler, Spot};

/// Entries that are looked at without a pause: a system call for each, of about a microsecond.
const SLICE: usize = 1024;

/// Between two slices, so that a round takes a few percent of one CPU at most.
pub(super) const PAUSE: Duration = Duration::from_millis(50);

/// One part of a round.
#[derive(Clone, Copy, Debug)]
enum Part {
    /// What should be there.
    Expected(Table),
    /// What is there.
    Found(Table),
}

const ROUND: [Part; 17] = [
    Part::Found(Table::Addresses),
    Part::Found(Table::Frontends),
    Part::Expected(Table::Backends),
    Part::Expected(Table::Places),
    Part::Expected(Table::Slots),
    Part::Expected(Table::Members),
    Part::Expected(Table::Sources),
    Part::Expected(Table::Names),
    Part::Expected(Table::Networks),
    Part::Expected(Table::Frontends),
    Part::Expected(Table::Addresses),
    Part::Found(Table::Backends),
    Part::Found(Table::Places),
    Part::Found(Table::Members),
    Part::Found(Table::Sources),
    Part::Found(Table::Names),
    Part::Found(Table::Networks),
];

/// Where a part stands.
#[derive(Clone, Copy, Debug)]
enum At {
    Beginning,
    Expected(Spot),
    Found(Position),
}

/// The rounds, one every period.
#[derive(Debug)]
pub(super) struct Check {
    period: Duration,
    due: Instant,
    began: Option<Instant>,
    /// Index in [`ROUND`].
    part: usize,
    at: At,
}

/// What one slice came to.
#[derive(Debug, Default)]
pub(super) struct Slice {
    /// What mends the maps, in this order.
    pub(super) ops: Vec<Op>,
    /// Entries looked at.
    pub(super) entries: usize,
    /// The round that ended with it took so long.
    pub(super) round: Option<Duration>,
}

impl Check {
    /// The first round begins after a period.
    pub(super) fn every(period: Duration, now: Instant) -> Self {
        Self { period, due: now + period, began: None, part: 0, at: At::Beginning }
    }

    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// The next slice.
    pub(super) fn slice(
        &mut self,
        reconciler: &Reconciler,
        maps: &mut impl Maps,
        now: Instant,
    ) -> Result<Slice, MapError> {
        let began = *self.began.get_or_insert(now);
        let mut slice = Slice::default();
        while let (Some(part), true) = (ROUND.get(self.part), slice.entries < SLICE) {
            let left = SLICE - slice.entries;
            let next = match *part {
                Part::Expected(table) => {
                    let after = if let At::Expected(spot) = self.at { Some(spot) } else { None };
                    let (writes, next) = reconciler.slice(table, after, left);
                    slice.entries += writes.len();
                    slice.ops.extend(maps.differing(writes)?);
                    next.map(At::Expected)
                }
                Part::Found(table) => {
                    let from = if let At::Found(position) = self.at { Some(position) } else { None };
                    let (removals, next) = maps.entries(table, from, left)?;
                    slice.entries += removals.len();
                    slice.ops.extend(removals.into_iter().filter(|removal| !reconciler.holds(removal)));
                    next.map(At::Found)
                }
            };
            let is_window = matches!(part, Part::Expected(Table::Slots));
            if next.is_none() {
                self.part += 1;
            }
            let more = next.is_some();
            self.at = next.unwrap_or(At::Beginning);
            // A window has many slots and counts once.
            if more && is_window {
                break;
            }
        }
        if self.part == ROUND.len() {
            slice.round = Some(now - began);
            *self = Self { due: (began + self.period).max(now + PAUSE), ..Self::every(self.period, now) };
        } else {
            self.due = now + PAUSE;
        }
        Ok(slice)
    }

    /// The maps are not what was thought: from the beginning.
    pub(super) fn begin_again(&mut self, now: Instant) {
        *self = Self::every(self.period, now);
    }
}
