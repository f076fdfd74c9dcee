//! The maps and programs in the kernel, and the face they show to the rest of the agent.

mod carry;
mod cleanup;
mod clsact;
mod error;
pub mod fake;
mod features;
mod hooks;
mod idle;
mod kernel_maps;
mod layout;
mod load;
mod migrate;
pub mod node;
mod options;
pub mod pins;
mod rehearsal;
mod resize;
mod sweeps;
mod switch;
pub mod test_run;
mod twin;

pub use carry::{Convert, LastSeen};
pub use cleanup::cleanup;
pub(crate) use clsact::all_filters as filters;
pub use error::{AttachError, CleanupError, OpenError};
pub use features::Features;
pub use hooks::{Direction, Hooks, Observed, Outcome, Place, SOCKET_PROGRAMS, XdpKind};
pub(crate) use hooks::{device_exists, device_name, links};
pub use idle::Idle;
pub use kernel_maps::KernelMaps;
pub(crate) use kernel_maps::{typed, walk};
pub use load::{Datapath, KERNEL_BTF, Programs, forward_log, object_checksum, program_names};
pub use migrate::{Change, Known, Layout};
pub use options::{DEFAULT_BPFFS, Options, Sizes, SocketLb, SweepMode, TcMode, Timeouts};
pub use sweeps::Sweeps;
pub use switch::Step;
pub(crate) use twin::settings;

use lb_common::maps::{Capacity, MAPS};

use crate::entries::{Family, Limits, Op, Snapshot, Table};
use crate::sys::bpf::Cursor;

/// The service maps as `reconcile` sees them: the kernel's, or [`fake::FakeMaps`].
pub trait Maps {
    /// How many entries the maps take.
    fn limits(&self) -> Limits;

    /// Everything the maps hold.
    fn read(&mut self) -> Result<Snapshot, MapError>;

    /// Carries out `ops` one after the other and stops at the first that fails.
    fn apply(&mut self, ops: &[Op]) -> Result<(), ApplyError>;

    /// Those of `writes` that would change something. Reads the entries that they are about, and no others.
    fn differing(&mut self, writes: Vec<Op>) -> Result<Vec<Op>, MapError>;

    /// About `count` entries of a table from a place on, each as the operation that removes it, and the next place;
    /// `None`: the table ends here. Entries that come or go meanwhile may be missed or seen twice. What is in no
    /// window of `SLOTS` is nobody's business: that table has no entries here.
    fn entries(
        &mut self,
        table: Table,
        from: Option<Position>,
        count: usize,
    ) -> Result<(Vec<Op>, Option<Position>), MapError>;
}

/// Where a walk over the entries of a [`Table`] stands.
#[derive(Clone, Copy, Debug)]
pub struct Position {
    family: Family,
    cursor: Option<Cursor>,
}

/// A map refused an operation.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapError {
    /// The kernel said `E2BIG`: no room for another entry.
    #[error("map {map} is full ({capacity} entries){}", advice(map))]
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

/// What makes room in a map.
fn advice(map: &str) -> &'static str {
    match MAPS.iter().find(|spec| spec.name == map).map(|spec| spec.capacity) {
        Some(Capacity::Services) => "; raise --max-services",
        Some(Capacity::Backends | Capacity::Slots | Capacity::Addresses) => "; raise --max-backends",
        Some(Capacity::Flows | Capacity::PendingFlows) => "; raise --max-flows",
        Some(Capacity::Fixed(_)) | None => "",
    }
}
