//! A model's vocabulary as llguidance reads it: a trie of the tokens' bytes.

use crate::chat::ChatTokenizer;
use toktrie::{TokRxInfo, TokTrie, TokenId, TokenizerEnv};

/// Longest token in the trie, in bytes; longer ones are never drawn under a grammar.
const MAX_TOKEN_BYTES: usize = 1000;
/// Texts that tell whether the tokenizer spells a text in the bytes of its tokens.
const PROBES: [&str; 4] = ["a", " b", "{\"name\": \"x\"}\n", "é\t\u{1F600}"];

/// A trie of tokens, and the tokenizer that they are from.
pub struct Vocabulary {
    trie: TokTrie,
    tokenizer: ChatTokenizer,
    /// The tokenizer puts nothing of its own into a text.
    exact: bool,
}

/// The vocabulary of a tokenizer, for a model with `vocab_size` logits.
pub fn of(tokenizer: &ChatTokenizer, vocab_size: usize, eos_token_ids: &[u32]) -> Vocabulary {
    let spelled = |id: u32| {
        let bytes = tokenizer.token_bytes(id);
        let special = tokenizer.is_special(id) || eos_token_ids.contains(&id);
        match bytes.len() {
            0 => bytes,
            len if len > MAX_TOKEN_BYTES => Vec::new(),
            _ if special => [vec![TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
            _ => bytes,
        }
    };
    let words: Vec<Vec<u8>> = (0..vocab_size as u32).map(spelled).collect();
    let info = TokRxInfo::new(vocab_size as u32, eos_token_ids[0]);
    let trie = TokTrie::from(&info, &words).with_eos_tokens(eos_token_ids);
    let exact = PROBES.iter().all(|text| spells(tokenizer, text));
    Vocabulary { trie, tokenizer: tokenizer.clone(), exact }
}

fn spells(tokenizer: &ChatTokenizer, text: &str) -> bool {
    let ids = tokenizer.encode(text).unwrap_or_default();
    let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).collect();
    bytes == text.as_bytes()
}

impl Vocabulary {
    /// The tokenizer's own ids of a text that is no special token.
    fn encode(&self, text: &str) -> Vec<TokenId> {
        match self.tokenizer.encode(text) {
            Ok(ids) if !ids.iter().any(|id| self.trie.is_special_token(*id)) => ids,
            _ => self.trie.greedy_tokenize(text.as_bytes()),
        }
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| self.encode(text))
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.exact
    }
}
