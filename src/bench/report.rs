//! What a benchmark says: every run of everything measured, as data.

use super::{
    machine::{Machine, Versions},
    roofline::{Need, Rates},
};
use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::{fs, path::Path};

/// All of it; a file of results holds one.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Report {
    /// Which benchmark.
    pub bench: String,
    /// The command line.
    pub command: Vec<String>,
    /// What was asked for.
    pub settings: Settings,
    /// Where it ran.
    pub machine: Machine,
    /// What ran.
    pub versions: Versions,
    /// The model.
    pub model: ModelFacts,
    /// What the machine could do in this run.
    pub rates: Rates,
    /// What was measured.
    pub lines: Vec<Line>,
    /// What else there is to say.
    pub notes: Vec<String>,
}

/// Settings that all benchmarks have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Settings {
    /// Seed of prompts and samples.
    pub seed: u64,
    /// Runs that do not count.
    pub warmup: usize,
    /// Runs that count.
    pub runs: usize,
    /// Threads of libtorch and the kernels.
    pub threads: usize,
}

/// The model that was measured.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ModelFacts {
    /// Its name.
    pub name: String,
    /// Its weights.
    pub parameters: usize,
    /// Operations of one token's matrix products, attention not counted, in 10^9.
    pub gflop_per_token: f64,
}

/// One thing that was measured.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Line {
    /// What was done; lines of one group compare with each other.
    pub group: String,
    /// Who did it, or which part of it this is.
    pub name: String,
    /// Unit of the values.
    pub unit: String,
    /// The middle one.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// The value of every run.
    pub runs: Vec<f64>,
    /// How it stands to what the machine can do; none where that says nothing.
    pub roofline: Option<Roofline>,
}

/// How a measurement stands to the machine's limit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Roofline {
    /// What the work needs.
    pub need: Need,
    /// The value, in the line's unit, if it took only that.
    pub value: f64,
    /// Time needed over time taken.
    pub reached: f64,
}

/// What a time is shown as.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Unit {
    /// Seconds.
    Seconds,
    /// Thousandths of a second.
    Milliseconds,
    /// Millionths of a second.
    Microseconds,
    /// So many of these in the time measured, shown per second.
    PerSecond(f64, &'static str),
}

impl Unit {
    fn of(self, seconds: f64) -> f64 {
        match self {
            Self::Seconds => seconds,
            Self::Milliseconds => 1e3 * seconds,
            Self::Microseconds => 1e6 * seconds,
            Self::PerSecond(amount, _) => amount / seconds,
        }
    }

    fn name(self) -> String {
        match self {
            Self::Seconds => "s".into(),
            Self::Milliseconds => "ms".into(),
            Self::Microseconds => "us".into(),
            Self::PerSecond(_, what) => format!("{what}/s"),
        }
    }
}

impl Line {
    /// Times, in seconds, shown in a unit, and what the work needs if that is known.
    ///
    /// # Panics
    /// If there is no time.
    pub fn times(group: &str, name: &str, unit: Unit, seconds: &[f64], need: Option<Need>) -> Self {
        let values = seconds.iter().map(|&seconds| unit.of(seconds)).collect();
        let roofline = need.map(|need| Roofline {
            need,
            value: unit.of(need.seconds),
            reached: need.seconds / median(seconds),
        });
        Self { roofline, ..Self::values(group, name, &unit.name(), values) }
    }

    /// Values of any unit.
    ///
    /// # Panics
    /// If there is none.
    pub fn values(group: &str, name: &str, unit: &str, runs: Vec<f64>) -> Self {
        Self {
            group: group.into(),
            name: name.into(),
            unit: unit.into(),
            median: median(&runs),
            min: runs.iter().copied().fold(f64::INFINITY, f64::min),
            max: runs.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            runs,
            roofline: None,
        }
    }
}

/// The middle value; between the two middle ones of an even number.
///
/// # Panics
/// If there is none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) {
        sorted[middle - 1].midpoint(sorted[middle])
    } else {
        sorted[middle]
    }
}

impl Report {
    /// Reads a file of results.
    ///
    /// # Errors
    /// It cannot be read, or is no such file.
    pub fn read(path: &Path) -> Result<Self, anyhow::Error> {
        let text = fs::read_to_string(path);
        let text = text.with_context(|| format!("cannot read {}", path.display()))?;
        let what = || format!("{} holds no results of onpolicy bench", path.display());
        serde_json::from_str(&text).with_context(what)
    }

    /// Writes a file of results, with the folder that it lies in.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), anyhow::Error> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[7.0]), 7.0);
    }

    #[test]
    fn times_become_rates_with_a_roofline() {
        let need = Need { seconds: 1.0, ..Need::default() };
        let unit = Unit::PerSecond(100.0, "tokens");
        let line = Line::times("W1", "in process", unit, &[2.0, 4.0, 1.25], Some(need));
        assert_eq!((line.median, line.min, line.max), (50.0, 25.0, 80.0));
        assert_eq!((line.unit.as_str(), &line.runs[..]), ("tokens/s", &[50.0, 25.0, 80.0][..]));
        let roofline = line.roofline.expect("a roofline");
        assert_eq!((roofline.value, roofline.reached), (100.0, 0.5));
        let line = Line::times("W1", "step", Unit::Milliseconds, &[0.5], Some(need));
        assert_eq!((line.median, line.roofline.map(|r| r.value)), (500.0, Some(1000.0)));
    }

    #[test]
    fn a_file_holds_all_of_it() {
        let lines = vec![Line::values("g", "n", "MiB", vec![1.5, 2.5])];
        let report = Report { bench: "rollout".into(), lines, ..Report::default() };
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("new/results.json");
        report.write(&path).expect("written");
        assert_eq!(Report::read(&path).expect("read"), report);
        fs::write(&path, "{}").expect("written");
        let error = Report::read(&path).expect_err("no results");
        assert!(error.to_string().contains("holds no results"), "{error}");
    }
}
