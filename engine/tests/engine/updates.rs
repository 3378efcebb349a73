//! Weights that change while samples run.

use super::*;

/// Changes the weights of a running engine while a sample of `on_update`'s kind is under way, and
/// returns its tokens' versions, and the first version seen after the update.
fn versions(engine: &EngineHandle) -> Vec<u64> {
    let (inbox, _gone) = listen(engine, request(1, 20, sampled(1, 200, 0)));
    let mut versions = Vec::new();
    let mut update = None;
    while let Ok(event) = inbox.recv_timeout(Duration::from_secs(20)) {
        if let Event::Token { token, .. } = event {
            versions.push(token.weight_version);
        }
        if versions.len() == 5 && update.is_none() {
            let engine = engine.clone();
            update = Some(std::thread::spawn(move || engine.update(|| Ok(())).expect("applied").1));
        }
    }
    assert_eq!(update.expect("there was an update").join().expect("no panic"), 1);
    assert_eq!(versions.len(), 200);
    versions
}

#[test]
fn running_samples_meet_an_update_as_the_user_says() {
    for on_update in [OnUpdate::Keep, OnUpdate::Recompute, OnUpdate::Drain] {
        let seen = |versions: &[u64]| (versions[0], versions[199]);
        let wanted = if on_update == OnUpdate::Drain { (0, 0) } else { (0, 1) };
        for engine in engines("llama-tied", EngineConfig { on_update, ..config(ROOMY) }) {
            let versions = versions(&engine);
            assert_eq!(seen(&versions), wanted, "{on_update:?}");
            assert!(versions.is_sorted());
        }
    }
}

#[test]
fn a_failed_update_changes_no_version_and_stops_nothing() {
    let checkpoint = tiny("llama-tied");
    let engine = engine(&checkpoint, config(ROOMY));
    let failed = engine.update(|| Err::<(), _>("the disk is full".to_string()));
    assert_eq!(failed, Err(EngineError::Internal("the disk is full".into())));
    let panicked = engine.update::<()>(|| panic!("a bug"));
    assert_eq!(panicked, Err(EngineError::Internal("a bug".into())));
    assert_eq!(engine.weight_version(), 0);
    assert_eq!(engine.update(|| Ok(42)), Ok((42, 1)));
    run(&engine, vec![request(1, 5, sampled(1, 5, 0))]);
}

#[test]
fn recomputed_samples_use_the_new_weights_from_the_first_token() {
    recompute(Kind::Float, config(ROOMY));
    recompute(Kind::Double, EngineConfig { async_scheduling: Some(true), ..config(ROOMY) });
}

/// After an update, a recomputed sample's later tokens are those that the new weights give to the whole
/// sequence so far.
fn recompute(kind: Kind, config: EngineConfig) {
    let (old, new) = (tiny_in("llama-tied", kind), tiny_in("llama-tied", kind));
    for (_, tensor) in &new.tensors {
        let _ = tensor.shallow_clone().g_mul_scalar_(1.1);
    }
    let limits = EngineConfig { on_update: OnUpdate::Recompute, ..config };
    let served = engine(&old, limits);
    let greedy = SamplingParams { temperature: 0.0, ..sampled(1, 220, 0) };
    let (inbox, _gone) = listen(&served, request(1, 20, greedy.clone()));
    inbox.recv_timeout(Duration::from_secs(10)).expect("a token");
    let pairs: Vec<_> = old.tensors.iter().zip(&new.tensors).collect();
    let pairs: Vec<_> =
        pairs.iter().map(|((_, a), (_, b))| (a.shallow_clone(), b.shallow_clone())).collect();
    served
        .update(move || {
            pairs.into_iter().for_each(|(mut old, new)| old.copy_(&new));
            Ok(())
        })
        .expect("applied");
    let mut sample = Vec::new();
    while let Ok(event) = inbox.recv_timeout(Duration::from_secs(10)) {
        if let Event::Token { token, .. } = event {
            sample.push((token.id, token.weight_version));
        }
    }
    let changed = 1 + sample.iter().filter(|(_, version)| *version == 0).count();
    assert!(changed < sample.len(), "the update came in the middle");
    let mut context = prompt(1, 20);
    context.push(0); // replaced below: the first token was taken off the channel already
    let fresh = engine(&new, config);
    let first = engine(&tiny_in("llama-tied", kind), config);
    let first = run(&first, vec![request(1, 20, greedy.clone())]);
    context[20] = tokens(&first[0].samples[0])[0];
    context.extend(sample[..changed - 1].iter().map(|(id, _)| id));
    let rest = SamplingParams { max_tokens: 220 - changed, ..greedy };
    let want = run(&fresh, vec![Request::new(context, rest)]);
    let got: Vec<u32> = sample[changed - 1..].iter().map(|(id, _)| *id).collect();
    assert_eq!(got, tokens(&want[0].samples[0]));
}

/// Overwrites a weight between two steps.
fn write(engine: &EngineHandle, weight: &Tensor, value: &Tensor) {
    let (mut weight, value) = (weight.shallow_clone(), value.shallow_clone());
    let write = move || {
        onpolicy_engine::torch::no_grad(|| weight.copy_(&value));
        Ok(())
    };
    engine.update(write).expect("applied");
}

/// Weights that are broken while samples run, and whole again.
#[test]
fn logits_that_are_no_numbers_fail_what_runs_and_nothing_else() {
    for (kind, async_scheduling) in [(Kind::Float, None), (Kind::Double, Some(true))] {
        let checkpoint = tiny_in("llama-tied", kind);
        let engine = engine(&checkpoint, EngineConfig { async_scheduling, ..config(ROOMY) });
        let answer = || all_tokens(&run(&engine, vec![request(1, 20, sampled(2, 30, 0))]));
        let before = answer();
        let inboxes = [2, 3].map(|seed| listen(&engine, request(seed, 20, sampled(4, 230, 0))));
        inboxes[1].0.recv_timeout(Duration::from_secs(10)).expect("a token");
        let is_norm = |(name, _): &&(String, Tensor)| name == "model.norm.weight";
        let (_, norm) = checkpoint.tensors.iter().find(is_norm).expect("the last norm");
        let whole = norm.copy();
        write(&engine, norm, &whole.full_like(f64::NAN));
        for (inbox, _) in &inboxes {
            let last = inbox.iter().last();
            let says = |error: &EngineError| error.to_string().contains("NaN");
            assert!(matches!(&last, Some(Event::Failed { error }) if says(error)), "{last:?}");
        }
        assert_eq!(blocks_used(&engine), 0);
        write(&engine, norm, &whole);
        assert_eq!(answer(), before);
    }
}
