//! Guesses: which decodes get them, and what becomes of them.

use super::*;

/// A scheduler that guesses up to `per_sequence` tokens, in steps of up to `rows` rows.
fn guessing(per_sequence: usize, rows: usize, num_blocks: usize) -> Scheduler {
    let mut config = scheduler(ROOMY).config;
    config.drafts = DraftLimits { per_sequence, rows };
    config.num_blocks = num_blocks;
    Scheduler::new(config).unwrap()
}

/// Plans and runs a step, and lets every sample draw what `next` says of its tokens, as far as its
/// guesses are right.
fn step(s: &mut Scheduler, next: impl Fn(&[u32]) -> u32) -> Step {
    let step = s.schedule();
    s.check().unwrap();
    s.computed(&step);
    for chunk in step.chunks.iter().filter(|chunk| chunk.sample) {
        for id in s.fork(chunk.seq) {
            for ahead in 0..=chunk.drafts {
                if ahead == 0 || s.draws(id) {
                    let token = next(&s.sequences[&id].tokens);
                    if s.append(id, token) {
                        s.finish(id);
                    }
                }
            }
        }
    }
    s.check().unwrap();
    step
}

/// The token after the last one, around and around.
fn count(tokens: &[u32]) -> u32 {
    (tokens[tokens.len() - 1] + 1) % 5
}

fn counting(id: u64, len: u32, n: usize) -> NewRequest {
    NewRequest { prompt: (0..len).map(|t| t % 5).collect(), ..request(id, 0, 1, n) }
}

fn drafts(step: &Step) -> Vec<usize> {
    step.chunks.iter().map(|chunk| chunk.drafts).collect()
}

#[test]
fn right_guesses_save_steps_and_change_nothing() {
    let mut s = guessing(3, 8, 64);
    s.add(counting(0, 6, 1)).unwrap();
    let prefill = step(&mut s, count);
    assert_eq!((chunks(&prefill), drafts(&prefill)), (vec![(0, 0, 6, true)], vec![0]));
    let decode = step(&mut s, count);
    assert_eq!((chunks(&decode), drafts(&decode)), (vec![(0, 6, 4, true)], vec![3]));
    let sequence = s.sequence(SeqId(0)).unwrap();
    assert_eq!(sequence.generated(), [1, 2, 3, 4, 0]);
    assert_eq!((sequence.computed, sequence.pending()), (10, 1));
    let mut steps = 2;
    let mut tokens = Vec::new();
    while let Some(sequence) = s.sequence(SeqId(0)) {
        tokens = sequence.tokens.clone();
        step(&mut s, count);
        steps += 1;
    }
    // 60 tokens: one of the prefill, four of each step but the last.
    assert_eq!((steps, tokens.len()), (1 + 15, 6 + 57));
    assert_eq!((s.stats().drafted, s.stats().accepted), (14 * 3 + 2, 14 * 3 + 2));
}

#[test]
fn what_follows_a_wrong_guess_is_computed_again() {
    let mut s = guessing(3, 8, 64);
    s.add(counting(0, 6, 1)).unwrap();
    step(&mut s, count);
    // 1 is there; 2, 3, 4 are guessed.
    let decode = step(&mut s, |tokens| if tokens.len() == 8 { 9 } else { count(tokens) });
    assert_eq!(drafts(&decode), [3]);
    let sequence = s.sequence(SeqId(0)).unwrap();
    assert_eq!(sequence.generated(), [1, 2, 9]);
    assert_eq!((sequence.computed, sequence.drafts.len()), (8, 0));
    let next = step(&mut s, count);
    assert_eq!((chunks(&next), drafts(&next)), (vec![(0, 8, 1, true)], vec![0]), "9 is news");
    assert_eq!((s.stats().drafted, s.stats().accepted), (3, 1));
}

#[test]
fn rows_to_spare_are_shared_and_a_crowd_has_none() {
    for (n, shares) in [(1, vec![7]), (2, vec![3, 3]), (3, vec![2, 2, 1]), (8, vec![0; 8])] {
        let mut s = guessing(7, 8, 64);
        s.add(counting(0, 12, n)).unwrap();
        step(&mut s, count);
        assert_eq!(drafts(&step(&mut s, count)), shares, "{n} samples");
    }
    // A prompt takes the rows.
    let mut s = guessing(7, 8, 64);
    s.add(counting(0, 12, 1)).unwrap();
    step(&mut s, count);
    s.add(counting(1, 30, 1)).unwrap();
    assert_eq!(drafts(&step(&mut s, count)), [0, 0]);
}

#[test]
fn requests_that_look_back_are_left_alone() {
    let mut s = guessing(7, 8, 64);
    s.add(NewRequest { draft: false, ..counting(0, 12, 1) }).unwrap();
    s.add(counting(1, 12, 1)).unwrap();
    step(&mut s, count);
    assert_eq!(drafts(&step(&mut s, count)), [0, 6]);
}

#[test]
fn guesses_take_no_block_that_another_needs() {
    // Two samples of a block each and one block for each to go on: none is left for guesses.
    let mut s = guessing(7, 8, 4);
    s.add(NewRequest { max_tokens: 15, ..counting(0, 12, 1) }).unwrap();
    s.add(NewRequest { max_tokens: 15, ..counting(1, 12, 1) }).unwrap();
    step(&mut s, count);
    assert_eq!(drafts(&step(&mut s, count)), [3, 3]);
    while !s.is_idle() {
        step(&mut s, count);
    }
    assert_eq!(s.stats().preemptions, 0);
}

#[test]
fn forgetting_the_cache_forgets_what_was_learnt() {
    let mut s = guessing(7, 8, 64);
    s.add(counting(0, 12, 1)).unwrap();
    step(&mut s, count);
    s.reset_prefix_cache();
    assert_eq!(drafts(&step(&mut s, count)), [0]);
}
