use super::*;
use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
};
use tempfile::TempDir;

fn id(spec: &str) -> ModelId {
    ModelId::parse(spec).unwrap()
}

fn hub(endpoint: &str, cache: &TempDir) -> Hub {
    Hub {
        endpoint: Some(endpoint.to_string()),
        token: None,
        cache: Cache::new(cache.path().to_path_buf()),
        offline: false,
    }
}

/// An address on this machine where nobody listens.
fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// A hub on this machine with one model, `org/name`, whose files hold their own names.
fn serve(files: &'static [&'static str]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || answer(&stream, files));
        }
    });
    address
}

fn answer(mut stream: &TcpStream, files: &[&str]) {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let request = lines.next().unwrap_or_default();
    let path = request.split(' ').nth(1).unwrap_or_default().to_string();
    // The size alone is asked for with a range of one byte.
    let range = lines.take_while(|line| !line.is_empty()).find(|l| l.starts_with("Range"));
    let info = path == "/api/models/org/name" || path == "/api/models/org/name/revision/main";
    let file = path.strip_prefix("/org/name/resolve/c0ffee/").filter(|name| files.contains(name));
    let (status, body) = match (info, file) {
        (true, _) => {
            let names: Vec<_> =
                files.iter().map(|name| serde_json::json!({ "rfilename": name })).collect();
            ("200 OK", serde_json::json!({ "sha": "c0ffee", "siblings": names }).to_string())
        }
        (_, Some(name)) => ("200 OK", name.to_string()),
        _ => ("404 Not Found", String::new()),
    };
    let size = body.len();
    let sent = if range.is_some_and(|range| range.ends_with("=0-0")) { &body[..1] } else { &body };
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes 0-0/{size}\r\n\
         ETag: \"{}\"\r\nX-Repo-Commit: c0ffee\r\nConnection: close\r\n\r\n{sent}",
        sent.len(),
        path.replace('/', "-"),
    );
}

#[test]
fn ids_are_told_from_paths() {
    assert_eq!(id("org/name-1.5B").to_string(), "org/name-1.5B");
    let with_file = id("org/name/q4.gguf");
    assert_eq!(
        (with_file.repository.as_str(), with_file.file.as_deref()),
        ("org/name", Some("q4.gguf"))
    );
    for spec in ["name", "./name", "../name", "/org/name", "org/name/", "a/b/c", "a b/c", "", "/"] {
        assert_eq!(ModelId::parse(spec), None, "{spec}");
    }
}

#[test]
fn files_to_fetch_are_chosen() {
    let names = [
        "README.md",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "original/model.safetensors",
        "consolidated.safetensors",
        "a.gguf",
    ];
    let chosen = id("o/n").choose(&names).unwrap();
    let expected = [
        "config.json",
        "tokenizer.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ];
    assert_eq!(chosen, expected);
    assert_eq!(id("o/n/a.gguf").choose(&names).unwrap(), ["a.gguf"]);
    assert_eq!(id("o/n").choose(&["x.gguf", "README.md"]).unwrap(), ["x.gguf"]);
    let several = id("o/n").choose(&["x.gguf", "y.gguf"]).unwrap_err();
    assert!(several.contains("name one, as in o/n/x.gguf"), "{several}");
    assert!(id("o/n/z.gguf").choose(&names).unwrap_err().contains("no file z.gguf"));
    assert!(id("o/n").choose(&["README.md"]).is_err());
}

#[test]
fn a_model_is_fetched_and_then_found_without_the_hub() {
    let cache = tempfile::tempdir().unwrap();
    let address = serve(&["config.json", "model.safetensors", "README.md"]);
    let path = id("org/name").fetch(&hub(&address, &cache)).unwrap();
    assert_eq!(std::fs::read_to_string(path.join("config.json")).unwrap(), "config.json");
    assert_eq!(
        std::fs::read_to_string(path.join("model.safetensors")).unwrap(),
        "model.safetensors"
    );
    assert!(!path.join("README.md").exists());

    assert_eq!(id("org/name").fetch(&hub(&nobody(), &cache)).unwrap(), path);
    let offline = Hub { offline: true, ..hub(&address, &cache) };
    assert_eq!(id("org/name").fetch(&offline).unwrap(), path);
    let error = id("org/other").fetch(&offline).unwrap_err().to_string();
    assert!(error.contains("HF_HUB_OFFLINE"), "{error}");
}

#[test]
fn one_gguf_of_a_repository_is_fetched() {
    let cache = tempfile::tempdir().unwrap();
    let address = serve(&["q4.gguf", "q8.gguf"]);
    let path = id("org/name/q8.gguf").fetch(&hub(&address, &cache)).unwrap();
    assert_eq!(std::fs::read_to_string(path).unwrap(), "q8.gguf");
}

#[test]
fn failures_say_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let error = id("org/name").fetch(&hub(&nobody(), &cache)).unwrap_err().to_string();
    assert!(error.starts_with("'org/name' is not a path here"), "{error}");
    assert!(error.contains("give the path of its directory"), "{error}");
    let address = serve(&["config.json"]);
    let error = id("org/unknown").fetch(&hub(&address, &cache)).unwrap_err().to_string();
    assert!(error.contains("there is no such model") && error.contains("HF_TOKEN"), "{error}");
}
