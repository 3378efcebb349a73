//! One token at a time to text.

use super::{ChatError, ChatTokenizer, bytes::Spelling};

/// Tokens of one unfinished character at most: UTF-8 needs no more than four bytes.
const MAX_PENDING: usize = 4;

/// Decodes a growing token sequence. Text comes out as soon as it can no longer change, in whole
/// characters; each token costs the same however long the sequence is.
pub struct Detokenizer {
    tokenizer: ChatTokenizer,
    skip_special: bool,
    state: State,
}

enum State {
    /// Tokens are bytes; these are the last ones, of a character that is not complete.
    Bytes(Vec<u8>),
    /// Tokens mean different things after one another: `ids` is the last piece of text that was
    /// given out (`ids[..read]`, for context) and the tokens after it.
    Window { ids: Vec<u32>, read: usize },
}

impl Detokenizer {
    pub(super) fn new(tokenizer: ChatTokenizer, skip_special: bool) -> Self {
        let state = match tokenizer.0.spelling {
            Spelling::ByteLevel => State::Bytes(Vec::new()),
            _ => State::Window { ids: Vec::new(), read: 0 },
        };
        Self { tokenizer, skip_special, state }
    }

    /// Takes the next token and returns the text that it completes, which may be none.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn push(&mut self, id: u32) -> Result<String, ChatError> {
        let tokenizer = &self.tokenizer;
        let skipped = self.skip_special && tokenizer.is_special(id);
        if skipped || tokenizer.0.tokenizer.id_to_token(id).is_none() {
            return Ok(String::new());
        }
        match &mut self.state {
            State::Bytes(pending) => {
                pending.extend(tokenizer.token_bytes(id));
                Ok(take_complete(pending))
            }
            State::Window { ids, read } => {
                ids.push(id);
                let fresh = fresh_text(tokenizer, ids, *read)?;
                let incomplete = fresh.ends_with('\u{FFFD}') && ids.len() - *read < MAX_PENDING;
                if incomplete || fresh.is_empty() {
                    return Ok(String::new());
                }
                ids.drain(..*read);
                *read = ids.len();
                Ok(fresh)
            }
        }
    }

    /// The rest of the text; an incomplete character becomes U+FFFD.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn finish(&mut self) -> Result<String, ChatError> {
        match &mut self.state {
            State::Bytes(pending) => {
                let rest = String::from_utf8_lossy(pending).into_owned();
                pending.clear();
                Ok(rest)
            }
            State::Window { ids, read } => {
                let rest = fresh_text(&self.tokenizer, ids, *read)?;
                *read = ids.len();
                Ok(rest)
            }
        }
    }
}

/// The text that `ids[read..]` adds to that of `ids[..read]`.
fn fresh_text(tokenizer: &ChatTokenizer, ids: &[u32], read: usize) -> Result<String, ChatError> {
    let context = tokenizer.decode(&ids[..read], false)?;
    let whole = tokenizer.decode(ids, false)?;
    match whole.strip_prefix(&context) {
        Some(fresh) => Ok(fresh.to_string()),
        // Stray bytes can spoil the decoding of what stands before them.
        None => tokenizer.decode(&ids[read..], false),
    }
}

/// Takes everything but an incomplete last character out of `pending`. What is not UTF-8 becomes
/// U+FFFD, just as if the whole text were decoded at once.
fn take_complete(pending: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(pending.len());
    let mut used = 0;
    for chunk in pending.utf8_chunks() {
        text.push_str(chunk.valid());
        used += chunk.valid().len();
        let invalid = chunk.invalid();
        if invalid.is_empty() || is_unfinished(invalid, used, pending.len()) {
            break;
        }
        text.push('\u{FFFD}');
        used += invalid.len();
    }
    pending.drain(..used);
    text
}

/// True if `invalid`, at `start` of `length` bytes, is the beginning of a character whose end may
/// still come.
fn is_unfinished(invalid: &[u8], start: usize, length: usize) -> bool {
    let at_end = start + invalid.len() == length;
    at_end && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none())
}
