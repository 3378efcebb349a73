//! The command with `--device` and `--dtype`.

mod common;

use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny/llama-tied")
}

/// What the command says when it refuses.
fn refusal(arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_onpolicy"));
    let command = command.args(arguments).arg("--model").arg(model());
    let output = command.output().expect("the command runs");
    assert!(!output.status.success(), "{arguments:?} was accepted");
    String::from_utf8(output.stderr).expect("UTF-8")
}

#[tokio::test]
async fn a_bf16_model_is_served() {
    let served = common::serve(&model(), &["--dtype", "bf16", "--set", "engine.kv_memory_mb=16"]);
    let body = json!({
        "prompt": vec!["t5 t6 t7"; 2], "n": 3, "max_tokens": 9, "ignore_eos": true, "seed": 1,
        "return_token_ids": true
    });
    let ask = || async {
        let url = format!("{}/v1/completions", served.url);
        let answer = reqwest::Client::new().post(url).timeout(Duration::from_secs(60)).json(&body);
        let answer: Value = answer.send().await.expect("an answer").json().await.expect("JSON");
        let choices = answer["choices"].as_array().expect("choices").clone();
        choices.iter().map(|choice| choice["token_ids"].clone()).collect::<Vec<_>>()
    };
    let first = ask().await;
    assert_eq!(first.len(), 6);
    assert!(first.iter().all(|ids| ids.as_array().expect("ids").len() == 9));
    assert_eq!(ask().await, first, "seeds mean the same again");
}

#[test]
fn devices_and_types_that_cannot_be_had_are_refused() {
    if !tch::Cuda::is_available() {
        let text = refusal(&["serve", "--device", "cuda"]);
        assert!(text.contains("LD_LIBRARY_PATH") && text.contains("\"cpu\""), "{text}");
    }
    let text = refusal(&["serve", "--dtype", "bf16", "--serve-dtype", "int8"]);
    assert!(text.contains("engine.serve_dtype = \"int8\""), "{text}");
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().join("run");
    let folder = folder.to_str().expect("UTF-8");
    let text = refusal(&["train", "--dtype", "f16", "--output", folder, "--port", "0"]);
    assert!(text.contains("f16") && text.contains("bf16"), "{text}");
}
