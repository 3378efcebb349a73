//! libtorch's flash attention over sequences of different lengths.

use super::{TorchError, check, op_flash_attention, pointers};
use tch::{Kind, Tensor};

/// Largest head that it takes.
const MAX_HEAD_DIM: i64 = 256;

/// Sequences that lie one after the other.
#[derive(Debug)]
pub struct Sequences<'a> {
    /// Where the rows of `q`, and where the keys, of each sequence begin, and the end of the last
    /// one: i32 on the device, one more than there are sequences.
    pub starts: [&'a Tensor; 2],
    /// Most rows of `q`, and most keys, of a sequence.
    pub longest: [i64; 2],
    /// Positions that a row sees, its own included; all before it if none.
    pub window: Option<usize>,
}

/// Whether it can be had for such a `q`: f16 or bf16 on a CUDA device.
pub fn takes(q: &Tensor) -> bool {
    let head_dim = q.size().last().copied().unwrap_or(0);
    q.device().is_cuda()
        && matches!(q.kind(), Kind::BFloat16 | Kind::Half)
        && head_dim % 8 == 0
        && (8..=MAX_HEAD_DIM).contains(&head_dim)
}

/// Causal attention with scale `1 / sqrt(head_dim)`, differentiable: `q` `[N, heads, head_dim]`,
/// `k` and `v` `[K, kv_heads, head_dim]`; the shape of `q`. The rows of a sequence are its last
/// positions.
///
/// # Errors
/// What libtorch refuses; a tensor that it does not [take](takes) is one reason.
pub fn attention(qkv: [&Tensor; 3], sequences: &Sequences<'_>) -> Result<Tensor, TorchError> {
    let inputs = pointers(qkv.into_iter().chain(sequences.starts));
    // A window of -1 sees everything.
    let left = sequences.window.map_or(-1, |window| window as i64 - 1);
    let mut output = std::ptr::null_mut();
    // SAFETY: five valid tensors; `output` is a valid place for the answer.
    check(unsafe {
        op_flash_attention(inputs.as_ptr(), sequences.longest.as_ptr(), left, &raw mut output)
    })?;
    // SAFETY: the shim gave a new tensor, which is ours.
    Ok(unsafe { Tensor::from_ptr(output) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn it_is_for_narrow_tensors_on_a_device_alone() {
        let on_cpu = Tensor::zeros([2, 1, 64], (Kind::BFloat16, Device::Cpu));
        assert!(!takes(&on_cpu));
        let starts = Tensor::from_slice(&[0i32, 2]);
        let sequences = Sequences { starts: [&starts, &starts], longest: [2, 2], window: Some(1) };
        let error = attention([&on_cpu; 3], &sequences).unwrap_err();
        assert!(error.0.contains("_flash_attention_forward"), "{error}");
    }
}
