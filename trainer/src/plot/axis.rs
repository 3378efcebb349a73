//! Ranges and ticks.

use std::ops::Range;

/// About how many ticks an axis has.
const TICKS: f64 = 6.0;

/// One axis of a panel.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Axis {
    /// What it measures, with the unit.
    pub label: String,
    /// What it covers.
    pub range: Range<f64>,
    /// Where its ticks are.
    pub ticks: Vec<f64>,
    /// Distance of two ticks.
    step: f64,
}

impl Axis {
    /// An axis that covers the values, ends on ticks, and starts at 0 unless a value is negative.
    pub fn from_zero(label: &str, values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = bounds(values.chain([0.0]));
        let high = if high > low { high } else { low + 1.0 };
        let step = nice_step(high - low);
        let range = (low / step).floor() * step..(high / step).ceil() * step;
        Self::new(label, range, step)
    }

    /// An axis that covers the values and 0, with a tenth of 1 to spare at both ends: for values
    /// that were divided by the largest.
    pub fn normalised(label: &str, values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = bounds(values.chain([0.0]));
        let range = low - 0.1..high + 0.1;
        let step = nice_step(range.end - range.start);
        Self::new(label, range, step)
    }

    /// An axis of step numbers: ticks at whole numbers, half a step of room at both ends.
    pub fn steps(label: &str, values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = bounds(values);
        let step = nice_step(high - low).max(1.0);
        Self::new(label, low - 0.5..high + 0.5, step)
    }

    fn new(label: &str, range: Range<f64>, step: f64) -> Self {
        // Ticks are counted rather than summed, so that no rounding error grows.
        let slack = 1e-9;
        let first = (range.start / step - slack).ceil() as i64;
        let last = (range.end / step + slack).floor() as i64;
        let ticks = (first..=last).map(|i| i as f64 * step).collect();
        Self { label: label.into(), range, ticks, step }
    }

    /// How a tick is written: as many decimals as its distance to the next needs.
    pub fn format(&self, value: f64) -> String {
        let largest = self.range.start.abs().max(self.range.end.abs());
        let decimals = (-self.step.log10()).ceil().max(0.0) as usize;
        match value {
            v if v.abs() < self.step / 2.0 => "0".into(),
            v if decimals > 5 || largest >= 1e6 => format!("{v:.1e}"),
            v => format!("{v:.decimals$}"),
        }
    }
}

/// 1, 2 or 5 times a power of ten, so that the length has about [`TICKS`] of them.
fn nice_step(length: f64) -> f64 {
    if length <= 0.0 {
        return 1.0;
    }
    let rough = length / TICKS;
    let power = 10_f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| rough <= factor * power * (1.0 + 1e-9));
    factor.unwrap_or(10.0) * power
}

/// Smallest and largest finite value; 0 and 0 if there is none.
fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let finite = values.filter(|v| v.is_finite());
    let ends = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if ends.0 > ends.1 { (0.0, 0.0) } else { ends }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(axis: &Axis) -> Vec<String> {
        axis.ticks.iter().map(|&tick| axis.format(tick)).collect()
    }

    #[test]
    fn axes_from_zero_end_on_ticks() {
        let axis = Axis::from_zero("y", [0.31, 0.94].into_iter());
        assert_eq!(axis.range, 0.0..1.0);
        assert_eq!(written(&axis), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        let axis = Axis::from_zero("y", [-0.2, 2.1, f64::NAN].into_iter());
        assert_eq!(axis.range, -0.5..2.5);
        assert_eq!(Axis::from_zero("y", [0.0].into_iter()).range, 0.0..1.0);
        assert_eq!(Axis::from_zero("y", std::iter::empty()).range, 0.0..1.0);
    }

    #[test]
    fn steps_are_whole_numbers() {
        let axis = Axis::steps("step", (1..=3).map(f64::from));
        assert_eq!(axis.range, 0.5..3.5);
        assert_eq!(written(&axis), ["1", "2", "3"]);
        let axis = Axis::steps("step", [7.0].into_iter());
        assert_eq!((axis.range.clone(), written(&axis)), (6.5..7.5, vec!["7".to_string()]));
        let axis = Axis::steps("step", (1..=500).map(f64::from));
        assert_eq!(written(&axis), ["100", "200", "300", "400", "500"]);
    }

    #[test]
    fn normalised_values_have_room() {
        let axis = Axis::normalised("y", [-1.0, -0.2].into_iter());
        assert_eq!(axis.range, -1.1..0.1);
        assert_eq!(written(&axis), ["-1.0", "-0.8", "-0.6", "-0.4", "-0.2", "0"]);
    }

    #[test]
    fn small_and_large_ticks() {
        let axis = Axis::from_zero("y", [3e-6].into_iter());
        assert_eq!(axis.format(1e-6), "1.0e-6");
        let axis = Axis::from_zero("y", [40_000.0].into_iter());
        assert_eq!(axis.format(10_000.0), "10000");
    }
}
