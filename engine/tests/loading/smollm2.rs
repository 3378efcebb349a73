//! The quick-start model, from its GGUF.

use super::support::*;
use onpolicy_engine::{
    chat::Chat,
    model::{
        config::Architecture,
        loading::{Checkpoint, load},
    },
};
use onpolicy_plugin_api::Message;
use serde_json::Value;
use std::{fs, time::Instant};
use tch::{Device, Kind, Tensor};

/// The numbers come from the Python package gguf 0.19: `dequantize(tensor.data, tensor_type)`, q
/// and k brought into order by `w.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2)`; then
/// `w[1, 0], w[33, 5], w[100, 7]` and `(w * np.arange(rows)[:, None]).sum()` in f64.
#[test]
fn weights_are_dequantised_and_reordered() {
    let started = Instant::now();
    let loaded = load(spec(&smollm2())).unwrap();
    println!("loaded in {:.2?}", started.elapsed());
    assert_well_formed(&loaded);
    let expected = [
        (
            "model.layers.0.self_attn.q_proj.weight",
            [-0.15917969, -0.062805176, 0.063110352],
            25876.190353393555,
        ),
        (
            "model.layers.29.self_attn.k_proj.weight",
            [0.05859375, -0.012451172, 0.12818909],
            11799.602088928223,
        ),
        (
            "model.layers.3.mlp.down_proj.weight",
            [-0.50390625, -0.060516357, 0.13079834],
            66734.18661499023,
        ),
        (
            "model.embed_tokens.weight",
            [-0.023803711, -0.059051514, -0.032661438],
            -312506157.53272057,
        ),
    ];
    for (name, values, weighted_sum) in expected {
        let tensor = &loaded.tensors.iter().find(|(found, _)| found == name).unwrap().1;
        let found = [[1, 0], [33, 5], [100, 7]].map(|at| tensor.double_value(&at));
        for (f, e) in found.iter().zip(values) {
            assert!((f - e).abs() < 1e-8, "{name}: {found:?} is not {values:?}");
        }
        let rows = Tensor::arange(tensor.size()[0], (Kind::Double, Device::Cpu));
        let sums = tensor.to_kind(Kind::Double).sum_dim_intlist(1i64, false, Kind::Double);
        let sum = f64::try_from(sums.dot(&rows)).unwrap();
        assert!((sum / weighted_sum - 1.0).abs() < 1e-9, "{name}: {sum} is not {weighted_sum}");
    }
}

#[test]
fn configuration_comes_from_the_metadata() {
    let loaded = load(spec(&smollm2())).unwrap();
    assert_eq!(loaded.name, "SmolLM2-135M-Instruct.Q4_1");
    let config = &loaded.config;
    assert_eq!(config.parameter_count(), 134_515_008);
    assert_eq!(config.architecture, Architecture::Llama);
    assert_eq!((config.num_layers, config.hidden_size, config.intermediate_size), (30, 576, 1536));
    assert_eq!((config.num_heads, config.num_kv_heads, config.head_dim), (9, 3, 64));
    assert_eq!((config.vocab_size, config.max_position_embeddings), (49152, 8192));
    assert_eq!((config.rms_norm_eps, config.rope.theta), (1e-5, 100_000.0));
    assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(1), &[2][..]));
    assert!(config.tie_word_embeddings && !config.qkv_bias);
}

#[test]
fn conversations_become_the_reference_tokens() {
    let tokenizer = load(spec(&smollm2())).unwrap().tokenizer;
    let text = fs::read_to_string(golden_root().join("smollm2_reference.json")).unwrap();
    let reference: Value = serde_json::from_str(&text).unwrap();
    let samples = reference["f32_weights_f32_compute"].as_array().unwrap();
    assert_eq!(samples.len(), 4);
    for sample in samples {
        let chat = Chat {
            messages: sample["messages"].as_array().unwrap().clone(),
            add_generation_prompt: true,
            ..Chat::default()
        };
        assert_eq!(tokenizer.encode_chat(&chat).unwrap(), ids(&sample["prompt_ids"]));
        let greedy = ids(&sample["greedy_ids"]);
        let text = sample["text"].as_str().unwrap();
        assert_eq!(tokenizer.decode(&greedy, false).unwrap(), text);
        let visible = text.replace("<|im_end|>", "");
        assert_eq!(tokenizer.decode(&greedy, true).unwrap(), visible);
        let mut detokenizer = tokenizer.detokenizer(true);
        let mut streamed: String = greedy.iter().map(|id| detokenizer.push(*id).unwrap()).collect();
        streamed.push_str(&detokenizer.finish().unwrap());
        assert_eq!(streamed, visible);
    }
    let question = ids(&reference["raw_bf16_weights_f32_compute"]["ids"]);
    let text = "What is the capital of France?";
    assert_eq!(tokenizer.encode_prompt(text).unwrap(), question, "no BOS is added");
}

#[test]
fn texts_come_back_from_their_tokens() {
    let tokenizer = load(spec(&smollm2())).unwrap().tokenizer;
    let cases: [(&str, &[u32]); 3] = [
        ("Hello world! 123", &[19556, 905, 17, 216, 33, 34, 35]),
        ("Café déjà vu.", &[51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", &[216, 2701, 256, 5600]),
    ];
    for (text, expected) in cases {
        assert_eq!(tokenizer.encode(text).unwrap(), expected, "{text}");
        assert_eq!(tokenizer.decode(expected, false).unwrap(), text);
    }
    assert_eq!(tokenizer.encode("a<|im_end|>").unwrap()[1..], [2]);
    assert!(tokenizer.is_special(2) && !tokenizer.is_special(504));
    assert_eq!(tokenizer.token_text(504), "The");
    assert_eq!(tokenizer.token_bytes(198), b"\n");
}

#[test]
fn a_saved_directory_loads_again() {
    let loaded = load(spec(&smollm2())).unwrap();
    let dir = tempfile::tempdir().unwrap();
    save(&loaded, dir.path());
    let again = load_dir(dir.path());
    assert_eq!(again.config, loaded.config);
    assert_eq!(again.source, loaded.source);
    assert_same(&again.tensors, &loaded.tensors);
    let chat = Chat::from_messages(&[Message::user("What is 2+3?")]);
    let prompt = |from: &Checkpoint| from.tokenizer.encode_chat(&chat).unwrap();
    assert_eq!(prompt(&again), prompt(&loaded));
}

#[test]
fn a_directory_may_hold_one_gguf() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(smollm2(), dir.path().join("model.gguf")).unwrap();
    assert_eq!(load_dir(dir.path()).config.parameter_count(), 134_515_008);
    fs::write(dir.path().join("another.gguf"), "").unwrap();
    assert!(refusal(dir.path()).contains("name one of them"));
}
