//! The kernel decides and removes; the agent has it go on, and counts.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use lb_common::sweep::{Fate, Finding};

use super::{Found, SLICE, Walk, failed};
use crate::datapath::{MapError, Sweeps};

/// One table. The next read goes on where the last has ended; where a bucket of the table was left in its middle, the
/// entries that were removed from it are so many that are not met in this walk.
pub(super) struct Table {
    sweeps: Arc<Sweeps>,
    name: &'static str,
    walk: Option<File>,
}

impl Table {
    pub(super) fn new(sweeps: Arc<Sweeps>, name: &'static str) -> Self {
        Self { sweeps, name, walk: None }
    }
}

impl Walk for Table {
    fn slice(&mut self, found: &mut Found<'_>) -> Result<bool, MapError> {
        let mut bytes = [0; SLICE];
        let walk = match &mut self.walk {
            Some(walk) => walk,
            none => none.insert(self.sweeps.walk(self.name).map_err(|error| failed(self.name, &error))?),
        };
        // The kernel stops looking when what it has to say fills the read.
        let len = walk.read(&mut bytes).map_err(|error| failed(self.name, &error))?;
        let mut times = [0_u64; 256];
        for byte in bytes.iter().take(len) {
            times[usize::from(*byte)] += 1;
        }
        for (byte, times) in (0..=u8::MAX).zip(times).filter(|(_, times)| *times > 0) {
            let Some(Finding { state, fate }) = Finding::from_byte(byte) else { continue };
            match fate {
                Fate::Request => found.stay(state, false, times),
                Fate::Reply => found.stay(state, true, times),
                // Another CPU, or the LRU, was quicker.
                Fate::Gone => {}
                Fate::Removed => found.swept(state, times),
                Fate::BothRemoved => found.swept(state, 2 * times),
            }
        }
        Ok(len > 0)
    }

    fn restart(&mut self) {
        self.walk = None;
    }
}
