//! Judges by what stands in `\boxed{...}`.

use super::{number, rational::Rational, right_or_wrong};
use onpolicy_plugin_api::{Attempt, Options, Score, Verifier};
use serde::Deserialize;

/// What opens a boxed answer.
const OPEN: &str = "\\boxed{";

/// The verifier `boxed`: right if the content of the last complete `\boxed{...}` equals the
/// answer, as a number (also as a fraction, `a/b` or `\frac{a}{b}`) or else as text after
/// normalisation: spaces, dollar signs, `\left`, `\right`, thin spaces, a final full stop and a
/// wrapping `\text{...}` are taken away, and `\dfrac` and `\tfrac` are `\frac`. The reference
/// answer may itself be boxed.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Boxed {}

impl Boxed {
    /// Reads the options of the verifier: it has none.
    ///
    /// # Errors
    /// Any key.
    pub fn from_options(options: &Options) -> Result<Self, String> {
        options.parse()
    }
}

impl Verifier for Boxed {
    fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score> {
        let judge = |attempt: &Attempt<'_>| {
            let answer = &attempt.problem.answer;
            let wanted = last_boxed(answer).unwrap_or(answer);
            let given = last_boxed(attempt.completion);
            right_or_wrong(given.is_some_and(|given| same(given, wanted)))
        };
        attempts.iter().map(judge).collect()
    }
}

/// Content of the last `\boxed{...}` whose braces are balanced.
pub(super) fn last_boxed(text: &str) -> Option<&str> {
    text.rmatch_indices(OPEN).find_map(|(at, _)| braced(&text[at + OPEN.len()..])).map(|(c, _)| c)
}

/// Content up to the brace that closes an opened one, and what follows it.
fn braced(text: &str) -> Option<(&str, &str)> {
    let mut depth = 1;
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some((&text[..at], &text[at + 1..]));
        }
    }
    None
}

fn same(given: &str, wanted: &str) -> bool {
    let (given, wanted) = (normal(given), normal(wanted));
    match (value(&given), value(&wanted)) {
        (Some(a), Some(b)) => a == b,
        _ => given == wanted,
    }
}

/// Takes away what does not change the meaning.
fn normal(text: &str) -> String {
    let mut text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    for noise in ["\\left", "\\right", "\\!", "\\,", "\\;", "\\$", "$", "{,}"] {
        text = text.replace(noise, if noise == "{,}" { "," } else { "" });
    }
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac");
    let text = text.trim_end_matches('.');
    let wrapped = ["\\text{", "\\mathrm{", "\\mathbf{"].iter().find_map(|open| {
        text.strip_prefix(open).and_then(braced).filter(|(_, rest)| rest.is_empty())
    });
    wrapped.map_or(text, |(content, _)| content).to_owned()
}

/// The number that a text stands for.
fn value(text: &str) -> Option<Rational> {
    if let Some(plain) = plain(text) {
        return Some(plain);
    }
    let (negative, body) = text.strip_prefix('-').map_or((false, text), |body| (true, body));
    let (top, bottom) = match body.strip_prefix("\\frac{") {
        Some(rest) => {
            let (top, rest) = braced(rest)?;
            let (bottom, rest) = braced(rest.strip_prefix('{')?)?;
            rest.is_empty().then_some((top, bottom))?
        }
        None => body.split_once('/')?,
    };
    let fraction = plain(top)?.checked_div(plain(bottom)?)?;
    if negative { Rational::from(0).checked_sub(fraction) } else { Some(fraction) }
}

fn plain(text: &str) -> Option<Rational> {
    Rational::from_decimal(&number::parse(text)?)
}
