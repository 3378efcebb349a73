//! The command as a child process, shared by the tests.
#![allow(dead_code)] // each test binary uses its part

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
};

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
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
