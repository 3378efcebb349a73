//! Tools in chat: what is offered, which call is asked for, and calls in the answer.

use crate::CHAT;
use crate::scripted::Script;
use crate::server::{Server, within};
use crate::tokenizer::{EOS, bytes, tokenizer};
use onpolicy_engine::chat::ToolFormat;
use onpolicy_plugin_api::Grammar;
use serde_json::{Value, json};

const CALLS: &str = "Sure.\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": \"é\"}}\n\
                     </tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/number"}, "b": {"type": "string"}},
            "required": ["a"],
            "$defs": {"number": {"type": "integer"}},
        }}},
        {"type": "function", "function": {"name": "now"}},
    ])
}

fn body(fields: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "hi"}], "tools": tools()});
    for (name, value) in fields.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

/// Says the text; has room for tools in its prompt.
fn script(text: &'static str) -> Script {
    Script { context: 4096, ..Script::saying(move |_, _| bytes(text)) }
}

async fn saying(text: &'static str) -> Server {
    Server::start(script(text)).await
}

/// Name and arguments of each call.
fn calls(message: &Value) -> Vec<(String, String)> {
    let calls = message["tool_calls"].as_array().map(Vec::as_slice).unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap().to_string();
    let call = |call: &Value| {
        assert_eq!(call["type"], "function");
        assert!(call["id"].as_str().unwrap().len() > 20, "{call}");
        (text(&call["function"]["name"]), text(&call["function"]["arguments"]))
    };
    calls.iter().map(call).collect()
}

fn both() -> Vec<(String, String)> {
    vec![("add".into(), "{\"a\": 1, \"b\": \"é\"}".into()), ("now".into(), "{}".into())]
}

fn last_prompt(server: &Server) -> String {
    let requests = server.seen.requests.lock().unwrap();
    tokenizer().decode(&requests.last().unwrap().prompt, false).unwrap()
}

fn last_grammar(server: &Server) -> Option<Grammar> {
    server.seen.requests.lock().unwrap().last().unwrap().params.grammar.clone()
}

#[tokio::test]
async fn calls_are_found_in_a_whole_answer() {
    within(async {
        let server = saying(CALLS).await;
        let answer = server.ok(CHAT, body(json!({"n": 2}))).await;
        for choice in answer["choices"].as_array().unwrap() {
            assert_eq!(choice["finish_reason"], "tool_calls");
            assert_eq!(choice["message"]["content"], "Sure.");
            assert_eq!(calls(&choice["message"]), both());
        }
        assert_eq!(last_grammar(&server), None);
        let one = server.ok(CHAT, body(json!({"parallel_tool_calls": false}))).await;
        assert_eq!(calls(&one["choices"][0]["message"]), both()[..1]);
        // Without a choice of calls, text is text.
        let none = server.ok(CHAT, body(json!({"tool_choice": "none"}))).await;
        assert_eq!(none["choices"][0]["message"]["content"], CALLS);
        assert_eq!(none["choices"][0]["message"].get("tool_calls"), None);
        assert_eq!(none["choices"][0]["finish_reason"], "stop");
        let cut = server.ok(CHAT, body(json!({"max_tokens": CALLS.len() - 40}))).await;
        assert_eq!(cut["choices"][0]["finish_reason"], "length");
    })
    .await;
}

#[tokio::test]
async fn an_answer_of_calls_alone_has_no_content() {
    within(async {
        let server = saying("<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>").await;
        let answer = server.ok(CHAT, body(json!({}))).await;
        let message = &answer["choices"][0]["message"];
        assert_eq!(message["content"], Value::Null);
        assert!(message.as_object().unwrap().contains_key("content"));
        assert_eq!(calls(message), [("now".to_string(), "{}".to_string())]);
        let plain = saying("no call").await.ok(CHAT, body(json!({}))).await;
        assert_eq!(plain["choices"][0]["message"]["content"], "no call");
        assert_eq!(plain["choices"][0]["finish_reason"], "stop");
    })
    .await;
}

#[tokio::test]
async fn calls_are_streamed() {
    within(async {
        let server = saying(CALLS).await;
        let fields = json!({"stream_options": {"include_usage": true}, "return_token_ids": true});
        let (chunks, done) = server.stream(CHAT, body(fields)).await;
        assert!(done);
        let (mut content, mut found) = (String::new(), Vec::<Value>::new());
        let (mut ids, mut ends) = (Vec::new(), Vec::new());
        for choice in chunks.iter().filter_map(|chunk| chunk["choices"].get(0)) {
            content.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
            assert!(!content.contains('<'), "{content}");
            for delta in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
                let index = delta["index"].as_u64().unwrap() as usize;
                let arguments = delta["function"]["arguments"].as_str().unwrap();
                match found.get_mut(index) {
                    None => {
                        assert_eq!(arguments, "");
                        found.push(delta.clone());
                    }
                    Some(call) => {
                        assert_eq!(delta.get("id"), None);
                        let so_far = call["function"]["arguments"].as_str().unwrap();
                        call["function"]["arguments"] = format!("{so_far}{arguments}").into();
                    }
                }
            }
            let tokens = choice["token_ids"].as_array().into_iter().flatten();
            ids.extend(tokens.map(|id| id.as_u64().unwrap() as u32));
            ends.extend(choice["finish_reason"].as_str().map(str::to_string));
        }
        assert_eq!(content, "Sure.");
        assert_eq!(calls(&json!({"tool_calls": found})), both());
        assert_eq!(ids, [bytes(CALLS), vec![EOS]].concat());
        assert_eq!(ends, ["tool_calls"]);
    })
    .await;
}

#[tokio::test]
async fn a_call_that_is_asked_for_is_forced() {
    within(async {
        let server = saying(CALLS).await;
        let lark = |grammar: Option<Grammar>| match grammar {
            Some(Grammar::Lark(text)) => text,
            other => panic!("{other:?}"),
        };
        let required = server.ok(CHAT, body(json!({"tool_choice": "required"}))).await;
        assert_eq!(required["choices"][0]["finish_reason"], "tool_calls");
        let text = lark(last_grammar(&server));
        assert!(text.starts_with("start: call (\"\\n\" call)*\n"), "{text}");
        assert!(text.contains("body: body_0 | body_1\n"), "{text}");
        // Definitions stand where references look for them.
        let schema = text.lines().find_map(|line| line.strip_prefix("body_0: %json ")).unwrap();
        let schema: Value = serde_json::from_str(schema).unwrap();
        assert_eq!(schema["$defs"]["number"]["type"], "integer");
        assert_eq!(schema["properties"]["name"]["const"], "add");
        assert_eq!(schema["properties"]["arguments"]["required"], json!(["a"]));

        let named = json!({"tool_choice": {"type": "function", "function": {"name": "now"}}});
        let named = server.ok(CHAT, body(named)).await;
        // As OpenAI and vLLM have it.
        assert_eq!(named["choices"][0]["finish_reason"], "stop");
        assert_eq!(calls(&named["choices"][0]["message"]), both());
        let text = lark(last_grammar(&server));
        assert!(text.starts_with("start: call\n") && !text.contains("body_1"), "{text}");
        assert!(text.contains("\"now\"") && !text.contains("\"add\""), "{text}");
    })
    .await;
}

#[tokio::test]
async fn llama_calls_are_found() {
    within(async {
        let text = "{\"name\": \"add\", \"parameters\": {\"a\": 2}}; {\"name\": \"now\", \"parameters\": {}}";
        let server = Server::with_tool_format(script(text), ToolFormat::Llama3).await;
        let answer = server.ok(CHAT, body(json!({"tool_choice": "required"}))).await;
        let want = [("add".into(), "{\"a\": 2}".into()), ("now".into(), "{}".into())];
        assert_eq!(calls(&answer["choices"][0]["message"]), want);
        let Some(Grammar::Lark(grammar)) = last_grammar(&server) else { panic!("no grammar") };
        assert!(grammar.starts_with("start: call (\"; \" call)*\ncall: body\n"), "{grammar}");
        assert!(grammar.contains("\"parameters\"") && !grammar.contains("<tool_call>"));
    })
    .await;
}

#[tokio::test]
async fn the_model_is_shown_tools_calls_and_results() {
    within(async {
        let server = saying("3").await;
        let messages = json!([
            {"role": "user", "content": "1+2?"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 1}"}},
            ]},
            {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "3"}]},
        ]);
        server.ok(CHAT, body(json!({"messages": messages}))).await;
        let prompt = last_prompt(&server);
        assert!(prompt.starts_with("[system]You can call tools."), "{prompt}");
        assert!(prompt.contains("{\"type\": \"function\", \"function\": {\"name\": \"now\"}}\n"));
        let turns = "[user]1+2?\n[assistant]<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n\
                     </tool_call>\n[user]<tool_response>\n3\n</tool_response>\n[assistant]";
        assert!(prompt.ends_with(turns), "{prompt}");

        let asked = json!({"messages": messages, "tools": tools(), "return_token_strs": true});
        let tokens = server.ok("/tokenize", asked).await;
        let ids: Vec<u32> = serde_json::from_value(tokens["tokens"].clone()).unwrap();
        assert_eq!(tokenizer().decode(&ids, false).unwrap(), prompt);
    })
    .await;
}

#[tokio::test]
async fn calls_or_json_may_be_asked_for() {
    within(async {
        let server = saying("{}").await;
        let format = json!({"type": "json_object"});
        let answer = server.ok(CHAT, body(json!({"response_format": format}))).await;
        assert_eq!(answer["choices"][0]["message"]["content"], "{}");
        let Some(Grammar::Lark(grammar)) = last_grammar(&server) else { panic!("no grammar") };
        assert!(grammar.starts_with("start: answer | calls\ncalls: call"), "{grammar}");
        assert!(grammar.ends_with("\nanswer: %json {\"type\":\"object\"}\n"), "{grammar}");
        let forced = body(json!({"response_format": format, "tool_choice": "required"}));
        assert_eq!(server.refused(CHAT, forced).await.0, "tool_choice");
        let regex = body(json!({"guided_regex": "a"}));
        assert_eq!(server.refused(CHAT, regex).await.0, "tools");
    })
    .await;
}

#[tokio::test]
async fn wrong_tools_are_refused_by_name() {
    within(async {
        let server = saying("x").await;
        let function = |function: Value| json!([{"type": "function", "function": function}]);
        let cases = [
            (json!({"tools": "x"}), "tools"),
            (json!({"tools": [1]}), "tools[0]"),
            (json!({"tools": [{"type": "retrieval"}]}), "tools[0].type"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
            (json!({"tools": function(json!({}))}), "tools[0].function.name"),
            (json!({"tools": function(json!({"name": "a b"}))}), "tools[0].function.name"),
            (json!({"tools": function(json!({"name": ""}))}), "tools[0].function.name"),
            (
                json!({"tools": function(json!({"name": "a", "parameters": []}))}),
                "tools[0].function.parameters",
            ),
            (
                json!({"tools": function(json!({"name": "a", "strict": 1}))}),
                "tools[0].function.strict",
            ),
            (json!({"tools": function(json!({"name": "a", "odd": 1}))}), "tools[0].function.odd"),
            (json!({"tools": [tools()[1], tools()[1]]}), "tools[1].function.name"),
            (json!({"tools": vec![tools()[1].clone(); 129]}), "tools"),
            (json!({"tools": null, "tool_choice": "auto"}), "tool_choice"),
            (json!({"tools": [], "tool_choice": "required"}), "tool_choice"),
            (json!({"tool_choice": "any"}), "tool_choice"),
            (json!({"tool_choice": 1}), "tool_choice"),
            (json!({"tool_choice": {"type": "x"}}), "tool_choice.type"),
            (
                json!({"tool_choice": {"type": "function", "function": {"name": "gone"}}}),
                "tool_choice.function.name",
            ),
            (json!({"parallel_tool_calls": "yes"}), "parallel_tool_calls"),
            (json!({"functions": [{"name": "f"}]}), "functions"),
            (json!({"function_call": "auto"}), "function_call"),
        ];
        for (fields, param) in cases {
            let (named, message) = server.refused(CHAT, body(fields.clone())).await;
            assert_eq!(named, param, "{fields}: {message}");
        }
        assert!(server.seen.requests.lock().unwrap().is_empty());
    })
    .await;
}
