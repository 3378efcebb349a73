//! Every instruction set against the best one; gradients against libtorch's are in
//! `ops/packed_attention`.

use super::items::run_at;
use super::*;
use crate::kernels::simd::Level;
use rand::{Rng, SeedableRng, rngs::StdRng};

#[test]
fn instruction_sets_agree() {
    let mut rng = StdRng::seed_from_u64(1);
    let groups = [
        PackedGroup { prompt: 0..20, tails: vec![70, 3] },
        PackedGroup { prompt: 93..94, tails: vec![5] },
    ];
    for (heads, kv_heads, head_dim) in [(3, 1, 24), (4, 2, 64)] {
        let mut random = |heads: usize| -> Vec<f32> {
            (0..99 * heads * head_dim).map(|_| rng.random::<f32>() - 0.5).collect()
        };
        let (q, gradient) = (random(heads), random(heads));
        let (k, v) = (random(kv_heads), random(kv_heads));
        let attention = PackedAttention {
            q: &q,
            k: &k,
            v: &v,
            groups: &groups,
            kv_heads,
            head_dim,
            window: None,
        };
        let (mut out, mut log_sums) = (vec![0.0; q.len()], vec![0.0; 99 * heads]);
        attention.forward(&mut out, &mut log_sums);
        let saved = Saved { out: &out, log_sums: &log_sums, gradient: &gradient };
        let at = |level| {
            let (mut by_q, mut by_k, mut by_v) = (q.clone(), k.clone(), v.clone());
            let mut by = Gradients { q: &mut by_q, k: &mut by_k, v: &mut by_v };
            run_at(level, &attention, &saved, &mut by);
            [by_q, by_k, by_v].concat()
        };
        let want = at(Level::best());
        assert_eq!(want, at(Level::best()), "the same sums in every run");
        for level in Level::available() {
            for (got, want) in at(level).iter().zip(&want) {
                assert!((got - want).abs() < 1e-5, "{level:?}: {got}, not {want}");
            }
        }
    }
}
