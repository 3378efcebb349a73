//! A byte-level tokenizer small enough to be written down: token `2 + b` is byte `b`.

use onpolicy_engine::chat::{ChatTokenizer, TokenizerFiles};
use serde_json::{Map, Value, json};

pub const BOS: u32 = 0;
pub const EOS: u32 = 1;
/// The one token of more than one byte.
pub const HELLO: u32 = 261;
pub const VOCAB: usize = 262;

const TEMPLATE: &str = "{% for m in messages %}\
    {% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}{% endif %}\
    [{{ m.role }}]{{ m.content }}\n{% endfor %}{{ extra }}\
    {% if add_generation_prompt %}[assistant]{% endif %}";

/// The ids of a text's bytes, each its own token.
pub fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(|byte| 2 + u32::from(byte)).collect()
}

/// The letters in which byte-level BPE writes bytes.
fn letter(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        return byte as char;
    }
    let rank = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(256 + rank).unwrap()
}

pub fn tokenizer() -> ChatTokenizer {
    let mut vocab = Map::new();
    vocab.insert("<s>".into(), BOS.into());
    vocab.insert("</s>".into(), EOS.into());
    for byte in 0..=255u8 {
        vocab.insert(letter(byte).to_string(), (2 + u32::from(byte)).into());
    }
    for (i, word) in ["he", "ll", "hell", "hello"].iter().enumerate() {
        vocab.insert((*word).into(), (258 + i).into());
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    let byte_level = |kind: &str| json!({"type": kind, "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let text: Value = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(BOS, "<s>"), special(EOS, "</s>")],
        "normalizer": null,
        "pre_tokenizer": byte_level("ByteLevel"),
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}}},
        "decoder": byte_level("ByteLevel"),
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab,
            "merges": [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"]]},
    });
    let text = text.to_string();
    let files =
        TokenizerFiles { tokenizer: &text, chat_template: Some(TEMPLATE), ..Default::default() };
    ChatTokenizer::from_files(&files).unwrap()
}
