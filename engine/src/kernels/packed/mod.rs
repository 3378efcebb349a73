//! Attention within packed groups, forward and backward.
//!
//! A group is a prompt and the tails that continue it: each tail attends to the prompt and to
//! itself. Its sequences become spans over pages that are made for the call, and tails share the
//! pages that their prompt fills. So the forward pass is the engine's kernel, and gives its bits.
//!
//! # Layout
//! - `layout`: groups as spans over pages.
//! - `items`: how the backward pass is cut, and what it reads and writes.
//! - `backward`: the backward pass of one item.

mod backward;
mod items;
mod layout;

pub use items::{Gradients, Saved};
pub use layout::PackedGroup;

use super::attention::paged_attention_with_sums;
use layout::{Layout, PageBuffers};

/// Attention of packed groups with scale `1 / sqrt(head_dim)`.
#[derive(Clone, Copy)]
pub struct PackedAttention<'a> {
    /// `[rows, heads, head_dim]`
    pub q: &'a [f32],
    /// `[rows, kv_heads, head_dim]`
    pub k: &'a [f32],
    /// `[rows, kv_heads, head_dim]`
    pub v: &'a [f32],
    /// The groups, which cover the rows in order.
    pub groups: &'a [PackedGroup],
    /// Heads that keys and values have.
    pub kv_heads: usize,
    /// Dimensions of a head; a multiple of 8.
    pub head_dim: usize,
    /// Positions that a row sees, its own included; all before it if none.
    pub window: Option<usize>,
}

impl PackedAttention<'_> {
    /// Writes the output, `[rows, heads, head_dim]`, and the logarithm of the sum of exponentials
    /// of every row's scores, `[rows, heads]`.
    ///
    /// # Panics
    /// If a shape does not fit.
    pub fn forward(&self, out: &mut [f32], log_sums: &mut [f32]) {
        self.check();
        let layout = Layout::new(self.groups);
        let pages = PageBuffers::new(&layout, self.k, self.v, [self.kv_heads, self.head_dim]);
        let spans = layout.spans();
        paged_attention_with_sums(self.q, (out, log_sums), &pages.pages(), &spans, self.window);
    }

    /// Writes the gradients by `q`, `k` and `v` out of the gradient by the output: the backward
    /// pass of FlashAttention-2 (arXiv 2307.08691), whose scores are computed again. Sums are
    /// formed in an order that depends on the groups alone.
    ///
    /// # Panics
    /// If a shape does not fit.
    pub fn backward(&self, saved: &Saved<'_>, by: &mut Gradients<'_>) {
        self.check();
        items::run(self, saved, by);
    }

    /// Query heads.
    fn heads(&self) -> usize {
        self.q.len() * self.kv_heads / self.k.len().max(1)
    }

    fn rows(&self) -> usize {
        self.groups.last().map_or(0, |group| group.rows().end)
    }

    fn check(&self) {
        let mut next = 0;
        for group in self.groups {
            assert_eq!(group.prompt.start, next, "the groups cover the rows in order");
            assert!(!group.prompt.is_empty(), "a group's prompt has at least one row");
            next = group.rows().end;
        }
        let kv_len = next * self.kv_heads * self.head_dim;
        assert!(
            self.k.len() == kv_len && self.v.len() == kv_len,
            "k and v must be [rows, kv_heads, head_dim]"
        );
        assert!(
            kv_len > 0 && !self.q.is_empty() && self.q.len().is_multiple_of(kv_len),
            "q must be [rows, heads, head_dim] with heads a multiple of kv_heads"
        );
    }
}

#[cfg(test)]
mod tests;
