//! The scheduler's limits, and what it refuses because of them.

use super::drafts::DraftLimits;
use crate::block_manager::{BLOCK_SIZE, blocks_for};
use onpolicy_plugin_api::EngineError;

/// The limits that a scheduler works within.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Blocks of 16 tokens in the pool.
    pub num_blocks: usize,
    /// Most sequences that run at once; also the most samples of one request.
    pub max_num_seqs: usize,
    /// Most tokens of one step; at least `max_num_seqs`, so that every running sequence can decode
    /// in every step. Longer prompts are computed in pieces.
    pub max_batched_tokens: usize,
    /// Longest sequence, prompt and completion together.
    pub max_model_len: usize,
    /// Most requests that may wait to begin.
    pub max_waiting: usize,
    /// Whether blocks of earlier sequences are used again.
    pub prefix_cache: bool,
    /// How many tokens are guessed.
    pub drafts: DraftLimits,
}

impl SchedulerConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] naming the first field that is out of range.
    pub fn validate(&self) -> Result<(), EngineError> {
        let counts = [
            ("num_blocks", self.num_blocks),
            ("max_num_seqs", self.max_num_seqs),
            ("max_waiting", self.max_waiting),
        ];
        for (field, count) in counts {
            if count == 0 {
                return Err(EngineError::invalid(field, "must be at least 1"));
            }
        }
        if self.num_blocks >= u32::MAX as usize {
            let reason = format!("is {}; must be below {}", self.num_blocks, u32::MAX);
            return Err(EngineError::invalid("num_blocks", reason));
        }
        if self.max_model_len < 2 {
            let reason = "must be at least 2: one token of prompt, one of completion";
            return Err(EngineError::invalid("max_model_len", reason));
        }
        if self.max_batched_tokens < self.max_num_seqs {
            let reason = format!(
                "is {}; must be at least max_num_seqs ({}), one token per running sequence",
                self.max_batched_tokens, self.max_num_seqs
            );
            return Err(EngineError::invalid("max_batched_tokens", reason));
        }
        Ok(())
    }

    /// Length at which a sequence ends (prompt and completion together), if such a request can be
    /// served at all.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] naming the field, and what would fit.
    pub fn admissible_len(
        &self,
        prompt: usize,
        n: usize,
        max_tokens: usize,
    ) -> Result<usize, EngineError> {
        self.check_samples(n)?;
        if max_tokens == 0 {
            return Err(EngineError::invalid("max_tokens", "must be at least 1"));
        }
        self.check_prompt(prompt)?;
        let max_len = prompt.saturating_add(max_tokens).min(self.max_model_len);
        // The last token is never fed back, so it needs no KV.
        let need = blocks_for(max_len - 1);
        if need > self.num_blocks {
            let reason = format!(
                "a prompt of {prompt} tokens and {} new ones need {need} KV blocks of {BLOCK_SIZE} \
                 tokens, the pool has {}: lower max_tokens to {} or give the KV cache more memory",
                max_len - prompt,
                self.num_blocks,
                self.num_blocks * BLOCK_SIZE + 1 - prompt,
            );
            return Err(EngineError::invalid("max_tokens", reason));
        }
        Ok(max_len)
    }

    fn check_samples(&self, n: usize) -> Result<(), EngineError> {
        if n == 0 {
            return Err(EngineError::invalid("n", "must be at least 1"));
        }
        if n > self.max_num_seqs {
            let reason = format!(
                "is {n}; at most {} sequences run at once: ask for fewer samples or raise \
                 max_num_seqs",
                self.max_num_seqs
            );
            return Err(EngineError::invalid("n", reason));
        }
        Ok(())
    }

    fn check_prompt(&self, prompt: usize) -> Result<(), EngineError> {
        if prompt == 0 {
            return Err(EngineError::invalid("prompt", "is empty; give at least one token"));
        }
        if prompt >= self.max_model_len {
            let reason = format!(
                "has {prompt} tokens; the longest sequence has {}, of which at least one is \
                 generated: shorten the prompt to {}",
                self.max_model_len,
                self.max_model_len - 1
            );
            return Err(EngineError::invalid("prompt", reason));
        }
        if blocks_for(prompt) > self.num_blocks {
            let reason = format!(
                "has {prompt} tokens; the whole KV cache holds {}: shorten the prompt or give the \
                 KV cache more memory",
                self.num_blocks * BLOCK_SIZE
            );
            return Err(EngineError::invalid("prompt", reason));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: SchedulerConfig = SchedulerConfig {
        num_blocks: 5,
        max_num_seqs: 2,
        max_batched_tokens: 64,
        max_model_len: 128,
        max_waiting: 4,
        prefix_cache: true,
        drafts: DraftLimits { per_sequence: 0, rows: 0 },
    };

    #[test]
    fn lengths_are_capped_by_the_model() {
        let roomy = SchedulerConfig { num_blocks: 8, ..LIMITS };
        assert_eq!(roomy.admissible_len(20, 1, 3), Ok(23));
        assert_eq!(roomy.admissible_len(120, 2, 60), Ok(128));
        assert_eq!(roomy.admissible_len(127, 1, usize::MAX), Ok(128));
        // 81 tokens need KV for 80: the last one is not fed back.
        assert_eq!(LIMITS.admissible_len(40, 1, 41), Ok(81));
        assert_eq!(LIMITS.admissible_len(80, 1, 1), Ok(81));
    }

    #[test]
    fn refusals_say_what_to_change() {
        let refuse = |prompt, n, max_tokens| {
            LIMITS.admissible_len(prompt, n, max_tokens).unwrap_err().to_string()
        };
        assert_eq!(refuse(0, 1, 1), "prompt: is empty; give at least one token");
        assert_eq!(
            refuse(128, 1, 1),
            "prompt: has 128 tokens; the longest sequence has 128, of which at least one is \
             generated: shorten the prompt to 127"
        );
        assert_eq!(
            refuse(81, 1, 1),
            "prompt: has 81 tokens; the whole KV cache holds 80: shorten the prompt or give the \
             KV cache more memory"
        );
        assert_eq!(
            refuse(40, 1, 60),
            "max_tokens: a prompt of 40 tokens and 60 new ones need 7 KV blocks of 16 tokens, the \
             pool has 5: lower max_tokens to 41 or give the KV cache more memory"
        );
        assert_eq!(
            refuse(5, 3, 1),
            "n: is 3; at most 2 sequences run at once: ask for fewer samples or raise max_num_seqs"
        );
        assert_eq!(refuse(5, 0, 1), "n: must be at least 1");
        assert_eq!(refuse(5, 1, 0), "max_tokens: must be at least 1");
    }

    #[test]
    fn limits_without_sense_are_refused() {
        let refuse = |config: SchedulerConfig| config.validate().unwrap_err().to_string();
        assert_eq!(LIMITS.validate(), Ok(()));
        for (config, message) in [
            (SchedulerConfig { num_blocks: 0, ..LIMITS }, "num_blocks: must be at least 1"),
            (SchedulerConfig { max_waiting: 0, ..LIMITS }, "max_waiting: must be at least 1"),
            (
                SchedulerConfig { num_blocks: 1 << 32, ..LIMITS },
                "num_blocks: is 4294967296; must be below 4294967295",
            ),
            (
                SchedulerConfig { max_model_len: 1, ..LIMITS },
                "max_model_len: must be at least 2: one token of prompt, one of completion",
            ),
            (
                SchedulerConfig { max_batched_tokens: 1, ..LIMITS },
                "max_batched_tokens: is 1; must be at least max_num_seqs (2), one token per \
                 running sequence",
            ),
        ] {
            assert_eq!(refuse(config), message);
        }
    }
}
