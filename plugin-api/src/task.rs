//! Tasks: where problems come from.

use serde::{Deserialize, Serialize};

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions that stand over the conversation.
    System,
    /// The person who asks.
    User,
    /// The model.
    Assistant,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: Role::User, content: content.into() }
    }
}

/// A question and what is needed to judge an answer to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The conversation that the model continues.
    pub messages: Vec<Message>,
    /// The reference answer, for the verifier.
    pub answer: String,
}

/// A source of problems. Problem `index` must be the same whenever it is asked for: a resumed run
/// asks again by index, and nothing else has to be stored.
pub trait TaskSource: Send + Sync {
    /// Problem number `index` of the training stream, which has no end (a finite set repeats,
    /// in a new order each time round).
    fn train(&self, index: u64) -> Problem;

    /// Problem number `index` of the held-out set, `None` past its end. A set without an end may
    /// answer for every index; held-out problems are then drawn from a stream of their own.
    fn eval(&self, index: u64) -> Option<Problem>;
}
