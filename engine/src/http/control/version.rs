//! What the weights are called. Every token carries the number of the weights that made it; a
//! client may call the weights anything, and finds the name here as long as they are in force.

use std::sync::Mutex;

/// The client's name for one version of the weights.
#[derive(Debug, Default)]
pub struct Name(Mutex<Option<(u64, String)>>);

/// What a client calls new weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// A number, which becomes the version of the tokens.
    Number(u64),
    /// Another name.
    Text(String),
}

impl Wanted {
    /// A text of digits alone is a number.
    pub fn new(text: String) -> Self {
        match text.parse() {
            Ok(number) if text.bytes().all(|byte| byte.is_ascii_digit()) => Self::Number(number),
            _ => Self::Text(text),
        }
    }

    /// The number, if it is one.
    pub fn number(&self) -> Option<u64> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Text(_) => None,
        }
    }
}

impl Name {
    /// Weights of this version are called so from now on.
    pub fn set(&self, version: u64, wanted: Wanted) {
        let name = match wanted {
            Wanted::Number(_) => None,
            Wanted::Text(text) => Some((version, text)),
        };
        *self.0.lock().unwrap_or_else(|poison| poison.into_inner()) = name;
    }

    /// What the weights of this version are called: their number, unless they have a name.
    pub fn of(&self, version: u64) -> String {
        let name = self.0.lock().unwrap_or_else(|poison| poison.into_inner());
        match &*name {
            Some((named, name)) if *named == version => name.clone(),
            _ => version.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_lasts_as_long_as_its_version() {
        let name = Name::default();
        assert_eq!(name.of(3), "3");
        assert_eq!(Wanted::new("12".into()), Wanted::Number(12));
        for text in ["step-12", "", "+1", "99999999999999999999"] {
            assert_eq!(Wanted::new(text.into()).number(), None, "{text}");
        }
        name.set(3, Wanted::new("step-3".into()));
        assert_eq!((name.of(3), name.of(4)), ("step-3".into(), "4".into()));
        name.set(5, Wanted::Number(5));
        assert_eq!(name.of(3), "3");
    }
}
