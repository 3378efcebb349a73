//! Where the time of a rollout went: by phase of the engine's steps, and outside of them.

use super::report::Line;
use onpolicy_engine::profile::{Phase, Profile};

/// Phases that run the model; all other time of a rollout serves it.
const MODEL: [Phase; 5] =
    [Phase::Recorded, Phase::Elementwise, Phase::Linear, Phase::Attention, Phase::Head];

/// One rollout, as the engine saw it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timed {
    /// What the engine did meanwhile.
    pub profile: Profile,
    /// From the first request to the last answer.
    pub seconds: f64,
}

/// Shares of the rollouts' time, for every phase; then of all phases but those that run the model.
/// What the engine spent idle went to whoever asked it. Nothing without rollouts.
pub fn lines(group: &str, rollouts: &[Timed]) -> Vec<Line> {
    if rollouts.is_empty() {
        return Vec::new();
    }
    let share = |of: &dyn Fn(&Timed) -> f64| {
        rollouts.iter().map(|timed| 100.0 * of(timed) / timed.seconds).collect::<Vec<f64>>()
    };
    let phase = |phase: Phase| {
        let values = share(&|timed: &Timed| seconds(timed, phase));
        Line::values(group, &name(phase), "%", values)
    };
    let model = |timed: &Timed| MODEL.iter().map(|&phase| timed.profile.seconds(phase)).sum();
    let outside = share(&|timed: &Timed| timed.seconds - f64::min(model(timed), timed.seconds));
    let all = Phase::ALL.into_iter().map(phase);
    all.chain([Line::values(group, "all but the model", "%", outside)]).collect()
}

/// Seconds in a phase. The engine was idle before and after the rollout too, so that idle time is
/// what the other phases leave.
fn seconds(timed: &Timed, phase: Phase) -> f64 {
    match phase {
        Phase::Idle => (timed.seconds - timed.profile.busy_seconds()).max(0.0),
        phase => timed.profile.seconds(phase),
    }
}

fn name(phase: Phase) -> String {
    let name = serde_json::to_value(phase).ok();
    name.as_ref().and_then(|name| name.as_str()).map_or_else(String::new, str::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_phase_took_is_idle() {
        let timed = Timed { profile: Profile::default(), seconds: 2.0 };
        let lines = lines("group", &[timed, timed]);
        let of = |name: &str| lines.iter().find(|line| line.name == name).expect(name).median;
        assert_eq!((of("idle"), of("linear"), of("all but the model")), (100.0, 0.0, 100.0));
        assert_eq!(lines.len(), Phase::ALL.len() + 1);
    }
}
