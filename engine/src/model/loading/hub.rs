//! A hub id becomes a directory, through Hugging Face's cache.

use super::LoadError;
use hf_hub::{
    Cache, Repo, RepoType,
    api::sync::{Api, ApiBuilder, ApiError},
};
use std::{
    fmt,
    path::{Path, PathBuf},
};

/// Small files that are fetched if the model has them.
const TEXTS: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

const INDEX: &str = ".safetensors.index.json";

/// Where models come from and where they are kept.
pub(super) struct Hub {
    /// The hub's address; none is the public hub.
    endpoint: Option<String>,
    /// For private and gated models; none is the token that `huggingface-cli login` stored.
    token: Option<String>,
    cache: Cache,
    /// Use nothing but the cache.
    offline: bool,
}

impl Hub {
    /// As `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` say.
    pub fn from_env() -> Self {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self {
            endpoint: set("HF_ENDPOINT"),
            token: set("HF_TOKEN"),
            cache: Cache::from_env(),
            offline: set("HF_HUB_OFFLINE").is_some_and(|value| value != "0"),
        }
    }

    fn api(&self) -> Result<Api, ApiError> {
        let mut builder = ApiBuilder::from_cache(self.cache.clone());
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_string());
        }
        if let Some(token) = &self.token {
            builder = builder.with_token(Some(token.clone()));
        }
        builder.build()
    }
}

/// `org/name`, or `org/name/file.gguf` for one file of a repository that has several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ModelId {
    repository: String,
    file: Option<String>,
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{}/{file}", self.repository),
            None => f.write_str(&self.repository),
        }
    }
}

impl ModelId {
    /// Reads a hub id; none if the text cannot be one.
    pub fn parse(spec: &str) -> Option<Self> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let is_part = |part: &&str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric()) && part.chars().all(allowed)
        };
        let parts: Vec<&str> = spec.split('/').collect();
        match parts.as_slice() {
            [org, name] if parts.iter().all(is_part) => {
                Some(Self { repository: format!("{org}/{name}"), file: None })
            }
            [org, name, file] if parts.iter().all(is_part) && file.ends_with(".gguf") => {
                Some(Self { repository: format!("{org}/{name}"), file: Some(file.to_string()) })
            }
            _ => None,
        }
    }

    /// The directory or GGUF file of the model: the hub's newest version, or, where the hub does
    /// not answer, the one in the cache.
    pub fn fetch(&self, hub: &Hub) -> Result<PathBuf, LoadError> {
        let failure = if hub.offline {
            "HF_HUB_OFFLINE is set, and the model is not in the cache".to_string()
        } else {
            match self.download(hub) {
                Ok(path) => return Ok(path),
                Err(reason) => reason,
            }
        };
        match self.cached(hub) {
            Some(path) => {
                tracing::warn!(model = %self, reason = %failure, "taken from the cache");
                Ok(path)
            }
            None => Err(LoadError::Hub { id: self.to_string(), reason: failure }),
        }
    }

    /// What the cache has of the version last fetched.
    fn cached(&self, hub: &Hub) -> Option<PathBuf> {
        let repository = Repo::model(self.repository.clone());
        let root = hub.cache.path().join(repository.folder_name());
        let commit = std::fs::read_to_string(root.join("refs").join(repository.revision())).ok()?;
        let snapshot = root.join("snapshots").join(commit.trim());
        let path = match &self.file {
            Some(file) => snapshot.join(file),
            None => snapshot,
        };
        path.exists().then_some(path)
    }

    /// Fetches what is not yet in the cache.
    fn download(&self, hub: &Hub) -> Result<PathBuf, String> {
        let api = hub.api().map_err(|error| explain(&error))?;
        let info = api.model(self.repository.clone()).info().map_err(|error| explain(&error))?;
        let names: Vec<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        let chosen = self.choose(&names)?;
        // All files of one commit, whatever is pushed meanwhile.
        let kind = RepoType::Model;
        let commit = Repo::with_revision(self.repository.clone(), kind, info.sha.clone());
        let files = api.repo(commit);
        let mut first = None;
        for name in chosen {
            let path = files.get(name).map_err(|error| format!("{name}: {}", explain(&error)))?;
            first.get_or_insert(path);
        }
        let newest = hub.cache.repo(Repo::model(self.repository.clone()));
        newest.create_ref(&info.sha).map_err(|error| error.to_string())?;
        let first = first.ok_or_else(|| "the repository is empty".to_string())?;
        let is_gguf = first.extension().is_some_and(|extension| extension == "gguf");
        let directory = first.parent().map(Path::to_path_buf);
        Ok(if is_gguf { first } else { directory.unwrap_or_default() })
    }

    /// The files to fetch, out of all that the repository has: safetensors and what belongs to
    /// them, or one GGUF.
    fn choose<'a>(&self, names: &[&'a str]) -> Result<Vec<&'a str>, String> {
        let find = |wanted: &str| names.iter().copied().find(|name| *name == wanted);
        if let Some(file) = &self.file {
            let missing = || format!("the repository has no file {file}");
            return Ok(vec![find(file).ok_or_else(missing)?]);
        }
        let at_top = |name: &&&str| !name.contains('/');
        let weights = |name: &&str| {
            name.starts_with("model") && (name.ends_with(".safetensors") || name.ends_with(INDEX))
        };
        let weights: Vec<&str> = names.iter().filter(at_top).copied().filter(weights).collect();
        if find("config.json").is_some() && !weights.is_empty() {
            return Ok(TEXTS.iter().filter_map(|text| find(text)).chain(weights).collect());
        }
        let ggufs: Vec<&str> = names.iter().copied().filter(|n| n.ends_with(".gguf")).collect();
        match ggufs.as_slice() {
            [one] => Ok(vec![one]),
            [] => Err("the repository has neither safetensors nor a .gguf file".to_string()),
            [first, ..] => {
                let count = ggufs.len();
                Err(format!("it has {count} .gguf files; name one, as in {self}/{first}"))
            }
        }
    }
}

/// What went wrong, and what can be done.
fn explain(error: &ApiError) -> String {
    let text = error.to_string();
    if ["401", "403", "404"].iter().any(|code| text.contains(&format!("status code {code}"))) {
        return format!(
            "{text}; there is no such model, or it is private or gated (log in with \
             huggingface-cli, or set HF_TOKEN)"
        );
    }
    format!(
        "{text}; if the hub cannot be reached from here, fetch the model elsewhere and give the \
         path of its directory, or set HF_ENDPOINT to a mirror"
    )
}

#[cfg(test)]
mod tests;
