//! Random tensors for tests and benches, from a generator of the thread's own. libtorch has one for
//! the whole process: what a test draws from that depends on the tests beside it.

use rand::{Rng, SeedableRng, rngs::StdRng};
use std::cell::RefCell;
use tch::Tensor;

thread_local! {
    static GENERATOR: RefCell<StdRng> = RefCell::new(StdRng::seed_from_u64(0));
}

/// Begins the thread's numbers anew.
pub fn seed(seed: u64) {
    GENERATOR.set(StdRng::seed_from_u64(seed));
}

/// Normally distributed numbers of mean 0 and deviation 1: f32 on the CPU, of any `shape`.
pub fn normal(shape: &[i64]) -> Tensor {
    let count: i64 = shape.iter().product();
    let numbers: Vec<f32> =
        GENERATOR.with_borrow_mut(|rng| (0..count).map(|_| box_muller(rng)).collect());
    // A tensor of its own, which may be a gradient: libtorch takes no view for one.
    Tensor::from_slice(&numbers).view(shape).copy()
}

/// One of the two numbers of the Box-Muller transform.
fn box_muller(rng: &mut StdRng) -> f32 {
    // In (0, 1], which has a logarithm.
    let radius = (-2.0 * (1.0 - rng.random::<f32>()).ln()).sqrt();
    radius * (std::f32::consts::TAU * rng.random::<f32>()).cos()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn a_seed_gives_the_same_numbers_whatever_other_threads_draw() {
        seed(7);
        let [first, second] = [normal(&[5]), normal(&[5])];
        assert!(!first.equal(&second));
        seed(7);
        std::thread::spawn(|| drop(normal(&[3]))).join().unwrap();
        assert!(normal(&[5]).equal(&first) && normal(&[5]).equal(&second));
    }

    #[test]
    fn moments_are_those_of_the_normal_distribution() {
        seed(1);
        let numbers = normal(&[100, 1000]).to_kind(Kind::Double);
        for (power, want, error) in [(1, 0.0, 0.01), (2, 1.0, 0.02), (3, 0.0, 0.05), (4, 3.0, 0.1)]
        {
            let got = numbers.pow_tensor_scalar(power).mean(Kind::Double).double_value(&[]);
            assert!((got - want).abs() < error, "moment {power}: {got}");
        }
    }
}
