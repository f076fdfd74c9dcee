//! What was measured, and on what: the JSON that everything else is made from.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// The variant that says what measuring itself costs; taken off the others already.
pub const FLOOR: &str = "floor";

/// One run of `cargo xtask bench`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Results {
    pub machine: Machine,
    /// The command line that repeats it.
    pub command: String,
    pub series: Vec<Series>,
}

/// Where it was measured.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Machine {
    pub kernel: String,
    pub cpu: String,
    pub cpus: usize,
    /// Load average of the minute before.
    pub load_before: f64,
    /// Load average of its last minute; the run itself is part of it.
    pub load_after: f64,
}

/// The samples of one variant in one situation, one for each round.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Series {
    pub group: String,
    /// The situation.
    pub what: String,
    pub variant: String,
    pub unit: String,
    /// What the situation is like: the family, how many flows, how many Services.
    pub axes: BTreeMap<String, String>,
    pub samples: Vec<f64>,
}

/// Median and quartiles.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Summary {
    pub lower: f64,
    pub median: f64,
    pub upper: f64,
}

impl Summary {
    /// `None` without samples.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted: Vec<f64> = samples.iter().copied().filter(|sample| sample.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            lower: quantile(&sorted, 1)?,
            median: quantile(&sorted, 2)?,
            upper: quantile(&sorted, 3)?,
        })
    }
}

/// A quartile, between the samples that it lies between.
fn quantile(sorted: &[f64], quarter: usize) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let (index, rest) = (last * quarter / 4, last * quarter % 4);
    let (below, above) = (sorted.get(index)?, sorted.get(index + 1).or(sorted.last())?);
    let part = [0.0, 0.25, 0.5, 0.75][rest];
    Some(below + (above - below) * part)
}

impl Series {
    pub fn summary(&self) -> Option<Summary> {
        Summary::of(&self.samples)
    }

    pub fn axis(&self, name: &str) -> &str {
        self.axes.get(name).map_or("", String::as_str)
    }

    /// Whether the other one is of the same situation.
    pub fn is_beside(&self, other: &Self) -> bool {
        (&self.group, &self.what, &self.axes) == (&other.group, &other.what, &other.axes)
    }
}

impl Results {
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no result of a benchmark", path.display()))
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).context("results are JSON")?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    }

    /// The series of a variant in the situation of `series`.
    pub fn beside<'a>(&'a self, series: &Series, variant: &str) -> Option<&'a Series> {
        self.series.iter().find(|other| other.variant == variant && other.is_beside(series))
    }
}

impl Machine {
    /// This one, now.
    pub fn here() -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
        let cpuinfo = read("/proc/cpuinfo")?;
        let named = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Ok(Self {
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cpu: named.map_or("unknown", |(_, name)| name).to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            load_before: load()?,
            load_after: 0.0,
        })
    }

    /// Notes the load at the end.
    pub fn finish(&mut self) -> Result<()> {
        self.load_after = load()?;
        Ok(())
    }
}

/// Load average of the last minute.
fn load() -> Result<f64> {
    let text = fs::read_to_string("/proc/loadavg").context("cannot read /proc/loadavg")?;
    text.split(' ').next().and_then(|load| load.parse().ok()).context("/proc/loadavg begins with a number")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_between_samples() {
        let of = |samples: &[f64]| Summary::of(samples).map(|s| (s.lower, s.median, s.upper));
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[7.0]), Some((7.0, 7.0, 7.0)));
        assert_eq!(of(&[4.0, 1.0, 3.0, 2.0]), Some((1.75, 2.5, 3.25)));
        assert_eq!(of(&[5.0, 1.0, 100.0, 3.0, 4.0]), Some((3.0, 4.0, 5.0)));
        // What is no number is no sample.
        assert_eq!(of(&[f64::NAN, 2.0, f64::INFINITY]), Some((2.0, 2.0, 2.0)));
    }

    #[test]
    fn results_are_read_as_they_were_written() {
        let series = Series {
            group: "packet".to_owned(),
            what: "not-ours".to_owned(),
            variant: FLOOR.to_owned(),
            unit: "ns".to_owned(),
            axes: [("flows".to_owned(), "1".to_owned())].into(),
            samples: vec![1.5, 2.0],
        };
        let results = Results {
            machine: Machine::default(),
            command: "cargo xtask bench".to_owned(),
            series: vec![series],
        };
        let dir = std::env::temp_dir().join(format!("fairlead-bench-results-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let path = dir.join("bench.json");
        results.write(&path).unwrap();
        let read = Results::read(&path);
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(read.unwrap(), results);
    }
}
