//! vLLM's API: `/v1/completions` with token ids in and out, and the control routes of its
//! development mode. This project's own server speaks it too, and adds `policy`: entropy, baseline
//! and weight version of each token.

use super::dialect::{Answer, Call, likeliest, told, unsupported};
use crate::collect::Sample;
use onpolicy_plugin_api::{
    EngineError, FinishReason, Grammar, PauseMode, PromptToken, Request, SamplingParams, Token,
    TokenStats,
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::{collections::HashMap, path::Path};

pub(super) const GENERATE: &str = "/v1/completions";

pub(super) fn check(params: &SamplingParams) -> Result<(), EngineError> {
    match params.grammar {
        Some(Grammar::Lark(_)) => Err(unsupported("a grammar in Lark's notation")),
        _ => Ok(()),
    }
}

/// The neutral values are written out: left out, a server may take those of the model's
/// `generation_config.json`.
pub(super) fn body(request: &Request, model: &str) -> Value {
    let params = &request.params;
    let mut body = json!({
        "model": model,
        "prompt": request.prompt,
        "n": params.n,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": top_k(params),
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "logprobs": params.top_logprobs,
        "return_token_ids": true,
    });
    for (name, value) in unusual(request) {
        body[name] = value;
    }
    body
}

fn top_k(params: &SamplingParams) -> i64 {
    if params.top_k == 0 { -1 } else { params.top_k as i64 }
}

/// The fields that differ from what every server takes for granted.
fn unusual(request: &Request) -> Vec<(&'static str, Value)> {
    let params = &request.params;
    let mut fields = Vec::new();
    let mut set = |differs: bool, name, value: Value| {
        if differs {
            fields.push((name, value));
        }
    };
    // 64 bits with a sign, as the field has it.
    let seed = params.seed.map(u64::cast_signed);
    set(seed.is_some(), "seed", json!(seed));
    set(params.presence_penalty != 0.0, "presence_penalty", json!(params.presence_penalty));
    set(params.frequency_penalty != 0.0, "frequency_penalty", json!(params.frequency_penalty));
    set(!params.logit_bias.is_empty(), "logit_bias", bias(params));
    let allowed = &params.allowed_token_ids;
    set(allowed.is_some(), "allowed_token_ids", json!(allowed));
    set(params.min_tokens > 0, "min_tokens", json!(params.min_tokens));
    set(params.ignore_eos, "ignore_eos", json!(true));
    set(!params.stop_token_ids.is_empty(), "stop_token_ids", json!(params.stop_token_ids));
    set(params.top_logprobs > 0, "return_tokens_as_token_ids", json!(true));
    set(params.prompt_logprobs.is_some(), "prompt_logprobs", json!(params.prompt_logprobs));
    set(request.priority != 0, "priority", json!(request.priority));
    set(request.cache_salt.is_some(), "cache_salt", json!(request.cache_salt));
    if let Some(grammar) = &params.grammar {
        let (name, value) = structure(grammar);
        set(true, name, value);
    }
    fields
}

fn bias(params: &SamplingParams) -> Value {
    let pairs = params.logit_bias.iter().map(|(id, bias)| (id.to_string(), json!(bias)));
    Value::Object(pairs.collect::<Map<_, _>>())
}

fn structure(grammar: &Grammar) -> (&'static str, Value) {
    match grammar {
        Grammar::JsonObject => ("response_format", json!({"type": "json_object"})),
        Grammar::JsonSchema(schema) => {
            let named = json!({"name": "schema", "schema": schema});
            ("response_format", json!({"type": "json_schema", "json_schema": named}))
        }
        Grammar::Regex(regex) => ("structured_outputs", json!({"regex": regex})),
        Grammar::Choice(choice) => ("structured_outputs", json!({"choice": choice})),
        // Refused by `check`.
        Grammar::Lark(lark) => ("structured_outputs", json!({"grammar": lark})),
    }
}

#[derive(Deserialize)]
struct Completion {
    choices: Vec<Choice>,
    #[serde(default)]
    weight_version: Value,
}

#[derive(Deserialize)]
struct Choice {
    index: usize,
    finish_reason: Option<String>,
    token_ids: Option<Vec<u32>>,
    logprobs: Option<Logprobs>,
    policy: Option<Policy>,
    prompt_logprobs: Option<Vec<Option<HashMap<u32, Ranked>>>>,
}

#[derive(Deserialize)]
struct Logprobs {
    token_logprobs: Vec<Option<f32>>,
    #[serde(default)]
    top_logprobs: Option<Vec<Option<HashMap<String, f32>>>>,
}

/// This project's extension.
#[derive(Deserialize)]
struct Policy {
    entropy: Vec<Option<f32>>,
    baseline: Vec<Option<f32>>,
    weight_version: Vec<Option<u64>>,
}

#[derive(Deserialize)]
struct Ranked {
    logprob: f32,
    rank: Option<usize>,
}

pub(super) fn parse(text: &[u8], request: &Request, version: u64) -> Result<Answer, String> {
    let mut answer: Completion = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    answer.choices.sort_by_key(|choice| choice.index);
    if answer.choices.iter().enumerate().any(|(place, choice)| choice.index != place) {
        return Err("the choices are not numbered from 0".into());
    }
    let wanted = request.params.prompt_logprobs.zip(answer.choices.first_mut());
    let prompt = wanted.map(|(count, choice)| {
        let logprobs = choice.prompt_logprobs.take().ok_or("no prompt_logprobs")?;
        prompt_tokens(&request.prompt, &logprobs, count)
    });
    let prompt = prompt.transpose()?;
    let samples = answer.choices.into_iter().map(|choice| sample(choice, request, version));
    let samples = samples.collect::<Result<_, _>>()?;
    Ok(Answer { prompt, samples, told: told(&answer.weight_version) })
}

fn sample(choice: Choice, request: &Request, version: u64) -> Result<Sample, String> {
    let ids = choice
        .token_ids
        .ok_or("the server gives no token_ids; vLLM has them from 0.10.2 on (return_token_ids)")?;
    let logprobs = choice.logprobs.ok_or("no logprobs")?;
    let finish = match choice.finish_reason.as_deref() {
        Some("stop") => FinishReason::Stop,
        Some("length") => FinishReason::Length,
        Some("abort") | None => FinishReason::Abort,
        Some(other) => return Err(format!("unknown finish_reason '{other}'")),
    };
    let columns = [Some(logprobs.token_logprobs.len())]
        .into_iter()
        .chain([choice.policy.as_ref().map(|policy| policy.entropy.len())])
        .chain([choice.policy.as_ref().map(|policy| policy.baseline.len())])
        .chain([choice.policy.as_ref().map(|policy| policy.weight_version.len())]);
    if columns.flatten().any(|len| len != ids.len()) {
        return Err("log-probs and token_ids are not of the same length".into());
    }
    let token = |(place, id): (usize, u32)| {
        let logprob = logprobs.token_logprobs[place].ok_or("a token without a log-prob")?;
        let policy = choice.policy.as_ref();
        let number = |column: fn(&Policy) -> &Vec<Option<f32>>| {
            policy.and_then(|policy| column(policy)[place]).unwrap_or(f32::NAN)
        };
        let stats = TokenStats {
            logprob,
            entropy: number(|policy| &policy.entropy),
            baseline: number(|policy| &policy.baseline),
        };
        let told = policy.and_then(|policy| policy.weight_version[place]);
        let top = top(&logprobs, place, request.params.top_logprobs)?;
        Ok(Token { id, stats, weight_version: told.unwrap_or(version), top })
    };
    let tokens = ids.into_iter().enumerate().map(token);
    Ok(Sample { tokens: tokens.collect::<Result<_, String>>()?, finish })
}

/// The likeliest tokens at a place; their names are `token_id:7`.
fn top(logprobs: &Logprobs, place: usize, count: usize) -> Result<Vec<(u32, f32)>, String> {
    if count == 0 {
        return Ok(Vec::new());
    }
    let all = logprobs.top_logprobs.as_ref().and_then(|all| all.get(place)?.as_ref());
    let named = all.ok_or("no top_logprobs")?.iter().map(|(name, &logprob)| {
        let id = name.strip_prefix("token_id:").and_then(|id| id.parse().ok());
        id.map(|id| (id, logprob)).ok_or_else(|| format!("'{name}' is not of the form token_id:7"))
    });
    Ok(likeliest(named.collect::<Result<_, _>>()?, count))
}

fn prompt_tokens(
    prompt: &[u32],
    logprobs: &[Option<HashMap<u32, Ranked>>],
    count: usize,
) -> Result<Vec<PromptToken>, String> {
    let places = prompt.iter().zip(logprobs).skip(1);
    let token = |(id, ranked): (&u32, &Option<HashMap<u32, Ranked>>)| {
        let ranked = ranked.as_ref()?;
        let own = ranked.get(id)?;
        let top = ranked.iter().map(|(&id, ranked)| (id, ranked.logprob)).collect();
        let rank = own.rank.filter(|_| count > 0);
        Some(PromptToken { logprob: own.logprob, rank, top: likeliest(top, count) })
    };
    let tokens: Option<Vec<PromptToken>> = places.map(token).collect();
    tokens
        .filter(|tokens| tokens.len() + 1 == prompt.len())
        .ok_or_else(|| "prompt_logprobs do not fit the prompt".to_string())
}

pub(super) fn pause(mode: PauseMode, clear_cache: bool) -> Call {
    let mode = match mode {
        PauseMode::Abort => "abort",
        PauseMode::Wait => "wait",
        PauseMode::Keep => "keep",
    };
    Call::bare(format!("/pause?mode={mode}&clear_cache={clear_cache}"))
}

/// prime-rl's and this project's route, then a plain vLLM's.
pub(super) fn load(dir: &Path) -> Vec<Call> {
    let worker = json!({"method": "reload_weights", "kwargs": {"weights_path": dir}});
    vec![
        Call::json("/update_weights", json!({"weight_dir": dir})),
        Call::json("/collective_rpc", worker),
    ]
}

pub(super) fn name_weights(version: u64) -> Vec<Call> {
    let path = "/update_weight_version";
    vec![
        Call::json(path, json!({"new_version": version.to_string()})),
        Call::json(path, json!({"weight_version": version})),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        let params = SamplingParams { n: 2, seed: Some(u64::MAX), ..SamplingParams::default() };
        Request::new(vec![5, 6], params)
    }

    #[test]
    fn a_request_says_what_every_server_needs_and_no_more() {
        let expected = json!({
            "model": "m", "prompt": [5, 6], "n": 2, "max_tokens": 16, "temperature": 1.0,
            "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 0,
            "return_token_ids": true, "seed": -1,
        });
        assert_eq!(body(&request(), "m"), expected);
        let mut request = request();
        request.params.logit_bias = vec![(7, -1.5)];
        request.params.top_logprobs = 2;
        request.params.grammar = Some(Grammar::Regex("a+".into()));
        request.priority = 3;
        let body = body(&request, "m");
        assert_eq!(body["logit_bias"], json!({"7": -1.5}));
        assert_eq!(body["structured_outputs"], json!({"regex": "a+"}));
        assert_eq!(body["return_tokens_as_token_ids"], true);
        assert_eq!((&body["priority"], &body["logprobs"]), (&json!(3), &json!(2)));
    }

    #[test]
    fn a_plain_answer_has_no_entropy() {
        let text = json!({"choices": [
            {"index": 1, "finish_reason": "length", "token_ids": [9],
             "logprobs": {"token_logprobs": [-2.5]}},
            {"index": 0, "finish_reason": "stop", "token_ids": [7, 8],
             "logprobs": {"token_logprobs": [-0.5, -0.25], "tokens": ["a", "b"]}},
        ]});
        let answer = parse(text.to_string().as_bytes(), &request(), 4).unwrap();
        let [first, second] = &answer.samples[..] else { panic!("{answer:?}") };
        assert_eq!((first.finish, second.finish), (FinishReason::Stop, FinishReason::Length));
        assert_eq!((first.tokens[1].id, first.tokens[1].stats.logprob), (8, -0.25));
        assert_eq!(second.tokens[0].weight_version, 4);
        assert!(first.tokens[0].stats.entropy.is_nan() && answer.told.is_none());
    }

    #[test]
    fn our_own_answer_has_all_statistics() {
        let choice = |index| {
            json!({
                "index": index, "finish_reason": "stop", "token_ids": [7],
                "logprobs": {
                    "token_logprobs": [-0.5],
                    "top_logprobs": [{"token_id:3": -0.75, "token_id:7": -0.5, "token_id:9": -3.0}],
                },
                "policy": {"entropy": [1.5], "baseline": [0.125], "discriminator": [0.0],
                           "weight_version": [6]},
                "prompt_logprobs": [null, {"6": {"logprob": -2.0, "rank": 9},
                                           "1": {"logprob": -0.5, "rank": 1}}],
            })
        };
        let text = json!({"weight_version": 5, "choices": [choice(0), choice(1)]}).to_string();
        let mut request = request();
        request.params.top_logprobs = 2;
        request.params.prompt_logprobs = Some(1);
        let answer = parse(text.as_bytes(), &request, 4).unwrap();
        let token = &answer.samples[1].tokens[0];
        let stats = TokenStats { logprob: -0.5, entropy: 1.5, baseline: 0.125 };
        assert_eq!((token.stats, token.weight_version), (stats, 6));
        assert_eq!(token.top, [(7, -0.5), (3, -0.75)]);
        let prompt = PromptToken { logprob: -2.0, rank: Some(9), top: vec![(1, -0.5)] };
        assert_eq!((answer.prompt, answer.told.as_deref()), (Some(vec![prompt]), Some("5")));
    }

    #[test]
    fn answers_that_do_not_fit_are_refused() {
        let refused = |choice: Value| {
            let text = json!({"choices": [choice]}).to_string();
            parse(text.as_bytes(), &request(), 0).unwrap_err()
        };
        let logprobs = json!({"token_logprobs": [-0.5]});
        let choice = json!({"index": 0, "finish_reason": "stop", "logprobs": logprobs});
        assert!(refused(choice).contains("0.10.2"));
        let choice = json!({"index": 0, "token_ids": [1, 2], "logprobs": logprobs});
        assert!(refused(choice).contains("same length"));
        let choice = json!({"index": 1, "token_ids": [1], "logprobs": logprobs});
        assert!(refused(choice).contains("numbered"));
        let none = json!({"token_logprobs": [null]});
        let choice = json!({"index": 0, "token_ids": [1], "logprobs": none});
        assert!(refused(choice).contains("without a log-prob"));
    }
}
