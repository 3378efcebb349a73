//! Pictures of made-up runs: they are written, and say what they should.

use onpolicy_trainer::{
    metrics::{MetricsLog, Seconds, StepMetrics},
    plot::{self, PlotError, Standing},
};
use std::{fs, path::PathBuf};

/// A run whose entropy decays to `floor`.
fn run(steps: u64, floor: f64) -> Vec<StepMetrics> {
    (1..=steps).map(|step| made_up(step, steps, floor)).collect()
}

fn made_up(step: u64, steps: u64, floor: f64) -> StepMetrics {
    let t = step as f64 / steps.max(20) as f64;
    let wave = (step as f64 * 1.7).sin();
    let entropy = floor + (2.1 - floor) * (-3.0 * t).exp();
    StepMetrics {
        step,
        weight_version: step,
        reward_mean: (0.35 + (0.6 - 0.3 * floor) * (1.0 - (-4.0 * t).exp()) + 0.03 * wave)
            .clamp(0.0, 1.0),
        groups: 8,
        groups_mixed: (7.0 - (5.0 - 3.0 * floor) * t + wave).clamp(0.0, 8.0) as usize,
        entropy,
        entropy_predicted: -2e-6 * (-3.0 * t).exp() * (1.0 + floor + 0.6 * wave),
        entropy_measured: Some(-0.25 * (-3.0 * t).exp() * (1.0 + 0.4 * (wave + t.cos()))),
        dropped_fraction: 0.01 + 0.006 * wave,
        dropped_negative: 0.025 + 0.012 * wave,
        seconds: Seconds {
            rollout: 2.2 + 0.3 * wave,
            rollout_wait: 2.2 + 0.3 * wave,
            reward: 0.02,
            train: 1.6 + 0.2 * wave,
            update: 0.3,
            probe: 0.2,
            total: 4.5 + 0.5 * wave,
        },
        ..StepMetrics::default()
    }
}

/// Where pictures go: a folder to look at if the environment names one.
fn folder(temporary: &tempfile::TempDir) -> PathBuf {
    let named = std::env::var_os("ONPOLICY_PICTURES").map(PathBuf::from);
    named.unwrap_or_else(|| temporary.path().to_owned())
}

fn assert_png(path: &PathBuf) {
    let bytes = fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x89PNG\r\n\x1a\n");
    let size = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!((size(16), size(20)), (1800, 1200));
    assert!(bytes.len() > 20_000, "the picture is empty: {} bytes", bytes.len());
}

#[test]
fn curves_of_runs_of_any_length() {
    let temporary = tempfile::tempdir().unwrap();
    for steps in [1, 2, 20, 600] {
        let run = run(steps, 0.05);
        let path = folder(&temporary).join(format!("curves-{steps}.png"));
        plot::curves(&run, &path).unwrap();
        assert_png(&path);
        let path = folder(&temporary).join(format!("curves-{steps}.svg"));
        plot::curves(&run, &path).unwrap();
        let svg = fs::read_to_string(path).unwrap();
        for text in ["Reward", "nats per token", "predicted change", "negative advantage", "probe"]
        {
            assert!(svg.contains(text), "{text} is missing");
        }
        let points = svg.matches("<circle").count();
        assert_eq!(points > 4, steps <= 40, "markers: {points} at {steps} steps");
    }
}

#[test]
fn curves_leave_out_what_is_not_a_number() {
    let temporary = tempfile::tempdir().unwrap();
    let mut steps = run(5, 0.5);
    steps[2].reward_mean = f64::NAN;
    steps[3].entropy_predicted = f64::NAN;
    steps.iter_mut().for_each(|s| s.entropy_measured = None);
    let path = folder(&temporary).join("gaps.svg");
    plot::curves(&steps, &path).unwrap();
    let svg = fs::read_to_string(path).unwrap();
    assert!(!svg.contains("NaN") && !svg.contains("measured change"));
}

#[test]
fn several_runs_in_one_picture() {
    let temporary = tempfile::tempdir().unwrap();
    let runs = [
        ("GRPO".to_string(), run(20, 0.05)),
        ("Clip_B (mu = 1.0)".to_string(), run(20, 0.6)),
        ("Clip_V (mu = 2.0)".to_string(), run(18, 0.4)),
    ];
    for name in ["compare.svg", "compare.png"] {
        plot::compare(&runs, &folder(&temporary).join(name)).unwrap();
    }
    assert_png(&folder(&temporary).join("compare.png"));
    let svg = fs::read_to_string(folder(&temporary).join("compare.svg")).unwrap();
    for text in ["GRPO: r = ", "Clip_B (mu = 1.0)", "Mixed groups", "predicted / its largest"] {
        assert!(svg.contains(text), "{text} is missing");
    }
    let one = [("short".to_string(), run(1, 0.5)), ("none".to_string(), Vec::new())];
    plot::compare(&one, &folder(&temporary).join("compare-1.png")).unwrap();
}

#[test]
fn learning_curves_by_the_clock_and_by_samples() {
    let curve = |name: &str, pace: f64| {
        let standing = |step: usize| Standing {
            seconds: pace * step as f64,
            samples: 256.0 * step as f64,
            reward: 1.0 - 0.8 * (-0.5 * step as f64).exp(),
        };
        (name.to_string(), (0..6).map(standing).collect::<Vec<_>>())
    };
    let curves = [curve("online", 20.0), curve("overlapped", 16.0), curve("batch", 12.0)];
    let dir = tempfile::tempdir().unwrap();
    for name in ["learning.svg", "learning.png"] {
        plot::learning(&curves, &folder(&dir).join(name)).unwrap();
    }
    let svg = fs::read_to_string(folder(&dir).join("learning.svg")).unwrap();
    for text in ["Reward by the clock", "samples trained on", "overlapped", "seconds"] {
        assert!(svg.contains(text), "{text} is missing");
    }
    assert!(matches!(plot::learning(&[], &dir.path().join("a.svg")), Err(PlotError::Empty)));
}

#[test]
fn a_run_folder_gets_both_pictures() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = MetricsLog::create(&dir.path().join("metrics.jsonl")).unwrap();
    run(3, 0.5).iter().for_each(|step| log.append(step).unwrap());
    plot::run_folder(dir.path()).unwrap();
    assert_png(&dir.path().join("curves.png"));
    assert!(dir.path().join("curves.svg").exists());
}

#[test]
fn what_cannot_be_drawn_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let steps = run(2, 0.5);
    let empty = plot::curves(&[], &dir.path().join("a.svg"));
    assert!(matches!(empty, Err(PlotError::Empty)));
    assert!(matches!(plot::compare(&[], &dir.path().join("a.svg")), Err(PlotError::Empty)));
    let format = plot::curves(&steps, &dir.path().join("a.jpg")).unwrap_err();
    assert!(format.to_string().contains(".svg or .png"));
    for name in ["none/a.svg", "none/a.png"] {
        let refused = plot::curves(&steps, &dir.path().join(name));
        assert!(matches!(refused, Err(PlotError::Draw { .. })), "{name}");
    }
    assert!(matches!(plot::run_folder(dir.path()), Err(PlotError::Metrics(_))));
}
