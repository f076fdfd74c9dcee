//! `fairlead top`.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use super::{Output, Read, Usage, seconds};
use crate::inspect::NameFilter;
use crate::top::{self, Options, model::Sort};

pub(super) const EXAMPLES: &str = "\
Examples:
  fairlead top                          live; keys stand in the last line
  fairlead top -n shop --sort drops
  fairlead top --once --interval 5      one table of five seconds
  fairlead top -o json | jq '.services[0]'

Without a terminal, with -o json and with --once it prints once.";

#[derive(Args)]
pub(super) struct Top {
    /// Only this Service, or the host ports of this Pod
    #[arg(value_name = "[NAMESPACE/]NAME")]
    name: Option<NameFilter>,
    /// Only those of this namespace
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// What comes first
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Seconds between two readings
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    interval: Duration,
    /// One table of what goes through in one interval
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    read: Read,
}

impl Top {
    pub(super) fn run(self) -> Result<()> {
        let options = Options {
            bpffs: self.read.pins.bpffs.clone(),
            only: NameFilter::new(self.name, self.namespace.as_deref()).map_err(Usage::new)?,
            sort: self.sort,
            interval: self.interval,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("cannot start the runtime")?;
        if self.once || self.read.output != Output::Table || !top::is_interactive() {
            return self.read.show(|to| runtime.block_on(top::once(to, &options)));
        }
        runtime.block_on(top::live(&options))
    }
}
