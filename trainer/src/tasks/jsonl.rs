//! Problems from a file: one JSON object a line.

use super::{
    generator::{mix, stable_hash},
    permutation::shuffled,
    wording::Common,
};
use onpolicy_plugin_api::{Options, Problem, TaskSource};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::{collections::HashSet, path::Path};

/// Before the final answer in a GSM8K solution.
const GSM8K_MARK: &str = "####";

/// The options of the task `jsonl`, other than the shared ones ([`Common`]).
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileOptions {
    /// The file with the training problems.
    path: String,
    /// Field of the question.
    #[serde(default = "question_field")]
    question: String,
    /// Field of the answer, a string or a number.
    #[serde(default = "answer_field")]
    answer: String,
    /// A file with the held-out problems. Excludes `eval_share`.
    eval_path: Option<String>,
    /// Share of the questions in `path` that is held out if there is no `eval_path`; 0.1 if not
    /// given.
    eval_share: Option<f64>,
}

fn question_field() -> String {
    "question".into()
}

fn answer_field() -> String {
    "answer".into()
}

/// Share of the questions held out if the options do not say.
const DEFAULT_EVAL_SHARE: f64 = 0.1;

/// Problems of one or two files.
///
/// The training problems repeat without end, in a new order each time round, which the seed
/// decides. Held out are the problems of `eval_path`, in the order of the file, or a share of
/// `path` that depends on the questions alone: it is the same for every seed, and a question that
/// occurs twice is held out twice or not at all. Where an answer contains `####` (GSM8K), the
/// answer is what follows it, commas removed.
#[derive(Debug, Clone)]
pub struct Jsonl {
    train: Vec<Problem>,
    eval: Vec<Problem>,
    seed: u64,
}

/// A question and its answer.
type Pair = (String, String);

impl Jsonl {
    /// Reads the options, then the files. `seed` is used if the options name none.
    ///
    /// # Errors
    /// An unknown key, a wrong type or a value out of range; a file that cannot be read or holds
    /// no problem; a line that is not a problem, with its number.
    pub fn from_options(options: &Options, seed: u64) -> Result<Self, String> {
        let (common, own) = Common::split(options)?;
        let options: FileOptions = own.parse()?;
        let pairs = read(&options.path, &options)?;
        let (train, eval) = match (&options.eval_path, options.eval_share) {
            (Some(_), Some(_)) => {
                return Err("eval_path and eval_share exclude each other; give one".into());
            }
            (Some(path), None) => (pairs, read(path, &options)?),
            (None, share) => hold_out(pairs, share.unwrap_or(DEFAULT_EVAL_SHARE))?,
        };
        let word =
            |(question, answer): Pair| Problem { messages: common.messages(&question), answer };
        Ok(Self {
            train: train.into_iter().map(word).collect(),
            eval: eval.into_iter().map(word).collect(),
            seed: common.seed.unwrap_or(seed),
        })
    }

    /// Number of problems for training and held out.
    pub fn sizes(&self) -> (usize, usize) {
        (self.train.len(), self.eval.len())
    }
}

impl TaskSource for Jsonl {
    fn train(&self, index: u64) -> Problem {
        let n = self.train.len() as u64;
        let (epoch, place) = (index / n, index % n);
        let key = mix(mix(self.seed) ^ epoch);
        self.train[shuffled(place, n, key) as usize].clone()
    }

    fn eval(&self, index: u64) -> Option<Problem> {
        self.eval.get(usize::try_from(index).ok()?).cloned()
    }
}

/// Splits off the questions with the smallest hashes.
fn hold_out(pairs: Vec<Pair>, share: f64) -> Result<(Vec<Pair>, Vec<Pair>), String> {
    if !(0.0..1.0).contains(&share) {
        return Err(format!("eval_share = {share} must be at least 0 and below 1"));
    }
    if share == 0.0 {
        return Ok((pairs, Vec::new()));
    }
    let mut questions: Vec<&str> = pairs.iter().map(|(question, _)| question.as_str()).collect();
    questions.sort_by_cached_key(|question| (stable_hash(question.as_bytes()), *question));
    questions.dedup();
    if questions.len() < 2 {
        return Err("a single question cannot be split; give eval_path, or eval_share = 0".into());
    }
    let wanted = (share * questions.len() as f64).round() as usize;
    questions.truncate(wanted.clamp(1, questions.len() - 1));
    let held: HashSet<String> = questions.into_iter().map(str::to_owned).collect();
    let (eval, train) = pairs.into_iter().partition(|(question, _)| held.contains(question));
    Ok((train, eval))
}

fn read(path: &str, options: &FileOptions) -> Result<Vec<Pair>, String> {
    let bytes = std::fs::read(Path::new(path)).map_err(|e| format!("cannot read {path}: {e}"))?;
    let mut pairs = Vec::new();
    for (number, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        let place = |reason: String| format!("{path} line {}: {reason}", number + 1);
        let line = std::str::from_utf8(line).map_err(|e| place(format!("not UTF-8: {e}")))?;
        let line = line.trim_start_matches('\u{feff}').trim();
        if !line.is_empty() {
            pairs.push(pair(line, options).map_err(place)?);
        }
    }
    if pairs.is_empty() {
        return Err(format!("{path} holds no problems"));
    }
    Ok(pairs)
}

fn pair(line: &str, options: &FileOptions) -> Result<Pair, String> {
    let object: Map<String, Value> =
        serde_json::from_str(line).map_err(|e| format!("not a JSON object: {e}"))?;
    let question = field(&object, &options.question)?;
    let answer = field(&object, &options.answer)?;
    Ok((question, final_answer(&answer)?))
}

fn field(object: &Map<String, Value>, name: &str) -> Result<String, String> {
    let text = match object.get(name) {
        Some(Value::String(text)) => text.trim().to_owned(),
        Some(Value::Number(number)) => number.to_string(),
        Some(_) => return Err(format!("field '{name}' is neither a string nor a number")),
        None => {
            let there: Vec<&str> = object.keys().map(String::as_str).collect();
            return Err(format!("no field '{name}'; there are: {}", there.join(", ")));
        }
    };
    if text.is_empty() { Err(format!("field '{name}' is empty")) } else { Ok(text) }
}

fn final_answer(answer: &str) -> Result<String, String> {
    let Some((_, last)) = answer.rsplit_once(GSM8K_MARK) else {
        return Ok(answer.to_owned());
    };
    match last.trim().replace(',', "") {
        last if last.is_empty() => Err(format!("no answer after {GSM8K_MARK}")),
        last => Ok(last),
    }
}
