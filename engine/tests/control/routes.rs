//! Every control route over the native engine: what it does, and what it refuses.

use crate::common::tiny;
use crate::directories::{reload, saved, scaled};
use crate::server::{Server, completion, open, settings, token_ids, within};
use crate::support::stats;
use onpolicy_engine::http::control::Settings;
use onpolicy_plugin_api::Engine;
use reqwest::Method;
use serde_json::{Value, json};
use std::time::Duration;
use tch::Kind;

const NOTHING: Value = Value::Null;

async fn server() -> Server {
    Server::start(&tiny("llama-tied"), open(), Settings::default()).await
}

/// Takes so many samples that there is time to do something to them.
fn long(max_tokens: usize) -> Value {
    let mut body = completion(max_tokens);
    body["n"] = 14.into();
    body
}

/// Waits until a sample runs.
async fn running(server: &Server) {
    while stats(&server.engine).running == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_engine_goes_on_where_it_was() {
    within(async {
        let server = server().await;
        let want = token_ids(&server.post("/v1/completions", completion(200)).await);
        assert_eq!(server.get("/is_paused").await, json!({"is_paused": false}));
        for (path, body, resume) in [
            ("/pause?mode=keep&clear_cache=false", NOTHING, "/resume"),
            ("/pause", json!({"mode": "keep"}), "/resume"),
            ("/pause_generation", json!({"mode": "in_place"}), "/continue_generation"),
            ("/pause_generation", json!({"mode": "retract"}), "/continue_generation"),
        ] {
            let completing = server.post("/v1/completions", long(200));
            let pausing = async {
                running(&server).await;
                let paused = server.post(path, body.clone()).await;
                let (status, ok) = (&paused["status"], ["paused", "ok"]);
                assert!(ok.contains(&status.as_str().unwrap()), "{paused}");
                assert_eq!(server.get("/is_paused").await, json!({"is_paused": true}));
                let steps = stats(&server.engine).steps;
                tokio::time::sleep(Duration::from_millis(50)).await;
                assert_eq!(stats(&server.engine).steps, steps);
                server.post(resume, NOTHING).await;
                assert_eq!(server.get("/is_paused").await, json!({"is_paused": false}));
            };
            let (answer, ()) = tokio::join!(completing, pausing);
            assert_eq!(token_ids(&answer), want, "{path}");
            assert_eq!(answer["choices"][0]["finish_reason"], "length");
        }
        assert_eq!(server.post("/resume", NOTHING).await, json!({"status": "resumed"}));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pauses_abort_or_wait() {
    within(async {
        let server = server().await;
        for (path, finish) in [("/pause", "abort"), ("/pause?mode=wait", "length")] {
            let completing = server.post("/v1/completions", long(150));
            let pausing = async {
                running(&server).await;
                assert_eq!(server.post(path, NOTHING).await, json!({"status": "paused"}));
                assert_eq!(stats(&server.engine).running, 0);
            };
            let (answer, ()) = tokio::join!(completing, pausing);
            assert_eq!(answer["choices"][0]["finish_reason"], finish);
            server.post("/resume", NOTHING).await;
        }
        let refused = server.refused("/pause?mode=stop", NOTHING).await;
        assert_eq!((refused.0, refused.1.as_str()), (400, "mode"));
        assert!(refused.2.contains("abort, wait, keep"), "{}", refused.2);
        assert_eq!(server.refused("/pause?mod=keep", NOTHING).await.1, "mod");
        assert_eq!(server.refused("/pause?clear_cache=maybe", NOTHING).await.1, "clear_cache");
        assert_eq!(server.get("/is_paused").await, json!({"is_paused": false}));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_aborted_by_the_names_that_clients_gave_them() {
    within(async {
        let server = server().await;
        let named = |name: &str| {
            let mut body = long(200);
            body["request_id"] = name.into();
            body
        };
        for (path, body) in [
            ("/abort_requests", json!({"request_ids": ["mine", "nobody's"]})),
            ("/abort_requests", json!({"request_ids": ["cmpl-mine"]})),
            ("/abort_request", json!({"rid": "mine"})),
        ] {
            let (mine, other) = (named("mine"), long(200));
            let completing = server.post("/v1/completions", mine);
            let beside = server.post("/v1/completions", other);
            let aborting = async {
                while stats(&server.engine).running < 28 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                assert_eq!(server.post(path, body.clone()).await["aborted"], 1, "{path} {body}");
            };
            let (mine, beside, ()) = tokio::join!(completing, beside, aborting);
            for choice in mine["choices"].as_array().unwrap() {
                assert_eq!(choice["finish_reason"], "abort");
            }
            assert_eq!(beside["choices"][0]["finish_reason"], "length");
            assert_eq!(server.post(path, body).await["aborted"], 0, "the name is forgotten");
        }
        for (path, body) in [
            ("/abort_requests", NOTHING),
            ("/abort_requests", json!({"request_ids": []})),
            ("/abort_request", json!({"abort_all": true, "rid": ""})),
        ] {
            let completing = server.post("/v1/completions", named("one"));
            let aborting = async {
                running(&server).await;
                assert_eq!(server.post(path, body).await["aborted"], 1);
            };
            let (answer, ()) = tokio::join!(completing, aborting);
            assert_eq!(answer["choices"][1]["finish_reason"], "abort");
        }
        assert_eq!(server.refused("/abort_request", NOTHING).await.1, "rid");
        assert_eq!(server.refused("/abort_requests", json!({"ids": []})).await.1, "ids");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_prefix_cache_is_reset() {
    within(async {
        let server = server().await;
        for (method, path) in [
            (Method::POST, "/reset_prefix_cache"),
            (Method::POST, "/reset_prefix_cache/"),
            (Method::POST, "/flush_cache"),
            (Method::GET, "/flush_cache"),
        ] {
            server.greedy().await;
            let before = stats(&server.engine).prefix_hits;
            server.greedy().await;
            let hit = stats(&server.engine).prefix_hits;
            assert!(hit > before);
            assert_eq!(server.send(method, path, &NOTHING).await.0, 200);
            server.greedy().await;
            assert_eq!(stats(&server.engine).prefix_hits, hit, "{path}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn weights_come_from_a_directory() {
    within(async {
        let root = tempfile::tempdir().unwrap();
        let settings = settings(&[root.path().to_path_buf()]);
        let server = Server::start(&tiny("llama-tied"), open(), settings).await;
        let old = server.greedy().await;
        let place = |name: &str, factor: f64| {
            let (dir, target) = (saved(&scaled("llama-tied", factor), Kind::Float), root.path());
            std::fs::rename(dir.keep(), target.join(name)).unwrap();
            target.join(name)
        };
        let (one, two) = (place("step_1", 1.2), place("step_2", 0.8));
        let fresh = Server::start(&reload(&one), open(), Settings::default()).await;
        let answer = server.post("/update_weights", json!({"weight_dir": one})).await;
        assert_eq!((&answer["status"], &answer["weight_version"]), (&json!("ok"), &json!("1")));
        let new = server.greedy().await;
        assert_ne!(new, old);
        assert_eq!(new, fresh.greedy().await);

        let body = json!({"model_path": two, "weight_version": "7", "flush_cache": true});
        let answer = server.post("/update_weights_from_disk", body).await;
        assert_eq!(answer["success"], true, "{answer}");
        assert_eq!(server.get("/weight_info").await, json!({"weight_version": "7"}));
        assert_eq!(server.engine.weight_version(), 7);
        let body = json!({"model_path": one, "weight_version": "step-1"});
        server.post("/update_weights_from_disk", body).await;
        assert_eq!(server.get("/get_weight_version").await, json!({"weight_version": "step-1"}));
        assert_eq!((server.engine.weight_version(), server.greedy().await), (8, new.clone()));

        // Whatever is wrong with a directory, the weights stay.
        std::fs::remove_file(two.join("model.safetensors")).unwrap();
        for (path, name) in
            [("/update_weights", "weight_dir"), ("/update_weights_from_disk", "model_path")]
        {
            let of = |dir: &std::path::Path| json!({ name: dir });
            let (status, param, message) = server.refused(path, of(&two)).await;
            assert_eq!((status, param.as_str()), (400, name), "{message}");
            assert!(message.contains("neither model.safetensors nor"), "{message}");
            assert_eq!(server.refused(path, of(&root.path().join("no"))).await.0, 400);
            assert_eq!(server.refused(path, of("/etc".as_ref())).await.0, 403);
            let up = root.path().join("../etc");
            assert_eq!(server.refused(path, of(&up)).await.0, 400);
            assert_eq!(server.refused(path, json!({})).await.1, name);
        }
        let body = json!({"model_path": one, "load_format": "dummy"});
        assert_eq!(server.refused("/update_weights_from_disk", body).await.1, "load_format");
        assert_eq!((server.engine.weight_version(), server.greedy().await), (8, new));
        let (status, _, message) =
            fresh.refused("/update_weights", json!({"weight_dir": one})).await;
        assert_eq!(status, 403);
        assert!(message.contains("server.weight_roots"), "{message}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn weights_are_named_and_checked() {
    within(async {
        let root = saved(&tiny("llama-tied"), Kind::Float);
        let settings = settings(&[root.path().to_path_buf()]);
        let server = Server::start(&tiny("llama-tied"), open(), settings).await;
        assert_eq!(server.get("/weight_info").await, json!({"weight_version": "0"}));
        for (name, number) in [(json!("12"), 12), (json!(13), 13), (json!("step-1"), 13)] {
            let answer = server.post("/update_weight_version", json!({"new_version": name})).await;
            let text = name.as_str().map_or(name.to_string(), str::to_string);
            assert_eq!((&answer["success"], &answer["new_version"]), (&json!(true), &json!(text)));
            assert_eq!(server.get("/weight_info").await["weight_version"], text);
            assert_eq!(server.get("/version").await["weight_version"], number);
        }
        assert_eq!(server.refused("/update_weight_version", NOTHING).await.1, "new_version");

        let checker = |body: Value| server.post("/weight_checker", body);
        let checksums = checker(json!({"action": "checksum"})).await["checksums"].clone();
        let hash = checksums["model.norm.weight"].as_str().unwrap();
        assert!(hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit()), "{hash}");
        assert_eq!(checksums.as_object().unwrap().len(), tiny("llama-tied").tensors.len());
        let same = json!({"match": true, "mismatches": []});
        let compare = json!({"action": "compare", "baseline": checksums});
        assert_eq!(checker(compare.clone()).await, same);
        let mut others = compare.clone();
        others["checksums"] = json!([checksums, checksums]);
        assert_eq!(checker(others.clone()).await, same);
        others["checksums"][1]["model.norm.weight"] = "0".into();
        let other = json!({"match": false, "mismatches": ["model.norm.weight"]});
        assert_eq!(checker(others).await, other);
        let mut extra = compare.clone();
        extra["baseline"]["more"] = "0".into();
        assert_eq!(checker(extra).await["mismatches"], json!(["more"]));

        assert_eq!(checker(json!({"action": "reset"})).await, json!({"status": "reset"}));
        let mismatches = checker(compare.clone()).await["mismatches"].as_array().unwrap().len();
        assert_eq!(mismatches, checksums.as_object().unwrap().len());
        let (status, answer) = server.send(Method::POST, "/v1/completions", &completion(4)).await;
        assert_eq!(status, 503, "{answer}");
        server.post("/update_weights", json!({"weight_dir": root.path()})).await;
        assert_eq!(checker(compare).await, same);
        for (body, param) in [
            (json!({}), "action"),
            (json!({"action": "hash"}), "action"),
            (json!({"action": "compare"}), "baseline"),
            (json!({"action": "checksum", "baseline": {}}), "baseline"),
        ] {
            let refused = server.refused("/weight_checker", body).await;
            assert_eq!((refused.0, refused.1.as_str()), (400, param));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_sleeps_and_wakes_up() {
    within(async {
        let root = saved(&tiny("llama-tied"), Kind::Float);
        let settings = settings(&[root.path().to_path_buf()]);
        let server = Server::start(&tiny("llama-tied"), open(), settings).await;
        let want = server.greedy().await;
        let sleeping = || async { server.get("/is_sleeping").await["is_sleeping"] == true };
        for (sleep, wake) in [
            ("/sleep", "/wake_up"),
            ("/sleep?level=0", "/wake_up?tags=scheduling"),
            ("/sleep?level=1&mode=wait", "/wake_up?tags=kv_cache&tags=weights"),
            ("/release_memory_occupation", "/resume_memory_occupation"),
        ] {
            assert!(!sleeping().await);
            server
                .post(
                    sleep,
                    if sleep.starts_with("/r") { json!({"tags": ["kv_cache"]}) } else { NOTHING },
                )
                .await;
            assert!(sleeping().await, "{sleep}");
            let body = completion(4);
            let (status, answer) = server.send(Method::POST, "/v1/completions", &body).await;
            assert_eq!((status, &answer["error"]["code"]), (503, &json!("unavailable")));
            server.post(wake, NOTHING).await;
            assert!(!sleeping().await, "{wake}");
            assert_eq!(server.greedy().await, want);
        }
        for (sleep, tags) in [
            ("/sleep?level=2", NOTHING),
            ("/release_memory_occupation", NOTHING),
            ("/release_memory_occupation", json!({"tags": "weights"})),
        ] {
            server.post(sleep, tags).await;
            let update = json!({"weight_dir": root.path()});
            let refused = server.refused("/update_weights", update.clone()).await;
            assert_eq!(refused.0, 409, "{}", refused.2);
            assert!(refused.2.contains("wake the engine up"), "{}", refused.2);
            let refused = server.refused("/weight_checker", json!({"action": "checksum"})).await;
            assert_eq!(refused.0, 409);
            server.post("/wake_up?tags=weights", NOTHING).await;
            server.post("/update_weights", update).await;
            server.post("/resume_memory_occupation", json!({"tags": ["kv_cache"]})).await;
            assert_eq!(server.greedy().await, want);
        }
        assert_eq!(server.refused("/sleep?level=3", NOTHING).await.1, "level");
        assert_eq!(server.refused("/wake_up?tags=all", NOTHING).await.1, "tags");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_built_in_says_what_is() {
    within(async {
        let server = server().await;
        let update = json!({"update_info": {"names": []}});
        for (path, body, word) in [
            ("/init_weight_transfer_engine", json!({"init_info": {}}), "NCCL"),
            ("/start_weight_update", NOTHING, "NCCL"),
            ("/update_weights", update, "NCCL"),
            ("/finish_weight_update", NOTHING, "NCCL"),
            ("/init_communicator/", json!({"host": "a", "port": 1}), "NCCL"),
            ("/update_named_param/", NOTHING, "NCCL"),
            ("/init_broadcaster", NOTHING, "NCCL"),
            ("/update_weights_from_tensor", NOTHING, "NCCL"),
            ("/load_lora_adapter", json!({"lora_name": "a"}), "LoRA"),
            ("/v1/load_lora_adapter", NOTHING, "LoRA"),
        ] {
            let (status, _, message) = server.refused(path, body).await;
            assert_eq!(status, 501, "{path}");
            assert!(message.contains(word) && message.contains("weight_dir"), "{message}");
        }
        assert_eq!(server.refused("/collective_rpc", json!({"method": "f"})).await.0, 501);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn questions_are_answered() {
    within(async {
        let server = server().await;
        for path in ["/get_world_size", "/get_world_size/", "/get_world_size?include_dp=false"] {
            assert_eq!(server.get(path).await, json!({"world_size": 1}));
        }
        assert_eq!(server.get("/health/").await, json!({"status": "ok"}));
        assert_eq!(server.get("/liveness").await, json!({"status": "ok"}));
        let model = server.get("/get_model_info").await;
        assert_eq!(
            (&model["model_path"], &model["is_generation"]),
            (&json!("llama-tied"), &json!(true))
        );
        assert_eq!(server.get("/server_info").await["context_length"], 256);
        server.engine.shutdown();
        let (status, _) = server.send(Method::GET, "/liveness", &NOTHING).await;
        assert_eq!(status, 503);
        assert_eq!(server.refused("/pause", NOTHING).await.0, 503);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_is_told_when_a_command_takes_too_long() {
    within(async {
        let timeout = Duration::from_millis(100);
        let settings = Settings { timeout, ..Settings::default() };
        let server = Server::start(&tiny("llama-tied"), open(), settings).await;
        let want = server.greedy().await;
        let (leave, left) = std::sync::mpsc::channel::<()>();
        let (began, begun) = tokio::sync::oneshot::channel::<()>();
        let engine = server.engine.clone();
        let held = tokio::task::spawn_blocking(move || {
            engine.update(move || {
                began.send(()).map_err(|()| "gone".to_string())?;
                left.recv().map_err(|e| e.to_string())
            })
        });
        begun.await.unwrap();
        let (status, _, message) = server.refused("/pause?mode=keep", NOTHING).await;
        assert_eq!(status, 504);
        assert!(message.contains("server.control_timeout_seconds"), "{message}");
        leave.send(()).unwrap();
        held.await.unwrap().unwrap();
        // The command was done all the same.
        while !server.engine.is_paused() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        server.post("/resume", NOTHING).await;
        assert_eq!(server.greedy().await, want);
    })
    .await;
}
