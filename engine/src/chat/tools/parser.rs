//! Generated text to content and calls of tools, piece by piece: nothing of a call's markers is
//! given out as content, and arguments come out as they arrive.

use super::{
    ToolFormat,
    scan::{Head, Nesting, head},
};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
const PYTHON: &str = "<|python_tag|>";

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Text for the reader.
    Content(String),
    /// Call number `index` begins.
    Call { index: usize, name: String },
    /// More of the arguments of a call, JSON in all.
    Arguments { index: usize, text: String },
}

/// What the held text is the beginning of.
#[derive(Debug, Clone, Copy)]
enum State {
    /// The answer; Llama 3 calls tools from there or not at all.
    Start,
    /// Text that may hold the marker of a call (Hermes).
    Text,
    /// Text to the end, without calls (Llama 3).
    Plain,
    /// A call's object, up to its arguments. `sure`: a marker said that it is one.
    Head { sure: bool },
    /// Its arguments.
    Arguments(Nesting),
    /// What follows them in its object.
    Tail(Nesting),
    /// What follows the object.
    After,
    /// What follows a separator (Llama 3).
    Next,
}

/// Turns one sample's text into content and calls.
#[derive(Debug, Clone)]
pub struct CallParser {
    format: ToolFormat,
    /// Names of the tools that were offered.
    names: Vec<String>,
    /// Most calls that are given out; later ones are left out.
    most: usize,
    state: State,
    /// Text that nothing has been made of.
    held: String,
    /// Calls so far.
    calls: usize,
    /// Content has been given out since the last call.
    content: bool,
}

impl CallParser {
    /// A parser for answers to a request that offers tools with these names.
    pub fn new(format: ToolFormat, names: Vec<String>, most: usize) -> Self {
        let state = match format {
            ToolFormat::Hermes => State::Text,
            ToolFormat::Llama3 => State::Start,
        };
        let held = String::new();
        Self { format, names, most, state, held, calls: 0, content: false }
    }

    /// Takes more text, and gives what is certain by now.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        while self.step(&mut parts) {}
        parts
    }

    /// Gives the rest: the sample has ended. What began like a call and is none is content.
    pub fn finish(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        let marker =
            matches!((self.format, self.state), (ToolFormat::Hermes, State::Head { sure: true }));
        let rest = std::mem::take(&mut self.held);
        let content = match self.state {
            State::Text if self.calls > 0 => rest.trim_end().to_string(),
            State::Start | State::Text | State::Plain => rest,
            State::Head { .. } if marker => format!("{OPEN}{rest}"),
            State::Head { .. } | State::Next if !rest.trim().is_empty() => rest,
            _ => String::new(),
        };
        self.release(content, &mut parts);
        parts
    }

    /// Calls that were given out.
    pub fn calls(&self) -> usize {
        self.calls.min(self.most)
    }

    /// Makes something of the held text; false if there is not enough of it.
    fn step(&mut self, parts: &mut Vec<Part>) -> bool {
        match self.state {
            State::Start => self.start(),
            State::Text => self.text(parts),
            State::Plain => self.plain(parts),
            State::Head { sure } => self.head(sure, parts),
            State::Arguments(nesting) => self.arguments(nesting, parts),
            State::Tail(mut nesting) => {
                let end = nesting.end(&self.held);
                self.held.drain(..end.unwrap_or(self.held.len()));
                self.state = if end.is_some() { State::After } else { State::Tail(nesting) };
                end.is_some()
            }
            State::After => self.after(),
            State::Next => self.next(),
        }
    }

    fn start(&mut self) -> bool {
        let text = self.held.trim_start();
        if text.is_empty() || (PYTHON.starts_with(text) && text != PYTHON) {
            return false;
        }
        let skipped = self.held.len() - text.len();
        if text.starts_with(PYTHON) {
            self.held.drain(..skipped + PYTHON.len());
            self.state = State::Head { sure: true };
        } else if text.starts_with('{') {
            self.state = State::Head { sure: false };
        } else {
            self.state = State::Plain;
        }
        true
    }

    fn text(&mut self, parts: &mut Vec<Part>) -> bool {
        if let Some(at) = self.held.find(OPEN) {
            let rest = self.held.split_off(at + OPEN.len());
            let before = std::mem::replace(&mut self.held, rest);
            self.release(before[..at].trim_end().to_string(), parts);
            self.state = State::Head { sure: true };
            return true;
        }
        let open = (1..OPEN.len()).rev().find(|&len| self.held.ends_with(&OPEN[..len]));
        let safe = self.held.len() - open.unwrap_or(0);
        let ready = self.held[..safe].trim_end().len();
        let text = self.held.drain(..ready).collect();
        self.release(text, parts);
        false
    }

    fn plain(&mut self, parts: &mut Vec<Part>) -> bool {
        let text = std::mem::take(&mut self.held);
        self.release(text, parts);
        false
    }

    fn head(&mut self, sure: bool, parts: &mut Vec<Part>) -> bool {
        match head(&self.held) {
            Head::More => false,
            Head::Bad => self.no_call(sure, parts),
            Head::Open { name, .. } | Head::Whole { name, .. }
                if !sure && !self.names.contains(&name) =>
            {
                self.no_call(sure, parts)
            }
            Head::Open { name, arguments } => {
                self.held.drain(..arguments);
                self.call(name, parts);
                self.state = State::Arguments(Nesting::default());
                true
            }
            Head::Whole { name, arguments, end } => {
                self.held.drain(..end);
                self.call(name, parts);
                self.more_arguments(arguments, parts);
                self.state = State::After;
                true
            }
        }
    }

    /// What began like a call is content.
    fn no_call(&mut self, sure: bool, parts: &mut Vec<Part>) -> bool {
        self.state = match self.format {
            ToolFormat::Hermes => State::Text,
            ToolFormat::Llama3 => State::Plain,
        };
        if sure && self.format == ToolFormat::Hermes {
            self.release(OPEN.into(), parts);
        }
        true
    }

    fn call(&mut self, name: String, parts: &mut Vec<Part>) {
        if self.calls < self.most {
            parts.push(Part::Call { index: self.calls, name });
        }
        self.calls += 1;
        self.content = false;
    }

    fn arguments(&mut self, mut nesting: Nesting, parts: &mut Vec<Part>) -> bool {
        let end = nesting.end(&self.held);
        let text = self.held.drain(..end.unwrap_or(self.held.len())).collect();
        self.more_arguments(text, parts);
        self.state = match end {
            Some(_) => State::Tail(Nesting::inside()),
            None => State::Arguments(nesting),
        };
        end.is_some()
    }

    fn more_arguments(&mut self, text: String, parts: &mut Vec<Part>) {
        if self.calls <= self.most && !text.is_empty() {
            parts.push(Part::Arguments { index: self.calls - 1, text });
        }
    }

    fn after(&mut self) -> bool {
        let text = self.held.trim_start();
        let skipped = self.held.len() - text.len();
        let (end, next) = match self.format {
            ToolFormat::Hermes => (CLOSE, State::Text),
            ToolFormat::Llama3 => (";", State::Next),
        };
        if text.starts_with(end) {
            self.held.drain(..skipped + end.len());
            self.state = next;
        } else if end.starts_with(text) {
            return false;
        } else {
            self.state = match self.format {
                ToolFormat::Hermes => State::Text,
                ToolFormat::Llama3 => State::Plain,
            };
        }
        true
    }

    fn next(&mut self) -> bool {
        let text = self.held.trim_start();
        if text.is_empty() {
            return false;
        }
        self.state = if text.starts_with('{') { State::Head { sure: false } } else { State::Plain };
        true
    }

    /// Gives out content, without white space between it and a call before it.
    fn release(&mut self, mut text: String, parts: &mut Vec<Part>) {
        if self.calls > 0 && !self.content {
            text = text.trim_start().to_string();
        }
        if !text.is_empty() {
            self.content = true;
            parts.push(Part::Content(text));
        }
    }
}
