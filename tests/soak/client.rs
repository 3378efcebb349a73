//! Clients that read their answers, leave, or hurry.

use crate::requests::{Ask, Client};
use reqwest::{Response, StatusCode};
use serde_json::Value;
use std::{collections::BTreeMap, time::Duration};
use tokio::time::timeout;

/// No request takes longer than this.
const LIMIT: Duration = Duration::from_secs(60);

/// How a request ended for its client.
pub enum Ended {
    /// All samples came.
    Answered(Vec<Told>),
    /// An answer without samples: its status, or that of a stream's error event.
    Refused(u16),
    /// The client has left.
    Left,
}

/// What a sample was told to be.
#[derive(Debug, Default)]
pub struct Told {
    pub prompt: Vec<u32>,
    pub tokens: Vec<u32>,
    pub versions: Vec<u64>,
    /// How often it ended.
    pub ends: usize,
}

/// Sends `ask` to `url`, and does with the answer what its client does.
pub async fn send(http: &reqwest::Client, url: &str, ask: &Ask) -> Ended {
    let answer = http.post(format!("{url}{}", ask.path)).json(&ask.body).send();
    match ask.client {
        Client::Leaves(after) => {
            let reading = async {
                let mut response = answer.await.expect("an answer");
                let _ = response.chunk().await;
            };
            let _ = timeout(Duration::from_millis(after), reading).await;
            Ended::Left
        }
        Client::Reads | Client::Hurries => {
            let reading = async { read(answer.await.expect("an answer"), ask).await };
            timeout(LIMIT, reading).await.expect("every request ends")
        }
    }
}

async fn read(response: Response, ask: &Ask) -> Ended {
    let status = response.status();
    if status != StatusCode::OK {
        if matches!(status.as_u16(), 429 | 503) {
            assert!(response.headers().contains_key("retry-after"));
        }
        let error: Value = response.json().await.expect("JSON");
        assert!(error["error"]["message"].is_string(), "{error}");
        return Ended::Refused(status.as_u16());
    }
    let text = response.text().await.expect("a whole body");
    let mut told = Gathered::default();
    if ask.body["stream"] != true {
        told.add(&serde_json::from_str(&text).expect("JSON"));
        return told.finish(ask);
    }
    let mut events: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
    let last = events.pop().expect("an event");
    events.iter().for_each(|event| told.add(&serde_json::from_str(event).expect("JSON")));
    if last == "[DONE]" {
        return told.finish(ask);
    }
    let error: Value = serde_json::from_str(last).expect("JSON");
    match error["error"]["code"].as_str() {
        Some("request_timeout") => Ended::Refused(504),
        other => panic!("a stream ended with {other:?}: {error}"),
    }
}

/// Choices of one answer, by index.
#[derive(Default)]
struct Gathered {
    samples: BTreeMap<u64, Told>,
    prompt: Vec<u32>,
}

impl Gathered {
    fn add(&mut self, answer: &Value) {
        assert!(answer["error"].is_null(), "an error is the last event: {answer}");
        // Of a conversation there is one prompt, told once.
        self.prompt.extend(ids(&answer["prompt_token_ids"]));
        for choice in answer["choices"].as_array().expect("choices") {
            let index = choice["index"].as_u64().expect("an index");
            let sample = self.samples.entry(index).or_default();
            assert_eq!(sample.ends, 0, "nothing comes after the end of a sample: {choice}");
            sample.prompt.extend(ids(&choice["prompt_token_ids"]));
            sample.tokens.extend(ids(&choice["token_ids"]));
            let versions = choice["policy"]["weight_version"].as_array();
            let versions = versions.into_iter().flatten().filter_map(Value::as_u64);
            sample.versions.extend(versions);
            sample.ends += usize::from(!choice["finish_reason"].is_null());
        }
    }

    fn finish(self, ask: &Ask) -> Ended {
        let prompts = ask.body["prompt"].as_array().filter(|list| list[0].is_string());
        let wanted = prompts.map_or(1, Vec::len) * ask.body["n"].as_u64().expect("n") as usize;
        assert_eq!(self.samples.len(), wanted, "{}", ask.body);
        let prompt = self.prompt;
        let samples = self.samples.into_values().map(|mut sample| {
            assert_eq!(sample.ends, 1, "every sample ends once");
            if sample.prompt.is_empty() {
                sample.prompt.clone_from(&prompt);
            }
            sample
        });
        Ended::Answered(samples.collect())
    }
}

fn ids(list: &Value) -> impl Iterator<Item = u32> + '_ {
    list.as_array().into_iter().flatten().map(|id| id.as_u64().expect("an id") as u32)
}
