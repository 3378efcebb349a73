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
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The directory of a tiny checkpoint.
pub fn tiny_dir(name: &str) -> PathBuf {
    common::golden("tiny").join(name)
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
