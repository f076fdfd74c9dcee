//! What the guests said, as tables.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// What became of one kernel. Made from the text of guest.sh, in which libtest's lines stand.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Report {
    /// What `uname -r` said; our name for the kernel as long as it has not.
    release: String,
    pub took: Duration,
    pub timed_out: bool,
    booted: bool,
    done: bool,
    /// What the test target `kernel` found: (name, whether it is there), in its order.
    features: Vec<(String, bool)>,
    suites: Vec<Suite>,
}

/// One test program.
#[derive(Clone, PartialEq, Debug, Default)]
struct Suite {
    tier: u8,
    name: String,
    passed: usize,
    failed: Vec<String>,
    /// Exit status, once it has ended.
    status: Option<i32>,
}

impl Suite {
    fn is_good(&self) -> bool {
        self.status == Some(0) && self.failed.is_empty()
    }
}

impl Report {
    /// Reads what a guest has said, as far as it came.
    pub fn read(kernel: &str, text: &str) -> Self {
        let mut report = Self { release: kernel.to_owned(), ..Self::default() };
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                ["#", "up", _, release] => {
                    report.booted = true;
                    (*release).clone_into(&mut report.release);
                }
                ["#", "done", ..] => report.done = true,
                ["#", "begin", _, name] => {
                    let (tier, name) = name.split_once(':').unwrap_or(("0", name));
                    let tier = tier.parse().unwrap_or_default();
                    report.suites.push(Suite { tier, name: name.to_owned(), ..Suite::default() });
                }
                ["#", "end", _, _, status] => {
                    if let Some(suite) = report.suites.last_mut() {
                        suite.status = status.parse().ok();
                    }
                }
                ["feature", name, there @ ("yes" | "no")] => {
                    report.features.push(((*name).to_owned(), *there == "yes"));
                }
                _ => report.read_result(line),
            }
        }
        report
    }

    /// libtest's `test NAME ... ok`; with output of the test's own, the end stands on a line of its own. Only the lists
    /// at the end are then sure: names of failed tests, and the count of the others.
    fn read_result(&mut self, line: &str) {
        let Some(suite) = self.suites.last_mut() else { return };
        if let Some(name) = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED")) {
            suite.failed.push(name.to_owned());
        } else if let Some(counts) = line.strip_prefix("test result: ") {
            let before = |what: &str| {
                let (left, _) = counts.split_once(what)?;
                left.split_whitespace().next_back()?.parse::<usize>().ok()
            };
            suite.passed = before(" passed").unwrap_or_default();
            let failed = before(" failed").unwrap_or_default();
            for _ in suite.failed.len()..failed {
                suite.failed.push("another".to_owned());
            }
        }
    }

    /// Whether every test ran and passed.
    pub fn passed(&self) -> bool {
        self.is_complete() && self.suites.iter().all(Suite::is_good)
    }

    /// Whether every test ran, with whatever result.
    pub fn is_complete(&self) -> bool {
        self.done && !self.timed_out
    }

    /// What is wrong, one line each.
    pub fn findings(&self) -> Vec<String> {
        let mut findings = Vec::new();
        for suite in &self.suites {
            findings.extend(suite.failed.iter().map(|test| format!("{}: {test} failed", suite.name)));
            match suite.status {
                None => findings.push(format!("{}: did not end", suite.name)),
                Some(status) if status != 0 && suite.failed.is_empty() => {
                    findings.push(format!("{}: ended with status {status}", suite.name));
                }
                Some(_) => {}
            }
        }
        findings
    }

    /// In one line.
    pub fn verdict(&self) -> String {
        let seconds = self.took.as_secs();
        match (self.booted, self.timed_out, self.done) {
            (false, ..) => format!("did not boot ({seconds} s)"),
            (true, true, _) => format!("did not end within {seconds} s"),
            (true, false, false) => format!("gave up after {seconds} s; see console.log"),
            (true, false, true) => {
                let tier = |tier| format!("tier {tier}: {}", self.tier(tier));
                format!("{}, {}, {seconds} s", tier(2), tier(3))
            }
        }
    }

    /// Tests of a tier: how many of them passed.
    fn tier(&self, tier: u8) -> String {
        let suites = || self.suites.iter().filter(|suite| suite.tier == tier);
        let passed: usize = suites().map(|suite| suite.passed).sum();
        let failed: usize = suites().map(|suite| suite.failed.len()).sum();
        match (suites().count(), suites().all(|suite| suite.status.is_some()), failed) {
            (0, ..) => "-".to_owned(),
            (_, false, _) => format!("{passed} passed, then no end"),
            (_, true, 0) => format!("{passed} passed"),
            (_, true, failed) => format!("{failed} of {} failed", passed + failed),
        }
    }

    fn loads(&self) -> &'static str {
        let programs = self.suites.iter().find(|suite| suite.name == "programs");
        match programs {
            Some(suite) if suite.is_good() && suite.passed > 0 => "yes",
            Some(suite) if !suite.is_good() => "no",
            _ => "-",
        }
    }
}

/// The table for the terminal.
pub fn table(reports: &[Report]) -> String {
    let mut rows =
        vec![["kernel", "booted", "lacks", "loaded", "tier 2", "tier 3", "time"].map(str::to_owned).to_vec()];
    for report in reports {
        rows.push(vec![
            report.release.clone(),
            if report.booted { "yes" } else { "no" }.to_owned(),
            lacks(report),
            report.loads().to_owned(),
            report.tier(2),
            report.tier(3),
            format!("{} s", report.took.as_secs()),
        ]);
    }
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut table = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let _ = writeln!(table, "{}", cells.join("  ").trim_end());
    }
    table
}

fn lacks(report: &Report) -> String {
    let missing: Vec<&str> =
        report.features.iter().filter(|(_, there)| !there).map(|(name, _)| name.as_str()).collect();
    match (report.features.is_empty(), missing.is_empty()) {
        (true, _) => "?".to_owned(),
        (false, true) => "nothing".to_owned(),
        (false, false) => missing.join(" "),
    }
}

/// Where the generated part of the page begins and ends.
const BEGIN: &str = "<!-- written by cargo xtask kernels -->\n";
const END: &str = "<!-- end -->\n";

/// Writes the tables into the page, which has them between two comments.
pub fn write_page(path: &Path, reports: &[Report]) -> Result<()> {
    let page = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let (head, rest) = page.split_once(BEGIN).with_context(|| format!("{} lacks {BEGIN}", path.display()))?;
    let (_, tail) = rest.split_once(END).with_context(|| format!("{} lacks {END}", path.display()))?;
    let page = format!("{head}{BEGIN}\n{}\n{END}{tail}", markdown(reports));
    fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))
}

fn markdown(reports: &[Report]) -> String {
    let mut text =
        "| kernel | lacks | programs load | tier 2 | tier 3 |\n| --- | --- | --- | --- | --- |\n".to_owned();
    for report in reports {
        let Report { release, .. } = report;
        let (lacks, loads) = (lacks(report), report.loads());
        let _ = writeln!(text, "| {release} | {lacks} | {loads} | {} | {} |", report.tier(2), report.tier(3));
    }
    let mut features: BTreeMap<usize, &str> = BTreeMap::new();
    for (i, (name, _)) in reports.iter().flat_map(|report| report.features.iter().enumerate()) {
        features.entry(i).or_insert(name);
    }
    text += "\n| feature |";
    for report in reports {
        let _ = write!(text, " {} |", short(&report.release));
    }
    let _ = writeln!(text, "\n| --- |{}", " --- |".repeat(reports.len()));
    for name in features.values() {
        let _ = write!(text, "| `{name}` |");
        for report in reports {
            let there = report.features.iter().find(|(other, _)| other == name).map(|(_, there)| *there);
            let _ = write!(text, " {} |", there.map_or("?", |there| if there { "yes" } else { "no" }));
        }
        text.push('\n');
    }
    text
}

/// `5.10` of `5.10.0-46-cloud-amd64`.
fn short(release: &str) -> String {
    release.split('.').take(2).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "# up 2.11 5.10.0-46-cloud-amd64\n\n# begin 2.20 2:kernel\nrunning 1 test\n\
                        test needs ... feature btf yes\nfeature btf yes\nfeature tcx no\nok\n\n\
                        test result: ok. 1 passed; 0 failed; 0 ignored\n\n# end 2.90 2:kernel 0\n\n\
                        # begin 3.00 2:programs\ntest load ... ok\ntest result: ok. 3 passed; 0 failed; 0 ignored\n\
                        # end 9.00 2:programs 0\n# begin 9.1 3:nodes\ntest result: ok. 6 passed; 0 failed\n\
                        # end 20.0 3:nodes 0\n# done 21.00\n";

    fn read(text: &str) -> Report {
        Report::read("5.10", text)
    }

    #[test]
    fn a_guest_that_did_everything_has_passed() {
        let report = read(GOOD);
        assert!(report.passed() && report.is_complete() && report.findings().is_empty(), "{report:?}");
        assert_eq!(report.features, [("btf".to_owned(), true), ("tcx".to_owned(), false)]);
        assert_eq!(report.verdict(), "tier 2: 4 passed, tier 3: 6 passed, 0 s");
        let table = table(std::slice::from_ref(&report));
        assert!(table.contains("5.10.0-46-cloud-amd64  yes     tcx    yes"), "{table}");
        let markdown = markdown(&[report]);
        assert!(
            markdown.contains("| 5.10.0-46-cloud-amd64 | tcx | yes | 4 passed | 6 passed |"),
            "{markdown}"
        );
        assert!(
            markdown.contains("| feature | 5.10 |\n| --- | --- |\n| `btf` | yes |\n| `tcx` | no |"),
            "{markdown}"
        );
    }

    #[test]
    fn whatever_is_missing_is_a_failure() {
        assert_eq!(read("").verdict(), "did not boot (0 s)");
        assert_eq!(read("").release, "5.10");
        assert_eq!(read(&GOOD.replace("3 passed; 0 failed", "0 passed; 0 failed")).loads(), "-");
        for (text, findings) in [
            (GOOD.replace("# done 21.00\n", ""), 0),
            (GOOD.replace("# end 20.0 3:nodes 0\n# done 21.00\n", ""), 1),
            (GOOD.replace("3:nodes 0", "3:nodes 139"), 1),
            (GOOD.replace("test load ... ok", "test load ... FAILED"), 1),
            (GOOD.replace("3 passed; 0 failed", "1 passed; 2 failed"), 2),
        ] {
            let report = read(&text);
            assert!(!report.passed(), "{text}");
            assert_eq!(report.findings().len(), findings, "{:?}", report.findings());
        }
        let report = Report { timed_out: true, ..read(GOOD) };
        assert!(!report.passed() && !report.is_complete());
    }

    #[test]
    fn failed_tests_are_named() {
        let report = read(&GOOD.replace("test load ... ok", "test a::b ... FAILED"));
        assert_eq!(report.findings(), ["programs: a::b failed"]);
        assert_eq!((report.loads(), report.tier(2).as_str()), ("no", "1 of 5 failed"));
    }
}
