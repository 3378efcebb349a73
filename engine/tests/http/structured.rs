//! What the text must be: the fields that say so, and what the engine is told.

use crate::scripted::Script;
use crate::server::{Server, within};
use crate::tokenizer::bytes;
use crate::{CHAT, COMPLETIONS};
use onpolicy_plugin_api::{EngineError, Grammar};
use serde_json::{Value, json};

/// A body of each route with these fields.
fn bodies(fields: &Value) -> [(&'static str, Value); 2] {
    let with = |mut body: Value| {
        for (name, value) in fields.as_object().unwrap() {
            body[name] = value.clone();
        }
        body
    };
    [
        (COMPLETIONS, with(json!({"prompt": "a"}))),
        (CHAT, with(json!({"messages": [{"role": "user", "content": "a"}]}))),
    ]
}

#[tokio::test]
async fn fields_become_grammars_on_both_routes() {
    within(async {
        let server = Server::start(Script::saying(|_, _| bytes("x"))).await;
        let schema = json!({"type": "object", "properties": {"b": {}, "a": {}}});
        let wrapped = json!({"name": "s", "strict": true, "schema": schema});
        let texts = vec!["a".to_string(), "b".to_string()];
        let tight = json!({"type": "object", "x-guidance": {"whitespace_flexible": false}});
        let cases = [
            (json!({}), None),
            (json!({"response_format": {"type": "text"}}), None),
            (json!({"response_format": {"type": "json_object"}}), Some(Grammar::JsonObject)),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": wrapped}}),
                Some(Grammar::JsonSchema(schema.clone())),
            ),
            (
                json!({"structured_outputs": {"json": schema}}),
                Some(Grammar::JsonSchema(schema.clone())),
            ),
            (
                json!({"structured_outputs": {"json": schema.to_string()}}),
                Some(Grammar::JsonSchema(schema.clone())),
            ),
            (
                json!({"structured_outputs": {"json_object": true, "disable_any_whitespace": true}}),
                Some(Grammar::JsonSchema(tight)),
            ),
            (json!({"structured_outputs": {"regex": "a+"}}), Some(Grammar::Regex("a+".into()))),
            (
                json!({"structured_outputs": {"choice": texts}, "response_format": {"type": "text"}}),
                Some(Grammar::Choice(texts.clone())),
            ),
            (
                json!({"structured_outputs": {"grammar": "start: \"a\""}}),
                Some(Grammar::Lark("start: \"a\"".into())),
            ),
            (json!({"guided_json": schema}), Some(Grammar::JsonSchema(schema.clone()))),
            (json!({"guided_regex": "a+"}), Some(Grammar::Regex("a+".into()))),
            (json!({"guided_choice": texts}), Some(Grammar::Choice(texts.clone()))),
            (json!({"guided_grammar": "x"}), Some(Grammar::Lark("x".into()))),
        ];
        for (fields, want) in cases {
            for (path, body) in bodies(&fields) {
                server.ok(path, body).await;
                let requests = server.seen.requests.lock().unwrap();
                assert_eq!(requests.last().unwrap().params.grammar, want, "{fields}");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn wrong_fields_are_refused_by_name() {
    within(async {
        let server = Server::start(Script::saying(|_, _| bytes("x"))).await;
        let wrapped = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": schema}});
        let cases = [
            (json!({"response_format": "json"}), "response_format"),
            (json!({"response_format": {}}), "response_format.type"),
            (json!({"response_format": {"type": "xml"}}), "response_format.type"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
            (json!({"response_format": {"type": "text", "odd": 1}}), "response_format.odd"),
            (wrapped(json!({"schema": {}})), "response_format.json_schema.name"),
            (wrapped(json!({"name": "a"})), "response_format.json_schema.schema"),
            (wrapped(json!({"name": "a", "schema": 5})), "response_format.json_schema.schema"),
            (wrapped(json!({"name": "a", "schema": {}, "x": 1})), "response_format.json_schema.x"),
            (json!({"structured_outputs": {}}), "structured_outputs"),
            (json!({"structured_outputs": {"json_object": false}}), "structured_outputs"),
            (json!({"structured_outputs": {"json": "{"}}), "structured_outputs.json"),
            (json!({"structured_outputs": {"choice": "a"}}), "structured_outputs.choice"),
            (json!({"structured_outputs": {"regex": 1}}), "structured_outputs.regex"),
            (
                json!({"structured_outputs": {"regex": "a", "structural_tag": "x"}}),
                "structured_outputs.structural_tag",
            ),
            (
                json!({"structured_outputs": {"regex": "a", "disable_any_whitespace": true}}),
                "structured_outputs.disable_any_whitespace",
            ),
            (
                json!({"structured_outputs": {"regex": "a", "choice": ["b"]}}),
                "structured_outputs.choice",
            ),
            (
                json!({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}),
                "structured_outputs.regex",
            ),
            (json!({"guided_json": {}, "guided_regex": "a"}), "guided_regex"),
            (
                json!({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}),
                "guided_choice",
            ),
        ];
        for (fields, param) in cases {
            for (path, body) in bodies(&fields) {
                let (named, message) = server.refused(path, body).await;
                assert_eq!(named, param, "{path} {fields}: {message}");
            }
        }
        assert!(server.seen.requests.lock().unwrap().is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_grammar_that_the_engine_refuses_is_named_as_it_was_sent() {
    within(async {
        let mut script = Script { context: 4096, ..Script::saying(|_, _| bytes("x")) };
        script.refuses = Some((0, EngineError::invalid("grammar", "is odd: very")));
        let server = Server::start(script).await;
        let tool = json!([{"type": "function", "function": {"name": "f"}}]);
        let cases = [
            (json!({"response_format": {"type": "json_object"}}), "response_format"),
            (json!({"structured_outputs": {"regex": "a"}}), "structured_outputs.regex"),
            (json!({"guided_grammar": "a"}), "guided_grammar"),
        ];
        for (fields, param) in cases {
            for (path, body) in bodies(&fields) {
                let refusal = server.refused(path, body).await;
                assert_eq!(refusal, (param.to_string(), format!("{param}: is odd: very")));
            }
        }
        let [_, (path, body)] = bodies(&json!({"tools": tool, "tool_choice": "required"}));
        assert_eq!(server.refused(path, body).await.0, "tools");
    })
    .await;
}
