//! An engine: it says the lines that it was given, whoever asks.

use onpolicy_plugin_api::{
    Engine, EngineError, Event, FinishReason, ModelInfo, Request, RequestId, Sink, Token,
    TokenStats, WeightUpdate,
};
use serde::Deserialize;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// Sample `i` of every request is line `i`, and the first lines again if there are too few.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parrot {
    /// Token ids of each line.
    lines: Vec<Vec<u32>>,
    /// Number of token ids of the model that is trained.
    vocab_size: usize,
    #[serde(skip)]
    version: AtomicU64,
    #[serde(skip)]
    requests: AtomicU64,
}

impl Engine for Parrot {
    fn info(&self) -> ModelInfo {
        ModelInfo {
            name: "parrot".into(),
            max_model_len: 1 << 20,
            vocab_size: self.vocab_size,
            eos_token_ids: Vec::new(),
            max_samples: 1 << 10,
        }
    }

    fn submit(&self, request: Request, mut sink: Box<dyn Sink>) -> Result<RequestId, EngineError> {
        request.params.validate()?;
        if self.lines.is_empty() {
            return Err(EngineError::invalid("lines", "must hold a line"));
        }
        let weight_version = self.weight_version();
        // As if every token were as likely as any other; what it cannot tell is NaN.
        let logprob = -(self.vocab_size as f32).ln();
        let stats = TokenStats { logprob, entropy: f32::NAN, baseline: f32::NAN };
        for index in 0..request.params.n {
            let line = &self.lines[index % self.lines.len()];
            for &id in line.iter().take(request.params.max_tokens) {
                let token = Token { id, stats, weight_version, top: Vec::new() };
                if !sink.send(Event::Token { index, token }) {
                    break;
                }
            }
            let cut = line.len() > request.params.max_tokens;
            let reason = if cut { FinishReason::Length } else { FinishReason::Stop };
            sink.send(Event::Finished { index, reason });
        }
        Ok(RequestId(self.requests.fetch_add(1, SeqCst)))
    }

    /// A request has ended before anybody could abort it.
    fn abort(&self, _: RequestId, _: Option<usize>) {}

    fn weight_version(&self) -> u64 {
        self.version.load(SeqCst)
    }

    /// It looks at new weights and learns nothing from them.
    fn update_weights(
        &self,
        update: WeightUpdate,
        version: Option<u64>,
    ) -> Result<u64, EngineError> {
        let WeightUpdate::Directory(dir) = update else {
            return Err(EngineError::unsupported("weights written in place"));
        };
        if !dir.join("model.safetensors").is_file() {
            let reason = format!("{} holds no model.safetensors", dir.display());
            return Err(EngineError::invalid("weight_dir", reason));
        }
        let version = version.unwrap_or_else(|| self.weight_version() + 1);
        self.version.store(version, SeqCst);
        Ok(version)
    }
}
