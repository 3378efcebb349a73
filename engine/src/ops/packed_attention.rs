//! Attention within packed groups.

use super::may_record;
use crate::{
    kernels::packed::{Gradients, PackedAttention as Kernel, PackedGroup, Saved},
    torch::{
        function::{Function, apply},
        slices::{floats, floats_mut},
    },
};
use std::sync::{Arc, Mutex, PoisonError};
use tch::{Device, Kind, Tensor};

/// Every row of `groups` attends to what stands before it in its own sequence, with scale
/// `1 / sqrt(head_dim)`: `q` `[N, heads, head_dim]`, `k` and `v` `[N, kv_heads, head_dim]`;
/// `[N, heads * head_dim]`. With a window `w`, position `p` sees positions `p - w + 1 ..= p`. The
/// output is that of the engine's attention over pages, bitwise.
///
/// # Panics
/// If a shape does not fit, or a tensor is not f32 on the CPU.
pub fn packed_attention(
    [q, k, v]: [&Tensor; 3],
    groups: &Arc<Vec<PackedGroup>>,
    window: Option<usize>,
) -> Tensor {
    let inputs = [q.contiguous(), k.contiguous(), v.contiguous()];
    let function = PackedAttention { groups: groups.clone(), window, saved: Mutex::new(None) };
    if !may_record(&[q, k, v]) {
        return function.forward(&inputs);
    }
    let inputs: Vec<&Tensor> = inputs.iter().collect();
    apply(function, &inputs).unwrap_or_else(|error| panic!("packed_attention: {error}"))
}

struct PackedAttention {
    groups: Arc<Vec<PackedGroup>>,
    window: Option<usize>,
    /// The output without its graph, and the logarithms of its sums.
    saved: Mutex<Option<[Tensor; 2]>>,
}

impl PackedAttention {
    fn kernel<'a>(&'a self, inputs: &'a [Tensor]) -> Kernel<'a> {
        let (_, kv_heads, head_dim) = inputs[1].size3().expect("k has three axes");
        Kernel {
            q: floats(&inputs[0]),
            k: floats(&inputs[1]),
            v: floats(&inputs[2]),
            groups: &self.groups,
            kv_heads: kv_heads as usize,
            head_dim: head_dim as usize,
            window: self.window,
        }
    }
}

impl Function for PackedAttention {
    fn forward(&self, inputs: &[Tensor]) -> Tensor {
        let (rows, heads, head_dim) = inputs[0].size3().expect("q has three axes");
        let empty = |width| Tensor::empty([rows, width], (Kind::Float, Device::Cpu));
        let (mut out, mut log_sums) = (empty(heads * head_dim), empty(heads));
        self.kernel(inputs).forward(floats_mut(&mut out), floats_mut(&mut log_sums));
        // A handle of its own: the graph must not hold the tensor that holds the graph.
        let saved = [out.detach(), log_sums];
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        out
    }

    fn backward(&self, inputs: &[Tensor], gradient: &Tensor) -> Vec<Option<Tensor>> {
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner).take();
        let [out, log_sums] = saved.expect("one backward pass after one forward pass");
        let gradient = gradient.contiguous();
        let [mut by_q, mut by_k, mut by_v] = [0, 1, 2].map(|i| inputs[i].empty_like());
        let saved =
            Saved { out: floats(&out), log_sums: floats(&log_sums), gradient: floats(&gradient) };
        let mut by = Gradients {
            q: floats_mut(&mut by_q),
            k: floats_mut(&mut by_k),
            v: floats_mut(&mut by_v),
        };
        self.kernel(inputs).backward(&saved, &mut by);
        vec![Some(by_q), Some(by_k), Some(by_v)]
    }
}

#[cfg(test)]
mod tests;
