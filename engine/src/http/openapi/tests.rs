use super::*;
use crate::{
    chat::{ChatTokenizer, TokenizerFiles},
    http::{
        Limits,
        body::{Fields, JsonBytes, asked},
        error::ApiError,
    },
};
use metrics_exporter_prometheus::PrometheusBuilder;
use onpolicy_plugin_api::{Engine, EngineError, ModelInfo, Request, RequestId, Sink};
use std::{collections::BTreeSet, sync::Arc};

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
    AppState::new(Arc::new(Idle), tokenizer, Limits::default(), metrics)
}

type Parse = fn(Fields, &AppState) -> Result<(), ApiError>;

/// Each schema, its parser, and bodies that let the parser ask for everything.
const ROUTES: [(&str, Parse, &[&str]); 4] = [
    (
        "CompletionRequest",
        completions::parse,
        &[r#"{"prompt": "t5", "stream": true, "stream_options": {}, "response_format": {}}"#],
    ),
    (
        "ChatCompletionRequest",
        chat_completions::parse,
        &[r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "t5"}]}],
            "stream": true, "stream_options": {}, "response_format": {}}"#],
    ),
    (
        "TokenizeRequest",
        |fields, state| tokens::ids_of(fields, state).map(|_| ()),
        &[
            r#"{"prompt": "t5"}"#,
            r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "t5"}]}]}"#,
        ],
    ),
    (
        "DetokenizeRequest",
        |fields, state| tokens::text_of(fields, state).map(|_| ()),
        &[r#"{"tokens": [5]}"#],
    ),
];

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
        properties(document, &schema["items"], &format!("{path}[0]"), into);
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
