//! docs/install.md and docs/operations.md say what works: commands, flags, files and links.

use std::fs;

use clap::{CommandFactory as _, Parser as _};
use fairlead::cli::Cli;

use super::{deploy, docs};

const PAGES: [&str; 2] = ["install.md", "operations.md"];

/// Flags of k3s and kubeadm that the pages name by themselves.
const OTHERS: [&str; 3] = ["--disable-kube-proxy", "--skip-phases", "--skip-phases=addon/kube-proxy"];

/// What stands in backquotes, and the lines of console blocks.
fn code(page: &str) -> Vec<String> {
    let mut spans = Vec::new();
    for (i, block) in page.split("```").enumerate() {
        if i % 2 == 1 {
            let lines = block.replace("\\\n", " ");
            spans
                .extend(lines.lines().map(|line| line.trim_start_matches(['$', '#', ' ']).trim().to_owned()));
        } else {
            spans.extend(block.split('`').skip(1).step_by(2).map(|span| span.replace('\n', " ")));
        }
    }
    spans
}

#[test]
fn commands_and_flags_are_what_the_command_line_takes() {
    let command = Cli::command();
    let known = |flag: &str| {
        let name = flag.trim_start_matches("--").split('=').next().unwrap_or_default();
        command
            .get_subcommands()
            .flat_map(clap::Command::get_arguments)
            .any(|arg| arg.get_long() == Some(name))
    };
    let mut commands = 0;
    for page in PAGES {
        for span in code(&docs(page)) {
            let call = span.split_once("-- fairlead ").map_or(&*span, |(_, call)| call);
            let call = call.strip_prefix("fairlead ").unwrap_or(call);
            if call.len() < span.len() || span.starts_with("fairlead ") {
                if let Err(error) =
                    Cli::try_parse_from(["fairlead"].into_iter().chain(call.split_whitespace()))
                {
                    panic!("docs/{page}: {span}: {error}");
                }
                commands += 1;
            } else if span.starts_with("--") {
                assert!(known(&span) || OTHERS.contains(&&*span), "docs/{page}: {span}");
            }
        }
    }
    assert!(commands > 5, "{commands}");
}

#[test]
fn files_and_pages_that_are_named_are_there() {
    for page in PAGES {
        let text = docs(page);
        let named =
            text.split(|c: char| c.is_whitespace() || "`()".contains(c)).filter(|w| w.starts_with("deploy/"));
        for path in named {
            assert!(deploy().join("..").join(path).exists(), "docs/{page}: {path}");
        }
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            if link.contains("://") {
                continue;
            }
            let target = if file.is_empty() { page } else { file };
            let target = fs::read_to_string(deploy().join("../docs").join(target));
            let target = target.unwrap_or_else(|e| panic!("docs/{page}: {link}: {e}"));
            let anchor = |line: &str| {
                line.trim_start_matches('#').trim().to_lowercase().replace(' ', "-").replace(',', "")
            };
            let there =
                heading.is_empty() || target.lines().any(|l| l.starts_with('#') && anchor(l) == heading);
            assert!(there, "docs/{page}: {link}");
        }
    }
}
