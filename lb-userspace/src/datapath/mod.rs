//! The maps and programs in the kernel, and the face they show to the rest of the agent.

pub mod fake;

use crate::entries::{Limits, Op, Snapshot};

/// The service maps as `reconcile` sees them: the kernel's, or [`fake::FakeMaps`].
pub trait Maps {
    /// How many entries the maps take.
    fn limits(&self) -> Limits;

    /// Everything the maps hold.
    fn read(&mut self) -> Result<Snapshot, MapError>;

    /// Carries out `ops` one after the other and stops at the first that fails.
    fn apply(&mut self, ops: &[Op]) -> Result<(), ApplyError>;
}

/// A map refused an operation.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapError {
    /// The kernel said `E2BIG`: no room for another entry.
    #[error("map {map} is full ({capacity} entries)")]
    Full { map: String, capacity: u32 },
    /// Anything else.
    #[error("map {map}: {reason}")]
    Failed { map: String, reason: String },
}

/// [`Maps::apply`] came to `ops[done]` and no further.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("map operation {done}: {source}")]
pub struct ApplyError {
    /// Operations carried out; the index of the one that failed.
    pub done: usize,
    pub source: MapError,
}
