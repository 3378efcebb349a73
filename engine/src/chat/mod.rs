//! Tokenizer, chat template, incremental detokenizer.
//!
//! # Layout
//! - [`ChatTokenizer`]: text to token ids and back; conversations to prompts.
//! - [`Chat`]: a conversation, and how to render it.
//! - [`Detokenizer`]: one token at a time to text, in time linear in the text.
//! - `template`, `python`: the Jinja templates that come with models, as transformers renders them.
//! - [`ToolFormat`], [`CallParser`]: calls of tools in what a model writes.
//! - `bytes`: how a vocabulary spells bytes.

mod bytes;
mod detokenizer;
mod messages;
mod python;
mod template;
mod tools;

pub use detokenizer::Detokenizer;
pub use messages::Chat;
pub use tools::{CallParser, Part, Tool, ToolFormat};

use bytes::Spelling;
use serde_json::{Map, Value};
use std::{collections::HashSet, fmt, sync::Arc};
use template::Templates;
use tokenizers::Tokenizer;

/// Why a conversation or a text could not be turned into tokens, or tokens into text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    /// The model came without a chat template.
    #[error("the model has no chat template; send the whole prompt to /v1/completions instead")]
    NoTemplate,
    /// The template refused the conversation, or does not work.
    #[error("chat template: {0}")]
    Template(String),
    /// The conversation is malformed.
    #[error("{field}: {reason}")]
    Invalid { field: String, reason: String },
    /// The tokenizer failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
}

impl ChatError {
    fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), reason: reason.into() }
    }

    fn tokenizer(error: impl fmt::Display) -> Self {
        Self::Tokenizer(error.to_string())
    }
}

/// The text of the files that Hugging Face keeps a tokenizer in.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenizerFiles<'a> {
    /// `tokenizer.json`.
    pub tokenizer: &'a str,
    /// `tokenizer_config.json`: special tokens, chat template.
    pub tokenizer_config: Option<&'a str>,
    /// `special_tokens_map.json`: special tokens that the former does not name.
    pub special_tokens_map: Option<&'a str>,
    /// `chat_template.jinja`; goes before the template in `tokenizer_config.json`.
    pub chat_template: Option<&'a str>,
}

/// A model's tokenizer and chat template. Cheap to clone.
#[derive(Clone)]
pub struct ChatTokenizer(Arc<Inner>);

struct Inner {
    tokenizer: Tokenizer,
    spelling: Spelling,
    special_ids: HashSet<u32>,
    /// The error is kept for those who ask for chat; completions work without a template.
    templates: Result<Templates, ChatError>,
}

impl fmt::Debug for ChatTokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vocab = self.0.tokenizer.get_vocab_size(true);
        f.debug_struct("ChatTokenizer").field("vocab", &vocab).finish_non_exhaustive()
    }
}

impl ChatTokenizer {
    /// Builds a tokenizer from the text of its files. A template that does not parse is an error
    /// only for [`ChatTokenizer::render`].
    ///
    /// # Errors
    /// A file is not what it should be.
    pub fn from_files(files: &TokenizerFiles<'_>) -> Result<Self, ChatError> {
        let mut tokenizer = Tokenizer::from_bytes(files.tokenizer).map_err(ChatError::tokenizer)?;
        check_added_tokens(&tokenizer, files.tokenizer)?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(ChatError::tokenizer)?;
        let added = tokenizer.get_added_tokens_decoder();
        let special_ids = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id);
        let inner = Inner {
            spelling: Spelling::of(&tokenizer),
            special_ids: special_ids.collect(),
            templates: Templates::from_files(files),
            tokenizer,
        };
        if let Err(error @ ChatError::Template(_)) = &inner.templates {
            tracing::warn!(%error, "chat requests will be refused");
        }
        Ok(Self(Arc::new(inner)))
    }

    /// Token ids of a text. Special tokens in it are recognised; none is added.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ChatError> {
        self.encode_with(text, false)
    }

    /// Token ids of a prompt, with the tokens that the tokenizer puts around a text of its own
    /// (mostly a BOS, or nothing).
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, ChatError> {
        self.encode_with(text, true)
    }

    fn encode_with(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ChatError> {
        let encoding = self.0.tokenizer.encode_fast(text, add_special);
        Ok(encoding.map_err(ChatError::tokenizer)?.get_ids().to_vec())
    }

    /// The text of a token sequence; bytes that are not UTF-8 become U+FFFD, ids without a token
    /// become nothing.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, ChatError> {
        self.0.tokenizer.decode(ids, skip_special).map_err(ChatError::tokenizer)
    }

    /// One token as text, for log-prob listings; empty for an id without a token.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.token_bytes(id)).into_owned()
    }

    /// The bytes that one token stands for; empty for an id without a token.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match self.0.tokenizer.id_to_token(id) {
            Some(token) => self.0.spelling.bytes(&token),
            None => Vec::new(),
        }
    }

    /// True for control tokens such as BOS, EOS and turn markers.
    pub fn is_special(&self, id: u32) -> bool {
        self.0.special_ids.contains(&id)
    }

    /// Applies the chat template.
    ///
    /// # Errors
    /// There is no template, it refuses the conversation, or the conversation is malformed.
    pub fn render(&self, chat: &Chat) -> Result<String, ChatError> {
        self.0.templates.as_ref().map_err(Clone::clone)?.render(chat)
    }

    /// Applies the chat template and encodes the result; the template alone decides about BOS.
    ///
    /// # Errors
    /// Those of [`ChatTokenizer::render`] and [`ChatTokenizer::encode`].
    pub fn encode_chat(&self, chat: &Chat) -> Result<Vec<u32>, ChatError> {
        self.encode(&self.render(chat)?)
    }

    /// How the model writes calls of tools; none if its chat template speaks of a form that is not
    /// known here.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        self.0.templates.as_ref().ok()?.tool_format()
    }

    /// Starts the decoding of a growing token sequence.
    pub fn detokenizer(&self, skip_special: bool) -> Detokenizer {
        Detokenizer::new(self.clone(), skip_special)
    }
}

/// Refuses a file whose added tokens would get other ids than it says: the library numbers tokens
/// that are not in the model's vocabulary on its own.
fn check_added_tokens(tokenizer: &Tokenizer, text: &str) -> Result<(), ChatError> {
    #[derive(serde::Deserialize)]
    struct File {
        #[serde(default)]
        added_tokens: Vec<Entry>,
    }
    #[derive(serde::Deserialize)]
    struct Entry {
        id: u32,
        content: String,
    }
    let file: File = serde_json::from_str(text).map_err(ChatError::tokenizer)?;
    for Entry { id, content } in file.added_tokens {
        let found = tokenizer.token_to_id(&content);
        if found != Some(id) {
            return Err(ChatError::Tokenizer(format!(
                "tokenizer.json gives '{content}' the id {id}, which is not the next free one \
                 ({found:?}); add the token to the model's vocab in the file"
            )));
        }
    }
    Ok(())
}

/// A JSON object from a file's text.
fn parse_object(text: &str, file: &str) -> Result<Map<String, Value>, ChatError> {
    serde_json::from_str(text).map_err(|e| ChatError::Tokenizer(format!("{file}: {e}")))
}

#[cfg(test)]
mod tests;
