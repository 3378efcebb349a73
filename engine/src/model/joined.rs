//! Weights that are multiplied with the same input, one after the other in memory: then one product
//! does for all of them.

use crate::device::is_native;
use tch::Tensor;

/// Parts of a layer that have the same input.
const SAME_INPUT: [&[&str]; 2] = [
    &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    &["mlp.gate_proj", "mlp.up_proj"],
];

/// Lays the weights, and the biases, of parts with the same input one after the other, each group in
/// one storage of its own; native tensors stay as they are. Takes the memory of one group beside what
/// there is.
///
/// # Errors
/// There is not as much.
pub fn join(tensors: &mut [(String, Tensor)]) -> Result<(), tch::TchError> {
    for group in groups(tensors) {
        let parts: Vec<&Tensor> = group.iter().map(|&index| &tensors[index].1).collect();
        let whole = crate::torch::no_grad(|| Tensor::f_cat(&parts, 0))?;
        let mut end = 0;
        for index in group {
            let rows = tensors[index].1.size()[0];
            tensors[index].1 = whole.f_narrow(0, end, rows)?;
            end += rows;
        }
    }
    Ok(())
}

/// Places of the tensors of each group that is whole and of one type.
fn groups(tensors: &[(String, Tensor)]) -> Vec<Vec<usize>> {
    let place = |wanted: &str| tensors.iter().position(|(name, _)| name == wanted);
    let mut found = Vec::new();
    for (name, _) in tensors.iter().filter(|(_, tensor)| !is_native(tensor)) {
        for parts in SAME_INPUT {
            // "model.layers.3." + part + ".weight"
            let Some((layer, kind)) = name.split_once(parts[0]) else { continue };
            let places: Option<Vec<usize>> =
                parts.iter().map(|part| place(&format!("{layer}{part}{kind}"))).collect();
            let alike = |places: &Vec<usize>| {
                let tensors = places.iter().map(|&index| &tensors[index].1);
                let kinds: Vec<_> =
                    tensors.map(|t| (t.kind(), t.device(), t.size()[1..].to_vec())).collect();
                kinds.windows(2).all(|pair| pair[0] == pair[1])
            };
            found.extend(places.filter(alike));
        }
    }
    found
}

/// The parts as one tensor, if they lie one after the other in one storage. None if one of them
/// collects a gradient of its own, or for native tensors, whose kernels take several weights at once.
pub fn joined(parts: &[&Tensor]) -> Option<Tensor> {
    if parts.iter().any(|part| is_native(part)) {
        return None;
    }
    let mut next = parts.first()?.data_ptr() as usize;
    let mut rows = 0;
    for part in parts {
        let follows = part.data_ptr() as usize == next && part.is_contiguous();
        if !follows || part.requires_grad() {
            return None;
        }
        next += part.numel() * part.kind().elt_size_in_bytes();
        rows += part.size()[0];
    }
    let mut size = parts[0].size();
    size[0] = rows;
    // Refused where the parts are neighbours by chance, in storages of their own.
    parts[0].f_as_strided(&size, parts[0].stride(), None::<i64>).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torch::random;
    use tch::Kind;

    fn tensors() -> Vec<(String, Tensor)> {
        random::seed(1);
        let random = |shape: &[i64]| random::normal(shape).to_kind(Kind::BFloat16);
        [
            ("model.layers.0.self_attn.k_proj.weight", vec![2, 8]),
            ("model.layers.0.self_attn.q_proj.weight", vec![6, 8]),
            ("model.layers.0.self_attn.v_proj.weight", vec![2, 8]),
            ("model.layers.0.self_attn.q_proj.bias", vec![6]),
            ("model.layers.0.mlp.gate_proj.weight", vec![5, 8]),
            ("model.layers.0.mlp.up_proj.weight", vec![5, 8]),
            ("model.norm.weight", vec![8]),
        ]
        .map(|(name, shape)| (name.to_string(), random(&shape)))
        .into()
    }

    #[test]
    fn parts_with_one_input_lie_together() {
        let before = tensors();
        let mut after = tensors();
        join(&mut after).unwrap();
        for ((name, before), (same, after)) in before.iter().zip(&after) {
            assert!(name == same && before.equal(after) && after.is_contiguous(), "{name}");
        }
        let [k, q, v] = [0, 1, 2].map(|index| &after[index].1);
        let qkv = joined(&[q, k, v]).unwrap();
        assert!(qkv.equal(&Tensor::cat(&[q, k, v], 0)));
        assert_eq!(qkv.data_ptr(), q.data_ptr(), "nothing was copied");
        let gate_up = joined(&[&after[4].1, &after[5].1]).unwrap();
        assert_eq!(gate_up.size(), [10, 8]);
        assert!(joined(&[k, q, v]).is_none(), "not in this order");
        let leaf = k.detach().set_requires_grad(true);
        assert!(joined(&[q, &leaf, v]).is_none());
        let [a, b] = [&before[4].1, &before[5].1];
        assert!(joined(&[a, b]).is_none(), "two storages");
        assert!(joined(&[]).is_none());
    }
}
