//! `fairlead drops`.

use anyhow::{Context, Result};
use clap::Args;

use super::{Read, Usage};
use crate::drops::{self, Filter, Lost};
use crate::inspect::NameFilter;

pub(super) const EXAMPLES: &str = "\
Examples:
  fairlead drops                               all of them, since the maps were made
  fairlead drops web -n shop                   what clients of one Service were refused for
  fairlead drops --follow --reason no_endpoints
  fairlead drops --follow -o json | jq .source";

#[derive(Args)]
pub(super) struct Drops {
    /// Only this Service, or the host ports of this Pod
    #[arg(value_name = "[NAMESPACE/]NAME")]
    name: Option<NameFilter>,
    /// Only those of this namespace
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Only this reason
    #[arg(long, value_name = "REASON")]
    reason: Option<Lost>,
    /// Packets and calls of sockets as they come. One reader at a time; what comes too fast is counted, not shown
    #[arg(short, long)]
    follow: bool,
    #[command(flatten)]
    read: Read,
}

impl Drops {
    pub(super) fn run(self) -> Result<()> {
        let filter = Filter {
            reason: self.reason,
            owner: NameFilter::new(self.name, self.namespace.as_deref()).map_err(Usage::new)?,
        };
        if !self.follow {
            return self.read.show(|to| drops::show(to, &filter));
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("cannot start the runtime")?;
        self.read.show(|to| runtime.block_on(drops::follow(to, &filter)))
    }
}
