//! One GGUF file: metadata becomes configuration and tokenizer, quantised tensors become f32.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

mod config;
mod header;
mod names;
mod tokenizer;
mod values;
mod weights;

use super::{Checkpoint, Description, LoadError, Source};
use crate::{device::Placement, model::config::ModelConfig};
use header::Header;
use std::{fs::File, path::Path};
use tokenizer::{Bounds, Vocabulary};

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
    let bounds = Bounds {
        bos: config.bos_token_id,
        eos: config.eos_token_ids.clone(),
        max_length: config.max_position_embeddings,
    };
    let texts = texts(&header, &bounds)?;
    let source = Source { config: pretty(&config.to_hf()), ..texts };
    let tokenizer = source.chat_tokenizer()?;
    let tensors = weights.load(&config, placement)?;
    Ok(Checkpoint { name, config, tensors, tokenizer, source })
}

/// Reads the model's shape.
pub(super) fn shape(path: &Path) -> Result<ModelConfig, LoadError> {
    let file = File::open(path).map_err(LoadError::io(path))?;
    let header = Header::read(&file, path)?;
    config::model_config(&header, &weights::Weights { path, file: &file, header: &header })
}

/// Reads everything but the tensors, of whatever architecture.
pub(super) fn describe(path: &Path, name: String) -> Result<Description, LoadError> {
    let file = File::open(path).map_err(LoadError::io(path))?;
    let header = Header::read(&file, path)?;
    let metadata = &header.metadata;
    let vocab_size = config::vocab_size(&header)?;
    let mut eos = config::end_tokens(metadata)?;
    eos.retain(|&id| (id as usize) < vocab_size);
    let architecture = metadata.text("general.architecture")?.unwrap_or_default();
    let max_model_len = metadata.count(&format!("{architecture}.context_length"))?;
    let bos = metadata.token_id("tokenizer.ggml.bos_token_id")?;
    let bounds = Bounds { bos, eos, max_length: max_model_len };
    let tokenizer = texts(&header, &bounds)?.chat_tokenizer()?;
    let (path, eos_token_ids) = (path.to_path_buf(), bounds.eos);
    Ok(Description { name, path, vocab_size, eos_token_ids, max_model_len, tokenizer })
}

/// The tokenizer's files.
fn texts(header: &Header, bounds: &Bounds) -> Result<Source, LoadError> {
    let vocabulary = Vocabulary::from_metadata(&header.metadata)?;
    Ok(Source {
        tokenizer: vocabulary.tokenizer_json()?.to_string(),
        tokenizer_config: Some(pretty(&vocabulary.tokenizer_config(bounds))),
        generation_config: Some(pretty(&vocabulary.generation_config(bounds))),
        ..Source::default()
    })
}

/// JSON for people to read.
fn pretty(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}
