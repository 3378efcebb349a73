//! What a panel shows, as data.

use super::axis::Axis;
use crate::metrics::StepMetrics;
use plotters::style::RGBColor;

/// Okabe and Ito's palette, which people of all kinds of colour vision can tell apart; its yellow
/// is left out, for it is pale on white.
const PALETTE: [RGBColor; 6] = [
    RGBColor(0, 114, 178),   // blue
    RGBColor(230, 159, 0),   // orange
    RGBColor(0, 158, 115),   // green
    RGBColor(213, 94, 0),    // vermillion
    RGBColor(204, 121, 167), // purple
    RGBColor(86, 180, 233),  // sky
];

/// For what is left over.
pub(super) const GREY: RGBColor = RGBColor(110, 110, 110);

/// Colour number `index`; the palette repeats.
pub(super) fn color(index: usize) -> RGBColor {
    PALETTE[index % PALETTE.len()]
}

/// A pair of coordinates.
pub(super) type Point = (f64, f64);

/// A box from its lower left to its upper right corner.
pub(super) type Bar = (Point, Point);

/// How a layer is drawn.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Shape {
    Line(Vec<Point>),
    Dashed(Vec<Point>),
    Dots(Vec<Point>),
    Bars(Vec<Bar>),
}

/// One thing in a panel, and its entry in the legend.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Layer {
    pub label: String,
    pub color: RGBColor,
    pub shape: Shape,
    /// Measured by the right axis.
    pub right: bool,
}

/// A chart with its axes and legend.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Panel {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub right: Option<Axis>,
    pub layers: Vec<Layer>,
    /// Said instead of the layers if none has a point.
    pub if_empty: String,
}

impl Layer {
    /// A layer on the left axis. Points that are not finite are left out.
    pub fn new(label: impl Into<String>, color: RGBColor, shape: Shape) -> Self {
        let finite = |points: Vec<Point>| {
            points.into_iter().filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
        };
        let shape = match shape {
            Shape::Line(points) => Shape::Line(finite(points)),
            Shape::Dashed(points) => Shape::Dashed(finite(points)),
            Shape::Dots(points) => Shape::Dots(finite(points)),
            bars @ Shape::Bars(_) => bars,
        };
        Self { label: label.into(), color, shape, right: false }
    }

    /// The same on the right axis.
    pub fn on_the_right(self) -> Self {
        Self { right: true, ..self }
    }

    /// True if there is nothing to draw.
    pub fn is_empty(&self) -> bool {
        match &self.shape {
            Shape::Line(points) | Shape::Dashed(points) | Shape::Dots(points) => points.is_empty(),
            Shape::Bars(bars) => bars.is_empty(),
        }
    }
}

/// Most points of a line; more steps are averaged in groups.
pub(super) const MAX_POINTS: usize = 150;

/// How many steps each point of a line stands for.
pub(super) fn steps_per_point(steps: usize) -> usize {
    steps.div_ceil(MAX_POINTS).max(1)
}

/// One value per step, or the mean over neighbouring steps where there are many. Values that are
/// not finite are left out.
pub(super) fn averaged(
    steps: &[StepMetrics],
    per_point: usize,
    of: impl Fn(&StepMetrics) -> f64,
) -> Vec<Point> {
    let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
    let point = |group: &[StepMetrics]| {
        let finite: Vec<f64> = group.iter().map(&of).filter(|v| v.is_finite()).collect();
        let middle = mean(group.iter().map(|s| s.step as f64).collect());
        (!finite.is_empty()).then(|| (middle, mean(finite)))
    };
    steps.chunks(per_point).filter_map(point).collect()
}

/// The axis of the steps; it says how many are averaged.
pub(super) fn step_axis<'a>(
    steps: impl Iterator<Item = &'a StepMetrics>,
    per_point: usize,
) -> Axis {
    let label = match per_point {
        1 => "step".into(),
        n => format!("step (averages of {n})"),
    };
    Axis::steps(&label, steps.map(|s| s.step as f64))
}

/// Values summed up from the first on; one that is not finite counts as 0.
pub(super) fn cumulated(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let add = |sum: &mut f64, value: f64| {
        *sum += if value.is_finite() { value } else { 0.0 };
        Some(*sum)
    };
    values.scan(0.0, add).collect()
}

/// Largest finite magnitude, 0 if there is none.
pub(super) fn largest(values: impl Iterator<Item = f64>) -> f64 {
    values.filter(|v| v.is_finite()).map(f64::abs).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_steps_are_averaged_and_gaps_left_out() {
        let step = |step: u64, reward_mean: f64| StepMetrics {
            step,
            reward_mean,
            ..StepMetrics::default()
        };
        let steps =
            [step(1, 0.0), step(2, 1.0), step(3, f64::NAN), step(4, 0.5), step(5, f64::NAN)];
        let reward = |s: &StepMetrics| s.reward_mean;
        assert_eq!(averaged(&steps, 2, reward), [(1.5, 0.5), (3.5, 0.5)]);
        assert_eq!(averaged(&steps, 1, reward), [(1.0, 0.0), (2.0, 1.0), (4.0, 0.5)]);
        assert_eq!([1, 150, 151, 600].map(steps_per_point), [1, 1, 2, 4]);
        assert_eq!(step_axis(steps.iter(), 2).label, "step (averages of 2)");
    }

    #[test]
    fn sums_go_over_gaps() {
        assert_eq!(cumulated([1.0, f64::NAN, 2.0].into_iter()), [1.0, 1.0, 3.0]);
        assert_eq!(largest([1.0, f64::NAN, -2.0].into_iter()), 2.0);
        assert_eq!(largest(std::iter::empty()), 0.0);
    }
}
