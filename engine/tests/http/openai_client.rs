//! The openai package of Python, unmodified, against the server.

use crate::scripted::Script;
use crate::server::Server;
use crate::tokenizer::bytes;
use std::time::Duration;

/// `ONPOLICY_OPENAI_PYTHON` is a Python interpreter that has the package.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ONPOLICY_OPENAI_PYTHON, a Python interpreter with the openai package"]
async fn the_openai_client_is_content() {
    let python = std::env::var("ONPOLICY_OPENAI_PYTHON").expect("ONPOLICY_OPENAI_PYTHON");
    let server = Server::start(Script::saying(|_, _| bytes("caffè — 12 ünïcode 😀 words"))).await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/openai_client.py");
    let url = server.url.clone();
    let run = tokio::task::spawn_blocking(move || {
        std::process::Command::new(python).arg(script).arg(url).output()
    });
    let output = tokio::time::timeout(Duration::from_secs(120), run).await;
    let output = output.expect("in time").unwrap().expect("python runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.trim_end().ends_with("all checks passed"), "{text}");
}
