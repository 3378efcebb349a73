//! A run's progress on the terminal: one bar, and one line for every step.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use onpolicy_trainer::{config::Config, metrics::StepMetrics, run::RunEvent, train::Progress};
use std::{io::IsTerminal, time::Duration};

/// Draws a run's progress to stderr. Without a terminal only the lines are printed.
pub struct Bar {
    bar: ProgressBar,
    steps: u64,
    tokens: u64,
    headed: bool,
}

impl Bar {
    /// A bar for a run that has done `done` steps already.
    pub fn new(config: &Config, done: u64) -> Self {
        let target = if std::io::stderr().is_terminal() {
            ProgressDrawTarget::stderr_with_hz(10)
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar =
            ProgressBar::with_draw_target(Some(config.train.steps), target).with_position(done);
        let style = "{spinner} [{elapsed_precise}] {bar:30} step {pos}/{len}, eta {eta}  {msg}";
        bar.set_style(ProgressStyle::with_template(style).expect("the template is valid"));
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar, steps: config.train.steps, tokens: 0, headed: false }
    }

    /// Shows what has happened.
    pub fn show(&mut self, event: &RunEvent<'_>) {
        match event {
            RunEvent::Progress(Progress::Phase(phase)) => {
                self.tokens = 0;
                self.bar.set_message(phase.to_string());
            }
            RunEvent::Progress(Progress::Token) => {
                self.tokens += 1;
                if self.tokens.is_multiple_of(16) {
                    self.bar.set_message(format!("rollout: {} tokens", self.tokens));
                }
            }
            RunEvent::Progress(Progress::Rows(done, all)) => {
                self.bar.set_message(format!("train: {done}/{all} rows"));
            }
            RunEvent::Step(metrics) => self.step(metrics),
            RunEvent::Evaluated(report) => self.print(report.to_string().trim_end()),
            RunEvent::Saved(path) => self.print(&format!("saved {}", path.display())),
        }
    }

    fn step(&mut self, metrics: &StepMetrics) {
        if !self.headed {
            self.headed = true;
            self.print(
                "    step   reward   mixed  entropy     pred. dH     meas. dH  dropped  tokens/s  \
                 seconds  version",
            );
        }
        let measured =
            metrics.entropy_measured.map_or("-".into(), |change| format!("{change:+.4}"));
        self.print(&format!(
            "{:>4}/{:<4} {:>6.3}  {:>2}/{:<2}  {:>8.3}  {:>+11.2e}  {:>11}  {:>5.2} %  {:>8.0}  {:>7.1}  {:>7}",
            metrics.step,
            self.steps,
            metrics.reward_mean,
            metrics.groups_mixed,
            metrics.groups,
            metrics.entropy,
            metrics.entropy_predicted,
            measured,
            100.0 * metrics.dropped_fraction,
            metrics.tokens_per_second,
            metrics.seconds.total,
            metrics.weight_version,
        ));
        self.bar.inc(1);
    }

    fn print(&self, text: &str) {
        if self.bar.is_hidden() {
            eprintln!("{text}");
        } else {
            self.bar.println(text);
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
