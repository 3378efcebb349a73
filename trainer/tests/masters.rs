//! AdamW over narrow weights: f32 gradients, masters and moments against the same formulas in f64,
//! and the served tensors written in place.

use onpolicy_engine::{
    torch::{
        autograd::backward,
        random::{normal, seed},
    },
    weights::Weights,
};
use onpolicy_trainer::optimizer::{Optimizer, OptimizerSettings};
use tch::{Device, Kind, Tensor};

const SETTINGS: OptimizerSettings =
    OptimizerSettings { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0 };
const LR: f64 = 1e-3;

/// Weights of a type, two of them.
fn policy(kind: Kind) -> Weights {
    seed(5);
    let tensors = [("a", normal(&[17, 9])), ("b", normal(&[31]))];
    let of_kind = |(name, t): (&str, Tensor)| (name.to_string(), (t * 0.1).to_kind(kind));
    Weights::new(tensors.into_iter().map(of_kind).collect())
}

/// A gradient for each weight, the same for every type.
fn gradients(step: usize, micro: usize) -> [Tensor; 2] {
    seed((10 * step + micro) as u64);
    [normal(&[17, 9]), normal(&[31])]
}

/// One micro-batch's backward pass: the gradient of each weight is as given, in the weight's type.
fn accumulate(weights: &Weights, gradients: &[Tensor; 2]) {
    for ((_, weight), gradient) in weights.iter().zip(gradients) {
        backward(&(weight * 1.0), &gradient.to_kind(weight.kind())).expect("a backward pass");
    }
}

/// PyTorch's AdamW in f64, with clip_grad_norm_ before it.
struct Reference {
    weights: Vec<Tensor>,
    first: Vec<Tensor>,
    second: Vec<Tensor>,
    step: i32,
}

impl Reference {
    fn new(weights: &Weights) -> Self {
        let wide = |t: &Tensor| t.detach().to_kind(Kind::Double).copy();
        let zeros = || weights.iter().map(|(_, t)| wide(t).zeros_like()).collect();
        let (first, second) = (zeros(), zeros());
        Self { weights: weights.iter().map(|(_, t)| wide(t)).collect(), first, second, step: 0 }
    }

    fn step(&mut self, gradients: &[Tensor]) {
        let OptimizerSettings { betas: (beta1, beta2), eps, weight_decay, max_grad_norm } =
            SETTINGS;
        let square: f64 =
            gradients.iter().map(|g| g.square().sum(Kind::Double).double_value(&[])).sum();
        let clip = (max_grad_norm / (square.sqrt() + 1e-6)).min(1.0);
        self.step += 1;
        let (bias1, bias2) = (1.0 - beta1.powi(self.step), 1.0 - beta2.powi(self.step));
        for (i, gradient) in gradients.iter().enumerate() {
            let gradient = gradient * clip;
            self.first[i] = &self.first[i] * beta1 + &gradient * (1.0 - beta1);
            self.second[i] = &self.second[i] * beta2 + gradient.square() * (1.0 - beta2);
            let direction = (&self.first[i] / bias1) / ((&self.second[i] / bias2).sqrt() + eps);
            self.weights[i] = &self.weights[i] * (1.0 - LR * weight_decay) - direction * LR;
        }
    }
}

fn largest(x: &Tensor) -> f64 {
    x.abs().max().double_value(&[])
}

/// Two micro-batches a step; the reference gets the same gradients, rounded as the pass rounds them.
fn train(
    weights: &Weights,
    optimizer: &mut Optimizer,
    reference: &mut Reference,
    steps: std::ops::Range<usize>,
) {
    let kind = weights.get("a").expect("a weight").kind();
    for step in steps {
        let parts = [gradients(step, 0), gradients(step, 1)];
        parts.iter().for_each(|part| accumulate(weights, part));
        let rounded = |t: &Tensor| t.to_kind(kind).to_kind(Kind::Double);
        let sums: Vec<Tensor> =
            (0..2).map(|i| rounded(&parts[0][i]) + rounded(&parts[1][i])).collect();
        reference.step(&sums);
        let norm = optimizer.grad_norm().expect("a norm");
        optimizer.step(LR, norm).expect("a step");
    }
}

/// The served weights are what the f64 weights round to, but for ties and the last bit of f32.
fn assert_served(served: &Weights, reference: &Reference, digits: i32) {
    for ((name, served), want) in served.iter().zip(&reference.weights) {
        let error = largest(&((served.to_kind(Kind::Double) - want) / want.abs().clamp_min(0.05)));
        assert!(error < 2f64.powi(-digits), "{name}: {error:e}");
    }
}

#[test]
fn narrow_weights_are_rounded_masters() {
    for (kind, digits) in [(Kind::BFloat16, 7), (Kind::Half, 10), (Kind::Float, 19)] {
        let served = policy(kind);
        let addresses: Vec<_> = served.iter().map(|(_, t)| t.data_ptr()).collect();
        let weights = served.share_trainable();
        let mut optimizer = Optimizer::new(&weights, SETTINGS).expect("an optimizer");
        let mut reference = Reference::new(&served);
        train(&weights, &mut optimizer, &mut reference, 0..10);
        assert_served(&served, &reference, digits);
        let after: Vec<_> = served.iter().map(|(_, t)| t.data_ptr()).collect();
        assert_eq!(after, addresses, "{kind:?}: written in place");
        assert_eq!(weights.get("a").expect("a weight").grad().kind(), Kind::Float);
        let numbers = 17 * 9 + 31;
        let copies = if kind == Kind::Float { 3 } else { 4 };
        assert_eq!(optimizer.bytes(), copies * 4 * numbers, "{kind:?}");
    }
}

/// Steps that are smaller than half the distance of two bf16 add up in the master.
#[test]
fn small_steps_are_not_lost() {
    let ones = Tensor::ones([8], (Kind::BFloat16, Device::Cpu));
    let served = Weights::new(vec![("w".into(), ones)]);
    let weights = served.share_trainable();
    let settings = OptimizerSettings { weight_decay: 0.0, max_grad_norm: 0.0, ..SETTINGS };
    let mut optimizer = Optimizer::new(&weights, settings).expect("an optimizer");
    let value = |served: &Weights| served.get("w").expect("w").double_value(&[0]);
    let mut seen = Vec::new();
    for _ in 0..8 {
        let weight = weights.get("w").expect("w");
        backward(&(weight * 1.0), &weight.detach().ones_like()).expect("a backward pass");
        let norm = optimizer.grad_norm().expect("a norm");
        optimizer.step(2f64.powi(-10), norm).expect("a step");
        seen.push(value(&served));
    }
    // A constant gradient moves the master by lr each time; below 1, bf16 are 2^-8 apart.
    let step = 2f64.powi(-8);
    assert_eq!(seen[..1], [1.0]);
    assert_eq!((seen[3], seen[7]), (1.0 - step, 1.0 - 2.0 * step), "{seen:?}");
}

#[test]
fn a_run_that_goes_on_from_a_file_is_the_same_run() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("optimizer.safetensors");
    let served = policy(Kind::BFloat16);
    let weights = served.share_trainable();
    let mut optimizer = Optimizer::new(&weights, SETTINGS).expect("an optimizer");
    let mut reference = Reference::new(&served);
    train(&weights, &mut optimizer, &mut reference, 0..3);
    optimizer.save(&file).expect("saved");
    let saved = served.iter().map(|(name, t)| (name.to_string(), t.copy()));
    let resumed = Weights::new(saved.collect());
    train(&weights, &mut optimizer, &mut reference, 3..6);

    let weights = resumed.share_trainable();
    let mut optimizer = Optimizer::new(&weights, SETTINGS).expect("an optimizer");
    optimizer.load(&file, 3).expect("loaded");
    assert_eq!(optimizer.steps(), 3);
    train(&weights, &mut optimizer, &mut reference, 3..6);
    for ((name, one), (_, other)) in served.iter().zip(resumed.iter()) {
        assert!(one.equal(other), "{name}");
    }

    let wide = policy(Kind::Float).share_trainable();
    let optimizer = Optimizer::new(&wide, SETTINGS).expect("an optimizer");
    optimizer.save(&file).expect("saved");
    let mut narrow =
        Optimizer::new(&policy(Kind::BFloat16).share_trainable(), SETTINGS).expect("an optimizer");
    let error = narrow.load(&file, 1).expect_err("no masters").to_string();
    assert!(error.contains("master.a") && error.contains("model.dtype"), "{error}");
}
