//! Changes of a row of logits before it becomes a distribution: penalties, `logit_bias`, then what
//! may not be drawn. Logits that are not finite stay as they are, and finite ones stay finite.
//!
//! Each logit is changed by itself, in this order (z is a logit, c how often the sample has the
//! token so far): z / r if z > 0 and z * r otherwise, for tokens of prompt or sample (arXiv
//! 1909.05858, without the temperature); z - frequency * c; z - presence if c > 0; z + bias.

use onpolicy_plugin_api::SamplingParams;

use super::Draw;

/// Whether the parameters have penalties: then a draw needs to know what was drawn before.
pub(crate) fn has_penalties(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0 || counts_tokens(params)
}

/// Whether penalties depend on the sample's own tokens alone.
fn counts_tokens(params: &SamplingParams) -> bool {
    params.presence_penalty != 0.0 || params.frequency_penalty != 0.0
}

/// Whether [`apply`] changes anything.
pub(super) fn changes(draw: &Draw) -> bool {
    let params = draw.params;
    !draw.forbidden.is_empty()
        || draw.mask.is_some()
        || !params.logit_bias.is_empty()
        || params.allowed_token_ids.is_some()
        || has_penalties(params)
        || completed_by(draw).next().is_some()
}

/// Fills `changed` with the row as it is drawn from.
pub(super) fn apply(row: &[f32], draw: &Draw, changed: &mut Vec<f32>) {
    changed.clear();
    changed.extend_from_slice(row);
    penalise(changed, draw);
    for &(id, bias) in &draw.params.logit_bias {
        change(changed, id, |logit| logit + bias);
    }
    if let Some(allowed) = &draw.params.allowed_token_ids {
        forbid_others(changed, allowed);
    }
    for id in completed_by(draw) {
        forbid(changed, id);
    }
    for &id in draw.forbidden {
        forbid(changed, id);
    }
    if let Some(mask) = draw.mask {
        apply_mask(changed, mask);
    }
}

fn penalise(row: &mut [f32], draw: &Draw) {
    let (params, Some(counts)) = (draw.params, draw.past.counts) else { return };
    let penalty = params.repetition_penalty;
    if penalty != 1.0 {
        for id in counts.distinct() {
            change(row, id, |logit| if logit > 0.0 { logit / penalty } else { logit * penalty });
        }
    }
    if counts_tokens(params) {
        for &(id, count) in counts.sample() {
            change(row, id, |logit| {
                logit - params.frequency_penalty * count as f32 - params.presence_penalty
            });
        }
    }
}

/// The tokens that would complete a bad word.
fn completed_by<'a>(draw: &'a Draw) -> impl Iterator<Item = u32> + 'a {
    draw.params.bad_words.iter().filter_map(|word| {
        let (&last, before) = word.split_last()?;
        draw.past.tokens.ends_with(before).then_some(last)
    })
}

fn change(row: &mut [f32], id: u32, to: impl Fn(f32) -> f32) {
    if let Some(logit) = row.get_mut(id as usize).filter(|logit| logit.is_finite()) {
        *logit = to(*logit).clamp(f32::MIN, f32::MAX);
    }
}

fn forbid(row: &mut [f32], id: u32) {
    if let Some(logit) = row.get_mut(id as usize) {
        *logit = f32::NEG_INFINITY;
    }
}

fn forbid_others(row: &mut [f32], allowed: &[u32]) {
    let kept: Vec<Option<f32>> = allowed.iter().map(|&id| row.get(id as usize).copied()).collect();
    row.fill(f32::NEG_INFINITY);
    for (&id, kept) in allowed.iter().zip(kept) {
        if let Some(kept) = kept {
            row[id as usize] = kept;
        }
    }
}

/// Forbids the tokens whose bit is not set, and those that the mask has no bit for.
fn apply_mask(row: &mut [f32], mask: &[u32]) {
    for (word, logits) in row.chunks_mut(32).enumerate() {
        let bits = mask.get(word).copied().unwrap_or(0);
        for (bit, logit) in logits.iter_mut().enumerate() {
            if bits >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

#[cfg(test)]
mod tests;
