//! `fairlead completion`: what shells want to know about this command line.

use std::io::{self, Write as _};

use anyhow::Result;
use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::Cli;

pub const EXAMPLES: &str = "\
Examples:
  source <(fairlead completion bash)                                        in this shell
  fairlead completion bash > /etc/bash_completion.d/fairlead                in all shells
  fairlead completion zsh > \"${fpath[1]}/_fairlead\"
  fairlead completion fish > ~/.config/fish/completions/fairlead.fish";

#[derive(Args)]
pub struct Completion {
    #[arg(value_enum)]
    shell: Shell,
}

impl Completion {
    pub fn run(&self) -> Result<()> {
        Ok(io::stdout().write_all(&script(self.shell))?)
    }
}

fn script(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "fairlead", &mut script);
    script
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn every_shell_learns_of_every_subcommand() {
        for shell in Shell::value_variants() {
            let script = String::from_utf8(script(*shell)).unwrap();
            for command in Cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
                assert!(script.contains(command.get_name()), "{shell}: {}", command.get_name());
            }
        }
    }

    #[test]
    fn bash_accepts_its_script_and_completes_with_it() {
        let script = String::from_utf8(script(Shell::Bash)).unwrap();
        let mut bash = Command::new("bash").arg("-n").stdin(Stdio::piped()).spawn().unwrap();
        bash.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        assert!(bash.wait().unwrap().success(), "bash does not read it");
        // As readline does it: the words so far, and which of them is being typed.
        let ask = "\nCOMP_WORDS=(fairlead ser); COMP_CWORD=1; _fairlead fairlead ser fairlead; echo \"${COMPREPLY[@]}\"\n";
        let mut bash = Command::new("bash").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        bash.stdin.take().unwrap().write_all((script + ask).as_bytes()).unwrap();
        let output = bash.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "services");
    }
}
