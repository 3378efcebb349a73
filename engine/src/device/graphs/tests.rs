//! Recorded steps, which the CPU runs again operation by operation over the harness's kernels, against
//! steps that are not recorded.

use super::*;
use crate::{device::Placement, model::config::ModelConfig, torch::random, weights::Weights};
use serde_json::json;
use tch::Kind;

const PLACEMENT: Placement = Placement { device: Device::Cpu, kind: Kind::BFloat16 };
const BLOCKS: usize = 40;

/// A model whose heads the kernels take, with random weights.
fn model() -> (ModelConfig, Decoder) {
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "tie_word_embeddings": true,
    });
    let config = ModelConfig::from_hf(&config, None).unwrap();
    random::seed(3);
    let random = |(name, shape): (String, Vec<i64>)| {
        let tensor = match name.ends_with("norm.weight") {
            true => Tensor::ones(shape, (Kind::Float, Device::Cpu)),
            false => random::normal(&shape) * 0.2,
        };
        (name, tensor.to_kind(Kind::BFloat16))
    };
    let weights = Weights::new(config.tensor_shapes().into_iter().map(random).collect());
    let decoder = Decoder::new(&config, &weights);
    (config, decoder)
}

/// The next row of sequences that have so many tokens; sequence `i` has the blocks from `10 i` on.
pub(crate) fn rows<'a>(lengths: &[usize], blocks: &'a [Vec<u32>]) -> StepRows<'a> {
    let mut rows = StepRows::default();
    for (row, (&len, blocks)) in lengths.iter().zip(blocks).enumerate() {
        rows.push([(7 * row + len) as i64 % 50].into_iter(), len, blocks);
        rows.sampled.push(row as i64);
    }
    rows
}

#[test]
fn recorded_steps_are_those_that_are_not_recorded() {
    let (config, decoder) = model();
    let machine = Machine { group: 2, kv_heads: 1, blocks: 8 };
    let [own, other] = [0, 1].map(|_| {
        random::seed(4);
        let pages = DevicePages::new(&config, BLOCKS, PLACEMENT).unwrap();
        for layer in 0..2 {
            let (k, v) = pages.layer(layer);
            [k, v].iter().for_each(|t| t.shallow_clone().copy_(&random::normal(&t.size())));
        }
        pages
    });
    let mut graphs = DecodeGraphs::new(Device::Cpu, machine, 10);
    let blocks: Vec<Vec<u32>> = (0..4).map(|i| (10 * i..10 * i + 10).collect()).collect();
    let batches: [&[usize]; 6] =
        [&[3, 40, 100], &[4, 41, 101], &[159, 1, 16, 15], &[5, 42, 102], &[6], &[103, 7, 9]];
    for lengths in batches {
        let step = rows(lengths, &blocks);
        let got = crate::torch::no_grad(|| graphs.hidden(&step, &decoder, &own)).unwrap();
        let plan = StepPlan::new(&step, Device::Cpu, Some(machine));
        let want = crate::torch::no_grad(|| Recorded::forward(&plan, &decoder, &other));
        let error = (got.to_kind(Kind::Float) - want.to_kind(Kind::Float)).abs().max();
        // A product of more rows may be summed in another order.
        assert!(error.double_value(&[]) < 0.05, "{lengths:?}: {error:?}");
        assert!(want.abs().max().double_value(&[]) > 1.0);
    }
    assert_eq!(graphs.steps.keys().copied().collect::<Vec<_>>(), [1, 4]);
    assert_eq!(graphs.runs(), 4);
    for layer in 0..2 {
        let written = own.layer(layer).0 - other.layer(layer).0;
        assert!(written.abs().max().double_value(&[]) < 0.05, "layer {layer}");
    }
    graphs.clear();
    assert!(graphs.steps.is_empty());
}

/// Tokens that the step before has drawn are taken where they are: all in order, and some among others.
#[test]
fn tokens_that_only_the_device_knows_are_filled_in() {
    let (config, decoder) = model();
    let machine = Machine { group: 2, kv_heads: 1, blocks: 8 };
    let blocks: Vec<Vec<u32>> = (0..4).map(|i| (10 * i..10 * i + 10).collect()).collect();
    let lengths = [3, 40, 100];
    let run = |graphs: Option<&mut DecodeGraphs>, step: &StepRows<'_>| {
        let pages = DevicePages::new(&config, BLOCKS, PLACEMENT).unwrap();
        let hidden = crate::torch::no_grad(|| match graphs {
            Some(graphs) => graphs.hidden(step, &decoder, &pages).unwrap(),
            None => {
                let plan = StepPlan::new(step, Device::Cpu, None);
                Recorded::forward(&plan, &decoder, &pages)
            }
        });
        hidden.to_kind(Kind::Double)
    };
    let known = rows(&lengths, &blocks);
    let mut graphs = DecodeGraphs::new(Device::Cpu, machine, 10);
    // The first one is recorded, the next one runs what was recorded.
    for (unknown, draws, drawn) in [
        (vec![0, 1, 2], vec![0, 1, 2], known.tokens.clone()),
        (vec![0, 1, 2], vec![1, 3, 0], vec![known.tokens[2], known.tokens[0], 9, known.tokens[1]]),
        (vec![2], vec![1], vec![9, known.tokens[2]]),
    ] {
        let mut step = rows(&lengths, &blocks);
        unknown.iter().for_each(|&row: &i64| step.tokens[row as usize] = 0);
        step.unknown.rows = unknown;
        step.unknown.draws = draws;
        step.unknown.drawn = Some(Tensor::from_slice(&drawn));
        let [recorded, plain] = [Some(&mut graphs), None].map(|graphs| run(graphs, &step));
        for (got, graphs) in [(recorded, Some(())), (plain, None)] {
            let mut fresh = DecodeGraphs::new(Device::Cpu, machine, 10);
            let want = run(graphs.map(|()| &mut fresh), &known);
            assert!((got - want).abs().max().double_value(&[]) < 1e-9);
        }
    }
    assert_eq!(graphs.runs(), 2);
}

#[test]
fn prompts_and_large_batches_are_not_recorded() {
    let (config, decoder) = model();
    let machine = Machine { group: 2, kv_heads: 1, blocks: 8 };
    let pages = DevicePages::new(&config, BLOCKS, PLACEMENT).unwrap();
    let mut graphs = DecodeGraphs::new(Device::Cpu, machine, 10);
    let blocks = [(0..10).collect::<Vec<u32>>()];
    let first = rows(&[0], &blocks);
    assert!(graphs.hidden(&first, &decoder, &pages).is_none(), "it is not a decode step");
    assert_eq!(
        [1, 3, 8, 9, 64, 65, 257, 512].map(size_for).map(Option::unwrap),
        [1, 4, 8, 16, 64, 96, 320, 512]
    );
    assert_eq!((size_for(0), size_for(513)), (None, None));
}
