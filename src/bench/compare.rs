//! The options about servers to race against.

use super::client::{Asks, Server};
use anyhow::{Context, bail, ensure};
use clap::Args;
use serde_json::{Map, Value};
use std::time::Duration;

/// Which servers to race, and how to ask them.
#[derive(Debug, Args)]
pub struct Compare {
    /// Race an OpenAI-compatible server in turn, with the same prompts; NAME=URL gives it a name.
    /// May be repeated
    #[arg(long, value_name = "[NAME=]URL")]
    pub compare: Vec<String>,
    /// JSON fields merged into each request to the servers, or to the one named; may be repeated
    #[arg(long, value_name = "[NAME=]JSON")]
    compare_extra: Vec<String>,
    /// Send no seed to the servers, or to the one named
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    no_seed: Vec<String>,
    /// The servers', or the named one's, usage counts one of the n choices (llama.cpp)
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    usage_per_choice: Vec<String>,
    /// Ask over HTTP for log-probs of K alternatives (0: of the sampled token alone)
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub logprobs: usize,
    /// Do not ask for log-probs
    #[arg(long, conflicts_with = "logprobs")]
    no_logprobs: bool,
    /// Longest time for one request
    #[arg(long, value_name = "SECONDS", default_value_t = 1800)]
    timeout: u64,
}

impl Compare {
    /// What is asked for of log-probs.
    pub fn logprobs(&self) -> Option<usize> {
        (!self.no_logprobs).then_some(self.logprobs)
    }

    /// Longest time for one request.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }

    /// Connects to all servers.
    ///
    /// # Errors
    /// One does not answer, or an option names none of them.
    pub fn connect(&self) -> Result<Vec<Server>, anyhow::Error> {
        let named: Vec<(&str, &str)> = self.compare.iter().map(|text| name_and_url(text)).collect();
        let asks = self.asks(&named.iter().map(|(name, _)| *name).collect::<Vec<_>>())?;
        let servers = named.into_iter().zip(asks);
        servers
            .map(|((name, url), asks)| Server::connect(name, url, asks, self.timeout()))
            .collect()
    }

    /// What is asked of each of the servers with these names.
    fn asks(&self, names: &[&str]) -> Result<Vec<Asks>, anyhow::Error> {
        let mut extras = Vec::new();
        for text in &self.compare_extra {
            let (name, json) = match text.split_once('=') {
                Some((name, json)) if !name.contains('{') => (name, json),
                _ => ("", text.as_str()),
            };
            let fields: Map<String, Value> = serde_json::from_str(json).with_context(|| {
                format!("--compare-extra {text}: write a JSON object, or NAME={{...}}")
            })?;
            extras.push((name, fields));
        }
        let flags = self.no_seed.iter().chain(&self.usage_per_choice).map(String::as_str);
        for name in flags.chain(extras.iter().map(|(name, _)| *name)) {
            ensure!(!names.is_empty(), "there is no server to ask: add --compare URL");
            if !name.is_empty() && !names.contains(&name) {
                bail!("'{name}' is none of the servers; there are: {}", names.join(", "));
            }
        }
        let asks = |name: &&str| {
            let is_meant = |given: &str| given.is_empty() || given == *name;
            let meant = extras.iter().filter(|(given, _)| is_meant(given));
            Asks {
                logprobs: self.logprobs(),
                token_ids: false,
                no_seed: self.no_seed.iter().any(|given| is_meant(given)),
                usage_per_choice: self.usage_per_choice.iter().any(|given| is_meant(given)),
                extra: meant.flat_map(|(_, fields)| fields.clone()).collect(),
            }
        };
        Ok(names.iter().map(asks).collect())
    }
}

/// `NAME=URL`, or a URL that is its own name.
fn name_and_url(text: &str) -> (&str, &str) {
    match text.split_once('=') {
        Some((name, url)) if !name.contains("://") => (name, url),
        _ => (text, text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        compare: Compare,
    }

    fn asks(arguments: &[&str]) -> Result<Vec<Asks>, String> {
        let line = ["bench"].iter().chain(arguments);
        let line = Line::try_parse_from(line).map_err(|error| error.to_string())?;
        let names: Vec<&str> =
            line.compare.compare.iter().map(|text| name_and_url(text).0).collect();
        line.compare.asks(&names).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn options_are_for_all_servers_or_for_one() {
        let two = ["--compare", "a=http://x", "--compare", "http://y/?q=1"];
        let with = |more: &[&str]| asks(&[&two[..], more].concat());
        let plain = with(&[]).expect("fine");
        assert_eq!(plain[0], Asks { logprobs: Some(0), ..Asks::default() });
        let one = with(&["--no-seed=a", "--usage-per-choice", "--logprobs", "1"]).expect("fine");
        assert_eq!((one[0].no_seed, one[1].no_seed), (true, false));
        assert!(one.iter().all(|asks| asks.usage_per_choice && asks.logprobs == Some(1)));
        let extra =
            with(&["--compare-extra", r#"{"top_k":0}"#, "--compare-extra", r#"a={"b":"="}"#]);
        let extra = extra.expect("fine");
        assert_eq!(Value::from(extra[0].extra.clone()), serde_json::json!({"top_k": 0, "b": "="}));
        assert_eq!(Value::from(extra[1].extra.clone()), serde_json::json!({"top_k": 0}));
        assert_eq!(with(&["--no-logprobs"]).expect("fine")[1].logprobs, None);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refused = |arguments: &[&str]| asks(arguments).expect_err("refused");
        assert!(refused(&["--compare", "a=http://x", "--no-seed=b"]).contains("there are: a"));
        assert!(refused(&["--no-seed"]).contains("add --compare"));
        assert!(
            refused(&["--compare", "a=http://x", "--compare-extra", "7"]).contains("JSON object")
        );
        assert!(refused(&["--logprobs", "1", "--no-logprobs"]).contains("cannot be used with"));
    }
}
