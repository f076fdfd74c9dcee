//! Pages that people type from say what works: commands, flags and files. (Links: `xtask/tests/docs`.)

use clap::error::ErrorKind::MissingRequiredArgument;
use clap::{CommandFactory as _, Parser as _};
use fairlead::cli::Cli;

use super::{deploy, docs};

const PAGES: [&str; 6] =
    ["install.md", "node.md", "operations.md", "security.md", "standalone.md", "troubleshooting.md"];

/// Flags of k3s and kubeadm that the pages name by themselves.
const OTHERS: [&str; 3] = ["--disable-kube-proxy", "--skip-phases", "--skip-phases=addon/kube-proxy"];

/// What stands in backquotes, and the lines of console blocks.
fn code(page: &str) -> Vec<String> {
    let mut spans = Vec::new();
    for (i, block) in page.split("```").enumerate() {
        if i % 2 == 1 && block.starts_with("yaml") {
            // Files, not commands.
        } else if i % 2 == 1 {
            let lines = block.replace("\\\n", " ");
            for line in lines.lines() {
                let line = line.trim_start_matches(['$', '#', ' ']);
                let line = line.split_once(" #").map_or(line, |(line, _comment)| line);
                spans.push(line.trim_end_matches([' ', '&']).replace("target/release/", ""));
            }
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
        command.get_subcommands().flat_map(clap::Command::get_arguments).filter_map(clap::Arg::get_long).any(
            // `--max-*` are all of these.
            |long| name.strip_suffix('*').map_or(long == name, |prefix| long.starts_with(prefix)),
        )
    };
    let mut commands = 0;
    for page in PAGES {
        for span in code(&docs(page)) {
            let call = span.split_once("-- fairlead ").map_or(&*span, |(_, call)| call);
            let call = call.strip_prefix("fairlead ").unwrap_or(call);
            if call.len() < span.len() || span.starts_with("fairlead ") {
                // Behind these stands what the shell does with what is printed.
                let call = call.split(['>', '|']).next().unwrap_or_default().trim_end();
                let taken = Cli::try_parse_from(["fairlead"].into_iter().chain(call.split_whitespace()));
                // `fairlead explain` names a command; it need not be complete.
                let is_name = !call.contains(' ');
                match taken.map(|_| ()).map_err(|error| (error.kind(), error)) {
                    Err((MissingRequiredArgument, _)) if is_name => {}
                    Err((_, error)) => panic!("docs/{page}: {span}: {error}"),
                    Ok(()) => {}
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
fn files_that_are_named_are_there() {
    for page in PAGES {
        let text = docs(page);
        let named =
            text.split(|c: char| c.is_whitespace() || "`()".contains(c)).filter(|w| w.starts_with("deploy/"));
        for path in named {
            assert!(deploy().join("..").join(path).exists(), "docs/{page}: {path}");
        }
    }
}
