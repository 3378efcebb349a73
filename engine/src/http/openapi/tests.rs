use super::*;
use crate::{
    chat::{ChatTokenizer, TokenizerFiles, ToolFormat},
    http::{
        self, Limits,
        access::Access,
        body::{Fields, JsonBytes, asked},
        error::ApiError,
    },
};
use axum::{body::Body, http::Request as HttpRequest};
use metrics_exporter_prometheus::PrometheusBuilder;
use onpolicy_plugin_api::{Engine, EngineError, ModelInfo, Request, RequestId, Sink};
use std::{collections::BTreeSet, sync::Arc};
use tower::ServiceExt;

/// An engine that serves nothing.
struct Idle;

impl Engine for Idle {
    fn info(&self) -> ModelInfo {
        ModelInfo {
            name: "idle".into(),
            max_model_len: 64,
            vocab_size: 160,
            eos_token_ids: vec![2],
            max_samples: 8,
        }
    }

    fn submit(&self, _: Request, _: Box<dyn Sink>) -> Result<RequestId, EngineError> {
        Err(EngineError::Stopped)
    }

    fn abort(&self, _: RequestId, _: Option<usize>) {}

    fn weight_version(&self) -> u64 {
        0
    }
}

fn state() -> AppState {
    let files = TokenizerFiles {
        tokenizer: include_str!("../../../../tests/golden/tiny/llama-tied/tokenizer.json"),
        chat_template: Some("{% for m in messages %}{{ m.content }} {% endfor %}"),
        ..Default::default()
    };
    let tokenizer = ChatTokenizer::from_files(&files).expect("a golden tokenizer");
    let metrics = PrometheusBuilder::new().build_recorder().handle();
    let access = Access { control: true, ..Access::default() };
    AppState::new(Arc::new(Idle), tokenizer, Limits::default(), metrics)
        .with_access(access, http::control::Settings::default())
        .with_tool_format(ToolFormat::Hermes)
}

type Parse = fn(Fields, &AppState) -> Result<(), ApiError>;

/// Each schema, its parser, and bodies that let the parser ask for everything.
const ROUTES: [(&str, Parse, &[&str]); 8] = [
    (
        "CompletionRequest",
        completions::parse,
        &[
            r#"{"prompt": "t5", "stream": true, "stream_options": {}}"#,
            r#"{"prompt": "t5", "structured_outputs": {"regex": "a"}}"#,
            JSON_SCHEMA,
        ],
    ),
    (
        "ChatCompletionRequest",
        chat_completions::parse,
        &[
            r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "t5"}]}],
                "stream": true, "stream_options": {}, "structured_outputs": {"regex": "a"}}"#,
            r#"{"messages": [{"role": "tool", "content": "t5"}], "response_format":
                {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}}"#,
            r#"{"messages": [{"role": "assistant", "content": "t5",
                    "tool_calls": [{"function": {"name": "f"}}]}],
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": {"type": "function", "function": {"name": "f"}}}"#,
        ],
    ),
    (
        "TokenizeRequest",
        |fields, state| tokens::ids_of(fields, state).map(|_| ()),
        &[
            r#"{"prompt": "t5"}"#,
            r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "t5"}]}],
                "tools": [{"type": "function", "function": {"name": "f"}}]}"#,
            SPOKEN_CALL,
            r#"{"messages": [{"role": "tool", "content": "t5"}]}"#,
        ],
    ),
    (
        "DetokenizeRequest",
        |fields, state| tokens::text_of(fields, state).map(|_| ()),
        &[r#"{"tokens": [5]}"#],
    ),
    (
        "TokensRequest",
        generate::vllm::parse,
        &[r#"{"token_ids": [5], "stream": true, "stream_options": {},
            "sampling_params": {"structured_outputs": {"regex": "a"}}}"#],
    ),
    (
        "SglangRequest",
        generate::sglang::parse,
        &[r#"{"text": "t5", "rid": "a"}"#, r#"{"input_ids": [5], "extra_key": "a"}"#],
    ),
    (
        "TrlPromptsRequest",
        generate::trl::parse_prompts,
        &[r#"{"prompts": ["t5"], "generation_kwargs": {"structured_outputs": {"regex": "a"}}}"#],
    ),
    (
        "TrlChatsRequest",
        generate::trl::parse_chats,
        &[
            r#"{"messages": [[{"role": "user", "content": [{"type": "text", "text": "t5"}]}]],
                "generation_kwargs": {"structured_outputs": {"regex": "a"}}}"#,
            r#"{"messages": [[{"role": "tool", "content": "t5"}]]}"#,
            r#"{"messages": [[{"role": "assistant", "content": "t5",
                "tool_calls": [{"function": {"name": "f"}}]}]]}"#,
        ],
    ),
];

const JSON_SCHEMA: &str = r#"{"prompt": "t5", "response_format":
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}}"#;

const SPOKEN_CALL: &str = r#"{"messages": [{"role": "assistant", "content": "t5",
    "tool_calls": [{"function": {"name": "f"}}]}]}"#;

/// The properties of a schema, those of objects within as the parser names them.
fn properties(document: &Value, schema: &Value, path: &str, into: &mut BTreeSet<String>) {
    let target = schema["$ref"].as_str().and_then(|path| path.strip_prefix('#'));
    let schema = target.map_or(schema, |path| document.pointer(path).expect("a reference"));
    for all in ["anyOf", "oneOf"] {
        for one in schema[all].as_array().into_iter().flatten() {
            properties(document, one, path, into);
        }
    }
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let dot = if path.is_empty() { "" } else { "." };
        let path = format!("{path}{dot}{name}");
        properties(document, property, &path, into);
        into.insert(path);
    }
    if !schema["items"].is_null() {
        // TRL sends lists of conversations; errors name places in a conversation.
        let path = if path.ends_with(']') { path.to_string() } else { format!("{path}[0]") };
        properties(document, &schema["items"], &path, into);
    }
}

#[test]
fn bodies_hold_exactly_what_the_parsers_ask_for() {
    let state = state();
    let document = document(&state);
    for (name, parse, bodies) in ROUTES {
        asked::names();
        for body in bodies {
            let fields = JsonBytes::of(body).fields().expect("JSON");
            parse(fields, &state).unwrap_or_else(|error| panic!("{name} {body}: {error:?}"));
        }
        let mut described = BTreeSet::new();
        let schema = &document["components"]["schemas"][name];
        properties(&document, schema, "", &mut described);
        let asked = asked::names();
        let missing: Vec<_> = asked.difference(&described).collect();
        assert!(missing.is_empty(), "{name}: taken but not described: {missing:?}");
        let extra: Vec<_> = described.difference(&asked).collect();
        assert!(extra.is_empty(), "{name}: described but not taken: {extra:?}");
    }
}

/// Bodies that let a command ask for everything; the others do so in any case.
fn asking(path: &str) -> &'static str {
    match path {
        "/weight_checker" => r#"{"action": "compare", "baseline": {}}"#,
        _ => "{}",
    }
}

#[tokio::test]
async fn commands_take_exactly_the_arguments_that_are_described() {
    let app = http::app(state());
    let document = document(&state());
    for (method, path, mut names) in requests::control::tests::names() {
        names.sort_unstable();
        asked::names();
        let body = if method == "get" { "" } else { asking(path) };
        let request = HttpRequest::builder().method(method.to_uppercase().as_str()).uri(path);
        let request = request.body(Body::from(body)).expect("a request");
        let status = app.clone().oneshot(request).await.expect("an answer").status().as_u16();
        assert!(![404, 405].contains(&status), "{method} {path}: {status}");
        let asked: Vec<String> = asked::names().into_iter().collect();
        assert_eq!(asked, names, "{path}");
        let operation = &document["paths"][path][method];
        let described = |status: u16| !operation["responses"][status.to_string()].is_null();
        assert!(described(status), "{path} answers {status}");

        let unknown = HttpRequest::builder().method(method.to_uppercase().as_str());
        let unknown = unknown.uri(format!("{path}?no_such_argument=1"));
        let unknown = unknown.body(Body::from(body)).expect("a request");
        let refused = app.clone().oneshot(unknown).await.expect("an answer").status();
        assert_eq!(refused, 400, "{path}");
    }
}

#[tokio::test]
async fn what_is_not_built_in_says_so() {
    let app = http::app(state());
    let document = document(&state());
    for path in transfer::paths() {
        let request = HttpRequest::post(path).body(Body::empty()).expect("a request");
        let answer = app.clone().oneshot(request).await.expect("an answer");
        assert_eq!(answer.status(), 501, "{path}");
        assert!(!document["paths"][path]["post"]["responses"]["501"].is_null(), "{path}");
    }
}

#[test]
fn every_reference_leads_somewhere() {
    fn walk(document: &Value, value: &Value) {
        if let Some(path) = value["$ref"].as_str() {
            let found = path.strip_prefix('#').and_then(|path| document.pointer(path));
            assert!(found.is_some(), "{path}");
        }
        match value {
            Value::Array(list) => list.iter().for_each(|item| walk(document, item)),
            Value::Object(map) => map.values().for_each(|item| walk(document, item)),
            _ => {}
        }
    }
    let document = document(&state());
    assert_eq!(document["openapi"], "3.1.0");
    walk(&document, &document);
}

#[test]
fn limits_are_those_of_the_model() {
    let document = document(&state());
    let schemas = &document["components"]["schemas"];
    let completion = &schemas["CompletionRequest"]["properties"];
    assert_eq!(completion["n"]["maximum"], 8);
    assert_eq!(completion["max_tokens"]["maximum"], 63);
    assert_eq!(completion["stop_token_ids"]["items"]["maximum"], 159);
    assert_eq!(schemas["CompletionRequest"]["additionalProperties"], false);
    assert_eq!(schemas["CompletionRequest"]["required"], json!(["prompt"]));
}
