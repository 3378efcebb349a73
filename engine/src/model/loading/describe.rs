//! What can be said of a model without its weights, and of models that only other engines run.

use super::{LoadError, directory, gguf, hub, local_name};
use crate::chat::ChatTokenizer;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A model as an engine elsewhere serves it.
#[derive(Debug)]
pub struct Description {
    /// What to call it: the last part of its path, or its hub id.
    pub name: String,
    /// Its directory, or its GGUF file.
    pub path: PathBuf,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Tokens that end a sample.
    pub eos_token_ids: Vec<u32>,
    /// Longest sequence, in tokens.
    pub max_model_len: usize,
    /// Its tokenizer and chat template.
    pub tokenizer: ChatTokenizer,
}

/// Describes the model that [`load`](super::load) would load, of whatever architecture.
///
/// # Errors
/// The model cannot be found or read, or does not say what is needed.
pub fn describe(spec: &str) -> Result<Description, LoadError> {
    let path = Path::new(spec);
    if path.exists() {
        return describe_path(path, local_name(path));
    }
    match hub::ModelId::parse(spec) {
        Some(id) => describe_path(&id.fetch(&hub::Hub::from_env())?, id.to_string()),
        None => Err(super::not_found(spec)),
    }
}

fn describe_path(path: &Path, name: String) -> Result<Description, LoadError> {
    if !path.is_dir() {
        return gguf::describe(path, name);
    }
    let Some(source) = directory::source(path)? else {
        return gguf::describe(&directory::only_gguf(path)?, name);
    };
    let parse = |file: &str, text: &str| -> Result<Value, LoadError> {
        serde_json::from_str(text).map_err(|e| LoadError::corrupt(&path.join(file), e.to_string()))
    };
    let config = parse("config.json", &source.config)?;
    let generation = source.generation_config.as_deref();
    let generation = generation.map(|text| parse("generation_config.json", text)).transpose()?;
    // Models for pictures and text keep the keys of the text part apart.
    let key = |name: &str| config.get(name).or_else(|| config.get("text_config")?.get(name));
    let count = |name: &str| {
        let count = key(name).and_then(Value::as_u64).map(|count| count as usize);
        count.ok_or_else(|| LoadError::config(name, "is missing or no number"))
    };
    let eos = generation.as_ref().and_then(|generation| generation.get("eos_token_id"));
    Ok(Description {
        name,
        path: path.to_path_buf(),
        vocab_size: count("vocab_size")?,
        eos_token_ids: ids(eos.or_else(|| key("eos_token_id"))),
        max_model_len: count("max_position_embeddings")?,
        tokenizer: source.chat_tokenizer()?,
    })
}

/// One id, a list of them, or none.
fn ids(value: Option<&Value>) -> Vec<u32> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(one).collect(),
        Some(value) => one(value).into_iter().collect(),
        None => Vec::new(),
    }
}
