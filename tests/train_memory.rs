//! A training step of the real model takes the memory that was planned, within a tenth.

mod common;

use std::{path::Path, process::Command};

/// The number before ` MiB {what}` in the line that starts with `memory:`.
fn mib(text: &str, what: &str) -> f64 {
    let line = text.lines().find(|line| line.starts_with("memory:"));
    let line = line.unwrap_or_else(|| panic!("no line about memory in {text}"));
    let before = line.split(&format!(" MiB {what}")).next().expect("a first part");
    let number = before.rsplit(' ').next().expect("a last word");
    number.parse().unwrap_or_else(|_| panic!("no number before 'MiB {what}' in {line}"))
}

#[test]
#[cfg(target_os = "linux")]
fn the_peak_is_within_a_tenth_of_the_plan() {
    let dir = tempfile::tempdir().expect("a folder");
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let run = Command::new(env!("CARGO_BIN_EXE_onpolicy"))
        .args(["train", "--config"])
        .arg(examples.join("quickstart.toml"))
        .arg("--model")
        .arg(common::smollm2())
        .args(["--set", "train.steps=1", "--set", "rollout.max_new_tokens=64"])
        .args(["--set", "server.enabled=false", "--set"])
        .arg(format!("output.dir={}", dir.path().join("run").display()))
        .output()
        .expect("the command runs");
    let text = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{text}{}", String::from_utf8_lossy(&run.stderr));
    let (peak, planned) = (mib(&text, "at the most"), mib(&text, "planned"));
    println!("{peak} MiB at the most, {planned} planned");
    assert!((peak / planned - 1.0).abs() < 0.1, "{peak} MiB at the most, {planned} planned");
}
