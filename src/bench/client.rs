//! A client of any OpenAI-compatible server: a rollout by `/v1/completions`, timed and checked.

use super::workload::{Prompt, Workload};
use anyhow::{Context, anyhow, bail};
use onpolicy_engine::sampler::stream_of;
use serde_json::{Map, Value, json};
use std::{
    collections::HashSet,
    time::{Duration, Instant},
};
use tokio::{runtime::Runtime, task::JoinSet};

/// Log-probs may be this much above 0 through rounding.
const ROUNDING: f64 = 1e-3;
/// Characters of an answer that an error quotes.
const QUOTED: usize = 400;

/// What is asked of a server beside the tokens, and how its answers are read.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Asks {
    /// Ask for `logprobs` of this many alternatives (0: of the sampled token alone).
    pub logprobs: Option<usize>,
    /// Ask for token ids.
    pub token_ids: bool,
    /// Send no seed.
    pub no_seed: bool,
    /// `usage` counts one of the n choices.
    pub usage_per_choice: bool,
    /// Fields merged into each request.
    pub extra: Map<String, Value>,
}

/// A server that is measured.
pub struct Server {
    /// What it is called in the results.
    pub name: String,
    url: String,
    model: String,
    asks: Asks,
    http: reqwest::Client,
    runtime: Runtime,
}

/// What a rollout came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rollout {
    /// From the first request sent to the last answer received.
    pub seconds: f64,
    /// Prompt tokens of all requests, by the server's own count, if it counts them.
    pub prompt_tokens: Option<u64>,
}

impl Server {
    /// Finds the server at `url` (with or without `/v1`) and asks for its model's name.
    ///
    /// # Errors
    /// It does not answer as it should.
    pub fn connect(
        name: &str,
        url: &str,
        asks: Asks,
        timeout: Duration,
    ) -> Result<Self, anyhow::Error> {
        let base = url.trim_end_matches('/').trim_end_matches("/v1");
        // No connection waits for its turn: many servers close one that is idle for seconds.
        let http = reqwest::Client::builder().timeout(timeout).no_proxy();
        let http = http.pool_max_idle_per_host(0).build()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let url = format!("{base}/v1/completions");
        let (name, model) = (name.to_string(), String::new());
        let mut server = Self { name, url, model, asks, http, runtime };
        let models = server.http.get(format!("{base}/v1/models"));
        let models = server.runtime.block_on(answer(models)).and_then(|text| parse(&text));
        let model = models.map(|models| models["data"][0]["id"].as_str().map(String::from));
        let model = model.with_context(|| format!("{server} does not list its models"))?;
        server.model = model.ok_or_else(|| anyhow!("{server} has no model"))?;
        Ok(server)
    }

    /// Sends all prompts at once, one request each, and waits for all answers.
    ///
    /// # Errors
    /// An answer that is an error, or has other counts than were asked for.
    pub fn rollout(
        &self,
        workload: &Workload,
        prompts: &[Prompt],
        seed: u64,
    ) -> Result<Rollout, anyhow::Error> {
        let requests: Vec<_> = prompts
            .iter()
            .enumerate()
            .map(|(index, prompt)| {
                self.http.post(&self.url).json(&self.body(workload, prompt, stream_of(seed, index)))
            })
            .collect();
        let started = Instant::now();
        let answers = self.runtime.block_on(async {
            let mut open = JoinSet::new();
            for request in requests {
                open.spawn(answer(request));
            }
            open.join_all().await
        });
        let seconds = started.elapsed().as_secs_f64();
        let checked = self.check(answers, workload);
        let prompt_tokens = checked.with_context(|| format!("{self} cannot be compared"))?;
        Ok(Rollout { seconds, prompt_tokens })
    }

    fn body(&self, workload: &Workload, prompt: &Prompt, seed: u64) -> Value {
        let mut body = json!({
            "model": self.model, "prompt": prompt.text, "n": workload.samples,
            "max_tokens": workload.new_tokens, "ignore_eos": true, "temperature": 1.0, "top_p": 1.0,
        });
        let fields = body.as_object_mut().expect("an object was just made");
        if !self.asks.no_seed {
            // Servers take 31 bits.
            fields.insert("seed".into(), json!(seed >> 33));
        }
        if let Some(logprobs) = self.asks.logprobs {
            fields.insert("logprobs".into(), json!(logprobs));
        }
        if self.asks.token_ids {
            fields.insert("return_token_ids".into(), json!(true));
        }
        fields.extend(self.asks.extra.clone());
        body
    }

    /// Checks the answers of a rollout; returns the prompt tokens that they count.
    fn check(
        &self,
        answers: Vec<Result<String, anyhow::Error>>,
        workload: &Workload,
    ) -> Result<Option<u64>, anyhow::Error> {
        let (mut texts, mut prompt_tokens) = (HashSet::new(), Some(0));
        for answer in answers {
            let answer = parse(&answer?)?;
            check_counts(&answer, workload, &self.asks)?;
            let choices = answer["choices"].as_array().into_iter().flatten();
            texts.extend(choices.filter_map(|choice| Some(choice["text"].as_str()?.to_string())));
            let counted = answer["usage"]["prompt_tokens"].as_u64();
            prompt_tokens = prompt_tokens.zip(counted).map(|(sum, more)| sum + more);
        }
        if workload.all_samples() > 1 && texts.len() < 2 {
            bail!("all of its samples are the same text, so it does not sample");
        }
        Ok(prompt_tokens)
    }
}

impl std::fmt::Display for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the server '{}' at {}", self.name, self.url)
    }
}

/// Sends a request; the text of its answer.
async fn answer(request: reqwest::RequestBuilder) -> Result<String, anyhow::Error> {
    let answer = request.send().await?;
    let (status, text) = (answer.status(), answer.text().await?);
    if !status.is_success() {
        bail!("it answered {status}: {}", quoted(&text));
    }
    Ok(text)
}

fn parse(text: &str) -> Result<Value, anyhow::Error> {
    serde_json::from_str(text).with_context(|| format!("it answered no JSON: {}", quoted(text)))
}

fn quoted(text: &str) -> String {
    text.chars().take(QUOTED).collect()
}

/// Checks that an answer holds exactly what was asked for.
fn check_counts(answer: &Value, workload: &Workload, asks: &Asks) -> Result<(), anyhow::Error> {
    let Workload { samples, new_tokens, .. } = *workload;
    let choices = answer["choices"].as_array().map_or(&[][..], |choices| choices);
    if choices.len() != samples {
        bail!("it answered with {} choices where n was {samples}", choices.len());
    }
    let wanted = new_tokens * if asks.usage_per_choice { 1 } else { samples };
    let counted = &answer["usage"]["completion_tokens"];
    if counted.as_u64() != Some(wanted as u64) {
        let hint = if counted.as_u64() == Some(new_tokens as u64) {
            "; a server that counts one choice of n needs --usage-per-choice"
        } else {
            ""
        };
        bail!("usage.completion_tokens is {counted} where {wanted} were asked for{hint}");
    }
    if asks.logprobs.is_some() {
        choices.iter().try_for_each(|choice| check_logprobs(choice, new_tokens))?;
    }
    Ok(())
}

/// Checks that a choice has one log-prob for each token, in the form of completions or of chat.
fn check_logprobs(choice: &Value, tokens: usize) -> Result<(), anyhow::Error> {
    let logprobs = &choice["logprobs"];
    let of_chat = |entry: &Value| entry["logprob"].as_f64();
    let values: Vec<Option<f64>> = match &logprobs["token_logprobs"] {
        Value::Array(values) => values.iter().map(Value::as_f64).collect(),
        _ => logprobs["content"].as_array().into_iter().flatten().map(of_chat).collect(),
    };
    if values.len() != tokens {
        bail!(
            "a choice has {} log-probs for {tokens} tokens; another --logprobs K, or \
             --no-logprobs, may do",
            values.len()
        );
    }
    let fine = |value: &Option<f64>| value.is_some_and(|v| v.is_finite() && v <= ROUNDING);
    if !values.iter().all(fine) {
        bail!("a log-prob is missing, infinite or positive");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(tokens: u64, choices: Value) -> Value {
        json!({"usage": {"completion_tokens": tokens, "prompt_tokens": 5}, "choices": choices})
    }

    fn refusal(answer: &Value, asks: &Asks) -> String {
        let workload = Workload::custom([1, 2, 5, 3]);
        check_counts(answer, &workload, asks).map_or_else(|e| e.to_string(), |()| "fine".into())
    }

    #[test]
    fn counts_must_be_exact() {
        let two = json!([{"text": "a"}, {"text": "b"}]);
        let asks = Asks::default();
        assert_eq!(refusal(&answer(6, two.clone()), &asks), "fine");
        assert!(refusal(&answer(5, two.clone()), &asks).contains("is 5 where 6"));
        assert!(refusal(&answer(3, two.clone()), &asks).contains("--usage-per-choice"));
        assert!(refusal(&answer(6, json!([{"text": "a"}])), &asks).contains("1 choices"));
        assert!(refusal(&json!({}), &asks).contains("0 choices"));
        let per_choice = Asks { usage_per_choice: true, ..Asks::default() };
        assert_eq!(refusal(&answer(3, two.clone()), &per_choice), "fine");
        assert!(refusal(&answer(6, two), &per_choice).contains("is 6 where 3"));
    }

    #[test]
    fn every_token_needs_a_logprob() {
        let asks = Asks { logprobs: Some(0), ..Asks::default() };
        let with = |logprobs: Value| {
            let good = json!({"logprobs": {"token_logprobs": [-1.0, -2.0, 0.0]}});
            answer(6, json!([good, {"logprobs": logprobs}]))
        };
        let chat = json!({"content": [{"logprob": -1.0}, {"logprob": -1.5}, {"logprob": -0.1}]});
        assert_eq!(refusal(&with(chat), &asks), "fine");
        let short = json!({"token_logprobs": [-1.0]});
        assert!(refusal(&with(short), &asks).contains("1 log-probs for 3 tokens"));
        assert!(refusal(&with(Value::Null), &asks).contains("0 log-probs"));
        for bad in [json!([-1.0, null, -1.0]), json!([-1.0, 0.5, -1.0])] {
            assert!(refusal(&with(json!({"token_logprobs": bad})), &asks).contains("missing"));
        }
    }

    #[test]
    fn who_does_not_listen_is_named() {
        let time = Duration::from_secs(5);
        let error = Server::connect("peer", "http://127.0.0.1:9/v1", Asks::default(), time);
        let error = format!("{:#}", error.err().expect("nobody listens"));
        assert!(error.contains("'peer' at http://127.0.0.1:9/v1/completions"), "{error}");
    }
}
