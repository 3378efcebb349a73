//! What the rules of sampling do to the native engine's tokens and log-probs, against logits of the
//! whole sequence and the golden values.

mod common;

use common::{assert_close, engine, floats, golden, ids, json, tiny};
use onpolicy_engine::{
    collect::{CollectError, Samples, collect},
    engine::{EngineConfig, EngineHandle},
    kv_cache::KvCache,
    model::{
        attention::{Attention, Pack},
        decoder::Decoder,
        loading::Checkpoint,
    },
    torch::slices,
    weights::{ServeDtype, Weights},
};
use onpolicy_plugin_api::{
    Engine, EngineError, Event, FinishReason, LogprobsMode, PromptToken, Request, SamplingParams,
    Sink, TokenStats,
};
use std::{
    collections::HashSet,
    sync::mpsc,
    time::{Duration, Instant},
};

fn config() -> EngineConfig {
    EngineConfig { kv_memory: 8 << 20, max_num_seqs: 64, ..EngineConfig::default() }
}

fn greedy(max_tokens: usize) -> SamplingParams {
    let temperature = 0.0;
    SamplingParams { temperature, max_tokens, ignore_eos: true, ..SamplingParams::default() }
}

fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| 3 + (seed * 31 + i * 7) % 150).collect()
}

fn run(engine: &EngineHandle, requests: Vec<Request>) -> Vec<Samples> {
    let deadline = Instant::now() + Duration::from_secs(60);
    collect(engine, requests, deadline, &mut || {}).expect("the engine answers")
}

fn tokens(engine: &EngineHandle, prompt: &[u32], params: &SamplingParams) -> Vec<Vec<u32>> {
    let group = run(engine, vec![Request::new(prompt.to_vec(), params.clone())]).remove(0);
    group.samples.iter().map(|s| s.tokens.iter().map(|token| token.id).collect()).collect()
}

/// Logits of every position, from the trainer's path.
fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<Vec<f32>> {
    let weights = checkpoint.tensors.iter().map(|(n, t)| (n.clone(), t.shallow_clone()));
    let decoder = Decoder::new(&checkpoint.config, &Weights::new(weights.collect()));
    let mut pack = Pack::default();
    pack.push(&tokens[..1], &[&tokens[1..]]);
    let logits = onpolicy_engine::torch::no_grad(|| {
        let mut attention = Attention::Causal(&pack);
        decoder.logits(&decoder.hidden(&pack.tokens(), &pack.positions(), &mut attention))
    });
    slices::floats(&logits).chunks(checkpoint.config.vocab_size).map(<[f32]>::to_vec).collect()
}

/// Greedy tokens, every one from the logits of the whole sequence and counts made anew.
fn naive(checkpoint: &Checkpoint, prompt: &[u32], params: &SamplingParams) -> Vec<u32> {
    let mut all = prompt.to_vec();
    for _ in 0..params.max_tokens {
        let mut row = logits(checkpoint, &all).pop().expect("a last row");
        for (id, z) in row.iter_mut().enumerate() {
            let id = id as u32;
            let count = all[prompt.len()..].iter().filter(|token| **token == id).count();
            if all.contains(&id) {
                let r = params.repetition_penalty;
                *z = if *z > 0.0 { *z / r } else { *z * r };
            }
            *z -= params.frequency_penalty * count as f32;
            *z -= if count > 0 { params.presence_penalty } else { 0.0 };
            *z += params
                .logit_bias
                .iter()
                .filter(|(other, _)| *other == id)
                .map(|b| b.1)
                .sum::<f32>();
            let with = [&all[prompt.len()..], &[id]].concat();
            let bad = params.bad_words.iter().any(|word| with.ends_with(word));
            let allowed = params.allowed_token_ids.as_ref().is_none_or(|ids| ids.contains(&id));
            if bad || !allowed {
                *z = f32::NEG_INFINITY;
            }
        }
        let most = row.iter().copied().fold(f32::MIN, f32::max);
        all.push(row.iter().position(|z| *z == most).expect("the largest") as u32);
    }
    all.split_off(prompt.len())
}

#[test]
fn greedy_tokens_are_those_of_a_naive_recomputation() {
    for name in ["llama-tied", "qwen3"] {
        let checkpoint = tiny(name);
        let served = engine(&checkpoint, config());
        let prompt = prompt(3, 30);
        let free = tokens(&served, &prompt, &greedy(24)).remove(0);
        assert_eq!(free, naive(&checkpoint, &prompt, &greedy(24)), "{name}");
        let cases = [
            SamplingParams { repetition_penalty: 1.4, ..greedy(24) },
            SamplingParams { presence_penalty: 1.5, ..greedy(24) },
            SamplingParams { frequency_penalty: -0.7, ..greedy(24) },
            SamplingParams { logit_bias: vec![(9, 2.0), (free[0], -3.0)], ..greedy(24) },
            SamplingParams { bad_words: vec![free[1..4].to_vec(), vec![free[5]]], ..greedy(24) },
            SamplingParams { allowed_token_ids: Some((20..60).collect()), ..greedy(24) },
            SamplingParams {
                repetition_penalty: 0.8,
                presence_penalty: 0.5,
                frequency_penalty: 0.9,
                allowed_token_ids: Some((0..80).collect()),
                bad_words: vec![vec![7, 8], vec![free[2]]],
                ..greedy(24)
            },
        ];
        // All of them in one batch, with plain requests in between.
        let requests = cases.iter().flat_map(|params| {
            let request = |params: &SamplingParams| Request::new(prompt.clone(), params.clone());
            [request(params), request(&greedy(24))]
        });
        let groups = run(&served, requests.collect());
        for (params, pair) in cases.iter().zip(groups.chunks(2)) {
            let of = |group: &Samples| -> Vec<u32> {
                group.samples[0].tokens.iter().map(|token| token.id).collect()
            };
            let got = of(&pair[0]);
            assert_eq!(got, naive(&checkpoint, &prompt, params), "{name} {params:?}");
            assert_ne!(got, free, "{name}: nothing has changed by {params:?}");
            assert_eq!(of(&pair[1]), free, "{name}: the neighbour has changed");
        }
    }
}

#[test]
fn penalties_survive_preemption_and_parted_samples() {
    let checkpoint = tiny("llama-tied");
    let params = |seed| SamplingParams {
        n: 3,
        seed: Some(seed),
        temperature: 1.0,
        repetition_penalty: 1.2,
        frequency_penalty: 0.4,
        presence_penalty: 0.3,
        bad_words: vec![vec![5], vec![9, 10]],
        ..greedy(60)
    };
    let requests: Vec<Request> =
        (0..8).map(|i| Request::new(prompt(i, 20 + i as usize), params(i.into()))).collect();
    let ids = |groups: &[Samples]| -> Vec<Vec<u32>> {
        let samples = groups.iter().flat_map(|group| &group.samples);
        samples.map(|sample| sample.tokens.iter().map(|token| token.id).collect()).collect()
    };
    let want = run(&engine(&checkpoint, config()), requests.clone());
    let block = KvCache::block_bytes(&checkpoint.config);
    let limits = EngineConfig { kv_memory: 40 * block, max_num_seqs: 32, ..config() };
    let tight = engine(&checkpoint, limits);
    assert_eq!(ids(&run(&tight, requests)), ids(&want));
    let stats = tight.stats().expect("it runs");
    assert!(stats.preemptions > 0 && stats.blocks_used == 0, "{stats:?}");
}

#[test]
fn raw_logprobs_meet_the_reference_whatever_the_rules() {
    for name in ["llama-tied", "qwen2", "qwen3"] {
        let checkpoint = tiny(name);
        let reference = json(&golden(&format!("tiny/{name}/reference.json")));
        let text = ids(&reference["input_ids"][0]);
        let served = engine(&checkpoint, config());
        let request = |at: usize, logprobs_mode| {
            let params = SamplingParams {
                temperature: 0.3,
                top_k: 2,
                repetition_penalty: 1.7,
                logit_bias: vec![(text[at], 3.0)],
                allowed_token_ids: Some(vec![text[at]]),
                logprobs_mode,
                max_tokens: 1,
                ..SamplingParams::default()
            };
            Request::new(text[..at].to_vec(), params)
        };
        let stats = |mode| -> Vec<TokenStats> {
            let groups = run(&served, (1..text.len()).map(|at| request(at, mode)).collect());
            groups.iter().map(|group| group.samples[0].tokens[0].stats).collect()
        };
        let column = |stats: &[TokenStats], of: fn(&TokenStats) -> f32| -> Vec<f32> {
            stats.iter().map(of).collect()
        };
        let raw = stats(LogprobsMode::Raw);
        let want = floats(&reference["next_token_logprobs"][0]);
        assert_close(&column(&raw, |s| s.logprob), &want, 2e-4, "raw log-prob");
        let want = floats(&reference["entropy"][0]);
        assert_close(&column(&raw, |s| s.entropy), &want[..raw.len()], 2e-4, "raw entropy");
        let want = floats(&reference["expected_s"][0]);
        assert_close(&column(&raw, |s| s.baseline), &want[..raw.len()], 2e-4, "raw baseline");
        // One token was left, and the processed mode says so.
        assert!(
            stats(LogprobsMode::Processed).iter().all(|s| s.logprob == 0.0 && s.entropy == 0.0)
        );
    }
}

#[test]
fn the_mode_of_logprobs_changes_no_token() {
    let checkpoint = tiny("qwen3");
    for serve_dtype in [ServeDtype::F32, ServeDtype::Int8] {
        let served = engine(&checkpoint, EngineConfig { serve_dtype, ..config() });
        for temperature in [0.0, 0.6, 1.0] {
            let params = SamplingParams { temperature, seed: Some(4), n: 4, ..greedy(30) };
            let raw = SamplingParams { logprobs_mode: LogprobsMode::Raw, ..params.clone() };
            let request = |params| vec![Request::new(prompt(1, 12), params)];
            let (got, want) = (run(&served, request(raw)), run(&served, request(params)));
            for (got, want) in got[0].samples.iter().zip(&want[0].samples) {
                for (got, want) in got.tokens.iter().zip(&want.tokens) {
                    assert_eq!(got.id, want.id);
                    let same = got.stats == want.stats;
                    assert_eq!(same, temperature != 0.6, "at {temperature} as {serve_dtype}");
                }
            }
        }
    }
}

struct Listener(usize, mpsc::Sender<(usize, Event)>);

impl Sink for Listener {
    fn send(&mut self, event: Event) -> bool {
        self.1.send((self.0, event)).is_ok()
    }

    fn is_closed(&self) -> bool {
        false
    }
}

/// The events of requests that are submitted at once, until each has ended.
fn events(engine: &EngineHandle, requests: Vec<Request>) -> Vec<(usize, Event)> {
    let (sender, inbox) = mpsc::channel();
    let sinks = requests.into_iter().enumerate().map(|(number, request)| {
        (request, Box::new(Listener(number, sender.clone())) as Box<dyn Sink>)
    });
    engine.submit_all(sinks.collect()).expect("the requests are taken");
    drop(sender);
    let mut events = Vec::new();
    while let Ok(event) = inbox.recv_timeout(Duration::from_secs(20)) {
        events.push(event);
    }
    events
}

fn prompt_tokens(engine: &EngineHandle, prompt: &[u32], top: usize) -> Vec<PromptToken> {
    let params =
        SamplingParams { prompt_logprobs: Some(top), max_tokens: 1, ..SamplingParams::default() };
    let events = events(engine, vec![Request::new(prompt.to_vec(), params)]);
    let mut lists = events.into_iter().filter_map(|(_, event)| match event {
        Event::Prompt { tokens } => Some(tokens),
        _ => None,
    });
    let tokens = lists.next().expect("the prompt's log-probs");
    assert!(lists.next().is_none(), "they are sent once");
    tokens
}

#[test]
fn prompt_tokens_are_ranked_as_a_naive_softmax_ranks_them() {
    for name in ["llama-tied", "qwen2-tied"] {
        let checkpoint = tiny(name);
        let reference = json(&golden(&format!("tiny/{name}/reference.json")));
        let text = [ids(&reference["input_ids"][0]), vec![17]].concat();
        let mut rows = logits(&checkpoint, &text[..text.len() - 1]);
        // The last row's logits are golden.
        *rows.last_mut().expect("a row") = floats(&reference["last_logits"][0]);
        for max_batched_tokens in [7, 256] {
            let limits = EngineConfig { max_num_seqs: 1, max_batched_tokens, ..config() };
            let served = engine(&checkpoint, limits);
            let got = prompt_tokens(&served, &text, 5);
            assert_eq!(got.len(), rows.len());
            for (at, (got, row)) in got.iter().zip(&rows).enumerate() {
                let total: f64 = row.iter().map(|z| f64::from(*z).exp()).sum();
                let logprob = |id: u32| (f64::from(row[id as usize]) - total.ln()) as f32;
                let mut order: Vec<u32> = (0..row.len() as u32).collect();
                order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
                let own = text[at + 1];
                let rank = 1 + order.iter().position(|id| *id == own).expect("a token");
                assert_eq!(got.rank, Some(rank), "{name} at {at}");
                assert!((got.logprob - logprob(own)).abs() < 2e-4);
                let top: Vec<u32> = got.top.iter().map(|(id, _)| *id).collect();
                assert_eq!(top, order[..5], "{name} at {at}");
                assert!(got.top.iter().all(|(id, l)| (l - logprob(*id)).abs() < 2e-4));
            }
            let cheap = prompt_tokens(&served, &text, 0);
            for (cheap, got) in cheap.iter().zip(&got) {
                assert!((cheap.logprob - got.logprob).abs() < 1e-5);
                assert!(cheap.rank.is_none() && cheap.top.is_empty());
            }
        }
        // A narrow head ranks by its own logits.
        let narrow = EngineConfig { serve_dtype: ServeDtype::Int8, ..config() };
        let narrow = engine(&checkpoint, narrow);
        let (got, cheap) = (prompt_tokens(&narrow, &text, 2), prompt_tokens(&narrow, &text, 0));
        for (got, cheap) in got.iter().zip(&cheap) {
            assert_eq!((got.logprob, got.top.len()), (cheap.logprob, 2));
        }
    }
}

#[test]
fn lower_priorities_are_answered_first() {
    let checkpoint = tiny("llama-tied");
    let limits = EngineConfig { max_num_seqs: 1, max_batched_tokens: 64, ..config() };
    let served = engine(&checkpoint, limits);
    let request = |priority| Request { priority, ..Request::new(prompt(1, 9), greedy(5)) };
    let events = events(&served, [2, 0, i32::MIN, 0, 1].map(request).into());
    let order: Vec<usize> = events
        .iter()
        .filter(|(_, event)| matches!(event, Event::Finished { reason: FinishReason::Length, .. }))
        .map(|(number, _)| *number)
        .collect();
    assert_eq!(order, [2, 1, 3, 4, 0]);
}

#[test]
fn a_salt_keeps_prefixes_to_itself_and_changes_no_token() {
    let checkpoint = tiny("qwen2");
    let served = engine(&checkpoint, config());
    let mut seen = HashSet::new();
    let mut hits = |salt: Option<&str>| {
        let before = served.stats().expect("it runs").prefix_hits;
        let cache_salt = salt.map(String::from);
        let request = Request { cache_salt, ..Request::new(prompt(2, 40), greedy(8)) };
        let group = run(&served, vec![request]).remove(0);
        seen.insert(group.samples[0].tokens.iter().map(|token| token.id).collect::<Vec<_>>());
        assert_eq!(seen.len(), 1);
        served.stats().expect("it runs").prefix_hits - before
    };
    assert_eq!([None, Some("a"), Some("b"), None, Some("b")].map(&mut hits), [0, 0, 0, 32, 32]);
}

#[test]
fn wrong_rules_are_refused_by_name() {
    let checkpoint = tiny("llama-tied");
    let served = engine(&checkpoint, config());
    let refused = |request: Request| {
        let deadline = Instant::now() + Duration::from_secs(5);
        match collect(&served, vec![request], deadline, &mut || {}) {
            Err(CollectError::Engine(EngineError::Invalid { field, reason })) => (field, reason),
            other => panic!("{other:?}"),
        }
    };
    let with = |params: SamplingParams| Request::new(prompt(0, 4), params);
    let vocab = checkpoint.config.vocab_size as u32;
    let base = greedy(4);
    let cases = [
        ("logit_bias", SamplingParams { logit_bias: vec![(vocab, 1.0)], ..base.clone() }),
        ("logit_bias", SamplingParams { logit_bias: vec![(5, 1.0), (5, 2.0)], ..base.clone() }),
        ("logit_bias", SamplingParams { logit_bias: vec![(5, f32::NAN)], ..base.clone() }),
        ("allowed_token_ids", SamplingParams { allowed_token_ids: Some(vec![]), ..base.clone() }),
        (
            "allowed_token_ids",
            SamplingParams { allowed_token_ids: Some(vec![vocab]), ..base.clone() },
        ),
        ("bad_words", SamplingParams { bad_words: vec![vec![]], ..base.clone() }),
        ("bad_words", SamplingParams { bad_words: vec![vec![1, vocab]], ..base.clone() }),
        ("repetition_penalty", SamplingParams { repetition_penalty: 0.0, ..base.clone() }),
        ("presence_penalty", SamplingParams { presence_penalty: 2.1, ..base.clone() }),
        ("frequency_penalty", SamplingParams { frequency_penalty: f32::NAN, ..base.clone() }),
        ("prompt_logprobs", SamplingParams { prompt_logprobs: Some(21), ..base.clone() }),
        (
            "allowed_token_ids",
            SamplingParams {
                allowed_token_ids: Some(vec![5, 6]),
                stop_token_ids: vec![6],
                min_tokens: 1,
                bad_words: vec![vec![5]],
                ..base.clone()
            },
        ),
        // Found out at the second token.
        (
            "allowed_token_ids",
            SamplingParams {
                allowed_token_ids: Some(vec![5]),
                bad_words: vec![vec![5, 5]],
                ..base.clone()
            },
        ),
    ];
    for (field, params) in cases {
        let (got, reason) = refused(with(params.clone()));
        assert_eq!(got, field, "{params:?}");
        assert!(!reason.is_empty());
    }
    let salt = Request { cache_salt: Some(String::new()), ..with(base) };
    assert_eq!(refused(salt).0, "cache_salt");
    assert_eq!(served.stats().expect("it runs").blocks_used, 0);
}
