//! From the tokens of one sample to its text, piece by piece: whole UTF-8 only, and nothing of a
//! stop string before it is known whether it is one.

use super::error::ApiError;
use crate::chat::{ChatTokenizer, Detokenizer};
use onpolicy_plugin_api::Token;
use std::sync::Arc;

/// How tokens become text, and when the text ends a sample.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TextRules {
    /// Strings that end a sample. The match that ends first counts, whatever the token borders.
    pub stop: Vec<String>,
    /// Leave the stop string, or the text of a stop token, in the text.
    pub include_stop: bool,
    /// Leave special tokens out of the text.
    pub skip_special: bool,
    /// Stop strings are looked for in the text that follows this many tokens.
    pub min_tokens: usize,
    /// Tokens that end a sample: their text is left out unless `include_stop`.
    pub stop_tokens: Vec<u32>,
    /// Only tokens are asked for: they go out as they come, and there is no text.
    pub tokens_only: bool,
}

/// A token and where its text begins.
#[derive(Debug, Clone, PartialEq)]
pub struct PlacedToken {
    /// The token as the engine made it.
    pub token: Token,
    /// Begin of its text within the sample's text, in Unicode characters.
    pub offset: usize,
}

/// Text that is ready, and the tokens that it is made of.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Piece {
    /// The text; may be empty if the tokens have none.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<PlacedToken>,
}

impl Piece {
    /// True if there is neither text nor token.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty()
    }

    /// Appends a later piece.
    pub fn extend(&mut self, later: Piece) {
        self.text.push_str(&later.text);
        self.tokens.extend(later.tokens);
    }
}

/// A token whose text is held back.
struct Held {
    placed: PlacedToken,
    /// Where its text ends in the held text, in bytes.
    end: usize,
    /// True if the token added no text.
    blank: bool,
}

/// The text of one sample on its way out.
pub struct SampleText {
    rules: Arc<TextRules>,
    detokenizer: Detokenizer,
    /// Text that is not out yet.
    text: String,
    /// The tokens of that text.
    tokens: Vec<Held>,
    /// Tokens pushed so far.
    count: usize,
    /// Characters of text so far, held ones included.
    chars: usize,
}

/// What a push led to: a piece (often empty) and the stop string, if one was completed.
pub type Step = (Piece, Option<String>);

impl SampleText {
    /// A sample without tokens.
    pub fn new(tokenizer: &ChatTokenizer, rules: Arc<TextRules>) -> Self {
        let detokenizer = tokenizer.detokenizer(rules.skip_special);
        let (text, tokens) = (String::new(), Vec::new());
        Self { rules, detokenizer, text, tokens, count: 0, chars: 0 }
    }

    /// Takes the next token.
    ///
    /// # Errors
    /// 500 if the token cannot be turned into text.
    pub fn push(&mut self, token: Token) -> Result<Step, ApiError> {
        if self.rules.tokens_only {
            let tokens = vec![PlacedToken { token, offset: 0 }];
            return Ok((Piece { text: String::new(), tokens }, None));
        }
        let silent = !self.rules.include_stop && self.rules.stop_tokens.contains(&token.id);
        let added = if silent { String::new() } else { self.detokenizer.push(token.id)? };
        let placed = PlacedToken { token, offset: self.chars };
        self.append(&added);
        self.tokens.push(Held { placed, end: self.text.len(), blank: added.is_empty() });
        self.count += 1;
        if self.count <= self.rules.min_tokens {
            return Ok((self.release(self.text.len()), None));
        }
        if let Some(step) = self.stopped() {
            return Ok(step);
        }
        let safe = self.text.len() - longest_open_stop(&self.text, &self.rules.stop);
        Ok((self.release(safe), None))
    }

    /// Hands out the rest: the sample has ended.
    ///
    /// # Errors
    /// 500 if the rest cannot be turned into text.
    pub fn finish(&mut self) -> Result<Step, ApiError> {
        let rest = self.detokenizer.finish()?;
        self.append(&rest);
        if let Some(last) = self.tokens.last_mut() {
            last.end = self.text.len();
        }
        let stopped = if self.count > self.rules.min_tokens { self.stopped() } else { None };
        Ok(stopped.unwrap_or_else(|| (self.everything(), None)))
    }

    fn append(&mut self, text: &str) {
        self.text.push_str(text);
        self.chars += text.chars().count();
    }

    /// If the held text holds a stop string: all that comes before, and the string.
    fn stopped(&mut self) -> Option<Step> {
        let (start, end, which) = first_stop(&self.text, &self.rules.stop)?;
        let keep = if self.rules.include_stop { end } else { start };
        self.chars -= self.text[keep..].chars().count();
        self.text.truncate(keep);
        for held in &mut self.tokens {
            held.placed.offset = held.placed.offset.min(self.chars);
        }
        let hit = self.rules.stop[which].clone();
        Some((self.everything(), Some(hit)))
    }

    /// The tokens that lie wholly within the first `safe` bytes, with their text. Tokens stay
    /// whole, and those without text of their own go out with the next that has some.
    fn release(&mut self, safe: usize) -> Piece {
        let ready = |held: &Held| held.end <= safe && !held.blank;
        let Some(last) = self.tokens.iter().rposition(ready) else { return Piece::default() };
        let end = self.tokens[last].end;
        let tokens = self.tokens.drain(..=last).map(|held| held.placed).collect();
        for held in &mut self.tokens {
            held.end -= end;
        }
        let rest = self.text.split_off(end);
        Piece { text: std::mem::replace(&mut self.text, rest), tokens }
    }

    fn everything(&mut self) -> Piece {
        let tokens = self.tokens.drain(..).map(|held| held.placed).collect();
        Piece { text: std::mem::take(&mut self.text), tokens }
    }
}

/// Start, end and number of the stop string that ends first; of several, the one that starts first.
fn first_stop(text: &str, stops: &[String]) -> Option<(usize, usize, usize)> {
    let found = stops.iter().enumerate().filter_map(|(which, stop)| {
        text.find(stop.as_str()).map(|start| (start, start + stop.len(), which))
    });
    found.min_by_key(|(start, end, _)| (*end, *start))
}

/// Length in bytes of the longest end of `text` that a stop string begins with.
fn longest_open_stop(text: &str, stops: &[String]) -> usize {
    let open = |stop: &String| {
        let most = text.len().min(stop.len() - 1);
        let begins = |k: &usize| text.as_bytes().ends_with(&stop.as_bytes()[..*k]);
        (1..=most).rev().find(begins).unwrap_or(0)
    };
    stops.iter().map(open).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(stops: &[&str]) -> Vec<String> {
        stops.iter().map(|s| (*s).to_string()).collect()
    }

    #[test]
    fn the_match_that_ends_first_counts() {
        assert_eq!(first_stop("xabcx", &strings(&["abc", "b"])), Some((2, 3, 1)));
        assert_eq!(first_stop("xabc", &strings(&["c", "bc"])), Some((2, 4, 1)));
        assert_eq!(first_stop("xyz", &strings(&["abc"])), None);
    }

    #[test]
    fn an_open_stop_string_is_measured() {
        assert_eq!(longest_open_stop("say <en", &strings(&["<end>", "nd"])), 3);
        assert_eq!(longest_open_stop("aaa", &strings(&["aaaa"])), 3);
        assert_eq!(longest_open_stop("aaa", &strings(&["a"])), 0);
        assert_eq!(longest_open_stop("", &strings(&["ab"])), 0);
        assert_eq!(longest_open_stop("é", &strings(&["éa"])), 2);
    }
}
