//! Names of tensors: Hugging Face's to GGUF's.

/// Parts of a layer, below `model.layers.N.` there and `blk.N.` here.
const PARTS: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Tensors outside the layers.
const OUTER: [(&str, &str); 3] =
    [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// The name in a GGUF file of a tensor that Hugging Face calls `name`.
pub(super) fn to_gguf(name: &str) -> Option<String> {
    translate(name, "model.layers.", "blk.", |(theirs, ours)| (theirs, ours))
}

/// Hugging Face's name of a tensor that a GGUF file calls `name`.
pub(super) fn from_gguf(name: &str) -> Option<String> {
    translate(name, "blk.", "model.layers.", |(theirs, ours)| (ours, theirs))
}

fn translate(
    name: &str,
    from_layer: &str,
    to_layer: &str,
    direction: fn((&'static str, &'static str)) -> (&'static str, &'static str),
) -> Option<String> {
    let (stem, kind) = name.rsplit_once('.')?;
    let find = |table: &[(&'static str, &'static str)], part: &str| {
        table.iter().map(|pair| direction(*pair)).find(|(from, _)| *from == part).map(|pair| pair.1)
    };
    match stem.strip_prefix(from_layer) {
        Some(rest) => {
            let (layer, part) = rest.split_once('.')?;
            Some(format!("{to_layer}{layer}.{}.{kind}", find(&PARTS, part)?))
        }
        None => Some(format!("{}.{kind}", find(&OUTER, stem)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_translate_both_ways() {
        let pairs = [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("lm_head.weight", "output.weight"),
            ("model.layers.12.self_attn.q_proj.bias", "blk.12.attn_q.bias"),
            ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ];
        for (theirs, ours) in pairs {
            assert_eq!(to_gguf(theirs).as_deref(), Some(ours));
            assert_eq!(from_gguf(ours).as_deref(), Some(theirs));
        }
        assert_eq!(to_gguf("model.layers.0.mlp.experts.weight"), None);
        assert_eq!(from_gguf("rope_freqs.weight"), None);
    }
}
