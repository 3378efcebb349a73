//! A frozen model as a judge: it is shown the question and the completion, and what a regular
//! expression finds in its answer is the grade.

use super::failed;
use crate::{config::Config, served::Serving};
use minijinja::{Environment, UndefinedBehavior, context};
use onpolicy_engine::{
    chat::{Chat, ChatTokenizer},
    collect::{self, Pending},
};
use onpolicy_plugin_api::{
    Attempt, Engine, Message, Options, Request, Role, SamplingParams, Score, Verifier,
};
use regex::Regex;
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

/// What the judge is asked if the options do not say it.
const TEMPLATE: &str = "Question: {{ question }}\n\nReference answer: {{ answer }}\n\n\
    Answer to be graded: {{ completion }}\n\n\
    Does the answer to be graded agree with the reference answer? \
    Reply with \"Grade: 1\" if it does and with \"Grade: 0\" if it does not.";
/// What finds the grade if the options do not say it: the last number after "Grade:".
const GRADE: &str = r"(?s).*Grade:\s*(-?\d+(?:\.\d+)?)";

/// The options of the verifier `judge`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JudgeOptions {
    /// The model: a directory, a GGUF file or a hub id. Of one that is served elsewhere only the
    /// tokenizer is read.
    pub model: String,
    /// The engine, as `engine.kind` has it: `native`, `mistralrs`, or addresses of servers.
    #[serde(default = "defaults::engine")]
    pub engine: String,
    /// Memory for K and V of a native engine, in MiB.
    pub kv_memory_mb: Option<usize>,
    /// What the judge is asked: a Jinja template over `question`, `completion` and `answer`.
    #[serde(default = "defaults::template")]
    pub template: String,
    /// What it is told first; nothing if not given.
    pub system: Option<String>,
    /// Regular expression whose first group is the grade.
    #[serde(default = "defaults::grade")]
    pub grade: String,
    /// Rewards of grades, by grade; or a number that a grade is multiplied with.
    #[serde(default)]
    pub scale: Scale,
    /// Longest answer of the judge, in tokens.
    #[serde(default = "defaults::max_tokens")]
    pub max_tokens: usize,
    /// Sampling temperature of the judge; 0 is greedy.
    #[serde(default)]
    pub temperature: f32,
    /// Time limit of a whole call.
    #[serde(default = "defaults::deadline_seconds")]
    pub deadline_seconds: f64,
    /// Most completions that the judge looks at together.
    #[serde(default = "defaults::batch_size")]
    pub batch_size: usize,
}

mod defaults {
    pub(super) fn engine() -> String {
        "native".into()
    }
    pub(super) fn template() -> String {
        super::TEMPLATE.into()
    }
    pub(super) fn grade() -> String {
        super::GRADE.into()
    }
    pub(super) fn max_tokens() -> usize {
        64
    }
    pub(super) fn deadline_seconds() -> f64 {
        300.0
    }
    pub(super) fn batch_size() -> usize {
        256
    }
}

/// How a grade becomes a reward.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Scale {
    /// It is a number, to be multiplied with this one.
    Factor(f32),
    /// It is one of these texts.
    Grades(BTreeMap<String, f32>),
}

impl Default for Scale {
    fn default() -> Self {
        Self::Factor(1.0)
    }
}

impl Scale {
    fn reward(&self, grade: &str) -> Result<f32, String> {
        let grade = grade.trim();
        match self {
            Self::Factor(factor) => match grade.parse::<f32>() {
                Ok(number) if number.is_finite() => Ok(number * factor),
                _ => Err(format!("the grade '{grade}' is no number; see verifier.scale")),
            },
            Self::Grades(grades) => grades
                .get(grade)
                .copied()
                .ok_or_else(|| format!("the grade '{grade}' is not in verifier.scale")),
        }
    }
}

/// The verifier `judge`.
pub struct Judge {
    engine: Arc<dyn Engine>,
    tokenizer: ChatTokenizer,
    environment: Environment<'static>,
    grade: Regex,
    options: JudgeOptions,
}

impl Judge {
    /// Reads the options and starts the judge's engine.
    ///
    /// # Errors
    /// Options that are wrong, or a model or engine that cannot be started.
    pub fn from_options(options: &Options) -> Result<Self, String> {
        let options: JudgeOptions = options.parse()?;
        let mut keys = vec![
            format!("model.path={:?}", options.model),
            format!("engine.kind={:?}", options.engine),
        ];
        keys.extend(options.kv_memory_mb.map(|mb| format!("engine.kv_memory_mb={mb}")));
        let config = Config::parse("", &keys).map_err(|error| error.to_string())?;
        let parts = parts(&options)?;
        let serving = Serving::start(&options.model, &config, None).map_err(|e| e.to_string())?;
        Ok(Self::with((serving.engine, serving.tokenizer), parts, options))
    }

    /// A judge over an engine that runs already.
    ///
    /// # Errors
    /// Options that are wrong.
    pub fn over(
        serving: (Arc<dyn Engine>, ChatTokenizer),
        options: JudgeOptions,
    ) -> Result<Self, String> {
        Ok(Self::with(serving, parts(&options)?, options))
    }

    fn with(
        (engine, tokenizer): (Arc<dyn Engine>, ChatTokenizer),
        (environment, grade): (Environment<'static>, Regex),
        options: JudgeOptions,
    ) -> Self {
        Self { engine, tokenizer, environment, grade, options }
    }

    fn request(&self, attempt: &Attempt<'_>) -> Result<Request, String> {
        let text = render(&self.environment, attempt)?;
        let system = self.options.system.iter();
        let system = system.map(|text| Message { role: Role::System, content: text.clone() });
        let messages: Vec<Message> = system.chain([Message::user(text)]).collect();
        let prompt = self.tokenizer.encode_chat(&Chat::from_messages(&messages));
        let params = SamplingParams {
            max_tokens: self.options.max_tokens,
            temperature: self.options.temperature,
            ..SamplingParams::default()
        };
        Ok(Request::new(prompt.map_err(|error| error.to_string())?, params))
    }

    /// Asks about one completion; others are asked about at the same time.
    fn ask(&self, attempt: &Attempt<'_>) -> Result<Pending, String> {
        let request = self.request(attempt)?;
        collect::submit(&*self.engine, vec![request]).map_err(|error| error.to_string())
    }

    fn verdict(&self, pending: Pending, deadline: Instant) -> Result<f32, String> {
        let answer = pending.wait(&*self.engine, deadline, &mut || {});
        let answer = answer.map_err(|error| error.to_string())?;
        let samples = answer.groups.first().and_then(|group| group.samples.first());
        let sample = samples.ok_or("the judge said nothing")?;
        let ids: Vec<u32> = sample.tokens.iter().map(|token| token.id).collect();
        let text = self.tokenizer.decode(&ids, true).map_err(|error| error.to_string())?;
        let grade = self.grade.captures(&text).and_then(|found| found.get(1));
        let grade = grade.ok_or_else(|| format!("there is no grade in '{}'", text.trim()))?;
        self.options.scale.reward(grade.as_str())
    }
}

/// The compiled template and regular expression of valid options.
fn parts(options: &JudgeOptions) -> Result<(Environment<'static>, Regex), String> {
    let seconds = options.deadline_seconds;
    if !(0.01..=86_400.0).contains(&seconds) {
        return Err(format!("deadline_seconds = {seconds} must be between 0.01 and 86400"));
    }
    if options.batch_size == 0 || options.max_tokens == 0 {
        return Err("batch_size and max_tokens must be at least 1".into());
    }
    if !(0.0..=100.0).contains(&options.temperature) {
        return Err(format!("temperature = {} must be between 0 and 100", options.temperature));
    }
    let grade = Regex::new(&options.grade).map_err(|error| format!("grade: {error}"))?;
    if grade.captures_len() < 2 {
        return Err(format!("grade = '{}' has no group", options.grade));
    }
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment
        .add_template_owned("judge", options.template.clone())
        .map_err(|error| format!("template: {error:#}"))?;
    let example = context!(question => "q", completion => "c", answer => "a");
    let template = environment.get_template("judge").map_err(|error| error.to_string())?;
    template.render(example).map_err(|error| format!("template: {error:#}"))?;
    Ok((environment, grade))
}

fn render(environment: &Environment<'static>, attempt: &Attempt<'_>) -> Result<String, String> {
    let mut messages = attempt.problem.messages.iter();
    let question = messages.rfind(|message| message.role == Role::User);
    let variables = context!(
        question => question.map_or("", |message| message.content.as_str()),
        completion => attempt.completion,
        answer => attempt.problem.answer,
    );
    let template = environment.get_template("judge").map_err(|error| error.to_string())?;
    template.render(variables).map_err(|error| format!("template: {error:#}"))
}

impl Verifier for Judge {
    fn verify(&self, attempts: &[Attempt<'_>]) -> Vec<Score> {
        let deadline = Instant::now() + Duration::from_secs_f64(self.options.deadline_seconds);
        let mut scores = Vec::with_capacity(attempts.len());
        for batch in attempts.chunks(self.options.batch_size) {
            let asked: Vec<_> = batch.iter().map(|attempt| self.ask(attempt)).collect();
            let verdicts = asked
                .into_iter()
                .map(|asked| asked.and_then(|pending| self.verdict(pending, deadline)));
            scores.extend(verdicts.map(|verdict| match verdict {
                Ok(reward) => Score::Reward(reward),
                Err(reason) => failed(format!("the judge: {reason}")),
            }));
        }
        scores
    }
}
