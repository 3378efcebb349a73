//! Which version of the weights made which tokens of a sample.

use crate::http::text::PlacedToken;
use serde::{Serialize, Serializer};
use utoipa::ToSchema;

/// Tokens `start..end` of a sample, all made by one version of the weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Span {
    /// Written as text, as vLLM and SGLang do.
    #[serde(serialize_with = "as_text")]
    #[schema(value_type = String)]
    pub version: u64,
    /// The first token.
    pub start: usize,
    /// The token after the last.
    pub end: usize,
}

fn as_text<S: Serializer>(version: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(version)
}

/// The spans of a growing sample. They are contiguous, and neighbours differ in their version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, ToSchema)]
#[serde(transparent)]
pub struct Spans(Vec<Span>);

impl Spans {
    /// Those of a whole sample.
    pub fn of(tokens: &[PlacedToken]) -> Self {
        let mut spans = Self::default();
        spans.extend(tokens);
        spans
    }

    /// Appends later tokens.
    pub fn extend(&mut self, tokens: &[PlacedToken]) {
        for placed in tokens {
            let version = placed.token.weight_version;
            let start = self.0.last().map_or(0, |span| span.end);
            match self.0.last_mut().filter(|span| span.version == version) {
                Some(span) => span.end += 1,
                None => self.0.push(Span { version, start, end: start + 1 }),
            }
        }
    }

    /// Version of the last token.
    pub fn last_version(&self) -> Option<u64> {
        self.0.last().map(|span| span.version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use onpolicy_plugin_api::{Token, TokenStats};
    use serde_json::json;

    fn placed(weight_version: u64) -> PlacedToken {
        let token = Token { id: 0, stats: TokenStats::default(), weight_version, top: vec![] };
        PlacedToken { token, offset: 0 }
    }

    #[test]
    fn spans_cover_all_tokens_and_join_equal_neighbours() {
        let tokens: Vec<_> = [3, 3, 4, 4, 4, 6].into_iter().map(placed).collect();
        let whole = Spans::of(&tokens);
        let expected = json!([
            {"version": "3", "start": 0, "end": 2},
            {"version": "4", "start": 2, "end": 5},
            {"version": "6", "start": 5, "end": 6},
        ]);
        assert_eq!(serde_json::to_value(&whole).unwrap(), expected);
        assert_eq!(whole.last_version(), Some(6));
        let mut grown = Spans::default();
        for piece in tokens.chunks(1) {
            grown.extend(piece);
        }
        assert_eq!(grown, whole);
        assert_eq!(Spans::of(&[]).last_version(), None);
    }
}
