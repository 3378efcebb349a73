//! The bodies of `generate`'s routes, out of the tables by which they are parsed.

use super::messages::{conversation, template_kwargs};
use super::{About, Properties, boolean, integer, object, properties, word};
use crate::http::generate::{sglang_fields as sglang, trl, vllm_fields as vllm};
use crate::http::neutral::schema::all;
use onpolicy_plugin_api::sampling::MAX_TOP_LOGPROBS;
use serde_json::{Value, json};

impl About<'_> {
    /// `/inference/v1/generate`.
    pub fn vllm(&self) -> Value {
        let mut sampling = self.vllm_sampling();
        let kinds = "1 for a stream and 2 for a whole answer, as it is without this";
        sampling.extend(properties(json!({
            "prompt_logprobs": top("Report the prompt's log-probs, and this many of the likeliest"),
            "detokenize": boolean("Make text, if it is asked for", true),
            "output_kind": {"description": kinds, "type": "integer", "minimum": 0, "maximum": 2,
                "example": 2},
            "routed_experts_prompt_start": integer("There are none", 0, usize::MAX),
        })));
        let required = json!({
            "token_ids": self.ids(1),
            "sampling_params": example(object(&Properties::new(), sampling)),
        });
        let mut optional = self.known(vllm::BODY.map(|name| (name, name)));
        optional.extend(properties(json!({
            "output_mode": word("What the answer holds", &["tokens", "text"]),
            "return_token_ids": boolean("Repeat the prompt's token ids", false),
        })));
        optional.extend(all(&vllm::BODY_NEUTRAL));
        object(&properties(required), optional)
    }

    /// `/generate`.
    pub fn sglang(&self) -> Value {
        let text = json!({"type": "string", "minLength": 1});
        let ids = self.ids(1);
        let several = |one: &Value, example: Value| json!({"anyOf": [one, self.several(one)], "example": example});
        let shared = self.sglang_shared();
        let texts = properties(json!({ "text": several(&text, json!("2+2 =")) }));
        let tokens = properties(json!({ "input_ids": several(&ids, json!([5])) }));
        json!({ "oneOf": [object(&texts, shared.clone()), object(&tokens, shared)] })
    }

    fn sglang_shared(&self) -> Properties {
        let mut sampling = self.known(sglang::SAMPLING);
        sampling.extend(all(&sglang::SAMPLING_NEUTRAL));
        let same = ["model", "stream", "priority", "cache_salt"].map(|name| (name, name));
        let mut shared = self.known(same);
        shared.extend(self.known([("extra_key", "cache_salt"), ("session_id", "user")]));
        let name = self.known([("rid", "request_id")])["rid"].clone();
        let start = "Report the prompt's log-probs from here on; -1: not at all";
        shared.extend(properties(json!({
            "sampling_params": example(object(&Properties::new(), sampling)),
            "rid": {"description": "The client's name for the request, or for each prompt",
                "anyOf": [name, {"type": "array", "items": {"type": "string"}, "uniqueItems": true}],
                "example": "mine"},
            "return_logprob": boolean("Report log-probs", false),
            "logprob_start_len": {"description": start, "type": "integer", "minimum": -1,
                "maximum": i64::MAX, "example": -1},
            "top_logprobs_num": top("Report this many of the likeliest tokens"),
            "return_text_in_logprobs": boolean("Report the tokens' text", false),
            "return_prompt_token_ids": boolean("Repeat the prompts' token ids", false),
        })));
        shared.extend(all(&sglang::BODY_NEUTRAL));
        shared
    }

    /// `/generate/`.
    pub fn trl_prompts(&self) -> Value {
        let mut optional = self.trl_shared();
        optional.insert("images".into(), json!({"type": "null"}));
        let mut prompts = self.prompts();
        prompts["example"] = json!(["2+2 ="]);
        object(&properties(json!({ "prompts": prompts })), optional)
    }

    /// `/chat/`.
    pub fn trl_chats(&self) -> Value {
        let mut conversations = self.several(&conversation());
        conversations["example"] = json!([conversation()["example"]]);
        let mut optional = self.trl_shared();
        optional.insert("chat_template_kwargs".into(), template_kwargs());
        let tools = json!({"description": "For the chat template, as they are", "example": []});
        optional.insert("tools".into(), tools);
        object(&properties(json!({ "messages": conversations })), optional)
    }

    fn trl_shared(&self) -> Properties {
        let mut shared = self.known(trl::BESIDE.map(|name| (name, name)));
        shared.extend(self.known([("structured_outputs_regex", "guided_regex")]));
        let says =
            "Report this many of the likeliest tokens, and the drawn one; null: no log-probs";
        let kwargs = example(object(&Properties::new(), self.vllm_sampling()));
        shared.insert("logprobs".into(), top(says));
        shared.insert("generation_kwargs".into(), kwargs);
        shared
    }

    /// vLLM's `SamplingParams`, as far as all of its users here take them.
    fn vllm_sampling(&self) -> Properties {
        let mut sampling = self.known(vllm::SAMPLING.map(|name| (name, name)));
        sampling.insert("logprobs".into(), top("Report log-probs, and this many of the likeliest"));
        sampling.extend(all(&vllm::SAMPLING_NEUTRAL));
        sampling
    }

    /// Fields by the names of a route, which OpenAI's routes have by other names.
    fn known(&self, names: impl IntoIterator<Item = (&'static str, &'static str)>) -> Properties {
        let common = self.common();
        let one = |(name, known): (&str, &str)| {
            (name.to_string(), common.get(known).cloned().unwrap_or_default())
        };
        names.into_iter().map(one).collect()
    }
}

fn top(says: &str) -> Value {
    integer(says, 0, MAX_TOP_LOGPROBS)
}

fn example(mut sampling: Value) -> Value {
    sampling["example"] = json!({});
    sampling
}
