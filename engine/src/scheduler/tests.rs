use super::*;

mod drafts;
mod order;

const ROOMY: [usize; 3] = [64, 8, 256];

/// A scheduler with so many blocks, sequences and tokens a step, and sequences of at most 128.
fn scheduler([num_blocks, max_num_seqs, max_batched_tokens]: [usize; 3]) -> Scheduler {
    let config = SchedulerConfig {
        num_blocks,
        max_num_seqs,
        max_batched_tokens,
        max_model_len: 128,
        max_waiting: 4,
        prefix_cache: true,
        drafts: DraftLimits::default(),
    };
    Scheduler::new(config).unwrap()
}

/// A request whose prompt is `len` tokens, equal to another's of the same `text` as far as it goes.
fn request(id: u64, text: u32, len: usize, n: usize) -> NewRequest {
    let prompt = (0..len as u32).map(|t| text * 1000 + t).collect();
    NewRequest {
        id: RequestId(id),
        prompt,
        n,
        max_tokens: 60,
        reuse_prefix: true,
        draft: true,
        priority: 0,
        cache_salt: None,
    }
}

fn add(s: &mut Scheduler, id: u64, text: u32, len: usize, n: usize) {
    s.add(request(id, text, len, n)).unwrap();
}

/// Plans, runs and draws token 1 everywhere.
fn step(s: &mut Scheduler) -> Step {
    let step = s.schedule();
    s.computed(&step);
    for chunk in step.chunks.iter().filter(|chunk| chunk.sample) {
        for id in s.fork(chunk.seq) {
            s.append(id, 1);
        }
    }
    s.check().unwrap();
    step
}

/// The chunks as (sequence, start, length, sampled).
fn chunks(step: &Step) -> Vec<(u64, usize, usize, bool)> {
    step.chunks.iter().map(|c| (c.seq.0, c.start, c.len, c.sample)).collect()
}

#[test]
fn a_group_computes_its_prompt_once_and_copies_what_it_writes_to() {
    let mut s = scheduler(ROOMY);
    add(&mut s, 9, 1, 20, 4);
    assert_eq!(chunks(&step(&mut s)), [(0, 0, 20, true)]);
    assert_eq!((s.running(), s.blocks_used()), (4, 2));
    let samples: Vec<&Sequence> =
        s.samples(RequestId(9)).iter().map(|&id| &s.sequences[&id]).collect();
    for (index, sample) in samples.iter().enumerate() {
        assert_eq!((sample.index, sample.computed, sample.pending()), (index, 20, 1));
        assert_eq!((sample.generated(), sample.blocks.as_slice()), (&[1][..], &[0, 1][..]));
    }
    let second = step(&mut s);
    assert_eq!(chunks(&second), [0, 1, 2, 3].map(|id| (id, 20, 1, true)));
    assert_eq!(second.copies, [(1, 2), (1, 3), (1, 4)], "the last holder writes in place");
    assert_eq!(s.blocks_used(), 5);
    assert_eq!(step(&mut s).copies, []);
    assert_eq!(s.blocks_used(), 5);
    for id in s.samples(RequestId(9)).to_vec() {
        s.finish(id);
    }
    assert_eq!((s.blocks_used(), s.is_idle()), (0, true));
}

#[test]
fn a_prompt_of_whole_blocks_is_never_copied() {
    let mut s = scheduler(ROOMY);
    add(&mut s, 0, 1, 32, 3);
    step(&mut s);
    assert_eq!(s.blocks_used(), 2);
    assert_eq!(step(&mut s).copies, []);
    assert_eq!(s.blocks_used(), 2 + 3);
}

#[test]
fn the_last_sample_left_writes_in_place() {
    let mut s = scheduler(ROOMY);
    add(&mut s, 0, 1, 20, 3);
    step(&mut s);
    s.finish(SeqId(0));
    s.finish(SeqId(2));
    let next = step(&mut s);
    assert_eq!((chunks(&next), next.copies.len()), (vec![(1, 20, 1, true)], 0));
    assert_eq!(s.blocks_used(), 2);
}

#[test]
fn a_long_prompt_is_cut_and_decodes_go_on() {
    let mut s = scheduler([64, 8, 32]);
    add(&mut s, 0, 1, 70, 1);
    assert_eq!(chunks(&step(&mut s)), [(0, 0, 32, false)]);
    add(&mut s, 1, 2, 5, 1);
    assert_eq!(chunks(&step(&mut s)), [(0, 32, 32, false)]);
    assert_eq!(chunks(&step(&mut s)), [(0, 64, 6, true), (1, 0, 5, true)]);
    add(&mut s, 2, 3, 40, 1);
    assert_eq!(chunks(&step(&mut s)), [(0, 70, 1, true), (1, 5, 1, true), (2, 0, 30, false)]);
    assert_eq!(chunks(&step(&mut s)), [(0, 71, 1, true), (1, 6, 1, true), (2, 30, 10, true)]);
    assert_eq!(chunks(&step(&mut s)), [(0, 72, 1, true), (1, 7, 1, true), (2, 40, 1, true)]);
}

#[test]
fn a_later_prompt_starts_from_full_blocks_and_computes_at_least_one_token() {
    for (first, later, hit) in [(40, 40, 32), (40, 33, 32), (40, 32, 16), (40, 16, 0), (15, 20, 0)]
    {
        let mut s = scheduler(ROOMY);
        add(&mut s, 0, 1, first, 1);
        step(&mut s);
        s.abort(RequestId(0));
        assert_eq!(s.blocks_used(), 0);
        add(&mut s, 1, 1, later, 1);
        assert_eq!(chunks(&step(&mut s)), [(1, hit, later - hit, true)]);
        let stats = s.stats();
        assert_eq!((stats.prefix_hits, stats.prefix_queries), (hit as u64, (first + later) as u64));
    }
}

#[test]
fn a_running_sequence_shares_its_prompt_and_its_answer() {
    let mut s = scheduler(ROOMY);
    add(&mut s, 0, 1, 30, 1);
    for _ in 0..4 {
        step(&mut s);
    }
    let mut next = request(1, 1, 30, 1);
    next.prompt.extend([1, 1, 1, 1]);
    s.add(next).unwrap();
    assert_eq!(chunks(&step(&mut s)), [(0, 33, 1, true), (1, 32, 2, true)]);
    assert_eq!(s.blocks_used(), 4, "two shared, one of each");
}

#[test]
fn equal_prompts_in_one_step_end_in_the_same_blocks() {
    let mut s = scheduler(ROOMY);
    add(&mut s, 0, 1, 40, 1);
    add(&mut s, 1, 1, 40, 1);
    assert_eq!(chunks(&step(&mut s)), [(0, 0, 40, true), (1, 0, 40, true)]);
    assert_eq!(s.blocks_used(), 4);
}

#[test]
fn a_prompt_that_must_be_computed_is_computed() {
    let mut s = scheduler(ROOMY);
    add(&mut s, 0, 1, 40, 1);
    step(&mut s);
    s.add(NewRequest { reuse_prefix: false, ..request(1, 1, 40, 1) }).unwrap();
    assert_eq!(chunks(&step(&mut s))[1], (1, 0, 40, true));
    assert_eq!(s.stats().prefix_queries, 40, "only the first one's");
}

#[test]
fn new_weights_reuse_nothing_and_mixed_sequences_leave_nothing() {
    let mut s = scheduler(ROOMY);
    add(&mut s, 0, 1, 30, 1);
    step(&mut s);
    s.set_version(1, false);
    assert_eq!(s.sequence(SeqId(0)).unwrap().kv_version, None);
    for _ in 0..3 {
        step(&mut s);
    }
    // Its first block was full before the update, its second one after: neither is found.
    let mut next = request(1, 1, 30, 1);
    next.prompt.extend([1; 4]);
    s.add(next).unwrap();
    assert_eq!(chunks(&step(&mut s)), [(0, 33, 1, true), (1, 0, 34, true)]);
    assert_eq!(s.sequence(SeqId(1)).unwrap().kv_version, Some(1));
    add(&mut s, 2, 1, 30, 1);
    assert_eq!(chunks(&step(&mut s))[2], (2, 16, 14, true), "found under the new weights");
}

#[test]
fn a_reset_cache_is_forgotten_and_running_sequences_keep_their_blocks() {
    let mut s = scheduler(ROOMY);
    add(&mut s, 0, 1, 40, 2);
    step(&mut s);
    let used = s.blocks_used();
    s.reset_prefix_cache();
    s.check().unwrap();
    assert_eq!((s.blocks_used(), s.blocks_used() + s.blocks_free()), (used, s.blocks_total()));
    add(&mut s, 1, 1, 40, 1);
    assert_eq!(chunks(&step(&mut s)).last(), Some(&(2, 0, 40, true)), "nothing is found");
    add(&mut s, 2, 1, 40, 1);
    assert_eq!(chunks(&step(&mut s)).last(), Some(&(3, 32, 8, true)), "what came later is");
    s.check().unwrap();
}

#[test]
fn a_version_that_returns_finds_nothing_of_its_first_time() {
    let mut s = scheduler(ROOMY);
    add(&mut s, 0, 1, 40, 1);
    step(&mut s);
    s.set_version(1, false);
    s.change_version(0, false);
    s.check().unwrap();
    add(&mut s, 1, 1, 40, 1);
    assert_eq!(chunks(&step(&mut s)).last(), Some(&(1, 0, 40, true)));
    // Other weights under the present version are other weights.
    s.change_version(0, false);
    add(&mut s, 2, 1, 40, 1);
    assert_eq!(chunks(&step(&mut s)).last(), Some(&(2, 0, 40, true)));
    s.check().unwrap();
}

#[test]
fn recompute_starts_running_sequences_over_under_the_new_weights() {
    let mut s = scheduler(ROOMY);
    add(&mut s, 0, 1, 20, 2);
    step(&mut s);
    step(&mut s);
    s.set_version(7, true);
    s.check().unwrap();
    assert_eq!((s.running(), s.preempted(), s.blocks_used()), (0, 2, 0));
    s.set_version(7, true);
    let again = step(&mut s);
    assert_eq!(chunks(&again), [(0, 0, 22, true), (1, 0, 22, true)]);
    assert_eq!(again.version, 7);
    assert_eq!(s.sequence(SeqId(1)).unwrap().kv_version, Some(7));
    assert_eq!(s.stats().preemptions, 0, "the pool was not full");
}

#[test]
fn a_step_planned_before_an_update_is_not_taken_for_new() {
    let mut s = scheduler(ROOMY);
    add(&mut s, 0, 1, 40, 1);
    let planned = s.schedule();
    s.set_version(1, false);
    s.computed(&planned);
    assert_eq!(s.sequence(SeqId(0)).unwrap().kv_version, None);
    add(&mut s, 1, 1, 40, 1);
    assert_eq!(chunks(&s.schedule()), [(1, 0, 40, true)]);
}

#[test]
fn the_latest_sequence_is_preempted_and_comes_back_first() {
    let mut s = scheduler([6, 4, 64]);
    for (id, text) in [(0, 1), (1, 2), (2, 3)] {
        add(&mut s, id, text, 15, 1);
    }
    add(&mut s, 3, 4, 15, 1);
    // One block each and one to spare for the last admitted: the fourth fits as well.
    step(&mut s);
    assert_eq!((s.running(), s.waiting(), s.blocks_used()), (4, 0, 4));
    add(&mut s, 4, 5, 15, 1);
    step(&mut s);
    // Token 16 fills each first block; token 17 needs a second one each.
    let third = step(&mut s);
    assert_eq!(chunks(&third), [(0, 16, 1, true), (1, 16, 1, true), (2, 16, 1, true)]);
    assert_eq!((s.running(), s.preempted(), s.waiting()), (3, 1, 1));
    assert_eq!((s.blocks_used(), s.stats().preemptions), (6, 1));
    s.finish(SeqId(1));
    // It needs two blocks and one to spare; the one behind it could begin, and does not overtake.
    assert_eq!(chunks(&step(&mut s)), [(0, 17, 1, true), (2, 17, 1, true)]);
    assert_eq!((s.blocks_free(), s.preempted(), s.waiting()), (2, 1, 1));
    s.finish(SeqId(0));
    assert_eq!(chunks(&step(&mut s)), [(2, 18, 1, true), (3, 0, 17, true), (4, 0, 15, true)]);
    assert_eq!((s.running(), s.preempted(), s.waiting()), (3, 0, 0));
}

#[test]
fn the_oldest_sequence_may_take_the_whole_pool() {
    let mut s = scheduler([4, 2, 64]);
    add(&mut s, 0, 1, 4, 2);
    let mut lens = [0, 0];
    for _ in 0..200 {
        for chunk in step(&mut s).chunks {
            let sequence = s.sequence(chunk.seq).unwrap();
            lens[sequence.index] = sequence.tokens.len();
            if sequence.tokens.len() == sequence.max_len {
                s.finish(chunk.seq);
            }
        }
    }
    assert_eq!((lens, s.is_idle(), s.blocks_used()), ([64, 64], true, 0));
    assert!(s.stats().preemptions >= 1);
}

#[test]
fn a_group_waits_for_a_place_for_each_sample_and_nobody_overtakes() {
    let mut s = scheduler([64, 4, 256]);
    add(&mut s, 0, 1, 5, 3);
    add(&mut s, 1, 2, 5, 2);
    add(&mut s, 2, 3, 5, 1);
    assert_eq!(chunks(&step(&mut s)), [(0, 0, 5, true)]);
    assert_eq!((s.running(), s.waiting()), (3, 2));
    s.finish(SeqId(2));
    let next = step(&mut s);
    assert_eq!(chunks(&next), [(0, 5, 1, true), (1, 5, 1, true), (3, 0, 5, true)]);
    assert_eq!((s.running(), s.waiting()), (4, 1));
}

#[test]
fn admission_leaves_the_blocks_that_a_cut_prompt_will_need() {
    let mut s = scheduler([8, 4, 32]);
    add(&mut s, 0, 1, 100, 1);
    step(&mut s);
    s.finish(SeqId(0));
    add(&mut s, 1, 1, 100, 1);
    add(&mut s, 2, 2, 5, 1);
    step(&mut s);
    assert_eq!((s.running(), s.waiting()), (1, 1));
    for _ in 0..3 {
        step(&mut s);
    }
    assert_eq!((s.running(), s.waiting(), s.blocks_used()), (1, 1, 7), "one free, two needed");
}

#[test]
fn samples_end_before_they_fork() {
    let mut s = scheduler([64, 8, 16]);
    add(&mut s, 5, 1, 40, 4);
    let id = |s: &Scheduler, index| s.sample(RequestId(5), index);
    let ids = [Some(SeqId(0)), Some(SeqId(1)), Some(SeqId(2)), Some(SeqId(3)), None];
    assert_eq!([0, 1, 2, 3, 4].map(|index| id(&s, index)), ids);
    s.finish(SeqId(2));
    step(&mut s);
    assert_eq!((s.running(), s.reserved), (1, 2));
    // The leader leaves after one of three pieces; the next sample goes on where it stood.
    s.finish(SeqId(0));
    s.check().unwrap();
    assert_eq!((s.running(), s.reserved, s.blocks_used()), (1, 1, 1));
    assert_eq!((id(&s, 0), id(&s, 1), id(&s, 2)), (None, Some(SeqId(1)), None));
    assert_eq!(chunks(&step(&mut s)), [(1, 16, 16, false)]);
    assert_eq!(chunks(&step(&mut s)), [(1, 32, 8, true)]);
    assert_eq!(s.samples(RequestId(5)), [SeqId(1), SeqId(3)]);
    assert_eq!([1, 3].map(|i| s.sequence(SeqId(i)).unwrap().index), [1, 3]);
    s.abort(RequestId(5));
    assert_eq!((s.is_idle(), s.blocks_used(), s.reserved), (true, 0, 0));
}

#[test]
fn a_leader_that_waits_is_replaced_in_its_place() {
    let mut s = scheduler([64, 2, 16]);
    add(&mut s, 0, 1, 5, 2);
    add(&mut s, 1, 2, 5, 2);
    add(&mut s, 2, 3, 5, 1);
    s.finish(SeqId(2));
    s.check().unwrap();
    assert_eq!((s.waiting(), s.sample(RequestId(1), 1)), (3, Some(SeqId(3))));
    s.abort(RequestId(0));
    assert_eq!(chunks(&step(&mut s)), [(3, 0, 5, true), (4, 0, 5, true)]);
    s.finish(SeqId(99));
    s.abort(RequestId(99));
    assert_eq!((s.fork(SeqId(99)), s.append(SeqId(99), 1)), (vec![], false));
}

#[test]
fn a_sample_ends_at_max_tokens_or_at_the_models_length() {
    for (len, max_tokens, new) in [(20, 3, 3), (120, 60, 8), (127, 60, 1)] {
        let mut s = scheduler(ROOMY);
        s.add(NewRequest { max_tokens, ..request(0, 1, len, 1) }).unwrap();
        for drawn in 1..=new {
            let step = s.schedule();
            s.computed(&step);
            assert_eq!(s.fork(SeqId(0)), [SeqId(0)]);
            assert_eq!(s.append(SeqId(0), 1), drawn == new);
        }
    }
}

#[test]
fn the_queue_has_an_end() {
    let mut s = scheduler(ROOMY);
    for id in 0..4 {
        add(&mut s, id, 1, 5, 2);
    }
    assert_eq!(s.add(request(4, 1, 5, 1)), Err(EngineError::Overloaded { waiting: 4 }));
    step(&mut s);
    assert_eq!((s.waiting(), s.running()), (0, 8));
    add(&mut s, 4, 1, 5, 1);
    // Preempted sequences do not count: their requests have been accepted.
    s.set_version(1, true);
    assert_eq!((s.waiting(), s.preempted()), (1, 8));
    add(&mut s, 5, 1, 5, 1);
}

#[test]
fn what_can_never_run_is_refused_and_leaves_nothing() {
    let mut s = scheduler([5, 2, 64]);
    for (len, n, max_tokens) in [(0, 1, 1), (128, 1, 1), (81, 1, 1), (40, 1, 42), (5, 3, 1)] {
        let refused = s.add(NewRequest { max_tokens, ..request(0, 1, len, n) });
        assert!(matches!(refused, Err(EngineError::Invalid { .. })), "{refused:?}");
        assert!(s.is_idle());
    }
    s.add(NewRequest { max_tokens: 41, ..request(0, 1, 40, 2) }).unwrap();
    let twice = s.add(request(0, 1, 5, 1));
    assert_eq!(twice, Err(EngineError::Internal("request 0 is there already".into())));
}

#[test]
fn held_admissions_let_what_has_begun_go_on() {
    let mut s = scheduler(ROOMY);
    add(&mut s, 0, 1, 20, 2);
    step(&mut s);
    s.hold_admissions(true);
    add(&mut s, 1, 2, 20, 1);
    assert_eq!(chunks(&step(&mut s)), [(0, 20, 1, true), (1, 20, 1, true)]);
    assert!(!s.is_drained());
    // Preempted sequences have begun: they come back although admissions are held.
    s.set_version(1, true);
    assert_eq!((s.running(), s.preempted(), s.is_drained()), (0, 2, false));
    assert_eq!(step(&mut s).num_tokens(), 44);
    s.abort(RequestId(0));
    assert!(s.is_drained() && step(&mut s).is_empty());
    s.hold_admissions(false);
    assert_eq!(chunks(&step(&mut s)), [(2, 0, 20, true)]);
}
