//! The four panels of one run.

use super::{
    axis::Axis,
    panel::{
        GREY, Layer, Panel, Point, Shape, averaged, color, cumulated, largest, step_axis,
        steps_per_point,
    },
};
use crate::metrics::{Seconds, StepMetrics};

/// With more bars than this, there are no gaps between them.
const SPACED_BARS: usize = 60;

/// Reward, entropy, dropped tokens, time by phase.
pub(super) fn panels(steps: &[StepMetrics]) -> Vec<Panel> {
    vec![reward(steps), entropy(steps), dropped(steps), time(steps)]
}

fn x_axis(steps: &[StepMetrics]) -> Axis {
    step_axis(steps.iter(), steps_per_point(steps.len()))
}

fn points(steps: &[StepMetrics], of: impl Fn(&StepMetrics) -> f64) -> Vec<Point> {
    averaged(steps, steps_per_point(steps.len()), of)
}

fn reward(steps: &[StepMetrics]) -> Panel {
    let rewards = points(steps, |s| s.reward_mean);
    let mixed = points(steps, StepMetrics::mixed_share);
    Panel {
        title: "Reward".into(),
        x: x_axis(steps),
        y: Axis::from_zero("reward, share", rewards.iter().chain(&mixed).map(|p| p.1).chain([1.0])),
        right: None,
        layers: vec![
            Layer::new("mean reward", color(0), Shape::Line(rewards)),
            Layer::new("share of mixed groups", color(1), Shape::Dashed(mixed)),
        ],
        if_empty: "no rewards".into(),
    }
}

/// Entropy on the left. On the right what the updates did to it and were predicted to do, summed
/// up; the two differ by orders of magnitude (the prediction leaves out how positions share
/// parameters), so each is divided by its own largest magnitude.
fn entropy(steps: &[StepMetrics]) -> Panel {
    let entropies = points(steps, |s| s.entropy);
    let predicted = cumulated(steps.iter().map(|s| s.entropy_predicted));
    let measured: Vec<&StepMetrics> =
        steps.iter().filter(|s| s.entropy_measured.is_some()).collect();
    let changes = cumulated(measured.iter().filter_map(|s| s.entropy_measured));
    let (most_measured, measured) = normalised(measured.iter().map(|s| s.step), &changes);
    let (most_predicted, predicted) = normalised(steps.iter().map(|s| s.step), &predicted);
    let both = measured.iter().chain(&predicted).map(|p| p.1);
    let right = Axis::normalised("summed change / its largest", both);
    let mut layers = vec![Layer::new("entropy", color(0), Shape::Line(entropies.clone()))];
    if !measured.is_empty() {
        let label = format!("measured change (largest {} nats)", short(most_measured));
        layers.push(Layer::new(label, color(1), Shape::Line(measured)).on_the_right());
    }
    let label = format!("predicted change (largest {} nats)", short(most_predicted));
    layers.push(Layer::new(label, color(3), Shape::Dashed(predicted)).on_the_right());
    Panel {
        title: "Entropy".into(),
        x: x_axis(steps),
        y: Axis::from_zero("entropy, nats per token", entropies.iter().map(|p| p.1)),
        right: Some(right),
        layers,
        if_empty: "no entropy".into(),
    }
}

/// The largest magnitude, and the values divided by it, each at its step.
fn normalised(at: impl Iterator<Item = u64>, values: &[f64]) -> (f64, Vec<Point>) {
    let most = largest(values.iter().copied());
    let scale = if most > 0.0 { 1.0 / most } else { 0.0 };
    (most, at.zip(values).map(|(step, value)| (step as f64, value * scale)).collect())
}

/// Three digits, with an exponent only where there would be many zeros.
fn short(value: f64) -> String {
    if value == 0.0 || (0.01..1000.0).contains(&value) {
        format!("{value:.2}")
    } else {
        format!("{value:.1e}")
    }
}

fn dropped(steps: &[StepMetrics]) -> Panel {
    let percent = |of: fn(&StepMetrics) -> f64| points(steps, |s| 100.0 * of(s));
    let kinds = [
        ("all tokens", percent(|s| s.dropped_fraction)),
        ("negative advantage", percent(|s| s.dropped_negative)),
        ("positive advantage", percent(|s| s.dropped_positive)),
    ];
    let values = kinds.iter().flat_map(|(_, points)| points).map(|p| p.1);
    let y = Axis::from_zero("dropped by the gate, %", values);
    let shapes: [fn(Vec<Point>) -> Shape; 3] = [Shape::Line, Shape::Line, Shape::Dashed];
    let layers = kinds.into_iter().zip(shapes).enumerate();
    Panel {
        title: "Dropped tokens".into(),
        x: x_axis(steps),
        y,
        right: None,
        layers: layers.map(|(i, ((l, p), shape))| Layer::new(l, color(i), shape(p))).collect(),
        if_empty: "nothing was dropped".into(),
    }
}

fn time(steps: &[StepMetrics]) -> Panel {
    let groups = steps.chunks(steps_per_point(steps.len()));
    let gap = if groups.len() > SPACED_BARS { 0.0 } else { 0.1 };
    let columns: Vec<(Point, [(&str, f64); 6])> = groups
        .map(|group| {
            let (first, last) = (group[0].step as f64, group[group.len() - 1].step as f64);
            ((first - 0.5 + gap, last + 0.5 - gap), average(group).phases())
        })
        .collect();
    let heights = columns.iter().map(|(_, phases)| phases.iter().map(|p| p.1).sum());
    let y = Axis::from_zero("seconds per step", heights);
    let layer = |(index, (name, _)): (usize, (&'static str, f64))| {
        let bar = |((left, right), phases): &(Point, [(&str, f64); 6])| {
            let bottom: f64 = phases[..index].iter().map(|p| p.1).sum();
            ((*left, bottom), (*right, bottom + phases[index].1))
        };
        let color = if name == "other" { GREY } else { color(index) };
        Layer::new(name, color, Shape::Bars(columns.iter().map(bar).collect()))
    };
    Panel {
        title: "Time by phase".into(),
        x: x_axis(steps),
        y,
        right: None,
        layers: Seconds::default().phases().into_iter().enumerate().map(layer).collect(),
        if_empty: "no times".into(),
    }
}

fn average(group: &[StepMetrics]) -> Seconds {
    let mean = |of: fn(&Seconds) -> f64| {
        group.iter().map(|s| of(&s.seconds)).sum::<f64>() / group.len() as f64
    };
    Seconds {
        rollout: mean(|s| s.rollout),
        rollout_wait: mean(|s| s.rollout_wait),
        reward: mean(|s| s.reward),
        train: mean(|s| s.train),
        update: mean(|s| s.update),
        probe: mean(|s| s.probe),
        total: mean(|s| s.total),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(number: u64) -> StepMetrics {
        StepMetrics {
            step: number,
            entropy: 2.0,
            entropy_predicted: -1e-6,
            entropy_measured: (number > 1).then_some(-0.1),
            seconds: Seconds { rollout_wait: 2.0, train: 1.0, total: 4.0, ..Seconds::default() },
            ..StepMetrics::default()
        }
    }

    #[test]
    fn changes_are_summed_and_each_divided_by_its_largest() {
        let panel = entropy(&[step(1), step(2), step(3)]);
        assert_eq!(panel.layers[1].label, "measured change (largest 0.20 nats)");
        assert_eq!(panel.layers[1].shape, Shape::Line(vec![(2.0, -0.5), (3.0, -1.0)]));
        assert_eq!(panel.layers[2].label, "predicted change (largest 3.0e-6 nats)");
        assert!(panel.layers[2].right);
        let unmeasured = entropy(&[step(1)]);
        assert_eq!(unmeasured.layers.len(), 2, "no layer for what was not measured");
    }

    #[test]
    fn phases_are_stacked_up_to_the_total() {
        let panel = time(&[step(1)]);
        let bars: Vec<&Shape> = panel.layers.iter().map(|l| &l.shape).collect();
        assert_eq!(*bars[0], Shape::Bars(vec![((0.6, 0.0), (1.4, 2.0))]));
        assert_eq!(*bars[2], Shape::Bars(vec![((0.6, 2.0), (1.4, 3.0))]));
        assert_eq!(*bars[5], Shape::Bars(vec![((0.6, 3.0), (1.4, 4.0))]));
        assert_eq!(panel.y.range.end, 4.0);
    }

    #[test]
    fn many_steps_share_bars() {
        let steps: Vec<StepMetrics> = (1..=1000).map(step).collect();
        let Shape::Bars(bars) = &time(&steps).layers[0].shape else { panic!("no bars") };
        assert_eq!(bars.len(), 143);
        assert!(bars.iter().all(|(low, high)| low.1 == 0.0 && high.1 == 2.0));
    }
}
