//! What the agent knew last, on the disk: a node that starts while nobody tells it anything serves what it served.
//!
//! [`file`](mod@file) is the file, [`Keeper`] decides when to write it, off the agent's loop.

pub mod file;
mod keeper;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use self::keeper::Keeper;
use crate::datapath::node::name_of;
use crate::model::Objects;

const DIR: &str = "/var/lib/fairlead";

/// The file of the agent with this `--bpffs`, if it is given no other.
pub fn default_path(bpffs: &Path) -> PathBuf {
    Path::new(DIR).join(format!("{}.state", name_of(bpffs)))
}

/// Whose state it is; that of others is of no use.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Identity {
    pub node: String,
    /// Checksum of the certificates that the API server is believed by: every cluster has its own.
    pub cluster: Option<u32>,
}

/// What is kept.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Kept {
    pub identity: Identity,
    /// When it was written, seconds since 1970.
    pub saved: i64,
    pub objects: Objects,
}
