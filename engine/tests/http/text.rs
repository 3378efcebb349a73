//! Token by token against the whole text at once.

use crate::tokenizer::{BOS, HELLO, bytes, tokenizer};
use onpolicy_engine::http::text::{Piece, SampleText, TextRules};
use onpolicy_plugin_api::{Token, TokenStats};
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

const LETTERS: [&str; 6] = ["a", "b", "é", "😀", "hello", "lo"];

fn word(rng: &mut ChaCha8Rng, most: usize) -> String {
    (0..rng.random_range(1..=most)).map(|_| *LETTERS.choose(rng).unwrap()).collect()
}

fn token(id: u32) -> Token {
    Token { id, stats: TokenStats::default(), weight_version: 0, top: Vec::new() }
}

/// Text of each token on its own, as much of it as is whole.
fn tokens(rng: &mut ChaCha8Rng) -> Vec<u32> {
    let mut ids = Vec::new();
    for _ in 0..rng.random_range(1..12) {
        match rng.random_range(0..8) {
            0 => ids.push(BOS),
            1 => ids.push(HELLO),
            _ => ids.extend(bytes(LETTERS.choose(rng).unwrap())),
        }
    }
    ids
}

/// The shortest beginning of `ids` whose text holds a stop string: how many tokens it has, and the
/// text before the stop string.
fn oracle(ids: &[u32], stops: &[String]) -> (usize, String) {
    let tokenizer = tokenizer();
    for count in 1..=ids.len() {
        let text = tokenizer.decode(&ids[..count], true).unwrap();
        let found = stops.iter().filter_map(|stop| Some((text.find(stop.as_str())?, stop.len())));
        if let Some((start, _)) = found.min_by_key(|(start, len)| (start + len, *start)) {
            return (count, text[..start].to_string());
        }
    }
    (ids.len(), tokenizer.decode(ids, true).unwrap())
}

/// Pushes tokens until a stop string; what came out, in pieces.
fn stream(ids: &[u32], stop: &[String]) -> Vec<Piece> {
    let rules = TextRules { stop: stop.to_vec(), skip_special: true, ..TextRules::default() };
    let mut sample = SampleText::new(&tokenizer(), Arc::new(rules));
    let mut pieces = Vec::new();
    for id in ids {
        let (piece, hit) = sample.push(token(*id)).unwrap();
        pieces.push(piece);
        if hit.is_some() {
            return pieces;
        }
    }
    pieces.push(sample.finish().unwrap().0);
    pieces
}

#[test]
fn streamed_text_is_the_whole_text_up_to_the_first_stop_string() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut stopped = 0;
    for round in 0..3000 {
        let ids = tokens(&mut rng);
        let stops: Vec<String> = (0..rng.random_range(0..3)).map(|_| word(&mut rng, 3)).collect();
        let (count, text) = oracle(&ids, &stops);
        let pieces = stream(&ids, &stops);
        let said: String = pieces.iter().map(|piece| piece.text.as_str()).collect();
        assert_eq!(said, text, "round {round}: {ids:?} {stops:?}");
        let placed: Vec<_> = pieces.iter().flat_map(|piece| &piece.tokens).collect();
        let out: Vec<u32> = placed.iter().map(|placed| placed.token.id).collect();
        assert_eq!(out, ids[..count], "round {round}");
        let length = text.chars().count();
        assert!(placed.is_sorted_by_key(|placed| placed.offset), "round {round}");
        assert!(placed.iter().all(|placed| placed.offset <= length), "round {round}");
        let mut before = 0;
        for piece in &pieces {
            assert!(piece.tokens.first().is_none_or(|t| t.offset == before), "round {round}");
            before += piece.text.chars().count();
        }
        stopped += usize::from(count < ids.len());
    }
    assert!((500..2500).contains(&stopped), "{stopped} of 3000 rounds stopped early");
}
