//! Examples that `--help` ends with, and that they work.

pub const RUN: &str = "\
Examples:
  fairlead run --kubeconfig /etc/kubernetes/admin.conf --node-name node-1
  fairlead run --manifests /etc/services                  no API server
  fairlead run --config /etc/fairlead.yaml --device eth0  settings from a file, but these devices";

pub const CHECK: &str = "\
Examples:
  fairlead check
  fairlead check -o json
  fairlead check --device eth0,eth1                       these would be the external edges";

pub const CLEANUP: &str = "\
Examples:
  fairlead cleanup
  fairlead cleanup --bpffs /sys/fs/bpf/other              of an agent that pins there
  fairlead cleanup --kube-proxy --dry-run                 what has kube-proxy left?";

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::super::Cli;

    #[test]
    fn every_subcommand_has_examples_that_work() {
        for command in Cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
            let name = command.get_name();
            let help = command.get_after_help().or(command.get_after_long_help()).map(ToString::to_string);
            let help = help.filter(|help| help.contains("Examples:\n"));
            let help = help.unwrap_or_else(|| panic!("`fairlead {name} --help` has no examples"));
            let mut examples = 0;
            for line in help.lines() {
                let call = line.split_once("-- fairlead ").or_else(|| line.split_once("fairlead "));
                let Some((_, example)) = call else { continue };
                // Behind two spaces is what it is for; behind a bracket or an arrow, what becomes of the output.
                let example = example.split("  ").next().unwrap_or_default();
                let example = example.split(&['>', '|', ')'][..]).next().unwrap_or_default();
                let words = ["fairlead"].into_iter().chain(example.split_whitespace());
                if let Err(error) = Cli::try_parse_from(words) {
                    panic!("fairlead {name} --help: {line}: {error}");
                }
                assert!(example.trim().starts_with(name), "{line} is no example of {name}");
                examples += 1;
            }
            assert!(examples > 0, "`fairlead {name} --help` has no examples");
        }
    }
}
