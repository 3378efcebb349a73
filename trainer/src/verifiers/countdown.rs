//! Judges an expression that must reach a target with given numbers.

use super::{boxed::last_boxed, failed, rational::Rational, right_or_wrong};
use onpolicy_plugin_api::{Attempt, Options, Score, Verifier};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Deepest nesting of brackets that is followed.
const MAX_DEPTH: usize = 64;

/// What must be reached with what; the answer of a countdown problem, written as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Goal {
    /// The number to reach.
    pub target: i64,
    /// The numbers to use, each exactly once.
    pub numbers: Vec<i64>,
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{\"target\":{},\"numbers\":{:?}}}", self.target, self.numbers)
    }
}

/// The verifier `countdown`: right if the completion's expression is exactly the target and uses
/// every number exactly once, with `+`, `-`, `*`, `/` and brackets. Fractions on the way are
/// exact.
///
/// The expression is looked for in the last `<answer>...</answer>`, else in the last
/// `\boxed{...}`, else in the last line that holds one; there it is the last one before the first
/// `=`, so that `7+3*5 = 22` is read as `7+3*5`.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Countdown {}

impl Countdown {
    /// Reads the options of the verifier: it has none.
    ///
    /// # Errors
    /// Any key.
    pub fn from_options(options: &Options) -> Result<Self, String> {
        options.parse()
    }
}

impl Verifier for Countdown {
    fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score> {
        let judge = |attempt: &Attempt<'_>| {
            let answer = &attempt.problem.answer;
            match serde_json::from_str::<Goal>(answer) {
                Ok(goal) => right_or_wrong(reaches(attempt.completion, &goal)),
                Err(e) => failed(format!("the reference answer '{answer}' is no goal: {e}")),
            }
        };
        attempts.iter().map(judge).collect()
    }
}

fn reaches(completion: &str, goal: &Goal) -> bool {
    let text = ascii_operators(completion);
    let Some(expression) = find_expression(&text) else {
        return false;
    };
    let Some((value, mut used)) = evaluate(expression) else {
        return false;
    };
    let mut wanted = goal.numbers.clone();
    wanted.sort_unstable();
    used.sort_unstable();
    used == wanted && value == Rational::from(goal.target)
}

/// Writes typeset operators as plain ones.
fn ascii_operators(text: &str) -> String {
    let plain = [("\\times", "*"), ("\\cdot", "*"), ("\\div", "/")];
    let text = plain.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to));
    let operator = |c| match c {
        '\u{d7}' | '\u{b7}' => '*',
        '\u{f7}' => '/',
        '\u{2212}' => '-',
        c => c,
    };
    text.chars().map(operator).collect()
}

fn find_expression(text: &str) -> Option<&str> {
    if let Some((_, after)) = text.rsplit_once("<answer>") {
        return last_run(after.split("</answer>").next()?);
    }
    match last_boxed(text) {
        Some(content) => last_run(content),
        None => text.lines().rev().find_map(last_run),
    }
}

/// The last run of arithmetic before the first `=` of a line: it holds an operator that joins
/// something, and a digit.
fn last_run(line: &str) -> Option<&str> {
    let before = line.split('=').next()?;
    let runs = before.split(|c: char| !(c.is_ascii_digit() || "+-*/() ".contains(c)));
    let mut bare = runs.map(without_frame);
    bare.rfind(|run| {
        run.contains(|c: char| "+-*/".contains(c)) && run.contains(|c: char| c.is_ascii_digit())
    })
}

/// Takes away a list mark before a run, bold marks around it, and a dash after it.
fn without_frame(run: &str) -> &str {
    let run = run.trim_start_matches(['*', ' ']);
    let run = run.strip_prefix("- ").unwrap_or(run);
    run.trim_start().trim_end_matches(['+', '-', '*', '/', ' '])
}

/// The value of an expression and the numbers in it; `None` if it is no expression, divides by 0
/// or overflows.
fn evaluate(text: &str) -> Option<(Rational, Vec<i64>)> {
    let mut parser = Parser { rest: text.trim(), used: Vec::new(), depth: 0 };
    let value = parser.sum()?;
    parser.rest.is_empty().then_some((value, parser.used))
}

/// Reads an expression from left to right. There are no signs: every minus subtracts.
struct Parser<'a> {
    rest: &'a str,
    used: Vec<i64>,
    depth: usize,
}

impl Parser<'_> {
    fn sum(&mut self) -> Option<Rational> {
        let mut value = self.product()?;
        loop {
            value = match self.take(&['+', '-']) {
                Some('+') => value.checked_add(self.product()?)?,
                Some(_) => value.checked_sub(self.product()?)?,
                None => return Some(value),
            };
        }
    }

    fn product(&mut self) -> Option<Rational> {
        let mut value = self.operand()?;
        loop {
            value = match self.take(&['*', '/']) {
                Some('*') => value.checked_mul(self.operand()?)?,
                Some(_) => value.checked_div(self.operand()?)?,
                None => return Some(value),
            };
        }
    }

    fn operand(&mut self) -> Option<Rational> {
        if self.take(&['(']).is_none() {
            return self.number();
        }
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        let value = self.sum()?;
        self.depth -= 1;
        self.take(&[')']).map(|_| value)
    }

    fn number(&mut self) -> Option<Rational> {
        let end = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
        let (digits, rest) = self.rest.split_at(end);
        let number: i64 = digits.parse().ok()?;
        self.used.push(number);
        self.rest = rest.trim_start();
        Some(number.into())
    }

    fn take(&mut self, wanted: &[char]) -> Option<char> {
        let first = self.rest.chars().next().filter(|c| wanted.contains(c))?;
        self.rest = self.rest[first.len_utf8()..].trim_start();
        Some(first)
    }
}
