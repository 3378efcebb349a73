//! Tools in chat: what a request offers, which call it wants, and calls in the answer.

use super::{AppState, body::Fields, error::ApiError, structured::Structured};
use crate::chat::{CallParser, Part, Tool, ToolFormat};
use onpolicy_plugin_api::Grammar;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::HashSet;
use utoipa::ToSchema;

/// Longest name of a function, in bytes.
const MAX_NAME_BYTES: usize = 64;
/// Most tools of a request.
const MAX_TOOLS: usize = 128;

/// Which call a request wants.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Choice {
    None,
    Auto,
    Required,
    Named(String),
}

/// The tools of a request, and what it wants with them.
#[derive(Debug, Clone, PartialEq)]
pub struct Tools {
    /// As the request has them; none without tools.
    pub shown: Option<Value>,
    tools: Vec<Tool>,
    choice: Choice,
    parallel: bool,
}

/// How the calls in a request's answers are found.
#[derive(Debug, Clone)]
pub struct Calls {
    parser: CallParser,
    /// One function was asked for by name: OpenAI ends that with "stop".
    named: bool,
    /// What the answer must be, if a call is asked for or the text has a grammar.
    pub structured: Option<Structured>,
}

/// Takes `tools`, as a list that a chat template can show.
///
/// # Errors
/// 400 naming what is wrong.
pub fn take_offered(fields: &mut Fields) -> Result<Option<Value>, ApiError> {
    Ok(take_tools(fields)?.0)
}

fn take_tools(fields: &mut Fields) -> Result<(Option<Value>, Vec<Tool>), ApiError> {
    let values: Vec<Value> = fields.take_or("tools", Vec::new())?;
    if values.len() > MAX_TOOLS {
        let rule = format!("must be at most {MAX_TOOLS} tools, not {}", values.len());
        return Err(ApiError::invalid(fields.path("tools"), rule));
    }
    let path = fields.path("tools");
    let numbered = values.iter().cloned().enumerate();
    let tools = numbered.map(|(i, value)| parse_tool(value, &format!("{path}[{i}]")));
    let tools: Vec<Tool> = tools.collect::<Result<_, _>>()?;
    let mut names = HashSet::new();
    if let Some(i) = tools.iter().position(|tool| !names.insert(&tool.name)) {
        let field = format!("{path}[{i}].function.name");
        return Err(ApiError::invalid(field, "is the name of an earlier tool"));
    }
    let shown = (!values.is_empty()).then_some(Value::Array(values));
    Ok((shown, tools))
}

fn parse_tool(value: Value, path: &str) -> Result<Tool, ApiError> {
    let mut fields = Fields::of(value, path)?;
    if fields.require::<String>("type")? != "function" {
        return Err(ApiError::invalid(fields.path("type"), "must be \"function\""));
    }
    let path = fields.path("function");
    let mut function = Fields::of(fields.require("function")?, &path)?;
    fields.finish()?;
    let name: String = function.require("name")?;
    check_name(&name, function.path("name"))?;
    function.take::<String>("description")?;
    // Where a call is forced its arguments always follow the schema.
    function.take::<bool>("strict")?;
    let parameters = match function.take_value("parameters") {
        // A function without parameters.
        None => json!({ "type": "object", "properties": {}, "additionalProperties": false }),
        Some(schema @ Value::Object(_)) => schema,
        Some(_) => {
            let rule = "must be a JSON schema, an object";
            return Err(ApiError::invalid(function.path("parameters"), rule));
        }
    };
    function.finish()?;
    Ok(Tool { name, parameters })
}

fn check_name(name: &str, field: String) -> Result<(), ApiError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    if !name.is_empty() && name.len() <= MAX_NAME_BYTES && name.bytes().all(allowed) {
        return Ok(());
    }
    let rule = format!("must be 1 to {MAX_NAME_BYTES} letters, digits, '_', '-' or '.'");
    Err(ApiError::invalid(field, rule))
}

impl Tools {
    /// Takes `tools`, `tool_choice` and `parallel_tool_calls`.
    ///
    /// # Errors
    /// 400 naming what is wrong.
    pub fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        refuse_older(fields)?;
        let (shown, tools) = take_tools(fields)?;
        let choice = take_choice(fields, &tools)?;
        let parallel = fields.take_or("parallel_tool_calls", true)?;
        Ok(Self { shown, tools, choice, parallel })
    }

    /// How calls are found in the answers, and what these must be; none if no call is wanted.
    ///
    /// # Errors
    /// 400 if the model's form of calls is not known, or the text must be something else.
    pub fn calls(
        self,
        state: &AppState,
        structured: Option<&Structured>,
    ) -> Result<Option<Calls>, ApiError> {
        if self.choice == Choice::None {
            return Ok(None);
        }
        let format = state.tool_format().ok_or_else(unknown_format)?;
        let structured = match (self.grammar(format), structured) {
            (Some(_), Some(other)) => {
                let rule = format!("a forced call cannot be combined with {}", other.field);
                return Err(ApiError::invalid("tool_choice", rule));
            }
            (Some(lark), None) => {
                Some(Structured { grammar: Grammar::Lark(lark), field: "tools".into() })
            }
            (None, other) => other.map(|other| self.or_calls(format, other)).transpose()?,
        };
        let names = self.tools.iter().map(|tool| tool.name.clone()).collect();
        let most = if self.parallel { usize::MAX } else { 1 };
        let named = matches!(self.choice, Choice::Named(_));
        Ok(Some(Calls { parser: CallParser::new(format, names, most), named, structured }))
    }

    /// What an answer with a forced call is.
    fn grammar(&self, format: ToolFormat) -> Option<String> {
        match &self.choice {
            Choice::Named(name) => {
                let tool = self.tools.iter().filter(|tool| tool.name == *name);
                Some(format.grammar(&tool.cloned().collect::<Vec<_>>(), false))
            }
            Choice::Required => Some(format.grammar(&self.tools, self.parallel)),
            Choice::None | Choice::Auto => None,
        }
    }

    /// Calls, or JSON as the request wants it.
    fn or_calls(&self, format: ToolFormat, other: &Structured) -> Result<Structured, ApiError> {
        let schema = match &other.grammar {
            Grammar::JsonObject => json!({ "type": "object" }),
            Grammar::JsonSchema(schema) => schema.clone(),
            _ => {
                let rule =
                    format!("cannot be combined with {}; set tool_choice to \"none\"", other.field);
                return Err(ApiError::invalid("tools", rule));
            }
        };
        let calls = format.grammar(&self.tools, self.parallel);
        let calls = calls.replacen("start:", "start: answer | calls\ncalls:", 1);
        let grammar = Grammar::Lark(format!("{calls}answer: %json {schema}\n"));
        Ok(Structured { grammar, field: other.field.clone() })
    }
}

fn unknown_format() -> ApiError {
    let rule = "the form in which this model's chat template writes calls is not known; only those \
                of Hermes, Qwen and Llama 3 are. Set server.tool_format, or tool_choice to \"none\"";
    ApiError::invalid("tools", rule).with_code("unsupported_value")
}

/// `functions` and `function_call` are what `tools` and `tool_choice` were before.
fn refuse_older(fields: &mut Fields) -> Result<(), ApiError> {
    let functions = fields.take_value("functions").filter(|value| *value != json!([]));
    let call = fields.take_value("function_call").filter(|value| *value != json!("none"));
    for (name, newer, value) in
        [("functions", "tools", functions), ("function_call", "tool_choice", call)]
    {
        if value.is_some() {
            let rule = format!("this older field is not supported; send {newer} in its place");
            return Err(ApiError::invalid(fields.path(name), rule).with_code("unsupported_value"));
        }
    }
    Ok(())
}

fn take_choice(fields: &mut Fields, tools: &[Tool]) -> Result<Choice, ApiError> {
    const CHOICES: &str = "must be \"none\", \"auto\", \"required\" or \
                           {\"type\": \"function\", \"function\": {\"name\": ...}}";
    let field = fields.path("tool_choice");
    let choice = match fields.take_value("tool_choice") {
        None if tools.is_empty() => Choice::None,
        None => Choice::Auto,
        Some(Value::String(word)) => match word.as_str() {
            "none" => Choice::None,
            "auto" => Choice::Auto,
            "required" => Choice::Required,
            _ => return Err(ApiError::invalid(field, CHOICES)),
        },
        Some(value @ Value::Object(_)) => Choice::Named(named(value, &field)?),
        Some(_) => return Err(ApiError::invalid(field, CHOICES)),
    };
    if choice != Choice::None && tools.is_empty() {
        return Err(ApiError::invalid(field, "needs tools"));
    }
    match &choice {
        Choice::Named(name) if tools.iter().all(|tool| tool.name != *name) => {
            let rule = format!("there is no tool named '{name}' in tools");
            Err(ApiError::invalid(format!("{field}.function.name"), rule))
        }
        _ => Ok(choice),
    }
}

fn named(value: Value, field: &str) -> Result<String, ApiError> {
    let mut fields = Fields::of(value, field)?;
    if fields.require::<String>("type")? != "function" {
        return Err(ApiError::invalid(fields.path("type"), "must be \"function\""));
    }
    let path = fields.path("function");
    let mut function = Fields::of(fields.require("function")?, &path)?;
    fields.finish()?;
    let name = function.require("name")?;
    function.finish()?;
    Ok(name)
}

/// A call, or what a chunk adds to one.
#[derive(Debug, Serialize, ToSchema)]
pub struct ToolCall {
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: Function,
}

/// The function that is called.
#[derive(Debug, Default, Serialize, ToSchema)]
#[schema(as = CalledFunction)]
struct Function {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

impl ToolCall {
    fn begin(index: Option<usize>, name: String) -> Self {
        Self {
            index,
            id: Some(format!("chatcmpl-tool-{}", uuid::Uuid::new_v4().simple())),
            kind: Some("function"),
            function: Function { name: Some(name), arguments: String::new() },
        }
    }

    fn more(index: usize, arguments: String) -> Self {
        let function = Function { name: None, arguments };
        Self { index: Some(index), id: None, kind: None, function }
    }
}

/// Content and calls of a message, or what a chunk adds to them.
pub type Parsed = (Option<String>, Option<Vec<ToolCall>>);

/// What has been found in one sample's answer.
pub struct Answer {
    parser: CallParser,
    named: bool,
}

impl Answer {
    /// Nothing yet.
    pub fn new(calls: &Calls) -> Self {
        Self { parser: calls.parser.clone(), named: calls.named }
    }

    /// What more text adds.
    pub fn push(&mut self, text: &str) -> Parsed {
        deltas(self.parser.push(text))
    }

    /// What the end adds.
    pub fn finish(&mut self) -> Parsed {
        deltas(self.parser.finish())
    }

    /// All of a text.
    pub fn whole(&mut self, text: &str) -> Parsed {
        let mut parts = self.parser.push(text);
        parts.extend(self.parser.finish());
        let (mut content, mut calls) = (String::new(), Vec::<ToolCall>::new());
        for part in parts {
            match part {
                Part::Content(text) => content.push_str(&text),
                Part::Call { name, .. } => calls.push(ToolCall::begin(None, name)),
                Part::Arguments { index, text } => calls[index].function.arguments.push_str(&text),
            }
        }
        let content = (!content.is_empty() || calls.is_empty()).then_some(content);
        (content, (!calls.is_empty()).then_some(calls))
    }

    /// True if the answer ends with `tool_calls` where it would end with `stop`.
    pub fn ends_with_calls(&self) -> bool {
        self.parser.calls() > 0 && !self.named
    }
}

fn deltas(parts: Vec<Part>) -> Parsed {
    let (mut content, mut calls) = (String::new(), Vec::new());
    for part in parts {
        match part {
            Part::Content(text) => content.push_str(&text),
            Part::Call { index, name } => calls.push(ToolCall::begin(Some(index), name)),
            Part::Arguments { index, text } => calls.push(ToolCall::more(index, text)),
        }
    }
    ((!content.is_empty()).then_some(content), (!calls.is_empty()).then_some(calls))
}
