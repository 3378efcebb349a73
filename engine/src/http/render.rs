//! `POST /v1/chat/completions/render` and `POST /v1/completions/render`: what would be generated
//! from, as the body of a request to `/inference/v1/generate`.

use super::answer::Meta;
use super::body::JsonBytes;
use super::error::ApiError;
use super::generation::Job;
use super::openapi::errors;
use super::text::TextRules;
use super::{AppState, Shared, chat_completions, completions};
use crate::chat::ChatTokenizer;
use axum::Json;
use axum::extract::State;
use onpolicy_plugin_api::{Grammar, Request, SamplingParams};
use serde_json::{Map, Value, json};

/// Answers `/v1/chat/completions/render`: one request.
///
/// # Errors
/// As the route itself.
#[utoipa::path(
    post, path = "/v1/chat/completions/render", operation_id = "render_chat", tag = "tokens",
    request_body = ref("#/components/schemas/ChatCompletionRequest"),
    responses(
        (status = 200, description = "A body for /inference/v1/generate", body = Object),
        errors::Body,
    ),
)]
pub async fn chat(State(state): Shared, body: JsonBytes) -> Result<Json<Value>, ApiError> {
    let render = move |state: &AppState| {
        let preview = chat_completions::preview(body.fields()?, state)?;
        Ok(rendered(&preview, state).swap_remove(0))
    };
    state.off_thread(render).await.map(Json)
}

/// Answers `/v1/completions/render`: one request for each prompt.
///
/// # Errors
/// As the route itself.
#[utoipa::path(
    post, path = "/v1/completions/render", operation_id = "render_completions", tag = "tokens",
    request_body = ref("#/components/schemas/CompletionRequest"),
    responses(
        (status = 200, description = "Bodies for /inference/v1/generate", body = Vec<Object>),
        errors::Body,
    ),
)]
pub async fn completions(State(state): Shared, body: JsonBytes) -> Result<Json<Value>, ApiError> {
    let render = move |state: &AppState| {
        let preview = completions::preview(body.fields()?, state)?;
        Ok(Value::Array(rendered(&preview, state)))
    };
    state.off_thread(render).await.map(Json)
}

fn rendered((job, meta, logprobs): &(Job, Meta, bool), state: &AppState) -> Vec<Value> {
    let several = job.requests.len() > 1;
    let one = |(i, request): (usize, &Request)| {
        let mut params = sampling_params(&request.params, &state.tokenizer);
        if *logprobs {
            params.insert("logprobs".into(), json!(request.params.top_logprobs));
        }
        text_rules(&mut params, &job.rules);
        json!({
            "request_id": if several { format!("{}-{i}", meta.id) } else { meta.id.clone() },
            "token_ids": request.prompt,
            "features": null,
            "sampling_params": params,
            "model": meta.model,
            "stream": meta.stream,
            "cache_salt": request.cache_salt,
            "priority": request.priority,
        })
    };
    job.requests.iter().enumerate().map(one).collect()
}

/// The parameters by vLLM's names; those that change nothing are left out.
fn sampling_params(params: &SamplingParams, tokenizer: &ChatTokenizer) -> Map<String, Value> {
    let none = SamplingParams::default();
    let mut fields = Map::new();
    let mut add = |name: &str, differs: bool, value: Value| {
        if differs {
            fields.insert(name.into(), value);
        }
    };
    let p = params;
    add("n", true, json!(p.n));
    add("temperature", true, short(p.temperature));
    add("top_p", p.top_p != none.top_p, short(p.top_p));
    add("top_k", p.top_k != none.top_k, json!(p.top_k));
    add("min_p", p.min_p != none.min_p, short(p.min_p));
    add("repetition_penalty", p.repetition_penalty != 1.0, short(p.repetition_penalty));
    add("presence_penalty", p.presence_penalty != 0.0, short(p.presence_penalty));
    add("frequency_penalty", p.frequency_penalty != 0.0, short(p.frequency_penalty));
    let bias = p.logit_bias.iter().map(|(id, bias)| (id.to_string(), short(*bias)));
    add("logit_bias", !p.logit_bias.is_empty(), Value::Object(bias.collect()));
    add("allowed_token_ids", p.allowed_token_ids.is_some(), json!(p.allowed_token_ids));
    let words = p.bad_words.iter().filter_map(|ids| tokenizer.decode(ids, false).ok());
    let mut words: Vec<String> = words.map(|word| word.trim_start().to_string()).collect();
    words.dedup();
    add("bad_words", !words.is_empty(), json!(words));
    add("structured_outputs", p.grammar.is_some(), p.grammar.as_ref().map_or(Value::Null, grammar));
    add("seed", p.seed.is_some(), json!(p.seed));
    add("max_tokens", true, json!(p.max_tokens));
    add("min_tokens", p.min_tokens > 0, json!(p.min_tokens));
    add("ignore_eos", p.ignore_eos, json!(true));
    add("stop_token_ids", !p.stop_token_ids.is_empty(), json!(p.stop_token_ids));
    add("prompt_logprobs", p.prompt_logprobs.is_some(), json!(p.prompt_logprobs));
    fields
}

/// A number as it was sent, without the digits that more bits would have.
fn short(number: f32) -> Value {
    json!(number.to_string().parse::<f64>().unwrap_or(f64::from(number)))
}

fn grammar(grammar: &Grammar) -> Value {
    match grammar {
        Grammar::JsonObject => json!({ "json_object": true }),
        Grammar::JsonSchema(schema) => json!({ "json": schema }),
        Grammar::Regex(regex) => json!({ "regex": regex }),
        Grammar::Choice(texts) => json!({ "choice": texts }),
        Grammar::Lark(text) => json!({ "grammar": text }),
    }
}

fn text_rules(fields: &mut Map<String, Value>, rules: &TextRules) {
    if !rules.stop.is_empty() {
        fields.insert("stop".into(), json!(rules.stop));
    }
    if rules.include_stop {
        fields.insert("include_stop_str_in_output".into(), json!(true));
    }
    if !rules.skip_special {
        fields.insert("skip_special_tokens".into(), json!(false));
    }
}
