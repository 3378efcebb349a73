use super::{scan::*, *};

fn parser(format: ToolFormat) -> CallParser {
    CallParser::new(format, vec!["add".into(), "now".into()], usize::MAX)
}

/// What comes out of a text that arrives in these pieces: content, and calls with arguments.
fn parsed(mut parser: CallParser, pieces: &[&str]) -> (String, Vec<(String, String)>) {
    let mut parts: Vec<Part> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
    parts.extend(parser.finish());
    let (mut content, mut calls) = (String::new(), Vec::new());
    for part in parts {
        match part {
            Part::Content(text) => {
                assert!(!text.is_empty(), "empty content");
                content.push_str(&text);
            }
            Part::Call { index, name } => {
                assert_eq!(index, calls.len());
                calls.push((name, String::new()));
            }
            Part::Arguments { index, text } => {
                assert_eq!(index + 1, calls.len());
                assert!(!text.is_empty(), "empty arguments");
                calls[index].1.push_str(&text);
            }
        }
    }
    (content, calls)
}

/// Parses the text whole, cut in two at every place, and character by character.
#[track_caller]
fn check(format: ToolFormat, text: &str, content: &str, calls: &[(&str, &str)]) {
    let calls: Vec<(String, String)> =
        calls.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect();
    let want = (content.to_string(), calls);
    assert_eq!(parsed(parser(format), &[text]), want, "{text}");
    for (at, _) in text.char_indices() {
        let (a, b) = text.split_at(at);
        assert_eq!(parsed(parser(format), &[a, b]), want, "{a:?} then {b:?}");
    }
    let letters: Vec<String> = text.chars().map(String::from).collect();
    let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
    assert_eq!(parsed(parser(format), &letters), want, "{text}, letter by letter");
}

#[test]
fn hermes_calls_are_found() {
    use ToolFormat::Hermes;
    let one = r#"<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>"#;
    check(Hermes, one, "", &[("add", r#"{"a": 1}"#)]);
    let spaced = "Let me see.\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": [1, {}], \
                  \"s\": \"}<tool_call>\\\"{\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"now\", \
                  \"arguments\": {}}\n</tool_call>\n";
    let arguments = r#"{"a": [1, {}], "s": "}<tool_call>\"{"}"#;
    check(Hermes, spaced, "Let me see.", &[("add", arguments), ("now", "{}")]);
    let after = "a <b <tool_call>{\"name\":\"add\",\"arguments\":{}}</tool_call> and\n c";
    check(Hermes, after, "a <band\n c", &[("add", "{}")]);
    let turned = r#"<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>"#;
    check(Hermes, turned, "", &[("add", r#"{"a": 1}"#)]);
    let quoted = r#"<tool_call>{"id":"x","name":"add","arguments":"{\"a\": \"é\"}"}</tool_call>"#;
    check(Hermes, quoted, "", &[("add", r#"{"a": "é"}"#)]);
    let more = r#"<tool_call>{"name": "odd", "arguments": null, "type": "function"}"#;
    check(Hermes, more, "", &[("odd", "{}")]);
    let trailing = r#"<tool_call>{"name": "add", "arguments": {"a":"ü"}, "id": "}"}</tool_call>"#;
    check(Hermes, trailing, "", &[("add", r#"{"a":"ü"}"#)]);
}

#[test]
fn text_that_is_no_call_is_content() {
    use ToolFormat::{Hermes, Llama3};
    for text in [
        "plain <tool text \n",
        "",
        " \n",
        "<tool_call> no call",
        "<tool_call>{\"name\": 5}</tool_call> x",
        "<tool_call>{\"name\": \"add\", \"argum",
        "1 < 2 and <tool_cal",
    ] {
        check(Hermes, text, text, &[]);
    }
    for text in [
        "It is {\"name\": \"add\", \"parameters\": {}}",
        "{\"name\": \"Ada\", \"parameters\": {}}",
        "{\"answer\": 1}",
        "{\"name\": \"add",
        " \n",
        "<|py",
        "é;",
    ] {
        check(Llama3, text, text, &[]);
    }
}

#[test]
fn llama_calls_are_found() {
    use ToolFormat::Llama3;
    let one = r#" {"name": "add", "parameters": {"a": "x;}"}}"#;
    check(Llama3, one, "", &[("add", r#"{"a": "x;}"}"#)]);
    let typed = r#"<|python_tag|>{"type": "function", "name": "odd", "parameters": {"a": 1}}"#;
    check(Llama3, typed, "", &[("odd", r#"{"a": 1}"#)]);
    let two = r#"{"name": "add", "parameters": {}} ; {"name": "now", "arguments": {"b":2}};"#;
    check(Llama3, two, "", &[("add", "{}"), ("now", r#"{"b":2}"#)]);
    let bare = r#"{"name": "now"}"#;
    check(Llama3, bare, "", &[("now", "{}")]);
    let then = r#"{"name": "now", "parameters": {}} That is it."#;
    check(Llama3, then, "That is it.", &[("now", "{}")]);
}

#[test]
fn a_call_that_is_cut_off_keeps_what_came() {
    let cut = r#"<tool_call>{"name": "add", "arguments": {"a": 12"#;
    check(ToolFormat::Hermes, cut, "", &[("add", r#"{"a": 12"#)]);
    let cut = r#"{"name": "add", "parameters": {"a": "x"#;
    check(ToolFormat::Llama3, cut, "", &[("add", r#"{"a": "x"#)]);
}

#[test]
fn later_calls_are_left_out_where_one_is_wanted() {
    let text = r#"<tool_call>{"name": "add", "arguments": {}}</tool_call>
<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>"#;
    let parser = CallParser::new(ToolFormat::Hermes, Vec::new(), 1);
    assert_eq!(parsed(parser, &[text]), (String::new(), vec![("add".into(), "{}".into())]));
}

#[test]
fn arguments_come_out_as_they_arrive() {
    let mut parser = parser(ToolFormat::Hermes);
    assert_eq!(parser.push("Hm. <tool"), [Part::Content("Hm.".into())]);
    assert_eq!(parser.push("_call>{\"name\": \"add\", \"arguments\": "), []);
    let call = Part::Call { index: 0, name: "add".into() };
    let text = |text: &str| Part::Arguments { index: 0, text: text.into() };
    assert_eq!(parser.push("{\"a\""), [call, text("{\"a\"")]);
    assert_eq!(parser.push(": 1"), [text(": 1")]);
    assert_eq!(parser.push("}}</tool_call>"), [text("}")]);
    assert_eq!(parser.finish(), []);
    assert_eq!(parser.calls(), 1);
}

#[test]
fn heads_are_read() {
    let open = |name: &str, arguments| Head::Open { name: name.into(), arguments };
    assert_eq!(head(r#"{"name":"f","arguments":{"#), open("f", 24));
    for more in ["", " ", "{", "{\"na", "{\"name\"", "{\"name\": ", "{\"name\": \"f\\\""] {
        assert_eq!(head(more), Head::More, "{more}");
    }
    for bad in ["[", "{1", "{\"x\": 1", "{\"name\": 1", "{\"name\": \"f\"]", "{}", "{é"] {
        assert_eq!(head(bad), Head::Bad, "{bad}");
    }
}

#[test]
fn the_form_is_that_of_the_template() {
    let of = ToolFormat::of_template;
    assert_eq!(of("{{ tools }} <tool_call>\\n{\"name\": "), Some(ToolFormat::Hermes));
    let llama = "{%- if tools %}Environment: ipython {\"name\": x, \"parameters\": y}{% endif %}";
    assert_eq!(of(llama), Some(ToolFormat::Llama3));
    assert_eq!(of("{{ tools }} <tool_call><function=x>"), None);
    assert_eq!(of("[AVAILABLE_TOOLS] {{ tools }} [TOOL_CALLS]"), None);
}

#[test]
fn messages_speak_of_tools_where_the_template_does_not() {
    let tool = json!({ "type": "function", "function": { "name": "add" } });
    let messages = vec![
        json!({ "role": "user", "content": "1+2, 3+4?" }),
        json!({ "role": "assistant", "content": "Well.", "tool_calls": [
            { "id": "a", "type": "function", "function": { "name": "add", "arguments": { "a": 1 } } },
            { "id": "b", "type": "function", "function": { "name": "add", "arguments": { "a": 3 } } },
        ] }),
        json!({ "role": "tool", "content": "3", "tool_call_id": "a" }),
        json!({ "role": "tool", "content": "7", "tool_call_id": "b" }),
    ];
    let tools = json!([tool]);
    let spelled = prompt::spelled_out(messages.clone(), Some(&tools));
    let roles: Vec<&str> = spelled.iter().filter_map(|m| m["role"].as_str()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user"]);
    let signature =
        "<tools>\n{\"type\": \"function\", \"function\": {\"name\": \"add\"}}\n</tools>";
    assert!(spelled[0]["content"].as_str().unwrap().contains(signature), "{spelled:?}");
    let call = |a: u32| {
        format!("<tool_call>\n{{\"name\": \"add\", \"arguments\": {{\"a\": {a}}}}}\n</tool_call>")
    };
    assert_eq!(spelled[2]["content"], format!("Well.\n{}\n{}", call(1), call(3)));
    assert_eq!(spelled[2].get("tool_calls"), None);
    let result = |text: u32| format!("<tool_response>\n{text}\n</tool_response>");
    assert_eq!(spelled[3]["content"], format!("{}\n{}", result(3), result(7)));
    // What the model writes is what is found again.
    let text = spelled[2]["content"].as_str().unwrap();
    check(ToolFormat::Hermes, text, "Well.", &[("add", "{\"a\": 1}"), ("add", "{\"a\": 3}")]);
    let plain = vec![json!({ "role": "user", "content": "hi" })];
    assert_eq!(prompt::spelled_out(plain.clone(), None), plain);
}
