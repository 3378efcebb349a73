//! The vocabulary of any decoder, also of one that this engine cannot run.

use super::{Keys, LoadError, eos_tokens};
use serde_json::Value;

/// Number of token ids, and the tokens that end a text. A model of text and pictures keeps them in
/// its `text_config`.
///
/// # Errors
/// A key is missing or wrong.
pub(in crate::model) fn vocabulary(
    config: &Value,
    generation: Option<&Value>,
) -> Result<(usize, Vec<u32>), LoadError> {
    let outer = Keys(config);
    let inner = outer.get("text_config").map_or(outer, Keys);
    let vocab_size = inner.count("vocab_size")?;
    let mut eos = eos_tokens(outer, generation)?;
    if eos.is_empty() {
        eos = eos_tokens(inner, None)?;
    }
    eos.retain(|&id| (id as usize) < vocab_size);
    Ok((vocab_size, eos))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn any_decoder_has_one() {
        let plain = json!({ "model_type": "gemma", "vocab_size": 100, "eos_token_id": [1, 106] });
        assert_eq!(vocabulary(&plain, None).unwrap(), (100, vec![1]));
        let generation = json!({ "eos_token_id": 7 });
        assert_eq!(vocabulary(&plain, Some(&generation)).unwrap(), (100, vec![7]));
        let nested = json!({ "text_config": { "vocab_size": 50, "eos_token_id": 3 } });
        assert_eq!(vocabulary(&nested, None).unwrap(), (50, vec![3]));
        let none = vocabulary(&json!({}), None).unwrap_err().to_string();
        assert!(none.contains("vocab_size"), "{none}");
    }
}
