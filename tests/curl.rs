//! curl, as the README has it, against the command serving the real model.

mod common;

use serde_json::{Value, json};
use std::process::Command;

/// Calls a route with curl; `body` makes it a POST. The status, and the body of the answer.
fn curl(url: &str, body: Option<&Value>) -> (u16, String) {
    let mut command = Command::new("curl");
    command.args(["--silent", "--max-time", "60", "--write-out", "\n%{http_code}", url]);
    if let Some(body) = body {
        command.args(["-H", "content-type: application/json", "-d", &body.to_string()]);
    }
    let output = command.output().expect("curl is installed");
    assert!(output.status.success(), "curl failed: {}", output.status);
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let (body, status) = text.rsplit_once('\n').expect("a status");
    (status.parse().expect("a number"), body.to_string())
}

fn ok(url: &str, body: Option<&Value>) -> Value {
    let (status, text) = curl(url, body);
    assert_eq!(status, 200, "{url} {text}");
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn curl_asks_and_looks_after_a_server() {
    let server = common::serve(&common::smollm2(), &[]);
    let at = |path: &str| format!("{}{path}", server.url);
    let model = ok(&at("/v1/models"), None);
    assert!(model["data"][0]["max_model_len"].as_u64().expect("a length") > 0);
    for path in ["/health", "/ping", "/health_generate"] {
        assert_eq!(ok(&at(path), None), json!({"status": "ok"}));
    }
    assert_eq!(ok(&at("/load"), None), json!({"server_load": 0}));
    assert_eq!(ok(&at("/version"), None)["weight_version"], 0);

    let sampling = json!({"max_tokens": 8, "temperature": 0, "ignore_eos": true, "logprobs": 0});
    let ids = ok(&at("/tokenize"), Some(&json!({"prompt": "2+2 ="})))["tokens"].take();
    let body = json!({"token_ids": ids, "sampling_params": sampling});
    let tokens = ok(&at("/inference/v1/generate"), Some(&body))["choices"][0].take();
    let sampling = json!({"max_new_tokens": 8, "temperature": 0, "ignore_eos": true,
        "skip_special_tokens": false});
    let body = json!({"text": "2+2 =", "sampling_params": sampling, "return_logprob": true});
    let sample = ok(&at("/generate"), Some(&body));
    assert_eq!(sample["output_ids"], tokens["token_ids"]);
    let body = json!({"tokens": tokens["token_ids"]});
    assert_eq!(ok(&at("/detokenize"), Some(&body))["prompt"], sample["text"]);
    let ours = tokens["logprobs"]["content"].as_array().expect("log-probs");
    let theirs = sample["meta_info"]["output_token_logprobs"].as_array().expect("log-probs");
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!(ours["logprob"], theirs[0]);
    }

    let body = json!({"text": "a", "stream": true, "sampling_params": {"max_new_tokens": 3}});
    let (status, events) = curl(&at("/generate"), Some(&body));
    assert_eq!(status, 200);
    assert!(events.trim_end().ends_with("data: [DONE]"), "{events}");
    let (status, text) = curl(&at("/generate"), Some(&json!({"text": "a", "odd": 1})));
    assert_eq!(status, 400);
    let error: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(error["error"]["param"], "odd");
}
