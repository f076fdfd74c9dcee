//! What a published file is made of, and when that was written: nothing of it depends on when it is built.

use std::env;
use std::process::Command;

use anyhow::{Context as _, Result};
use jiff::Timestamp;

use crate::host;
use crate::process;

/// <https://reproducible-builds.org/docs/source-date-epoch/>
const EPOCH: &str = "SOURCE_DATE_EPOCH";

/// Version, time and commit.
#[derive(Clone, Debug)]
pub struct Stamp {
    pub version: &'static str,
    /// Seconds since 1970.
    pub time: u64,
    /// The commit, if this is a clone of the repository; `-dirty` behind it if files differ from it.
    pub revision: Option<String>,
}

impl Stamp {
    /// Of this repository, or as `SOURCE_DATE_EPOCH` says.
    pub fn now() -> Result<Self> {
        let told = env::var(EPOCH).ok().filter(|time| !time.is_empty());
        let time = match told {
            Some(time) => time,
            None => git(&["log", "-1", "--format=%ct"]).with_context(|| {
                format!("nothing says how old this is: there is no git history here; set {EPOCH} to a time in seconds")
            })?,
        };
        let time = time.trim().parse().with_context(|| format!("{EPOCH} is no time in seconds: {time}"))?;
        let revision = git(&["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]).ok();
        Ok(Self { version: env!("CARGO_PKG_VERSION"), time, revision })
    }

    /// As RFC 3339 writes it.
    pub fn date(&self) -> Result<String> {
        let time = i64::try_from(self.time).context("a time beyond all clocks")?;
        Ok(Timestamp::from_second(time).context("a time beyond all clocks")?.to_string())
    }
}

fn git(args: &[&str]) -> Result<String> {
    let said = process::output(Command::new("git").current_dir(host::workspace()).args(args))?;
    Ok(said.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_written_as_image_configurations_have_it() {
        let stamp = Stamp { version: "1.2.3", time: 1_700_000_000, revision: None };
        assert_eq!(stamp.date().unwrap(), "2023-11-14T22:13:20Z");
    }
}
