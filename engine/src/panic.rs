//! What is left of a panic that was caught.

use crate::torch::without_trace;
use std::{
    any::Any,
    panic::{set_hook, take_hook},
    thread,
};

/// What a panic said; none if that was no text. Of an error of libtorch's what went wrong, not where
/// in its sources.
pub fn message(panic: &(dyn Any + Send)) -> Option<&str> {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied())?;
    Some(without_trace(text))
}

/// What a panic said, or that it said nothing.
pub fn text(panic: &(dyn Any + Send)) -> String {
    message(panic).unwrap_or("a panic without a message").to_string()
}

/// Lets panics say in one line what they have to say: where libtorch's errors happened in its sources, too,
/// is told only where `RUST_BACKTRACE` asks for more.
pub fn speak_briefly() {
    let at_length = take_hook();
    set_hook(Box::new(move |panic| {
        if std::env::var_os("RUST_BACKTRACE").is_some() {
            return at_length(panic);
        }
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        eprintln!("{}", line(thread::current().name(), &place, panic.payload()));
    }));
}

fn line(thread: Option<&str>, place: &str, panic: &(dyn Any + Send)) -> String {
    let (thread, said) = (thread.unwrap_or("without a name"), message(panic).unwrap_or("no text"));
    format!("thread '{thread}' panicked at {place}: {said} (RUST_BACKTRACE=1 tells more)")
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
        let line = line(Some("engine"), "a.rs:1:2", &*caught(failed));
        let begins = format!("thread 'engine' panicked at a.rs:1:2: {said} (");
        assert!(line.starts_with(&begins) && !line.contains("frame"), "{line}");
    }
}
