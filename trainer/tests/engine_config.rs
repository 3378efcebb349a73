//! Which engine a configuration names, and what is refused.

use onpolicy_trainer::config::{Config, EngineKind};

fn parse(text: &str, flags: &[&str]) -> Result<Config, String> {
    let flags: Vec<String> = flags.iter().map(ToString::to_string).collect();
    let text = format!("[model]\npath = \"m\"\n{text}");
    Config::parse(&text, &flags).map_err(|error| error.to_string())
}

fn kind(flags: &[&str]) -> EngineKind {
    parse("", flags).expect("a configuration").engine.kind()
}

fn refusal(flags: &[&str]) -> String {
    parse("", flags).expect_err("it is refused")
}

#[test]
fn kinds() {
    let urls = |urls: &[&str]| EngineKind::Remote(urls.iter().map(ToString::to_string).collect());
    assert_eq!(kind(&[]), EngineKind::Native);
    assert_eq!(kind(&["engine.kind=mistralrs"]), EngineKind::Mistralrs);
    assert_eq!(kind(&["engine.kind=mine"]), EngineKind::Plugin("mine".into()));
    assert_eq!(
        kind(&["engine.kind=http://a:1, http://b:2/v1"]),
        urls(&["http://a:1", "http://b:2/v1"])
    );
    let named = ["engine.kind=remote", "engine.urls=[\"https://a\"]", "engine.remote.retries=7"];
    assert_eq!(kind(&named), urls(&["https://a"]));
    let config = parse("", &named).unwrap();
    assert_eq!(config.engine.remote.retries, 7);
    assert_eq!(Config::parse(&config.to_toml(), &[]).expect("its own text"), config);
}

#[test]
fn a_flag_that_names_another_engine_drops_what_belonged_to_the_one_before() {
    let text = "[engine]\nkind = \"remote\"\nurls = [\"http://a:1\"]\ntransfer_dir = \"/t\"\n\
                [engine.remote]\nretries = 1\n";
    assert!(parse(text, &["engine.kind=native"]).is_ok());
    let same = parse(text, &["engine.kind=remote"]).expect("a configuration");
    assert_eq!(same.engine.remote.retries, 1);
}

#[test]
fn options_belong_to_the_engine_that_is_named_wherever_it_is_named() {
    let flags = ["engine.options.a=1", "engine.kind=mine", "verifier.b=2", "verifier.name=mine"];
    let config = parse("[verifier]\nname = \"exact\"\nc = 3\n", &flags).expect("a configuration");
    assert_eq!(config.engine.kind(), EngineKind::Plugin("mine".into()));
    assert_eq!(serde_json::Value::Object(config.engine.options).to_string(), r#"{"a":1}"#);
    assert_eq!(serde_json::Value::Object(config.verifier.options).to_string(), r#"{"b":2}"#);
}

#[test]
fn what_does_not_go_together_is_refused_by_name() {
    let remote = "engine.kind=http://a:1";
    let cases: [(&[&str], &str); 21] = [
        (&["engine.kind=remote"], "engine.urls = []: must name a server"),
        (&["engine.kind=http://a:1,http://a:1/v1"], "is named twice"),
        (&["engine.kind=ftp://a"], "must begin with http"),
        (&["engine.kind="], "engine.kind"),
        (&["engine.urls=[\"http://a\"]"], "engine.urls = [...]: has no effect"),
        (&[remote, "engine.urls=[\"http://a\"]"], "engine.urls = [...]: has no effect"),
        (&["engine.remote.retries=1"], "engine.remote = ...: has no effect"),
        (&[remote, "engine.remote.retries=5000"], "engine.remote.retries: must be at most"),
        (&[remote, "engine.remote.retry=5"], "engine.remote"),
        (&[remote, "engine.serve_dtype=f16"], "engine.serve_dtype"),
        (&[remote, "engine.kv_memory_mb=16"], "setting of the server's own"),
        (&[remote, "engine.on_update=drain"], "see engine.remote.pause"),
        (&["engine.kind=mine", "engine.profile=true"], "engine.profile"),
        (&[remote, "engine.enforce_eager=true"], "engine.enforce_eager"),
        (&[remote, "engine.num_speculative_tokens=3"], "engine.num_speculative_tokens"),
        (&["model.dtype=bf16", "engine.num_speculative_tokens=3"], "needs f32 on the CPU"),
        (&["engine.async_scheduling=true"], "has no effect for f32 on the CPU"),
        (&[remote, "engine.async_scheduling=false"], "engine.async_scheduling"),
        (&["engine.num_speculative_tokens=16"], "must be between 0 and 15"),
        (&["engine.options.a=1"], "engine.options = ...: has no effect"),
        (&["engine.transfer_dir=/t"], "engine.transfer_dir"),
    ];
    for (flags, expected) in cases {
        let text = refusal(flags);
        assert!(text.contains(expected), "{flags:?}: {text}");
    }
}
