//! Models on disk, engines over them, and ways to ask.

use crate::common;
use onpolicy_engine::{
    collect::{Sample, collect},
    mistral::{MistralEngine, Options, start},
    model::loading::Checkpoint,
    torch::slices::bytes,
};
use onpolicy_plugin_api::{Engine, Request, SamplingParams};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

/// The directory of a tiny checkpoint, as mistral.rs takes it.
pub fn tiny_dir(name: &str) -> PathBuf {
    static WRITTEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let (from, to) = (
        common::golden("tiny").join(name),
        Path::new(env!("CARGO_TARGET_TMPDIR")).join("mistral").join(name),
    );
    let mut written = WRITTEN.lock().unwrap_or_else(|poison| poison.into_inner());
    if !from.is_dir() || !written.insert(name.into()) {
        return to;
    }
    std::fs::create_dir_all(&to).expect("a directory");
    for file in std::fs::read_dir(&from).expect("a checkpoint") {
        let file = file.expect("a file").path();
        let copy = to.join(file.file_name().expect("a name"));
        std::fs::copy(&file, &copy).expect("a copy");
        if copy.ends_with("tokenizer.json") {
            let text = std::fs::read_to_string(&copy).expect("text");
            std::fs::write(&copy, with_decoder(&text)).expect("written");
        }
    }
    to
}

/// A tokenizer that says how its tokens become text: those of the tiny checkpoints do not, and
/// mistral.rs asks for it.
fn with_decoder(tokenizer: &str) -> String {
    let mut tokenizer: Value = serde_json::from_str(tokenizer).expect("JSON");
    if tokenizer["decoder"].is_null() {
        tokenizer["decoder"] = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
        });
    }
    tokenizer.to_string()
}

/// An engine over a model on disk.
pub fn serve(path: &Path, options: Options) -> MistralEngine {
    start(path.to_str().expect("UTF-8 path"), options).expect("mistral.rs loads the model").engine
}

/// An engine over a tiny checkpoint.
pub fn tiny(name: &str) -> MistralEngine {
    serve(&tiny_dir(name), Options::default())
}

/// Writes a checkpoint as the trainer does: a directory with f32 weights, each multiplied by
/// `scale`.
pub fn write(checkpoint: &Checkpoint, dir: &Path, scale: f64) {
    std::fs::create_dir_all(dir).expect("a directory");
    for (file, text) in checkpoint.source.files() {
        let text = if file == "tokenizer.json" { with_decoder(text) } else { text.to_string() };
        std::fs::write(dir.join(file), text).expect("a file is written");
    }
    let scaled: Vec<_> = checkpoint.tensors.iter().map(|(n, t)| (n, t * scale)).collect();
    let views = scaled.iter().map(|(name, tensor)| {
        let shape = tensor.size().iter().map(|&axis| axis as usize).collect();
        (name, TensorView::new(Dtype::F32, shape, bytes(tensor)).expect("a tensor"))
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).expect("weights");
}

/// Asks for the samples of several prompts at once; fails after two minutes.
pub fn ask_all(engine: &dyn Engine, requests: Vec<Request>) -> Vec<Vec<Sample>> {
    let deadline = Instant::now() + Duration::from_secs(120);
    let groups = collect(engine, requests, deadline, &mut || {}).expect("the engine answers");
    groups.into_iter().map(|group| group.samples).collect()
}

/// Asks for the samples of one prompt.
pub fn ask(engine: &dyn Engine, prompt: &[u32], params: SamplingParams) -> Vec<Sample> {
    ask_all(engine, vec![Request::new(prompt.to_vec(), params)]).remove(0)
}

/// The token ids of a sample.
pub fn ids(sample: &Sample) -> Vec<u32> {
    sample.tokens.iter().map(|token| token.id).collect()
}

/// Greedy, this many tokens, no end.
pub fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens, ignore_eos: true, ..SamplingParams::default() }
}
