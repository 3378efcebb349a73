//! Ranges, and rules between keys.

use super::{
    Config, ConfigError, Correction, DeviceName, Dtype, Engine, Eval, Model, Output, Rollout,
    Schedule, ServeDtype, Server, Train, sections::TIS_CAP,
};
use serde_json::Value;
use std::{collections::HashSet, fmt::Display};

pub(super) type Checked = Result<(), ConfigError>;

/// Largest count that is taken seriously anywhere.
const MANY: usize = 1 << 20;
/// Longest time limit, in seconds.
const WEEK: u64 = 7 * 86_400;

impl Config {
    pub(super) fn validate(&self) -> Checked {
        self.model.validate()?;
        self.engine.validate()?;
        self.server.validate()?;
        for (section, plugin) in
            [("task", &self.task), ("verifier", &self.verifier), ("gate", &self.gate)]
        {
            not_empty(&format!("{section}.name"), &plugin.name)?;
            plugin
                .options
                .iter()
                .try_for_each(|(key, v)| finite(&format!("{section}.{key}"), v))?;
        }
        self.rollout.validate()?;
        self.train.validate()?;
        self.eval.validate()?;
        self.output.validate()?;
        self.sizes_fit()
    }

    /// Rules between sections.
    fn sizes_fit(&self) -> Checked {
        self.copies_are_native()?;
        self.guesses_are_native()?;
        self.plans_behind_a_device()?;
        let (rollout, engine) = (&self.rollout, &self.engine);
        let most = engine.max_num_seqs;
        rule("rollout.group_size", rollout.group_size, rollout.group_size <= most, || {
            format!("must not be more than engine.max_num_seqs ({most})")
        })?;
        if let Some(longest) = engine.max_model_len {
            let new = rollout.max_new_tokens;
            rule("rollout.max_new_tokens", new, new < longest, || {
                format!("must be below engine.max_model_len ({longest})")
            })?;
        }
        let (parts, prompts) = (self.train.updates_per_batch, rollout.prompts_per_step);
        rule("train.updates_per_batch", parts, parts <= prompts, || {
            format!("must not be more than rollout.prompts_per_step ({prompts})")
        })
    }
}

impl Config {
    /// Whether weights are f32 on the CPU.
    fn is_native(&self) -> bool {
        let Model { device, dtype, .. } = &self.model;
        *device == DeviceName::Cpu && dtype.is_none_or(|dtype| dtype == Dtype::F32)
    }

    /// Copies in a narrow type are made of f32 weights on the CPU.
    fn copies_are_native(&self) -> Checked {
        let served = self.engine.serve_dtype;
        let ok = served == ServeDtype::F32 || self.is_native();
        rule("engine.serve_dtype", quoted(&served.to_string()), ok, || {
            "makes copies of f32 weights on the CPU; with another model.device or model.dtype \
             leave it \"f32\": the weights are served as they are"
                .into()
        })
    }

    /// Guesses change nothing only where rows do not depend on their batch.
    fn guesses_are_native(&self) -> Checked {
        let most = self.engine.num_speculative_tokens.unwrap_or(0);
        rule("engine.num_speculative_tokens", most, most == 0 || self.is_native(), || {
            "needs f32 on the CPU; with another model.device or model.dtype leave it out".into()
        })
    }

    /// What computes f32 on the CPU is the thread that plans.
    fn plans_behind_a_device(&self) -> Checked {
        let ahead = self.engine.async_scheduling == Some(true);
        rule("engine.async_scheduling", true, !(ahead && self.is_native()), || {
            "has no effect for f32 on the CPU; leave it out".into()
        })
    }
}

impl Model {
    fn validate(&self) -> Checked {
        not_empty("model.path", &self.path)?;
        let of_use = self.kernels || self.device != DeviceName::Cpu;
        rule("model.kernels", false, of_use, || {
            "is about a CUDA device and has no effect on the CPU; leave it out".into()
        })?;
        self.name.as_deref().map_or(Ok(()), |name| not_empty("model.name", name))
    }
}

impl Engine {
    fn validate(&self) -> Checked {
        self.validate_kind()?;
        self.kv_memory_mb.map_or(Ok(()), |mb| between("engine.kv_memory_mb", mb, 1, MANY))?;
        between("engine.max_num_seqs", self.max_num_seqs, 1, MANY)?;
        between("engine.max_batched_tokens", self.max_batched_tokens, 1, MANY)?;
        between("engine.max_waiting", self.max_waiting, 1, MANY)?;
        let guesses = self.num_speculative_tokens.unwrap_or(0);
        between("engine.num_speculative_tokens", guesses, 0, 15)?;
        match self.max_model_len {
            Some(longest) => between("engine.max_model_len", longest, 2, 1 << 24),
            None => Ok(()),
        }
    }
}

impl Server {
    fn validate(&self) -> Checked {
        not_empty("server.host", &self.host)?;
        self.weight_roots.iter().try_for_each(|root| not_empty("server.weight_roots", root))?;
        between("server.control_timeout_seconds", self.control_timeout_seconds, 1, 86_400)?;
        between("server.max_concurrent_requests", self.max_concurrent_requests, 1, MANY)?;
        between("server.max_connections", self.max_connections, 1, MANY)?;
        between("server.max_prompts", self.max_prompts, 1, MANY)?;
        between("server.max_samples", self.max_samples, 1, MANY)?;
        between("server.max_prompt_tokens", self.max_prompt_tokens, 1, 1 << 30)?;
        between("server.max_body_mb", self.max_body_mb, 1, 1024)?;
        between("server.max_undelivered_tokens", self.max_undelivered_tokens, 1, 1 << 30)?;
        between("server.request_timeout_seconds", self.request_timeout_seconds, 0, WEEK)?;
        between("server.body_timeout_seconds", self.body_timeout_seconds, 1, WEEK)?;
        between("server.header_timeout_seconds", self.header_timeout_seconds, 1, WEEK)?;
        between("server.write_timeout_seconds", self.write_timeout_seconds, 1, WEEK)?;
        between("server.shutdown_grace_seconds", self.shutdown_grace_seconds, 0, WEEK)
    }
}

impl Rollout {
    fn validate(&self) -> Checked {
        between("rollout.prompts_per_step", self.prompts_per_step, 1, MANY)?;
        between("rollout.group_size", self.group_size, 2, 4096)?;
        between("rollout.max_new_tokens", self.max_new_tokens, 1, MANY)?;
        above("rollout.temperature", self.temperature, 0.0, 100.0)?;
        between("rollout.timeout_seconds", self.timeout_seconds, 1, WEEK)
    }
}

impl Train {
    fn validate(&self) -> Checked {
        between("train.steps", self.steps, 1, i64::MAX as u64)?;
        between("train.seed", self.seed, 0, i64::MAX as u64)?;
        above("train.lr", self.lr, 0.0, 1.0)?;
        for (key, beta) in ["train.betas[0]", "train.betas[1]"].into_iter().zip(self.betas) {
            rule(key, beta, (0.0..1.0).contains(&beta), || "must be at least 0, below 1".into())?;
        }
        above("train.eps", self.eps, 0.0, 1.0)?;
        between("train.weight_decay", self.weight_decay, 0.0, 1.0)?;
        above("train.max_grad_norm", self.max_grad_norm, 0.0, 1e6)?;
        self.validate_schedule()?;
        let low = self.clip_low;
        rule("train.clip_low", low, low > 0.0 && low < 1.0, || "must be above 0, below 1".into())?;
        above("train.clip_high", self.clip_high, 0.0, 100.0)?;
        above("train.dual_clip", self.dual_clip, 1.0, 1000.0)?;
        let cap = self.tis_cap;
        between("train.tis_cap", cap, 1.0, 1000.0)?;
        let used = self.correction == Correction::Tis || cap == TIS_CAP;
        let needs_tis = || "has no effect unless train.correction is \"tis\"".into();
        rule("train.tis_cap", cap, used, needs_tis)?;
        between("train.updates_per_batch", self.updates_per_batch, 1, MANY)?;
        let tokens = self.micro_batch_tokens;
        tokens.map_or(Ok(()), |tokens| between("train.micro_batch_tokens", tokens, 1, 1 << 30))
    }

    fn validate_schedule(&self) -> Checked {
        between("train.warmup_steps", self.warmup_steps, 0, self.steps)?;
        let ratio = self.min_lr_ratio;
        between("train.min_lr_ratio", ratio, 0.0, 1.0)?;
        let used = self.schedule == Schedule::Cosine || ratio == 0.0;
        let needs_cosine = || "has no effect unless train.schedule is \"cosine\"".into();
        rule("train.min_lr_ratio", ratio, used, needs_cosine)
    }
}

impl Eval {
    fn validate(&self) -> Checked {
        between("eval.problems", self.problems, 1, MANY)?;
        between("eval.samples", self.samples, 1, 4096)?;
        between("eval.temperature", self.temperature, 0.0, 100.0)?;
        let k = &self.k;
        rule("eval.k", "[]", !k.is_empty(), || "must name at least one k".into())?;
        let distinct = k.iter().collect::<HashSet<_>>().len() == k.len();
        rule("eval.k", format!("{k:?}"), distinct, || "names a k twice".into())?;
        let samples = self.samples;
        k.iter().try_for_each(|&k| {
            let allowed = || format!("must be between 1 and eval.samples ({samples})");
            rule("eval.k", k, (1..=samples).contains(&k), allowed)
        })
    }
}

impl Output {
    fn validate(&self) -> Checked {
        not_empty("output.dir", &self.dir)?;
        between("output.keep_checkpoints", self.keep_checkpoints, 1, MANY)?;
        between("output.sample_prompts", self.sample_prompts, 0, MANY)
    }
}

pub(super) fn rule(
    key: &str,
    value: impl Display,
    ok: bool,
    rule: impl FnOnce() -> String,
) -> Checked {
    if ok {
        return Ok(());
    }
    Err(ConfigError::Value { key: key.into(), value: value.to_string(), rule: rule() })
}

/// `low <= value <= high`.
fn between<T: PartialOrd + Display>(key: &str, value: T, low: T, high: T) -> Checked {
    let ok = value >= low && value <= high;
    rule(key, value, ok, || format!("must be between {low} and {high}"))
}

/// `low < value <= high`.
fn above(key: &str, value: f64, low: f64, high: f64) -> Checked {
    let ok = value > low && value <= high;
    rule(key, value, ok, || format!("must be above {low} and at most {high}"))
}

pub(super) fn not_empty(key: &str, text: &str) -> Checked {
    rule(key, quoted(text), !text.trim().is_empty(), || "must not be empty".into())
}

/// TOML knows infinity and NaN, plug-in options (JSON) do not: they arrive as null.
fn finite(key: &str, value: &Value) -> Checked {
    match value {
        Value::Null => rule(key, "inf or nan", false, || "must be a finite number".into()),
        Value::Array(items) => items.iter().try_for_each(|item| finite(key, item)),
        Value::Object(map) => map.iter().try_for_each(|(k, v)| finite(&format!("{key}.{k}"), v)),
        _ => Ok(()),
    }
}

pub(super) fn quoted(text: &str) -> String {
    format!("\"{text}\"")
}
