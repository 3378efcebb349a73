//! `POST /tokenize` and `POST /detokenize`.

use super::body::{Fields, JsonBytes};
use super::error::ApiError;
use super::fields::{check_ids, check_model};
use super::openapi::errors;
use super::prompt::{Prompt, encode_chat, take_chat};
use super::tools::take_offered;
use super::{AppState, Shared, neutral};
use crate::chat::ChatError;
use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

/// Answer of `/detokenize`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Text {
    prompt: String,
}

/// Answer of `/tokenize`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Tokens {
    count: usize,
    max_model_len: usize,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

/// Answers `/tokenize`: `prompt` or `messages` in, token ids out.
///
/// # Errors
/// 400 naming the field that is wrong.
#[utoipa::path(
    post, path = "/tokenize", operation_id = "tokenize", tag = "tokens",
    request_body = ref("#/components/schemas/TokenizeRequest"),
    responses((status = 200, description = "Token ids", body = Tokens), errors::Body),
)]
pub async fn tokenize(State(state): Shared, body: JsonBytes) -> Result<Json<Tokens>, ApiError> {
    state.off_thread(move |state| ids_of(body.fields()?, state)).await.map(Json)
}

pub(super) fn ids_of(mut fields: Fields, state: &AppState) -> Result<Tokens, ApiError> {
    check_model(&mut fields, &state.info)?;
    let strings = fields.take_or("return_token_strs", false)?;
    let prompt: Option<String> = fields.take("prompt")?;
    let special: Option<bool> = fields.take("add_special_tokens")?;
    let tokens = match prompt {
        Some(text) => {
            fields.finish()?;
            Prompt::Text(text).encode(special.unwrap_or(true), state)?
        }
        None if special == Some(true) => {
            let rule = "a chat template writes its own special tokens; leave it out";
            return Err(ApiError::invalid("add_special_tokens", rule));
        }
        None => {
            let mut chat = take_chat(&mut fields)?;
            chat.tools = take_offered(&mut fields)?;
            neutral::check_tokenize(&mut fields)?;
            fields.finish()?;
            encode_chat(&chat, state)?
        }
    };
    let names = || tokens.iter().map(|id| state.tokenizer.token_text(*id)).collect();
    let token_strs = strings.then(names);
    let max_model_len = state.info.max_model_len;
    Ok(Tokens { count: tokens.len(), max_model_len, tokens, token_strs })
}

/// Answers `/detokenize`: token ids in, `prompt` out, special tokens included.
///
/// # Errors
/// 400 naming the field that is wrong.
#[utoipa::path(
    post, path = "/detokenize", operation_id = "detokenize", tag = "tokens",
    request_body = ref("#/components/schemas/DetokenizeRequest"),
    responses((status = 200, description = "Text", body = Text), errors::Body),
)]
pub async fn detokenize(State(state): Shared, body: JsonBytes) -> Result<Json<Text>, ApiError> {
    state.off_thread(move |state| text_of(body.fields()?, state)).await.map(Json)
}

pub(super) fn text_of(mut fields: Fields, state: &AppState) -> Result<Text, ApiError> {
    check_model(&mut fields, &state.info)?;
    let tokens: Vec<u32> = fields.require("tokens")?;
    fields.finish()?;
    check_ids("tokens", &tokens, &state.info)?;
    let wrong = |e: ChatError| ApiError::invalid("tokens", e.to_string());
    let prompt = state.tokenizer.decode(&tokens, false).map_err(wrong)?;
    Ok(Text { prompt })
}
