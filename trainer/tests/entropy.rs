//! Gates against the reference masks, the theorem by finite differences, and seeded properties.

use onpolicy_plugin_api::{Options, TokenBatch, TokenGate, TokenStats};
use onpolicy_trainer::{
    advantage,
    entropy::{ClipB, ClipV, EntropyReport, KeepAll, predicted_changes, score_gaps},
};
use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

/// A batch that owns its columns.
#[derive(Default, Clone)]
struct Columns {
    logprob: Vec<f32>,
    entropy: Vec<f32>,
    baseline: Vec<f32>,
    advantage: Vec<f32>,
    sample: Vec<usize>,
}

impl Columns {
    fn push(&mut self, stats: TokenStats, advantage: f32, sample: usize) {
        self.logprob.push(stats.logprob);
        self.entropy.push(stats.entropy);
        self.baseline.push(stats.baseline);
        self.advantage.push(advantage);
        self.sample.push(sample);
    }

    fn batch(&self) -> TokenBatch<'_> {
        TokenBatch {
            logprob: &self.logprob,
            entropy: &self.entropy,
            baseline: &self.baseline,
            advantage: &self.advantage,
            sample: &self.sample,
        }
    }
}

// ---- golden masks -------------------------------------------------------------------------

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    groups: Vec<usize>,
    rewards: Vec<f32>,
    lens: Vec<usize>,
    logp: Vec<Vec<f32>>,
    entropy: Vec<Vec<f32>>,
    expected_s: Vec<Vec<f32>>,
    advantage: Vec<f32>,
    clip_b: Expected,
    clip_v: Expected,
}

#[derive(Deserialize)]
struct Expected {
    mu: f64,
    #[serde(default)]
    max_frac: f64,
    keep: Vec<Vec<u8>>,
    clipped: usize,
}

impl Case {
    fn columns(&self) -> Columns {
        let mut columns = Columns::default();
        for (s, &len) in self.lens.iter().enumerate() {
            for t in 0..len {
                let (logprob, entropy) = (self.logp[s][t], self.entropy[s][t]);
                let stats = TokenStats { logprob, entropy, baseline: self.expected_s[s][t] };
                columns.push(stats, self.advantage[s], s);
            }
        }
        columns
    }

    fn check(&self, gate: &dyn TokenGate, expected: &Expected) {
        let keep = gate.keep(&self.columns().batch());
        let rows = expected.keep.iter().zip(&self.lens);
        let flat: Vec<bool> = rows.flat_map(|(r, &n)| r[..n].iter().map(|&k| k == 1)).collect();
        assert_eq!(keep, flat);
        assert_eq!(keep.iter().filter(|k| !**k).count(), expected.clipped);
    }
}

#[test]
fn masks_and_advantages_equal_the_reference() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/entropy_clip.json");
    let golden: Golden = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(golden.cases.len(), 6);
    for case in &golden.cases {
        case.check(&ClipB { mu: case.clip_b.mu, two_sided: false }, &case.clip_b);
        let (mu, max_frac) = (case.clip_v.mu, case.clip_v.max_frac);
        case.check(&ClipV { mu, max_frac, two_sided: false }, &case.clip_v);
        for group in 0..=*case.groups.iter().max().unwrap() {
            let members: Vec<usize> =
                (0..case.groups.len()).filter(|&i| case.groups[i] == group).collect();
            let rewards: Vec<f32> = members.iter().map(|&i| case.rewards[i]).collect();
            for (&i, actual) in members.iter().zip(advantage::grpo(&rewards)) {
                assert!((actual - case.advantage[i]).abs() < 2e-6, "{actual} of sample {i}");
            }
        }
    }
}

// ---- the theorem --------------------------------------------------------------------------

fn softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = logits.iter().map(|z| (z - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|e| e / sum).collect()
}

fn entropy(p: &[f64]) -> f64 {
    -p.iter().map(|p| p * p.ln()).sum::<f64>()
}

/// `S_i` of every token, and `E_p[S]`, straight from their definitions.
fn scores(p: &[f64]) -> (Vec<f64>, f64) {
    let h = entropy(p);
    let s: Vec<f64> = p.iter().map(|p| p * (h + p.ln())).collect();
    let baseline = p.iter().zip(&s).map(|(p, s)| p * s).sum();
    (s, baseline)
}

fn stats(p: &[f64], k: usize) -> TokenStats {
    TokenStats {
        logprob: p[k].ln() as f32,
        entropy: entropy(p) as f32,
        baseline: scores(p).1 as f32,
    }
}

fn random_logits(rng: &mut ChaCha8Rng) -> Vec<f64> {
    let scale = rng.random_range(0.5..4.0);
    (0..rng.random_range(3..40)).map(|_| rng.random_range(-scale..scale)).collect()
}

#[test]
fn raising_one_logit_lowers_the_entropy_by_its_score() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for _ in 0..200 {
        let logits = random_logits(&mut rng);
        let (p, k, eps) = (softmax(&logits), rng.random_range(0..logits.len()), 1e-5);
        let moved = |by: f64| {
            let mut z = logits.clone();
            z[k] += by;
            entropy(&softmax(&z))
        };
        let slope = (moved(eps) - moved(-eps)) / (2.0 * eps);
        assert!((slope + scores(&p).0[k]).abs() < 1e-8, "slope {slope}");
    }
}

#[test]
fn a_policy_gradient_step_changes_the_entropy_as_predicted() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for _ in 0..200 {
        let logits = random_logits(&mut rng);
        let (p, k) = (softmax(&logits), rng.random_range(0..logits.len()));
        let advantage = if rng.random() { 1.5 } else { -0.75 };
        let mut columns = Columns::default();
        columns.push(stats(&p, k), advantage as f32, 0);
        let ratio = 1.25;
        // The gradient of r A ln p_k with respect to the logits is r A (e_k - p).
        let measured = |lr: f64| {
            let step = |(i, z): (usize, &f64)| {
                let hit = if i == k { 1.0 } else { 0.0 };
                z + lr * ratio * advantage * (hit - p[i])
            };
            let moved: Vec<f64> = logits.iter().enumerate().map(step).collect();
            entropy(&softmax(&moved)) - entropy(&p)
        };
        let predicted = |lr: f64| predicted_changes(&columns.batch(), Some(&[ratio as f32]), lr)[0];
        let lr = 1e-3;
        let error = |lr: f64| (measured(lr) - predicted(lr)).abs();
        assert!(error(lr) < 20.0 * lr * lr, "error {} at {p:?}", error(lr));
        let slope = (measured(1e-5) - measured(-1e-5)) / 2e-5;
        assert!((slope - predicted(1.0)).abs() < 2e-6, "{slope} against {}", predicted(1.0));
    }
}

#[test]
fn on_policy_the_expected_gap_is_zero_and_its_sign_follows_the_probability() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for _ in 0..200 {
        let p = softmax(&random_logits(&mut rng));
        let mut columns = Columns::default();
        (0..p.len()).for_each(|k| columns.push(stats(&p, k), 1.0, 0));
        let gaps = score_gaps(&columns.batch());
        let expected: f64 = gaps.iter().zip(&p).map(|(&gap, p)| f64::from(gap) * p).sum();
        assert!(expected.abs() < 1e-6, "{expected}");
        for (score, p_k) in columns.batch().discriminator().iter().zip(&p) {
            let threshold = (-entropy(&p)).exp();
            assert!((p_k - threshold).abs() < 1e-6 || (*score > 0.0) == (*p_k > threshold));
            assert!(f64::from(*score) >= -(-(entropy(&p) + 1.0)).exp() - 1e-6);
        }
    }
}

// ---- properties ---------------------------------------------------------------------------

fn random_batch(rng: &mut ChaCha8Rng) -> Columns {
    let mut columns = Columns::default();
    for sample in 0..rng.random_range(1..6) {
        let advantage = [-1.5, -0.5, 0.0, 0.5, 1.5][rng.random_range(0..5)];
        for _ in 0..rng.random_range(0..40) {
            let p = softmax(&random_logits(rng));
            columns.push(stats(&p, rng.random_range(0..p.len())), advantage, sample);
        }
    }
    columns
}

fn dropped(keep: &[bool]) -> usize {
    keep.iter().filter(|k| !**k).count()
}

/// The rules read out one token at a time, the slow way.
fn oracle_b(batch: &TokenBatch<'_>, mu: f64, two_sided: bool) -> Vec<bool> {
    let s: Vec<f64> = batch.discriminator().iter().map(|&s| s.into()).collect();
    let n = s.len() as f64;
    let mean = s.iter().sum::<f64>() / n;
    let sigma = (s.iter().map(|s| (s - mean) * (s - mean)).sum::<f64>() / n).sqrt();
    (0..s.len())
        .map(|t| {
            let low = batch.advantage[t] < 0.0 && s[t] - mean < -mu * sigma;
            let high = two_sided && batch.advantage[t] > 0.0 && s[t] - mean > mu * sigma;
            !(low || high) || sigma < 1e-12
        })
        .collect()
}

#[test]
fn clip_b_holds_its_rules_on_random_batches() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let mut total = 0;
    for _ in 0..2000 {
        let columns = random_batch(&mut rng);
        let batch = columns.batch();
        let mu = rng.random_range(0.0..3.0);
        let one = ClipB { mu, two_sided: false }.keep(&batch);
        let two = ClipB { mu, two_sided: true }.keep(&batch);
        assert_eq!(one, oracle_b(&batch, mu, false));
        assert_eq!(two, oracle_b(&batch, mu, true));
        let stricter = ClipB { mu: mu + 0.5, two_sided: false }.keep(&batch);
        for t in 0..batch.len() {
            assert!(one[t] || batch.advantage[t] < 0.0);
            assert!(!two[t] || one[t], "two-sided drops at least as much");
            assert!(!one[t] || stricter[t], "a higher threshold drops no more");
        }
        total += dropped(&one);
    }
    assert!(total > 1000, "the rules were hardly tried: {total}");
}

#[test]
fn clip_v_holds_its_cap_and_drops_the_largest() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut capped = 0;
    for round in 0..2000 {
        let columns = random_batch(&mut rng);
        let batch = columns.batch();
        let (mu, max_frac) = (rng.random_range(0.0..2.0), rng.random_range(0.001..0.2));
        let two_sided = round % 2 == 0;
        let free = ClipV { mu, max_frac: 1.0, two_sided }.keep(&batch);
        let keep = ClipV { mu, max_frac, two_sided }.keep(&batch);
        let cap = ((max_frac * batch.len() as f64) as usize).max(1);
        assert_eq!(dropped(&keep), dropped(&free).min(cap));
        let gaps = score_gaps(&batch);
        let size = |t: usize| if batch.advantage[t] < 0.0 { -gaps[t] } else { gaps[t] };
        let smallest = (0..batch.len()).filter(|&t| !keep[t]).map(size).fold(f32::MAX, f32::min);
        for t in 0..batch.len() {
            assert!(keep[t] || !free[t]);
            assert!(two_sided || keep[t] || batch.advantage[t] < 0.0);
            assert!(keep[t] == free[t] || size(t) <= smallest, "a larger one was kept");
        }
        capped += usize::from(dropped(&keep) < dropped(&free));
    }
    assert!(capped > 100, "the cap was hardly tried: {capped}");
}

#[test]
fn the_order_of_the_tokens_does_not_matter() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let gates: [Box<dyn TokenGate>; 2] = [
        Box::new(ClipB { mu: 0.7, two_sided: true }),
        Box::new(ClipV { mu: 0.7, max_frac: 1.0, two_sided: true }),
    ];
    for _ in 0..200 {
        let columns = random_batch(&mut rng);
        let mut order: Vec<usize> = (0..columns.logprob.len()).collect();
        order.shuffle(&mut rng);
        let pick = |v: &[f32]| order.iter().map(|&t| v[t]).collect::<Vec<_>>();
        let shuffled = Columns {
            logprob: pick(&columns.logprob),
            entropy: pick(&columns.entropy),
            baseline: pick(&columns.baseline),
            advantage: pick(&columns.advantage),
            sample: order.iter().map(|&t| columns.sample[t]).collect(),
        };
        for gate in &gates {
            let keep = gate.keep(&columns.batch());
            let expected: Vec<bool> = order.iter().map(|&t| keep[t]).collect();
            assert_eq!(gate.keep(&shuffled.batch()), expected);
        }
    }
}

#[test]
fn batches_without_spread_and_empty_ones_lose_nothing() {
    let mut columns = Columns::default();
    let same = TokenStats { logprob: -3.0, entropy: 1.0, baseline: 0.1 };
    (0..9).for_each(|s| columns.push(same, -1.0, s));
    let gate = ClipB { mu: 0.0, two_sided: true };
    assert_eq!(gate.keep(&columns.batch()), vec![true; 9]);
    let empty = Columns::default();
    assert!(gate.keep(&empty.batch()).is_empty());
    assert!(ClipV::default().keep(&empty.batch()).is_empty());
    assert!(KeepAll {}.keep(&empty.batch()).is_empty());
    assert_eq!(EntropyReport::new(&empty.batch(), &[], None, 1.0), EntropyReport::default());
}

#[test]
fn a_report_says_what_was_dropped_and_what_to_expect() {
    let mut columns = Columns::default();
    let token = |logprob| TokenStats { logprob, entropy: 1.0, baseline: 0.25 };
    columns.push(token(0.0), 2.0, 0); // S* = 1
    columns.push(token(-1.0), -1.0, 1); // S* = 0
    columns.push(token(-1.0), -1.0, 1);
    columns.push(token(-1.0), 2.0, 0);
    let report = EntropyReport::new(&columns.batch(), &[true, false, true, true], None, 0.1);
    let close = |actual: f64, expected: f64| assert!((actual - expected).abs() < 1e-7, "{actual}");
    close(report.entropy, 1.0);
    close(report.score_mean, 0.25);
    close(report.score_std, 0.1875f64.sqrt());
    close(report.gap_mean, 0.0);
    close(report.dropped, 0.25);
    close(report.dropped_positive, 0.0);
    close(report.dropped_negative, 0.5);
    // -0.1 * (2 * 0.75 + (-1) * -0.25 + 2 * -0.25) / 4, the dropped token left out
    close(report.predicted_change, -0.1 * 1.25 / 4.0);
}

#[test]
fn options_are_checked() {
    let options = |json: serde_json::Value| Options(json.as_object().unwrap().clone());
    let b = |json| ClipB::from_options(&options(json));
    let v = |json| ClipV::from_options(&options(json));
    assert_eq!(b(serde_json::json!({})), Ok(ClipB { mu: 2.5, two_sided: false }));
    let given = serde_json::json!({"mu": 2, "two_sided": true});
    assert_eq!(b(given), Ok(ClipB { mu: 2.0, two_sided: true }));
    assert_eq!(v(serde_json::json!({})).unwrap().max_frac, 1e-4);
    assert!(b(serde_json::json!({"mu": -1})).unwrap_err().contains("mu = -1"));
    assert!(b(serde_json::json!({"my": 1})).unwrap_err().contains("`my`"));
    assert!(v(serde_json::json!({"max_frac": 0})).unwrap_err().contains("max_frac = 0"));
    assert!(v(serde_json::json!({"max_frac": 1.5})).unwrap_err().contains("at most 1"));
    let none = KeepAll::from_options(&options(serde_json::json!({"mu": 1})));
    assert!(none.unwrap_err().contains("`mu`"));
}
