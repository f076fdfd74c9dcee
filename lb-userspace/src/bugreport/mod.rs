//! `fairlead bugreport`: what somebody who was not there needs to see, in one archive, and no secrets.
//!
//! Each part is a file. A part that cannot be had says why in its file and stops no other; none is larger than
//! [`LIMIT`], and none takes longer than [`PATIENCE`]. Read-outs come from this program's own subcommands, in
//! processes of their own without an environment, so that whatever is wrong with one stays there. Everything passes
//! [`redact`] before it is written.

mod answers;
mod archive;
mod netlink;
mod node;
mod redact;
mod run;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

pub use self::archive::write;
use self::redact::redact;
use self::run::subcommand;
use crate::cli::one_line;

/// Bytes of one part.
const LIMIT: usize = 16 << 20;
/// For one part. The agent may hang, and so may what is asked for it.
const PATIENCE: Duration = Duration::from_secs(30);
/// Stands where something was cut off.
const CUT: &str = "\n[cut off here: too long]\n";

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Question {
    pub bpffs: PathBuf,
    /// Every flow, with the addresses of clients.
    pub flows: bool,
}

/// A file of the report.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    pub name: &'static str,
    pub text: String,
}

impl Part {
    fn new(name: &'static str, found: Result<String>) -> Self {
        let text = found.unwrap_or_else(|error| format!("not collected: {}\n", one_line(&error)));
        let text = if text.is_empty() { "nothing\n".to_owned() } else { text };
        Self { name, text: bounded(redact(&text)) }
    }
}

/// Looks at everything, one after the other.
pub async fn collect(question: &Question) -> Vec<Part> {
    let bpffs = question.bpffs.as_path();
    let status = subcommand(&["status", "-o", "json"], bpffs).await;
    let agent = status.as_ref().ok().and_then(|status| node::agent_of(status));
    let settings = node::settings(agent);
    let health = answers::address(&settings, "healthz-bind-address", answers::HEALTHZ);
    let metrics = answers::address(&settings, "metrics-bind-address", answers::METRICS);
    let mut parts = vec![
        Part::new("README.txt", Ok(contents(question))),
        Part::new("version.txt", Ok(node::version())),
        Part::new("kernel.txt", node::kernel()),
        Part::new("sysctls.txt", Ok(node::sysctls())),
        Part::new("settings.txt", Ok(settings)),
        Part::new("pins.txt", node::pins(bpffs)),
        Part::new("undo.json", node::undo(bpffs)),
        Part::new("status.json", status),
        Part::new("flows-summary.txt", node::flows(bpffs)),
    ];
    let read = [
        ("check.txt", &["check"][..]),
        ("status.txt", &["status"]),
        ("services.json", &["services", "-o", "json"]),
        ("backends.json", &["backends", "-o", "json"]),
    ];
    for (name, args) in read {
        parts.push(Part::new(name, subcommand(args, bpffs).await));
    }
    if question.flows {
        parts.push(Part::new("flows.json", subcommand(&["flows", "-o", "json"], bpffs).await));
    }
    for (name, table) in netlink::TABLES {
        parts.push(Part::new(name, netlink::dump(table).await));
    }
    for (name, path) in [("healthz.txt", "/healthz"), ("livez.txt", "/livez"), ("readyz.txt", "/readyz")] {
        parts.push(Part::new(name, answers::get(&health, path).await));
    }
    parts.push(Part::new("metrics.txt", answers::get(&metrics, "/metrics").await));
    parts
}

fn contents(question: &Question) -> String {
    let flows = if question.flows {
        "flows.json lists every connection with the addresses of its client"
    } else {
        "connections are counted, not listed: no address of a client is here (--flows adds them)"
    };
    format!(
        "Made by fairlead bugreport, of what is pinned under {}.\n\
         Names and addresses of Services, pods, this node and its devices are in here; {flows}.\n\
         Nothing was read from the environment, from kubeconfigs or from tokens.\n",
        question.bpffs.display()
    )
}

/// At most [`LIMIT`] bytes.
fn bounded(mut text: String) -> String {
    if text.len() > LIMIT {
        text.truncate(text.floor_char_boundary(LIMIT - CUT.len()));
        text.push_str(CUT);
    }
    text
}

/// What a report is called that nobody has named.
pub fn default_name() -> PathBuf {
    let host = nix::sys::utsname::uname().ok().and_then(|names| names.nodename().to_str().map(str::to_owned));
    let now = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
    Path::new(&format!("fairlead-bugreport-{}-{now}.tar.gz", host.as_deref().unwrap_or("node"))).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_fails_says_why() {
        let part = Part::new("a", Err(anyhow::anyhow!("no such thing").context("cannot look")));
        assert_eq!(part.text, "not collected: cannot look: no such thing\n");
    }

    #[test]
    fn a_part_has_an_end() {
        let part = Part::new("a", Ok("ü".repeat(LIMIT)));
        assert!(part.text.len() <= LIMIT && part.text.ends_with(CUT), "{}", part.text.len());
        assert_eq!(Part::new("a", Ok("ü".into())).text, "ü");
    }

    #[test]
    fn every_part_is_clean_of_secrets() {
        let part = Part::new("a", Ok("Authorization: Bearer abc.def".into()));
        assert!(!part.text.contains("abc"), "{}", part.text);
        let part = Part::new("a", Err(anyhow::anyhow!("https://me:abc@host failed")));
        assert!(!part.text.contains("abc"), "{}", part.text);
    }

    #[tokio::test]
    async fn there_is_a_report_where_nothing_runs() {
        let question = Question { bpffs: "/nonexistent".into(), flows: false };
        let parts = collect(&question).await;
        let names: std::collections::BTreeSet<_> = parts.iter().map(|part| part.name).collect();
        assert_eq!(names.len(), parts.len(), "two parts of one name");
        assert!(parts.iter().all(|part| !part.text.is_empty()), "{parts:?}");
        assert!(!names.contains("flows.json"));
    }
}
