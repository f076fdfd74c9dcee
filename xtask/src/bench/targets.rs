//! What the medians of a run should be, and by how much they are.

use super::results::{Results, Series};

/// A bound, and what it bounds.
pub struct Target {
    pub text: &'static str,
    measure: Measure,
    bound: Bound,
    unit: &'static str,
}

#[derive(Clone, Copy)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

/// What is compared with a bound: the worst of all series that are meant.
#[derive(Clone, Copy)]
enum Measure {
    Median(Which),
    /// Of the median of each to that of another variant of the same situation.
    Beside(Which, &'static str),
    /// Of the median of each to that of the series with another name, and of the same family.
    Against(Which, &'static str),
    /// Of the median of each to that of the same with one Service.
    Services(Which),
}

/// Series of a group by name, and, where it is told, by family, number of flows and of Services, and the way of connections.
#[derive(Clone, Copy)]
struct Which {
    group: &'static str,
    whats: &'static [&'static str],
    variant: &'static str,
    family: Option<&'static str>,
    flows: Option<&'static str>,
    services: Option<&'static str>,
    ways: Option<&'static [&'static str]>,
}

const fn all(group: &'static str, whats: &'static [&'static str], variant: &'static str) -> Which {
    Which { group, whats, variant, family: None, flows: None, services: None, ways: None }
}

const fn packet(whats: &'static [&'static str], flows: &'static str) -> Which {
    Which { flows: Some(flows), ..all("packet", whats, "fairlead") }
}

const fn of(family: &'static str, which: Which) -> Which {
    Which { family: Some(family), ..which }
}

/// From pod to pod.
const fn sockets(whats: &'static [&'static str], variant: &'static str) -> Which {
    Which { ways: Some(&["same node", "other node"]), ..all("sockets", whats, variant) }
}

/// With 10,000 Services.
const fn control(whats: &'static [&'static str]) -> Which {
    Which { services: Some("10000"), ..all("control", whats, "fairlead") }
}

const NODE_PORT: [&str; 1] = ["nodeport-here"];

/// Every target.
pub const TARGETS: &[Target] = &[
    at_most(
        "established NodePort through XDP, 1 flow, IPv4",
        Measure::Median(of("IPv4", packet(&NODE_PORT, "1"))),
        60.0,
        "ns",
    ),
    at_most(
        "established NodePort through XDP, 1 flow, IPv6",
        Measure::Median(of("IPv6", packet(&NODE_PORT, "1"))),
        75.0,
        "ns",
    ),
    at_most(
        "the same to a backend elsewhere, live frames, against swap and XDP_TX",
        Measure::Beside(packet(&["live-nodeport-there"], "1"), "swap-and-tx"),
        1.5,
        "times",
    ),
    at_most("100,000 flows in random order", Measure::Median(packet(&NODE_PORT, "100000")), 400.0, "ns"),
    at_most(
        "established ClusterIP from a pod, tc",
        Measure::Median(packet(&["clusterip"], "1")),
        170.0,
        "ns",
    ),
    at_most(
        "new flow, both entries written",
        Measure::Median(packet(&["new-nodeport-here", "new-nodeport-there", "new-clusterip"], "new")),
        900.0,
        "ns",
    ),
    at_most("packet that is not ours, NIC", Measure::Median(packet(&["not-ours"], "1")), 25.0, "ns"),
    at_most("packet that is not ours, pod", Measure::Median(packet(&["not-ours-pod"], "1")), 30.0, "ns"),
    at_most(
        "packet of a SYN flood against one of an established flow",
        Measure::Against(packet(&["flood-nodeport-here"], "new"), "nodeport-here"),
        1.3,
        "times",
    ),
    at_most(
        "many Services against one, every kind of packet",
        Measure::Services(all("packet", &[], "fairlead")),
        1.1,
        "times",
    ),
    at_least(
        "connect, request, close: pod to ClusterIP against direct, tc",
        Measure::Beside(sockets(&["connect"], "tc"), "direct"),
        0.95,
        "times",
    ),
    at_least(
        "the same, socket-lb=all",
        Measure::Beside(sockets(&["connect"], "socket-lb"), "direct"),
        0.98,
        "times",
    ),
    at_least(
        "request and response against direct, tc",
        Measure::Beside(sockets(&["request"], "tc"), "direct"),
        0.97,
        "times",
    ),
    at_least(
        "stream against direct, offloads on and off, tc",
        Measure::Beside(sockets(&["stream", "stream-no-offloads"], "tc"), "direct"),
        0.97,
        "times",
    ),
    at_most(
        "one endpoint changed at 10,000 Services, p99 to the map",
        Measure::Median(control(&["one endpoint changed, p99"])),
        5.0,
        "ms",
    ),
    at_most(
        "cold start, 10,000 Services with 10 endpoints",
        Measure::Median(control(&["cold start"])),
        1000.0,
        "ms",
    ),
    at_most(
        "memory of the agent with them",
        Measure::Median(control(&["memory of the agent, peak"])),
        100.0,
        "MiB",
    ),
];

const fn at_most(text: &'static str, measure: Measure, bound: f64, unit: &'static str) -> Target {
    Target { text, measure, bound: Bound::AtMost(bound), unit }
}

const fn at_least(text: &'static str, measure: Measure, bound: f64, unit: &'static str) -> Target {
    Target { text, measure, bound: Bound::AtLeast(bound), unit }
}

/// How a run did.
#[derive(Clone, PartialEq, Debug)]
pub struct Outcome {
    pub measured: String,
    pub verdict: String,
}

impl Target {
    /// `None`: it was not measured.
    pub fn judge(&self, results: &Results) -> Option<Outcome> {
        let values = self.measure.values(results);
        let (worst, reached, bound) = match self.bound {
            Bound::AtMost(bound) => {
                let worst = values.into_iter().reduce(f64::max)?;
                (worst, worst <= bound, bound)
            }
            Bound::AtLeast(bound) => {
                let worst = values.into_iter().reduce(f64::min)?;
                (worst, worst >= bound, bound)
            }
        };
        let verdict = if reached {
            "reached".to_owned()
        } else {
            format!("missed by {:.0} %", ((worst / bound - 1.0) * 100.0).abs().ceil())
        };
        Some(Outcome { measured: self.show(worst), verdict })
    }

    /// The bound, in words.
    pub fn bound(&self) -> String {
        match self.bound {
            Bound::AtMost(bound) => format!("at most {}", self.show(bound)),
            Bound::AtLeast(bound) => format!("at least {}", self.show(bound)),
        }
    }

    fn show(&self, value: f64) -> String {
        let digits = if self.unit == "times" { 2 } else { 0 };
        format!("{value:.digits$} {}", self.unit)
    }
}

impl Measure {
    fn values(self, results: &Results) -> Vec<f64> {
        let median = |series: &Series| series.summary().map(|summary| summary.median);
        let ratio = |of: &Series, to: Option<&Series>| Some(median(of)? / median(to?)?);
        match self {
            Self::Median(which) => which.all(results).filter_map(median).collect(),
            Self::Beside(which, variant) => {
                let all = which.all(results);
                all.filter_map(|series| ratio(series, results.beside(series, variant))).collect()
            }
            Self::Against(which, what) => {
                let other = |series: &Series| {
                    results.series.iter().find(|other| {
                        (other.group.as_str(), other.what.as_str()) == (which.group, what)
                            && other.variant == series.variant
                            && other.axis("family") == series.axis("family")
                            && other.axis("services") == series.axis("services")
                            && other.axis("flows") == "1"
                    })
                };
                which.all(results).filter_map(|series| ratio(series, other(series))).collect()
            }
            Self::Services(which) => {
                let one = |series: &Series| {
                    let mut axes = series.axes.clone();
                    axes.insert("services".to_owned(), "1".to_owned());
                    results.series.iter().find(|other| {
                        (&other.group, &other.what, &other.variant)
                            == (&series.group, &series.what, &series.variant)
                            && other.axes == axes
                    })
                };
                let many = which.all(results).filter(|series| !matches!(series.axis("services"), "" | "1"));
                many.filter_map(|series| ratio(series, one(series))).collect()
            }
        }
    }
}

impl Which {
    /// Series that are meant.
    fn all(self, results: &Results) -> impl Iterator<Item = &Series> {
        results.series.iter().filter(move |series| {
            series.group == self.group
                && (self.whats.is_empty() || self.whats.contains(&series.what.as_str()))
                && series.variant == self.variant
                && self.family.is_none_or(|family| series.axis("family") == family)
                && self.flows.is_none_or(|flows| series.axis("flows") == flows)
                && self.services.is_none_or(|services| series.axis("services") == services)
                && self.ways.is_none_or(|ways| ways.contains(&series.axis("way")))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::Machine;

    fn series(what: &str, variant: &str, axes: [&str; 3], samples: &[f64]) -> Series {
        let names = ["family", "flows", "services"];
        Series {
            group: "packet".to_owned(),
            what: what.to_owned(),
            variant: variant.to_owned(),
            unit: "ns".to_owned(),
            axes: names
                .into_iter()
                .zip(axes)
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            samples: samples.to_vec(),
        }
    }

    fn judge(text: &str, series: &[Series]) -> Option<(String, String)> {
        let results =
            Results { machine: Machine::default(), command: String::new(), series: series.to_vec() };
        let target = TARGETS.iter().find(|target| target.text == text).expect("a target of ours");
        target.judge(&results).map(|outcome| (outcome.measured, outcome.verdict))
    }

    /// What [`judge`] says.
    fn said(measured: &str, verdict: &str) -> (String, String) {
        (measured.to_owned(), verdict.to_owned())
    }

    #[test]
    fn a_median_is_compared_with_its_bound() {
        let text = "established NodePort through XDP, 1 flow, IPv4";
        let of = |family: &str, flows: &str, ns: f64| {
            series("nodeport-here", "fairlead", [family, flows, "1"], &[ns])
        };
        assert_eq!(judge(text, &[]), None);
        assert_eq!(judge(text, &[of("IPv6", "1", 90.0), of("IPv4", "1000", 90.0)]), None);
        assert_eq!(judge(text, &[of("IPv4", "1", 60.0)]), Some(said("60 ns", "reached")));
        assert_eq!(
            judge(text, &[of("IPv4", "1", 90.0), of("IPv4", "1", 30.0)]),
            Some(said("90 ns", "missed by 50 %"))
        );
    }

    #[test]
    fn ratios_are_within_one_situation() {
        let text = "the same to a backend elsewhere, live frames, against swap and XDP_TX";
        let of = |variant: &str, family: &str, ns: f64| {
            series("live-nodeport-there", variant, [family, "1", "1"], &[ns])
        };
        let all =
            [of("swap-and-tx", "IPv4", 100.0), of("fairlead", "IPv4", 140.0), of("fairlead", "IPv6", 900.0)];
        assert_eq!(judge(text, &all), Some(said("1.40 times", "reached")));
        let text = "many Services against one, every kind of packet";
        let of = |services: &str, ns: f64| series("not-ours", "fairlead", ["IPv4", "1", services], &[ns]);
        assert_eq!(judge(text, &[of("1", 20.0)]), None);
        assert_eq!(
            judge(text, &[of("1", 20.0), of("10000", 30.0)]),
            Some(said("1.50 times", "missed by 37 %"))
        );
        let text = "packet of a SYN flood against one of an established flow";
        let all = [
            series("flood-nodeport-here", "fairlead", ["IPv4", "new", "1"], &[130.0]),
            series("nodeport-here", "fairlead", ["IPv4", "1", "1"], &[100.0]),
            series("nodeport-here", "fairlead", ["IPv6", "1", "1"], &[10.0]),
        ];
        assert_eq!(judge(text, &all), Some(said("1.30 times", "reached")));
    }
}
