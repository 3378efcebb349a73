//! Keys: who may use the model, who may control it.

use crate::common::tiny;
use crate::server::{Server, keyed, open, within};
use onpolicy_engine::http::{
    access::{Access, Key},
    control::Settings,
};
use onpolicy_plugin_api::Engine;
use reqwest::Method;
use serde_json::json;

fn key(text: &str) -> Option<Key> {
    Some(Key::new(text).unwrap())
}

async fn server(access: Access) -> Server {
    Server::start(&tiny("llama-tied"), access, Settings::default()).await
}

const DATA: [(Method, &str); 3] =
    [(Method::GET, "/v1/models"), (Method::POST, "/v1/completions"), (Method::GET, "/version")];

const CONTROL: [(Method, &str); 8] = [
    (Method::POST, "/pause"),
    (Method::POST, "/resume"),
    (Method::GET, "/is_paused"),
    (Method::GET, "/weight_info"),
    (Method::POST, "/update_weights"),
    (Method::POST, "/flush_cache"),
    (Method::POST, "/wake_up"),
    (Method::POST, "/collective_rpc"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_key_opens_its_own_routes() {
    within(async {
        let access =
            Access { api_key: key("data-1"), control_key: key("control-1"), control: true };
        let server = server(access).await;
        for (shown, data, control) in [
            ("", true, true),
            ("data-2", true, true),
            ("data-1", false, true),
            ("control-1", true, false),
        ] {
            for (method, path) in DATA {
                let status = keyed(&server, method, path, shown).await.as_u16();
                assert_eq!(status == 401, data, "{path} {shown}: {status}");
            }
            for (method, path) in CONTROL {
                let status = keyed(&server, method, path, shown).await.as_u16();
                assert_eq!(status == 401, control, "{path} {shown}: {status}");
            }
            for path in ["/health", "/health/", "/ping", "/liveness"] {
                assert_eq!(keyed(&server, Method::GET, path, shown).await, 200, "{path}");
            }
            let metrics = keyed(&server, Method::GET, "/metrics", shown).await;
            assert_eq!(metrics == 401, data && control, "{shown}");
        }
        let refused = server.refused("/pause", json!({})).await;
        assert!(refused.2.contains("Authorization: Bearer"), "{}", refused.2);
        assert!(!server.engine.is_paused());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_is_off_unless_switched_on() {
    within(async {
        let server = server(Access { control_key: key("c"), ..Access::default() }).await;
        for (method, path) in CONTROL {
            assert_eq!(keyed(&server, method, path, "c").await, 403, "{path}");
        }
        let refused = server.refused("/pause", json!({})).await;
        assert!(refused.2.contains("server.control = \"on\""), "{}", refused.2);
        assert!(!server.engine.is_paused());
        assert_eq!(keyed(&server, Method::GET, "/v1/models", "").await, 200);
        assert_eq!(keyed(&server, Method::GET, "/metrics", "").await, 200);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn web_pages_do_not_control_an_engine_without_a_key() {
    within(async {
        let post = async |server: &Server, key: &str| {
            let request = server.client.post(format!("{}/pause", server.url));
            let request = request.header("origin", "http://a.page").bearer_auth(key);
            request.send().await.unwrap().status().as_u16()
        };
        let server = server(open()).await;
        assert_eq!(post(&server, "").await, 403);
        assert!(!server.engine.is_paused());
        let access = Access { control_key: key("c"), ..open() };
        let server = Server::start(&tiny("llama-tied"), access, Settings::default()).await;
        assert_eq!(post(&server, "c").await, 200);
        assert!(server.engine.is_paused());
    })
    .await;
}
