//! `onpolicy bench` on small models: what it counts is right, and what does not fit is refused.

mod common;

use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// Of the tiny model: embedding, three layers, last norm.
const PARAMETERS: usize = 160 * 48 + 3 * (48 * (48 + 16 + 16 + 48) + 3 * 48 * 112 + 2 * 48) + 48;

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny/llama-tied")
}

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_onpolicy"))
        .arg("bench")
        .args(arguments)
        .output()
        .expect("the command starts")
}

/// The report of a benchmark that works.
fn report(which: &str, model: &Path, arguments: &[&str]) -> Value {
    let model = model.to_str().expect("UTF-8");
    let common = [which, "--model", model, "--warmup", "0", "--runs", "1", "--json", "-"];
    let output = bench(&[&common[..], arguments].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
}

fn refusal(arguments: &[&str]) -> String {
    let output = bench(arguments);
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Name, unit and median of every line.
fn lines(report: &Value) -> Vec<(&str, &str, f64)> {
    let of = |line| -> Option<_> {
        let line: &Value = line;
        Some((line["name"].as_str()?, line["unit"].as_str()?, line["median"].as_f64()?))
    };
    let lines = report["lines"].as_array().expect("lines");
    lines.iter().map(|line| of(line).expect("a line")).collect()
}

fn names(report: &Value) -> Vec<&str> {
    lines(report).into_iter().map(|(name, ..)| name).collect()
}

#[test]
fn rollouts_in_process_over_http_and_of_another_server() {
    let other = common::serve(&tiny(), &[]);
    let dir = tempfile::tempdir().expect("a folder");
    let picture = dir.path().join("race.svg");
    let compare = format!("other={}/v1", other.url);
    let report = report(
        "rollout",
        &tiny(),
        &[
            "--workload",
            "smoke",
            "--no-sharing",
            "--compare",
            &compare,
            "--plot",
            picture.to_str().expect("UTF-8"),
        ],
    );
    let ours =
        ["in process", "HTTP, tokens and log-probs", "HTTP, text only", "in process, no sharing"];
    assert_eq!(names(&report)[..5], [&ours[..], &["other"]].concat());
    for line in report["lines"].as_array().expect("lines").iter().take(5) {
        assert_eq!(line["unit"], "tokens/s");
        assert!(line["median"].as_f64().expect("a rate") > 1.0, "{line}");
        assert_eq!(line["runs"].as_array().map(Vec::len), Some(1));
        let reached = line["roofline"]["reached"].as_f64().expect("a share");
        assert!(reached > 0.0 && reached < 1.0, "{line}");
    }
    assert_eq!(report["settings"]["runs"], 1);
    assert!(report["rates"]["read_gbs"].as_f64().expect("a rate") > 0.5);
    assert_eq!(report["versions"]["torch"], "2.11.0");
    assert_eq!(report["model"]["parameters"], PARAMETERS);
    assert!(!report.to_string().contains("all but the model"));
    let notes = report["notes"].as_array().expect("notes");
    assert!(notes.iter().any(|note| note.as_str().is_some_and(|n| n.ends_with("x other"))));
    assert!(std::fs::read_to_string(picture).expect("a picture").contains("other"));
}

#[test]
fn shares_of_the_phases_add_up() {
    let report = report("rollout", &tiny(), &["--workload", "smoke", "--profile"]);
    let lines = lines(&report);
    let of_group = |who: &str| -> f64 {
        let of = |(line, (name, _, share)): (&Value, &(&str, &str, f64))| {
            let group = line["group"].as_str().expect("a group");
            (group.ends_with(who) && *name != "all but the model").then_some(*share)
        };
        let all = report["lines"].as_array().expect("lines");
        all.iter().zip(&lines).filter_map(of).sum()
    };
    for who in ["goes in process", "goes HTTP, tokens and log-probs", "goes HTTP, text only"] {
        let sum = of_group(who);
        assert!((sum - 100.0).abs() < 5.0, "{who}: {sum} %, {lines:?}");
    }
}

#[test]
fn a_server_that_answers_otherwise_ends_the_race_by_name() {
    let other = common::serve(&tiny(), &[]);
    let (model, compare) = (tiny(), format!("peer={}", other.url));
    let race = ["rollout", "--workload", "smoke", "--runs", "1", "--warmup", "0"];
    let race =
        [&race[..], &["--model", model.to_str().expect("UTF-8"), "--compare", &compare]].concat();
    let with = |more: &[&str]| refusal(&[&race[..], more].concat());
    let error = with(&["--usage-per-choice"]);
    assert!(error.contains("'peer'") && error.contains("completion_tokens is 16"), "{error}");
    let error = with(&["--compare-extra", r#"peer={"max_tokens": 3}"#]);
    assert!(error.contains("'peer'") && error.contains("is 6 where 16"), "{error}");
    let error = with(&["--compare-extra", r#"{"no_such_field": 1}"#]);
    assert!(error.contains("'peer'") && error.contains("no_such_field"), "{error}");
    let error = with(&["--compare-extra", r#"{"temperature": 0}"#]);
    assert!(error.contains("'peer'") && error.contains("the same text"), "{error}");
}

#[test]
fn what_does_not_fit_is_refused_with_what_to_do() {
    let model = tiny();
    let model = ["--model", model.to_str().expect("UTF-8")];
    let with = |arguments: &[&str]| refusal(&[&arguments[..1], &model, &arguments[1..]].concat());
    assert!(with(&["rollout", "--workload", "W9"]).contains("W1, W2, W3, W4, smoke"));
    assert!(with(&["rollout", "--workload", "W4"]).contains("context is 256"));
    assert!(with(&["rollout", "--workload", "W1", "--prompts", "2"]).contains("cannot be used"));
    assert!(with(&["rollout", "--runs", "0"]).contains("at least 1"));
    assert!(with(&["rollout", "--set", "engine.nonsense=1"]).contains("engine.nonsense"));
    assert!(with(&["step", "--samples", "1"]).contains("at least 2"));
    assert!(with(&["products"]).contains("on a CUDA device only"));
    assert!(refusal(&["plot", "Cargo.toml", "--out", "x.png"]).contains("holds no results"));
}

#[test]
fn training_and_updates_are_measured() {
    let sizes = ["--prompts", "2", "--samples", "2", "--prompt-tokens", "5", "--new-tokens", "6"];
    let report_of = report("train", &tiny(), &[&sizes[..], &["--no-sharing"]].concat());
    let first = &report_of["lines"][0];
    assert_eq!((&first["name"], &first["unit"]), (&"shared prompts".into(), &"s".into()));
    // 2 x (5 + 2 x 5) rows shared, 4 x (5 + 5) not: by the rows' rates.
    let lines_of = lines(&report_of);
    let rows = |seconds: usize| lines_of[seconds].2 * lines_of[seconds + 1].2;
    assert!((rows(0) - 30.0).abs() < 1e-6 && (rows(3) - 40.0).abs() < 1e-6, "{lines_of:?}");

    let report = report("update", &tiny(), &["--samples", "3"]);
    let lines = lines(&report);
    let of = |name: &str| lines.iter().find(|line| line.0 == name).expect(name).2;
    assert_eq!(of("written beyond the optimizer's"), 0.0);
    assert!(of("longest gap during the update") >= of("optimizer, under load"), "{lines:?}");
    let note = report["notes"][0].as_str().expect("a note");
    assert!(note.contains("29 of the 29 tensors"), "{note}");
}

#[test]
fn a_whole_step_of_the_real_model() {
    let sizes = ["--prompts", "2", "--samples", "2", "--new-tokens", "4"];
    let report = report("step", &common::smollm2(), &sizes);
    let lines = lines(&report);
    let names: Vec<&str> = lines.iter().map(|(name, ..)| *name).collect();
    let phases = ["rollout", "reward", "train", "update", "probe", "other", "whole step"];
    assert_eq!(names[..7], phases);
    let sum: f64 = lines[..6].iter().map(|line| line.2).sum();
    assert!((sum - lines[6].2).abs() < 1e-6 * sum, "{lines:?}");
    assert!(
        (report["model"]["gflop_per_token"].as_f64().expect("a number") - 0.26896).abs() < 1e-5
    );
}
