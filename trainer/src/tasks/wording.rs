//! Options that every built-in task understands, and how a question becomes a conversation.

use onpolicy_plugin_api::{Message, Options, Role};
use serde::Deserialize;

/// What a `prompt` template must contain.
const PLACEHOLDER: &str = "{question}";

/// The options shared by all built-in tasks.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Common {
    /// Seed of the training stream; the run's seed if not given.
    pub seed: Option<u64>,
    /// System message that stands over every problem.
    pub system: Option<String>,
    /// What the user says, with `{question}` where the question goes; the bare question if not
    /// given.
    pub prompt: Option<String>,
}

impl Common {
    /// Splits the shared options from those of one task.
    ///
    /// # Errors
    /// A shared option has the wrong type, or `prompt` lacks `{question}`.
    pub fn split(options: &Options) -> Result<(Self, Options), String> {
        let of_all = |key: &str| ["seed", "system", "prompt"].contains(&key);
        let (common, own) =
            options.0.clone().into_iter().partition::<Vec<_>, _>(|(key, _)| of_all(key));
        let common: Self = Options(common.into_iter().collect()).parse()?;
        match &common.prompt {
            Some(prompt) if !prompt.contains(PLACEHOLDER) => {
                Err(format!("prompt = '{prompt}' must contain {PLACEHOLDER}"))
            }
            _ => Ok((common, Options(own.into_iter().collect()))),
        }
    }

    /// The conversation that asks `question`.
    pub fn messages(&self, question: &str) -> Vec<Message> {
        let system = self.system.iter().map(|s| Message { role: Role::System, content: s.clone() });
        let prompt = self.prompt.as_deref().unwrap_or(PLACEHOLDER);
        let user = Message::user(prompt.replace(PLACEHOLDER, question));
        system.chain([user]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn split(json: serde_json::Value) -> Result<(Common, Options), String> {
        Common::split(&Options(json.as_object().unwrap().clone()))
    }

    #[test]
    fn a_question_is_the_whole_prompt_by_default() {
        let (common, own) = split(json!({"digits": 2})).unwrap();
        assert_eq!(common.messages("What is 1+1?"), [Message::user("What is 1+1?")]);
        assert_eq!(own.0.keys().collect::<Vec<_>>(), ["digits"]);
    }

    #[test]
    fn system_and_prompt_wrap_the_question() {
        let given = json!({"system": "Be brief.", "prompt": "Q: {question}\nA:", "seed": 3});
        let (common, own) = split(given).unwrap();
        assert_eq!(common.seed, Some(3));
        assert!(own.0.is_empty());
        let system = Message { role: Role::System, content: "Be brief.".into() };
        assert_eq!(common.messages("why?"), [system, Message::user("Q: why?\nA:")]);
    }

    #[test]
    fn wrong_options_are_refused() {
        assert!(split(json!({"prompt": "Answer!"})).unwrap_err().contains("{question}"));
        assert!(split(json!({"seed": -1})).unwrap_err().contains("-1"));
    }
}
