//! Chat templates, rendered as transformers renders them.

use super::{
    Chat, ChatError, TokenizerFiles, parse_object, python,
    tools::{ToolFormat, prompt},
};
use minijinja::{Environment, Error, ErrorKind, Template};
use serde_json::{Map, Value};
use std::{error::Error as _, fmt::Write};

/// Put at the end of the message to be continued, and looked for in what the template makes of it.
const CONTINUE_MARK: &str = "\u{E000}continue-here\u{E000} ";

/// Names under which a model may bring more than one template.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// Variables that templates get from the request's own fields.
const RESERVED: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

/// The templates of one model, and the special tokens that they may name.
pub(super) struct Templates {
    environment: Environment<'static>,
    special_tokens: Map<String, Value>,
}

impl Templates {
    /// Compiles the templates of a model.
    pub fn from_files(files: &TokenizerFiles<'_>) -> Result<Self, ChatError> {
        let config = match files.tokenizer_config {
            Some(text) => parse_object(text, "tokenizer_config.json")?,
            None => Map::new(),
        };
        let map = match files.special_tokens_map {
            Some(text) => parse_object(text, "special_tokens_map.json")?,
            None => Map::new(),
        };
        let mut environment = environment();
        for (name, source) in sources(&config, files.chat_template)? {
            let source = plain_generation_tags(&source);
            environment.add_template_owned(name, source).map_err(|error| explain(&error))?;
        }
        if environment.templates().next().is_none() {
            return Err(ChatError::NoTemplate);
        }
        Ok(Self { environment, special_tokens: special_tokens(&config, &map) })
    }

    /// The prompt of a conversation.
    pub fn render(&self, chat: &Chat) -> Result<String, ChatError> {
        if chat.continue_final_message && chat.add_generation_prompt {
            let reason = "cannot go with add_generation_prompt: one continues the last message, \
                          the other begins a new one";
            return Err(ChatError::invalid("continue_final_message", reason));
        }
        if let Some(name) = RESERVED.iter().find(|name| chat.kwargs.contains_key(**name)) {
            let reason = format!("'{name}' has a field of its own in the request");
            return Err(ChatError::invalid("chat_template_kwargs", reason));
        }
        let mut messages = chat.normalised()?;
        let template = self.template(chat.tools.is_some())?;
        if chat.documents.is_some() && !reads(&template, "documents") {
            let reason = "the model's chat template does not show documents to the model; put \
                          them into a message";
            return Err(ChatError::invalid("documents", reason));
        }
        let shows_calls = chat.tools.is_none() && reads(&template, "tool_calls");
        if !reads(&template, "tools") && !shows_calls {
            messages = prompt::spelled_out(messages, chat.tools.as_ref());
        }
        if !chat.continue_final_message {
            return apply(&template, self.variables(chat, messages));
        }
        let content = messages.last_mut().and_then(|message| message.get_mut("content"));
        let Some(Value::String(text)) = content else {
            let reason = "the last message has no text to continue";
            return Err(ChatError::invalid("continue_final_message", reason));
        };
        text.push_str(CONTINUE_MARK);
        cut_at_mark(apply(&template, self.variables(chat, messages))?)
    }

    /// How the model writes calls of tools; none if its template speaks of a form that is not known
    /// here.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        let template = self.template(true).ok()?;
        if !reads(&template, "tools") {
            return Some(prompt::FORMAT);
        }
        ToolFormat::of_template(template.source())
    }

    fn template(&self, with_tools: bool) -> Result<Template<'_, '_>, ChatError> {
        let get = |name: &str| self.environment.get_template(name).ok();
        let for_tools = if with_tools { get(TOOL_USE) } else { None };
        for_tools.or_else(|| get(DEFAULT)).ok_or(ChatError::NoTemplate)
    }

    fn variables(&self, chat: &Chat, messages: Vec<Value>) -> Map<String, Value> {
        let mut variables = self.special_tokens.clone();
        variables.extend(chat.kwargs.clone());
        variables.insert("messages".into(), Value::Array(messages));
        variables.insert("tools".into(), chat.tools.clone().unwrap_or(Value::Null));
        variables.insert("documents".into(), chat.documents.clone().unwrap_or(Value::Null));
        variables.insert("add_generation_prompt".into(), chat.add_generation_prompt.into());
        variables
    }
}

fn apply(template: &Template, variables: Map<String, Value>) -> Result<String, ChatError> {
    template.render(minijinja::Value::from_serialize(&variables)).map_err(|e| explain(&e))
}

/// Whether a template looks at a variable that a request fills. The name is enough to tell: some
/// templates set the variable themselves where it is not given.
fn reads(template: &Template, variable: &str) -> bool {
    template.source().contains(variable)
}

/// The prompt up to the mark. A template that trims its messages has eaten the mark's last space,
/// and then the text before the mark is trimmed too.
fn cut_at_mark(prompt: String) -> Result<String, ChatError> {
    let Some(at) = prompt.rfind(CONTINUE_MARK.trim_end()) else {
        let reason = "the chat template does not print the last message";
        return Err(ChatError::invalid("continue_final_message", reason));
    };
    let kept = &prompt[..at];
    let untrimmed = prompt[at..].starts_with(CONTINUE_MARK);
    Ok(if untrimmed { kept } else { kept.trim_end() }.to_string())
}

/// A Jinja environment with what transformers puts into its own.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_formatter(python::format_value);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", python::tojson);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| -> Result<String, Error> {
        let mut text = String::new();
        let now = chrono::Local::now();
        write!(text, "{}", now.format(&format)).map(|()| text).map_err(|_| {
            let message = format!("strftime_now does not know the format '{format}'");
            Error::new(ErrorKind::InvalidOperation, message)
        })
    });
    environment
}

/// Name and source of every template.
fn sources(
    config: &Map<String, Value>,
    file: Option<&str>,
) -> Result<Vec<(String, String)>, ChatError> {
    let malformed = || ChatError::Template("tokenizer_config.json: bad chat_template".into());
    let mut sources = match config.get("chat_template") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::String(source)) => vec![(DEFAULT.to_string(), source.clone())],
        Some(Value::Array(named)) => {
            let entry = |entry: &Value| {
                let text = |key: &str| entry.get(key)?.as_str().map(str::to_string);
                Some((text("name")?, text("template")?))
            };
            named.iter().map(entry).collect::<Option<Vec<_>>>().ok_or_else(malformed)?
        }
        Some(_) => return Err(malformed()),
    };
    if let Some(source) = file {
        sources.retain(|(name, _)| name != DEFAULT);
        sources.push((DEFAULT.to_string(), source.to_string()));
    }
    Ok(sources)
}

/// `bos_token`, `eos_token` and so on; a token is a string, or an object that holds one.
fn special_tokens(config: &Map<String, Value>, map: &Map<String, Value>) -> Map<String, Value> {
    let mut tokens = Map::new();
    for (name, value) in map.iter().chain(config) {
        let content = value.get("content").unwrap_or(value);
        if name.ends_with("_token") && content.is_string() {
            tokens.insert(name.clone(), content.clone());
        }
    }
    tokens
}

/// transformers marks the assistant's part with `{% generation %}`, which prints what it holds;
/// for a prompt it is the same as a condition that holds.
fn plain_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let Some(end) = tag.find("%}") else { break };
        let inner = &tag[2..end];
        let name = inner.trim_matches(['-', '+']).trim();
        let replacement = match name {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        out.push_str(before);
        match replacement {
            Some(new) => {
                out.push_str(&tag[..end + 2].replacen(name, new, 1));
                rest = &tag[end + 2..];
            }
            None => {
                out.push_str("{%");
                rest = &tag[2..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// A template error with all its causes, in one line.
fn explain(error: &Error) -> ChatError {
    let mut text = match (error.kind(), error.detail(), error.line()) {
        // What the template's author says needs no preface.
        (ErrorKind::InvalidOperation, Some(detail), Some(line)) => {
            format!("{detail} (line {line} of the template)")
        }
        _ => error.to_string(),
    };
    let mut cause = error.source();
    while let Some(inner) = cause {
        let _ = write!(text, ": {inner}");
        cause = inner.source();
    }
    ChatError::Template(text)
}
