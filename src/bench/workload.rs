//! What is asked of an engine: how many prompts, samples and tokens; and the prompts themselves.

use anyhow::{Context, bail, ensure};
use onpolicy_engine::{
    block_manager::BLOCK_SIZE, chat::ChatTokenizer, kv_cache::KvCache, model::config::ModelConfig,
    sampler::stream_of,
};

/// A rollout of exact size: `prompts * samples` samples, each of `new_tokens` tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// What it is called.
    pub name: String,
    /// Prompts.
    pub prompts: usize,
    /// Samples of each prompt.
    pub samples: usize,
    /// Tokens of each prompt.
    pub prompt_tokens: usize,
    /// New tokens of each sample.
    pub new_tokens: usize,
}

/// Name, prompts, samples, prompt tokens and new tokens of those that can be named.
const NAMED: [(&str, [usize; 4]); 5] = [
    ("W1", [1, 1, 41, 128]),
    ("W2", [8, 8, 41, 128]),
    ("W3", [32, 8, 41, 128]),
    ("W4", [4, 16, 987, 64]),
    ("smoke", [2, 2, 41, 8]),
];

/// A prompt as text, for servers, and as token ids, for the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The text.
    pub text: String,
    /// What the model's tokenizer makes of it.
    pub ids: Vec<u32>,
}

impl Workload {
    /// The workload of this name.
    ///
    /// # Errors
    /// There is none; the message names those that there are.
    pub fn named(name: &str) -> Result<Self, String> {
        let found = NAMED.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        let known = || NAMED.map(|(name, _)| name).join(", ");
        let (name, sizes) = found.ok_or_else(|| {
            format!(
                "there is no workload '{name}'; there are: {}. For any other size give --prompts, \
                 --samples, --prompt-tokens and --new-tokens",
                known()
            )
        })?;
        Ok(Self { name: (*name).into(), ..Self::custom(*sizes) })
    }

    /// One of any size: prompts, samples, prompt tokens, new tokens.
    pub fn custom([prompts, samples, prompt_tokens, new_tokens]: [usize; 4]) -> Self {
        Self { name: "custom".into(), prompts, samples, prompt_tokens, new_tokens }
    }

    /// The same samples, each from a prompt of its own.
    #[must_use]
    pub fn unshared(&self) -> Self {
        Self { prompts: self.prompts * self.samples, samples: 1, ..self.clone() }
    }

    /// All samples.
    pub fn all_samples(&self) -> usize {
        self.prompts * self.samples
    }

    /// New tokens of all samples.
    pub fn all_new_tokens(&self) -> usize {
        self.all_samples() * self.new_tokens
    }

    /// Its sizes in words.
    pub fn describe(&self) -> String {
        format!(
            "{}: {} x {} samples, {} prompt + {} new tokens",
            self.name, self.prompts, self.samples, self.prompt_tokens, self.new_tokens
        )
    }

    /// Bytes of KV that it needs for nothing to be preempted.
    pub fn kv_bytes(&self, model: &ModelConfig) -> usize {
        let shared = self.prompt_tokens / BLOCK_SIZE;
        let whole = (self.prompt_tokens + self.new_tokens).div_ceil(BLOCK_SIZE);
        let blocks = self.prompts * (shared + self.samples * (whole - shared + 1));
        blocks * KvCache::block_bytes(model)
    }

    /// Checks that the model can do it.
    ///
    /// # Errors
    /// A size that is 0, or longer than the model's context.
    pub fn check(&self, model: &ModelConfig) -> Result<(), anyhow::Error> {
        let sizes = [
            ("--prompts", self.prompts),
            ("--samples", self.samples),
            ("--prompt-tokens", self.prompt_tokens),
            ("--new-tokens", self.new_tokens),
        ];
        for (flag, size) in sizes {
            ensure!(size > 0, "{flag} must be at least 1");
        }
        let (len, limit) = (self.prompt_tokens + self.new_tokens, model.max_position_embeddings);
        ensure!(
            len <= limit,
            "{} needs {len} tokens a sample, but the model's context is {limit}; choose another \
             --workload, or --prompt-tokens and --new-tokens that fit",
            self.name
        );
        Ok(())
    }

    /// Its prompts for one run: of exactly `prompt_tokens` tokens each, different from each other
    /// and from those of any other seed within the first words.
    ///
    /// # Errors
    /// The tokenizer cannot make a text of that many tokens.
    pub fn prompts(
        &self,
        tokenizer: &ChatTokenizer,
        seed: u64,
    ) -> Result<Vec<Prompt>, anyhow::Error> {
        let prompt = |index| prompt(tokenizer, self.prompt_tokens, stream_of(seed, index));
        (0..self.prompts).map(prompt).collect()
    }

    /// Prompts of random tokens out of a vocabulary, without a text: for weights that know no language,
    /// beside which any tokenizer may stand.
    pub fn random_prompts(&self, vocab_size: usize, seed: u64) -> Vec<Prompt> {
        let token = |at: u64| (at % vocab_size as u64) as u32;
        let prompt = |index| {
            let own = stream_of(seed, index);
            let ids = (0..self.prompt_tokens).map(|i| token(stream_of(own, i))).collect();
            Prompt { text: String::new(), ids }
        };
        (0..self.prompts).map(prompt).collect()
    }
}

/// What the shop of a prompt has in stock.
const GOODS: [&str; 8] = ["apples", "chairs", "lamps", "books", "nails", "shirts", "cups", "pens"];
/// Texts that are most likely one token each, to make up what is missing.
const FILLERS: [&str; 5] = [" a", " the", " .", "\n", "0"];
const CLOSING: &str = " How many are that in all?";

/// A stock-taking of exactly `tokens` tokens whose numbers depend on `seed`.
fn prompt(tokenizer: &ChatTokenizer, tokens: usize, seed: u64) -> Result<Prompt, anyhow::Error> {
    let number = |index: usize, below: u64| stream_of(seed, index) % below;
    let opening = format!("{} is the number of a shop with", 100_000 + number(0, 900_000));
    let goods = |index: usize| {
        let kind = GOODS[number(2 * index + 2, GOODS.len() as u64) as usize];
        format!(" {} {kind},", 100 + number(2 * index + 1, 900))
    };
    let text = |count: usize, filler: &str| {
        let list: String = (0..count).map(goods).collect();
        format!("{opening}{list}{filler}{CLOSING}")
    };
    let encode = |text: &str| tokenizer.encode_prompt(text).context("a prompt");
    let shortest = encode(&text(0, ""))?.len();
    if shortest > tokens {
        bail!("prompts of {tokens} tokens are too short here: --prompt-tokens {shortest} or more");
    }
    // As many goods as fit: every one is at least a token.
    let (mut fits, mut too_many) = (0, tokens - shortest + 1);
    while too_many - fits > 1 {
        let middle = fits.midpoint(too_many);
        if encode(&text(middle, ""))?.len() <= tokens { fits = middle } else { too_many = middle }
    }
    let missing = tokens - encode(&text(fits, ""))?.len();
    for filler in FILLERS {
        let text = text(fits, &filler.repeat(missing));
        let ids = encode(&text)?;
        if ids.len() == tokens {
            return Ok(Prompt { text, ids });
        }
    }
    bail!(
        "the model's tokenizer makes no text of exactly {tokens} tokens; try --prompt-tokens {}",
        tokens - missing
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use onpolicy_engine::model::loading::load;
    use std::collections::HashSet;

    #[test]
    fn workloads_by_name() {
        let workload = Workload::named("w4").expect("a name");
        assert_eq!(workload.describe(), "W4: 4 x 16 samples, 987 prompt + 64 new tokens");
        assert_eq!((workload.all_samples(), workload.all_new_tokens()), (64, 4096));
        assert_eq!((workload.unshared().prompts, workload.unshared().samples), (64, 1));
        let error = Workload::named("W9").expect_err("no such name");
        assert!(error.contains("W1, W2, W3, W4, smoke") && error.contains("--prompts"), "{error}");
    }

    #[test]
    fn prompts_are_as_long_as_they_should_be_and_differ() {
        let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tiny/llama-tied");
        let model = load(tiny).expect("a golden checkpoint");
        let workload = Workload::custom([3, 2, 41, 8]);
        workload.check(&model.config).expect("it fits");
        let prompts = |seed| workload.prompts(&model.tokenizer, seed).expect("prompts");
        let (first, second) = (prompts(1), prompts(2));
        assert_eq!(first, prompts(1));
        assert!(first.iter().chain(&second).all(|prompt| prompt.ids.len() == 41));
        let texts: HashSet<&str> = first.iter().chain(&second).map(|p| &p.text[..6]).collect();
        assert_eq!(texts.len(), 6, "the first words differ");
        let error = Workload::custom([1, 1, 5, 1]).prompts(&model.tokenizer, 1).expect_err("short");
        assert!(error.to_string().contains("--prompt-tokens"), "{error}");
        let error = Workload::named("W4").expect("a name").check(&model.config).expect_err("long");
        assert!(error.to_string().contains("context is 256"), "{error}");
    }

    #[test]
    fn random_prompts_differ_from_the_first_tokens_on() {
        let workload = Workload::custom([64, 1, 40, 8]);
        let prompts = workload.random_prompts(512, 3);
        assert!(prompts.iter().all(|prompt| prompt.ids.len() == 40));
        assert!(prompts.iter().flat_map(|prompt| &prompt.ids).all(|&token| token < 512));
        let first: HashSet<&[u32]> = prompts.iter().map(|prompt| &prompt.ids[..4]).collect();
        assert_eq!(first.len(), 64);
        assert_eq!(prompts, workload.random_prompts(512, 3));
        assert_ne!(prompts, workload.random_prompts(512, 4));
    }

    #[test]
    fn memory_for_all_samples_at_once() {
        let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tiny/llama-tied");
        let model = load(tiny).expect("a golden checkpoint").config;
        // 41 tokens fill two blocks; the rest of 49 takes two more for every sample, one to spare.
        let blocks = 3 * (2 + 2 * 3);
        let bytes = Workload::custom([3, 2, 41, 8]).kv_bytes(&model);
        assert_eq!(bytes, blocks * KvCache::block_bytes(&model));
    }
}
