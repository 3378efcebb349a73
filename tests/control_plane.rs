//! The control routes of the command serving the real model, by curl: the engine is held, gives its
//! memory back to the system, and changes its weights, and answers as before whenever it has the
//! weights from before.
#![cfg(target_os = "linux")]

mod common;

use onpolicy_engine::{model::loading::load, weights::Weights};
use onpolicy_trainer::checkpoint::{save_source, save_weights};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::Duration,
};

/// SmolLM2-135M in f32.
const WEIGHTS: u64 = 134_515_008 * 4;
/// K and V of one token: 30 layers, 3 heads of 64, f32.
const TOKEN: u64 = 2 * 30 * 3 * 64 * 4;
const KEY: &str = "open-sesame";

/// A server, as curl sees it.
struct Server(common::Served);

impl Server {
    fn curl(&self, arguments: &[&str]) -> Command {
        let mut curl = Command::new("curl");
        curl.args([
            "--silent",
            "--show-error",
            "--max-time",
            "120",
            "--write-out",
            "\n%{http_code}",
        ]);
        curl.args(arguments).stdout(Stdio::piped());
        curl
    }

    /// Status and answer.
    fn ask(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let (url, body) = (format!("{}{path}", self.0.url), body.to_string());
        let key = format!("Authorization: Bearer {KEY}");
        let mut arguments = vec!["--request", method, "--header", &key, &url];
        if body != "null" {
            arguments.extend(["--header", "Content-Type: application/json", "--data", &body]);
        }
        answer(self.curl(&arguments).output().expect("curl runs"))
    }

    fn post(&self, path: &str, body: Value) -> Value {
        let (status, answer) = self.ask("POST", path, &body);
        assert_eq!(status, 200, "{path}: {answer}");
        answer
    }

    /// A long answer of the likeliest tokens, on its way.
    fn completing(&self) -> std::process::Child {
        let (url, body) = (format!("{}/v1/completions", self.0.url), completion().to_string());
        let json = "Content-Type: application/json";
        self.curl(&["--header", json, "--data", &body, &url]).spawn().expect("curl runs")
    }

    fn greedy(&self) -> Vec<u64> {
        tokens(answer(self.completing().wait_with_output().expect("curl ends")))
    }

    fn status(&self, key: &str) -> u64 {
        let path = format!("/proc/{}/status", self.0.pid());
        let status = fs::read_to_string(path).expect("the process runs");
        let line = status.lines().find_map(|line| line.strip_prefix(key)).expect("the key");
        line.trim().trim_end_matches("kB").trim().parse().expect("a number")
    }

    /// Bytes that the process holds.
    fn resident(&self) -> u64 {
        self.status("VmRSS:") * 1024
    }

    /// Clock ticks that all its threads have computed for.
    fn ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.pid())).expect("it runs");
        let fields = stat.rsplit(") ").next().expect("fields").split(' ').skip(11).take(2);
        fields.map(|ticks| ticks.parse::<u64>().expect("a number")).sum()
    }
}

fn answer(output: std::process::Output) -> (u16, Value) {
    let text = String::from_utf8(output.stdout).expect("text");
    let (body, status) = text.rsplit_once('\n').expect("a status");
    let body = serde_json::from_str(body).unwrap_or_else(|_| Value::String(body.into()));
    (status.parse().expect("a status"), body)
}

fn completion() -> Value {
    json!({"prompt": "The three states of matter are", "max_tokens": 48, "temperature": 0,
        "ignore_eos": true, "return_token_ids": true})
}

fn tokens((status, answer): (u16, Value)) -> Vec<u64> {
    assert_eq!(status, 200, "{answer}");
    let ids = answer["choices"][0]["token_ids"].as_array().expect("token ids");
    ids.iter().map(|id| id.as_u64().expect("an id")).collect()
}

/// The real model as a directory, and another one with other weights.
fn directories(root: &Path) -> [PathBuf; 2] {
    let checkpoint = load(common::smollm2().to_str().expect("UTF-8")).expect("the model");
    let weights = Weights::new(checkpoint.tensors);
    ["step_1", "step_2"].map(|name| {
        let dir = root.join(name);
        fs::create_dir(&dir).expect("a directory");
        save_weights(&weights, &dir.join("model.safetensors")).expect("saved");
        save_source(&checkpoint.source, &weights, &dir).expect("saved");
        let (_, norm) = weights.iter().find(|(name, _)| *name == "model.norm.weight").expect("it");
        let _ = norm.narrow(0, 0, 200).g_mul_scalar_(-1.0);
        dir
    })
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

#[test]
fn an_engine_is_held_emptied_and_filled_again() {
    let root = tempfile::tempdir().expect("a folder");
    let [same, other] = directories(root.path());
    let root = root.path().to_str().expect("UTF-8");
    let arguments = ["--weight-root", root, "--set", "engine.kv_memory_mb=256"];
    let environment = [("ONPOLICY_CONTROL_KEY", KEY)];
    let server = Server(common::serve_in(&common::smollm2(), &arguments, &environment));
    let want = server.greedy();
    let url = format!("{}/pause", server.0.url);
    let without = answer(server.curl(&["--request", "POST", &url]).output().expect("curl runs"));
    assert_eq!(without.0, 401, "{}", without.1);

    // What runs is kept, and costs no time.
    let completing = server.completing();
    sleep(Duration::from_millis(300));
    server.post("/pause?mode=keep&clear_cache=false", Value::Null);
    assert_eq!(server.ask("GET", "/is_paused", &Value::Null).1, json!({"is_paused": true}));
    let before = server.ticks();
    sleep(Duration::from_secs(1));
    let ticks = server.ticks() - before;
    assert!(ticks < 20, "a paused engine computed for {ticks} ticks of a second's 100");
    server.post("/resume", Value::Null);
    assert_eq!(tokens(answer(completing.wait_with_output().expect("curl ends"))), want);

    // Level 1 gives back the pages.
    let long: Vec<u32> = (0..2000).map(|i| 100 + i * 7 % 5000).collect();
    server.post("/v1/completions", json!({"prompt": long, "max_tokens": 1}));
    let full = server.resident();
    server.post("/sleep?level=1", Value::Null);
    let without_pages = server.resident();
    let (given, pages) = (full.saturating_sub(without_pages), 2000 * TOKEN);
    println!("{} MiB; asleep {} MiB, pages {} MiB", mib(full), mib(without_pages), mib(pages));
    assert!((pages * 9 / 10..pages * 2).contains(&given), "{} MiB given back", mib(given));
    assert_eq!(server.ask("POST", "/v1/completions", &completion()).0, 503);
    server.post("/wake_up", Value::Null);
    assert_eq!(server.greedy(), want);

    // Level 2 the weights too; loading them makes no second copy that stays.
    let awake = server.resident();
    server.post("/sleep?level=2", Value::Null);
    let empty = server.resident();
    server.post("/wake_up?tags=weights", Value::Null);
    server.post("/wake_up?tags=kv_cache", Value::Null);
    assert_eq!(server.ask("POST", "/v1/completions", &completion()).0, 503, "no weights");
    server.post("/update_weights", json!({"weight_dir": same}));
    assert_eq!(server.greedy(), want);
    let filled = server.resident();
    println!("{} MiB; empty {} MiB; filled {} MiB", mib(awake), mib(empty), mib(filled));
    assert!(awake - empty > WEIGHTS * 95 / 100, "{} MiB given back", mib(awake - empty));
    assert!(filled < awake + (48 << 20), "{} MiB after {} MiB", mib(filled), mib(awake));

    // Other weights, and the same again.
    let checksums = server.post("/weight_checker", json!({"action": "checksum"}));
    let compare = json!({"action": "compare", "baseline": checksums["checksums"]});
    server.post("/update_weights", json!({"weight_dir": other}));
    let changed = server.greedy();
    assert_ne!(changed, want);
    let checked = server.post("/weight_checker", compare.clone());
    assert_eq!(checked, json!({"match": false, "mismatches": ["model.norm.weight"]}));
    let fresh = Server(common::serve(&other, &["--set", "engine.kv_memory_mb=64"]));
    assert_eq!(fresh.greedy(), changed);
    let body = json!({"model_path": same, "weight_version": "40"});
    assert_eq!(server.post("/update_weights_from_disk", body)["success"], true);
    assert_eq!(server.greedy(), want);
    assert_eq!(server.post("/weight_checker", compare)["match"], true);
    let version = server.ask("GET", "/weight_info", &Value::Null).1;
    assert_eq!(version, json!({"weight_version": "40"}));
    assert_eq!(server.ask("POST", "/update_weights", &json!({"weight_dir": "/etc"})).0, 403);
}

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny/llama-tied")
}

/// What the command says when it does not start.
fn refusal(arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_onpolicy"));
    command.args(["serve", "--port", "0", "--set", "engine.kv_memory_mb=8", "--model"]);
    command.arg(tiny()).args(arguments).env_remove("ONPOLICY_CONTROL_KEY");
    let output = command.output().expect("the command runs");
    assert!(!output.status.success());
    String::from_utf8(output.stderr).expect("text")
}

#[test]
fn control_for_everybody_is_refused_at_the_start() {
    let refused = refusal(&["--host", "0.0.0.0", "--control", "on"]);
    assert!(refused.contains("server.control_key"), "{refused}");
    let refused = refusal(&["--weight-root", "/no/such/directory"]);
    assert!(refused.contains("server.weight_roots"), "{refused}");
    let refused = refusal(&["--set", "server.control_key=a b"]);
    assert!(refused.contains("visible ASCII"), "{refused}");
}

#[test]
fn control_is_on_where_nobody_else_listens() {
    let small = ["--set", "engine.kv_memory_mb=8"];
    let with = |more: &[&str], environment: &[(&str, &str)]| {
        let server = Server(common::serve_in(&tiny(), &[&small[..], more].concat(), environment));
        server.ask("GET", "/is_paused", &Value::Null).0
    };
    assert_eq!(with(&[], &[]), 200, "on the loopback interface");
    assert_eq!(with(&["--control", "off"], &[]), 403);
    assert_eq!(with(&["--host", "0.0.0.0"], &[]), 403);
    assert_eq!(
        with(&["--host", "0.0.0.0", "--control", "on"], &[("ONPOLICY_CONTROL_KEY", KEY)]),
        200
    );
    assert_eq!(with(&[], &[("ONPOLICY_CONTROL_KEY", "another")]), 401);
    assert_eq!(with(&[], &[("ONPOLICY_API_KEY", KEY)]), 403, "the model's key opens no more");
}
