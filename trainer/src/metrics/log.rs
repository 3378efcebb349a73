//! `metrics.jsonl`: one line per step.

use super::StepMetrics;
use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

/// Why metrics could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    /// A line is not a step.
    #[error("{} line {line}: {reason}", path.display())]
    Line { path: PathBuf, line: usize, reason: String },
}

/// An open `metrics.jsonl`. Each step is handed to the system at once, as one whole line.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Starts an empty log; what stood there before is lost.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(path: &Path) -> Result<Self, MetricsError> {
        let file = File::create(path).map_err(|e| file_error(path, e))?;
        Ok(Self { path: path.into(), file })
    }

    /// Goes on after `step`: lines of later steps are cut off, and so is a last line that a crash
    /// left unfinished. Also returns the steps that stay.
    ///
    /// # Errors
    /// The file cannot be opened, or holds a whole line that is not a step.
    pub fn resume(path: &Path, step: u64) -> Result<(Self, Vec<StepMetrics>), MetricsError> {
        let mut lines = parse(path)?;
        lines.truncate(lines.iter().take_while(|(metrics, _)| metrics.step <= step).count());
        let end = lines.last().map_or(0, |(_, end)| *end);
        let file = OpenOptions::new().append(true).open(path).map_err(|e| file_error(path, e))?;
        file.set_len(end).map_err(|e| file_error(path, e))?;
        let steps = lines.into_iter().map(|(metrics, _)| metrics).collect();
        Ok((Self { path: path.into(), file }, steps))
    }

    /// Adds a step.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn append(&mut self, metrics: &StepMetrics) -> Result<(), MetricsError> {
        let mut line = serde_json::to_string(metrics).expect("plain numbers have a JSON form");
        line.push('\n');
        let written = self.file.write_all(line.as_bytes()).and_then(|()| self.file.flush());
        written.map_err(|e| file_error(&self.path, e))
    }
}

/// Reads all steps of a log. A last line without its end is left out: a run may be writing it.
///
/// # Errors
/// The file cannot be read, or holds a whole line that is not a step.
pub fn read(path: &Path) -> Result<Vec<StepMetrics>, MetricsError> {
    Ok(parse(path)?.into_iter().map(|(metrics, _)| metrics).collect())
}

/// The steps, each with the byte after its line.
fn parse(path: &Path) -> Result<Vec<(StepMetrics, u64)>, MetricsError> {
    let bytes = std::fs::read(path).map_err(|e| file_error(path, e))?;
    let mut end = 0;
    let mut steps = Vec::new();
    for (number, line) in bytes.split_inclusive(|&byte| byte == b'\n').enumerate() {
        end += line.len() as u64;
        if line.ends_with(b"\n") {
            let metrics = serde_json::from_slice(line).map_err(|e| MetricsError::Line {
                path: path.into(),
                line: number + 1,
                reason: e.to_string(),
            })?;
            steps.push((metrics, end));
        }
    }
    Ok(steps)
}

fn file_error(path: &Path, source: std::io::Error) -> MetricsError {
    MetricsError::File { path: path.into(), source }
}
