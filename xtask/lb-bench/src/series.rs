//! What is measured, as `cargo xtask bench` reads it: one line of JSON for each series of samples.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::Serialize;

/// The samples of one variant in one situation, one for each round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Series {
    pub(crate) group: &'static str,
    /// The situation, in a word.
    pub(crate) what: String,
    /// `floor`: what measuring costs itself, which is taken off all others.
    pub(crate) variant: &'static str,
    pub(crate) unit: &'static str,
    /// What the situation is like: the family, how many flows, how many Services.
    pub(crate) axes: BTreeMap<&'static str, String>,
    pub(crate) samples: Vec<f64>,
}

impl Series {
    pub(crate) fn print(&self) -> Result<()> {
        println!("{}", serde_json::to_string(self).context("a series is JSON")?);
        Ok(())
    }
}
