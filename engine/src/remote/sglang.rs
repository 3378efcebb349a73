//! SGLang's API: `/generate` with token ids in and out, and its control routes.

use super::dialect::{Answer, Call, likeliest, told, unsupported};
use crate::{collect::Sample, sampler::stream_of};
use onpolicy_plugin_api::{
    EngineError, FinishReason, Grammar, PauseMode, Request, SamplingParams, Token, TokenStats,
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::path::Path;

pub(super) const GENERATE: &str = "/generate";

pub(super) fn check(params: &SamplingParams) -> Result<(), EngineError> {
    if params.allowed_token_ids.is_some() {
        return Err(unsupported("allowed_token_ids (SGLang has none)"));
    }
    if params.prompt_logprobs.is_some() {
        return Err(unsupported("prompt_logprobs (of SGLang)"));
    }
    match params.grammar {
        Some(Grammar::Lark(_)) => Err(unsupported("a grammar in Lark's notation")),
        _ => Ok(()),
    }
}

/// A group is a batch of equal prompts: with `n`, SGLang would give every sample the same seed.
pub(super) fn body(request: &Request) -> Value {
    let params = &request.params;
    let one = |index| {
        let mut one = shared(params);
        if let Some(seed) = params.seed {
            // 63 bits, as the field has it.
            one["sampling_seed"] = json!(stream_of(seed, index) >> 1);
        }
        one
    };
    let mut body = json!({
        "input_ids": vec![&request.prompt; params.n],
        "sampling_params": (0..params.n).map(one).collect::<Vec<_>>(),
        "return_logprob": true,
        "stream": false,
    });
    if params.top_logprobs > 0 {
        body["top_logprobs_num"] = json!(params.top_logprobs);
    }
    if let Some(salt) = &request.cache_salt {
        body["extra_key"] = json!(salt);
    }
    if request.priority != 0 {
        body["priority"] = json!(request.priority);
    }
    body
}

fn shared(params: &SamplingParams) -> Value {
    let mut shared = json!({
        "max_new_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": if params.top_k == 0 { -1 } else { params.top_k as i64 },
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
    });
    let mut set = |differs: bool, name: &str, value: Value| {
        if differs {
            shared[name] = value;
        }
    };
    set(params.presence_penalty != 0.0, "presence_penalty", json!(params.presence_penalty));
    set(params.frequency_penalty != 0.0, "frequency_penalty", json!(params.frequency_penalty));
    let bias = params.logit_bias.iter().map(|(id, bias)| (id.to_string(), json!(bias)));
    set(!params.logit_bias.is_empty(), "logit_bias", Value::Object(bias.collect::<Map<_, _>>()));
    set(params.min_tokens > 0, "min_new_tokens", json!(params.min_tokens));
    set(params.ignore_eos, "ignore_eos", json!(true));
    set(!params.stop_token_ids.is_empty(), "stop_token_ids", json!(params.stop_token_ids));
    if let Some((name, value)) = params.grammar.as_ref().map(structure) {
        set(true, name, value);
    }
    shared
}

fn structure(grammar: &Grammar) -> (&'static str, Value) {
    match grammar {
        Grammar::JsonObject => ("json_schema", json!(r#"{"type": "object"}"#)),
        Grammar::JsonSchema(schema) => ("json_schema", json!(schema.to_string())),
        Grammar::Regex(regex) => ("regex", json!(regex)),
        Grammar::Choice(choice) => {
            let escaped: Vec<String> = choice.iter().map(|text| escape(text)).collect();
            ("regex", json!(format!("({})", escaped.join("|"))))
        }
        // Refused by `check`.
        Grammar::Lark(lark) => ("ebnf", json!(lark)),
    }
}

/// A regular expression that matches `text` alone.
fn escape(text: &str) -> String {
    let special = |c: char| "\\.+*?()|[]{}^$".contains(c);
    text.chars().flat_map(|c| special(c).then_some('\\').into_iter().chain([c])).collect()
}

#[derive(Deserialize)]
struct Generated {
    meta_info: Meta,
}

/// Entries are `[logprob, id, text]`.
#[derive(Deserialize)]
struct Meta {
    finish_reason: Option<Finish>,
    output_token_logprobs: Option<Vec<Vec<Value>>>,
    output_top_logprobs: Option<Vec<Option<Vec<Vec<Value>>>>>,
    #[serde(default)]
    weight_version: Value,
}

#[derive(Deserialize)]
struct Finish {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Batch {
    Many(Vec<Generated>),
    One(Box<Generated>),
}

pub(super) fn parse(text: &[u8], request: &Request, version: u64) -> Result<Answer, String> {
    let answer: Batch = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    let answers = match answer {
        Batch::Many(answers) => answers,
        Batch::One(answer) => vec![*answer],
    };
    let told = answers.first().and_then(|first| told(&first.meta_info.weight_version));
    let top = request.params.top_logprobs;
    let samples = answers.into_iter().map(|answer| sample(answer.meta_info, top, version));
    Ok(Answer { prompt: None, samples: samples.collect::<Result<_, _>>()?, told })
}

fn sample(meta: Meta, count: usize, version: u64) -> Result<Sample, String> {
    let finish = match meta.finish_reason.as_ref().map(|finish| finish.kind.as_str()) {
        Some("stop") => FinishReason::Stop,
        Some("length") => FinishReason::Length,
        Some("abort") | None => FinishReason::Abort,
        Some(other) => return Err(format!("unknown finish_reason '{other}'")),
    };
    let logprobs = meta.output_token_logprobs.unwrap_or_default();
    if logprobs.is_empty() && finish != FinishReason::Abort {
        return Err("no output_token_logprobs".into());
    }
    let token = |(place, values): (usize, &Vec<Value>)| {
        let (id, logprob) = entry(values).ok_or("a token without id or log-prob")?;
        let all = meta.output_top_logprobs.as_ref().and_then(|all| all.get(place)?.as_ref());
        let top = match (count, all) {
            (0, _) => Vec::new(),
            (_, None) => return Err("no output_top_logprobs".to_string()),
            (_, Some(all)) => all.iter().filter_map(|values| entry(values)).collect(),
        };
        let stats = TokenStats { logprob, entropy: f32::NAN, baseline: f32::NAN };
        Ok(Token { id, stats, weight_version: version, top: likeliest(top, count) })
    };
    let tokens = logprobs.iter().enumerate().map(token);
    Ok(Sample { tokens: tokens.collect::<Result<_, _>>()?, finish })
}

fn entry(values: &[Value]) -> Option<(u32, f32)> {
    let logprob = values.first()?.as_f64()? as f32;
    Some((u32::try_from(values.get(1)?.as_u64()?).ok()?, logprob))
}

/// SGLang keeps running samples by taking their KV away, to compute it again afterwards.
pub(super) fn pause(mode: PauseMode) -> Call {
    let mode = match mode {
        PauseMode::Abort | PauseMode::Wait => "abort",
        PauseMode::Keep => "retract",
    };
    Call::json("/pause_generation", json!({"mode": mode}))
}

pub(super) fn load(dir: &Path, version: u64) -> Vec<Call> {
    let body = json!({"model_path": dir, "weight_version": version.to_string()});
    vec![Call::json("/update_weights_from_disk", body)]
}

pub(super) fn name_weights(version: u64) -> Vec<Call> {
    let body = json!({"new_version": version.to_string(), "abort_all_requests": false});
    vec![Call::json("/update_weight_version", body)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(n: usize) -> Request {
        let params = SamplingParams { n, seed: Some(3), top_k: 20, ..SamplingParams::default() };
        Request::new(vec![5, 6], params)
    }

    #[test]
    fn every_sample_has_a_seed_of_its_own() {
        let body = body(&request(2));
        assert_eq!(body["input_ids"], json!([[5, 6], [5, 6]]));
        let params = body["sampling_params"].as_array().unwrap();
        let seed = |index: usize| params[index]["sampling_seed"].as_u64().unwrap();
        assert!(params.len() == 2 && seed(0) != seed(1) && seed(0) < 1 << 63);
        assert_eq!((&params[1]["top_k"], &params[1]["max_new_tokens"]), (&json!(20), &json!(16)));
    }

    #[test]
    fn answers_become_samples() {
        let text = json!([
            {"text": "a", "meta_info": {
                "finish_reason": {"type": "stop", "matched": 2}, "weight_version": "5",
                "output_token_logprobs": [[-0.5, 7, null], [-0.25, 2, null]],
                "output_top_logprobs": [[[-0.5, 7, null], [-1.5, 8, null]], [[-0.25, 2, null]]]}},
            {"text": "", "meta_info": {"finish_reason": {"type": "abort", "message": "x"},
                                       "output_token_logprobs": []}},
        ]);
        let mut request = request(2);
        request.params.top_logprobs = 1;
        let answer = parse(text.to_string().as_bytes(), &request, 4).unwrap();
        let [first, second] = &answer.samples[..] else { panic!("{answer:?}") };
        assert_eq!((first.finish, second.finish), (FinishReason::Stop, FinishReason::Abort));
        assert_eq!(first.tokens[0].top, [(7, -0.5)]);
        assert_eq!((first.tokens[1].id, first.tokens[1].stats.logprob), (2, -0.25));
        assert_eq!((first.tokens[1].weight_version, answer.told.as_deref()), (4, Some("5")));
        let text = r#"{"meta_info": {"finish_reason": {"type": "length"}}}"#;
        assert!(parse(text.as_bytes(), &request, 4).unwrap_err().contains("logprobs"));
    }

    #[test]
    fn choices_become_a_regular_expression() {
        let (name, regex) = structure(&Grammar::Choice(vec!["a.b".into(), "c".into()]));
        assert_eq!((name, regex), ("regex", json!("(a\\.b|c)")));
    }
}
