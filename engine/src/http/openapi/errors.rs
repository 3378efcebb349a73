//! The one shape of errors, and the statuses that routes may answer with.

use axum::http::StatusCode;
use serde::Serialize;
use std::collections::BTreeMap;
use utoipa::{
    IntoResponses, ToSchema,
    openapi::{ContentBuilder, HeaderBuilder, Object, Ref, RefOr, Response, ResponseBuilder, Type},
};

/// An answer to a request that was not served.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorAnswer {
    error: ErrorDetail,
}

/// What is wrong.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// What is wrong, and what to do about it.
    message: String,
    /// The kind of error.
    #[serde(rename = "type")]
    kind: String,
    /// The request's field that is wrong, if it is one.
    #[schema(required)]
    param: Option<String>,
    /// A word for programs.
    #[schema(required)]
    code: Option<String>,
}

/// Statuses of a route that takes nothing.
pub struct Plain;
/// Statuses of a route that says whether the server serves.
pub struct Health;
/// Statuses of a route that takes a body.
pub struct Body;
/// Statuses of a route that generates.
pub struct Generating;

/// Statuses of a route that tells what controls the engine.
pub struct Controlled;
/// Statuses of such a route that takes arguments.
pub struct Asking;
/// Statuses of a route that controls the engine.
pub struct Command;
/// Statuses of a route that does so in several ways, not all of them built in.
pub struct Update;
/// Statuses of a route that needs what is not built in.
pub struct NotBuiltIn;

const PLAIN: [StatusCode; 2] = [StatusCode::UNAUTHORIZED, StatusCode::INTERNAL_SERVER_ERROR];
const BODY: [StatusCode; 5] = [
    StatusCode::BAD_REQUEST,
    StatusCode::NOT_FOUND,
    StatusCode::REQUEST_TIMEOUT,
    StatusCode::PAYLOAD_TOO_LARGE,
    StatusCode::UNSUPPORTED_MEDIA_TYPE,
];
const GENERATING: [StatusCode; 3] =
    [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE, StatusCode::GATEWAY_TIMEOUT];
const ASKING: [StatusCode; 3] =
    [StatusCode::BAD_REQUEST, StatusCode::REQUEST_TIMEOUT, StatusCode::PAYLOAD_TOO_LARGE];
const COMMAND: [StatusCode; 3] =
    [StatusCode::CONFLICT, StatusCode::SERVICE_UNAVAILABLE, StatusCode::GATEWAY_TIMEOUT];

/// What a status says of a request.
fn meaning(status: StatusCode) -> &'static str {
    match status {
        StatusCode::BAD_REQUEST => "The request breaks a rule; `param` names the field",
        StatusCode::UNAUTHORIZED => "The server wants a key",
        StatusCode::FORBIDDEN => "The control routes are off, or do not allow this",
        StatusCode::CONFLICT => "The engine is in a state in which it does not do this",
        StatusCode::NOT_IMPLEMENTED => "Not built in; the message says what to do in its place",
        StatusCode::NOT_FOUND => "No such model",
        StatusCode::REQUEST_TIMEOUT => "The body did not arrive in time",
        StatusCode::PAYLOAD_TOO_LARGE => "The body is too long",
        StatusCode::UNSUPPORTED_MEDIA_TYPE => "The body is not JSON",
        StatusCode::TOO_MANY_REQUESTS => "Too many requests run or wait; try again later",
        StatusCode::SERVICE_UNAVAILABLE => "The engine does not take requests now; try again later",
        StatusCode::GATEWAY_TIMEOUT => "It did not end in time",
        _ => "The server failed",
    }
}

fn answer(status: StatusCode) -> Response {
    let schema = Ref::from_schema_name("ErrorAnswer");
    let content = ContentBuilder::new().schema(Some(schema)).build();
    let answer =
        ResponseBuilder::new().description(meaning(status)).content("application/json", content);
    let retry = matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
    if !retry {
        return answer.build();
    }
    let seconds = HeaderBuilder::new()
        .schema(Some(Object::with_type(Type::Integer)))
        .description(Some("Seconds after which to try again"));
    answer.header("Retry-After", seconds.build()).build()
}

type Responses = BTreeMap<String, RefOr<Response>>;

/// The answers of these statuses, for routes with statuses of their own.
pub fn answers(statuses: &[StatusCode]) -> Responses {
    let one = |status: &StatusCode| (status.as_str().to_string(), answer(*status).into());
    statuses.iter().map(one).collect()
}

impl IntoResponses for Plain {
    fn responses() -> Responses {
        answers(&PLAIN)
    }
}

impl IntoResponses for Health {
    fn responses() -> Responses {
        answers(&[&[StatusCode::SERVICE_UNAVAILABLE][..], &PLAIN].concat())
    }
}

impl IntoResponses for Body {
    fn responses() -> Responses {
        answers(&[&BODY[..], &PLAIN].concat())
    }
}

impl IntoResponses for Generating {
    fn responses() -> Responses {
        answers(&[&BODY[..], &GENERATING, &PLAIN].concat())
    }
}

impl IntoResponses for Controlled {
    fn responses() -> Responses {
        answers(&[&[StatusCode::FORBIDDEN][..], &PLAIN].concat())
    }
}

impl IntoResponses for Asking {
    fn responses() -> Responses {
        Controlled::responses().into_iter().chain(answers(&ASKING)).collect()
    }
}

impl IntoResponses for Command {
    fn responses() -> Responses {
        Asking::responses().into_iter().chain(answers(&COMMAND)).collect()
    }
}

impl IntoResponses for Update {
    fn responses() -> Responses {
        Command::responses().into_iter().chain(NotBuiltIn::responses()).collect()
    }
}

impl IntoResponses for NotBuiltIn {
    fn responses() -> Responses {
        let more = answers(&[StatusCode::NOT_IMPLEMENTED]);
        Controlled::responses().into_iter().chain(more).collect()
    }
}
