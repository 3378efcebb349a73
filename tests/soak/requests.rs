//! Requests of mixed kinds, each a function of its number.

use serde_json::{Value, json};

/// Longest sample.
pub const MAX_TOKENS: u64 = 48;

/// What a client does with the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// Reads all of it.
    Reads,
    /// Leaves after this many milliseconds, or with the first chunk of a stream.
    Leaves(u64),
    /// Asks the server that gives requests next to no time.
    Hurries,
}

/// A request and what is known of its answer.
pub struct Ask {
    pub path: &'static str,
    pub body: Value,
    pub client: Client,
    /// It breaks a rule.
    pub invalid: bool,
    /// Its samples can be checked token by token.
    pub greedy: bool,
}

/// A stream of numbers (SplitMix64).
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % limit
    }
}

/// Request number `number`.
pub fn ask(number: u64) -> Ask {
    let mut dice = Dice(number * 7919);
    let chat = dice.below(3) == 0;
    let path = if chat { "/v1/chat/completions" } else { "/v1/completions" };
    let mut body = if chat { conversation(&mut dice) } else { prompt(&mut dice) };
    let greedy = dice.below(3) > 0;
    body["max_tokens"] = (1 + dice.below(MAX_TOKENS)).into();
    body["n"] = (1 + dice.below(if greedy { 2 } else { 6 })).into();
    body["ignore_eos"] = true.into();
    body["return_token_ids"] = true.into();
    body["stream"] = (dice.below(2) == 0).into();
    body["logprobs"] = if chat { true.into() } else { dice.below(3).into() };
    if greedy {
        body["temperature"] = 0.into();
    } else {
        sampled(&mut body, &mut dice);
    }
    if dice.below(8) == 0 {
        body["stop"] = json!([" t1", "t9"]);
    }
    let invalid = dice.below(12) == 0;
    if invalid {
        break_a_rule(&mut body, &mut dice);
    }
    let client = match dice.below(12) {
        0 => Client::Leaves(dice.below(40)),
        1 => Client::Hurries,
        _ => Client::Reads,
    };
    Ask { path, body, client, invalid, greedy }
}

/// One of few texts, so that prefixes are shared.
fn text(dice: &mut Dice) -> String {
    let which = dice.below(12);
    let words = 3 + which * 5;
    let words = (0..words).map(|i| format!("t{}", 3 + (which * 31 + i * 7) % 150));
    words.collect::<Vec<_>>().join(" ")
}

fn prompt(dice: &mut Dice) -> Value {
    match dice.below(4) {
        0 => json!({"prompt": [text(dice), text(dice)]}),
        1 => {
            let first = 3 + dice.below(20);
            json!({"prompt": (first..first + 18).collect::<Vec<u64>>()})
        }
        _ => json!({"prompt": text(dice)}),
    }
}

fn conversation(dice: &mut Dice) -> Value {
    json!({"messages": [
        {"role": "system", "content": "t3 t4"},
        {"role": "user", "content": text(dice)},
    ]})
}

fn sampled(body: &mut Value, dice: &mut Dice) {
    body["temperature"] = json!(0.5 + dice.below(10) as f64 / 10.0);
    match dice.below(4) {
        0 => body["seed"] = dice.below(1000).into(),
        1 => body["top_p"] = 0.8.into(),
        2 => body["top_k"] = 20.into(),
        _ => body["min_p"] = 0.05.into(),
    }
}

fn break_a_rule(body: &mut Value, dice: &mut Dice) {
    match dice.below(6) {
        0 => body["max_tokens"] = json!(-1),
        1 => body["temperature"] = "hot".into(),
        2 => body["no_such_field"] = 1.into(),
        3 => body["n"] = 65.into(),
        4 => body["max_tokens"] = 1000.into(),
        _ => body["top_p"] = 2.into(),
    }
}
