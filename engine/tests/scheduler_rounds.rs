//! 100,000 seeded random rounds of the scheduler and the block manager, against a model of what the
//! KV pages hold.

#[path = "scheduler_rounds/world.rs"]
mod world;

use onpolicy_engine::block_manager::BlockHash;
use onpolicy_engine::scheduler::{DraftLimits, SchedulerConfig};
use world::{Seen, World};

fn run(seed: u64, rounds: usize, config: SchedulerConfig, hash: Option<BlockHash>) -> Seen {
    run_in(World::new(seed, config, hash), rounds)
}

fn run_in(mut world: World, rounds: usize) -> Seen {
    for _ in 0..rounds {
        world.round();
    }
    world.drain();
    world.seen
}

/// Blocks, sequences, tokens a step, length, waiting requests.
fn limits([num_blocks, max_num_seqs, tokens, len, max_waiting]: [usize; 5]) -> SchedulerConfig {
    SchedulerConfig {
        num_blocks,
        max_num_seqs,
        max_batched_tokens: tokens,
        max_model_len: len,
        max_waiting,
        prefix_cache: true,
        drafts: DraftLimits::default(),
    }
}

#[test]
fn a_tight_pool_preempts_and_loses_nothing() {
    for (seed, config) in [[7, 6, 24, 120, 5], [12, 8, 16, 100, 5]].map(limits).iter().enumerate() {
        let seen = run(seed as u64, 20_000, config.clone(), None);
        assert!(seen.stats.preemptions > 100, "{seen:?}");
        assert!(seen.accepted > 1000 && seen.overloaded > 100, "{seen:?}");
        assert!(seen.copies > 1000 && seen.cut_prefills > 1000, "{seen:?}");
        assert!(seen.stats.prefix_hits > 10_000, "{seen:?}");
    }
}

#[test]
fn a_roomy_pool_shares_prefixes_and_loses_nothing() {
    let tables = [[40, 8, 64, 100, 8], [96, 16, 128, 90, 8], [400, 24, 512, 200, 8]];
    for (seed, config) in tables.map(limits).iter().enumerate() {
        let seen = run(100 + seed as u64, 12_000, config.clone(), None);
        assert!(seen.accepted > 1000 && seen.copies > 1000, "{seen:?}");
        assert!(seen.stats.prefix_hits * 10 > seen.stats.prefix_queries, "{seen:?}");
    }
}

#[test]
fn guesses_lose_nothing() {
    let tables = [[7, 6, 24, 120, 5], [96, 8, 64, 90, 8], [3, 1, 8, 40, 2]];
    for (seed, config) in tables.map(limits).into_iter().enumerate() {
        for (per_sequence, rows) in [(7, 8), (3, 16), (20, 64)] {
            let drafts = DraftLimits { per_sequence, rows };
            let config = SchedulerConfig { drafts, ..config.clone() };
            let seen = run(800 + seed as u64, 8_000, config, None);
            let [drawn, wrong] = seen.guessed;
            assert!(drawn > 500 && wrong > 500, "{seen:?}");
            assert!(seen.stats.accepted >= drawn as u64, "{seen:?}");
        }
    }
}

#[test]
fn steps_planned_before_their_tokens_are_known_lose_nothing() {
    let tables = [[7, 6, 24, 120, 5], [12, 8, 16, 100, 5], [40, 8, 64, 100, 8], [3, 1, 8, 40, 2]];
    for (seed, config) in tables.map(limits).into_iter().enumerate() {
        let seen = run_in(World::new(900 + seed as u64, config, None).ranked().eager(), 12_000);
        assert!(seen.accepted > 300 && seen.expected > 5_000, "{seen:?}");
        assert!(seen.roomy[0] > 1_000, "{seen:?}");
        assert!(seed > 1 || seen.roomy[1] > 100, "{seen:?}");
        assert!(seed > 1 || seen.stats.preemptions > 100, "{seen:?}");
    }
}

#[test]
fn priorities_decide_who_begins_and_salts_who_shares() {
    let tables = [[12, 8, 16, 100, 8], [96, 16, 128, 90, 8]];
    for (seed, config) in tables.map(limits).iter().enumerate() {
        let world = World::new(600 + seed as u64, config.clone(), None).ranked();
        let seen = run_in(world, 12_000);
        assert!(seen.accepted > 1000 && seen.overtaken > 300, "{seen:?}");
        assert!(seen.stats.prefix_hits > 10_000, "{seen:?}");
        let crowded = World::new(700 + seed as u64, config.clone(), Some(|_, _| 0)).ranked();
        assert!(run_in(crowded, 2_000).accepted > 100, "{seen:?}");
    }
}

#[test]
fn hash_collisions_are_harmless() {
    let hashes: [BlockHash; 3] = [
        |_, _| 0,
        |_, tokens| u64::from(tokens[15]),
        |parent, tokens| (parent + u64::from(tokens[0])) % 7,
    ];
    for (seed, hash) in hashes.into_iter().enumerate() {
        let config = limits([30, 8, 64, 100, 8]);
        let seen = run(200 + seed as u64, 10_000, config, Some(hash));
        assert!(seen.stats.prefix_hits > 0, "{seen:?}");
    }
}

#[test]
fn without_the_prefix_cache_nothing_is_reused() {
    let config = SchedulerConfig { prefix_cache: false, ..limits([20, 8, 64, 100, 8]) };
    let seen = run(300, 10_000, config, None);
    assert_eq!((seen.stats.prefix_hits, seen.stats.prefix_queries), (0, 0));
    assert!(seen.stats.preemptions > 100, "{seen:?}");
}

#[test]
fn one_sequence_at_a_time_gets_through() {
    let seen = run(400, 5_000, limits([3, 1, 1, 40, 2]), None);
    assert!(seen.accepted > 50, "{seen:?}");
    assert_eq!(seen.stats.preemptions, 0);
}

#[test]
fn the_same_seed_plans_the_same_steps() {
    let twice = [500, 500].map(|seed| run(seed, 500, limits([24, 8, 64, 100, 8]), None));
    assert_eq!(twice[0], twice[1]);
    let other = run(501, 500, limits([24, 8, 64, 100, 8]), None);
    assert_ne!(twice[0].trace, other.trace);
}
