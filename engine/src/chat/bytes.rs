//! How a vocabulary spells bytes.

use std::sync::LazyLock;
use tokenizers::Tokenizer;

/// How the strings of a vocabulary stand for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// Every byte is one printable character (GPT-2's table).
    ByteLevel,
    /// `▁` is a space and `<0xAB>` a byte (sentencepiece).
    SentencePiece,
    /// The strings are what they say.
    Plain,
}

impl Spelling {
    /// Finds out from the tokenizer's decoder.
    pub fn of(tokenizer: &Tokenizer) -> Self {
        let decoder = serde_json::to_value(tokenizer.get_decoder()).unwrap_or_default();
        let steps = decoder["decoders"].as_array().cloned().unwrap_or_default();
        let names = |name: &str| decoder["type"] == name || steps.iter().any(|s| s["type"] == name);
        if decoder["type"] == "ByteLevel" {
            Self::ByteLevel
        } else if names("ByteFallback") || names("Metaspace") {
            Self::SentencePiece
        } else {
            Self::Plain
        }
    }

    /// The bytes of one token.
    pub fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel => {
                let spelled: Option<Vec<u8>> = token.chars().map(byte_of).collect();
                // Added tokens are not spelled in the table's characters.
                spelled.unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Self::SentencePiece => match fallback_byte(token) {
                Some(byte) => vec![byte],
                None => token.replace('▁', " ").into_bytes(),
            },
            Self::Plain => token.as_bytes().to_vec(),
        }
    }
}

/// The byte of a token like `<0xAB>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The byte that a character stands for in GPT-2's table: printable Latin-1 characters stand for
/// themselves, the other bytes, in order, are the characters from U+0100 on.
fn byte_of(character: char) -> Option<u8> {
    static TABLE: LazyLock<Vec<Option<u8>>> = LazyLock::new(|| {
        let mut table = vec![None; 0x100 + 68];
        let mut moved = 0x100;
        for byte in 0..=u8::MAX {
            let place = if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
                usize::from(byte)
            } else {
                moved += 1;
                moved - 1
            };
            table[place] = Some(byte);
        }
        table
    });
    TABLE.get(character as usize).copied().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_level_table_covers_every_byte_once() {
        let mut seen: Vec<u8> = (0..400).filter_map(char::from_u32).filter_map(byte_of).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn spellings_give_bytes() {
        assert_eq!(Spelling::ByteLevel.bytes("Ġhi"), b" hi");
        assert_eq!(Spelling::ByteLevel.bytes("Ċ"), b"\n");
        assert_eq!(Spelling::ByteLevel.bytes("Ã"), [0xC3]);
        assert_eq!(Spelling::ByteLevel.bytes("<｜end｜>"), "<｜end｜>".as_bytes());
        assert_eq!(Spelling::SentencePiece.bytes("▁hi"), b" hi");
        assert_eq!(Spelling::SentencePiece.bytes("<0xE4>"), [0xE4]);
        assert_eq!(Spelling::SentencePiece.bytes("<0xE>"), b"<0xE>");
        assert_eq!(Spelling::Plain.bytes("▁hi"), "▁hi".as_bytes());
    }
}
