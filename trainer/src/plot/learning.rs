//! Two panels that compare how fast runs learn: by the clock, and by samples.

use super::{
    axis::Axis,
    panel::{Layer, Panel, Point, Shape, color},
};
use serde::Serialize;

/// Where a run stood at one time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Standing {
    /// Seconds since it began.
    pub seconds: f64,
    /// Samples that it had been trained on.
    pub samples: f64,
    /// Mean reward on held-out problems.
    pub reward: f64,
}

/// A run's name, and where it stood from its beginning on.
pub type LearningCurve = (String, Vec<Standing>);

/// Reward against seconds and against samples.
pub(super) fn panels(curves: &[LearningCurve]) -> Vec<Panel> {
    vec![
        panel(curves, "Reward by the clock", "seconds", |at| at.seconds),
        panel(curves, "Reward by samples", "samples trained on", |at| at.samples),
    ]
}

fn panel(curves: &[LearningCurve], title: &str, label: &str, of: fn(&Standing) -> f64) -> Panel {
    let all = || curves.iter().flat_map(|(_, points)| points);
    let layer = |(index, (name, points)): (usize, &LearningCurve)| {
        let line: Vec<Point> = points.iter().map(|at| (of(at), at.reward)).collect();
        Layer::new(name, color(index), Shape::Line(line))
    };
    Panel {
        title: title.into(),
        x: Axis::from_zero(label, all().map(of)),
        y: Axis::from_zero("mean reward, held-out problems", all().map(|at| at.reward)),
        right: None,
        layers: curves.iter().enumerate().map(layer).collect(),
        if_empty: "nothing was evaluated".into(),
    }
}
