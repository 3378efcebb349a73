//! Samples under a grammar: what they say is what the grammar allows.

mod common;

use common::{engine, smollm2, tiny};
use onpolicy_engine::{
    chat::{Chat, ChatTokenizer, TokenizerFiles},
    collect::{CollectError, collect},
    engine::{EngineConfig, EngineHandle},
    kv_cache::KvCache,
    model::loading::Checkpoint,
};
use onpolicy_plugin_api::{EngineError, FinishReason, Grammar, Request, SamplingParams};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A tokenizer of printable characters, each its own token, for the tiny models.
fn letters() -> ChatTokenizer {
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    // The table of byte-level BPE writes a space as U+0120.
    let spelled = (' '..='~').map(|c| if c == ' ' { '\u{120}' } else { c });
    let mut vocab = serde_json::Map::new();
    for (id, token) in ["<unk>", "<s>", "</s>"].into_iter().enumerate() {
        vocab.insert(token.into(), id.into());
    }
    for (i, c) in spelled.enumerate() {
        vocab.insert(c.to_string(), (3 + i).into());
    }
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": true});
    let text = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    let files = TokenizerFiles { tokenizer: &text.to_string(), ..Default::default() };
    ChatTokenizer::from_files(&files).expect("a tokenizer")
}

fn tiny_with_letters() -> Checkpoint {
    Checkpoint { tokenizer: letters(), ..tiny("llama-tied") }
}

fn under(grammar: Grammar, n: usize, max_tokens: usize) -> SamplingParams {
    SamplingParams { grammar: Some(grammar), n, max_tokens, seed: Some(7), ..Default::default() }
}

fn run(engine: &EngineHandle, requests: Vec<Request>) -> Result<Vec<Vec<Text>>, CollectError> {
    let deadline = Instant::now() + Duration::from_secs(120);
    let groups = collect(engine, requests, deadline, &mut || {})?;
    let samples = groups.into_iter().map(|group| group.samples);
    let text = |sample: onpolicy_engine::collect::Sample| Text {
        ids: sample.tokens.iter().map(|token| token.id).collect(),
        logprobs: sample.tokens.iter().map(|token| token.stats.logprob).collect(),
        finish: sample.finish,
    };
    Ok(samples.map(|group| group.into_iter().map(text).collect()).collect())
}

/// A sample.
#[derive(Debug, Clone, PartialEq)]
struct Text {
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    finish: FinishReason,
}

impl Text {
    fn read(&self, tokenizer: &ChatTokenizer) -> String {
        tokenizer.decode(&self.ids, true).expect("text")
    }
}

/// All samples of one request, each of which must end by itself.
fn texts(checkpoint: &Checkpoint, params: SamplingParams) -> Vec<String> {
    let engine = engine(checkpoint, EngineConfig { kv_memory: 64 << 20, ..Default::default() });
    let prompt = vec![5, 6, 7];
    let group = run(&engine, vec![Request::new(prompt, params)]).expect("samples").remove(0);
    for text in &group {
        assert_eq!(text.finish, FinishReason::Stop, "{}", text.read(&checkpoint.tokenizer));
        assert!(checkpoint.config.eos_token_ids.contains(text.ids.last().expect("tokens")));
    }
    group.iter().map(|text| text.read(&checkpoint.tokenizer)).collect()
}

/// Names, ages and up to two colours, with definitions.
fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 8},
            "age": {"type": "integer", "minimum": 3, "maximum": 120},
            "colours": {"type": "array", "items": {"$ref": "#/$defs/colour"}, "maxItems": 2},
        },
        "required": ["name", "age", "colours"],
        "additionalProperties": false,
        "$defs": {"colour": {"enum": ["red", "green"]}},
        "x-guidance": {"whitespace_flexible": false},
    })
}

#[track_caller]
fn assert_person(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
    let keys: Vec<&String> = value.as_object().expect("an object").keys().collect();
    assert_eq!(keys, ["name", "age", "colours"], "{text}");
    let name = value["name"].as_str().expect("a name").chars().count();
    assert!((1..=8).contains(&name), "{text}");
    assert!((3..=120).contains(&value["age"].as_u64().expect("an age")), "{text}");
    let colours = value["colours"].as_array().expect("colours");
    assert!(colours.len() <= 2 && colours.iter().all(|c| *c == "red" || *c == "green"), "{text}");
}

#[test]
fn the_real_model_writes_what_a_schema_allows() {
    let checkpoint = smollm2();
    let engine = engine(&checkpoint, EngineConfig { kv_memory: 128 << 20, ..Default::default() });
    let chat = Chat {
        messages: vec![json!({"role": "user", "content": "Invent a person, as JSON."})],
        add_generation_prompt: true,
        ..Chat::default()
    };
    let prompt = checkpoint.tokenizer.encode_chat(&chat).expect("a prompt");
    let request = |grammar, max_tokens| Request::new(prompt.clone(), under(grammar, 8, max_tokens));
    let requests = vec![
        request(Grammar::JsonSchema(person()), 80),
        request(Grammar::Regex("[A-Z]{2}-[0-9]{4}( ok)?".into()), 20),
        request(Grammar::Choice(vec!["yes".into(), "no".into(), "maybe \"so\"/".into()]), 20),
        request(Grammar::Lark("start: \"<\" NAME \">\"\nNAME: /[a-z]{1,6}/".into()), 20),
    ];
    let groups = run(&engine, requests).expect("samples");
    for text in groups.iter().flatten() {
        assert_eq!(text.finish, FinishReason::Stop, "{}", text.read(&checkpoint.tokenizer));
    }
    let read = |group: usize| groups[group].iter().map(|text| text.read(&checkpoint.tokenizer));
    read(0).for_each(|text| assert_person(&text));
    for text in read(1) {
        let (letters, rest) = text.split_at(2);
        let digits = rest.strip_prefix('-').expect("a dash").trim_end_matches(" ok");
        assert!(letters.bytes().all(|b| b.is_ascii_uppercase()), "{text}");
        assert!(digits.len() == 4 && digits.bytes().all(|b| b.is_ascii_digit()), "{text}");
    }
    assert!(read(2).all(|text| ["yes", "no", "maybe \"so\"/"].contains(&text.as_str())));
    for text in read(3) {
        let name = text.strip_prefix('<').and_then(|text| text.strip_suffix('>'));
        let name = name.unwrap_or_else(|| panic!("{text}"));
        assert!((1..=6).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_lowercase()));
    }
    // What is forced is certain.
    let forced = groups[0][0].logprobs[0];
    assert!(forced.abs() < 1e-6, "the first brace has log-prob {forced}");
}

#[test]
fn a_full_pool_changes_no_sample_under_a_grammar() {
    let checkpoint = tiny_with_letters();
    let grammar = Grammar::Regex("([a-f]{3}[0-9]{2} ){9,}".into());
    let requests: Vec<Request> =
        (0..6).map(|i| Request::new(vec![i + 3; 20], under(grammar.clone(), 4, 60))).collect();
    let limits =
        |kv_memory| EngineConfig { kv_memory, max_batched_tokens: 256, ..Default::default() };
    let roomy = engine(&checkpoint, limits(64 << 20));
    let want = run(&roomy, requests.clone()).expect("samples");
    // 24 samples grow to 80 tokens, 5 blocks each.
    let tight = engine(&checkpoint, limits(40 * KvCache::block_bytes(&checkpoint.config)));
    let got = run(&tight, requests).expect("samples");
    assert!(tight.stats().expect("it runs").preemptions > 0, "the pool was never full");
    assert_eq!(got, want);
    let word = |word: &str| {
        let (letters, digits) = word.split_at(word.len().min(3));
        letters.bytes().all(|b| (b'a'..=b'f').contains(&b))
            && digits.bytes().all(|b| b.is_ascii_digit())
    };
    for text in want.iter().flatten() {
        let text = text.read(&checkpoint.tokenizer);
        assert!(text.len() >= 54 && text.split(' ').all(word), "{text}");
    }
}

#[test]
fn a_grammar_does_not_depend_on_who_else_is_served() {
    let checkpoint = tiny_with_letters();
    let request = |grammar: Option<Grammar>, seed| {
        let params = SamplingParams {
            n: 2,
            max_tokens: 24,
            seed: Some(seed),
            grammar,
            ..Default::default()
        };
        Request::new(vec![9, 8, 7], params)
    };
    let person = || Some(Grammar::JsonSchema(person()));
    let mixed =
        vec![request(None, 1), request(person(), 2), request(None, 3), request(person(), 4)];
    let engine = engine(&checkpoint, EngineConfig { kv_memory: 64 << 20, ..Default::default() });
    let together = run(&engine, mixed.clone()).expect("samples");
    for (request, want) in mixed.into_iter().zip(together) {
        assert_eq!(run(&engine, vec![request]).expect("samples"), [want]);
    }
}

#[test]
fn the_end_of_a_grammar_is_not_held_back() {
    let checkpoint = tiny_with_letters();
    let choice = Grammar::Choice(vec!["yes".into()]);
    let held = SamplingParams { min_tokens: 10, ..under(choice, 2, 20) };
    assert_eq!(texts(&checkpoint, held), ["yes", "yes"]);
    // Where more may come, it does.
    let many = Grammar::Regex("[ab]*".into());
    let held = SamplingParams { min_tokens: 10, ..under(many, 4, 100) };
    assert!(texts(&checkpoint, held).iter().all(|text| text.len() >= 10));
    let greedy = SamplingParams { temperature: 0.0, ..under(Grammar::Regex("x{5}".into()), 1, 9) };
    assert_eq!(texts(&checkpoint, greedy), ["xxxxx"]);
}

fn refused(checkpoint: &Checkpoint, params: SamplingParams) -> EngineError {
    let engine = engine(checkpoint, EngineConfig { kv_memory: 8 << 20, ..Default::default() });
    match run(&engine, vec![Request::new(vec![5], params)]) {
        Err(CollectError::Engine(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_no_grammar_is_refused_with_a_reason() {
    let checkpoint = tiny_with_letters();
    let chain = |rule: &str, end: &str| -> String {
        let links = (0..8000).map(|i| format!("{rule}{i}: {rule}{}\n", i + 1));
        format!("start: {rule}0\n{}{rule}8000: {end}\n", links.collect::<String>())
    };
    let cases = [
        (Grammar::Regex("(".into()), "regex"),
        (Grammar::Regex(String::new()), "empty"),
        (Grammar::Regex("a".repeat(20_000)), "20000 bytes"),
        (Grammar::Choice(vec![]), "texts to choose from"),
        (Grammar::Choice(vec!["a".into(), String::new()]), "must not be empty"),
        (Grammar::JsonSchema(json!({"type": "colour"})), "colour"),
        (Grammar::JsonSchema(json!({"$ref": "#/$defs/gone"})), "gone"),
        (Grammar::JsonSchema(json!({"type": "integer", "minimum": 2, "maximum": 1})), ""),
        (Grammar::Lark("start: gone".into()), "gone"),
        (Grammar::Lark("start ::= \"a\"".into()), "not `name ::= ...`"),
        (Grammar::Lark(format!("start: {}\"a\"{}", "(".repeat(5000), ")".repeat(5000))), "nested"),
        (Grammar::Lark("x".repeat(300_000)), "300000 bytes"),
    ];
    for (grammar, part) in cases {
        let shown = format!("{grammar:?}").chars().take(60).collect::<String>();
        match refused(&checkpoint, under(grammar, 1, 10)) {
            EngineError::Invalid { field, reason } => {
                assert_eq!(field, "grammar", "{shown}");
                assert!(reason.contains(part) && !reason.contains('\n'), "{shown}: {reason}");
            }
            other => panic!("{shown}: {other:?}"),
        }
    }
    // Long chains are odd, not wrong; they must not overflow a stack.
    for grammar in [chain("r", "\"ab\""), chain("T", "/ab/")] {
        let engine = engine(&checkpoint, EngineConfig { kv_memory: 8 << 20, ..Default::default() });
        let request = Request::new(vec![5], under(Grammar::Lark(grammar), 1, 10));
        match run(&engine, vec![request]) {
            Ok(groups) => assert_eq!(groups[0][0].read(&checkpoint.tokenizer), "ab"),
            Err(CollectError::Engine(EngineError::Invalid { field, .. })) => {
                assert_eq!(field, "grammar");
            }
            Err(other) => panic!("{other:?}"),
        }
    }
}

#[test]
fn conflicts_are_refused() {
    let checkpoint = tiny_with_letters();
    let params = under(Grammar::JsonObject, 1, 10);
    let ignoring = SamplingParams { ignore_eos: true, ..params };
    let error = refused(&checkpoint, ignoring);
    assert!(matches!(error, EngineError::Invalid { field, .. } if field == "ignore_eos"));
}
