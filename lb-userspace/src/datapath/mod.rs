//! The maps and programs in the kernel, and the face they show to the rest of the agent.

mod cleanup;
mod clsact;
mod error;
pub mod fake;
mod features;
mod hooks;
mod kernel_maps;
mod layout;
mod load;
pub mod node;
mod options;
pub mod pins;
pub mod test_run;
mod twin;

pub use cleanup::cleanup;
pub use error::{AttachError, CleanupError, OpenError};
pub use features::Features;
pub use hooks::{Direction, Hooks, Observed, Outcome, Place, SOCKET_PROGRAMS, XdpKind};
pub(crate) use hooks::{device_exists, device_name, links};
pub use kernel_maps::KernelMaps;
pub(crate) use kernel_maps::{typed, walk};
pub use load::{Datapath, Programs, forward_log, program_names};
pub use options::{DEFAULT_BPFFS, Options, Sizes, SocketLb, TcMode, Timeouts};
pub(crate) use twin::settings;

use lb_common::maps::{Capacity, MAPS};

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
