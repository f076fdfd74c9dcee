//! docs/contract.md against the repository: every rule is there once, with a test that exists or the reason why there
//! is none.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Rules of the contract are numbered from 1 to this.
const RULES: usize = 159;

/// What the table says of a rule that no test shows, although it is ours.
const NOT_SHOWN: &str = "not shown yet";

/// How a reason begins for which a rule is not ours to keep.
const NOT_OURS: &str = "not ours: ";

/// Rules that no test shows yet: this list becomes shorter, never longer.
const NOT_SHOWN_YET: [usize; 0] = [];

/// A row of the table.
struct Row {
    rule: usize,
    asks: String,
    shown_by: String,
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn rows() -> Vec<Row> {
    let page = fs::read_to_string(repository().join("docs/contract.md")).expect("docs/contract.md");
    let cells = page.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
    let rows = cells.map(|line| line.split(" | ").map(str::to_owned).collect::<Vec<_>>());
    rows.filter(|cells| !cells[0].starts_with('-') && cells[0] != "rule")
        .map(|cells| {
            let [rule, asks, shown_by] = <[String; 3]>::try_from(cells).expect("three cells");
            Row { rule: rule.parse().expect("a number"), asks, shown_by }
        })
        .collect()
}

/// The tests of a source file.
fn tests_of(source: &str) -> BTreeSet<String> {
    let mut tests = BTreeSet::new();
    let mut attributed = false;
    let mut in_list = false;
    for line in source.lines().map(str::trim) {
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            attributed = true;
        } else if line == "both_families! {" {
            in_list = true;
        } else if in_list {
            // Names of functions, of which each becomes a test for IPv4 and one for IPv6.
            in_list = line != "}";
            tests.extend(line.split_whitespace().filter(|_| in_list).map(str::to_owned));
        } else if let Some((_, rest)) = line.split_once("fn ")
            && attributed
        {
            let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            tests.insert(name);
            attributed = false;
        }
    }
    tests
}

#[test]
fn every_rule_is_there_once() {
    let rules: Vec<usize> = rows().iter().map(|row| row.rule).collect();
    assert_eq!(rules, (1..=RULES).collect::<Vec<_>>());
    assert!(rows().iter().all(|row| !row.asks.is_empty()));
}

#[test]
fn every_rule_has_a_test_that_exists_or_a_reason() {
    let mut sources: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for Row { rule, shown_by, .. } in rows() {
        if shown_by == NOT_SHOWN {
            continue;
        }
        if let Some(reason) = shown_by.strip_prefix(NOT_OURS) {
            assert!(reason.len() > 10, "rule {rule}: why?");
            continue;
        }
        for name in shown_by.split(", ") {
            let name = name.strip_prefix('`').and_then(|name| name.strip_suffix('`'));
            let (file, test) = name.and_then(|name| name.split_once("::")).unwrap_or_else(|| {
                panic!("rule {rule}: neither `path::test`, nor {NOT_OURS:?} and why, nor {NOT_SHOWN:?}: {shown_by}")
            });
            let tests = sources.entry(file.to_owned()).or_insert_with(|| {
                let source = fs::read_to_string(repository().join(file));
                tests_of(&source.unwrap_or_else(|error| panic!("rule {rule}: {file}: {error}")))
            });
            assert!(tests.contains(test), "rule {rule}: {file} has no test {test}");
        }
    }
}

#[test]
fn what_is_not_shown_is_known() {
    let not_shown = rows().into_iter().filter(|row| row.shown_by == NOT_SHOWN).map(|row| row.rule);
    assert_eq!(not_shown.collect::<Vec<_>>(), NOT_SHOWN_YET, "docs/contract.md and NOT_SHOWN_YET differ");
}
