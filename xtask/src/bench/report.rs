//! Tables of what was measured, for the terminal and for docs/benchmarks.md.

use std::fmt::Write as _;

use super::results::{FLOOR, Machine, Results, Series, Summary};
use super::targets::TARGETS;

/// Variants that others are compared with, in the order of preference.
const BASES: [&str; 3] = ["direct", "swap-and-tx", "katran-like"];
/// Axes, as columns.
pub const AXES: [&str; 7] = ["way", "family", "flows", "services", "source", "entries", "cpus"];

/// A group and what it is about.
struct Group {
    name: &'static str,
    about: &'static str,
}

const GROUPS: [Group; 6] = [
    Group {
        name: "packet",
        about: "One packet through a loaded program (`BPF_PROG_TEST_RUN`), in ns above the floor: what it takes to write the \
                packet and to call a program that does nothing, in the same round. Flows come in random order. `live` \
                are frames that are really sent (`BPF_F_TEST_XDP_LIVE_FRAMES`), with all that the kernel does about it. \
                `here` and `there` say on which node the backend is; with `dsr` it answers the client itself, and gets the \
                packet in a tunnel. `new` flows find room in their table, those of a `flood` do not. `idle` flows were silent \
                for more than a second: the first packet after that is noted in both halves. So were those beyond 100,000, \
                which are in a larger table; the others go on as busy connections do.",
    },
    Group {
        name: "flows",
        about: "New flows per second, until their table is full and beyond, and what it takes to look through a table for \
                flows that are over.",
    },
    Group {
        name: "sockets",
        about: "Real sockets between namespaces. `direct` asks the backend itself; `tc` and `socket-lb` are Fairlead, at \
                the pod's edge and with `--socket-lb=all`, `tc-dsr` with `--mode dsr`; `nftables-N` and `iptables-N` are rules of the shape that \
                kube-proxy writes, for N Services.",
    },
    Group {
        name: "control",
        about: "The agent, with so many Services of 10 endpoints, from manifests and from the double of an API server.",
    },
    Group {
        name: "compare",
        about: "The same packet through programs of others: `katran-like` looks the flow up in an LRU hash, puts an IPv4 \
                header in front and sends the packet back, without NAT and without checking what it is.",
    },
    Group {
        name: "maps",
        about: "What the kernel's maps cost by themselves, for one run of a small program on each CPU: keys of 16 bytes (of \
                the trie 12, with prefixes of 24 bits in a Service), values of 64. An entry is looked up, looked up and \
                written to, or inserted, into a map with room or into a full one. On all CPUs at the same time, they \
                touch the same entry and insert entries of their own.",
    },
];

/// Everything, as Markdown. `plots`: names of files beside the page, by group.
pub fn page(results: &Results, plots: &[(String, String)]) -> String {
    let mut text = format!(
        "# Benchmarks\n\n\
         Made by `{}`; do not edit. To repeat it, run the same as root; `cargo xtask bench --help` says what can be left \
         out. The numbers of one machine mean little on another: compare what stands in one table. All variants are \
         measured in turns, in many short rounds, so that whatever else the machine does meets all of them; given are \
         medians and, in brackets, quartiles of these rounds.\n\n{}\n",
        results.command,
        place(results),
    );
    text += "\n## Targets\n\n";
    text += &targets(results);
    for group in &GROUPS {
        let of_group: Vec<_> = results.series.iter().filter(|series| series.group == group.name).collect();
        if of_group.is_empty() {
            continue;
        }
        let _ = write!(text, "\n## {}\n\n{}\n\n", group.name, group.about);
        for (_, file) in plots.iter().filter(|(name, _)| name == group.name) {
            let _ = write!(text, "![{}]({file})\n\n", group.name);
        }
        text += &table(results, &of_group);
    }
    text
}

/// Where it was measured.
fn place(results: &Results) -> String {
    let Machine { kernel, cpu, cpus, load_before, load_after } = &results.machine;
    if results.series.is_empty() {
        return "Nothing has been measured yet.".to_owned();
    }
    format!(
        "Measured on Linux {kernel}, {cpu}, {cpus} CPUs, with a load average of {load_before:.2} before and \
         {load_after:.2} after."
    )
}

/// The targets, and how the run did.
pub fn targets(results: &Results) -> String {
    let mut rows = vec![["what", "target", "measured", ""].map(str::to_owned).to_vec()];
    for target in TARGETS {
        let (measured, verdict) = match target.judge(results) {
            Some(outcome) => (outcome.measured, outcome.verdict),
            None => ("–".to_owned(), "not measured".to_owned()),
        };
        rows.push(vec![target.text.to_owned(), target.bound(), measured, verdict]);
    }
    markdown(&rows)
}

/// The series of a group.
pub fn table(results: &Results, group: &[&Series]) -> String {
    let axes: Vec<_> =
        AXES.into_iter().filter(|axis| group.iter().any(|s| !s.axis(axis).is_empty())).collect();
    let has_floor = group.iter().any(|series| series.variant == FLOOR);
    let has_base = group.iter().any(|series| BASES.contains(&series.variant.as_str()));
    let mut head = vec!["what"];
    head.extend(&axes);
    head.extend(["variant", "median (quartiles)"]);
    head.extend(has_base.then_some("ratio"));
    head.extend(has_floor.then_some("floor"));
    let mut rows = vec![head.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    for series in group.iter().filter(|series| series.variant != FLOOR) {
        let Some(summary) = series.summary() else { continue };
        let mut row = vec![series.what.clone()];
        row.extend(axes.iter().map(|axis| thousands(series.axis(axis))));
        row.extend([series.variant.clone(), show(summary, &series.unit)]);
        if has_base {
            row.push(ratio(results, series, summary).unwrap_or_default());
        }
        if has_floor {
            let floor = results.beside(series, FLOOR).and_then(Series::summary);
            row.push(floor.map(|floor| number(floor.median)).unwrap_or_default());
        }
        rows.push(row);
    }
    markdown(&rows)
}

/// Its median to that of what it is compared with.
fn ratio(results: &Results, series: &Series, summary: Summary) -> Option<String> {
    let base = BASES.iter().find_map(|base| results.beside(series, base))?;
    let base = base.summary()?.median;
    (base != 0.0).then(|| format!("{:.2}", summary.median / base))
}

fn show(summary: Summary, unit: &str) -> String {
    let Summary { lower, median, upper } = summary;
    format!("{} {unit} ({}–{})", number(median), number(lower), number(upper))
}

/// Three digits, or all before the point.
pub fn number(value: f64) -> String {
    match value.abs() {
        0.0..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => thousands(&format!("{value:.0}")),
    }
}

/// A whole number with commas; what is none stays as it is.
fn thousands(text: &str) -> String {
    let (sign, digits) = text.strip_prefix('-').map_or(("", text), |digits| ("-", digits));
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.to_owned();
    }
    let mut out = sign.to_owned();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A table that reads well as text, too. The first row is the head.
fn markdown(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0).max(3)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        text.push('|');
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(text, " {cell:width$} |");
        }
        text.push('\n');
        if index == 0 {
            text.push('|');
            for width in &widths {
                let _ = write!(text, " {} |", "-".repeat(*width));
            }
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(what: &str, variant: &str, samples: &[f64]) -> Series {
        Series {
            group: "sockets".to_owned(),
            what: what.to_owned(),
            variant: variant.to_owned(),
            unit: "1/s".to_owned(),
            axes: [("services".to_owned(), "10000".to_owned())].into(),
            samples: samples.to_vec(),
        }
    }

    fn results() -> Results {
        let series = vec![
            series("connect", "direct", &[2000.0]),
            series("connect", "tc", &[1000.0, 1500.0, 2000.0]),
            series("connect", FLOOR, &[12.0]),
        ];
        Results { machine: Machine::default(), command: "cargo xtask bench".to_owned(), series }
    }

    #[test]
    fn numbers_have_three_digits_or_more() {
        assert_eq!(
            [1.0 / 3.0, 12.345, 123.4, 1_234_567.8, -1234.0].map(number),
            ["0.33", "12.3", "123", "1,234,568", "-1,234"]
        );
        assert_eq!(["new", "100000", "", "IPv4"].map(thousands), ["new", "100,000", "", "IPv4"]);
    }

    #[test]
    fn a_table_has_ratios_and_the_floor() {
        let results = results();
        let all: Vec<_> = results.series.iter().collect();
        let text = table(&results, &all);
        let want = "\
| what    | services | variant | median (quartiles)      | ratio | floor |
| ------- | -------- | ------- | ----------------------- | ----- | ----- |
| connect | 10,000   | direct  | 2,000 1/s (2,000–2,000) | 1.00  | 12.0  |
| connect | 10,000   | tc      | 1,500 1/s (1,250–1,750) | 0.75  | 12.0  |
";
        assert_eq!(text, want);
    }

    #[test]
    fn the_page_says_what_was_measured_where_and_what_was_not() {
        let mut results = results();
        for series in &mut results.series {
            series.axes.insert("way".to_owned(), "other node".to_owned());
        }
        let text = page(&results, &[("sockets".to_owned(), "benchmarks/sockets.svg".to_owned())]);
        for part in [
            "`cargo xtask bench`",
            "## sockets",
            "](benchmarks/sockets.svg)",
            "not measured",
            "missed by 22 %",
        ] {
            assert!(text.contains(part), "{part}:\n{text}");
        }
        let nothing = Results { series: Vec::new(), ..results };
        assert!(page(&nothing, &[]).contains("Nothing has been measured yet."));
        assert!(!text.contains("## packet") && !text.contains("NaN"), "{text}");
    }
}
