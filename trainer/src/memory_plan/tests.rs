use super::*;
use onpolicy_engine::model::config::ModelConfig;
use tch::{Device, Kind};

const BF16: Placement = Placement { device: Device::Cuda(0), kind: Kind::BFloat16 };

fn config(flags: &[&str]) -> Config {
    let flags: Vec<String> =
        ["model.path=x"].iter().chain(flags).map(ToString::to_string).collect();
    Config::parse("", &flags).expect("a configuration")
}

fn tiny() -> ModelConfig {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tiny/llama-tied/config.json");
    let json = std::fs::read_to_string(path).expect("the file");
    ModelConfig::from_hf(&serde_json::from_str(&json).expect("JSON"), None).expect("a model")
}

/// Qwen2.5-0.5B.
fn qwen() -> ModelConfig {
    let json = serde_json::json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151_936,
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": true, "hidden_act": "silu",
    });
    ModelConfig::from_hf(&json, None).expect("a model")
}

fn plan(
    model: &ModelConfig,
    placement: Placement,
    gib: Option<usize>,
    flags: &[&str],
) -> MemoryPlan {
    let config = config(flags);
    let memory = gib.map(|gib| gib << 30);
    let prompts = &[41; 8][..];
    MemoryPlan::new(&Subject { model, config: &config, prompts, placement, others: 0, memory })
}

fn bytes(plan: &MemoryPlan, name: &str) -> usize {
    let part = plan.parts().iter().find(|part| part.name == name);
    part.unwrap_or_else(|| panic!("no part {name}")).bytes
}

#[test]
fn checkpointing_is_planned_for() {
    let model = tiny();
    let total = |flags: &[&str]| plan(&model, Placement::NATIVE, None, flags).total();
    let new = "rollout.max_new_tokens=64";
    let (kept, recomputed) = (total(&[new]), total(&[new, "train.activation_checkpointing=true"]));
    let layers = model.num_layers;
    let saved = (layers - 1) * sizes::layer_floats(&model) - layers * model.hidden_size;
    assert_eq!(kept - recomputed, 512 * 4 * saved);
    let narrow = |flags: &[&str]| bytes(&plan(&qwen(), BF16, Some(80), flags), "activations");
    assert!(narrow(&["train.activation_checkpointing=true"]) * 10 < narrow(&[]) * 2);
}

#[test]
fn narrow_weights_have_masters() {
    let model = qwen();
    let numbers = model.parameter_count();
    assert_eq!(numbers, 494_032_768);
    let plan = plan(&model, BF16, Some(80), &[]);
    let of = |name| bytes(&plan, name);
    assert_eq!((of("weights"), of("f32 masters")), (2 * numbers, 4 * numbers));
    assert_eq!((of("gradients"), of("AdamW moments")), (4 * numbers, 8 * numbers));
    let wide = Placement { kind: Kind::Float, ..BF16 };
    let wide = super::tests::plan(&model, wide, Some(80), &[]);
    assert!(wide.parts().iter().all(|part| part.name != "f32 masters"));
    assert_eq!(bytes(&wide, "weights"), 4 * numbers);
}

#[test]
fn what_is_left_is_told_in_blocks() {
    let model = qwen();
    let plan_of = |flags: &[&str]| plan(&model, BF16, Some(80), flags);
    let usual = plan_of(&[]);
    // K and V, 24 layers, 2 heads of 64, 16 tokens, 2 bytes.
    let kv = usual.kv();
    assert_eq!(kv.block_bytes, 2 * 24 * 2 * 64 * 16 * 2);
    assert_eq!(bytes(&usual, "KV pages"), kv.blocks * kv.block_bytes);
    let filled = usual.total() + kv.left * kv.block_bytes;
    let (filled, memory) = (filled as f64, (80usize << 30) as f64);
    assert!((0.949..=0.951).contains(&(filled / memory)), "{}", filled / memory);
    assert!(kv.left > 100 * kv.needed && usual.check().is_ok());
    let given = plan_of(&["engine.kv_memory_mb=192"]);
    assert_eq!((given.kv().blocks, bytes(&given, "KV pages")), (1024, 192 << 20));
    assert_eq!(bytes(&given, "activations"), bytes(&usual, "activations"));
    assert_eq!(plan(&model, BF16, None, &[]).kv().left, 0);
}

#[test]
fn what_does_not_fit_is_refused_with_numbers() {
    let small = plan(&qwen(), BF16, Some(8), &[]);
    let error = small.check().expect_err("too small").to_string();
    assert!(error.contains("does not fit into 8192 MiB"), "{error}");
    assert!(error.contains("MiB are missing") && error.contains("checkpointing"), "{error}");
    let text = Table(&small).to_string();
    assert!(text.contains("weights") && text.contains("942 MiB"), "{text}");
    assert!(text.contains("fill 216; 0 more"), "{text}");
}
