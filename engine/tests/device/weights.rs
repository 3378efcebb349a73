//! The weights of an engine over the libtorch path: written in place, hashed, given back, loaded.

use crate::common::{tiny, tiny_in};
use crate::support::{greedy, request, run, start, start_with, tokens, weights};
use onpolicy_engine::{
    engine::{EngineConfig, EngineHandle, OnUpdate},
    model::loading::Checkpoint,
};
use onpolicy_plugin_api::{Engine, EngineError, Memory, Sleep, WeightUpdate};
use rapidhash::v3::rapidhash_v3;
use tch::{Kind, Tensor};
use tempfile::TempDir;

const NARROW: [Kind; 2] = [Kind::BFloat16, Kind::Double];

/// The checkpoint with all weights multiplied by `factor`, in f32, on a disk.
fn saved(name: &str, factor: f64) -> TempDir {
    let checkpoint = tiny(name);
    let scaled = |(name, t): &(String, Tensor)| (name.clone(), t * factor);
    let tensors: Vec<_> = checkpoint.tensors.iter().map(scaled).collect();
    let dir = tempfile::tempdir().expect("a directory");
    for (file, text) in checkpoint.source.files() {
        std::fs::write(dir.path().join(file), text).expect("a file");
    }
    Tensor::write_safetensors(&tensors, dir.path().join("model.safetensors")).expect("a file");
    dir
}

/// Greedy tokens and the log-probs of a prompt, which say more about the weights.
fn answer(engine: &EngineHandle) -> (Vec<u32>, Vec<f32>) {
    let mut params = greedy(30);
    params.prompt_logprobs = Some(0);
    let group = run(engine, vec![request(1, 40, params)]).remove(0);
    (tokens(&group).remove(0), group.prompt_logprobs)
}

#[test]
fn an_update_in_place_is_seen_by_the_next_step() {
    for kind in NARROW {
        let (served, new) = (tiny_in("llama-tied", kind), tiny_in("llama-tied", kind));
        for (_, tensor) in &new.tensors {
            let _ = tensor.shallow_clone().g_mul_scalar_(1.1);
        }
        let config = EngineConfig { on_update: OnUpdate::Recompute, ..EngineConfig::default() };
        let engine = start_with(&served, config);
        let before = answer(&engine);
        let addresses = |c: &Checkpoint| -> Vec<usize> {
            c.tensors.iter().map(|(_, tensor)| tensor.data_ptr() as usize).collect()
        };
        let places = addresses(&served);
        let pairs = served.tensors.iter().zip(&new.tensors);
        let pairs: Vec<_> =
            pairs.map(|((_, a), (_, b))| (a.shallow_clone(), b.to_kind(Kind::Double))).collect();
        let update = engine.update(move || {
            pairs.into_iter().for_each(|(mut served, new)| served.copy_(&new));
            Ok(())
        });
        assert_eq!(update, Ok(((), 1)));
        assert_eq!(addresses(&served), places, "{kind:?}");
        let after = answer(&engine);
        assert_ne!(after, before, "{kind:?}");
        assert_eq!(after, answer(&start(&new)), "{kind:?}");
    }
}

#[test]
fn checksums_are_those_of_the_bytes() {
    for kind in NARROW {
        let checkpoint = tiny_in("qwen3", kind);
        let sums = start(&checkpoint).checksums().expect("sums");
        assert_eq!(sums.len(), checkpoint.tensors.len());
        for ((name, sum), (want, tensor)) in sums.iter().zip(&checkpoint.tensors) {
            let mut bytes = vec![0; tensor.numel() * kind.elt_size_in_bytes()];
            tensor.copy_data_u8(&mut bytes, tensor.numel());
            assert_eq!((name, *sum), (want, rapidhash_v3(&bytes)));
        }
    }
}

#[test]
fn a_directory_is_loaded_into_the_type_that_is_served() {
    for kind in NARROW {
        let served = tiny_in("qwen2", kind);
        let engine = start(&served);
        let dir = saved("qwen2", 1.25);
        let update = WeightUpdate::Directory(dir.path().into());
        assert_eq!(engine.update_weights(update, Some(7)), Ok(7));
        assert_eq!(weights(&served).placement().kind, kind);
        let new = tiny("qwen2");
        for ((_, got), (name, want)) in served.tensors.iter().zip(&new.tensors) {
            assert!(got.equal(&(want * 1.25).to_kind(kind)), "{name}");
        }
    }
}

#[test]
fn pages_and_weights_go_and_come() {
    for kind in NARROW {
        let checkpoint = tiny_in("llama-tied", kind);
        let (engine, dir) = (start(&checkpoint), saved("llama-tied", 1.0));
        let (want, sums) = (answer(&engine), engine.checksums().expect("sums"));
        engine.sleep(Sleep::KvCache).expect("it sleeps");
        engine.wake_up(&[Memory::KvCache]).expect("it wakes up");
        assert_eq!(answer(&engine), want, "{kind:?}: without its pages");
        engine.sleep(Sleep::Weights).expect("it sleeps");
        // What is left of an address is the place in a storage without memory.
        let gone = |tensor: &Tensor| (tensor.data_ptr() as usize) < 1 << 16;
        assert!(checkpoint.tensors.iter().all(|(_, tensor)| gone(tensor)));
        let error = engine.checksums().expect_err("there are none");
        assert!(matches!(error, EngineError::Unavailable(_)), "{error}");
        engine.wake_up(&[Memory::Weights]).expect("the weights' memory is there");
        assert!(engine.is_sleeping());
        assert_ne!(engine.checksums().expect("sums"), sums);
        let update = || WeightUpdate::Directory(dir.path().into());
        engine.update_weights(update(), None).expect("loaded");
        engine.wake_up(&[Memory::KvCache]).expect("it wakes up");
        assert_eq!(engine.checksums().expect("sums"), sums);
        assert_eq!(answer(&engine), want, "{kind:?}: with its weights loaded");
        engine.reset_weights().expect("reset");
        assert_ne!(engine.checksums().expect("sums"), sums);
    }
}
