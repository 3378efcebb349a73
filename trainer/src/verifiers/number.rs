//! Numbers in running text, compared exactly at any length.
//!
//! What counts as a number:
//! - digits, with thousands commas where each group but the first has three digits: `1,234,567`
//!   is one number, `1,2` and `1234,567` are two;
//! - then perhaps a point and more digits: `3.50` is 3.5 and `8.` is 8, so a full stop after a
//!   number does no harm. A number may start with its point where a word or another point does
//!   not touch it: `.5`, but not in `...5`;
//! - a minus sign (`-` or `−`) is part of the number if it touches it and nothing that a number or
//!   a word could end with touches the sign: `= -5`, `(-5)` and `3 -5` end in -5, while `3-5`,
//!   `x-5` and `3 - 5` end in 5. A dollar sign may stand between: `-$5`.

/// A decimal number in normal form: no leading zeros, no trailing zeros after the point, no -0.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Decimal(String);

impl Decimal {
    /// True if it has no fraction.
    pub fn is_integer(&self) -> bool {
        !self.0.contains('.')
    }

    /// The normal form, such as `-12.5`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn new(negative: bool, integer: &str, fraction: &str) -> Self {
        let integer: String = integer.chars().filter(|&c| c != ',').collect();
        let integer = match integer.trim_start_matches('0') {
            "" => "0",
            digits => digits,
        };
        let fraction = fraction.trim_end_matches('0');
        let sign = if negative && (integer != "0" || !fraction.is_empty()) { "-" } else { "" };
        let point = if fraction.is_empty() { "" } else { "." };
        Self(format!("{sign}{integer}{point}{fraction}"))
    }
}

/// All numbers of a text, in order.
pub fn numbers(text: &str) -> impl Iterator<Item = Decimal> + '_ {
    let mut from = 0;
    std::iter::from_fn(move || {
        let start = from + text[from..].find(|c: char| c.is_ascii_digit())?;
        let (number, end) = number_at(text, start);
        from = end;
        Some(number)
    })
}

/// The number that a text consists of; `None` if there is anything else in it, spaces around it
/// aside.
pub fn parse(text: &str) -> Option<Decimal> {
    let text = text.trim();
    let body = text.trim_start_matches(['-', '\u{2212}', '+', '$']);
    let start = text.len() - body.len();
    let first = start + usize::from(body.starts_with('.'));
    if text[..start].chars().count() > 2 || !text[first..].starts_with(|c: char| c.is_ascii_digit())
    {
        return None;
    }
    let (number, end) = number_at(text, first);
    (end == text.len()).then_some(number)
}

/// The number whose first digit stands at byte `start`, and the byte after it.
fn number_at(text: &str, start: usize) -> (Decimal, usize) {
    let (before, rest) = text.split_at(start);
    if let Some(before) = leading_point(before) {
        let fraction = digits(rest);
        return (Decimal::new(is_negative(before), "", fraction), start + fraction.len());
    }
    let integer = grouped_digits(rest);
    let fraction = rest[integer.len()..].strip_prefix('.').map_or("", digits);
    let point = usize::from(!fraction.is_empty());
    let number = Decimal::new(is_negative(before), integer, fraction);
    (number, start + integer.len() + point + fraction.len())
}

/// What stands before a point that a number starts with.
fn leading_point(before: &str) -> Option<&str> {
    let before = before.strip_suffix('.')?;
    (!before.ends_with(|c: char| c == '.' || ends_operand(c))).then_some(before)
}

fn is_negative(before: &str) -> bool {
    let before = before.strip_suffix('$').unwrap_or(before);
    let Some(before) = before.strip_suffix(['-', '\u{2212}']) else {
        return false;
    };
    !before.ends_with(ends_operand)
}

/// After such a character a minus sign subtracts.
fn ends_operand(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, ')' | ']' | '}')
}

fn digits(text: &str) -> &str {
    &text[..text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len())]
}

/// Digits with thousands commas.
fn grouped_digits(text: &str) -> &str {
    let mut end = digits(text).len();
    if end > 3 {
        return &text[..end];
    }
    while let Some(group) = text[end..].strip_prefix(',').map(digits)
        && group.len() == 3
    {
        end += 4;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<String> {
        numbers(text).map(|n| n.0).collect()
    }

    #[test]
    fn plain_numbers_and_full_stops() {
        assert_eq!(found("3 + 5 = 8."), ["3", "5", "8"]);
        assert_eq!(found("It is 8.So"), ["8"]);
        assert_eq!(found("007 and 00"), ["7", "0"]);
        assert_eq!(found("H2O at 1e5"), ["2", "1", "5"]);
        assert!(found("none, .").is_empty());
    }

    #[test]
    fn thousands_commas() {
        assert_eq!(found("1,234,567"), ["1234567"]);
        assert_eq!(found("1,2,3"), ["1", "2", "3"]);
        assert_eq!(found("1234,567"), ["1234", "567"]);
        assert_eq!(found("1,234,56"), ["1234", "56"]);
        assert_eq!(found("12,3456"), ["12", "3456"]);
        assert_eq!(found("1,000.50, 2"), ["1000.5", "2"]);
    }

    #[test]
    fn fractions() {
        assert_eq!(found("3.50 8.0 0.0 1.2.3"), ["3.5", "8", "0", "1.2", "3"]);
        assert_eq!(found(".5 and -.25 but ...5 and x.5"), ["0.5", "-0.25", "5", "5"]);
    }

    #[test]
    fn a_minus_sign_or_a_minus() {
        assert_eq!(found("= -5 (-6) 3 -7 *-8 --9"), ["-5", "-6", "3", "-7", "-8", "-9"]);
        assert_eq!(found("3-5 x-6 3 - 7 (2)-8"), ["3", "5", "6", "3", "7", "2", "8"]);
        assert_eq!(found("\u{2212}4 and -$1,000 and $-2"), ["-4", "-1000", "-2"]);
        assert_eq!(found("-0 -0.0"), ["0", "0"]);
    }

    #[test]
    fn a_text_that_is_one_number() {
        let text = |t: &str| parse(t).map(|n| n.0);
        assert_eq!(text(" -1,234.50 "), Some("-1234.5".into()));
        assert_eq!(text("$5"), Some("5".into()));
        assert_eq!(text("+7"), Some("7".into()));
        assert_eq!(text(".5"), Some("0.5".into()));
        let big = "123456789012345678901234567890123456789012345678901234567890";
        assert_eq!(text(big), Some(big.into()));
        for not in ["", "-", ".", "5 6", "5x", "x5", "---5", "8.", "1,2"] {
            assert_eq!(text(not), None, "{not}");
        }
    }
}
