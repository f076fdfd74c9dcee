//! `fairlead status`.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use super::{Read, seconds};
use crate::{show, status};

pub(super) const EXAMPLES: &str = "\
Examples:
  fairlead status                       what somebody should do something about stands last
  fairlead status -o wide               also every link, program and counter
  fairlead status -o json | jq '.warnings[].what'

What only the agent knows (source, findings, drops of the last minute) comes from its last report in /run/fairlead, which
stays when it is gone.";

#[derive(Args)]
pub(super) struct Status {
    /// Seconds to count drops for, if no agent keeps count
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    interval: Duration,
    #[command(flatten)]
    read: Read,
}

impl Status {
    pub(super) fn run(self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("cannot start the runtime")?;
        let found = runtime.block_on(status::look(&self.read.pins.bpffs, self.interval))?;
        self.read.show(|to| show::status(to, &found))
    }
}
