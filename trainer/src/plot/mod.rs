//! Pictures of runs, as SVG or PNG. No fonts of the system are needed.
//!
//! - [`curves`]: one run. [`compare`]: several runs over each other. [`learning`]: how fast they
//!   learn.
//! - `panel`: what a panel shows, as data. `axis`: ranges and ticks. `render`: draws panels.

mod axis;
mod compare;
mod curves;
mod learning;
mod panel;
mod render;

pub use learning::{LearningCurve, Standing};

use crate::metrics::{MetricsError, StepMetrics, log};
use std::path::{Path, PathBuf};

/// Why a picture could not be drawn.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    /// There is nothing to draw.
    #[error("there are no steps to draw")]
    Empty,
    /// The name of the file does not say which format is wanted.
    #[error("{}: the name must end in .svg or .png", .0.display())]
    Format(PathBuf),
    /// The file cannot be written, or the drawing failed.
    #[error("cannot draw {}: {reason}", path.display())]
    Draw { path: PathBuf, reason: String },
    /// The metrics cannot be read.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
}

/// Draws one run: reward, entropy, dropped tokens, and time by phase. The extension of `path`
/// (`svg` or `png`) names the format.
///
/// # Errors
/// No steps, another extension, or a file that cannot be written.
pub fn curves(steps: &[StepMetrics], path: &Path) -> Result<(), PlotError> {
    if steps.is_empty() {
        return Err(PlotError::Empty);
    }
    render::save(&curves::panels(steps), path)
}

/// Draws several runs over each other: entropy, reward, share of mixed groups, and predicted
/// against measured entropy change. The extension of `path` (`svg` or `png`) names the format.
///
/// # Errors
/// No steps in any run, another extension, or a file that cannot be written.
pub fn compare(runs: &[(String, Vec<StepMetrics>)], path: &Path) -> Result<(), PlotError> {
    if runs.iter().all(|(_, steps)| steps.is_empty()) {
        return Err(PlotError::Empty);
    }
    render::save(&compare::panels(runs), path)
}

/// Draws how fast runs learn: reward against seconds, and against samples. The extension of `path`
/// (`svg` or `png`) names the format.
///
/// # Errors
/// No point in any curve, another extension, or a file that cannot be written.
pub fn learning(curves: &[LearningCurve], path: &Path) -> Result<(), PlotError> {
    if curves.iter().all(|(_, points)| points.is_empty()) {
        return Err(PlotError::Empty);
    }
    render::save(&learning::panels(curves), path)
}

/// Draws `curves.svg` and `curves.png` of a run folder from its `metrics.jsonl`.
///
/// # Errors
/// The metrics cannot be read or are empty, or a picture cannot be written.
pub fn run_folder(dir: &Path) -> Result<(), PlotError> {
    let steps = log::read(&dir.join("metrics.jsonl"))?;
    curves(&steps, &dir.join("curves.svg"))?;
    curves(&steps, &dir.join("curves.png"))
}
