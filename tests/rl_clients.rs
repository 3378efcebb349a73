//! Clients of trainers that draw their samples from a server, unmodified, against the command
//! serving the real model.

mod common;

use onpolicy_engine::model::loading::load;
use std::fs;

/// The environment that scripts/test makes for them.
const VENV: &str = "venv-rl";

#[test]
fn trls_client_generates_a_round() {
    let server = common::serve(&common::smollm2(), &[]);
    common::run_client(VENV, "trl_client.py", &[&server.url]);
}

#[test]
fn verifiers_draws_rollouts_through_the_token_route() {
    let model = common::smollm2();
    let checkpoint = load(model.to_str().expect("UTF-8 path")).expect("the real model loads");
    let tokenizer = tempfile::tempdir().expect("a folder");
    for (name, text) in checkpoint.source.files() {
        fs::write(tokenizer.path().join(name), text).expect("a file");
    }
    drop(checkpoint);
    let server = common::serve(&model, &[]);
    let folder = tokenizer.path().to_str().expect("UTF-8 path");
    common::run_client(VENV, "verifiers_client.py", &[&server.url, folder]);
}
