//! The command as a child process, shared by the tests.
#![allow(dead_code)] // each test binary uses its part

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// How long a client may take.
const CLIENT_LIMIT: Duration = Duration::from_secs(300);

/// The folder that scripts/setup fills.
pub fn cache() -> PathBuf {
    std::env::var("ONPOLICY_CACHE").map(PathBuf::from).unwrap_or_else(|_| {
        Path::new(&std::env::var("HOME").expect("HOME is set")).join(".cache/onpolicy")
    })
}

/// The real model; `scripts/setup` fetches it.
pub fn smollm2() -> PathBuf {
    let path = cache().join("models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: run scripts/setup", path.display());
    path
}

/// A server in a process of its own; killed when dropped.
pub struct Served {
    child: Child,
    /// Where it listens.
    pub url: String,
    _stdout: BufReader<ChildStdout>,
}

/// Starts `onpolicy serve` on a free port and waits until it listens.
pub fn serve(model: &Path, arguments: &[&str]) -> Served {
    serve_in(model, arguments, &[])
}

/// As [`serve`], with these variables in its environment.
pub fn serve_in(model: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Served {
    let mut child = Command::new(env!("CARGO_BIN_EXE_onpolicy"))
        .args(["serve", "--port", "0", "--model"])
        .arg(model)
        .args(arguments)
        .envs(environment.iter().copied())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the command starts");
    let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut line = String::new();
    stdout.read_line(&mut line).expect("a line");
    let url = line.split_whitespace().find(|word| word.starts_with("http://"));
    let url = url.unwrap_or_else(|| panic!("no address in {line:?}"));
    Served { child, url: url.trim_end_matches("/v1").to_string(), _stdout: stdout }
}

impl Served {
    /// Number of the process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The exit code, once the process has ended; none if it does not within `limit`.
    pub fn ended_within(&mut self, limit: std::time::Duration) -> Option<i32> {
        let deadline = std::time::Instant::now() + limit;
        while std::time::Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().expect("a status") {
                return status.code();
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        None
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a script of tests/python in the environment `venv` of the cache; it must end well, in time.
pub fn run_client(venv: &str, script: &str, arguments: &[&str]) {
    let python = cache().join(venv).join("bin/python");
    assert!(python.exists(), "{} is missing: run scripts/test", python.display());
    let mut client = Command::new(python)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python").join(script))
        .args(arguments)
        .stdin(Stdio::null())
        .spawn()
        .expect("Python starts");
    let started = Instant::now();
    loop {
        if let Some(status) = client.try_wait().expect("a status") {
            assert!(status.success(), "{script} failed: {status}");
            return;
        }
        if started.elapsed() > CLIENT_LIMIT {
            let _ = client.kill();
            let _ = client.wait();
            panic!("{script} did not end in time");
        }
        thread::sleep(Duration::from_millis(50));
    }
}
