//! Logs through `tracing`, to standard error: for people, or as JSON.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::fmt;

use crate::settings::LogFormat;

/// Libraries that say in their words what we say in ours.
const QUIET: [&str; 4] =
    ["kube_runtime=error", "kube_client=error", "tower=error", "netlink_packet_route=error"];

/// `--log-level` is not a filter.
#[derive(Debug, thiserror::Error)]
#[error("--log-level {text:?}: {source}")]
pub struct Error {
    text: String,
    source: ParseError,
}

/// Starts logging for the whole process.
pub fn start(level: &str, format: LogFormat) -> Result<(), Error> {
    let filter = filter(level)?;
    let log = fmt().with_env_filter(filter).with_writer(io::stderr);
    match format {
        LogFormat::Human => log.with_ansi(io::stderr().is_terminal()).with_target(false).init(),
        LogFormat::Json => log.json().flatten_event(true).with_current_span(false).init(),
    }
    Ok(())
}

fn filter(level: &str) -> Result<EnvFilter, Error> {
    let error = |source| Error { text: level.to_owned(), source };
    let mut filter = EnvFilter::builder().parse(level).map_err(error)?;
    for directive in QUIET {
        let module = directive.split('=').next().unwrap_or_default();
        // Whoever names the module wants to hear it.
        if !level.contains(module) {
            filter = filter.add_directive(directive.parse().map_err(error)?);
        }
    }
    Ok(filter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_modules() {
        assert!(filter("info").unwrap().to_string().contains("kube_runtime=error"));
        assert!(filter("info,kube_runtime=debug").unwrap().to_string().contains("kube_runtime=debug"));
        let error = filter("fairlead=loud").unwrap_err().to_string();
        assert!(error.starts_with("--log-level \"fairlead=loud\": "), "{error}");
    }
}
