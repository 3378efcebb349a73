//! GGUF files written here, from the golden checkpoints and from bytes.

use super::{gguf_file::*, support::*};
use candle_core::{
    Device,
    quantized::{GgmlDType, ggml_file::qtensor_from_ggml, gguf_file::Value},
};
use onpolicy_engine::{
    chat::Chat,
    model::{config::RopeScaling, loading::Checkpoint},
};
use onpolicy_plugin_api::Message;
use rand::{Rng, SeedableRng};
use std::fs;
use tch::Tensor;

#[test]
fn converted_checkpoints_equal_their_originals() {
    for name in ["llama-tied", "qwen2", "qwen2-tied", "qwen3"] {
        let (file, original) = converted(name);
        let loaded = file.load().unwrap();
        assert_well_formed(&loaded);
        assert_same(&loaded.tensors, &original.tensors);
        assert_eq!(loaded.config, original.config, "{name}");
    }
}

#[test]
fn biases_of_llama_are_reordered_like_weights() {
    let (mut file, _) = converted("llama-tied");
    let config = load_dir(&golden("llama-tied")).config;
    let bias = Tensor::arange(48, (tch::Kind::Float, tch::Device::Cpu));
    for layer in 0..3 {
        for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            let name = format!("model.layers.{layer}.self_attn.{part}.bias");
            let rows = if ["k_proj", "v_proj"].contains(&part) { 16 } else { 48 };
            let stored = interleaved(&config, &name, &bias.narrow(0, 0, rows));
            file.tensors.insert(gguf_name(&name), quantise(&stored, GgmlDType::F32));
        }
    }
    let loaded = file.load().unwrap();
    assert!(loaded.config.qkv_bias && loaded.config.o_bias && !loaded.config.mlp_bias);
    let biases: Vec<_> = loaded.tensors.iter().filter(|(name, _)| name.ends_with("bias")).collect();
    assert_eq!(biases.len(), 12);
    for (name, tensor) in biases {
        assert!(tensor.equal(&bias.narrow(0, 0, tensor.size()[0])), "{name}");
    }
}

/// Blocks of bytes `(37 i + 11) % 256`, with 0.5 and 0.25 as f16 where the format has its scales.
/// Expected: elements 0, 1, 17 and 31 of a block, its sum, and the sum weighted by the index, from
/// the Python package gguf 0.19: `quants.dequantize(block, type)`.
#[test]
fn every_quantisation_is_read() {
    type Case = (GgmlDType, &'static [usize], [f64; 4], f64, f64);
    let cases: [Case; 10] = [
        (GgmlDType::Q4_0, &[0], [-1.5, 1.0, -0.5, 0.0], -10.5, -248.5),
        (GgmlDType::Q4_1, &[0, 2], [7.75, 2.25, 6.25, 6.25], 130.5, 1993.0),
        (GgmlDType::Q5_0, &[0], [4.5, -1.0, 0.0, 0.5], 7.5, 48.5),
        (GgmlDType::Q5_1, &[0, 2], [9.75, 12.25, 2.75, 2.75], 260.5, 3822.0),
        (GgmlDType::Q8_0, &[0], [42.5, 61.0, -27.0, -24.0], -88.0, -3952.0),
        (GgmlDType::Q2K, &[80, 82], [16.5, 0.0, -0.75, -0.75], 1029.5, 120535.5),
        (GgmlDType::Q3K, &[108], [40.5, -54.0, 64.0, 32.0], 479.0, 88093.5),
        (GgmlDType::Q4K, &[0, 2], [157.75, -12.75, -12.75, 80.25], 27220.0, 3759200.0),
        (GgmlDType::Q5K, &[0, 2], [405.75, -12.75, -12.75, 80.25], 58108.0, 7955616.0),
        (GgmlDType::Q6K, &[208], [-715.5, 848.0, 256.0, -48.0], 2306.0, 389904.0),
    ];
    for (dtype, scales, values, sum, weighted) in cases {
        let mut block: Vec<u8> =
            (0..dtype.type_size()).map(|i| ((37 * i + 11) % 256) as u8).collect();
        for (at, scale) in scales.iter().zip([0.5, 0.25]) {
            let bytes = half::f16::from_f32(scale).to_le_bytes();
            block[*at..at + 2].copy_from_slice(&bytes);
        }
        let loaded = wide_model(&block, dtype).load().unwrap();
        // Rows 0 and 511: the second one is in a chunk of its own.
        for row in [0, 511] {
            let found = block_of(&loaded, row, dtype.block_size());
            let picked = [0, 1, 17, 31].map(|i| found[i]);
            assert_eq!(picked, values, "{dtype:?}");
            assert_eq!(found.iter().sum::<f64>(), sum, "{dtype:?}");
            let numbered = found.iter().enumerate();
            assert_eq!(numbered.map(|(i, x)| i as f64 * x).sum::<f64>(), weighted, "{dtype:?}");
        }
    }
}

#[test]
fn half_precision_is_read() {
    for dtype in [GgmlDType::F16, GgmlDType::BF16] {
        let bytes: [u8; 2] = match dtype {
            GgmlDType::F16 => half::f16::from_f32(-0.375).to_le_bytes(),
            _ => half::bf16::from_f32(-0.375).to_le_bytes(),
        };
        let loaded = wide_model(&bytes, dtype).load().unwrap();
        assert_eq!(block_of(&loaded, 300, 3), [-0.375; 3], "{dtype:?}");
    }
}

/// A model of one layer whose feed-forward gate, 512 rows of 512, repeats one block.
fn wide_model(block: &[u8], dtype: GgmlDType) -> File {
    let (mut file, _) = converted("qwen2-tied");
    let inner = 512;
    for key in ["embedding_length", "feed_forward_length"] {
        file.set(&format!("qwen2.{key}"), Value::U32(inner));
    }
    file.set("qwen2.block_count", Value::U32(1));
    file.set("qwen2.context_length", Value::U32(64));
    file.tensors.clear();
    let inner = inner as i64;
    let shapes: [(&str, Vec<i64>); 13] = [
        ("token_embd.weight", vec![160, inner]),
        ("output_norm.weight", vec![inner]),
        ("blk.0.attn_norm.weight", vec![inner]),
        ("blk.0.ffn_norm.weight", vec![inner]),
        ("blk.0.attn_q.weight", vec![48, inner]),
        ("blk.0.attn_k.weight", vec![16, inner]),
        ("blk.0.attn_v.weight", vec![16, inner]),
        ("blk.0.attn_q.bias", vec![48]),
        ("blk.0.attn_k.bias", vec![16]),
        ("blk.0.attn_v.bias", vec![16]),
        ("blk.0.attn_output.weight", vec![inner, 48]),
        ("blk.0.ffn_up.weight", vec![inner, inner]),
        ("blk.0.ffn_down.weight", vec![inner, inner]),
    ];
    for (name, shape) in shapes {
        let zeros = Tensor::zeros(shape.as_slice(), (tch::Kind::Float, tch::Device::Cpu));
        file.tensors.insert(name.to_string(), quantise(&zeros, GgmlDType::F32));
    }
    let blocks = (inner * inner) as usize / dtype.block_size();
    let shape = vec![inner as usize; 2];
    let gate = qtensor_from_ggml(dtype, &block.repeat(blocks), shape, &Device::Cpu).unwrap();
    file.tensors.insert("blk.0.ffn_gate.weight".to_string(), gate);
    file
}

/// The first `count` elements of a row of the gate.
fn block_of(loaded: &Checkpoint, row: i64, count: usize) -> Vec<f64> {
    let (_, gate) =
        loaded.tensors.iter().find(|(name, _)| name.ends_with("gate_proj.weight")).unwrap();
    (0..count).map(|i| gate.double_value(&[row, i as i64])).collect()
}

#[test]
fn tokenizers_are_built_from_metadata() {
    let (mut file, _) = converted("qwen2");
    let encode = |file: &File, text: &str| {
        let tokenizer = file.load().unwrap().tokenizer;
        (tokenizer.encode(text).unwrap(), tokenizer.encode_prompt(text).unwrap())
    };
    assert_eq!(encode(&file, "ab ab</s>"), (vec![4, 5, 2], vec![4, 5, 2]));
    file.set("tokenizer.ggml.add_bos_token", Value::Bool(true));
    assert_eq!(encode(&file, "ab"), (vec![4], vec![1, 4]));
    file.set("tokenizer.ggml.add_eos_token", Value::Bool(true));
    assert_eq!(encode(&file, "ab"), (vec![4], vec![1, 4, 2]));

    // Digit `d` is token 6 + ('d' - '!'); each rule cuts in its own way.
    let (mut file, _) = converted("qwen2");
    file.set("tokenizer.ggml.merges", texts(["a b", "Ġ ab"]));
    for pre in ["smollm", "gpt-2", "default", "qwen2"] {
        file.set("tokenizer.ggml.pre", Value::String(pre.into()));
        assert_eq!(encode(&file, "ab ab1"), (vec![4, 5, 22], vec![4, 5, 22]), "{pre}");
    }
    for pre in ["llama-bpe", "tekken"] {
        file.set("tokenizer.ggml.pre", Value::String(pre.into()));
        assert_eq!(encode(&file, "ab ab1"), (vec![4, 5, 22], vec![1, 4, 5, 22]), "{pre}");
    }
}

#[test]
fn chat_templates_come_from_the_metadata() {
    let (mut file, _) = converted("qwen2");
    let template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}";
    file.set("tokenizer.chat_template", Value::String(template.into()));
    let chat = Chat::from_messages(&[Message::user("ab")]);
    let tokenizer = file.load().unwrap().tokenizer;
    assert_eq!(tokenizer.encode_chat(&chat).unwrap(), [1, 4, 2]);
    file.set("tokenizer.chat_templates", texts(["tool_use"]));
    file.set("tokenizer.chat_template.tool_use", Value::String("tools".into()));
    let with_tools = Chat { tools: Some(serde_json::json!([])), ..chat.clone() };
    let tokenizer = file.load().unwrap().tokenizer;
    assert_eq!(tokenizer.render(&with_tools).unwrap(), "tools");
    assert_eq!(tokenizer.render(&chat).unwrap(), "<s>ab</s>");
}

#[test]
fn rotary_scaling_comes_from_the_metadata() {
    let (mut file, _) = converted("qwen2");
    file.set("qwen2.rope.scaling.type", Value::String("linear".into()));
    file.set("qwen2.rope.scaling.factor", Value::F32(4.0));
    let scaling = file.load().unwrap().config.rope.scaling;
    assert_eq!(scaling, RopeScaling::Linear { factor: 4.0 });
    file.set("qwen2.rope.scaling.type", Value::String("yarn".into()));
    file.set("qwen2.rope.scaling.original_context_length", Value::U32(64));
    let RopeScaling::Yarn(yarn) = file.load().unwrap().config.rope.scaling else { panic!() };
    assert_eq!((yarn.factor, yarn.original_max_position), (4.0, Some(64)));
    assert_eq!((yarn.beta_fast, yarn.beta_slow, yarn.truncate), (32.0, 1.0, true));
    file.set("qwen2.rope.scaling.type", Value::String("longrope".into()));
    assert!(file.load().unwrap_err().contains("rope scaling 'longrope'"));
}

/// The factors are those that llama.cpp's converter computes for a head of 8 with theta 500000:
/// 1 for short wavelengths, 32 for long ones, and `1 / ((1 - s) / 32 + s)` between them, where
/// `s = (8192 / wavelength - 1) / (4 - 1)`.
#[test]
fn llama3_scaling_is_found_again() {
    let (mut file, _) = converted("llama-tied");
    file.set("llama.rope.freq_base", Value::F32(500_000.0));
    let wavelength = |i: i32| 2.0 * std::f64::consts::PI * 500_000f64.powf(f64::from(i) / 4.0);
    let smooth = (8192.0 / wavelength(2) - 1.0) / 3.0;
    assert!((0.0..1.0).contains(&smooth), "{smooth}");
    let factors = [1.0, 1.0, (1.0 / ((1.0 - smooth) / 32.0 + smooth)) as f32, 32.0];
    let set = |file: &mut File, factors: [f32; 4]| {
        let tensor = quantise(&Tensor::from_slice(&factors), GgmlDType::F32);
        file.tensors.insert("rope_freqs.weight".to_string(), tensor);
    };
    set(&mut file, factors);
    let expected = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position: 8192,
    };
    assert_eq!(file.load().unwrap().config.rope.scaling, expected);
    set(&mut file, [1.0, 2.0, 3.0, 32.0]);
    assert!(file.load().unwrap_err().contains("set of rotary factors"));
}

#[test]
fn unsupported_and_incomplete_files_are_refused() {
    type Change = fn(&mut File);
    let cases: [(Change, &str); 14] = [
        (
            |f| {
                f.set("general.architecture", Value::String("mamba".into()));
            },
            "'mamba' is not",
        ),
        (
            |f| {
                f.set("qwen2.expert_count", Value::U32(8));
            },
            "expert_count '8'",
        ),
        (
            |f| {
                f.set("qwen2.rope.dimension_count", Value::U32(4));
            },
            "dimension_count '4'",
        ),
        (
            |f| {
                f.set("qwen2.attention.head_count", texts([]));
            },
            "must be a whole number",
        ),
        (
            |f| {
                f.values.remove("qwen2.block_count");
            },
            "qwen2.block_count: is missing",
        ),
        (
            |f| {
                f.set("tokenizer.ggml.model", Value::String("llama".into()));
            },
            "'llama' is not",
        ),
        (
            |f| {
                f.set("tokenizer.ggml.pre", Value::String("viking".into()));
            },
            "'viking' is not",
        ),
        (
            |f| {
                f.values.remove("tokenizer.ggml.pre");
            },
            "tokenizer.ggml.pre: is missing",
        ),
        (
            |f| {
                f.set("tokenizer.ggml.merges", texts(["ab"]));
            },
            "has no two halves",
        ),
        (
            |f| {
                f.set("tokenizer.ggml.merges", texts(["x yz"]));
            },
            "tokenizer: ",
        ),
        (
            |f| {
                f.tensors.remove("blk.1.ffn_up.weight");
            },
            "layers.1.mlp.up_proj.weight: is missing",
        ),
        (
            |f| {
                f.tensors.remove("token_embd.weight");
            },
            "token_embd.weight: is missing",
        ),
        (
            |f| {
                f.tensors.remove("blk.0.attn_q.bias");
            },
            "set of biases",
        ),
        (
            |f| {
                let extra = quantise(&Tensor::from_slice(&[1f32]), GgmlDType::F32);
                f.tensors.insert("blk.0.attn_sinks.weight".into(), extra);
            },
            "attn_sinks.weight: is in the checkpoint",
        ),
    ];
    for (change, expected) in cases {
        let (mut file, _) = converted("qwen2");
        change(&mut file);
        let message = file.load().unwrap_err();
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }
    let (mut file, _) = converted("qwen2");
    let narrow = quantise(&Tensor::from_slice(&[1f32; 40]), GgmlDType::F32);
    file.tensors.insert("output_norm.weight".into(), narrow);
    assert!(file.load().unwrap_err().contains("[40], but the configuration asks for [48]"));
}

#[test]
fn damaged_files_are_errors() {
    let (file, _) = converted("qwen2");
    let whole = file.bytes();
    assert!(load_bytes(&whole).is_ok());
    let cut_off = load_bytes(&whole[..whole.len() - 5000]).unwrap_err();
    assert!(cut_off.contains("is cut off: tensor"), "{cut_off}");
    for length in (0..10_000).step_by(97) {
        let message = load_bytes(&whole[..length]).unwrap_err();
        assert!(message.contains("cut off") || message.contains("not a GGUF"), "{message}");
    }
    assert!(load_bytes(b"GGUF\x01\0\0\0").unwrap_err().contains("GGUF version '1'"));
    assert!(load_bytes(b"not one at all").unwrap_err().contains("is not a GGUF file"));
    let real = fs::read(smollm2()).unwrap();
    let message = load_bytes(&real[..50_000_000]).unwrap_err();
    assert!(
        message.contains("is cut off: tensor") && message.contains("98362432")
            || message.contains("50000000"),
        "{message}"
    );
}

/// Whatever a header says, loading ends in a model or an error, never in a panic or an abort.
#[test]
fn random_damage_never_panics() {
    let (file, _) = converted("llama-tied");
    let whole = file.bytes();
    // The weights take four bytes each; what stands before them is the header.
    let header = whole.len() - 4 * 74_832;
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(3);
    let mut refused = 0;
    for _ in 0..400 {
        let mut damaged = whole.clone();
        for _ in 0..random.random_range(1..4) {
            damaged[random.random_range(4..header)] = random.random();
        }
        refused += usize::from(load_bytes(&damaged).is_err());
    }
    assert!(refused > 50, "only {refused} of 400 were refused");
}

#[test]
fn a_path_goes_before_the_hub() {
    let dir = tempfile::tempdir().unwrap();
    let message = refusal(dir.path());
    assert!(message.contains("neither config.json nor a .gguf file"), "{message}");
}
