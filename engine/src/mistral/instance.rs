//! One version of the weights in memory, and the thread of mistral.rs that serves it.

use super::Options;
use crate::{
    model::loading::{Description, LoadError, describe},
    panic::message,
};
use mistralrs::{
    GgufModelBuilder, MistralRs, ModelBuilder, ModelCategory, NormalRequest,
    PagedAttentionMetaBuilder, Request, TextModelBuilder, TokenSource, UqffTextModelBuilder,
    core::MistralRsBuilder,
    model_builder_trait::{build_auto_pipeline, build_gguf_pipeline, build_text_pipeline},
};
use onpolicy_plugin_api::EngineError;
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// Where weights are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Weights {
    /// A directory of Hugging Face's form.
    Directory(PathBuf),
    /// One GGUF file.
    Gguf(PathBuf),
    /// A UQFF file, or the first of several; `config.json` and what else there is lie beside it.
    Uqff(PathBuf),
}

impl Weights {
    /// The weights that `spec` names, and what their model says beside them.
    pub fn find(spec: &str) -> Result<(Description, Self), LoadError> {
        let file = Path::new(spec);
        if file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("uqff")) {
            let model = describe(&parent(file).to_string_lossy())?;
            return Ok((model, Self::Uqff(file.to_path_buf())));
        }
        let model = describe(spec)?;
        let path = model.path.clone();
        Ok(if path.is_dir() { (model, Self::Directory(path)) } else { (model, Self::Gguf(path)) })
    }
}

fn parent(file: &Path) -> &Path {
    file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Weights in memory, and their version. They are given back when the last handle is gone.
pub(super) struct Instance {
    runner: Arc<MistralRs>,
    version: AtomicU64,
    max_model_len: usize,
}

impl Instance {
    /// Loads weights, on a thread of its own; blocks until they are in memory.
    pub fn load(weights: &Weights, options: &Options, version: u64) -> Result<Self, String> {
        let (weights, options) = (weights.clone(), options.clone());
        let thread = std::thread::Builder::new().name("mistralrs-load".into());
        let thread = thread.spawn(move || {
            // With one thread only, mistral.rs leaves out a first run that nobody asked for.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| error.to_string())?;
            runtime.block_on(build(&weights, &options))
        });
        let thread = thread.map_err(|error| format!("no thread: {error}"))?;
        let (runner, max_model_len) = thread.join().unwrap_or_else(|panic| Err(text(&*panic)))?;
        Ok(Self { runner, version: AtomicU64::new(version), max_model_len })
    }

    /// Longest sequence of the model.
    pub fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    /// Version of the weights.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Names the weights.
    pub fn set_version(&self, version: u64) {
        self.version.store(version, Ordering::Release);
    }

    /// Hands a sample to mistral.rs.
    pub fn send(&self, request: NormalRequest) -> Result<(), EngineError> {
        let internal = |error: String| EngineError::Internal(format!("mistral.rs: {error}"));
        // Starts its thread again if that has panicked.
        let sender = self.runner.get_sender(None).map_err(|error| internal(error.to_string()))?;
        let sent = sender.try_send(Request::Normal(Box::new(request)));
        sent.map_err(|error| internal(error.to_string()))
    }
}

/// Loads weights as mistral.rs does; gives its runner and the model's longest sequence.
async fn build(weights: &Weights, options: &Options) -> Result<(Arc<MistralRs>, usize), String> {
    let (pipeline, scheduler, _) = match weights {
        Weights::Directory(dir) => build_auto_pipeline(directory(dir, options)?).await,
        Weights::Gguf(file) => build_gguf_pipeline(gguf(file, options)?).await,
        Weights::Uqff(file) => build_text_pipeline(uqff(file, options)?).await,
    }
    .map_err(|error| format!("{error:#}"))?;
    let (category, max_model_len) = {
        let pipeline = pipeline.lock().await;
        (pipeline.category(), pipeline.get_metadata().max_seq_len)
    };
    if !matches!(category, ModelCategory::Text | ModelCategory::Multimodal { .. }) {
        return Err(format!("it is a model of the kind {category:?}; only text can be served"));
    }
    // The end of a sample is decided here. Nothing is reused between requests, so that what a
    // sample is does not depend on what was served before.
    let builder = MistralRsBuilder::new(pipeline, scheduler, false, None);
    let builder = builder.with_disable_eos_stop(true).with_no_prefix_cache(true);
    Ok((builder.build().await, max_model_len))
}

/// What the three builders have in common. PagedAttention is used where mistral.rs has it.
macro_rules! common {
    ($builder:expr, $options:expr) => {{
        let paged = PagedAttentionMetaBuilder::default().build();
        $builder
            .with_token_source(TokenSource::None)
            .with_max_num_seqs($options.max_num_seqs)
            .with_prefix_cache_n(None)
            .with_paged_attn(paged.map_err(|error| error.to_string())?)
    }};
}

fn directory(dir: &Path, options: &Options) -> Result<ModelBuilder, String> {
    let builder = common!(ModelBuilder::new(dir.display()), options);
    let builder = builder.with_dtype(options.model_dtype()?);
    Ok(match options.isq_type().map_err(|error| error.to_string())? {
        Some(isq) => builder.with_isq(isq),
        None => builder,
    })
}

fn gguf(file: &Path, options: &Options) -> Result<GgufModelBuilder, String> {
    quantised_already("a GGUF file", options)?;
    let name = file.file_name().ok_or("the GGUF file has no name")?.to_string_lossy();
    Ok(common!(GgufModelBuilder::new(parent(file).display(), vec![name]), options))
}

fn uqff(file: &Path, options: &Options) -> Result<TextModelBuilder, String> {
    quantised_already("a UQFF file", options)?;
    let name = file.file_name().ok_or("the UQFF file has no name")?;
    let builder = UqffTextModelBuilder::new(parent(file).display(), vec![name.into()]);
    Ok(common!(builder.into_inner(), options).with_dtype(options.model_dtype()?))
}

fn quantised_already(what: &str, options: &Options) -> Result<(), String> {
    match options.isq {
        Some(_) => Err(format!("isq quantises the weights of a directory; {what} is quantised")),
        None => Ok(()),
    }
}

/// What a panic said.
fn text(panic: &(dyn std::any::Any + Send)) -> String {
    format!("mistral.rs panicked: {}", message(panic).unwrap_or("no message"))
}
