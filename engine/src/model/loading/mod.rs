//! Loading: a directory, a GGUF file or a hub id becomes a [`Checkpoint`].
//!
//! # Layout
//! - `directory`: Hugging Face's files: configuration, tokenizer, safetensors.
//! - `safetensors`: tensors of one or many shards.
//! - `gguf`: one file with everything; dequantised, and brought into Hugging Face's form.
//! - `describe`: what can be said of a model without its weights. `shape`: its shape alone.
//! - `hub`: a hub id becomes a directory.
//! - `replacement`: weights alone, for a model that runs already.
//! - `tensors`: what the two formats share: names checked, tensors read in parallel.

mod describe;
mod directory;
mod error;
mod gguf;
mod hub;
mod replacement;
mod safetensors;
mod shape;
mod tensors;

pub use describe::{Description, describe};
pub use error::LoadError;
pub use replacement::load_weights;
pub use shape::shape;

use crate::{
    chat::ChatTokenizer,
    device::Placement,
    model::{config::ModelConfig, joined::join},
};
use std::path::Path;

/// A model in memory.
#[derive(Debug)]
pub struct Checkpoint {
    /// What to call it: the last part of its path, or its hub id.
    pub name: String,
    /// Its shape.
    pub config: ModelConfig,
    /// Contiguous, of one type and on one device; exactly [`ModelConfig::tensor_shapes`], in that
    /// order.
    pub tensors: Vec<(String, tch::Tensor)>,
    /// Its tokenizer and chat template.
    pub tokenizer: ChatTokenizer,
    /// What a saved checkpoint has beside its weights.
    pub source: Source,
}

/// The text files that, with weights, make a Hugging Face directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Source {
    /// `config.json`.
    pub config: String,
    /// `tokenizer.json`.
    pub tokenizer: String,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<String>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<String>,
    /// `chat_template.jinja`.
    pub chat_template: Option<String>,
    /// `generation_config.json`.
    pub generation_config: Option<String>,
}

impl Source {
    /// Name and text of every file there is.
    pub fn files(&self) -> Vec<(&'static str, &str)> {
        let optional = [
            ("tokenizer_config.json", &self.tokenizer_config),
            ("special_tokens_map.json", &self.special_tokens_map),
            ("chat_template.jinja", &self.chat_template),
            ("generation_config.json", &self.generation_config),
        ];
        let required = [("config.json", &*self.config), ("tokenizer.json", &*self.tokenizer)];
        let optional =
            optional.into_iter().filter_map(|(name, text)| Some((name, text.as_deref()?)));
        required.into_iter().chain(optional).collect()
    }

    /// The tokenizer that the files describe.
    fn chat_tokenizer(&self) -> Result<ChatTokenizer, LoadError> {
        let files = crate::chat::TokenizerFiles {
            tokenizer: &self.tokenizer,
            tokenizer_config: self.tokenizer_config.as_deref(),
            special_tokens_map: self.special_tokens_map.as_deref(),
            chat_template: self.chat_template.as_deref(),
        };
        ChatTokenizer::from_files(&files).map_err(|error| LoadError::Tokenizer(error.to_string()))
    }
}

/// Loads a model, in f32 on the CPU: a directory (of Hugging Face's form, or holding one `.gguf`
/// file), a `.gguf` file, or a hub id such as `org/name`. Whatever exists as a path is never looked
/// for on the hub.
///
/// # Errors
/// The model cannot be found, read, or run by this engine; the message says what to do.
pub fn load(spec: &str) -> Result<Checkpoint, LoadError> {
    load_to(spec, Placement::NATIVE)
}

/// As [`load`], to another device or in another type. In main memory there is one copy of the
/// weights, in that type, and on a way to a device the tensors that are under way.
///
/// # Errors
/// As [`load`]; or f16 does not hold a number, or the device the weights.
pub fn load_to(spec: &str, placement: Placement) -> Result<Checkpoint, LoadError> {
    let path = Path::new(spec);
    if path.exists() {
        return load_path(path, local_name(path), placement);
    }
    match hub::ModelId::parse(spec) {
        Some(id) => load_path(&id.fetch(&hub::Hub::from_env())?, id.to_string(), placement),
        None => Err(not_found(spec)),
    }
}

fn not_found(spec: &str) -> LoadError {
    LoadError::NotFound {
        spec: spec.to_string(),
        hint: "there is no such path, and it is no hub id like org/name either".to_string(),
    }
}

fn load_path(path: &Path, name: String, placement: Placement) -> Result<Checkpoint, LoadError> {
    let is_gguf = |path: &Path| path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    let mut checkpoint = match path {
        path if path.is_dir() => directory::load(path, name, placement)?,
        path if is_gguf(path) => gguf::load(path, name, placement)?,
        _ => {
            return Err(LoadError::unsupported(
                "model file",
                path.display().to_string(),
                "a .gguf file, or the directory that holds config.json and the safetensors",
            ));
        }
    };
    let joined = join(&mut checkpoint.tensors);
    joined.map_err(|e| LoadError::Tensor { name: "*".into(), reason: e.to_string() })?;
    Ok(checkpoint)
}

/// The last part of a path, without the extension of a file.
fn local_name(path: &Path) -> String {
    let full = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let part = if full.is_dir() { full.file_name() } else { full.file_stem() };
    part.map_or_else(|| "model".to_string(), |name| name.to_string_lossy().into_owned())
}
