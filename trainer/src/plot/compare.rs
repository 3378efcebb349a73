//! The four panels of several runs.

use super::{
    axis::Axis,
    panel::{Layer, Panel, Point, Shape, averaged, color, largest, step_axis, steps_per_point},
};
use crate::metrics::StepMetrics;

type Run = (String, Vec<StepMetrics>);

/// Entropy, reward, share of mixed groups, predicted against measured entropy change.
pub(super) fn panels(runs: &[Run]) -> Vec<Panel> {
    vec![
        over_steps(runs, "Entropy", "entropy, nats per token", |s| s.entropy),
        over_steps(runs, "Reward", "mean reward", |s| s.reward_mean),
        over_steps(runs, "Mixed groups", "share of groups with spread", StepMetrics::mixed_share),
        changes(runs),
    ]
}

fn over_steps(runs: &[Run], title: &str, label: &str, of: fn(&StepMetrics) -> f64) -> Panel {
    let longest = runs.iter().map(|(_, steps)| steps.len()).max().unwrap_or(0);
    let per_point = steps_per_point(longest);
    let lines: Vec<Vec<Point>> =
        runs.iter().map(|(_, steps)| averaged(steps, per_point, of)).collect();
    let y = Axis::from_zero(label, lines.iter().flatten().map(|p| p.1));
    let layer = |(index, (line, (name, _))): (usize, (Vec<Point>, &Run))| {
        Layer::new(name, color(index), Shape::Line(line))
    };
    Panel {
        title: title.into(),
        x: step_axis(runs.iter().flat_map(|(_, steps)| steps), per_point),
        y,
        right: None,
        layers: lines.into_iter().zip(runs).enumerate().map(layer).collect(),
        if_empty: "no steps".into(),
    }
}

/// One dot per step. Prediction and measurement differ by orders of magnitude, so each run's are
/// divided by their own largest magnitudes; how well they agree is the correlation.
fn changes(runs: &[Run]) -> Panel {
    let pairs: Vec<Vec<Point>> = runs.iter().map(|(_, steps)| normalised(steps)).collect();
    let all = || pairs.iter().flatten();
    let (x, y) = (
        Axis::normalised("predicted / its largest", all().map(|p| p.0)),
        Axis::normalised("measured / its largest", all().map(|p| p.1)),
    );
    let layer = |(index, (pairs, (name, _))): (usize, (Vec<Point>, &Run))| {
        let agreement = correlation(&pairs).map_or("unknown".into(), |r| format!("{r:.2}"));
        Layer::new(format!("{name}: r = {agreement}"), color(index), Shape::Dots(pairs))
    };
    Panel {
        title: "Entropy change of each update".into(),
        x,
        y,
        right: None,
        layers: pairs.into_iter().zip(runs).enumerate().map(layer).collect(),
        if_empty: "the entropy change was not measured".into(),
    }
}

/// Predicted and measured change of every step that has both.
fn normalised(steps: &[StepMetrics]) -> Vec<Point> {
    let pairs: Vec<Point> = steps
        .iter()
        .filter_map(|s| Some((s.entropy_predicted, s.entropy_measured?)))
        .filter(|(x, y)| x.is_finite() && y.is_finite())
        .collect();
    let scale = |of: fn(&Point) -> f64| match largest(pairs.iter().map(of)) {
        0.0 => 0.0,
        most => 1.0 / most,
    };
    let (x_scale, y_scale) = (scale(|p| p.0), scale(|p| p.1));
    pairs.iter().map(|(x, y)| (x * x_scale, y * y_scale)).collect()
}

/// Pearson's r; none for fewer than three points or without spread.
fn correlation(points: &[Point]) -> Option<f64> {
    if points.len() < 3 {
        return None;
    }
    let n = points.len() as f64;
    let mean = |of: fn(&Point) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (mx, my) = (mean(|p| p.0), mean(|p| p.1));
    let sum = |of: &dyn Fn(f64, f64) -> f64| -> f64 {
        points.iter().map(|(x, y)| of(x - mx, y - my)).sum()
    };
    let spread = (sum(&|x, _| x * x) * sum(&|_, y| y * y)).sqrt();
    (spread > 0.0).then(|| sum(&|x, y| x * y) / spread)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(number: u64, predicted: f64, measured: Option<f64>) -> StepMetrics {
        StepMetrics {
            step: number,
            entropy_predicted: predicted,
            entropy_measured: measured,
            ..StepMetrics::default()
        }
    }

    #[test]
    fn correlations() {
        let close = |points: &[Point], r: f64| {
            assert!((correlation(points).unwrap() - r).abs() < 1e-12);
        };
        close(&[(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)], 1.0);
        close(&[(0.0, 1.0), (1.0, 0.0), (2.0, -1.0)], -1.0);
        close(&[(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)], 0.0);
        assert_eq!(correlation(&[(0.0, 0.0), (1.0, 1.0)]), None);
        assert_eq!(correlation(&[(1.0, 0.0), (1.0, 1.0), (1.0, 2.0)]), None);
    }

    #[test]
    fn pairs_are_divided_by_their_largest_and_gaps_left_out() {
        let steps = [step(1, -2e-6, Some(-0.1)), step(2, 1e-6, None), step(3, 1e-6, Some(0.4))];
        assert_eq!(normalised(&steps), [(-1.0, -0.25), (0.5, 1.0)]);
        let unmeasured = panels(&[("run".into(), vec![step(1, 1.0, None)])]);
        assert!(unmeasured[3].layers[0].is_empty());
        assert_eq!(unmeasured[3].layers[0].label, "run: r = unknown");
    }
}
