//! /openapi.json beside what the server does.

use crate::scripted::{MAX_MODEL_LEN, MAX_SAMPLES, MODEL, Script};
use crate::server::{Server, within};
use crate::tokenizer::{VOCAB, bytes};
use crate::{CHAT, COMPLETIONS};
use serde_json::{Value, json};

const ROUTES: [(&str, &str); 10] = [
    (COMPLETIONS, "CompletionRequest"),
    (CHAT, "ChatCompletionRequest"),
    ("/v1/completions/render", "CompletionRequest"),
    ("/v1/chat/completions/render", "ChatCompletionRequest"),
    ("/inference/v1/generate", "TokensRequest"),
    ("/generate", "SglangRequest"),
    ("/generate/", "TrlPromptsRequest"),
    ("/chat/", "TrlChatsRequest"),
    ("/tokenize", "TokenizeRequest"),
    ("/detokenize", "DetokenizeRequest"),
];

async fn start() -> (Server, Value) {
    let server = Server::start(Script::saying(|_, _| bytes("ok"))).await;
    let (status, document) = server.get("/openapi.json").await;
    assert_eq!(status, 200);
    (server, document)
}

/// The shapes of a body: a schema has one or several.
fn shapes<'a>(document: &'a Value, name: &str) -> Vec<&'a Value> {
    let schema = &document["components"]["schemas"][name];
    schema["oneOf"].as_array().map_or(vec![schema], |all| all.iter().collect())
}

/// A value that a property allows, or at least one that is not null.
fn example(property: &Value) -> Value {
    let inner = |key: &str| property[key].as_array().map(|all| &all[0]);
    match (&property["example"], &property["const"], inner("enum"), inner("anyOf")) {
        (Value::Null, Value::Null, None, Some(first)) => example(first),
        (Value::Null, Value::Null, Some(first), _) => first.clone(),
        (Value::Null, Value::Null, None, None) => "something".into(),
        (Value::Null, only, ..) => only.clone(),
        (example, ..) => example.clone(),
    }
}

fn smallest(shape: &Value) -> Value {
    let names = shape["required"].as_array().unwrap();
    let pairs = names.iter().map(|name| {
        let name = name.as_str().unwrap();
        (name.to_string(), example(&shape["properties"][name]))
    });
    Value::Object(pairs.collect())
}

#[tokio::test]
async fn it_describes_every_route() {
    within(async {
        let (server, document) = start().await;
        assert_eq!(document["openapi"], "3.1.0");
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
        let paths = document["paths"].as_object().unwrap();
        let controls = |path: &Value| path.to_string().contains("\"control\"");
        let (control, others): (Vec<_>, Vec<_>) = paths.iter().partition(|(_, p)| controls(p));
        let mut names: Vec<&str> = others.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        let routes = [
            "/chat/",
            "/detokenize",
            "/generate",
            "/generate/",
            "/health",
            "/health_generate",
            "/inference/v1/generate",
            "/liveness",
            "/load",
            "/metrics",
            "/openapi.json",
            "/ping",
            "/tokenize",
            "/v1/chat/completions",
            "/v1/chat/completions/render",
            "/v1/completions",
            "/v1/completions/render",
            "/v1/models",
            "/v1/models/{id}",
            "/version",
        ];
        assert_eq!(names, routes);
        for path in routes.iter().filter(|path| !paths[**path]["get"].is_null()) {
            let path = path.replace("{id}", MODEL);
            assert_eq!(server.get(&path).await.0, 200, "{path}");
        }
        for (path, name) in ROUTES {
            let post = &paths[path]["post"];
            let body = &post["requestBody"]["content"]["application/json"]["schema"]["$ref"];
            assert_eq!(*body, json!(format!("#/components/schemas/{name}")));
            for status in ["400", "404", "408", "413", "415", "500"] {
                let error = &post["responses"][status]["content"]["application/json"]["schema"];
                assert_eq!(error["$ref"], "#/components/schemas/ErrorAnswer", "{path} {status}");
            }
        }
        // They are off here, and say so.
        assert!(control.len() > 30, "{}", control.len());
        for (path, operations) in control {
            for (method, operation) in operations.as_object().unwrap() {
                let answer = match method.as_str() {
                    "get" => server.get(path).await,
                    _ => server.post(path, json!({})).await,
                };
                assert_eq!(answer.0, 403, "{method} {path}");
                assert_eq!(answer.1["error"]["code"], "control_off", "{method} {path}");
                assert!(!operation["responses"]["403"].is_null(), "{method} {path}");
            }
        }
        for path in [COMPLETIONS, CHAT, "/inference/v1/generate", "/generate", "/chat/"] {
            for status in ["429", "503", "504"] {
                assert!(!paths[path]["post"]["responses"][status].is_null(), "{path} {status}");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn every_property_is_taken_and_nothing_else() {
    within(async {
        let (server, document) = start().await;
        for (path, name) in ROUTES {
            for shape in shapes(&document, name) {
                let body = smallest(shape);
                assert_eq!(server.post(path, body.clone()).await.0, 200, "{path} {body}");
                assert_eq!(shape["additionalProperties"], false, "{name}");
                for (property, schema) in shape["properties"].as_object().unwrap() {
                    let mut body = body.clone();
                    body[property] = example(schema);
                    let (_, answer) = server.post(path, body.clone()).await;
                    assert_ne!(answer["error"]["code"], "unknown_field", "{path} {body}");
                }
                let mut body = body.clone();
                body["no_such_field"] = 1.into();
                let (status, answer) = server.post(path, body).await;
                let code = &answer["error"]["code"];
                assert_eq!((status.as_u16(), code), (400, &json!("unknown_field")), "{path}");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn limits_are_those_of_the_served_model() {
    within(async {
        let (_server, document) = start().await;
        let schema = &document["components"]["schemas"]["CompletionRequest"]["properties"];
        assert_eq!(schema["n"]["maximum"], MAX_SAMPLES);
        assert_eq!(schema["max_tokens"]["maximum"], MAX_MODEL_LEN - 1);
        assert_eq!(schema["stop_token_ids"]["items"]["maximum"], VOCAB - 1);
        assert!(schema["model"].to_string().contains(MODEL), "{}", schema["model"]);
    })
    .await;
}
