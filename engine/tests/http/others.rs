//! Models, tokens, health, version and metrics.

use crate::COMPLETIONS;
use crate::scripted::{MAX_MODEL_LEN, MODEL, Script};
use crate::server::{Server, within};
use crate::tokenizer::{BOS, EOS, HELLO, bytes};
use serde_json::{Value, json};

async fn server() -> Server {
    Server::start(Script::saying(|_, _| bytes("okay"))).await
}

#[tokio::test]
async fn models_are_listed() {
    within(async {
        let server = server().await;
        let (status, mut list) = server.get("/v1/models").await;
        assert_eq!(status, 200);
        let created = list["data"][0]["created"].take().as_u64().unwrap();
        assert!(created > 1_700_000_000);
        let permission = list["data"][0]["permission"].take();
        assert_eq!(permission[0]["allow_sampling"], true);
        assert_eq!(permission[0]["id"], format!("modelperm-{created}"));
        let model = json!({"id": MODEL, "object": "model", "created": null,
            "owned_by": "onpolicy", "root": MODEL, "parent": null,
            "max_model_len": MAX_MODEL_LEN, "permission": null});
        assert_eq!(list, json!({"object": "list", "data": [model]}));
        for path in ["/v1/models/test/scripted", "/v1/models/test%2Fscripted"] {
            let (status, card) = server.get(path).await;
            assert_eq!((status.as_u16(), &card["id"]), (200, &json!(MODEL)));
        }
        let (status, answer) = server.get("/v1/models/other").await;
        assert_eq!((status.as_u16(), &answer["error"]["code"]), (404, &json!("model_not_found")));
    })
    .await;
}

#[tokio::test]
async fn text_becomes_tokens_and_back() {
    within(async {
        let server = server().await;
        let answer = server.ok("/tokenize", json!({"prompt": "hello!"})).await;
        let expected = json!({"count": 3, "max_model_len": MAX_MODEL_LEN,
            "tokens": [BOS, HELLO, 35], "token_strs": null});
        assert_eq!(answer, expected);
        let body = json!({"model": MODEL, "prompt": "hello</s>", "add_special_tokens": false,
            "return_token_strs": true});
        let answer = server.ok("/tokenize", body).await;
        assert_eq!(answer["tokens"], json!([HELLO, EOS]));
        assert_eq!(answer["token_strs"], json!(["hello", "</s>"]));
        let messages = json!([{"role": "user", "content": "é"}]);
        let answer = server.ok("/tokenize", json!({"messages": messages})).await;
        assert_eq!(answer["tokens"], json!(bytes("[user]é\n[assistant]")));
        let body = json!({"messages": messages, "add_generation_prompt": false});
        assert_eq!(server.ok("/tokenize", body).await["count"], 9);

        let body = json!({"tokens": [BOS, HELLO, 35, 2 + 0xc3, 2 + 0xa9, EOS]});
        assert_eq!(server.ok("/detokenize", body).await, json!({"prompt": "<s>hello!é</s>"}));
        let empty =
            server.ok("/tokenize", json!({"prompt": "", "add_special_tokens": false})).await;
        assert_eq!(empty["count"], 0);
        assert_eq!(server.ok("/detokenize", json!({"tokens": []})).await, json!({"prompt": ""}));
    })
    .await;
}

#[tokio::test]
async fn token_routes_refuse_what_is_wrong() {
    within(async {
        let server = server().await;
        let user = json!([{"role": "user", "content": "a"}]);
        let cases = [
            ("/tokenize", json!({}), "messages"),
            ("/tokenize", json!({"prompt": 5}), "prompt"),
            ("/tokenize", json!({"prompt": "a", "messages": user}), "messages"),
            ("/tokenize", json!({"prompt": "a", "odd": 1}), "odd"),
            ("/tokenize", json!({"messages": user, "tools": [{}]}), "tools[0].type"),
            (
                "/tokenize",
                json!({"messages": user, "add_special_tokens": true}),
                "add_special_tokens",
            ),
            ("/detokenize", json!({}), "tokens"),
            ("/detokenize", json!({"tokens": "a"}), "tokens"),
            ("/detokenize", json!({"tokens": [-1]}), "tokens"),
            ("/detokenize", json!({"tokens": [262]}), "tokens"),
            ("/detokenize", json!({"tokens": [], "skip": 1}), "skip"),
        ];
        for (path, body, param) in cases {
            assert_eq!(server.refused(path, body).await.0, param);
        }
        let (status, _) = server.post("/tokenize", json!({"prompt": "a", "model": "x"})).await;
        assert_eq!(status, 404);
    })
    .await;
}

#[tokio::test]
async fn health_and_version() {
    within(async {
        let server = server().await;
        assert_eq!(server.get("/health").await, (reqwest::StatusCode::OK, json!({"status": "ok"})));
        assert_eq!(server.get("/ping").await.0, 200);
        let version = json!({"version": env!("CARGO_PKG_VERSION"), "weight_version": 7});
        assert_eq!(server.get("/version").await.1, version);
    })
    .await;
}

#[tokio::test]
async fn metrics_count_and_time_requests() {
    within(async {
        let server = server().await;
        server.ok(COMPLETIONS, json!({"prompt": "a"})).await;
        server.refused(COMPLETIONS, json!({})).await;
        server.get("/no/such/route").await;
        let response = server.client.get(server.url.clone() + "/metrics").send().await.unwrap();
        assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
        let text = response.text().await.unwrap();
        let value = |series: &str| -> f64 {
            let line = text.lines().find(|line| line.starts_with(&format!("{series} ")));
            line.unwrap_or_else(|| panic!("{series} in\n{text}"))
                .rsplit(' ')
                .next()
                .unwrap()
                .parse()
                .unwrap()
        };
        // Other tests of this process count too.
        let route = "route=\"/v1/completions\"";
        assert!(value(&format!("onpolicy_http_requests_total{{{route},status=\"200\"}}")) >= 1.0);
        assert!(value(&format!("onpolicy_http_requests_total{{{route},status=\"400\"}}")) >= 1.0);
        let unmatched = "onpolicy_http_requests_total{route=\"unmatched\",status=\"404\"}";
        assert!(value(unmatched) >= 1.0);
        for name in [
            "onpolicy_time_to_first_token_seconds",
            "onpolicy_request_seconds",
            "onpolicy_time_per_output_token_seconds",
            "onpolicy_http_response_seconds",
        ] {
            assert!(value(&format!("{name}_count{{{route}}}")) >= 1.0, "{name}");
            assert!(value(&format!("{name}_bucket{{{route},le=\"+Inf\"}}")) >= 1.0, "{name}");
        }
        assert!(value("onpolicy_http_generations_in_flight") >= 0.0);
        assert!(text.contains("# HELP onpolicy_http_requests_total"));
        let _: Value = server.ok(COMPLETIONS, json!({"prompt": "a"})).await;
    })
    .await;
}
