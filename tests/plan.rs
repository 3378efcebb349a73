//! `onpolicy plan`: numbers for machines that are not here.

use serde_json::Value;
use std::{
    path::Path,
    process::{Command, Output},
};

fn golden(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny").join(name);
    path.display().to_string()
}

fn plan(model: &str, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_onpolicy"))
        .args(["plan", "--model", model])
        .args(arguments)
        .output()
        .expect("the command starts")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Qwen2.5-7B, by its configuration alone.
fn qwen() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    let config = serde_json::json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152_064,
        "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": false, "hidden_act": "silu",
    });
    std::fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
    dir
}

#[test]
fn a_configuration_and_a_size_are_enough() {
    let dir = qwen();
    let file = dir.path().join("config.json").display().to_string();
    let flags = ["--device", "cuda", "--set", "train.activation_checkpointing=true", "--json"];
    let output = plan(&file, &[&flags[..], &["--memory-gb", "180"]].concat());
    assert!(output.status.success(), "{}", text(&output));
    let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(answer["parameters"], 7_615_616_512u64);
    let parts = answer["plan"]["parts"].as_array().expect("parts");
    let bytes = |name: &str| parts.iter().find(|p| p["name"] == name).expect(name)["bytes"].clone();
    assert_eq!(bytes("weights"), 2 * 7_615_616_512u64);
    assert_eq!(bytes("f32 masters"), 4 * 7_615_616_512u64);
    assert_eq!(bytes("AdamW moments"), 8 * 7_615_616_512u64);
    let kv = &answer["plan"]["kv"];
    assert_eq!(kv["block_bytes"], 2 * 28 * 4 * 128 * 16 * 2);
    assert!(kv["left"].as_u64() > kv["needed"].as_u64(), "{kv}");
    let folder =
        plan(&dir.path().display().to_string(), &[&flags[..], &["--memory-gb", "180"]].concat());
    assert_eq!(folder.stdout, output.stdout);

    let output = plan(&file, &[&flags[..4], &["--memory-gb", "80"]].concat());
    assert!(!output.status.success());
    let text = text(&output);
    assert!(text.contains("f32 masters") && text.contains("does not fit into 81920 MiB"), "{text}");
    assert!(text.contains("7615.6 M parameters (cuda, bf16)"), "{text}");
}

#[test]
fn this_machine_is_planned_for_by_default() {
    let output = plan(&golden("qwen3"), &["--prompt-tokens", "32"]);
    let text = text(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("(cpu, f32); 8 prompts of 32 tokens x 8 samples of 24"), "{text}");
    for part in ["weights", "gradients", "AdamW moments", "activations", "KV pages", "memory"] {
        assert!(text.contains(part), "no {part} in {text}");
    }
    let output = plan(&golden("qwen3"), &["--device", "cuda"]);
    if !output.status.success() {
        let text = self::text(&output);
        assert!(text.contains("model.device = \"cuda\"") && text.contains("\"auto\""), "{text}");
    }
}
