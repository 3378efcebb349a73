//! New weights: the order of the calls, versions, servers that do not take them or come back late.

use crate::{
    fake::{Fake, Script},
    support::{answers, expected, ids, options, pool, request, start, until},
};
use onpolicy_engine::remote::{RemoteEngine, RemoteOptions};
use onpolicy_plugin_api::{Engine, EngineError, PauseMode, WeightUpdate};
use std::{sync::atomic::Ordering::SeqCst, time::Duration};

fn update(engine: &RemoteEngine, name: &str, version: Option<u64>) -> Result<u64, EngineError> {
    let dir = std::path::Path::new("/weights").join(name);
    engine.update_weights(WeightUpdate::Directory(dir), version)
}

fn calls(fake: &Fake) -> Vec<String> {
    std::mem::take(&mut fake.script().calls)
}

#[test]
fn servers_are_paused_loaded_named_and_resumed() {
    let (vllm, sglang) = (Fake::vllm(Script::default()), Fake::sglang(Script::default()));
    let engine = pool(&[&vllm, &sglang]);
    assert_eq!(update(&engine, "a", Some(5)), Ok(5));
    assert_eq!(calls(&vllm), ["pause keep", "load a", "reset", "resume"]);
    assert_eq!(calls(&sglang), ["pause retract", "load a", "reset", "resume"]);
    assert_eq!((&*vllm.script().version, &*sglang.script().version), ("5", "5"));
    assert_eq!((update(&engine, "b", None), engine.weight_version()), (Ok(6), 6));
    let groups = answers(&engine, vec![request(1, 1), request(2, 1)]).expect("answers");
    for group in &groups {
        assert_eq!(group.samples[0].tokens[0].weight_version, 6);
    }
}

#[test]
fn a_plain_vllm_reloads_from_the_directory() {
    let script = Script { plain: true, nameless: true, ..Script::default() };
    let fake = Fake::vllm(script);
    let options = RemoteOptions { pause: PauseMode::Abort, ..options() };
    let engine = start(&[&fake], options).expect("it answers");
    assert_eq!(update(&engine, "a", Some(1)), Ok(1));
    assert_eq!(calls(&fake), ["pause abort", "reload a", "reset", "resume"]);
    assert_eq!(engine.weight_version(), 1);
}

#[test]
fn a_server_that_does_not_take_weights_is_out_until_it_does() {
    let (good, bad) = (Fake::vllm(Script::default()), Fake::vllm(Script::default()));
    let engine = pool(&[&good, &bad]);
    bad.script().refuses_weights = true;
    assert_eq!(update(&engine, "a", Some(1)), Ok(1));
    assert_eq!(engine.serving(), 1);
    answers(&engine, (0..4).map(|number| request(number, 1)).collect()).expect("answers");
    assert!(bad.script().bodies.is_empty());
    bad.script().refuses_weights = false;
    until(|| engine.serving() == 2);
    assert_eq!(bad.script().version, "1");
    // It was resumed although it did not take them: nothing hangs there for ever.
    assert!(calls(&bad).starts_with(&["pause keep", "load a", "resume"].map(String::from)));
}

#[test]
fn if_no_server_takes_them_nothing_has_changed() {
    let fake = Fake::sglang(Script { refuses_weights: true, ..Script::default() });
    let engine = pool(&[&fake]);
    let error = update(&engine, "a", Some(3)).unwrap_err().to_string();
    assert!(error.contains("no server took the weights"), "{error}");
    assert!(error.contains("cannot be read"), "{error}");
    assert_eq!(engine.weight_version(), 0);
    until(|| engine.serving() == 1);
}

#[test]
fn the_version_is_checked_after_the_update() {
    let fake = Fake::sglang(Script { stubborn: true, version: "old".into(), ..Script::default() });
    let engine = pool(&[&fake]);
    let error = update(&engine, "a", Some(3)).unwrap_err().to_string();
    assert!(error.contains("'old' after the update to 3"), "{error}");
}

#[test]
fn a_server_that_was_started_anew_gets_the_newest_weights_first() {
    let (mut dying, other) = (Fake::vllm(Script::default()), Fake::vllm(Script::default()));
    let engine = pool(&[&dying, &other]);
    update(&engine, "a", Some(1)).expect("both take them");
    dying.kill();
    until(|| engine.serving() == 1);
    update(&engine, "b", Some(2)).expect("one takes them");
    dying.restart(Script { policy: true, ..Script::default() });
    until(|| engine.serving() == 2);
    assert_eq!(calls(&dying), ["pause keep", "load b", "reset", "resume"]);
    assert_eq!(dying.script().version, "2");
}

#[test]
fn stale_answers_are_thrown_away() {
    let fake = Fake::vllm(Script { policy: true, ..Script::default() });
    // The answer itself has to tell; the look at the server comes too late.
    let options = RemoteOptions { health_period_seconds: 1.0, ..options() };
    let engine = start(&[&fake], options).expect("it answers");
    update(&engine, "a", Some(4)).expect("it takes them");
    calls(&fake);
    fake.script().version = "0".into();
    let groups = answers(&engine, vec![request(1, 2)]).expect("answers");
    assert_eq!(ids(&groups[0]), expected(1, 2));
    assert_eq!(groups[0].samples[1].tokens[0].weight_version, 4);
    assert_eq!(calls(&fake), ["pause keep", "load a", "reset", "resume"]);
    assert_eq!(fake.script().bodies.len(), 2);
}

#[test]
fn a_server_with_other_weights_is_noticed_without_a_request() {
    let fake = Fake::sglang(Script::default());
    let engine = pool(&[&fake]);
    update(&engine, "a", Some(4)).expect("it takes them");
    calls(&fake);
    fake.script().version = "default".into();
    until(|| fake.script().version == "4");
    until(|| engine.serving() == 1);
    assert_eq!(calls(&fake), ["pause retract", "load a", "reset", "resume"]);
}

#[test]
fn waiting_for_samples_comes_before_new_weights() {
    let fake = Fake::sglang(Script { pause: Duration::from_millis(300), ..Script::default() });
    let engine = start(&[&fake], RemoteOptions { pause: PauseMode::Wait, ..options() });
    let engine = engine.expect("it answers");
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| answers(&engine, vec![request(1, 1)]).expect("answers"));
        until(|| fake.shared.running.load(SeqCst) == 1);
        update(&engine, "a", Some(1)).expect("it takes them");
        assert_eq!(fake.shared.finished.load(SeqCst), 1);
        assert_eq!(asking.join().expect("no panic")[0].samples[0].tokens[0].weight_version, 0);
    });
}

#[test]
fn pausing_reaches_all_servers_and_stays_over_an_update() {
    let (vllm, sglang) = (Fake::vllm(Script::default()), Fake::sglang(Script::default()));
    let engine = pool(&[&vllm, &sglang]);
    engine.pause(PauseMode::Keep, true).expect("it pauses");
    assert!(engine.is_paused());
    assert_eq!(calls(&vllm), ["pause keep"]);
    assert_eq!(calls(&sglang), ["pause retract", "reset"]);
    update(&engine, "a", None).expect("they take them");
    assert_eq!(calls(&vllm), ["pause keep", "load a", "reset"]);
    engine.resume().expect("it goes on");
    engine.reset_prefix_cache().expect("they forget");
    assert!(!engine.is_paused());
    assert_eq!(calls(&vllm), ["resume", "reset"]);
}

#[test]
fn each_plane_has_its_key() {
    // Two variables that are there whenever cargo runs a test.
    let names = ["HOME", "CARGO_MANIFEST_DIR"];
    let [data, control] = names.map(|name| std::env::var(name).expect("it is set"));
    let fake = Fake::vllm(Script { keys: Some((data, control)), ..Script::default() });
    let with = |data: &str, control: &str| RemoteOptions {
        api_key_env: Some(data.into()),
        control_key_env: Some(control.into()),
        ..options()
    };
    let missing = start(&[&fake], with("ONPOLICY_NO_SUCH_KEY", names[1])).err();
    let error = missing.expect("no such variable").to_string();
    assert!(error.starts_with("api_key_env") && error.contains("NO_SUCH_KEY"), "{error}");
    let engine = start(&[&fake], with(names[0], names[1])).expect("it answers");
    update(&engine, "a", None).expect("the control key is right");
    answers(&engine, vec![request(1, 1)]).expect("the key is right");

    let engine = start(&[&fake], with(names[1], names[0])).expect("it answers");
    let error = answers(&engine, vec![request(1, 1)]).unwrap_err().to_string();
    assert!(error.contains("HTTP 401") && error.contains("api_key_env"), "{error}");
    let error = update(&engine, "a", None).unwrap_err().to_string();
    assert!(error.contains("401") && error.contains("no control key"), "{error}");
}

#[test]
fn weights_cannot_be_written_in_place() {
    let fake = Fake::vllm(Script::default());
    let engine = pool(&[&fake]);
    let write = WeightUpdate::InPlace(Box::new(|| Ok(())));
    assert!(matches!(engine.update_weights(write, None), Err(EngineError::Unsupported(_))));
    assert!(!engine.shares_weights());
}
