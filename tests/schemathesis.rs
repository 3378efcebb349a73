//! schemathesis against the command: whatever is sent, the answer is what /openapi.json says, and
//! nothing is left behind.

mod common;

use std::{
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Requests of each route in each phase of the fuzzing.
const EXAMPLES: &str = "60";
/// Bounds the fuzzing, in seconds.
const TIME: u64 = 540;

const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,\
    response_headers_conformance,response_schema_conformance,negative_data_rejection,\
    unsupported_method,allow_header_conformance,refusals_are_about_rules_between_fields,\
    errors_have_one_shape";

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn fuzz(url: &str, scratch: &Path) {
    let program = common::cache().join("venv/bin/schemathesis");
    assert!(program.exists(), "{} is missing: run scripts/test", program.display());
    let mut fuzzer = Command::new(program)
        .current_dir(scratch)
        .env("PYTHONPATH", repository().join("tests/python"))
        .env("SCHEMATHESIS_HOOKS", "schemathesis_checks")
        .args(["run", &format!("{url}/openapi.json"), "--no-color", "--checks", CHECKS])
        // Commands pause and empty the engine under the other requests.
        .args(["--exclude-tag", "control"])
        .args(["--seed", "7", "--max-examples", EXAMPLES, "--workers", "2"])
        .args(["--phases", "examples,coverage,fuzzing", "--generation-database", "none"])
        .args(["--request-timeout", "30", "--no-shrink", "--suppress-health-check", "all"])
        .stdin(Stdio::null())
        .spawn()
        .expect("schemathesis starts");
    let started = Instant::now();
    loop {
        if let Some(status) = fuzzer.try_wait().expect("a status") {
            assert!(status.success(), "schemathesis found failures: {status}");
            return;
        }
        if started.elapsed() > Duration::from_secs(TIME) {
            let _ = fuzzer.kill();
            panic!("schemathesis did not end in time");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

async fn value(url: &str, name: &str) -> f64 {
    let answer = reqwest::get(format!("{url}/metrics")).await.expect("an answer");
    let metrics = answer.text().await.expect("text");
    let line = metrics.lines().find(|line| line.split([' ', '{']).next() == Some(name));
    let line = line.unwrap_or_else(|| panic!("no {name} in\n{metrics}"));
    line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
}

#[test]
fn answers_are_what_the_description_says() {
    let scratch = tempfile::tempdir().expect("a folder");
    let model = repository().join("tests/golden/tiny/llama-tied");
    let server = common::serve(&model, &["--set", "engine.kv_memory_mb=16"]);
    fuzz(&server.url, scratch.path());
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        // What the last requests left is cleared away within a moment.
        let deadline = Instant::now() + Duration::from_secs(10);
        let leaked = |name| value(&server.url, name);
        for name in [
            "onpolicy_kv_blocks_used",
            "onpolicy_samples_running",
            "onpolicy_requests_waiting",
            "onpolicy_http_generations_in_flight",
        ] {
            while leaked(name).await > 0.0 {
                assert!(Instant::now() < deadline, "{name} is {}", leaked(name).await);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        assert!(value(&server.url, "onpolicy_requests_total").await > 100.0, "it got through");
    });
}
