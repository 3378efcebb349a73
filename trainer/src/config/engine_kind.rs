//! Which engine a configuration names, and which keys have a meaning for it.

use super::{
    ConfigError, Engine,
    sections::{OnUpdate, ServeDtype},
    validate::{Checked, not_empty, quoted, rule},
};
use onpolicy_engine::remote::{RemoteOptions, base_url};
use onpolicy_plugin_api::EngineError;
use std::fmt;

/// Which engine draws the samples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineKind {
    /// The one in this process that serves the tensors that are trained.
    Native,
    /// mistral.rs, in this process.
    Mistralrs,
    /// vLLM or SGLang servers at these addresses.
    Remote(Vec<String>),
    /// A plug-in of this name.
    Plugin(String),
}

impl Engine {
    /// Which engine it is.
    pub fn kind(&self) -> EngineKind {
        match self.kind.trim() {
            "native" => EngineKind::Native,
            "mistralrs" => EngineKind::Mistralrs,
            "remote" => EngineKind::Remote(self.urls.clone()),
            kind if kind.contains("://") => {
                EngineKind::Remote(kind.split(',').map(|url| url.trim().to_string()).collect())
            }
            kind => EngineKind::Plugin(kind.to_string()),
        }
    }

    pub(super) fn validate_kind(&self) -> Checked {
        not_empty("engine.kind", &self.kind)?;
        let kind = self.kind();
        self.validate_urls(&kind)?;
        let (remote, options) = match &kind {
            EngineKind::Remote(_) => (true, false),
            EngineKind::Plugin(_) | EngineKind::Mistralrs => (false, true),
            EngineKind::Native => (false, false),
        };
        let only = |key: &str, used: bool, of: &str| {
            rule(key, "...", used, || format!("has no effect unless engine.kind is {of}"))
        };
        only("engine.remote", remote || self.remote == RemoteOptions::default(), "\"remote\"")?;
        let options = options || self.options.is_empty();
        only("engine.options", options, "\"mistralrs\" or a plug-in")?;
        self.remote.validate().map_err(|error| self.remote_error(error))?;
        self.validate_native(&kind)
    }

    fn validate_urls(&self, kind: &EngineKind) -> Checked {
        let named = self.kind.trim() == "remote";
        rule("engine.urls", "[...]", named || self.urls.is_empty(), || {
            "has no effect unless engine.kind is \"remote\"".into()
        })?;
        let EngineKind::Remote(urls) = kind else { return Ok(()) };
        let key = if named { "engine.urls" } else { "engine.kind" };
        rule(key, "[]", !urls.is_empty(), || "must name a server, as http://host:port".into())?;
        let mut seen = Vec::new();
        for url in urls {
            let base = base_url(url);
            let reason = || base.clone().err().unwrap_or_default();
            rule(key, quoted(url), base.is_ok(), reason)?;
            rule(key, quoted(url), !seen.contains(&base), || "is named twice".into())?;
            seen.push(base);
        }
        Ok(())
    }

    fn remote_error(&self, error: EngineError) -> ConfigError {
        match error {
            EngineError::Invalid { field, reason } => {
                ConfigError::Shape { key: format!("engine.remote.{field}"), reason }
            }
            other => ConfigError::Shape { key: "engine.remote".into(), reason: other.to_string() },
        }
    }

    /// Keys of the native engine mean nothing to another, and the other way round.
    fn validate_native(&self, kind: &EngineKind) -> Checked {
        if *kind == EngineKind::Native {
            let unused = self.transfer_dir.is_none();
            return rule("engine.transfer_dir", "...", unused, || {
                "has no effect: the native engine serves the weights that are trained".into()
            });
        }
        let default = Self::default();
        let shared = *kind == EngineKind::Mistralrs;
        let checks = [
            ("serve_dtype", self.serve_dtype == ServeDtype::F32),
            ("profile", !self.profile),
            ("num_speculative_tokens", self.num_speculative_tokens.is_none()),
            ("enforce_eager", !self.enforce_eager),
            ("async_scheduling", self.async_scheduling.is_none()),
            ("on_update", self.on_update == OnUpdate::Keep),
            ("prefix_cache", self.prefix_cache),
            ("max_batched_tokens", self.max_batched_tokens == default.max_batched_tokens),
            ("kv_memory_mb", self.kv_memory_mb == default.kv_memory_mb),
            ("max_model_len", shared || self.max_model_len.is_none()),
        ];
        for (key, unused) in checks {
            let hint = match (key, kind) {
                ("on_update", EngineKind::Remote(_)) => "; see engine.remote.pause",
                (_, EngineKind::Remote(_)) => "; it is a setting of the server's own",
                _ => "",
            };
            rule(&format!("engine.{key}"), "...", unused, || {
                format!("has no effect with engine.kind = {}{hint}", quoted(&self.kind))
            })?;
        }
        match &self.transfer_dir {
            Some(dir) => not_empty("engine.transfer_dir", dir),
            None => Ok(()),
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Native => f.write_str("native"),
            Self::Mistralrs => f.write_str("mistralrs"),
            Self::Remote(urls) => f.write_str(&urls.join(",")),
            Self::Plugin(name) => f.write_str(name),
        }
    }
}
