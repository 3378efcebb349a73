//! Time of the CPU kernels at the sizes of SmolLM2-135M (9 query heads, 3 KV heads, head_dim 64).
//! `cargo bench -p onpolicy-engine --bench kernels`

use std::time::Instant;

use onpolicy_engine::kernels::attention::{
    BLOCK, Pages, PagesMut, Span, paged_attention, write_pages,
};

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const DIM: usize = 64;

fn main() {
    attention("decode, 64 sequences of 512", 64, 512, 1);
    attention("decode, 1 sequence of 2000", 1, 2000, 1);
    attention("prefill, 1 sequence of 512", 1, 512, 512);
    attention("prefill, 8 sequences of 512", 8, 512, 512);
    writing(512);
}

/// The best time of some runs, in seconds.
fn best(mut work: impl FnMut()) -> f64 {
    let started = Instant::now();
    let mut best = f64::INFINITY;
    while started.elapsed().as_secs_f64() < 1.0 {
        let run = Instant::now();
        work();
        best = best.min(run.elapsed().as_secs_f64());
    }
    best
}

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i.wrapping_mul(2_654_435_761) % 2048) as f32 / 1024.0 - 1.0).collect()
}

fn attention(name: &str, sequences: usize, context: usize, rows: usize) {
    let per_sequence = context.div_ceil(BLOCK);
    let blocks = sequences * per_sequence;
    let len = blocks * KV_HEADS * DIM * BLOCK;
    let (keys, values) = (numbers(len), numbers(len));
    let pages = Pages { keys: &keys, values: &values, kv_heads: KV_HEADS, head_dim: DIM };
    let q = numbers(sequences * rows * HEADS * DIM);
    let mut out = vec![0.0; q.len()];
    // An odd stride, so that neighbours in a sequence are not neighbours in memory.
    let stride = (blocks / 3) | 1;
    let table: Vec<u32> = (0..blocks).map(|i| (i * stride % blocks) as u32).collect();
    let spans: Vec<Span> = (0..sequences)
        .map(|i| Span {
            rows: i * rows..(i + 1) * rows,
            first_position: context - rows,
            blocks: &table[i * per_sequence..(i + 1) * per_sequence],
        })
        .collect();
    let seconds = best(|| paged_attention(&q, &mut out, &pages, &spans, None));
    let pairs: usize = (context - rows + 1..=context).sum::<usize>() * sequences;
    let flops = 4.0 * (pairs * HEADS * DIM) as f64;
    let bytes = (8 * sequences * context * KV_HEADS * DIM) as f64;
    println!(
        "attention, {name}: {:.3} ms, {:.1} GFLOP/s, {:.1} GB/s of pages",
        seconds * 1e3,
        flops / seconds / 1e9,
        bytes / seconds / 1e9
    );
}

fn writing(rows: usize) {
    let blocks = rows / BLOCK;
    let len = blocks * KV_HEADS * DIM * BLOCK;
    let (mut keys, mut values) = (vec![0.0; len], vec![0.0; len]);
    let k = numbers(rows * KV_HEADS * DIM);
    let slots: Vec<u32> = (0..rows as u32).collect();
    let seconds = best(|| {
        let (keys, values) = (&mut keys[..], &mut values[..]);
        let mut pages = PagesMut { keys, values, kv_heads: KV_HEADS, head_dim: DIM };
        write_pages(&k, &k, &mut pages, &slots);
    });
    println!("write_pages, {rows} rows: {:.3} ms", seconds * 1e3);
}
