//! The openai package for Python, unmodified, against the command serving the real model.

mod common;

use std::{
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

#[test]
fn the_openai_package_works_unmodified() {
    run("openai_client.py");
}

#[test]
fn the_openai_package_calls_tools_and_gets_what_a_schema_allows() {
    run("openai_tools.py");
}

/// Runs a script of tests/python against a server of its own.
fn run(script: &str) {
    let python = common::cache().join("venv/bin/python");
    assert!(python.exists(), "{} is missing: run scripts/test", python.display());
    let server = common::serve(&common::smollm2(), &[]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python").join(script);
    let mut client = Command::new(python)
        .arg(script)
        .arg(&server.url)
        .stdin(Stdio::null())
        .spawn()
        .expect("Python starts");
    let started = Instant::now();
    loop {
        if let Some(status) = client.try_wait().expect("a status") {
            assert!(status.success(), "the client failed: {status}");
            return;
        }
        if started.elapsed() > Duration::from_secs(300) {
            let _ = client.kill();
            panic!("the client did not end in time");
        }
        thread::sleep(Duration::from_millis(50));
    }
}
