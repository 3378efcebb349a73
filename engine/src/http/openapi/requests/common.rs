//! Fields that all generating routes have, by the names of OpenAI's; see `fields::Common`.

use super::{About, Properties, boolean, integer, number, object, properties, text, texts, word};
use crate::http::neutral::schema as neutral;
use onpolicy_plugin_api::sampling::MAX_TOP_LOGPROBS;
use serde_json::{Value, json};

impl About<'_> {
    /// All of them.
    pub fn common(&self) -> Properties {
        let mut common = properties(json!({
            "model": self.model(),
            "max_tokens": self.max_tokens(),
            "prompt_logprobs": integer("Report the prompt's log-probs, and this many of the \
                likeliest tokens; not in a stream", 0, MAX_TOP_LOGPROBS),
            "truncate_prompt_tokens": self.truncation(),
            "priority": {"description": "Requests with a lower one begin first", "type": "integer",
                "minimum": i32::MIN, "maximum": i32::MAX, "example": 0},
            "cache_salt": {"description": "Only requests with the same one share prefixes",
                "type": "string", "minLength": 1, "maxLength": 1024, "example": "mine"},
            "stop": self.stop(),
            "include_stop_str_in_output": boolean("Leave what stopped a sample in its text", false),
            "skip_special_tokens": boolean("Leave special tokens out of the text", true),
            "return_token_ids": boolean("Report token ids", false),
            "return_tokens_as_token_ids": boolean("Name tokens token_id:7 in log-probs", false),
            "stream": boolean("Answer with server-sent events", false),
            "stream_options": stream_options(),
            "request_id": {"description": "The client's name for the request", "type": "string",
                "pattern": "^[!-~]{1,128}$", "example": "mine"},
            "user": {"type": "string", "example": "someone"},
            "safety_identifier": {"type": "string", "example": "someone"},
        }));
        common.extend(self.sampling());
        common.extend(structured());
        common.extend(neutral::shared());
        common
    }

    /// See `sampling::take`.
    fn sampling(&self) -> Properties {
        properties(json!({
            "n": integer("Samples of each prompt", 1, self.info.max_samples),
            "min_tokens": integer("No sample ends before", 0, self.info.max_model_len),
            "temperature": number("0 is greedy", 0.0, 100.0),
            "top_k": {"description": "Keep the likeliest; -1 and 0 keep all", "type": "integer",
                "minimum": -1, "maximum": i64::MAX, "example": 40},
            "top_p": {"description": "Keep the likeliest up to this probability", "type": "number",
                "exclusiveMinimum": 0, "maximum": 1, "example": 0.9},
            "min_p": number("Leave out tokens less likely than this share of the likeliest", 0.0, 1.0),
            "repetition_penalty": {"description": "Divides the logits of tokens that were there \
                before; 1 changes nothing", "type": "number", "exclusiveMinimum": 0,
                "maximum": f32::MAX, "example": 1.1},
            "presence_penalty": number("Taken from the logits of generated tokens", -2.0, 2.0),
            "frequency_penalty": number("The same for each time they were generated", -2.0, 2.0),
            "logit_bias": {"description": "Added to logits, by token id", "type": "object",
                "propertyNames": {"pattern": "^\\+?[0-9]+$"},
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                "example": {"5": -100}},
            "allowed_token_ids": self.ids(1),
            "bad_words": {"description": "Texts that are not generated", "type": "array",
                "items": {"type": "string", "minLength": 1}, "maxItems": 1024, "example": ["bad"]},
            "logprobs_mode": word("The distribution that log-probs are those of",
                &["processed", "raw", "processed_logprobs", "raw_logprobs"]),
            "seed": {"description": "Same seed, same weights, same tokens", "type": "integer",
                "minimum": i64::MIN, "maximum": u64::MAX, "example": 7},
            "stop_token_ids": self.ids(0),
            "ignore_eos": boolean("Go on past end-of-sequence tokens", false),
        }))
    }

    pub fn model(&self) -> Value {
        json!({ "type": "string", "enum": [self.info.name] })
    }

    pub fn max_tokens(&self) -> Value {
        integer("Most new tokens of a sample", 1, self.info.max_model_len - 1)
    }

    /// Text, token ids, or a list of either.
    pub fn prompts(&self) -> Value {
        let (text, ids) = (json!({"type": "string", "minLength": 1}), self.ids(1));
        json!({
            "description": "Text, token ids, or a list of either",
            "anyOf": [text, ids, self.several(&text), self.several(&ids)],
            "example": "2+2 =",
        })
    }

    /// A list of prompts.
    pub fn several(&self, prompt: &Value) -> Value {
        json!({"type": "array", "items": prompt, "minItems": 1, "maxItems": self.limits.prompts})
    }

    pub fn ids(&self, least: usize) -> Value {
        let id = json!({"type": "integer", "minimum": 0, "maximum": self.info.vocab_size - 1});
        json!({"type": "array", "items": id, "minItems": least, "example": [5]})
    }

    fn truncation(&self) -> Value {
        json!({
            "description": "Keep this many of the prompt's last tokens; -1: as many as fit",
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": self.info.max_model_len},
                {"const": -1},
            ],
            "example": 8,
        })
    }

    fn stop(&self) -> Value {
        let text = json!({"type": "string", "minLength": 1});
        json!({
            "description": "Strings that end a sample",
            "anyOf": [text, {"type": "array", "items": text, "maxItems": self.limits.stop_strings}],
            "example": ["\n\n"],
        })
    }
}

fn stream_options() -> Value {
    let mut options =
        properties(json!({"include_usage": boolean("End with a chunk about token counts", false)}));
    options.extend(neutral::stream_options());
    object(&Properties::new(), options)
}

/// What the text must be; see `structured::take`. One of them may be sent.
fn structured() -> Properties {
    let mut outputs = kinds("");
    outputs.extend(properties(json!({
        "json_object": boolean("Some JSON object", true),
        "disable_any_whitespace": boolean("JSON without white space between its parts", false),
        "disable_fallback": boolean("There is nothing to fall back to", false),
    })));
    let mut outputs = object(&Properties::new(), outputs);
    outputs["description"] = "What the text must be".into();
    outputs["example"] = json!({"regex": "[0-9]+"});
    let mut structured = kinds("guided_");
    structured.insert("structured_outputs".into(), outputs);
    structured.insert("response_format".into(), response_format());
    structured
}

fn kinds(prefix: &str) -> Properties {
    let kinds = [
        ("json", schema()),
        ("regex", text("A regular expression", "[0-9]+")),
        ("choice", texts("One of these", "yes")),
        ("grammar", text("A grammar in Lark's notation", "start: \"a\"")),
    ];
    kinds.into_iter().map(|(kind, schema)| (format!("{prefix}{kind}"), schema)).collect()
}

fn schema() -> Value {
    json!({
        "description": "A JSON schema, or the text of one",
        "anyOf": [{"type": "object"}, {"type": "string"}, {"const": true}],
        "example": {"type": "integer"},
    })
}

fn response_format() -> Value {
    let named = object(
        &properties(json!({"name": text("Of the schema", "answer"), "schema": schema()})),
        properties(json!({
            "description": text("Of the schema", "an answer"),
            "strict": boolean("Every schema is followed strictly", true),
        })),
    );
    let of = |kind: &str| properties(json!({"type": {"const": kind}}));
    let mut with_schema = of("json_schema");
    with_schema.insert("json_schema".into(), named);
    let none = Properties::new;
    json!({
        "description": "What the text must be",
        "oneOf": [
            object(&of("text"), none()),
            object(&of("json_object"), none()),
            object(&with_schema, none()),
        ],
        "example": {"type": "text"},
    })
}
