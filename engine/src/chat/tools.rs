//! Calls of tools: how models write them, and what is made of them.
//!
//! # Layout
//! - [`ToolFormat`]: the forms of a call that are known here.
//! - [`CallParser`]: generated text, piece by piece, to content and calls.
//! - `scan`: JSON that is not complete yet.
//! - `prompt`: tools and calls in messages, for chat templates that do not know them.

mod parser;
pub(super) mod prompt;
mod scan;

pub use parser::{CallParser, Part};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// How a model writes a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolFormat {
    /// `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one after another: Hermes, Qwen.
    Hermes,
    /// `{"name": ..., "parameters": {...}}`, perhaps after `<|python_tag|>`, several separated by
    /// `;`: Llama 3.
    Llama3,
}

impl ToolFormat {
    /// The form that a chat template speaks of; none if it is one that is not known here.
    pub(super) fn of_template(source: &str) -> Option<Self> {
        let says = |word: &str| source.contains(word);
        if says("<tool_call>") && !says("<function=") && !says("<arg_key>") {
            Some(Self::Hermes)
        } else if says("parameters") && (says("ipython") || says("<|python_tag|>")) {
            Some(Self::Llama3)
        } else {
            None
        }
    }

    /// What a call's arguments are named.
    fn arguments(self) -> &'static str {
        match self {
            Self::Hermes => "arguments",
            Self::Llama3 => "parameters",
        }
    }

    /// A grammar in Lark's notation for one call of these tools, or for several.
    pub fn grammar(self, tools: &[Tool], several: bool) -> String {
        let calls = match (self, several) {
            (_, false) => "call",
            (Self::Hermes, true) => "call (\"\\n\" call)*",
            (Self::Llama3, true) => "call (\"; \" call)*",
        };
        let call = match self {
            Self::Hermes => "\"<tool_call>\\n\" body \"\\n</tool_call>\"",
            Self::Llama3 => "body",
        };
        let numbered = || tools.iter().enumerate();
        let bodies: Vec<String> = numbered().map(|(i, _)| format!("body_{i}")).collect();
        let rules = numbered().map(|(i, tool)| format!("body_{i}: %json {}\n", self.schema(tool)));
        let rules: String = rules.collect();
        format!("start: {calls}\ncall: {call}\nbody: {}\n{rules}", bodies.join(" | "))
    }

    /// The JSON schema of a call of this tool. Definitions move to its root, where references look
    /// for them.
    fn schema(self, tool: &Tool) -> Value {
        let mut parameters = tool.parameters.clone();
        let mut schema = json!({
            "x-guidance": {
                "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "
            },
            "type": "object",
            "properties": { "name": { "const": tool.name } },
            "required": ["name", self.arguments()],
            "additionalProperties": false,
        });
        for key in ["$defs", "definitions", "$schema"] {
            if let Some(value) = parameters.as_object_mut().and_then(|map| map.shift_remove(key)) {
                schema[key] = value;
            }
        }
        schema["properties"][self.arguments()] = parameters;
        schema
    }
}

/// A tool as a request offers it.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// The function's name.
    pub name: String,
    /// JSON schema of its arguments, an object.
    pub parameters: Value,
}

#[cfg(test)]
mod tests;
