//! `fairlead bugreport`.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;

use super::Pins;
use crate::bugreport::{self, Question};

pub const EXAMPLES: &str = "\
Examples:
  fairlead bugreport
  fairlead bugreport -o /tmp/report.tar.gz --flows
  kubectl -n kube-system exec daemonset/fairlead -- fairlead bugreport -o - > report.tar.gz";

/// Needs no agent.
#[derive(Args)]
pub struct Bugreport {
    #[command(flatten)]
    pins: Pins,
    /// The archive, a new file; `-`: standard output [default: fairlead-bugreport-HOST-TIME.tar.gz]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Also every connection, with its client's address
    #[arg(long)]
    flows: bool,
}

impl Bugreport {
    pub fn run(self) -> Result<()> {
        let output = self.output.unwrap_or_else(bugreport::default_name);
        let question = Question { bpffs: self.pins.bpffs, flows: self.flows };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let parts = runtime.context("cannot start the runtime")?.block_on(bugreport::collect(&question));
        bugreport::write(&parts, &output)?;
        eprintln!("look through it before you give it away: {}", output.display());
        Ok(())
    }
}
