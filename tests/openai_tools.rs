//! Tools and structured outputs through the openai package for Python, unmodified, against the
//! command serving the real model.

mod common;

#[test]
fn the_openai_package_calls_tools_and_gets_what_its_schemas_say() {
    let server = common::serve(&common::smollm2(), &[]);
    common::run_client("venv", "openai_tools.py", &[&server.url]);
}
