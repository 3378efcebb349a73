//! Block manager and scheduler, without a model: what the engine's loop pays beside the tensors.
//! Elements are blocks, tokens or samples, as the name says.
//! `cargo bench --workspace --bench scheduler [-- PART]` runs those whose name contains PART.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use onpolicy_engine::block_manager::{BLOCK_SIZE, BlockManager, Chain, blocks_for};
use onpolicy_engine::scheduler::{DraftLimits, NewRequest, Scheduler, SchedulerConfig};
use onpolicy_plugin_api::RequestId;

const NUM_BLOCKS: usize = 8192;
/// Tokens of a long prompt: 62 full blocks and one of 8 tokens.
const LONG: usize = 1000;
/// Samples of a group that share the long prompt.
const SAMPLES: usize = 16;
/// Tokens of a prompt in training.
const PROMPT: usize = 41;
/// Samples of each such prompt.
const GROUP: usize = 8;
/// New tokens of each sample.
const NEW: usize = 128;

criterion_group! {
    name = scheduling;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = blocks, prefix, samples, steps
}
criterion_main!(scheduling);

fn blocks(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("block manager");
    let mut manager = BlockManager::new(NUM_BLOCKS);
    let mut table = Vec::new();
    group.throughput(Throughput::Elements(blocks_for(LONG) as u64));
    group.bench_function(format!("allocate and free {} blocks", blocks_for(LONG)), |bench| {
        bench.iter(|| {
            assert!(manager.prepare(&mut table, 0..LONG, &mut Vec::new()));
            manager.release_table(black_box(&mut table));
        });
    });
}

/// A manager in which the full blocks of a long prompt are registered, the prompt, and its table.
fn registered() -> (BlockManager, Vec<u32>, Vec<u32>) {
    let mut manager = BlockManager::new(NUM_BLOCKS);
    let tokens: Vec<u32> = (0..LONG as u32).map(|i| i.wrapping_mul(7919) % 49_152).collect();
    let mut table = Vec::new();
    assert!(manager.prepare(&mut table, 0..LONG, &mut Vec::new()));
    let mut chain = Chain::root(0);
    for _ in tokens.as_chunks::<BLOCK_SIZE>().0 {
        chain = manager.register(chain, &tokens, &mut table).expect("no collision");
    }
    (manager, tokens, table)
}

fn prefix(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("prefix cache");
    let (manager, tokens, table) = registered();
    let (_, found) = manager.lookup(0, &tokens, usize::MAX);
    assert_eq!(found, table[..LONG / BLOCK_SIZE]);
    group.throughput(Throughput::Elements(LONG as u64));
    group.bench_function(format!("look up {LONG} tokens"), |bench| {
        bench.iter(|| manager.lookup(0, black_box(&tokens), usize::MAX));
    });
}

fn samples(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("samples of a group");
    group.throughput(Throughput::Elements(SAMPLES as u64));
    let (mut manager, _, table) = registered();
    group.bench_function(
        format!("fork {SAMPLES} samples of {LONG} tokens, and free them"),
        |bench| {
            bench.iter(|| {
                let fork = |_| {
                    manager.share(&table);
                    table.clone()
                };
                let mut tables: Vec<Vec<u32>> = (0..SAMPLES).map(fork).collect();
                tables.iter_mut().for_each(|table| manager.release_table(table));
            });
        },
    );
    // The last block of the prompt is not full, and shared by all.
    let (last, next) = (table[LONG / BLOCK_SIZE], LONG % BLOCK_SIZE);
    group.bench_function(format!("copy the block that {SAMPLES} samples write into"), |bench| {
        bench.iter(|| {
            let mut copies = Vec::with_capacity(SAMPLES);
            let mut tables = vec![vec![last]; SAMPLES];
            for table in &mut tables {
                manager.share(table);
                assert!(manager.prepare(table, next..next + 1, &mut copies));
            }
            tables.iter_mut().for_each(|table| manager.release_table(table));
            copies
        });
    });
}

/// A scheduler with room for 256 samples.
fn scheduler() -> Scheduler {
    let config = SchedulerConfig {
        num_blocks: NUM_BLOCKS,
        max_num_seqs: 256,
        max_batched_tokens: 2048,
        max_model_len: 2048,
        max_waiting: 256,
        prefix_cache: true,
        drafts: DraftLimits { per_sequence: 7, rows: 8 },
    };
    Scheduler::new(config).expect("limits that make sense")
}

fn requests(count: usize) -> Vec<NewRequest> {
    let prompt = |id: usize| (0..PROMPT).map(|i| ((id * 997 + i * 7919) % 49_152) as u32).collect();
    let request = |id| NewRequest {
        id: RequestId(id as u64),
        prompt: prompt(id),
        n: GROUP,
        max_tokens: NEW,
        reuse_prefix: true,
        draft: true,
        priority: 0,
        cache_salt: None,
    };
    (0..count).map(request).collect()
}

/// One step of the engine, with made-up tokens; gives how many were drawn.
fn step(scheduler: &mut Scheduler) -> usize {
    let step = scheduler.schedule();
    scheduler.computed(&step);
    let mut drawn = 0;
    for chunk in step.chunks.iter().filter(|chunk| chunk.sample) {
        for seq in scheduler.fork(chunk.seq) {
            drawn += 1;
            if scheduler.append(seq, (drawn * 31 + chunk.start) as u32) {
                scheduler.finish(seq);
            }
        }
    }
    drawn
}

/// Takes the requests, and computes their prompts.
fn admit(scheduler: &mut Scheduler, requests: Vec<NewRequest>) {
    for request in requests {
        scheduler.add(request).expect("a request that fits");
    }
    step(scheduler);
}

fn steps(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scheduler");
    let groups = 32;
    group.throughput(Throughput::Elements((groups * GROUP) as u64));
    group.bench_function(format!("admit {groups} groups of {GROUP} samples"), |bench| {
        bench.iter_batched(
            || (scheduler(), requests(groups)),
            |(mut scheduler, requests)| {
                admit(&mut scheduler, requests);
                assert_eq!(scheduler.running(), groups * GROUP);
                scheduler
            },
            BatchSize::LargeInput,
        );
    });
    let samples = 64;
    let steps = NEW - 1;
    group.throughput(Throughput::Elements((steps * samples) as u64));
    group.bench_function(format!("{steps} steps of {samples} samples that decode"), |bench| {
        bench.iter_batched_ref(
            || {
                let mut scheduler = scheduler();
                admit(&mut scheduler, requests(samples / GROUP));
                scheduler
            },
            |scheduler| {
                let drawn: usize = (0..steps).map(|_| step(scheduler)).sum();
                assert_eq!((drawn, scheduler.is_idle()), (steps * samples, true));
            },
            BatchSize::LargeInput,
        );
    });
}
