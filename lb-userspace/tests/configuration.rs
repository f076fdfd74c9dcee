//! docs/configuration.md against the command line: its tables are written from what clap knows, and its example is read.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::builder::Arg;
use clap::{CommandFactory, Parser};
use fairlead::cli::Cli;
use fairlead::settings::Settings;

/// Environment variable that has this test write the page instead of comparing it (`cargo xtask docs`).
const WRITE: &str = "FAIRLEAD_WRITE_DOCS";

/// Where the tables begin and end, which are written.
const BEGIN: [&str; 2] =
    ["<!-- flags: written by cargo xtask docs -->\n", "<!-- kube-proxy: written by cargo xtask docs -->\n"];
const END: &str = "<!-- end -->";

/// Every flag of kube-proxy on Linux (cmd/kube-proxy/app/options.go of Kubernetes 1.36), and what there is in its place; nothing:
/// Fairlead has it, with this name and meaning.
const KUBE_PROXY: [(&str, &str); 56] = [
    ("bind-address", "the Node object and the node's devices tell its addresses"),
    ("bind-address-hard-fail", "always so: a port of health or metrics that is in use ends the agent"),
    ("cleanup", "`fairlead cleanup`; `fairlead cleanup --kube-proxy` removes what kube-proxy has left"),
    ("cluster-cidr", ""),
    ("config", ""),
    ("config-sync-period", "nothing: changes are followed, not polled"),
    ("conntrack-max-per-core", "`--max-flows`"),
    ("conntrack-min", "`--max-flows`"),
    ("conntrack-tcp-be-liberal", "nothing: packets are not judged by their sequence numbers"),
    ("conntrack-tcp-timeout-close-wait", ""),
    ("conntrack-tcp-timeout-established", ""),
    ("conntrack-udp-timeout", ""),
    ("conntrack-udp-timeout-stream", ""),
    ("detect-local-mode", ""),
    ("feature-gates", "nothing"),
    ("healthz-bind-address", ""),
    ("healthz-port", "`--healthz-bind-address`"),
    ("hostname-override", ""),
    ("init-only", "nothing: the agent needs three capabilities, see [security.md](security.md)"),
    ("iptables-localhost-nodeports", "`--nodeport-addresses`: 127.0.0.1 and ::1 answer unless it is given"),
    ("iptables-masquerade-bit", "nothing: packets are not marked"),
    ("iptables-min-sync-period", "nothing: each change is written at once"),
    ("iptables-sync-period", "`--map-check-period`"),
    ("ipvs-exclude-cidrs", "nothing"),
    ("ipvs-min-sync-period", "nothing: each change is written at once"),
    ("ipvs-scheduler", "`--algorithm`"),
    ("ipvs-strict-arp", "nothing: no Service's address is on a device"),
    ("ipvs-sync-period", "`--map-check-period`"),
    ("ipvs-tcp-timeout", "`--conntrack-tcp-timeout-established`"),
    ("ipvs-tcpfin-timeout", "nothing: 120 s"),
    ("ipvs-udp-timeout", "`--conntrack-udp-timeout-stream`"),
    ("kube-api-burst", "nothing"),
    ("kube-api-content-type", "nothing"),
    ("kube-api-qps", "nothing"),
    ("kubeconfig", ""),
    ("log-flush-frequency", "nothing: lines are written at once"),
    ("log-json-info-buffer-size", "nothing"),
    ("log-json-split-stream", "nothing"),
    ("log-text-info-buffer-size", "nothing"),
    ("log-text-split-stream", "nothing"),
    ("logging-format", "`--log-format`"),
    ("masquerade-all", ""),
    ("master", ""),
    ("metrics-bind-address", ""),
    ("metrics-port", "`--metrics-bind-address`"),
    ("nodeport-addresses", ""),
    ("oom-score-adj", "the DaemonSet: `priorityClassName: system-node-critical`"),
    ("pod-bridge-interface", ""),
    ("pod-interface-name-prefix", ""),
    ("profiling", "nothing"),
    ("proxy-mode", "nothing: there is one"),
    ("show-hidden-metrics-for-version", "nothing"),
    ("v", "`--log-level`"),
    ("version", "`fairlead --version`"),
    ("vmodule", "`--log-level`, which takes levels by module"),
    ("write-config-to", "nothing"),
];

fn page() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md")
}

fn text() -> String {
    fs::read_to_string(page()).expect("docs/configuration.md")
}

/// The flags of `fairlead run`, in the order of its `--help`.
fn flags() -> Vec<Arg> {
    let mut command = Cli::command();
    command.build();
    let run = command.find_subcommand("run").expect("fairlead run");
    run.get_arguments().filter(|arg| arg.get_long() != Some("help")).cloned().collect()
}

fn long(arg: &Arg) -> &str {
    arg.get_long().expect("every flag has a name")
}

/// All names of a flag.
fn names(arg: &Arg) -> Vec<&str> {
    std::iter::once(long(arg)).chain(arg.get_all_aliases().into_iter().flatten()).collect()
}

fn has(name: &str) -> bool {
    flags().iter().any(|arg| names(arg).contains(&name))
}

/// A flag's row: name and aliases with what they take, environment variable, default, whether kube-proxy has it, meaning.
fn row(arg: &Arg) -> String {
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let (meaning, default) = match help.rsplit_once("[default: ") {
        Some((meaning, default)) => (meaning.trim(), as_text(default.trim_end_matches(']'))),
        None => (help.trim(), "–".to_owned()),
    };
    let meaning = as_text(meaning);
    let values: Vec<_> =
        arg.get_possible_values().iter().map(|value| format!("`{}`", value.get_name())).collect();
    let takes = match values.as_slice() {
        [] => {
            arg.get_value_names().unwrap_or_default().first().map_or(String::new(), |name| format!(" {name}"))
        }
        _ => String::new(),
    };
    let names: Vec<_> = names(arg).iter().map(|name| format!("`--{name}{takes}`")).collect();
    let values = if values.is_empty() { String::new() } else { format!(": {}", values.join(", ")) };
    let env = arg.get_env().map_or(String::new(), |name| format!("`{}`", name.display()));
    let theirs = KUBE_PROXY.iter().any(|(flag, _)| self::names(arg).contains(flag));
    let theirs = if theirs { "has it" } else { "" };
    format!("| {}{values} | {env} | {default} | {theirs} | {meaning} |", names.join(", "))
}

/// Not taken for emphasis.
fn as_text(text: &str) -> String {
    text.replace('*', "\\*")
}

fn table(head: &str, rows: impl Iterator<Item = String>) -> String {
    let columns = head.matches('|').count() - 1;
    let mut table = format!("\n{head}\n|{}\n", " --- |".repeat(columns));
    for row in rows {
        writeln!(table, "{row}").expect("writing to a string");
    }
    table.push('\n');
    table
}

/// The page with its tables as they should be.
fn written(text: &str) -> String {
    let flags = flags();
    let absent = KUBE_PROXY.iter().filter(|(_, instead)| !instead.is_empty());
    let tables = [
        table("| flag | environment | default | kube-proxy | meaning |", flags.iter().map(row)),
        table("| flag of kube-proxy | here |", absent.map(|(flag, here)| format!("| `--{flag}` | {here} |"))),
    ];
    let mut rest = text;
    let mut page = String::new();
    for (begin, table) in BEGIN.iter().zip(tables) {
        let (before, behind) = rest.split_once(begin).expect("a mark where a table begins");
        let (_, behind) = behind.split_once(END).expect("a mark where a table ends");
        page += before;
        page += begin;
        page += &table;
        page += END;
        rest = behind;
    }
    page + rest
}

#[test]
fn the_page_says_what_the_command_line_says() {
    let there = text();
    let written = written(&there);
    if std::env::var_os(WRITE).is_some() {
        fs::write(page(), written).expect("docs/configuration.md can be written");
        return;
    }
    assert!(there == written, "docs/configuration.md is out of date: run `cargo xtask docs`");
}

#[test]
fn every_flag_is_a_key_of_the_file() {
    for arg in flags().iter().filter(|arg| arg.get_long() != Some("config")) {
        let file = format!("{}: null", long(arg));
        let read: Result<Settings, _> = serde_yaml_ng::from_str(&file);
        assert_eq!(read.map_err(|error| error.to_string()), Ok(Settings::default()), "{file}");
    }
}

#[test]
fn kube_proxy_s_flags_are_there_or_refused() {
    for (flag, instead) in KUBE_PROXY.iter().filter(|(flag, _)| *flag != "version") {
        assert_eq!(has(flag), instead.is_empty(), "--{flag}");
        let refused = Cli::try_parse_from(["fairlead", "run", &format!("--{flag}=1")])
            .is_err_and(|error| error.kind() == clap::error::ErrorKind::UnknownArgument);
        assert_eq!(refused, !instead.is_empty(), "--{flag}");
        for word in instead.split('`').filter_map(|word| word.strip_prefix("--")) {
            assert!(has(word), "--{word}, in place of --{flag}");
        }
    }
}

#[test]
fn the_example_is_a_file_that_is_read() {
    let text = text();
    let example =
        text.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next()).expect("an example");
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(example.as_bytes()).expect("written");
    let settings = Settings::read(file.path()).expect("the example");
    assert_ne!(settings, Settings::default());
    settings.config().expect("the example makes sense");
}

/// Names of labels and annotations that the code knows.
#[test]
fn every_label_and_annotation_is_on_the_page() {
    let text = text();
    let mut known = 0;
    for file in ["src/model/types.rs", "src/source/convert.rs"] {
        let code = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).expect(file);
        let names = code.split('"').filter(|name| name.contains(".io/") && !name.contains(['\n', ' ']));
        for name in names {
            known += 1;
            assert!(text.contains(&format!("`{name}")), "{name}, of {file}");
        }
    }
    assert!(known >= 5, "only {known} names were found");
}
