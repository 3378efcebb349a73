//! What is left of a panic that was caught.

use crate::torch::without_trace;
use std::any::Any;

/// What a panic said; none if that was no text. Of an error of libtorch's what went wrong, not where
/// in its sources.
pub fn message(panic: &(dyn Any + Send)) -> Option<&str> {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied())?;
    Some(without_trace(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{catch_unwind, panic_any};

    #[test]
    fn texts_of_both_kinds_are_read() {
        let caught = |work: fn()| catch_unwind(work).unwrap_err();
        assert_eq!(message(&*caught(|| panic!("a bug"))), Some("a bug"));
        assert_eq!(message(&*caught(|| panic!("bug {}", 2))), Some("bug 2"));
        assert_eq!(message(&*caught(|| panic_any(3))), None);
        let failed: fn() = || {
            let error = "no memory\nException raised from malloc at a.cpp\nframe #0: f";
            panic!("called `Result::unwrap()` on an `Err` value: {error:?}")
        };
        let said = "called `Result::unwrap()` on an `Err` value: \"no memory";
        assert_eq!(message(&*caught(failed)), Some(said));
    }
}
