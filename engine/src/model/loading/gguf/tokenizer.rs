//! GGUF's vocabulary to Hugging Face's tokenizer files.
//!
//! Only byte-level BPE is built (`tokenizer.ggml.model` = `gpt2`). A GGUF names the rule that cuts
//! text into words but does not hold it; [`rule`] knows the rules by name.

use super::super::LoadError;
use super::values::{Metadata, missing};
use serde_json::{Map, Value, json};

/// Words of Qwen2 and, with digits in threes, of Llama 3.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Words of Mistral's Tekken: cut where lower case is followed by upper case.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What llama.cpp does for `default`: these cuts, one after the other.
const DEFAULT: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

/// `tokenizer.ggml.token_type` of control tokens and of tokens that a user added.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// How one `tokenizer.ggml.pre` cuts text and joins tokens.
struct Rule {
    pre_tokenizer: Value,
    normalizer: Value,
    /// A word that is a token is taken whole, whatever the merges say.
    ignore_merges: bool,
    /// Whether a BOS goes before a text if the file does not say.
    add_bos: bool,
}

/// Where a text begins and ends, and how long it may be.
pub(super) struct Bounds {
    pub bos: Option<u32>,
    pub eos: Vec<u32>,
    pub max_length: usize,
}

/// The vocabulary of a GGUF file.
pub(super) struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    types: Vec<i64>,
    merges: Vec<(&'a str, &'a str)>,
    rule: Rule,
    /// What the tokenizer puts before and after a text.
    before: Option<u32>,
    after: Option<u32>,
    unknown: Option<u32>,
    padding: Option<u32>,
    templates: Map<String, Value>,
}

impl<'a> Vocabulary<'a> {
    /// Reads and checks the keys below `tokenizer.`.
    pub fn from_metadata(metadata: &'a Metadata) -> Result<Self, LoadError> {
        let required = |key: &str| metadata.text(key)?.ok_or_else(|| missing(key));
        let model = required("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(LoadError::unsupported("GGUF tokenizer", model, "gpt2 (byte-level BPE)"));
        }
        let rule = rule(required("tokenizer.ggml.pre")?)?;
        let tokens_key = "tokenizer.ggml.tokens";
        let tokens = metadata.texts(tokens_key)?.ok_or_else(|| missing(tokens_key))?;
        let types = metadata.integers("tokenizer.ggml.token_type")?;
        let types = types.unwrap_or_else(|| vec![1; tokens.len()]);
        if types.len() != tokens.len() {
            let reason = format!("{} tokens, but {} token types", tokens.len(), types.len());
            return Err(LoadError::Tokenizer(reason));
        }
        let merges_key = "tokenizer.ggml.merges";
        let merges = metadata.texts(merges_key)?.ok_or_else(|| missing(merges_key))?;
        let id = |key: &str| {
            let id = metadata.token_id(&format!("tokenizer.ggml.{key}"))?;
            Ok::<_, LoadError>(id.filter(|id| (*id as usize) < tokens.len()))
        };
        let flag = |key: &str| metadata.flag(&format!("tokenizer.ggml.{key}"));
        let add_bos = flag("add_bos_token")?.unwrap_or(rule.add_bos);
        let add_eos = flag("add_eos_token")?.unwrap_or(false);
        Ok(Self {
            before: id("bos_token_id")?.filter(|_| add_bos),
            after: id("eos_token_id")?.filter(|_| add_eos),
            unknown: id("unknown_token_id")?,
            padding: id("padding_token_id")?,
            merges: merges.into_iter().map(split_merge).collect::<Result<_, _>>()?,
            templates: templates(metadata)?,
            tokens,
            types,
            rule,
        })
    }

    /// `tokenizer.json`.
    pub fn tokenizer_json(&self) -> Result<Value, LoadError> {
        let mut vocab = Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if vocab.insert(token.to_string(), id.into()).is_some() {
                return Err(LoadError::Tokenizer(format!("token {token:?} is there twice")));
            }
        }
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": self.rule.normalizer,
            "pre_tokenizer": self.rule.pre_tokenizer,
            "post_processor": self.post_processor(),
            "decoder": byte_level(true),
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": self.rule.ignore_merges,
                "vocab": vocab,
                "merges": self.merges,
            },
        }))
    }

    fn added_tokens(&self) -> Vec<Value> {
        let numbered = self.tokens.iter().zip(&self.types).enumerate();
        let added = numbered.filter(|(_, (_, kind))| [CONTROL, USER_DEFINED].contains(kind));
        let entry = |(id, (token, kind)): (usize, (&&str, &i64))| {
            json!({
                "id": id,
                "content": token,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": *kind == CONTROL,
            })
        };
        added.map(entry).collect()
    }

    /// Puts BOS and EOS around a text, where the tokenizer does.
    fn post_processor(&self) -> Value {
        if self.before.is_none() && self.after.is_none() {
            return byte_level(false);
        }
        let special = |id: &u32| json!({ "SpecialToken": { "id": self.text(*id), "type_id": 0 } });
        let text = |name: &str| json!({ "Sequence": { "id": name, "type_id": 0 } });
        let around = |names: &[&str]| {
            let inner = names.iter().map(|name| text(name));
            let (before, after) = (self.before.iter(), self.after.iter());
            before.map(special).chain(inner).chain(after.map(special)).collect::<Vec<_>>()
        };
        let used = self.before.iter().chain(&self.after);
        let described = used.map(|id| {
            let token = self.text(*id);
            (token.to_string(), json!({ "id": token, "ids": [id], "tokens": [token] }))
        });
        json!({
            "type": "TemplateProcessing",
            "single": around(&["A"]),
            "pair": around(&["A", "B"]),
            "special_tokens": described.collect::<Map<_, _>>(),
        })
    }

    fn text(&self, id: u32) -> &'a str {
        self.tokens.get(id as usize).copied().unwrap_or_default()
    }

    /// `tokenizer_config.json`.
    pub fn tokenizer_config(&self, bounds: &Bounds) -> Value {
        let mut keys = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": bounds.max_length,
            "clean_up_tokenization_spaces": false,
            "add_bos_token": self.before.is_some(),
            "add_eos_token": self.after.is_some(),
        });
        let named = [
            ("bos_token", bounds.bos),
            ("eos_token", bounds.eos.first().copied()),
            ("unk_token", self.unknown),
            ("pad_token", self.padding),
        ];
        for (name, id) in named {
            if let Some(text) = id.map(|id| self.text(id)).filter(|text| !text.is_empty()) {
                keys[name] = json!(text);
            }
        }
        let only = self.templates.get("default").filter(|_| self.templates.len() == 1);
        match only {
            Some(template) => keys["chat_template"] = template.clone(),
            None if self.templates.is_empty() => {}
            None => {
                let entry = |(name, template)| json!({ "name": name, "template": template });
                keys["chat_template"] = self.templates.iter().map(entry).collect();
            }
        }
        keys
    }

    /// `generation_config.json`.
    pub fn generation_config(&self, bounds: &Bounds) -> Value {
        let mut keys = Map::new();
        let named = [
            ("bos_token_id", bounds.bos.map(|id| json!(id))),
            ("eos_token_id", (!bounds.eos.is_empty()).then(|| json!(bounds.eos))),
            ("pad_token_id", self.padding.map(|id| json!(id))),
        ];
        keys.extend(named.into_iter().filter_map(|(name, id)| Some((name.to_string(), id?))));
        Value::Object(keys)
    }
}

/// The two halves of a merge; the first character may itself be a space.
fn split_merge(merge: &str) -> Result<(&str, &str), LoadError> {
    let first = merge.chars().next().map_or(0, char::len_utf8);
    let space = merge[first..].find(' ').map(|at| at + first);
    let malformed = || LoadError::Tokenizer(format!("merge {merge:?} has no two halves"));
    let space = space.ok_or_else(malformed)?;
    Ok((&merge[..space], &merge[space + 1..]))
}

/// The chat templates by name; the nameless one is `default`.
fn templates(metadata: &Metadata) -> Result<Map<String, Value>, LoadError> {
    let mut templates = Map::new();
    if let Some(template) = metadata.text("tokenizer.chat_template")? {
        templates.insert("default".to_string(), template.into());
    }
    for name in metadata.texts("tokenizer.chat_templates")?.unwrap_or_default() {
        if let Some(template) = metadata.text(&format!("tokenizer.chat_template.{name}"))? {
            templates.insert(name.to_string(), template.into());
        }
    }
    Ok(templates)
}

/// The rule that a GGUF names.
fn rule(name: &str) -> Result<Rule, LoadError> {
    let plain = |pre_tokenizer: Value| Rule {
        pre_tokenizer,
        normalizer: Value::Null,
        ignore_merges: false,
        add_bos: false,
    };
    let digits = json!({ "type": "Digits", "individual_digits": true });
    Ok(match name {
        "smollm" => plain(json!({
            "type": "Sequence",
            "pretokenizers": [digits, byte_level(true)],
        })),
        "gpt-2" => plain(byte_level(true)),
        "default" => plain(cuts(&DEFAULT)),
        "qwen2" => Rule { normalizer: json!({ "type": "NFC" }), ..plain(cuts(&[QWEN2])) },
        "llama-bpe" | "llama3" | "llama-v3" => {
            Rule { ignore_merges: true, add_bos: true, ..plain(cuts(&[LLAMA3])) }
        }
        "tekken" => Rule { ignore_merges: true, add_bos: true, ..plain(cuts(&[TEKKEN])) },
        other => {
            let supported = "smollm, qwen2, llama-bpe, tekken, gpt-2, default; use the model's \
                             Hugging Face directory instead";
            return Err(LoadError::unsupported("GGUF pre-tokenizer", other, supported));
        }
    })
}

/// Cuts by regular expressions, one after the other, then bytes to characters.
fn cuts(patterns: &[&str]) -> Value {
    let cut = |pattern: &&str| {
        json!({
            "type": "Split",
            "pattern": { "Regex": pattern },
            "behavior": "Isolated",
            "invert": false,
        })
    };
    let steps: Vec<Value> =
        patterns.iter().map(cut).chain(std::iter::once(byte_level(false))).collect();
    json!({ "type": "Sequence", "pretokenizers": steps })
}

/// Bytes to characters; `words` cuts by GPT-2's own pattern first.
fn byte_level(words: bool) -> Value {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": false,
        "trim_offsets": true,
        "use_regex": words,
    })
}
