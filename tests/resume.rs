//! A run that is killed with SIGKILL in the middle of a step goes on exactly: the metrics of the
//! steps after it equal those of a run that nobody disturbed.

use serde_json::Value;
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

const STEPS: u64 = 6;
const LIMIT: Duration = Duration::from_secs(120);

/// An external verifier on a port of its own. The reward depends on the text alone.
fn verifier() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(|| answer(stream));
        }
    });
    url
}

fn answer(mut stream: TcpStream) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let lower = line.to_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let body: Value = serde_json::from_slice(&body).ok()?;
    let reward = |sample: &Value| {
        let text = sample["completion"].as_str().unwrap_or_default();
        f64::from(text.bytes().map(u32::from).sum::<u32>() % 3 == 0)
    };
    let rewards: Vec<f64> = body["samples"].as_array()?.iter().map(reward).collect();
    let text = serde_json::json!({ "rewards": rewards }).to_string();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n{text}",
        text.len()
    )
    .ok()
}

fn train(dir: &Path, verifier: &str, resume: bool) -> Child {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny/llama-tied");
    let mut command = Command::new(env!("CARGO_BIN_EXE_onpolicy"));
    command.arg("train").arg("--model").arg(model).arg("--output").arg(dir);
    command.args(["--steps", &STEPS.to_string(), "--seed", "7", "--set", "server.enabled=false"]);
    for set in [
        "engine.kv_memory_mb=16",
        "engine.max_num_seqs=64",
        "train.lr=1e-3",
        "output.checkpoint_every=1",
        "output.sample_prompts=0",
        "verifier.name=http",
        "gate.mu=1.0",
    ] {
        command.args(["--set", set]);
    }
    command.args(["--set", &format!("verifier.url={verifier}")]);
    if resume {
        command.arg("--resume");
    }
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the command starts")
}

fn finish(mut child: Child) {
    let started = Instant::now();
    let mut stderr = child.stderr.take().expect("a pipe");
    let reader = thread::spawn(move || {
        let mut text = String::new();
        let _ = stderr.read_to_string(&mut text);
        text
    });
    loop {
        if let Some(status) = child.try_wait().expect("a status") {
            let text = reader.join().expect("the reader");
            assert!(status.success(), "{status}: {text}");
            return;
        }
        if started.elapsed() > LIMIT {
            let _ = child.kill();
            panic!("the run did not end in time: {}", reader.join().expect("the reader"));
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The metrics that do not depend on the clock.
fn metrics(dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap_or_default();
    let lines = text.lines().map(|line| {
        let mut step: Value = serde_json::from_str(line).expect("a whole line of JSON");
        for clock in ["seconds", "elapsed_seconds", "tokens_per_second", "peak_memory_mb"] {
            step.as_object_mut().expect("an object").remove(clock).expect(clock);
        }
        step
    });
    lines.collect()
}

#[test]
fn a_killed_run_resumes_exactly() {
    let (calm, killed) =
        (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let verifier = verifier();
    finish(train(calm.path(), &verifier, false));

    let mut child = train(killed.path(), &verifier, false);
    let started = Instant::now();
    while metrics(killed.path()).len() < 3 {
        assert!(started.elapsed() < LIMIT, "the run takes too long");
        assert!(child.try_wait().expect("a status").is_none(), "the run ended by itself");
        thread::sleep(Duration::from_millis(1));
    }
    child.kill().expect("SIGKILL");
    child.wait().expect("a status");
    let done = metrics(killed.path()).len() as u64;
    assert!(done < STEPS, "it was killed too late to show anything");
    finish(train(killed.path(), &verifier, true));

    let (calm, killed) = (metrics(calm.path()), metrics(killed.path()));
    assert_eq!(calm.len() as u64, STEPS);
    let trained = calm.iter().filter(|step| step["groups_mixed"].as_u64() > Some(0)).count();
    assert!(trained >= 4, "the run has to learn something, or the test shows nothing");
    assert_eq!(calm, killed);
}
