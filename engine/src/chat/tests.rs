use super::*;
use onpolicy_plugin_api::{Message, Role};
use serde_json::json;

/// A word-level tokenizer without a decoder: its tokens are joined with spaces.
fn words() -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [special(0, "<s>"), special(1, "</s>")],
        "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "unk_token": "one", "vocab": {
            "<s>": 0, "</s>": 1, "one": 2, "two": 3
        } }
    })
}

fn special(id: u32, content: &str) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true
    })
}

/// Sentencepiece as Llama 2 has it: `▁` for spaces, byte fallback, first space stripped.
fn pieces() -> Value {
    let mut vocab = json!({ "<unk>": 0, "</s>": 1, "▁": 2, "▁a": 3, "b": 4, "▁c": 5 });
    for byte in 0..=255 {
        vocab[format!("<0x{byte:02X}>")] = json!(6 + byte);
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [special(1, "</s>")], "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 }
        ] },
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "vocab": vocab, "merges": []
        }
    })
}

/// A byte-level vocabulary of all bytes in the order of GPT-2's table, and one special token.
fn byte_tokens() -> Value {
    let visible = |c: &char| *c > ' ' && *c != '\u{7F}';
    let spelled = (0..400).filter_map(char::from_u32).filter(visible);
    let spelled = spelled.filter(|c| Spelling::ByteLevel.bytes(&c.to_string()).len() == 1);
    let vocab: Map<String, Value> =
        spelled.enumerate().map(|(id, c)| (c.to_string(), id.into())).collect();
    let level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [special(256, "<|end|>")],
        "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": { "type": "BPE", "vocab": vocab, "merges": [] }
    })
}

fn build(tokenizer: &Value, template: Option<&str>) -> ChatTokenizer {
    let config = json!({
        "bos_token": "<s>", "eos_token": { "content": "</s>" }, "pad_token": null,
        "chat_template": template
    });
    let files = TokenizerFiles {
        tokenizer: &tokenizer.to_string(),
        tokenizer_config: Some(&config.to_string()),
        special_tokens_map: Some(r#"{"unk_token": "<unk>", "bos_token": "<other>"}"#),
        chat_template: None,
    };
    ChatTokenizer::from_files(&files).unwrap()
}

fn chat(messages: Value) -> Chat {
    Chat { messages: messages.as_array().unwrap().clone(), ..Chat::default() }
}

fn rendered(template: &str, chat: &Chat) -> Result<String, ChatError> {
    build(&words(), Some(template)).render(chat)
}

fn hello() -> Chat {
    chat(json!([{ "role": "user", "content": "hello" }]))
}

/// Expected texts in the tests of templates are those of transformers 4.57.1:
/// `render_jinja_template(conversations=[messages], chat_template=template, ...)`.
#[test]
fn whitespace_control_is_that_of_transformers() {
    let template = "{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content }}]\n  \
                    {%- endif %}\n{% endfor %}\n{{ bos_token }}{{ eos_token }}{{ unk_token }}\
                    {{ pad_token }}\n";
    assert_eq!(rendered(template, &hello()).unwrap(), "[hello]<s></s><unk>");
}

#[test]
fn values_print_as_in_python() {
    let template = "{{ true }} {{ none }} {{ [1, 'a', \"it's\", 2.5, false] }} {{ {'k': none} }} \
                    {{ nothing }}|{{ 'x' if messages is iterable }}";
    let expected = r#"True None [1, 'a', "it's", 2.5, False] {'k': None} |x"#;
    assert_eq!(rendered(template, &hello()).unwrap(), expected);
}

#[test]
fn tojson_is_json_dumps() {
    let tools = json!([{ "b": "<é> & 'x'\n", "a": [1, 2.5, true, null], "e": {}, "l": [] }]);
    let mut with_tools = hello();
    with_tools.tools = Some(tools);
    let one_line = r#"[{"b": "<é> & 'x'\n", "a": [1, 2.5, true, null], "e": {}, "l": []}]"#;
    assert_eq!(rendered("{{ tools | tojson }}", &with_tools).unwrap(), one_line);
    let indented = "{\n  \"b\": \"<é> & 'x'\\n\",\n  \"a\": [\n    1,\n    2.5,\n    true,\n    \
                    null\n  ],\n  \"e\": {},\n  \"l\": []\n}";
    assert_eq!(rendered("{{ tools[0] | tojson(indent=2) }}", &with_tools).unwrap(), indented);
    let other = "{{ {'b': 'é😀', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true, \
                 separators=[',', ':']) }}";
    let expected = r#"{"a":1,"b":"\u00e9\ud83d\ude00"}"#;
    assert_eq!(rendered(other, &with_tools).unwrap(), expected);
    assert!(rendered("{{ missing | tojson }}", &with_tools).is_err());
}

#[test]
fn python_methods_and_loop_controls_work() {
    let template = "{%- set ns = namespace(last='') -%}{%- for m in messages[::-1] -%}\
                    {%- if m.content.startswith('<') -%}{%- continue -%}{%- endif -%}\
                    {%- set ns.last = m.content.split('|')[-1].lstrip('\\n').strip() -%}\
                    {%- break -%}{%- endfor -%}{{ ns.last }}\
                    {%- for k, v in messages[0].items() %} {{ k }}={{ v }}{% endfor %}\
                    {%- macro twice(x) %} {{ x }}{{ x }}{% endmacro %}{{ twice('z') }}";
    let messages = chat(json!([
        { "role": "user", "content": "first" },
        { "role": "assistant", "content": "thought|\n answer " },
        { "role": "user", "content": "<skip>" },
    ]));
    let expected = "answer role=user content=first zz";
    assert_eq!(rendered(template, &messages).unwrap(), expected);
}

#[test]
fn generation_blocks_print_what_they_hold() {
    let template = "{% for m in messages %}{%- generation -%} {{ m.content }} \
                    {%- endgeneration %}!{% generation %}\n?{% endgeneration %}\n{% endfor %}";
    assert_eq!(rendered(template, &hello()).unwrap(), "hello!?");
}

#[test]
fn dates_are_formatted() {
    let year = rendered("{{ strftime_now('%Y') }}", &hello()).unwrap();
    assert!(year.parse::<u32>().unwrap() >= 2024);
    let error = rendered("{{ strftime_now('%!') }}", &hello()).unwrap_err();
    assert!(error.to_string().contains("does not know the format '%!'"), "{error}");
}

#[test]
fn errors_of_templates_reach_the_caller() {
    let refuse = "{{ raise_exception('roles must alternate') }}";
    let error = rendered(refuse, &hello()).unwrap_err();
    assert!(error.to_string().starts_with("chat template: roles must alternate"), "{error}");
    assert!(matches!(rendered("{{ nothing.more }}", &hello()), Err(ChatError::Template(_))));
    assert!(matches!(rendered("{% for %}", &hello()), Err(ChatError::Template(_))));
    assert_eq!(build(&words(), None).render(&hello()), Err(ChatError::NoTemplate));
}

#[test]
fn malformed_conversations_are_refused() {
    let refusal = |messages: Value| rendered("{{ messages }}", &chat(messages)).unwrap_err();
    let field = |messages: Value| match refusal(messages) {
        ChatError::Invalid { field, .. } => field,
        other => panic!("{other}"),
    };
    assert_eq!(field(json!(["hi"])), "messages[0]");
    assert_eq!(field(json!([{ "content": "hi" }])), "messages[0].role");
    let image = json!([{ "type": "image_url", "image_url": {} }]);
    assert_eq!(field(json!([{ "role": "user", "content": image }])), "messages[0].content");
    let call = json!([{ "function": { "name": "f", "arguments": "{" } }]);
    assert_eq!(
        field(json!([{ "role": "assistant", "tool_calls": call }])),
        "messages[0].tool_calls"
    );
    let mut overriding = hello();
    overriding.kwargs.insert("messages".into(), json!([]));
    assert!(rendered("x", &overriding).unwrap_err().to_string().contains("'messages'"));
}

#[test]
fn content_parts_and_tool_arguments_are_unpacked() {
    let parts = json!([{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }]);
    let call = json!([{ "function": { "name": "f", "arguments": "{\"x\": 1}" } }]);
    let messages = chat(json!([
        { "role": "user", "content": parts },
        { "role": "assistant", "content": null, "tool_calls": call },
    ]));
    let template = "{{ messages[0].content }} {{ messages[1].tool_calls[0].function.arguments.x }}";
    assert_eq!(rendered(template, &messages).unwrap(), "a\nb 1");
}

#[test]
fn tool_template_is_used_for_tools() {
    let named = json!({ "chat_template": [
        { "name": "default", "template": "plain" }, { "name": "tool_use", "template": "tools" }
    ] });
    let files = |file: Option<&'static str>| {
        let files = TokenizerFiles {
            tokenizer: &words().to_string(),
            tokenizer_config: Some(&named.to_string()),
            special_tokens_map: None,
            chat_template: file,
        };
        ChatTokenizer::from_files(&files).unwrap()
    };
    let mut with_tools = hello();
    with_tools.tools = Some(json!([]));
    assert_eq!(files(None).render(&hello()).unwrap(), "plain");
    assert_eq!(files(None).render(&with_tools).unwrap(), "tools");
    assert_eq!(files(Some("file")).render(&hello()).unwrap(), "file");
}

#[test]
fn variables_of_the_request_reach_the_template() {
    let mut asked = hello();
    asked.add_generation_prompt = true;
    asked.kwargs.insert("enable_thinking".into(), json!(false));
    let template = "{{ add_generation_prompt }} {{ enable_thinking }} {{ tools is none }}";
    assert_eq!(rendered(template, &asked).unwrap(), "True False True");
}

#[test]
fn final_message_is_continued() {
    let template = "{% for m in messages %}[{{ m.content }}]{% endfor %}";
    let trimming = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}";
    let mut open = chat(json!([
        { "role": "user", "content": "x" }, { "role": "assistant", "content": "x y " },
    ]));
    open.continue_final_message = true;
    assert_eq!(rendered(template, &open).unwrap(), "[x][x y ");
    assert_eq!(rendered(trimming, &open).unwrap(), "[x][x y");
    let error = rendered("{{ messages[0].content }}", &open).unwrap_err();
    assert!(error.to_string().contains("does not print the last message"), "{error}");
    open.add_generation_prompt = true;
    assert!(matches!(rendered(template, &open), Err(ChatError::Invalid { .. })));
    let mut empty = chat(json!([{ "role": "assistant", "content": null }]));
    empty.continue_final_message = true;
    assert!(matches!(rendered(template, &empty), Err(ChatError::Invalid { .. })));
}

#[test]
fn messages_of_tasks_become_a_chat() {
    let messages = [Message { role: Role::System, content: "s".into() }, Message::user("u")];
    let made = Chat::from_messages(&messages);
    let expected =
        json!([{ "role": "system", "content": "s" }, { "role": "user", "content": "u" }]);
    assert_eq!(Value::Array(made.messages.clone()), expected);
    assert!(made.add_generation_prompt && !made.continue_final_message && made.tools.is_none());
}

#[test]
fn special_tokens_are_recognised_and_none_is_added() {
    let tokenizer = build(&words(), Some("{{ bos_token }}{{ messages[0].content }}"));
    assert_eq!(tokenizer.encode("<s>two one</s>").unwrap(), [0, 3, 2, 1]);
    assert_eq!(tokenizer.encode_prompt("two").unwrap(), [3]);
    let messages = chat(json!([{ "role": "user", "content": "two" }]));
    assert_eq!(tokenizer.encode_chat(&messages).unwrap(), [0, 3]);
    assert!(tokenizer.is_special(1) && !tokenizer.is_special(2) && !tokenizer.is_special(99));
    assert_eq!(tokenizer.decode(&[0, 3, 2, 99], true).unwrap(), "two one");
    assert_eq!(tokenizer.decode(&[0, 3], false).unwrap(), "<s> two");
}

#[test]
fn prompts_get_the_tokens_that_the_tokenizer_adds() {
    let mut described = words();
    described["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } },
                   { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } },
                 { "Sequence": { "id": "B", "type_id": 0 } }],
        "special_tokens": { "<s>": { "id": "<s>", "ids": [0], "tokens": ["<s>"] } }
    });
    described["truncation"] = json!({
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
    });
    let tokenizer = build(&described, None);
    assert_eq!(tokenizer.encode_prompt("two two two").unwrap(), [0, 3, 3, 3]);
    assert_eq!(tokenizer.encode("two").unwrap(), [3]);
}

/// Streams `ids` and checks that the pieces make up what is decoded at once.
fn assert_streams(tokenizer: &ChatTokenizer, ids: &[u32], skip_special: bool) -> Vec<String> {
    let mut detokenizer = tokenizer.detokenizer(skip_special);
    let mut parts: Vec<String> = ids.iter().map(|id| detokenizer.push(*id).unwrap()).collect();
    parts.push(detokenizer.finish().unwrap());
    assert_eq!(parts.concat(), tokenizer.decode(ids, skip_special).unwrap(), "{ids:?}");
    parts
}

#[test]
fn byte_level_text_streams_in_whole_characters() {
    let tokenizer = build(&byte_tokens(), None);
    let ids = tokenizer.encode("é😀").unwrap();
    assert_eq!(ids.len(), 6);
    let parts = assert_streams(&tokenizer, &ids, false);
    assert_eq!(parts, ["", "é", "", "", "", "😀", ""]);
    let end = 256;
    let (first, second) = (ids[0], ids[1]);
    assert_eq!(assert_streams(&tokenizer, &[first, end, second], true), ["", "", "é", ""]);
    assert_eq!(assert_streams(&tokenizer, &[first, end], false), ["", "\u{FFFD}<|end|>", ""]);
    assert_eq!(assert_streams(&tokenizer, &ids[..4], false)[4], "\u{FFFD}");
    assert_eq!(tokenizer.token_bytes(first), [0xC3]);
    assert_eq!(tokenizer.token_text(first), "\u{FFFD}");
    assert_eq!(tokenizer.token_bytes(9999), Vec::<u8>::new());
}

#[test]
fn random_bytes_stream_as_they_decode() {
    use rand::{Rng, SeedableRng};
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let tokenizer = build(&byte_tokens(), None);
    for _ in 0..300 {
        let ids: Vec<u32> = (0..40).map(|_| random.random_range(0..=257)).collect();
        assert_streams(&tokenizer, &ids, random.random_bool(0.5));
    }
}

#[test]
fn sentencepiece_spaces_and_bytes_stream() {
    let tokenizer = build(&pieces(), None);
    let byte = |b: u8| 6 + u32::from(b);
    let parts = assert_streams(&tokenizer, &[3, 4, 5, 2, 3, 1], true);
    assert_eq!(parts, ["a", "b", " c", " ", " a", "", ""]);
    let euro = [3, byte(0xE2), byte(0x82), byte(0xAC), 5];
    assert_eq!(assert_streams(&tokenizer, &euro, true), ["a", "", "", "€", " c", ""]);
    assert_eq!(assert_streams(&tokenizer, &[2, 3, 4], true), ["", " a", "b", ""]);
    assert_eq!(tokenizer.token_text(5), " c");
    assert_eq!(tokenizer.token_bytes(byte(0xE2)), [0xE2]);
    // Garbage comes out in the end, and what follows is not lost.
    let mut garbage = vec![byte(0xE2); 50];
    garbage.push(4);
    let parts = assert_streams(&tokenizer, &garbage, true);
    assert!(parts[..10].concat().contains('\u{FFFD}'));
}

#[test]
fn joined_words_stream() {
    let tokenizer = build(&words(), None);
    assert_eq!(assert_streams(&tokenizer, &[2, 3, 2], false), ["one", " two", " one", ""]);
}

#[test]
fn streaming_takes_linear_time() {
    for tokenizer in [build(&byte_tokens(), None), build(&pieces(), None)] {
        let mut detokenizer = tokenizer.detokenizer(true);
        let started = std::time::Instant::now();
        // A stray first byte each time: the worst case for windows that wait for the rest.
        let length: usize = (0..50_000).map(|i| detokenizer.push(100 + i % 3).unwrap().len()).sum();
        assert!(length > 0);
        assert!(started.elapsed().as_secs_f64() < 5.0, "{:?}", started.elapsed());
    }
}

#[test]
fn token_ids_must_be_those_of_the_file() {
    let mut described = words();
    described["added_tokens"] = json!([special(9, "<far>")]);
    let text = described.to_string();
    let files = TokenizerFiles { tokenizer: &text, ..TokenizerFiles::default() };
    let error = ChatTokenizer::from_files(&files).unwrap_err().to_string();
    assert!(error.contains("<far>") && error.contains('9'), "{error}");
}

#[test]
fn broken_tokenizer_files_are_errors() {
    let files = TokenizerFiles { tokenizer: "{}", ..TokenizerFiles::default() };
    assert!(matches!(ChatTokenizer::from_files(&files), Err(ChatError::Tokenizer(_))));
}
