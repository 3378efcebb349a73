//! What an engine over the libtorch path does not take, and why.

use crate::common::{golden, tiny_in};
use crate::support::{start, weights};
use onpolicy_engine::{
    device::{DeviceName, Dtype, Placement},
    engine::{EngineConfig, EngineHandle, Model},
    model::loading::load_to,
    weights::ServeDtype,
};
use onpolicy_plugin_api::{Engine, EngineError, WeightUpdate};
use tch::{Device, Kind, Tensor};

fn refused(config: EngineConfig) -> (String, String) {
    let checkpoint = tiny_in("qwen2", Kind::BFloat16);
    let model = Model {
        name: checkpoint.name.clone(),
        weights: weights(&checkpoint),
        config: checkpoint.config,
        tokenizer: None,
    };
    match EngineHandle::start(model, config) {
        Err(EngineError::Invalid { field, reason }) => (field, reason),
        other => panic!("{:?}", other.map(|_| "an engine")),
    }
}

#[test]
fn copies_in_a_narrow_type_are_made_of_native_weights() {
    let (field, reason) =
        refused(EngineConfig { serve_dtype: ServeDtype::Int8, ..EngineConfig::default() });
    assert_eq!(field, "serve_dtype");
    assert!(reason.contains("cpu, bf16"), "{reason}");
}

#[test]
fn a_pool_that_cannot_be_had_is_told_at_the_start() {
    let (field, reason) = refused(EngineConfig { kv_memory: 1 << 50, ..EngineConfig::default() });
    assert_eq!(field, "kv_memory");
    assert!(reason.contains("more than there is on cpu, bf16"), "{reason}");
}

#[test]
fn f16_takes_no_number_beyond_its_own() {
    let f16 = Placement::resolve(DeviceName::Cpu, Some(Dtype::F16)).expect("the CPU is there");
    assert_eq!(f16, Placement { device: Device::Cpu, kind: Kind::Half });
    let path = golden("tiny/qwen2");
    let fits = load_to(path.to_str().expect("UTF-8"), f16).expect("small weights");
    let dir = tempfile::tempdir().expect("a directory");
    for (file, text) in fits.source.files() {
        std::fs::write(dir.path().join(file), text).expect("a file");
    }
    let mut tensors = fits.tensors.iter().map(|(n, t)| (n.clone(), t.to_kind(Kind::Float)));
    let mut tensors: Vec<(String, Tensor)> = tensors.by_ref().collect();
    tensors[0].1 = &tensors[0].1 + 7e4;
    Tensor::write_safetensors(&tensors, dir.path().join("model.safetensors")).expect("a file");
    let error = load_to(dir.path().to_str().expect("UTF-8"), f16).expect_err("too large");
    let error = error.to_string();
    assert!(error.contains(&tensors[0].0) && error.contains("model.dtype"), "{error}");
    let engine = start(&fits);
    let update = engine.update_weights(WeightUpdate::Directory(dir.path().into()), None);
    let error = update.expect_err("too large").to_string();
    assert!(error.contains("65504"), "{error}");
    assert_eq!(engine.weight_version(), 0);
}

#[test]
fn f16_serves() {
    let engine = start(&tiny_in("llama-tied", Kind::Half));
    let native = start(&tiny_in("llama-tied", Kind::Float));
    let [got, want] = [engine, native].map(|engine| {
        let mut params = crate::support::greedy(1);
        params.prompt_logprobs = Some(0);
        let request = crate::support::request(2, 50, params);
        crate::support::run(&engine, vec![request]).remove(0).prompt_logprobs
    });
    crate::common::assert_close(&got, &want, 0.05, "f16 log-probs");
    assert_ne!(got, want);
}
