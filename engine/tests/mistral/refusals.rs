//! What cannot be given is refused, and the refusal says why.

use crate::{
    common::golden,
    support::{ask, greedy, ids, tiny, tiny_dir},
};
use onpolicy_engine::mistral::{Dtype, Options, start};
use onpolicy_plugin_api::{
    Engine, EngineError, Event, Request, SamplingParams, Sink, WeightUpdate,
};
use std::path::Path;

struct Nobody;

impl Sink for Nobody {
    fn send(&mut self, event: Event) -> bool {
        panic!("{event:?} of a refused request");
    }

    fn is_closed(&self) -> bool {
        false
    }
}

/// The field that a refusal names, and what it says.
fn refused(engine: &dyn Engine, prompt: Vec<u32>, params: SamplingParams) -> (String, String) {
    match engine.submit(Request::new(prompt, params), Box::new(Nobody)) {
        Err(EngineError::Invalid { field, reason }) => (field, reason),
        other => panic!("{other:?} instead of a refusal"),
    }
}

#[test]
fn requests_that_cannot_be_served_are_refused_at_once() {
    let engine = tiny("llama-tied");
    let base = SamplingParams::default;
    let unsupported = [("prompt_logprobs", SamplingParams { prompt_logprobs: Some(0), ..base() })];
    for (field, params) in unsupported {
        let (named, reason) = refused(&engine, vec![5], params);
        assert_eq!(named, field);
        assert_eq!(reason, "is not supported by the engine mistralrs");
    }
    let wrong = [
        ("n", vec![5], SamplingParams { n: 257, ..base() }),
        ("temperature", vec![5], SamplingParams { temperature: -1.0, ..base() }),
        ("prompt", vec![5, 160], base()),
        ("stop_token_ids", vec![5], SamplingParams { stop_token_ids: vec![160], ..base() }),
        ("prompt", vec![], base()),
        ("prompt", vec![5; 256], base()),
    ];
    for (field, prompt, params) in wrong {
        assert_eq!(refused(&engine, prompt, params).0, field);
    }
    assert_eq!(ask(&engine, &[5; 255], greedy(9))[0].tokens.len(), 1, "one token fits");
}

#[test]
fn weights_that_do_not_fit_change_nothing() {
    let engine = tiny("llama-tied");
    let before = ids(&ask(&engine, &[5, 6, 7], greedy(8))[0]);
    let empty = tempfile::tempdir().expect("a directory");
    for (dir, hint) in [
        (tiny_dir("nowhere"), "no such path"),
        (empty.path().to_path_buf(), "config.json"),
        (golden("tiny"), "config.json"),
    ] {
        let error = engine.update_weights(WeightUpdate::Directory(dir), None).unwrap_err();
        assert!(matches!(&error, EngineError::Invalid { field, .. } if field == "weights"));
        assert!(error.to_string().contains(hint), "{error}");
    }
    let in_place = WeightUpdate::InPlace(Box::new(|| panic!("nothing may be written")));
    let error = engine.update_weights(in_place, None).unwrap_err();
    assert!(error.to_string().contains("give it a directory"), "{error}");
    assert_eq!(engine.weight_version(), 0);
    assert_eq!(ids(&ask(&engine, &[5, 6, 7], greedy(8))[0]), before);
}

#[test]
fn a_model_that_cannot_be_loaded_is_an_error() {
    let gguf = golden("tiny").join("llama-tied/model.safetensors");
    let refuse = |path: &Path, options: Options| match start(path.to_str().unwrap(), options) {
        Err(EngineError::Invalid { field, reason }) => (field, reason),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("{} was loaded", path.display()),
    };
    assert_eq!(refuse(&gguf, Options::default()).0, "model");
    assert_eq!(refuse(&tiny_dir("nowhere"), Options::default()).0, "model");
    let dir = tiny_dir("llama-tied");
    let isq = Options { isq: Some("Q77".into()), ..Options::default() };
    let (field, reason) = refuse(&dir, isq);
    assert_eq!(field, "isq");
    assert!(reason.contains("Q4K"), "{reason}");
    let too_long = Options { max_model_len: Some(257), ..Options::default() };
    assert_eq!(refuse(&dir, too_long).0, "max_model_len");
    for count in [0, 2] {
        let options = Options { max_num_seqs: count, ..Options::default() };
        assert_eq!(refuse(&dir, options).0, "max_num_seqs");
    }
    // Half precision works on a CPU; what it costs in exactness is seen here.
    let half = Options { dtype: Dtype::F16, ..Options::default() };
    let half = start(dir.to_str().unwrap(), half).expect("loads").engine;
    assert_eq!(ask(&half, &[5, 6, 7], greedy(3))[0].tokens.len(), 3);
}
