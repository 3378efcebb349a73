//! What every format needs: names checked against the configuration, tensors read in parallel.

use super::LoadError;
use crate::{model::config::ModelConfig, torch::parallel};
use std::{collections::BTreeSet, sync::Mutex};
use tch::Tensor;

/// Reads every tensor of `config`, in the order of its `tensor_shapes`.
///
/// `read(name, shape)` gives one tensor, f32 and contiguous; it runs on several threads.
pub(super) fn read_all(
    config: &ModelConfig,
    read: &(dyn Fn(&str, &[i64]) -> Result<Tensor, LoadError> + Sync),
) -> Result<Vec<(String, Tensor)>, LoadError> {
    let wanted = config.tensor_shapes();
    let slots: Vec<_> = wanted.iter().map(|_| Mutex::new(None)).collect();
    parallel::for_each(wanted.len(), &|i| {
        let (name, shape) = &wanted[i];
        if let Ok(mut slot) = slots[i].lock() {
            *slot = Some(read(name, shape));
        }
    });
    let unread = |name: &str| Err(LoadError::tensor(name, "was not read"));
    let results = wanted.into_iter().zip(slots).map(|((name, _), slot)| {
        let result = slot.into_inner().ok().flatten().unwrap_or_else(|| unread(&name));
        result.map(|tensor| (name, tensor))
    });
    results.collect()
}

/// Refuses a checkpoint that lacks a tensor, or holds one that the decoder does not know and that
/// would therefore be ignored.
pub(super) fn check_names<'a>(
    config: &ModelConfig,
    present: impl Iterator<Item = &'a str>,
) -> Result<(), LoadError> {
    let wanted = config.tensor_shapes();
    let wanted: BTreeSet<&str> = wanted.iter().map(|(name, _)| name.as_str()).collect();
    let present: BTreeSet<&str> = present.collect();
    if let Some(name) = wanted.difference(&present).next() {
        let more = wanted.difference(&present).count() - 1;
        let others = if more > 0 { format!(" (and so are {more} others)") } else { String::new() };
        return Err(LoadError::tensor(*name, format!("is missing from the checkpoint{others}")));
    }
    let ignorable = |name: &str| {
        // Buffers of old checkpoints, and the copy that some keep of a tied head.
        name.ends_with(".rotary_emb.inv_freq")
            || (name == "lm_head.weight" && config.tie_word_embeddings)
    };
    match present.difference(&wanted).find(|name| !ignorable(name)) {
        None => Ok(()),
        Some(name) => {
            let family = config.architecture.class_name();
            Err(LoadError::tensor(
                *name,
                format!(
                    "is in the checkpoint, but {family} has no such tensor; is config.json the right one?"
                ),
            ))
        }
    }
}

/// Refuses a tensor whose shape is not the one that the configuration asks for.
pub(super) fn check_shape(name: &str, found: &[usize], wanted: &[i64]) -> Result<(), LoadError> {
    if found.iter().map(|&n| n as i64).eq(wanted.iter().copied()) {
        return Ok(());
    }
    let reason = format!("has shape {found:?}, but the configuration asks for {wanted:?}");
    Err(LoadError::tensor(name, reason))
}

/// A tensor whose values torch could not take.
pub(super) fn torch_error(name: &str) -> impl Fn(tch::TchError) -> LoadError {
    let name = name.to_string();
    move |error| LoadError::tensor(&name, error.to_string())
}
