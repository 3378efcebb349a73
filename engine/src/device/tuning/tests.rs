//! A model's products on the CPU harness, by kernels that are said to be the fastest.

use super::*;
use crate::{
    cuda::product::{Deal, TILINGS},
    device::{
        Placement,
        pages::DevicePages,
        plan::{StepPlan, StepRows},
    },
    model::{
        attention::{Attention, DeviceBatch},
        config::ModelConfig,
        decoder::Decoder,
    },
    weights::Weights,
};
use serde_json::json;

/// Of shapes that no other test has: choices are for all threads.
fn model() -> (ModelConfig, Decoder) {
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": 136, "intermediate_size": 104, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 56,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "tie_word_embeddings": true,
    });
    let config = ModelConfig::from_hf(&config, None).unwrap();
    random::seed(7);
    let mut tensors: Vec<(String, Tensor)> = config
        .tensor_shapes()
        .into_iter()
        .map(|(name, shape)| {
            let tensor = match name.ends_with("norm.weight") {
                true => Tensor::ones(shape, (Kind::Float, Device::Cpu)),
                false if shape.len() == 1 => random::normal(&[1, shape[0]]).view(&shape[..]),
                false => random::normal(&shape) * 0.2,
            };
            (name, tensor.to_kind(Kind::BFloat16))
        })
        .collect();
    crate::model::joined::join(&mut tensors).unwrap();
    let decoder = Decoder::new(&config, &Weights::new(tensors));
    (config, decoder)
}

/// Logits of three rows after nothing.
fn logits_of(config: &ModelConfig, decoder: &Decoder) -> Tensor {
    let placement = Placement { device: Device::Cpu, kind: Kind::BFloat16 };
    let pages = DevicePages::new(config, 3, placement).unwrap();
    let blocks: Vec<u32> = vec![0, 1, 2];
    let mut rows = StepRows { sampled: vec![0, 1, 2], ..StepRows::default() };
    for (token, blocks) in [5, 50, 17].into_iter().zip(blocks.chunks(1)) {
        rows.push([token].into_iter(), 0, blocks);
    }
    let plan = StepPlan::new(&rows, Device::Cpu, None);
    let attention = &mut Attention::OnDevice(DeviceBatch { pages: &pages, plan: &plan });
    decoder.logits(&decoder.hidden(&plan.tokens, &plan.positions, attention))
}

#[test]
fn a_model_runs_by_the_kernels_that_were_chosen() {
    crate::torch::no_grad(|| {
        let (config, decoder) = model();
        let products = decoder.products();
        let names: Vec<&str> = products.iter().map(|products| products.name).collect();
        assert_eq!(names, ["q, k, v", "output", "gate, up", "down", "head"]);
        let libtorchs = logits_of(&config, &decoder);

        let mut known = BTreeMap::new();
        let tried = choose_fastest(&products, &mut known).unwrap();
        assert_eq!((tried.len(), known.len()), (5 * 4, 5 * 4), "one row, and three kernels");
        for Tried { name, case, trial, .. } in &tried {
            let ways = choice::ways(Device::Cpu, case).unwrap();
            assert_eq!(trial.ways.len(), ways.len(), "{name} {case}: all numbers are right");
            assert!(trial.ways.values().chain([&trial.libtorch]).all(|&time| time > 0.0));
        }

        for tiling in &TILINGS {
            // What is known is not tried again.
            for trial in known.values_mut() {
                let way = Way { tiling, deal: Deal::Parts(1) };
                *trial = Trial { libtorch: 1.0, ways: [(way.to_string(), 0.5)].into() };
            }
            let chosen = choose_fastest(&products, &mut known).unwrap();
            assert!(chosen.iter().all(|tried| tried.chosen.unwrap().tiling == tiling));
            let own = logits_of(&config, &decoder);
            assert_eq!(own.kind(), Kind::Float);
            assert!(distance(&own, &libtorchs) < 0.03, "{}", tiling.name);
            assert!(!own.equal(&libtorchs), "{}: another kernel rounds otherwise", tiling.name);
        }
        for trial in known.values_mut() {
            trial.libtorch = 0.25;
        }
        let chosen = choose_fastest(&products, &mut known).unwrap();
        assert!(chosen.iter().all(|tried| tried.chosen.is_none()));
        assert!(logits_of(&config, &decoder).equal(&libtorchs));
    });
}

#[test]
fn the_fastest_is_chosen() {
    let way = |index: usize, deal| Way { tiling: &TILINGS[index], deal };
    let ways = [way(0, Deal::Parts(2)), way(0, Deal::Even(9)), way(1, Deal::Parts(1))];
    let trial = |libtorch, times: &[(&str, f64)]| Trial {
        libtorch,
        ways: times.iter().map(|&(name, time)| (name.to_string(), time)).collect(),
    };
    let times =
        [("product_half / 2", 2.0), ("product_half, even over 9", 1.0), ("product_whole / 1", 1.5)];
    assert_eq!(trial(3.0, &times).fastest(&ways), Some(ways[1]));
    assert_eq!(trial(3.0, &times[..1]).fastest(&ways), Some(ways[0]));
    assert_eq!(trial(0.97, &times).fastest(&ways), None);
    assert_eq!(trial(0.99, &times).fastest(&ways), Some(ways[1]), "as good as that");
    assert_eq!(trial(1.0, &[("of an older version", 0.5)]).fastest(&ways), None);
    let text = serde_json::to_string(&trial(3.0, &times)).unwrap();
    assert_eq!(serde_json::from_str::<Trial>(&text).unwrap(), trial(3.0, &times));
}
