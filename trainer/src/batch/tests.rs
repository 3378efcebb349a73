use super::*;

struct DropEvery(usize);

impl TokenGate for DropEvery {
    fn keep(&self, batch: &TokenBatch<'_>) -> Vec<bool> {
        (0..batch.len()).map(|token| token % self.0 != 0).collect()
    }
}

fn sample(tokens: &[u32], advantage: f32) -> TrainSample {
    let column = |scale: f32| tokens.iter().map(|&t| t as f32 * scale).collect();
    TrainSample {
        tokens: tokens.to_vec(),
        logprob: column(-0.125),
        entropy: column(0.25),
        baseline: column(0.5),
        advantage,
    }
}

fn batch() -> TrainBatch {
    let groups = vec![
        TrainGroup {
            prompt: vec![1, 2, 3],
            samples: vec![sample(&[10, 11, 12], 1.0), sample(&[13], -1.0)],
            teaches: true,
        },
        TrainGroup {
            prompt: vec![6],
            samples: vec![sample(&[30, 31, 32, 33], 0.0)],
            teaches: false,
        },
        TrainGroup { prompt: vec![4, 5], samples: vec![sample(&[20, 21], 0.5)], teaches: true },
    ];
    TrainBatch::new(groups, &DropEvery(3))
}

#[test]
fn a_prompt_stands_once_and_every_token_knows_its_row() {
    let mini_batch = &batch().mini_batches(1, 100)[0];
    assert_eq!(mini_batch.micro_batches.len(), 1);
    let micro = &mini_batch.micro_batches[0];
    // Rows: 1 2 3 | 10 11 | (13 needs none) || 4 5 | 20
    assert_eq!(micro.pack.len(), 8);
    assert_eq!(micro.targets, [10, 11, 12, 13, 20, 21]);
    assert_eq!(micro.rows, [2, 3, 4, 2, 6, 7]);
    assert_eq!(micro.advantage, [1.0, 1.0, 1.0, -1.0, 0.5, 0.5]);
    assert_eq!(micro.keep, [false, true, true, false, true, false]);
    assert_eq!(micro.old_logprob[3], -1.625);
    assert_eq!(Vec::<i64>::try_from(micro.pack.positions()).unwrap(), [0, 1, 2, 3, 4, 0, 1, 2]);
    // Three of these and three of the group that teaches nothing.
    assert_eq!(mini_batch.kept, 6);
}

#[test]
fn packs_respect_the_row_limit_and_lose_no_token() {
    for max_rows in 1..10 {
        let parts = batch().mini_batches(1, max_rows);
        let micros = &parts[0].micro_batches;
        let tokens: Vec<u32> = micros.iter().flat_map(|m| m.targets.clone()).collect();
        assert_eq!(tokens, [10, 11, 12, 13, 20, 21], "max_rows {max_rows}");
        let keep: Vec<bool> = micros.iter().flat_map(|m| m.keep.clone()).collect();
        assert_eq!(keep, [false, true, true, false, true, false], "max_rows {max_rows}");
        for micro in micros {
            assert!(micro.pack.len() <= max_rows.max(5), "max_rows {max_rows}");
        }
    }
    let packs = |max_rows| batch().mini_batches(1, max_rows)[0].micro_batches.len();
    assert_eq!(packs(5), 2);
    // The first group alone is too large: it is cut between its samples.
    assert_eq!(packs(4), 3);
}

#[test]
fn a_probe_takes_samples_of_every_group() {
    let probe = |count| batch().probe(count, 100).remove(0);
    assert_eq!(probe(2).targets, [10, 11, 12, 20, 21]);
    assert_eq!(probe(2).old_entropy[3], 5.0);
    assert_eq!(probe(4).targets, [10, 11, 12, 13, 20, 21]);
    assert_eq!(probe(1).targets, [10, 11, 12]);
    let small = batch().probe(4, 4);
    let targets: Vec<Vec<u32>> = small.into_iter().map(|micro| micro.targets).collect();
    assert_eq!(targets, [vec![10, 11, 12], vec![13], vec![20, 21]]);
    assert!(TrainBatch::default().probe(8, 100)[0].pack.is_empty());
}

#[test]
fn packs_know_where_their_tokens_stand_and_what_was_noted_of_them() {
    let mut batch = batch();
    assert_eq!(batch.span(), Span { least: 5, most: 8 });
    let last = batch.mini_batches(2, 100).remove(1).micro_batches.remove(0);
    assert_eq!((&last.tokens[..], last.own_logprob.len()), (&[8, 9][..], 0));
    batch.note_own_logprobs(&last, [-0.5, -0.25].into_iter());
    for rows in [100, 3] {
        let parts = batch.mini_batches(2, rows);
        let noted = |part: usize| -> Vec<f32> {
            parts[part].micro_batches.iter().flat_map(|m| m.own_logprob.clone()).collect()
        };
        assert!(noted(0).len() == 4 && noted(0).iter().all(|logprob| logprob.is_nan()));
        assert_eq!(noted(1), [-0.5, -0.25]);
    }
}

#[test]
fn mini_batches_hold_whole_groups() {
    let parts = batch().mini_batches(2, 100);
    assert_eq!(parts.len(), 2);
    assert_eq!(parts[1].micro_batches[0].targets, [20, 21]);
    assert_eq!(parts[1].micro_batches[0].keep, [true, false]);
    assert_eq!((parts[0].kept, parts[1].kept), (2, 4));
    // The group that teaches nothing makes no mini-batch of its own.
    assert_eq!(batch().mini_batches(3, 100).len(), 2);
    assert_eq!(batch().mini_batches(7, 100).len(), 2);
}
