use super::*;

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
        "hidden_act": "silu", "eos_token_id": 2
    })
}

fn with(mut config: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn family(name: &str, changes: Value) -> Value {
    with(with(llama(), json!({ "architectures": [name] })), changes)
}

fn read(config: &Value) -> ModelConfig {
    ModelConfig::from_hf(config, None).unwrap()
}

fn refusal(config: Value) -> String {
    ModelConfig::from_hf(&config, None).unwrap_err().to_string()
}

#[test]
fn defaults_follow_transformers() {
    let config = read(&llama());
    assert_eq!((config.head_dim, config.num_kv_heads), (8, 2));
    assert_eq!(config.rope, RopeConfig { theta: 10_000.0, scaling: RopeScaling::None });
    assert!(!config.tie_word_embeddings && !config.qkv_bias && !config.o_bias && !config.qk_norm);
    assert_eq!(config.layer_window, [None; 4]);
    assert_eq!((config.bos_token_id, config.eos_token_ids), (None, vec![2]));

    let mut old = llama();
    old.as_object_mut().unwrap().remove("num_key_value_heads");
    assert_eq!(read(&old).num_kv_heads, 4);
}

#[test]
fn biases_and_norms_belong_to_families() {
    let biased = json!({ "attention_bias": true, "mlp_bias": true });
    let config = read(&with(llama(), biased.clone()));
    assert!(config.qkv_bias && config.o_bias && config.mlp_bias && !config.qk_norm);
    let config = read(&family("Qwen2ForCausalLM", json!({})));
    assert!(config.qkv_bias && !config.o_bias && !config.mlp_bias && !config.qk_norm);
    let config = read(&family("Qwen3ForCausalLM", json!({ "head_dim": 16 })));
    assert!(!config.qkv_bias && !config.o_bias && config.qk_norm);
    assert_eq!(config.head_dim, 16);
    let config = read(&family("MistralForCausalLM", json!({ "head_dim": null })));
    assert!(!config.qkv_bias && !config.o_bias && !config.qk_norm);
    assert_eq!(config.head_dim, 8);
}

#[test]
fn windows_follow_transformers() {
    let windows = |name: &str, changes: Value| read(&family(name, changes)).layer_window;
    let mistral = "MistralForCausalLM";
    assert_eq!(windows(mistral, json!({ "sliding_window": 16 })), [Some(16); 4]);
    assert_eq!(windows(mistral, json!({ "sliding_window": null })), [None; 4]);
    assert_eq!(windows(mistral, json!({})), [Some(4096); 4]);

    let qwen = "Qwen2ForCausalLM";
    assert_eq!(windows(qwen, json!({ "sliding_window": 16 })), [None; 4]);
    let used = json!({ "sliding_window": 16, "use_sliding_window": true, "max_window_layers": 3 });
    assert_eq!(windows(qwen, used.clone()), [None, None, None, Some(16)]);
    let types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"];
    let typed = with(used, json!({ "layer_types": types }));
    assert_eq!(windows("Qwen3ForCausalLM", typed), [Some(16), None, Some(16), None]);
    assert_eq!(windows("LlamaForCausalLM", json!({ "sliding_window": 16 })), [None; 4]);
}

#[test]
fn end_tokens_come_from_the_generation_config_first() {
    let eos = |config: Value, generation: Value| {
        ModelConfig::from_hf(&config, Some(&generation)).unwrap().eos_token_ids
    };
    assert_eq!(eos(llama(), json!({ "eos_token_id": [7, 9] })), [7, 9]);
    assert_eq!(eos(llama(), json!({ "eos_token_id": 5 })), [5]);
    assert_eq!(eos(llama(), json!({})), [2]);
    assert_eq!(eos(llama(), json!({ "eos_token_id": [7, 100] })), [7], "100 is out of vocabulary");
}

#[test]
fn refusals_say_what_is_wrong() {
    let cases = [
        (family("GemmaForCausalLM", json!({})), "architecture 'GemmaForCausalLM'"),
        (family("GemmaForCausalLM", json!({})), "LlamaForCausalLM, Qwen2ForCausalLM"),
        (with(llama(), json!({ "hidden_act": "gelu" })), "hidden_act 'gelu'"),
        (with(llama(), json!({ "vocab_size": null })), "vocab_size: is missing"),
        (with(llama(), json!({ "vocab_size": -3 })), "vocab_size: must be a whole number"),
        (with(llama(), json!({ "num_key_value_heads": 3 })), "must divide num_attention_heads"),
        (with(llama(), json!({ "hidden_size": 30 })), "head_dim"),
        (with(llama(), json!({ "head_dim": 7 })), "head_dim: must be even"),
        (with(llama(), json!({ "num_hidden_layers": 2000000000 })), "must be at most 4096"),
        (with(llama(), json!({ "partial_rotary_factor": 0.5 })), "partial_rotary_factor '0.5'"),
        (
            with(llama(), json!({ "rope_scaling": { "rope_type": "dynamic", "factor": 2 } })),
            "'dynamic'",
        ),
        (with(llama(), json!({ "rope_scaling": { "type": "longrope" } })), "linear, llama3, yarn"),
        (with(llama(), json!({ "rope_scaling": { "factor": 2.0 } })), "has no rope_type"),
        (with(llama(), json!({ "rope_scaling": { "type": "linear" } })), "factor: is missing"),
        (with(llama(), json!({ "rope_parameters": { "full_attention": {} } })), "rope_parameters"),
        (with(llama(), json!({ "quantization_config": { "quant_method": "gptq" } })), "'gptq'"),
        (family("Qwen3ForCausalLM", json!({ "layer_types": ["full_attention"] })), "layer_types"),
        (json!({}), "architectures: is missing"),
    ];
    for (config, expected) in cases {
        let message = refusal(config);
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }
}

#[test]
fn rope_is_read_in_its_three_forms() {
    let scaling = RopeScaling::Linear { factor: 4.0 };
    let old = json!({ "rope_theta": 5e5, "rope_scaling": { "type": "linear", "factor": 4.0 } });
    let newer =
        json!({ "rope_theta": 5e5, "rope_scaling": { "rope_type": "linear", "factor": 4 } });
    let newest = json!({
        "rope_parameters": { "rope_type": "linear", "factor": 4.0, "rope_theta": 5e5 }
    });
    for form in [old, newer, newest] {
        let rope = read(&with(llama(), form)).rope;
        assert_eq!(rope, RopeConfig { theta: 5e5, scaling: scaling.clone() });
    }
    let plain = json!({ "rope_parameters": { "rope_theta": 2e4 } });
    let rope = read(&with(llama(), plain)).rope;
    assert_eq!(rope, RopeConfig { theta: 2e4, scaling: RopeScaling::None });
}

#[test]
fn written_configurations_read_back() {
    let yarn = json!({ "rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0 });
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64
    });
    let slide = json!({ "sliding_window": 16, "use_sliding_window": true, "max_window_layers": 2 });
    let cases = [
        with(llama(), json!({ "rope_scaling": llama3, "attention_bias": true, "mlp_bias": true })),
        with(llama(), json!({ "tie_word_embeddings": true, "eos_token_id": [1, 2] })),
        family("MistralForCausalLM", json!({ "sliding_window": 16, "bos_token_id": 1 })),
        family("MistralForCausalLM", json!({ "sliding_window": null })),
        family("Qwen2ForCausalLM", slide.clone()),
        family("Qwen3ForCausalLM", with(slide, json!({ "head_dim": 16, "rope_scaling": yarn }))),
        family("Qwen3ForCausalLM", json!({ "attention_bias": true })),
    ];
    for config in cases {
        let first = read(&config);
        assert_eq!(read(&first.to_hf()), first);
    }
}

#[test]
fn tensors_follow_the_configuration() {
    let config =
        read(&family("Qwen3ForCausalLM", json!({ "head_dim": 16, "num_hidden_layers": 1 })));
    let shapes = config.tensor_shapes();
    let shapes: Vec<(&str, &[i64])> = shapes.iter().map(|(n, s)| (n.as_str(), &s[..])).collect();
    let expected: [(&str, &[i64]); 14] = [
        ("model.embed_tokens.weight", &[100, 32]),
        ("model.layers.0.input_layernorm.weight", &[32]),
        ("model.layers.0.self_attn.q_proj.weight", &[64, 32]),
        ("model.layers.0.self_attn.k_proj.weight", &[32, 32]),
        ("model.layers.0.self_attn.v_proj.weight", &[32, 32]),
        ("model.layers.0.self_attn.q_norm.weight", &[16]),
        ("model.layers.0.self_attn.k_norm.weight", &[16]),
        ("model.layers.0.self_attn.o_proj.weight", &[32, 64]),
        ("model.layers.0.post_attention_layernorm.weight", &[32]),
        ("model.layers.0.mlp.gate_proj.weight", &[64, 32]),
        ("model.layers.0.mlp.up_proj.weight", &[64, 32]),
        ("model.layers.0.mlp.down_proj.weight", &[32, 64]),
        ("model.norm.weight", &[32]),
        ("lm_head.weight", &[100, 32]),
    ];
    assert_eq!(shapes, expected);
    assert_eq!(
        config.parameter_count(),
        2 * 3200 + 3 * 32 + 2 * 16 + 2 * 2048 + 2 * 1024 + 3 * 2048
    );

    let biased = read(&family("Qwen2ForCausalLM", json!({ "tie_word_embeddings": true })));
    let names: Vec<String> = biased.tensor_shapes().into_iter().map(|(name, _)| name).collect();
    assert!(names.contains(&"model.layers.3.self_attn.k_proj.bias".to_string()));
    assert!(!names.contains(&"model.layers.3.self_attn.o_proj.bias".to_string()));
    assert!(!names.contains(&"lm_head.weight".to_string()));
}

/// The numbers are those of transformers 4.57.1:
/// ```python
/// config = LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=16, rope_theta=theta,
///                      max_position_embeddings=length, rope_scaling=scaling)
/// frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, None)
/// ```
#[test]
fn frequencies_are_those_of_transformers() {
    let check = |rope: Value, length: usize, expected: [f64; 8], factor: f64| {
        let config = read(&with(llama(), rope));
        let (frequencies, found) = config.rope.frequencies(16, length);
        assert_eq!(frequencies.len(), 8);
        for (f, e) in frequencies.iter().zip(expected) {
            assert!((f / e - 1.0).abs() < 1e-6, "{frequencies:?} is not {expected:?}");
        }
        assert!((found - factor).abs() < 1e-12, "{found} is not {factor}");
    };
    let plain = [
        1.0,
        0.316227764,
        0.100000001,
        0.0316227786,
        0.00999999978,
        0.00316227786,
        0.00100000005,
        0.000316227786,
    ];
    check(json!({ "rope_theta": 1e4 }), 256, plain, 1.0);
    // scaling = dict(rope_type="linear", factor=4.0); theta = 1e4; length = 256
    let linear = json!({ "rope_type": "linear", "factor": 4.0 });
    check(json!({ "rope_theta": 1e4, "rope_scaling": linear }), 256, plain.map(|f| f / 4.0), 1.0);
    // scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    //                original_max_position_embeddings=8192); theta = 5e5; length = 131072
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192
    });
    let expected = [
        1.0,
        0.193922758,
        0.0376060307,
        0.00729266508,
        0.000524846022,
        3.42810235e-05,
        6.64787058e-06,
        1.28917316e-06,
    ];
    check(json!({ "rope_theta": 5e5, "rope_scaling": llama3 }), 131_072, expected, 1.0);
    // scaling = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768);
    // theta = 1e6; length = 131072
    let yarn = json!({
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768
    });
    let expected = [
        1.0,
        0.177827939,
        0.0316227786,
        0.00421755994,
        0.000500000024,
        4.44569851e-05,
        7.90569356e-06,
        1.40585337e-06,
    ];
    let factor = 1.138629436111989;
    check(json!({ "rope_theta": 1e6, "rope_scaling": yarn }), 131_072, expected, factor);
    // scaling = dict(rope_type="yarn", factor=40.0, mscale=0.707, mscale_all_dim=1.0,
    //                beta_fast=16, beta_slow=2, truncate=False); theta = 1e4; length = 4096
    let yarn = json!({
        "rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0,
        "beta_fast": 16, "beta_slow": 2, "truncate": false
    });
    let expected = [
        1.0,
        0.316227764,
        0.100000001,
        0.0316227786,
        0.00579010462,
        0.000123952457,
        2.49999994e-05,
        7.90569447e-06,
    ];
    let factor = 0.9210423553163399;
    check(json!({ "rope_theta": 1e4, "rope_scaling": yarn }), 4096, expected, factor);
    // scaling = dict(rope_type="yarn", factor=2.0, attention_factor=1.25,
    //                original_max_position_embeddings=1024); theta = 1e4; length = 4096
    let yarn = json!({
        "rope_type": "yarn", "factor": 2.0, "attention_factor": 1.25,
        "original_max_position_embeddings": 1024
    });
    let expected = [
        1.0,
        0.316227764,
        0.087500006,
        0.023717083,
        0.00624999963,
        0.00158113893,
        0.000500000024,
        0.000158113893,
    ];
    check(json!({ "rope_theta": 1e4, "rope_scaling": yarn }), 4096, expected, 1.25);
}
