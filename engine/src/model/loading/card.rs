//! What a model says beside its weights: enough to serve it by an engine that reads the weights on
//! its own, whatever the architecture.

use super::{LoadError, directory, find, gguf};
use crate::{chat::ChatTokenizer, model::config::vocabulary};
use std::path::{Path, PathBuf};

/// A model without its weights.
#[derive(Debug, Clone)]
pub struct Card {
    /// What to call it: the last part of its path, or its hub id.
    pub name: String,
    /// Its directory, or its GGUF file.
    pub path: PathBuf,
    /// Its tokenizer and chat template.
    pub tokenizer: ChatTokenizer,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

/// Reads all of a model but its weights. `spec` is as for [`load`](super::load).
///
/// # Errors
/// The model cannot be found or read, or its tokenizer cannot be built.
pub fn card(spec: &str) -> Result<Card, LoadError> {
    let (path, name) = find(spec)?;
    if path.is_dir() { of_directory(&path, name) } else { gguf::card(&path, name) }
}

fn of_directory(dir: &Path, name: String) -> Result<Card, LoadError> {
    let Some(source) = directory::source(dir)? else {
        return gguf::card(&directory::only_gguf(dir)?, name);
    };
    let (config, generation) = directory::settings(dir, &source)?;
    let (vocab_size, eos_token_ids) = vocabulary(&config, generation.as_ref())?;
    let tokenizer = source.chat_tokenizer()?;
    Ok(Card { name, path: dir.into(), tokenizer, vocab_size, eos_token_ids })
}
