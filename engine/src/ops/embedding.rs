//! The gradient of an embedding, without a dense tensor of its size.

use crate::torch::{TorchError, autograd::set_grad};
use tch::Tensor;

/// Adds each row of `gradient` (`[N, hidden]`) to the `grad` of the leaf `embedding` at the row
/// that `tokens` (`[N]`, i64) names, in the type of that `grad`.
///
/// # Errors
/// Shapes that do not fit.
pub fn accumulate_embedding_gradient(
    embedding: &Tensor,
    tokens: &Tensor,
    gradient: &Tensor,
) -> Result<(), TorchError> {
    if !embedding.grad().defined() {
        set_grad(embedding, &embedding.detach().zeros_like())?;
    }
    let tokens = tokens.to_device(embedding.device());
    let mut sum = embedding.grad();
    let added = sum.f_index_add_(0, &tokens, &gradient.to_kind(sum.kind()));
    added.map(|_| ()).map_err(TorchError::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn a_narrow_embedding_gets_a_narrow_gradient() {
        let embedding = Tensor::from_slice2(&[[1f32, 2.0], [3.0, 4.0]]).to_kind(Kind::BFloat16);
        let embedding = embedding.set_requires_grad(true);
        let gradient = Tensor::from_slice2(&[[1f32, 10.0], [2.0, 20.0]]);
        let tokens = Tensor::from_slice(&[1i64, 1]);
        accumulate_embedding_gradient(&embedding, &tokens, &gradient).unwrap();
        assert_eq!(embedding.grad().kind(), Kind::BFloat16);
        let got = embedding.grad().to_kind(Kind::Float).flatten(0, 1);
        assert_eq!(Vec::<f32>::try_from(got).unwrap(), [0.0, 0.0, 3.0, 30.0]);
    }

    #[test]
    fn equal_tokens_add_up() {
        let embedding = Tensor::from_slice2(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]]);
        let embedding = embedding.set_requires_grad(true);
        let tokens = Tensor::from_slice(&[2i64, 0, 2]);
        let gradient = Tensor::from_slice2(&[[1f32, 10.0], [2.0, 20.0], [4.0, 40.0]]);
        for _ in 0..2 {
            accumulate_embedding_gradient(&embedding, &tokens, &gradient).unwrap();
        }
        let want = [4.0, 40.0, 0.0, 0.0, 10.0, 100.0];
        assert_eq!(Vec::<f32>::try_from(embedding.grad().flatten(0, 1)).unwrap(), want);
    }
}
