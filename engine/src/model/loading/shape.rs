//! The shape of a model, without its weights and its tokenizer.

use super::{LoadError, directory, gguf, hub};
use crate::model::config::ModelConfig;
use serde_json::Value;
use std::path::Path;

/// The shape of the model that [`load`](super::load) would load; `spec` may also be a `config.json`
/// alone.
///
/// # Errors
/// The model cannot be found or read, or is none that this engine runs.
pub fn shape(spec: &str) -> Result<ModelConfig, LoadError> {
    let path = Path::new(spec);
    if path.exists() {
        return of_path(path);
    }
    match hub::ModelId::parse(spec) {
        Some(id) => of_path(&id.fetch(&hub::Hub::from_env())?),
        None => Err(super::not_found(spec)),
    }
}

fn of_path(path: &Path) -> Result<ModelConfig, LoadError> {
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
        return of_text(path);
    }
    let config = path.join("config.json");
    match path.is_dir() {
        true if config.exists() => of_text(&config),
        true => gguf::shape(&directory::only_gguf(path)?),
        false => gguf::shape(path),
    }
}

fn of_text(path: &Path) -> Result<ModelConfig, LoadError> {
    let text = std::fs::read_to_string(path).map_err(LoadError::io(path))?;
    let json: Value =
        serde_json::from_str(&text).map_err(|e| LoadError::corrupt(path, e.to_string()))?;
    ModelConfig::from_hf(&json, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_directory_and_of_its_configuration_alone() {
        let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tiny/llama-tied");
        let whole = super::super::load(tiny).expect("a golden checkpoint").config;
        let of = |spec: &str| shape(spec).expect("a shape");
        assert_eq!(of(tiny).tensor_shapes(), whole.tensor_shapes());
        assert_eq!(of(&format!("{tiny}/config.json")).tensor_shapes(), whole.tensor_shapes());
        assert!(matches!(shape("no such thing"), Err(LoadError::NotFound { .. })));
    }
}
