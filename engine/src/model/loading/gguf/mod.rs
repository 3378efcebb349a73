//! One GGUF file: metadata becomes configuration and tokenizer, quantised tensors become f32.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

mod config;
mod header;
mod names;
mod tokenizer;
mod values;
mod weights;

use super::{Checkpoint, LoadError, Source};
use crate::{device::Placement, model::config::ModelConfig};
use header::Header;
use std::{fs::File, path::Path};

/// Loads the model in a GGUF file.
pub(super) fn load(
    path: &Path,
    name: String,
    placement: Placement,
) -> Result<Checkpoint, LoadError> {
    let file = File::open(path).map_err(LoadError::io(path))?;
    let header = Header::read(&file, path)?;
    let weights = weights::Weights { path, file: &file, header: &header };
    let config = config::model_config(&header, &weights)?;
    let source = source(&header, &config)?;
    let tokenizer = source.chat_tokenizer()?;
    let tensors = weights.load(&config, placement)?;
    Ok(Checkpoint { name, config, tensors, tokenizer, source })
}

/// Reads everything but the tensors.
pub(super) fn describe(path: &Path) -> Result<(ModelConfig, Source), LoadError> {
    let file = File::open(path).map_err(LoadError::io(path))?;
    let header = Header::read(&file, path)?;
    let config =
        config::model_config(&header, &weights::Weights { path, file: &file, header: &header })?;
    let source = source(&header, &config)?;
    Ok((config, source))
}

fn source(header: &Header, config: &ModelConfig) -> Result<Source, LoadError> {
    let vocabulary = tokenizer::Vocabulary::from_metadata(&header.metadata)?;
    Ok(Source {
        config: pretty(&config.to_hf()),
        tokenizer: vocabulary.tokenizer_json()?.to_string(),
        tokenizer_config: Some(pretty(&vocabulary.tokenizer_config(config))),
        special_tokens_map: None,
        chat_template: None,
        generation_config: Some(pretty(&vocabulary.generation_config(config))),
    })
}

/// JSON for people to read.
fn pretty(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}
