//! Weights from a directory: exactly those of a fresh engine, or none of them.

use crate::common::tiny;
use crate::directories::{Tensors, converted, directory, reload, saved, scaled, set, shard};
use crate::support::{Running, greedy, ids, logprobs, refusal, request, start, start_with, stats};
use onpolicy_engine::{
    engine::{EngineConfig, EngineHandle, OnUpdate},
    weights::ServeDtype,
};
use onpolicy_plugin_api::{Engine, EngineError, PauseMode, WeightUpdate};
use std::{fs, path::Path};
use tch::{Kind, Tensor};

fn update(engine: &EngineHandle, dir: &Path) -> Result<u64, EngineError> {
    engine.update_weights(WeightUpdate::Directory(dir.into()), None)
}

#[test]
fn a_directory_gives_what_a_fresh_engine_gives() {
    for name in ["llama-tied", "qwen2", "qwen3"] {
        let new = scaled(name, 1.2);
        for (kind, shards) in [(Kind::Float, false), (Kind::BFloat16, true), (Kind::Half, false)] {
            let dir = saved(&new, kind);
            if shards {
                shard(dir.path());
            }
            let (served, fresh) = (start(&tiny(name)), start(&reload(dir.path())));
            let old = logprobs(&served, 1);
            assert_eq!(greedy(&served, 1, 40).len(), 40);
            assert_eq!(update(&served, dir.path()), Ok(1));
            let hits = stats(&served).prefix_hits;
            let want = greedy(&fresh, 1, 40);
            assert_eq!(greedy(&served, 1, 40), want, "{name} {kind:?}");
            assert_eq!(stats(&served).prefix_hits, hits, "no KV of older weights is used");
            assert_eq!(logprobs(&served, 1), logprobs(&fresh, 1), "{name} {kind:?}");
            assert_ne!(logprobs(&served, 1), old);
            assert_eq!(served.checksums().unwrap(), fresh.checksums().unwrap());
            assert_eq!(served.weight_version(), 1);
        }
    }
}

#[test]
fn copies_in_a_narrow_type_follow() {
    let new = scaled("llama-tied", 1.2);
    let dir = saved(&new, Kind::Float);
    for serve_dtype in [ServeDtype::F16, ServeDtype::Int8] {
        let config = EngineConfig { serve_dtype, ..EngineConfig::default() };
        let (served, fresh) = (start_with(&tiny("llama-tied"), config), start_with(&new, config));
        update(&served, dir.path()).unwrap();
        assert_eq!(logprobs(&served, 2), logprobs(&fresh, 2), "{serve_dtype}");
    }
}

/// Every way in which a directory may be wrong.
fn damaged() -> Vec<(&'static str, tempfile::TempDir)> {
    let like = scaled("llama-tied", 1.1);
    let with = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = converted(&like, Kind::Half);
        change(&mut tensors);
        directory(&like, &tensors)
    };
    let after = |change: &dyn Fn(&Path)| {
        let dir = saved(&like, Kind::Float);
        change(dir.path());
        dir
    };
    let weights = |dir: &Path| dir.join("model.safetensors");
    vec![
        ("is missing", with(&|t| drop(t.remove(5)))),
        ("no such tensor", with(&|t| t.push(("extra".into(), Tensor::from(1f32))))),
        (
            "has shape",
            with(&|t| {
                let wide =
                    t.iter_mut().find(|(name, _)| name.ends_with("down_proj.weight")).unwrap();
                wide.1 = wide.1.transpose(0, 1).contiguous();
            }),
        ),
        ("has shape", with(&|t| t.last_mut().unwrap().1 = Tensor::from_slice(&[1f32]))),
        ("not finite", with(&|t| drop(t.last_mut().unwrap().1.get(0).fill_(f64::NAN)))),
        ("not finite", with(&|t| drop(t[0].1.get(7).get(3).fill_(f64::INFINITY)))),
        ("type of tensor", with(&|t| t[1].1 = t[1].1.to_kind(Kind::Double))),
        ("hidden_size: is 128", after(&|dir| set(dir, "hidden_size", 128.into()))),
        ("num_attention_heads", after(&|dir| set(dir, "num_attention_heads", 2.into()))),
        ("rope", after(&|dir| set(dir, "rope_theta", 50_000.into()))),
        ("rms_norm_eps", after(&|dir| set(dir, "rms_norm_eps", 1e-3.into()))),
        ("architecture", after(&|dir| set(dir, "architectures", vec!["Qwen3ForCausalLM"].into()))),
        ("config.json", after(&|dir| fs::write(dir.join("config.json"), "{").unwrap())),
        ("no model", after(&|dir| fs::remove_file(weights(dir)).unwrap())),
        (
            "cut off",
            after(&|dir| {
                let bytes = fs::read(weights(dir)).unwrap();
                fs::write(weights(dir), &bytes[..bytes.len() - 100]).unwrap();
            }),
        ),
    ]
}

#[test]
fn a_directory_that_is_wrong_changes_nothing() {
    let engine = start(&tiny("llama-tied"));
    let (checksums, want) = (engine.checksums().unwrap(), greedy(&engine, 1, 20));
    let mut running = Running::submit(&engine, request(2, 1, 200));
    running.read(1);
    for (expected, dir) in damaged() {
        match update(&engine, dir.path()) {
            Err(EngineError::Invalid { field, reason }) => {
                assert_eq!(field, "directory");
                assert!(reason.contains(expected), "{reason}: {expected}");
            }
            other => panic!("{expected}: {other:?}"),
        }
        assert_eq!(engine.checksums().unwrap(), checksums, "{expected}");
        assert_eq!(engine.weight_version(), 0);
    }
    let nowhere = update(&engine, Path::new("/nowhere"));
    assert!(matches!(nowhere, Err(EngineError::Invalid { .. })), "{nowhere:?}");
    assert_eq!(greedy(&engine, 1, 20), want);
    let (tokens, _) = running.finish();
    assert_eq!(ids(&tokens), greedy(&engine, 2, 200));
}

#[test]
fn a_directory_needs_no_configuration_but_must_fit_the_served_type() {
    let large = scaled("llama-tied", 1.0);
    let matrix = large.tensors.iter().find(|(name, _)| name.ends_with("up_proj.weight")).unwrap();
    let _ = matrix.1.get(0).fill_(1e5);
    let dir = saved(&large, Kind::Float);
    fs::remove_file(dir.path().join("config.json")).unwrap();
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let start = |serve_dtype| {
        start_with(&tiny("llama-tied"), EngineConfig { serve_dtype, ..EngineConfig::default() })
    };
    let narrow = start(ServeDtype::F16);
    let checksums = narrow.checksums().unwrap();
    let error = update(&narrow, dir.path()).unwrap_err().to_string();
    assert!(error.contains("holds 100000"), "{error}");
    assert_eq!(narrow.checksums().unwrap(), checksums);
    assert_eq!(update(&start(ServeDtype::Bf16), dir.path()), Ok(1));
}

#[test]
fn other_weights_under_the_same_version_use_no_old_kv() {
    let dir = saved(&scaled("llama-tied", 1.2), Kind::Float);
    let (served, fresh) = (start(&tiny("llama-tied")), start(&reload(dir.path())));
    greedy(&served, 1, 40);
    let update = WeightUpdate::Directory(dir.path().into());
    assert_eq!(served.update_weights(update, Some(0)), Ok(0));
    assert_eq!(greedy(&served, 1, 40), greedy(&fresh, 1, 40));
    assert_eq!(stats(&served).prefix_hits, 0);
}

#[test]
fn an_update_during_a_pause_is_applied_to_what_is_kept() {
    let dir = saved(&scaled("llama-tied", 1.2), Kind::Float);
    for on_update in [OnUpdate::Keep, OnUpdate::Recompute, OnUpdate::Drain] {
        let config = EngineConfig { on_update, ..EngineConfig::default() };
        let engine = start_with(&tiny("llama-tied"), config);
        let mut running = Running::submit(&engine, request(1, 1, 200));
        running.read(30);
        engine.pause(PauseMode::Keep, false).unwrap();
        running.drain();
        let old = running.tokens.len();
        let updated = update(&engine, dir.path());
        if on_update == OnUpdate::Drain {
            // It would wait for a sample that does not end.
            assert!(matches!(updated, Err(EngineError::Unavailable(_))), "{updated:?}");
            engine.resume().unwrap();
            assert_eq!(running.finish().0.len(), 200);
            assert_eq!(update(&engine, dir.path()), Ok(1));
            continue;
        }
        assert_eq!(updated, Ok(1));
        engine.resume().unwrap();
        let (tokens, _) = running.finish();
        let versions: Vec<u64> = tokens.iter().map(|token| token.weight_version).collect();
        assert_eq!(versions, [vec![0; old], vec![1; 200 - old]].concat(), "{on_update:?}");
        if on_update == OnUpdate::Recompute {
            // From there on it is what the new weights say of the same text.
            let mut text = request(1, 1, 200 - old);
            text.prompt.extend(ids(&tokens[..old]));
            let rest = Running::submit(&engine, text).finish().0;
            assert_eq!(ids(&rest), ids(&tokens[old..]));
        }
        assert_eq!(stats(&engine).blocks_used, 0);
    }
}

#[test]
fn reset_weights_are_no_weights() {
    let checkpoint = tiny("qwen2");
    let dir = saved(&checkpoint, Kind::Float);
    let engine = start(&checkpoint);
    let (checksums, want) = (engine.checksums().unwrap(), greedy(&engine, 1, 20));
    assert_eq!(checksums.len(), checkpoint.tensors.len());
    engine.reset_weights().unwrap();
    let reset = engine.checksums().unwrap();
    assert!(checksums.iter().zip(&reset).all(|(a, b)| a.0 == b.0 && a.1 != b.1));
    let refused = refusal(&engine);
    assert!(matches!(&refused, EngineError::Unavailable(why) if why.contains("no weights")));
    assert_eq!(update(&engine, dir.path()), Ok(2));
    assert_eq!((engine.checksums().unwrap(), greedy(&engine, 1, 20)), (checksums, want));
}
