//! A whole engine over the kernels of a GPU, in their harness on the CPU, against the same model in f64 by
//! libtorch's operations.

use super::{EngineConfig, EngineHandle, Model, runner::Runner};
use crate::{
    collect::collect,
    cuda::{
        harness::{self, Change, race, unchanged},
        plan::Machine,
        product::{
            COLUMNS,
            choice::{Case, choose, ways},
        },
        takes,
    },
    device::{
        Placement, agreement::noise, graphs::tests::rows, pages::DevicePages, plan::StepPlan, stats,
    },
    model::{
        attention::{Attention, DeviceBatch, Pack},
        config::ModelConfig,
        decoder::Decoder,
        joined::join,
    },
    torch::random,
    weights::{ServeDtype, Weights},
};
use onpolicy_plugin_api::{Engine, Memory, Request, SamplingParams, Sleep};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use tch::{Device, Kind, Tensor};

const LAYERS: usize = 2;

/// A model that an engine serves by kernels.
struct Served {
    config: ModelConfig,
    weights: Weights,
    engine: EngineHandle,
}

/// Of some shapes.
fn config(shapes: Value) -> ModelConfig {
    let mut config = json!({
        "hidden_act": "silu", "num_hidden_layers": LAYERS, "vocab_size": 160,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "eos_token_id": 1,
        "tie_word_embeddings": false,
    });
    config.as_object_mut().unwrap().extend(shapes.as_object().unwrap().clone());
    ModelConfig::from_hf(&config, None).unwrap()
}

/// A model with random weights of `kind`.
fn serve(shapes: Value, kind: Kind, seed: u64) -> Served {
    let config = config(shapes);
    random::seed(seed);
    let weights = random_weights(&config, kind);
    choose_ways(&Decoder::new(&config, &weights), seed as usize);
    let model = Model {
        name: "random".into(),
        config: config.clone(),
        weights: weights.share(),
        tokenizer: None,
    };
    let sizes = EngineConfig {
        kv_memory: 16 << 20,
        max_num_seqs: 32,
        // So that prompts come in chunks, beside rows of samples.
        max_batched_tokens: 80,
        async_scheduling: Some(true),
        ..EngineConfig::default()
    };
    harness::stand_in(true);
    let engine = EngineHandle::start(model, sizes).unwrap();
    harness::stand_in(false);
    Served { config, weights, engine }
}

fn random_weights(config: &ModelConfig, kind: Kind) -> Weights {
    let random = |(name, shape): (String, Vec<i64>)| {
        let noise = random::normal(&[1, shape.iter().product()]).view(&shape[..]);
        let tensor = match name.ends_with("norm.weight") {
            true => 1.0 + 0.2 * noise,
            false if shape.len() == 1 => noise,
            false => noise / (shape[1] as f64).sqrt(),
        };
        (name, tensor.to_kind(kind))
    };
    let mut tensors = config.tensor_shapes().into_iter().map(random).collect::<Vec<_>>();
    join(&mut tensors).unwrap();
    Weights::new(tensors)
}

/// Has each product made in some way of all that there are. Choices are for all threads, so no other test has
/// products of these shapes.
fn choose_ways(decoder: &Decoder, mut next: usize) {
    for products in decoder.products() {
        let weight = products.layers[0].0;
        for rows in [1].into_iter().chain(COLUMNS) {
            let x = Tensor::empty([rows as i64, weight.size()[1]], (weight.kind(), Device::Cpu));
            let case = Case::of(&x, weight, products.output).unwrap();
            let ways = ways(Device::Cpu, &case).unwrap();
            choose(Device::Cpu, case, Some(ways[next % ways.len()]));
            next += 7;
        }
    }
}

fn params(n: usize, seed: u64) -> SamplingParams {
    let (max_tokens, seed) = (14, Some(seed));
    SamplingParams { n, max_tokens, seed, ignore_eos: true, ..SamplingParams::default() }
}

/// A group whose prompt is long enough to be read once for all, and others of many lengths.
fn requests(first: u32) -> Vec<Request> {
    let prompt =
        |seed: u32, len: u32| (0..len).map(|i| 3 + (seed * 31 + i * i * 7) % 150).collect();
    [(4, 300), (2, 5), (3, 17), (1, 40), (1, 1), (2, 96)]
        .into_iter()
        .zip(first..)
        .map(|((n, len), seed)| Request::new(prompt(seed, len), params(n, u64::from(seed))))
        .collect()
}

impl Served {
    /// Log-prob, entropy and baseline of every token but the first, `[tokens - 1, 3]`, from the weights as they
    /// are, in f64; and how far rounding may take them.
    fn exact(&self, tokens: &[u32]) -> (Vec<[f64; 3]>, f64) {
        let wide =
            |(name, tensor): (&str, &Tensor)| (name.to_string(), tensor.to_kind(Kind::Double));
        let kind = self.weights.placement().kind;
        let weights = Weights::new(self.weights.iter().map(wide).collect());
        let decoder = Decoder::new(&self.config, &weights);
        let mut pack = Pack::default();
        pack.push(&tokens[..1], &[&tokens[1..]]);
        crate::torch::no_grad(|| {
            let attention = &mut Attention::Causal(&pack);
            let hidden = decoder.hidden(&pack.tokens(), &pack.positions(), attention);
            let rows = tokens.len() as i64 - 1;
            let logits = decoder.logits(&hidden).narrow(0, 0, rows);
            let next: Vec<i64> = tokens[1..].iter().map(|&id| i64::from(id)).collect();
            let stats = stats::batch_stats(&logits, &Tensor::from_slice(&next), 1.0);
            let numbers = Vec::<f64>::try_from(stats.to_kind(Kind::Double).flatten(0, 1)).unwrap();
            let bound = 4.0 * logits.std(false).double_value(&[]) * noise(kind, LAYERS);
            (numbers.as_chunks::<3>().0.to_vec(), bound)
        })
    }

    /// What the engine says of its own tokens is so.
    fn check(&self, first: u32) {
        let requests = requests(first);
        let deadline = Instant::now() + Duration::from_secs(300);
        let groups = collect(&self.engine, requests.clone(), deadline, &mut || {}).unwrap();
        let mut worst = 0f64;
        for (request, group) in requests.iter().zip(groups) {
            assert_eq!(group.samples.len(), request.params.n);
            for sample in group.samples {
                assert_eq!(sample.tokens.len(), request.params.max_tokens);
                let own = sample.tokens.iter().map(|token| token.id);
                let all: Vec<u32> = request.prompt.iter().copied().chain(own).collect();
                let (exact, bound) = self.exact(&all);
                let exact = &exact[request.prompt.len() - 1..];
                for (token, want) in sample.tokens.iter().zip(exact) {
                    let stats = token.stats;
                    let got = [stats.logprob, stats.entropy, stats.baseline].map(f64::from);
                    for (got, want) in got.iter().zip(want) {
                        worst = worst.max((got - want).abs() / bound);
                    }
                }
            }
        }
        assert!(worst < 3.0, "off by {worst} of what rounding makes");
    }

    /// Other weights, where the served ones lie; says what the engine's thread has launched so far.
    fn update(&self) -> BTreeMap<&'static str, usize> {
        let fresh = random_weights(&self.config, self.weights.placement().kind);
        let served = self.weights.share();
        let write = move || {
            for ((name, served), (same, fresh)) in served.iter().zip(fresh.iter()) {
                assert_eq!(name, same);
                served.shallow_clone().copy_(fresh);
            }
            Ok(harness::launches())
        };
        self.engine.update(write).unwrap().0
    }

    /// After loading, with prefixes that are there already, after an update, after pages were given back.
    fn check_all(&self) {
        self.check(1);
        self.check(1);
        let launches = self.update();
        self.check(3);
        self.engine.sleep(Sleep::KvCache).unwrap();
        self.engine.wake_up(&[Memory::KvCache]).unwrap();
        self.check(7);
        self.engine.check().unwrap();
        let stats = self.engine.stats().unwrap();
        assert!(stats.prefix_hits > 300 && stats.blocks_used == 0, "{stats:?}");
        assert!(stats.graph_steps > stats.steps / 2, "{stats:?}");
        assert!(stats.steps_ahead > stats.steps / 2, "{stats:?}");
        let [first, recorded] = ["attend", "decode"].map(|name| launches[name]);
        assert!(first >= LAYERS && recorded > 20 * LAYERS, "{launches:?}");
        for name in ["rms_norm", "rotate_write", "write_kv", "swiglu", "sum_slices", "draw"] {
            assert!(launches.contains_key(name), "{name} is not among {launches:?}");
        }
        let products = launches.keys().filter(|name| name.starts_with("product"));
        assert!(products.count() > 2, "{launches:?}");
    }
}

#[test]
fn heads_that_are_normed() {
    let shapes = json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 152,
        "intermediate_size": 264, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    });
    serve(shapes, Kind::BFloat16, 1).check_all();
}

#[test]
fn products_with_a_bias_and_wide_heads() {
    let shapes = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 384,
        "intermediate_size": 200, "num_attention_heads": 3, "num_key_value_heads": 1,
        "tie_word_embeddings": true,
    });
    serve(shapes, Kind::BFloat16, 2).check_all();
}

#[test]
fn windows_in_f16() {
    let shapes = json!({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 160,
        "intermediate_size": 168, "num_attention_heads": 2, "num_key_value_heads": 2,
        "sliding_window": 70,
    });
    serve(shapes, Kind::Half, 3).check_all();
}

/// Every kernel of a decode step may begin before those before it have ended.
#[test]
fn a_step_reads_nothing_before_it_is_there() {
    let config = config(json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 216,
        "intermediate_size": 136, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    }));
    let placement = Placement { device: Device::Cpu, kind: Kind::BFloat16 };
    random::seed(4);
    let weights = random_weights(&config, placement.kind);
    let decoder = Decoder::new(&config, &weights);
    let pages = DevicePages::new(&config, 40, placement).unwrap();
    let blocks: Vec<Vec<u32>> = (0..4).map(|i| (10 * i..10 * i + 10).collect()).collect();
    let step = rows(&[3, 40, 100, 16], &blocks);
    let machine = Machine { group: 2, kv_heads: 1, blocks: 8 };
    let plan = StepPlan::new(&step, Device::Cpu, Some(machine));
    let logits = || {
        let attention = &mut Attention::OnDevice(DeviceBatch { pages: &pages, plan: &plan });
        crate::torch::no_grad(|| {
            decoder.logits(&decoder.hidden(&plan.tokens, &plan.positions, attention))
        })
    };
    harness::stand_in(true);
    for first in 0..3 {
        choose_ways(&decoder, first);
        assert_eq!(race(&[], unchanged, logits), None);
    }
    let hasty = |source: String| {
        let begin = "own = fresh.load(a, rows.row[0], head);";
        source
            .replace("wait_for_kernel_before();\n  }\n  typename Fresh", "}\n  typename Fresh")
            .replace(begin, &format!("{begin}\n  if (DECODES) wait_for_kernel_before();"))
    };
    let found = race(&[], hasty, logits).expect("attention that does not wait for q, k and v");
    harness::stand_in(false);
    assert!(found.contains("reads what the kernel before has written"), "{found}");
}

/// An engine that starts finds out which kernels are off, and does without.
#[test]
fn kernels_that_are_off_are_set_aside() {
    let config = config(json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 128,
        "intermediate_size": 72, "num_attention_heads": 2, "num_key_value_heads": 1,
    }));
    let placement = Placement { device: Device::Cpu, kind: Kind::BFloat16 };
    random::seed(5);
    let weights = random_weights(&config, placement.kind);
    let changes: [Change; 8] = [
        unchanged,
        |source| source.replace("strip.weigh(s, a.scale)", "strip.weigh(s, 2.0f * a.scale)"),
        // Of decode steps alone: a token's own K and V.
        |source| source.replace("fresh.lay(stage, row);", "fresh.lay(stage, 0);"),
        |source| source.replace("number(up.at[j]));", "-number(up.at[j]));"),
        // Of draws, and of statistics alone.
        |source| source.replace("share.until > target", "share.until > 0.5 * target"),
        |source| source.replace("c += e * e * d;", "c += e * d;"),
        |source| source.replace("c += e * e * d;", "c += e * e * d / 0.0f;"),
        |source| source + "#error no such device",
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let (config, weights) = (config.clone(), weights.share());
        let start = move || {
            harness::stand_in(true);
            let pages = DevicePages::new(&config, 30, placement).unwrap();
            let sizes = (Some(pages), 30);
            let served = (&weights, ServeDtype::F32);
            let runner = harness::changed(change, || Runner::new(&config, served, sizes, 64));
            (runner.by_kernels(), takes(Device::Cpu))
        };
        let right = number == 0;
        assert_eq!(std::thread::spawn(start).join().unwrap(), (right, right), "{number}");
    }
}
