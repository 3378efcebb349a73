//! What every format needs: names checked against the configuration, tensors read in parallel.

use super::LoadError;
use crate::{device::Placement, kernels::parallel, model::config::ModelConfig};
use std::{collections::BTreeSet, sync::Mutex};
use tch::{Device, Kind, Tensor};

/// Reads one tensor of this name and shape, contiguous, on the CPU; called on several threads.
type ReadOne<'a> = dyn Fn(&str, &[i64]) -> Result<Tensor, LoadError> + Sync + 'a;

/// Reads every tensor of `config`, in the order of its `tensor_shapes`, and brings it to its place.
pub(super) fn read_all(
    config: &ModelConfig,
    placement: Placement,
    read: &ReadOne,
) -> Result<Vec<(String, Tensor)>, LoadError> {
    let wanted = config.tensor_shapes();
    let slots: Vec<_> = wanted.iter().map(|_| Mutex::new(None)).collect();
    parallel::for_each(wanted.len(), &|i| {
        let (name, shape) = &wanted[i];
        if let Ok(mut slot) = slots[i].lock() {
            *slot = Some(read(name, shape).and_then(|tensor| place(name, &tensor, placement)));
        }
    });
    let unread = |name: &str| Err(LoadError::tensor(name, "was not read"));
    let results = wanted.into_iter().zip(slots).map(|((name, _), slot)| {
        let result = slot.into_inner().ok().flatten().unwrap_or_else(|| unread(&name));
        result.map(|tensor| (name, tensor))
    });
    results.collect()
}

/// The tensor on the device, in the type that it will have.
///
/// # Errors
/// f16 does not hold a number of it, or the device has no memory left.
fn place(name: &str, tensor: &Tensor, placement: Placement) -> Result<Tensor, LoadError> {
    let placed = tensor.f_to_kind(placement.kind).and_then(|t| t.f_to_device(placement.device));
    let placed = placed.map_err(torch_error(name))?;
    if placement.kind == Kind::Half && placed.isfinite().all().int64_value(&[]) == 0 {
        let reason = "holds a number beyond 65504, the largest that f16 has; set model.dtype to \
                      \"bf16\" or \"f32\"";
        return Err(LoadError::tensor(name, reason));
    }
    Ok(placed)
}

/// Elements that are read at a time, a multiple of every block size of a quantised format. Small
/// enough to stay in the cache until they are copied to their place, and for torch to copy them on
/// the thread that asks for it.
const CHUNK: usize = 1 << 14;

/// Makes one tensor of type `kind` out of chunks, so that nothing else of its size is ever allocated.
/// `chunk(start, count)` gives `count` elements from element `start` on, in any floating type.
pub(super) fn assemble(
    name: &str,
    (shape, kind): (&[i64], Kind),
    chunk: &dyn Fn(usize, usize) -> Result<Tensor, LoadError>,
) -> Result<Tensor, LoadError> {
    let torch_error = torch_error(name);
    let whole = Tensor::f_empty(shape, (kind, Device::Cpu)).map_err(&torch_error)?;
    let flat = whole.f_view([-1]).map_err(&torch_error)?;
    let total = whole.numel();
    for start in (0..total).step_by(CHUNK) {
        let count = CHUNK.min(total - start);
        let values = chunk(start, count)?;
        flat.f_narrow(0, start as i64, count as i64)
            .and_then(|mut part| part.f_copy_(&values).map(drop))
            .map_err(&torch_error)?;
    }
    Ok(whole)
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
            let reason = format!(
                "is in the checkpoint, but {} has no such tensor; is the configuration the right \
                 one?",
                config.architecture.class_name()
            );
            Err(LoadError::tensor(*name, reason))
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
