//! A directory: Hugging Face's files, or one GGUF.

use super::{Checkpoint, LoadError, Source, gguf, safetensors};
use crate::{device::Placement, model::config::ModelConfig};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Loads the model in `dir`.
pub(super) fn load(
    dir: &Path,
    name: String,
    placement: Placement,
) -> Result<Checkpoint, LoadError> {
    let Some(source) = source(dir)? else {
        return gguf::load(&only_gguf(dir)?, name, placement);
    };
    let parse = |file: &str, text: &str| -> Result<Value, LoadError> {
        serde_json::from_str(text).map_err(|e| LoadError::corrupt(&dir.join(file), e.to_string()))
    };
    let generation = source.generation_config.as_deref();
    let generation = generation.map(|text| parse("generation_config.json", text)).transpose()?;
    let config = ModelConfig::from_hf(&parse("config.json", &source.config)?, generation.as_ref())?;
    let tokenizer = source.chat_tokenizer()?;
    let tensors = safetensors::load(dir, &config, placement)?;
    Ok(Checkpoint { name, config, tensors, tokenizer, source })
}

/// The text files of a directory of Hugging Face's form; none if it has no `config.json`.
pub(super) fn source(dir: &Path) -> Result<Option<Source>, LoadError> {
    let Some(config) = read_optional(dir, "config.json")? else { return Ok(None) };
    let no_tokenizer = || {
        LoadError::Tokenizer(format!(
            "{} has no tokenizer.json; write one with transformers: \
             AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            dir.display()
        ))
    };
    Ok(Some(Source {
        config,
        tokenizer: read_optional(dir, "tokenizer.json")?.ok_or_else(no_tokenizer)?,
        tokenizer_config: read_optional(dir, "tokenizer_config.json")?,
        special_tokens_map: read_optional(dir, "special_tokens_map.json")?,
        chat_template: read_optional(dir, "chat_template.jinja")?,
        generation_config: read_optional(dir, "generation_config.json")?,
    }))
}

/// The text of a file that may be absent.
pub(super) fn read_optional(dir: &Path, file: &str) -> Result<Option<String>, LoadError> {
    let path = dir.join(file);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(LoadError::io(&path)(error)),
    }
}

/// The one GGUF file of a directory without `config.json`.
pub(super) fn only_gguf(dir: &Path) -> Result<PathBuf, LoadError> {
    let entries = std::fs::read_dir(dir).map_err(LoadError::io(dir))?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut files: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|e| e == "gguf")).collect();
    let hint = match files.len() {
        1 => return Ok(files.remove(0)),
        0 => "the directory has neither config.json nor a .gguf file",
        _ => "the directory has several .gguf files; name one of them",
    };
    Err(LoadError::NotFound { spec: dir.display().to_string(), hint: hint.to_string() })
}
