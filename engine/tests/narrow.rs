//! Serving in a narrow type: how near to f32, what it takes, and that an update reaches the copies.

mod common;

use common::{TINY, engine, floats, golden, ids, json, smollm2, tiny};
use onpolicy_engine::{
    collect::collect,
    engine::{EngineConfig, EngineHandle, Model},
    model::loading::Checkpoint,
    weights::{ServeDtype, Weights},
};
use onpolicy_plugin_api::{Engine, EngineError, Request, SamplingParams};
use std::time::{Duration, Instant};
use tch::Tensor;

const NARROW: [ServeDtype; 3] = [ServeDtype::F16, ServeDtype::Bf16, ServeDtype::Int8];

fn serving(checkpoint: &Checkpoint, serve_dtype: ServeDtype) -> EngineHandle {
    let kv_memory = if checkpoint.config.hidden_size > 500 { 64 << 20 } else { 8 << 20 };
    engine(checkpoint, EngineConfig { kv_memory, serve_dtype, ..EngineConfig::default() })
}

fn answer(engine: &EngineHandle, prompt: &[u32], params: SamplingParams) -> (Vec<u32>, Vec<f32>) {
    let request = Request::new(prompt.to_vec(), params);
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut groups = collect(engine, vec![request], deadline, &mut || {}).expect("an answer");
    let group = groups.remove(0);
    let tokens = group.samples[0].tokens.iter().map(|token| token.id).collect();
    (tokens, group.prompt_logprobs)
}

/// Log-probs of a text's tokens, but for the first.
fn logprobs(engine: &EngineHandle, tokens: &[u32]) -> Vec<f32> {
    let params =
        SamplingParams { prompt_logprobs: Some(0), max_tokens: 1, ..SamplingParams::default() };
    answer(engine, tokens, params).1
}

fn greedy(engine: &EngineHandle, prompt: &[u32], max_tokens: usize) -> Vec<u32> {
    let params = SamplingParams {
        temperature: 0.0,
        max_tokens,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    answer(engine, prompt, params).0
}

/// Mean and largest distance.
fn distance(got: &[f32], want: &[f32]) -> (f32, f32) {
    assert_eq!(got.len(), want.len());
    let distances = got.iter().zip(want).map(|(got, want)| (got - want).abs());
    let (sum, most) = distances.fold((0.0, 0.0f32), |(sum, most), d| (sum + d, most.max(d)));
    (sum / got.len() as f32, most)
}

#[test]
fn tiny_checkpoints_stay_near_the_reference() {
    // Twice what was measured. Each bit of precision that a type has less doubles the distance.
    let bounds = [(2e-3, 1e-2), (1.6e-2, 8e-2), (4e-2, 2e-1)];
    for (dtype, (mean, most)) in NARROW.into_iter().zip(bounds) {
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for name in TINY {
            let engine = serving(&tiny(name), dtype);
            let reference = json(&golden(&format!("tiny/{name}/reference.json")));
            got.extend(logprobs(&engine, &ids(&reference["input_ids"][0])));
            want.extend(floats(&reference["next_token_logprobs"][0]));
        }
        let found = distance(&got, &want);
        println!("{} tokens as {dtype}: {found:?}", got.len());
        assert!(found.0 > mean / 20.0, "{dtype} weights are rounded: {found:?}");
        assert!(found.0 < mean && found.1 < most, "{dtype}: {found:?}");
    }
}

#[test]
fn the_real_model_stays_near_f32() {
    let checkpoint = smollm2();
    let exact = serving(&checkpoint, ServeDtype::F32);
    let golden = json(&golden("smollm2_reference.json"));
    let cases = golden["f32_weights_f32_compute"].as_array().expect("cases");
    // Twice what was measured (transformers with weights rounded in the same way is as far from
    // f32), and the margin of the likeliest token that the type's rounding leaves alone here.
    let bounds = [(5e-3, 3e-2, 0.05), (2.5e-2, 1.5e-1, 0.15), (1.8e-1, 1.4, 0.15)];
    for (dtype, (mean, most, margin)) in NARROW.into_iter().zip(bounds) {
        let engine = serving(&checkpoint, dtype);
        let (mut got, mut want) = (Vec::new(), Vec::new());
        let mut answers = 0;
        for case in cases {
            let (prompt, answer) = (ids(&case["prompt_ids"]), ids(&case["greedy_ids"]));
            let text = [&prompt[..], &answer].concat();
            got.extend(logprobs(&engine, &text));
            want.extend(logprobs(&exact, &text));
            if case["min_margin"].as_f64().expect("a margin") > margin {
                assert_eq!(greedy(&engine, &prompt, answer.len()), answer, "{}", case["text"]);
                answers += 1;
            }
        }
        let found = distance(&got, &want);
        println!("{} tokens as {dtype}: {found:?}; {answers} answers", got.len());
        assert!(answers > 0, "a case leaves margin enough");
        assert!(found.0 > mean / 20.0, "{dtype} weights are rounded: {found:?}");
        assert!(found.0 < mean && found.1 < most, "{dtype}: {found:?}");
    }
}

#[test]
fn copies_take_what_the_type_takes() {
    let checkpoint = tiny("llama-tied");
    let bytes = |dtype| serving(&checkpoint, dtype).stats().expect("it runs").copied_bytes;
    // The embedding is the head.
    let matrices = checkpoint.tensors.iter().filter(|(_, tensor)| tensor.dim() == 2);
    let (mut weights, mut rows) = (0, 0);
    for (_, matrix) in matrices {
        let padded = (matrix.size()[0] as usize).next_multiple_of(16);
        weights += padded * matrix.size()[1] as usize;
        rows += padded;
    }
    assert_eq!(bytes(ServeDtype::F32), 0);
    assert_eq!(NARROW.map(bytes), [2, 2, 1].map(|size| size * weights + 4 * rows));
}

#[test]
fn an_update_under_load_reaches_the_copies() {
    for dtype in NARROW {
        for name in ["llama-tied", "qwen2"] {
            let (old, new) = (tiny(name), tiny(name));
            for (_, tensor) in &new.tensors {
                let _ = tensor.shallow_clone().g_mul_scalar_(1.25);
            }
            let (served, fresh) = (serving(&old, dtype), serving(&new, dtype));
            let prompt: Vec<u32> = (0..20).map(|i| 3 + i * 7 % 150).collect();
            let want = greedy(&fresh, &prompt, 60);
            assert_ne!(greedy(&served, &prompt, 60), want, "the update changes the answer");
            let load = std::thread::spawn({
                let (served, prompt) = (served.clone(), prompt.clone());
                move || (0..8).for_each(|_| drop(greedy(&served, &prompt, 100)))
            });
            std::thread::sleep(Duration::from_millis(5));
            let tensors: Vec<Tensor> = old.tensors.iter().map(|(_, t)| t.shallow_clone()).collect();
            let update = served.update(move || {
                for mut tensor in tensors {
                    let _ = tensor.g_mul_scalar_(1.25);
                }
                Ok(())
            });
            assert_eq!(update, Ok(((), 1)));
            load.join().expect("no request fails");
            assert_eq!(greedy(&served, &prompt, 60), want, "{name} as {dtype}");
            let text = [&prompt[..], &want].concat();
            assert_eq!(logprobs(&served, &text), logprobs(&fresh, &text), "{name} as {dtype}");
            let refresh = served.stats().expect("it runs").refresh;
            assert!(refresh > Duration::ZERO && refresh < Duration::from_secs(1), "{refresh:?}");
        }
    }
}

#[test]
fn weights_that_do_not_fit_are_refused_at_the_start() {
    let checkpoint = tiny("llama-tied");
    let matrix = checkpoint.tensors.iter().find(|(name, _)| name.ends_with("up_proj.weight"));
    let (name, tensor) = matrix.expect("there is one");
    let _ = tensor.get(0).fill_(1e5);
    let start = |serve_dtype| {
        let weights = checkpoint.tensors.iter().map(|(n, t)| (n.clone(), t.shallow_clone()));
        let model = Model {
            name: "large".into(),
            config: checkpoint.config.clone(),
            weights: Weights::new(weights.collect()),
            tokenizer: None,
        };
        let kv_memory = 8 << 20;
        EngineHandle::start(model, EngineConfig { kv_memory, serve_dtype, ..Default::default() })
    };
    let Err(EngineError::Invalid { field, reason }) = start(ServeDtype::F16).map(|_| ()) else {
        panic!("f16 does not hold 100000")
    };
    assert_eq!(field, "serve_dtype");
    assert!(reason.contains(&format!("'{name}' holds 100000")), "{reason}");
    assert_eq!(start(ServeDtype::Bf16).expect("bf16 does").weight_version(), 0);
}

#[test]
fn a_small_update_reaches_the_copies_of_the_real_model() {
    let push = |tensors: &[(String, Tensor)]| {
        for (_, tensor) in tensors {
            let step = tensor.sin().sign() * 2e-5;
            let _ = tensor.shallow_clone().g_add_(&step);
        }
    };
    let (old, new) = (smollm2(), smollm2());
    push(&new.tensors);
    let (served, fresh) = (serving(&old, ServeDtype::F16), serving(&new, ServeDtype::F16));
    let text: Vec<u32> = (0..40).map(|i| 300 + i * 37).collect();
    let before = logprobs(&served, &text);
    let tensors: Vec<_> = old.tensors.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
    served
        .update(move || {
            push(&tensors);
            Ok(())
        })
        .expect("the update is applied");
    let after = logprobs(&served, &text);
    assert_eq!(after, logprobs(&fresh, &text));
    assert_ne!(after, before);
    let exact = logprobs(&serving(&new, ServeDtype::F32), &text);
    println!(
        "updated by {:?}, off f32 by {:?}",
        distance(&after, &before),
        distance(&after, &exact)
    );
}
