//! The openai package for Python, unmodified, against the command serving the real model.

mod common;

#[test]
fn the_openai_package_works_unmodified() {
    let server = common::serve(&common::smollm2(), &[]);
    common::run_client("venv", "openai_client.py", &[&server.url]);
}

#[test]
fn the_openai_package_calls_tools_and_gets_what_a_schema_allows() {
    let server = common::serve(&common::smollm2(), &[]);
    common::run_client("venv", "openai_tools.py", &[&server.url]);
}
