//! The metrics file survives a crash; the summary says what happened.

use onpolicy_trainer::metrics::{MetricsError, MetricsLog, Seconds, StepMetrics, Summary, log};
use std::fs;

fn step(number: u64) -> StepMetrics {
    StepMetrics {
        step: number,
        reward_mean: number as f64 / 10.0,
        entropy: 2.0 / number as f64,
        samples: 64,
        prompt_tokens: 300,
        completion_tokens: 1000,
        dropped_fraction: 0.02,
        staleness_mean: 0.75,
        staleness_max: number.min(3),
        tokens_per_second: 500.0 + (number % 4) as f64,
        peak_memory_mb: 900.0 + number as f64,
        // No token taught in the sixth step.
        mismatch_mean: if number == 6 { f64::NAN } else { 1e-4 * (number % 4 + 2) as f64 },
        mismatch_max: if number == 6 { f64::NAN } else { 0.01 * number as f64 },
        seconds: Seconds {
            rollout: 2.5,
            rollout_wait: 2.0,
            train: 1.0,
            update: 0.5,
            total: 4.0,
            ..Seconds::default()
        },
        ..StepMetrics::default()
    }
}

fn numbers(steps: &[StepMetrics]) -> Vec<u64> {
    steps.iter().map(|s| s.step).collect()
}

#[test]
fn steps_come_back_as_they_were_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut log = MetricsLog::create(&path).unwrap();
    let steps = [step(1), StepMetrics { entropy_measured: Some(-0.125), ..step(2) }];
    steps.iter().for_each(|s| log.append(s).unwrap());
    assert_eq!(log::read(&path).unwrap(), steps);
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count(), 2);
    let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(first["step"], 1);
    assert_eq!(first["seconds"]["rollout_wait"], 2.0);
    assert!(first["entropy_measured"].is_null());
}

#[test]
fn what_is_not_a_number_stays_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut log = MetricsLog::create(&path).unwrap();
    log.append(&StepMetrics { loss: f64::NAN, ..step(1) }).unwrap();
    let read = log::read(&path).unwrap();
    assert!(read[0].loss.is_nan());
    assert_eq!(read[0].reward_mean, 0.1);
}

#[test]
fn resuming_cuts_off_later_steps_and_torn_lines() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut log = MetricsLog::create(&path).unwrap();
    (1..=5).for_each(|n| log.append(&step(n)).unwrap());
    let whole = fs::read(&path).unwrap();
    fs::write(&path, [&whole[..], b"{\"step\": 6, \"rew"].concat()).unwrap();
    assert_eq!(numbers(&log::read(&path).unwrap()), [1, 2, 3, 4, 5], "the torn line is left out");

    let (mut log, kept) = MetricsLog::resume(&path, 5).unwrap();
    assert_eq!(numbers(&kept), [1, 2, 3, 4, 5]);
    log.append(&step(6)).unwrap();
    assert_eq!(numbers(&log::read(&path).unwrap()), [1, 2, 3, 4, 5, 6]);

    let (mut log, kept) = MetricsLog::resume(&path, 3).unwrap();
    assert_eq!(numbers(&kept), [1, 2, 3]);
    log.append(&step(4)).unwrap();
    assert_eq!(numbers(&log::read(&path).unwrap()), [1, 2, 3, 4]);

    let (_, kept) = MetricsLog::resume(&path, 0).unwrap();
    assert!(kept.is_empty());
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
}

#[test]
fn a_broken_line_is_an_error_with_its_number() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut log = MetricsLog::create(&path).unwrap();
    log.append(&step(1)).unwrap();
    fs::write(&path, [fs::read(&path).unwrap(), b"{}\n".to_vec()].concat()).unwrap();
    let error = log::read(&path).unwrap_err();
    assert!(error.to_string().contains("metrics.jsonl line 2: missing field"), "{error}");
    assert!(matches!(MetricsLog::resume(&path, 1), Err(MetricsError::Line { line: 2, .. })));
    let missing = log::read(&dir.path().join("none")).unwrap_err();
    assert!(matches!(missing, MetricsError::File { .. }));
}

#[test]
fn the_summary_adds_up() {
    let steps: Vec<StepMetrics> = (1..=9).map(step).collect();
    let summary = Summary::from(&steps[..]);
    assert_eq!((summary.steps, summary.samples, summary.completion_tokens), (9, 576, 9000));
    assert_eq!((summary.seconds.total, summary.seconds.rollout_wait), (36.0, 18.0));
    assert_eq!((summary.seconds.rollout, summary.staleness_max), (22.5, 3));
    assert!((summary.staleness_mean - 0.75).abs() < 1e-12);
    assert!((summary.seconds.other() - 4.5).abs() < 1e-12);
    assert!((summary.reward_first - 0.15).abs() < 1e-12);
    assert!((summary.reward_last - 0.7).abs() < 1e-12);
    assert!((summary.entropy_last - 2.0 / 9.0).abs() < 1e-12);
    assert!((summary.dropped_fraction - 0.02).abs() < 1e-12);
    assert_eq!((summary.best_throughput, summary.best_step), (503.0, 7));
    assert_eq!(summary.peak_memory_mb, 909.0);
}

#[test]
fn the_summary_as_a_table() {
    let steps: Vec<StepMetrics> = (1..=9).map(step).collect();
    let expected = "  \
  steps              9
  samples            576
  tokens generated   9,000
  tokens of prompts  2,700
  seconds            36.0
    rollout          18.0 (50.0 %)
    reward           0.0 (0.0 %)
    train            9.0 (25.0 %)
    update           4.5 (12.5 %)
    probe            0.0 (0.0 %)
    other            4.5 (12.5 %)
    rollout, hidden  4.5
  reward             0.150 (first 2) -> 0.700 (last 5)
  entropy            2.000 -> 0.222 nats
  engine - trainer   3.4e-4 nats (at most 9.0e-2)
  tokens dropped     2.00 %
  best throughput    503 tokens/s (step 7)
  peak memory        909 MiB
  staleness          0.75 versions on average, at most 3
";
    assert_eq!(Summary::from(&steps[..]).to_string(), expected);
    assert_eq!(Summary::from(&[][..]), Summary::default());
    assert!(Summary::default().to_string().contains("samples            0\n"));
    let failed = StepMetrics { groups_failed: 2, ..step(1) };
    assert!(Summary::from(&[failed][..]).to_string().contains("groups not judged  2\n"));
}
