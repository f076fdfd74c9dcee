//! The reasons on docs/bpftool.md: their table, and the keys of `COUNTERS`, which depend on how many there are.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, bail};
use lb_common::reason::{Action, Hook, REASONS, Reason, counter_index};

/// Where the table begins and ends.
const BEGIN: &str = "<!-- reasons: written by cargo xtask docs -->\n";
const END: &str = "<!-- end -->";

/// The page as it has to be. `code` is the source of the reasons: their meaning is what its comments say.
///
/// # Errors
///
/// What the page or the source lacks.
pub fn written(page: &str, code: &str) -> Result<String> {
    let (before, rest) = page.split_once(BEGIN).context("no mark where the reasons begin")?;
    let (_, behind) = rest.split_once(END).context("no mark where the reasons end")?;
    let mut table = "\n| reason | name | packets | meaning |\n| --- | --- | --- | --- |\n".to_owned();
    for reason in Reason::ALL {
        let meaning = meaning(reason, code)?;
        let (number, name, what) = (reason as u32, reason.name(), what_happens(reason.action()));
        writeln!(table, "| {number} | `{name}` | {what} | {meaning} |")?;
    }
    counted(&format!("{before}{BEGIN}{table}\n{END}{behind}"))
}

/// The page with the keys of its example, which counts what was refused to pods.
fn counted(page: &str) -> Result<String> {
    let (before, _) = page.split_once(" × hook + reason").context("nothing says how keys are counted")?;
    let reasons = before.rsplit(' ').next().unwrap_or_default();
    let reasons: u32 = reasons.parse().context("keys are counted with a number")?;
    let (hook, reason) = (Hook::PodIn as u32, Reason::NoEndpoints as u32);
    let (old, new) = (reasons * hook + reason, counter_index(Hook::PodIn, Reason::NoEndpoints));
    Ok(page
        .replace(&format!("{reasons} × "), &format!("{REASONS} × "))
        .replace(&format!("= {old}:"), &format!("= {new}:"))
        .replace(&format!("key {old} 0 0 0"), &format!("key {new} 0 0 0"))
        .replace(&format!("\"key\": {old},"), &format!("\"key\": {new},")))
}

/// The comment above a reason, which is not in the program.
fn meaning(reason: Reason, code: &str) -> Result<String> {
    let name = reason.name();
    let mut comment = Vec::new();
    for line in code.lines().map(str::trim) {
        if let Some(text) = line.strip_prefix("/// ") {
            comment.push(text);
        } else if line.contains(&format!("= {}, \"{name}\", ", reason as u32)) {
            return Ok(comment.join(" ").trim_end_matches('.').to_owned());
        } else {
            comment.clear();
        }
    }
    bail!("the source has no reason {name}")
}

const fn what_happens(action: Action) -> &'static str {
    match action {
        Action::Pass => "passes",
        Action::Carry => "goes on, rewritten",
        Action::Drop => "dropped",
        Action::Reject => "refused",
        Action::Expire => "answered: time exceeded",
        Action::Shrink => "answered: too big",
    }
}
